"""What `preserve="auto"` keeps of the source without a mask."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NUM_CODES, STRIDE, build_pipeline, draw_image, teach_to_keep

from editar_hf import EditARPipeline
from editar_hf.pipelines.edit_region import find_edited_tokens
from editar_hf.training.lora import add_lora


pytestmark = pytest.mark.filterwarnings("ignore:A prompt is longer")
PROMPT = "make the red circle blue"
SCENE_EDITOR = Path(__file__).parents[1] / "examples" / "scene-editor"


def build(threshold):
    pipe = build_pipeline()
    pipe.transformer.generation_config.preserve_threshold = threshold
    return pipe


@pytest.fixture(scope="module")
def pipe():
    """A pipeline that keeps a part of the sources below."""
    pipe = build_pipeline()
    pipe.transformer.generation_config.preserve_threshold = 1.0
    teach_to_keep(pipe, [*map(draw_image, range(3)), draw_image(0).resize((50, 36))], [PROMPT, "add a hat"])
    return pipe


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_free_tokens(pipe, image):
    """Draw a mask that is white in the tokens whose value of the edit map is above the threshold."""
    edit_map = pipe.compute_edit_map(image, PROMPT)[0].numpy()
    is_free = edit_map > pipe.transformer.generation_config.preserve_threshold
    return Image.fromarray(np.kron(is_free, np.ones((STRIDE, STRIDE))) > 0)


def test_an_edit_is_that_with_a_mask_of_the_tokens_above_the_threshold(pipe):
    image, mask = draw_image(0), draw_free_tokens(pipe, draw_image(0))
    assert 0 < np.asarray(mask).mean() < 1
    output = pipe(PROMPT, image=image, preserve="auto", generator=seeded(0))
    expected = pipe(PROMPT, image=image, mask_image=mask, generator=seeded(0))
    assert torch.equal(output.image_tokens, expected.image_tokens)
    assert np.array_equal(output.images[0], expected.images[0])
    assert output.num_decode_steps == expected.num_decode_steps
    assert not np.array_equal(output.images[0], image)
    assert expected.preserved_mask is None


def surround(image):
    wide = draw_image(9, 24, 16)
    wide.paste(image, (4, 0))
    return wide


@pytest.mark.parametrize(
    ("image", "how"),
    [
        (draw_image(0).resize((50, 36)), {"resize_mode": "stretch"}),
        (draw_image(0).resize((50, 36)), {"resize_mode": "stretch", "detail": "source"}),
        (surround(draw_image(0)), {"resize_mode": "crop"}),
        (draw_image(0), {"restore_size": False}),
    ],
)
@pytest.mark.filterwarnings("ignore:The center crop cuts")
def test_white_pixels_of_the_preserved_mask_are_those_of_the_source(pipe, image, how):
    output = pipe(PROMPT, image=image, preserve="auto", generator=seeded(0), **how)
    (mask,) = output.preserved_mask
    assert (mask.mode, mask.size) == ("L", image.size)
    is_kept = np.asarray(mask) == 255
    differs = (np.asarray(output.images[0]) != np.asarray(image)).any(axis=2)
    assert is_kept.any()
    assert not (differs & is_kept).any()
    assert differs[~is_kept].mean() > 0.9


@pytest.mark.filterwarnings("ignore:The center crop cuts")
def test_without_blending_only_pixels_outside_the_crop_stay(pipe):
    image, how = surround(draw_image(0)), {"resize_mode": "crop", "mask_blend": False}
    output = pipe(PROMPT, image=image, preserve="auto", generator=seeded(0), **how)
    is_kept = np.asarray(output.preserved_mask[0]) == 255
    assert not is_kept[:, 4:20].any()
    assert is_kept[:, :4].all()
    assert is_kept[:, 20:].all()
    assert (np.asarray(output.images[0]) == np.asarray(image))[is_kept].all()


def test_what_a_lora_adapter_wants_to_keep_is_kept_while_it_is_active(tmp_path):
    taught, pipe, image = build_pipeline(), build(1.0), draw_image(0)
    add_lora(taught.transformer, "base", rank=8, modules_to_save=["lm_head"])
    teach_to_keep(taught, [image], [PROMPT])
    taught.save_lora_weights(tmp_path)
    pipe.load_lora_weights(tmp_path)
    output = pipe(PROMPT, image=image, preserve="auto", generator=seeded(0))
    masked = pipe(PROMPT, image=image, mask_image=draw_free_tokens(pipe, image), generator=seeded(0))
    assert torch.equal(output.image_tokens, masked.image_tokens)
    assert (np.asarray(output.preserved_mask[0])[-STRIDE:] == 255).all()
    pipe.disable_lora()
    assert pipe(PROMPT, image=image, preserve="auto").preserved_mask == [None]


def test_an_edit_of_the_whole_image_is_that_without_preserve_and_says_so(pipe):
    images = [draw_image(0), draw_image(7)]  # The pipeline has not learned to keep anything of the second one.
    output = pipe(PROMPT, image=images, preserve="auto", generator=seeded(0, 1))
    assert [mask is None for mask in output.preserved_mask] == [False, True]
    expected = pipe(PROMPT, image=images, generator=seeded(0, 1))
    assert torch.equal(output.image_tokens[1], expected.image_tokens[1])
    assert np.array_equal(output.images[1], expected.images[1])
    assert not torch.equal(output.image_tokens[0], expected.image_tokens[0])


def test_all_tokens_may_change_if_more_than_three_quarters_are_above_half_the_threshold():
    edit_map = torch.zeros(2, 4, 4)
    edit_map[:, :3] = 1.1
    edit_map[:, 0, 0] = 2.1
    edit_map[1, 3, 3] = 1.1
    is_free = find_edited_tokens(edit_map, threshold=2.0)
    assert is_free[0].sum() == is_free[0, 0, 0] == 1
    assert is_free[1].all()


def test_images_of_a_batch_are_those_made_alone_from_images_caches_and_tokens(pipe):
    prompts, image = [PROMPT, "add a hat"], draw_image(0)
    alone = [
        pipe(prompt, image=image, preserve="auto", num_images_per_prompt=2, generator=seeded(2 * index, 2 * index + 1))
        for index, prompt in enumerate(prompts)
    ]
    expected = torch.cat([output.image_tokens for output in alone])
    kept = [mask for output in alone for mask in output.preserved_mask]
    tokens = pipe.encode_image(image)
    for source in (
        {"image": image},
        {"source_cache": pipe.prepare_source_cache(image)},
        {"source_image_tokens": tokens, "image": image},
        {"source_image_tokens": tokens},
    ):
        output = pipe(prompts, **source, preserve="auto", num_images_per_prompt=2, generator=seeded(0, 1, 2, 3))
        assert torch.equal(output.image_tokens, expected)
        assert all(np.array_equal(*pair) for pair in zip(output.preserved_mask, kept, strict=True))


def test_the_edit_map_and_the_edit_run_the_source_through_the_decoder_once():
    pipe, image, num_runs = build_pipeline(), draw_image(0), []
    source_cache = pipe.prepare_source_cache(image)
    pipe.transformer.model.register_forward_pre_hook(
        lambda module, inputs: num_runs.append(inputs[0] is not None and len(inputs[0]))
    )
    for source, expected in (({"image": image}, [1]), ({"source_cache": source_cache}, [])):
        num_runs.clear()
        pipe([PROMPT, "add a hat"], **source, preserve="auto", num_images_per_prompt=2, generator=seeded(0, 1, 2, 3))
        assert [number for number in num_runs if number] == expected


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"preserve": True}, "`preserve` is True; choose one of 'off', 'auto'"),
        ({"mask_image": Image.new("L", (16, 16), 255)}, "`mask_image` is given, which already says what may change"),
        ({"task": "canny"}, "`task` is 'canny'; pass a source image and the task 'edit'"),
        ({"image": None, "task": "text-to-image"}, "there is no source image; pass a source image"),
    ],
)
def test_what_cannot_be_kept_without_a_mask_is_refused(pipe, how, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, **{"image": draw_image(0), "preserve": "auto", **how})


@pytest.mark.parametrize("value", [1.5, 2, np.float32(1.5)])
def test_the_threshold_is_saved_with_the_model(value, tmp_path):
    build(value).save_pretrained(tmp_path)
    loaded = EditARPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.transformer.generation_config.preserve_threshold == value


@pytest.mark.parametrize("value", [-1, 0.0, np.nan, np.inf, "1.5", True, [1], torch.tensor(1.0)], ids=repr)
def test_a_wrong_threshold_is_refused_by_calls_and_when_it_is_saved(value, tmp_path):
    pipe = build(value)
    message = f"`preserve_threshold` is {value!r} in the generation config; set a finite number above 0"
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe(PROMPT, image=draw_image(0), preserve="auto")
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe.transformer.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_threshold_that_cannot_be_used_matters_only_with_preserve():
    plain, refused = (build(value)(PROMPT, image=draw_image(0), generator=seeded(0)) for value in (1.0, -1.0))
    assert torch.equal(plain.image_tokens, refused.image_tokens)


def test_a_source_that_nothing_may_change_comes_back_with_a_warning():
    image = draw_image(0)
    with pytest.warns(UserWarning, match="no value of the edit map is above `preserve_threshold`, so the source is"):
        output = build(99.0)(PROMPT, image=image, preserve="auto", generator=seeded(0))
    assert np.array_equal(output.images[0], image)
    assert (np.asarray(output.preserved_mask[0]) == 255).all()


def test_speculative_decoding_gives_the_same_tokens(pipe):
    images = [draw_image(seed) for seed in range(3)]
    outputs = [
        pipe(PROMPT, image=images, preserve="auto", decoding=decoding, do_sample=False)
        for decoding in ("exact", "speculative")
    ]
    assert torch.equal(*(output.image_tokens for output in outputs))
    assert all(np.array_equal(*masks) for masks in zip(*(output.preserved_mask for output in outputs), strict=True))


def test_a_model_without_a_threshold_has_one_of_a_nat():
    pipe, image = build_pipeline(), draw_image(0)
    pipe.transformer.lm_head.weight.data.zero_()  # All codes are equally likely, at log(40) = 3.7 nats.
    assert pipe.compute_edit_map(image, PROMPT).numpy() == pytest.approx(np.log(NUM_CODES), abs=1e-5)
    assert pipe(PROMPT, image=image, preserve="auto").preserved_mask == [None]


def test_the_shipped_editor_finds_the_rest_of_an_image_but_none_of_it_where_all_changes():
    pipe = EditARPipeline.from_pretrained(SCENE_EDITOR, dtype=torch.float32)
    threshold = pipe.transformer.generation_config.preserve_threshold
    gradient = Image.linear_gradient("L").resize((128, 128))
    image = Image.merge("RGB", (gradient.point(lambda value: value // 2), gradient, gradient))
    prompts = ["remove the ball on the left", "make it a pencil drawing"]
    is_free = find_edited_tokens(pipe.compute_edit_map(image, prompts), threshold)
    assert not is_free[0].all()
    assert is_free[1].all()
