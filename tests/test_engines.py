"""Pipeline folders in the hands of serving engines and endpoints, which know diffusers and not this package."""

import base64
import inspect
import json
import runpy
import shutil
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny import build_pipeline, draw_image, teach_to_keep

import editar_hf
from editar_hf.pipelines.hub import ENGINE_FILES


pytestmark = pytest.mark.filterwarnings(
    "ignore:The center crop cuts", "ignore:A prompt is longer", "ignore:`torch_dtype` is deprecated"
)
ROOT = Path(__file__).parents[1]
PROMPT = "make the red circle blue"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "editor"
    build_pipeline().save_pretrained(folder)
    return folder


def load_as_an_engine(folder, **options):
    """Load a folder as SGLang does: first plainly, then with the folder's own `pipeline.py`."""
    options = {"torch_dtype": torch.float32, "revision": None, **options}
    with pytest.raises(AttributeError, match="has no attribute EditARPipeline"):
        DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=False, **options)
    options |= {"custom_pipeline": str(folder), "trust_remote_code": True}
    pipe = DiffusionPipeline.from_pretrained(str(folder), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cpu")


@pytest.fixture(scope="module")
def pipe(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield load_as_an_engine(folder)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Loading


def test_saved_and_shipped_folders_hold_the_files_for_engines(folder):
    package = Path(editar_hf.__file__).parent / "engine_files"
    for name in ENGINE_FILES:
        expected = (package / name).read_bytes()
        assert (folder / name).read_bytes() == expected
        assert (ROOT / "projects" / "stickers" / "sticker-editor" / name).read_bytes() == expected
    # diffusers-cli and vLLM-Omni fail if it is a list.
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "EditARPipeline"


def test_saving_keeps_files_that_somebody_has_changed(folder, tmp_path):
    (tmp_path / "pipeline.py").write_text("# mine")
    build_pipeline().save_pretrained(tmp_path)
    assert (tmp_path / "pipeline.py").read_text() == "# mine"


def test_an_engine_loads_the_weights_and_settings_of_the_folder(pipe, folder, tmp_path):
    assert isinstance(pipe, editar_hf.EditARPipeline)
    own = editar_hf.EditARPipeline.from_pretrained(folder)
    for name in ("transformer", "vq_model", "text_encoder"):
        own_weights = getattr(own, name).state_dict()
        assert all(torch.equal(own_weights[key], tensor) for key, tensor in getattr(pipe, name).state_dict().items())
    assert pipe.transformer.generation_config.guidance_scale == own.transformer.generation_config.guidance_scale == 3
    pipe.save_pretrained(tmp_path)
    saved, first = (json.loads((path / "model_index.json").read_text()) for path in (tmp_path, folder))
    assert {**saved, "_name_or_path": None} == {**first, "_name_or_path": None}


# The calls that engines make


@pytest.mark.parametrize("size", [(1024, 1024), (24, 40)], ids=["default", "of the source"])
def test_a_call_of_sglang_returns_the_size_that_it_asks_for(pipe, size):
    source = draw_image(0, 40, 24)
    accepted = inspect.signature(pipe.__call__).parameters
    call = {"prompt": PROMPT, "num_inference_steps": 50, "guidance_scale": 3.5, "height": size[0], "width": size[1]}
    call |= {"generator": seeded(), "image": source}
    call = {name: value for name, value in call.items() if name in accepted}
    assert "num_inference_steps" not in call
    images = pipe(**call, output_type="pt").images
    assert images.shape == (1, 3, *size)
    own = build_pipeline()(
        PROMPT,
        image=source,
        height=size[0],
        width=size[1],
        size_policy="fit",
        guidance_scale=3.5,
        generator=seeded(),
        output_type="pt",
    )
    assert torch.equal(images, own.images)
    assert 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize("guidance_scale", [0.0, 4.0])
def test_a_call_of_vllm_omni_returns_the_size_that_it_asks_for(pipe, guidance_scale):
    source = draw_image(0, 40, 24)
    for backend in ("_flash_3_hub", "flash"):
        with pytest.raises(ValueError, match="`backend` is"):
            pipe.transformer.set_attention_backend(backend)
    pipe.transformer.set_attention_backend("native")
    call = {"prompt": PROMPT, "image": source, "guidance_scale": guidance_scale, "generator": seeded()}
    with torch.inference_mode():
        output = pipe(**call, height=1024, width=1024, num_images_per_prompt=2, output_type="pil")
    assert [image.size for image in output.images] == [(1024, 1024)] * 2
    # 0 stands for the folder's own guidance.
    call |= {"guidance_scale": guidance_scale or 3.0, "generator": seeded()}
    own = build_pipeline()(**call, height=1024, width=1024, size_policy="fit", num_images_per_prompt=2)
    assert torch.equal(output.image_tokens, own.image_tokens)


def test_a_call_without_a_size_returns_the_size_of_the_source(pipe):
    source = draw_image(0, 40, 24)
    (image,) = pipe(PROMPT, image=source, generator=seeded()).images
    (own,) = build_pipeline()(PROMPT, image=source, generator=seeded()).images
    assert np.array_equal(image, own)


def test_an_image_from_text_has_the_size_that_is_asked_for(pipe):
    with pytest.warns(UserWarning, match="`image` is missing"):
        output = pipe(prompt=PROMPT, height=1024, width=512, generator=seeded(), output_type="np")
    assert output.images.shape == (1, 1024, 512, 3)


def test_diffusers_cli_runs_a_folder_whose_index_names_pipeline_py(folder, tmp_path, monkeypatch):
    pytest.importorskip("diffusers.commands.run", reason="this version of diffusers has no `diffusers-cli run`")
    from diffusers.commands.diffusers_cli import main

    shutil.copytree(folder, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    text = '"_class_name": "EditARPipeline"'
    index.write_text(index.read_text().replace(text, '"_class_name": ["pipeline", "EditARPipeline"]'))
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(build_pipeline().transformer, config).save_pretrained(tmp_path / "lora")
    draw_image(0, 40, 24).save(tmp_path / "source.png")
    call = {"prompt": PROMPT, "image": str(tmp_path / "source.png"), "height": 32, "width": 32}
    lora = {"lora_id": str(tmp_path / "lora"), "lora_scale": 0.5}
    words = ["run", "--model", tmp_path / "model", "--trust-remote-code", "--device-map", "cpu", "--seed", 3]
    words += ["--pipeline-kwargs", json.dumps(call), "--lora", json.dumps(lora), "--output", tmp_path / "edited.png"]
    monkeypatch.setattr(sys, "argv", ["diffusers-cli", *map(str, words)])
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    main()
    own = build_pipeline()
    own.load_lora_weights(tmp_path / "lora", adapter_name="mine")
    own.set_adapters("mine", 0.5)
    (image,) = own(
        PROMPT, image=draw_image(0, 40, 24), height=32, width=32, size_policy="fit", generator=seeded(3)
    ).images
    assert np.array_equal(Image.open(tmp_path / "edited.png"), image)


# Inference Endpoints


@pytest.fixture(scope="module")
def handler(folder):
    return runpy.run_path(str(folder / "handler.py"))["EndpointHandler"](str(folder))


def encode(image):
    file = BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def ask(handler, inputs, **parameters):
    """Send a request through JSON, and return the image and the seed of the answer, and what it preserved."""
    answer = json.loads(json.dumps(handler(json.loads(json.dumps({"inputs": inputs, "parameters": parameters})))))
    assert answer.keys() == {"image", "seed", *(["preserved"] if parameters.get("preserve") == "auto" else [])}
    return Image.open(BytesIO(base64.b64decode(answer.pop("image")))), *answer.values()


def test_an_endpoint_returns_the_edit_of_the_pipeline(handler):
    source, mask = draw_image(0, 40, 24), Image.new("L", (40, 24))
    mask.paste(255, (20, 8, 26, 14))
    for parameters, call in (
        ({}, {}),
        ({"guidance_scale": 5, "negative_prompt": "green"}, {"guidance_scale": 5.0, "negative_prompt": "green"}),
        ({"mask": encode(mask), "detail": "source"}, {"mask_image": mask, "detail": "source"}),
        ({"task": "canny", "target_size": {"width": 100, "height": 50}}, {"task": "canny", "width": 100, "height": 50}),
    ):
        image, seed = ask(handler, encode(source), prompt=PROMPT, seed=7, **parameters)
        (own,) = build_pipeline()(PROMPT, image=source, generator=seeded(7), size_policy="fit", **call).images
        assert seed == 7
        assert np.array_equal(image, own), parameters


def test_an_endpoint_says_whether_the_edit_may_have_changed_the_whole_image(folder):
    handler = runpy.run_path(str(folder / "handler.py"))["EndpointHandler"](str(folder))
    source = draw_image(0)
    teach_to_keep(handler.pipeline, [source], [PROMPT])
    for threshold, is_preserved in ((1.0, True), (1e-9, False)):
        handler.pipeline.transformer.generation_config.preserve_threshold = threshold
        image, _, preserved = ask(handler, encode(source), prompt=PROMPT, seed=7, preserve="auto")
        own = handler.pipeline(PROMPT, image=source, preserve="auto", generator=seeded(7))
        assert preserved is is_preserved
        assert np.array_equal(image, own.images[0])


def test_the_seed_that_an_endpoint_draws_gives_the_image_again(handler):
    first, seed = ask(handler, None, prompt=PROMPT, task="text-to-image")
    again, _ = ask(handler, None, prompt=PROMPT, task="text-to-image", seed=seed)
    other, other_seed = ask(handler, None, prompt=PROMPT, task="text-to-image")
    assert np.array_equal(first, again)
    assert seed != other_seed
    assert not np.array_equal(first, other)


SOURCE = encode(draw_image(0))


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        (SOURCE, {}, "`prompt` is missing"),
        (SOURCE, {"prompt": 3}, "`prompt` is 3; pass a string"),
        (None, {"prompt": PROMPT}, "`inputs` is missing"),
        (SOURCE, {"prompt": PROMPT, "strength": 0.5, "steps": 3}, "`parameters` holds steps, strength"),
        (SOURCE, {"prompt": PROMPT, "task": "paint"}, "`task` is 'paint'"),
        (SOURCE, {"prompt": PROMPT, "preserve": "all"}, "`preserve` is 'all'"),
        (SOURCE, {"prompt": PROMPT, "preserve": "auto", "mask": SOURCE}, "`preserve` is 'auto' and `mask` is given"),
        (
            SOURCE,
            {"prompt": PROMPT, "detail": "source", "target_size": {"width": 64, "height": 64}},
            "`detail` is 'source' and `target_size` is given",
        ),
        (SOURCE, {"prompt": PROMPT, "seed": -1}, "`seed` is -1"),
        (SOURCE, {"prompt": PROMPT, "guidance_scale": "3"}, "`guidance_scale` is '3'"),
        (SOURCE, {"prompt": PROMPT, "target_size": {"width": 64}}, "`target_size` is {'width': 64}"),
        (SOURCE, {"prompt": PROMPT, "target_size": {"width": 0, "height": 4}}, "`target_size.width` is 0"),
        (SOURCE, {"prompt": PROMPT, "target_size": {"width": 16384, "height": 16384}}, "at most 16777216 pixels"),
        (SOURCE, {"prompt": PROMPT, "mask": "!"}, "`mask` is '!'; pass an image file in base64"),
        (SOURCE, {"prompt": PROMPT, "mask": encode(draw_image(0, 16, 8))}, "`mask_image` is 16×8"),
        ("no base64", {"prompt": PROMPT}, "`inputs` is 'no base64'; pass an image file in base64"),
        (["a", "list"], {"prompt": PROMPT}, "`inputs` is .*; pass an image file in base64"),
        (SOURCE[:80], {"prompt": PROMPT}, "`image` holds 'a file', which does not decode"),
        (encode(Image.new("1", (5000, 5000))), {"prompt": PROMPT}, "`inputs` is 5000×5000; pass an image of at most"),
    ],
)
def test_a_wrong_request_is_refused_with_its_field(handler, inputs, parameters, message):
    with pytest.raises(ValueError, match=message):
        ask(handler, inputs, **parameters)


def test_an_endpoint_opens_no_path_and_no_url_of_a_client(handler, tmp_path):
    draw_image(0).save(tmp_path / "secret.png")
    for text in (str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png", "http://localhost:9/secret.png"):
        for request in ({"inputs": text}, {"inputs": SOURCE, "mask": text}):
            inputs = request.pop("inputs")
            with pytest.raises(ValueError, match="pass an image file in base64"):
                ask(handler, inputs, prompt=PROMPT, **request)
