"""Edits of ComfyUI's tensors, and the node file, which cannot run without ComfyUI."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build_pipeline, draw_image

from editar_hf.processing_editar import TASK_PREFIXES, TEXT_TO_IMAGE
from editar_hf.serving.comfyui import edit_tensor


pytestmark = pytest.mark.filterwarnings("ignore:The center crop cuts", "ignore:A prompt is longer")
NODES = Path(__file__).parents[1] / "examples" / "comfyui" / "editar_nodes.py"
PROMPT = "make the red circle blue"
IMAGES = [draw_image(seed, 40, 24) for seed in range(2)]
IMAGE = torch.stack([torch.from_numpy(np.array(image)) for image in IMAGES]) / 255


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


def edit(pipe, seeds, **call):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipe(PROMPT, image=IMAGES, generator=generators, **call).images
    return np.stack([np.asarray(image) for image in images])


def to_pixels(tensor):
    assert tensor.dtype == torch.float32
    assert 0 <= tensor.min() <= tensor.max() <= 1
    return (tensor * 255).round().byte().numpy()


def test_a_batch_is_edited_image_by_image_with_seeds_in_a_row(pipe):
    result = edit_tensor(pipe, IMAGE, PROMPT, 5, guidance_scale=2.0)
    assert result.shape == IMAGE.shape
    assert np.array_equal(to_pixels(result), edit(pipe, (5, 6), guidance_scale=2.0))


def test_values_outside_the_range_are_clamped(pipe):
    image = IMAGE * 1.2 - 0.1
    result = edit_tensor(pipe, image, PROMPT, 5)
    assert torch.equal(result, edit_tensor(pipe, image.clamp(0, 1), PROMPT, 5))


def test_the_largest_seed_of_comfyui_is_a_seed(pipe):
    result = edit_tensor(pipe, IMAGE, PROMPT, 2**64 - 1)
    assert np.array_equal(to_pixels(result), edit(pipe, (2**64 - 1, 0)))


@pytest.mark.parametrize("num_masks", [1, 2])
def test_a_mask_is_one_where_the_image_may_change(pipe, num_masks):
    mask, masks = torch.zeros(num_masks, 24, 40), []
    for index in range(num_masks):
        mask[index, 8:14, 20 + index : 26] = 1
        masks.append(Image.new("L", (40, 24)))
        masks[index].paste(255, (20 + index, 8, 26, 14))
    result = to_pixels(edit_tensor(pipe, IMAGE, PROMPT, 5, mask))
    assert np.array_equal(result, edit(pipe, (5, 6), mask_image=masks))
    assert np.array_equal(result[:, :, :8], np.stack(IMAGES)[:, :, :8])


def test_the_zero_mask_of_an_image_without_transparency_is_no_mask(pipe):
    result = edit_tensor(pipe, IMAGE, PROMPT, 5, torch.zeros(1, 64, 64))
    assert torch.equal(result, edit_tensor(pipe, IMAGE, PROMPT, 5))


def test_a_condition_map_gives_an_image_of_the_size_of_the_model(pipe):
    assert edit_tensor(pipe, IMAGE[:1, :, :, :1], "a man", 0, task="canny").shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (IMAGE[0], None, r"`image` has shape \(24, 40, 3\)"),
        (IMAGE, IMAGE, r"`mask` has shape \(2, 24, 40, 3\)"),
        (IMAGE, torch.ones(1, 64, 64), "`mask_image` is 64×64 pixels and its image is 40×24"),
    ],
)
def test_tensors_of_other_shapes_are_refused(pipe, image, mask, message):
    with pytest.raises(ValueError, match=message):
        edit_tensor(pipe, image, PROMPT, 0, mask)


def test_every_input_of_a_node_is_an_argument_of_its_function():
    # ComfyUI passes the inputs by name.
    tree = ast.parse(NODES.read_text())
    nodes = [node for node in tree.body if isinstance(node, ast.ClassDef) and "ComfyNode" in ast.unparse(node.bases[0])]
    assert len(nodes) == 2
    for node in nodes:
        functions = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        calls = [item for item in ast.walk(functions["define_schema"]) if isinstance(item, ast.Call)]
        inputs = [call.args[0].value for call in calls if ast.unparse(call.func).endswith(".Input")]
        assert inputs == [argument.arg for argument in functions["execute"].args.args[1:]]
    (tasks,) = (item.value for item in tree.body if isinstance(item, ast.Assign) and item.targets[0].id == "TASKS")
    assert {*ast.literal_eval(tasks), TEXT_TO_IMAGE} == set(TASK_PREFIXES)
