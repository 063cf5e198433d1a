"""Folders that earlier versions saved still load, and give the tokens they gave then."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from tiny import are_near

from editar_hf import EditARPipeline


EXAMPLES = Path(__file__).parents[1] / "examples"
STICKERS = Path(__file__).parents[1] / "projects" / "stickers"
# Tokens of likeliest-token decoding in float32, written by version 0.1.0.
TOKENS = {
    "remove": """
        3450 2237 183 3082 3082 3082 542 542 1284 2468 2886 2886 2886 1510 2886 2886 1284 3406 3406 2886 2886
        3406 3406 3354 1284 3406 3406 3406 2886 3406 53 3406 1284 3406 3406 2886 1510 3406 3065 3406 1284 3406
        3406 3406 3406 207 207 3406 2509 2886 1921 3406 3065 207 3065 3406 3942 3730 2059 2686 1264 1264 1264
        1264
    """,
    "add in mask": """
        3315 56 183 3304 183 183 183 183 713 2098 389 2058 3494 3494 841 451 1573 2803 3942 3473 841 1982 3354
        3730 2191 2627 2812 1090 2468 2561 2468 2468 1325 1090 451 752 303 1982 3248 3288 1325 1090 1448 3494
        2414 3666 3854 3854 1363 1021 1012 641 2822 2003 3640 3095 1313 0 1226 2058 407 3495 2196 872
    """,
    "recolour, seed 0": """
        9 2686 2686 183 183 2686 2686 183 1325 3494 3093 3494 752 3494 841 451 1325 1090 451 451 1090 1982 1090
        3730 1325 1090 451 3093 752 2561 3473 752 1325 3093 3093 752 752 1510 2461 282 1325 1090 841 3093 2886
        3666 2455 435 3942 1021 1090 2812 3522 3709 1379 1825 1313 0 0 1045 2677 2725 1379 3544
    """,
    "copy with adapter": """
        164 373 3927 2351 3288 183 183 183 3783 3640 1611 2889 924 2751 841 451 2141 867 3410 9 3406 1982 3354
        3730 782 759 762 3354 2751 1090 2468 1448 2509 3637 3637 2468 1012 1982 3248 1250 1325 1982 1090 2751
        2414 3666 3854 3854 1363 1019 1448 841 2822 1526 2010 58 1313 3730 1226 3730 1695 3495 2196 872
    """,
}


@pytest.fixture(scope="module")
def pipe():
    pipe = EditARPipeline.from_pretrained(STICKERS / "sticker-editor", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def image():
    image = Image.new("RGB", (64, 64), (128, 128, 128))
    image.paste((20, 60, 230), (44, 44, 62, 62))
    return image


def assert_edit(name, pipe, prompt, **options):
    tokens = pipe(prompt, **options).image_tokens[0]
    assert tokens.tolist() == [int(token) for token in TOKENS[name].split()]


def test_saved_pipeline_gives_the_tokens_it_gave(pipe, image):
    assert_edit("remove", pipe, "remove the blue square", image=image, do_sample=False)


def test_saved_pipeline_keeps_its_mask(pipe, image):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 30, 30))
    masked = {"image": image, "mask_image": mask, "do_sample": False}
    assert_edit("add in mask", pipe, "add a red circle to the top left", **masked)


def test_saved_pipeline_samples_with_its_own_settings(pipe, image):
    generator = torch.Generator().manual_seed(0)
    assert_edit("recolour, seed 0", pipe, "make the blue square green", image=image, generator=generator)


@pytest.mark.parametrize("name", ["sticker-editor", "sticker-copy-lora", "scene-editor"])
def test_header_of_a_shipped_card_repeats_its_figures_and_shows_an_edit_of_the_model(pipe, name):
    folder = (EXAMPLES if name == "scene-editor" else STICKERS) / name
    card = ModelCard.load(folder / "README.md")
    assert card.data.model_name == name
    for result in card.data.eval_results:
        assert f"| {result.metric_value} |" in card.text, result.metric_name
    (example,) = card.data.widget
    editor = EditARPipeline.from_pretrained(folder, dtype=torch.float32) if name == "scene-editor" else pipe
    if name == "sticker-copy-lora":
        editor.load_lora_weights(folder)
    generator = torch.Generator().manual_seed(0)
    (edited,) = editor(example["prompt"], image=folder / example["src"], generator=generator).images
    editor.unload_lora_weights()
    assert are_near(edited, Image.open(folder / example["output"]["url"]))


def test_the_shipped_editor_stays_small_enough_for_a_repository():
    sizes = [path.stat().st_size / 2**20 for path in (EXAMPLES / "scene-editor").rglob("*") if path.is_file()]
    assert max(sizes) <= 15
    assert sum(sizes) <= 32


def test_saved_adapter_gives_the_tokens_it_gave(pipe, image):
    pipe.load_lora_weights(STICKERS / "sticker-copy-lora")
    try:
        prompt = "copy the blue square to the top left"
        assert_edit("copy with adapter", pipe, prompt, image=image, do_sample=False)
    finally:
        pipe.unload_lora_weights()
