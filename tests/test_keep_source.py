"""What `keep_source` keeps of the source in the results of other editors."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import build_pipeline, draw_image

from editar_hf import EditARVQModel, keep_source


SCENE_EDITOR = Path(__file__).parents[1] / "examples" / "scene-editor"
BOX = (60, 40, 140, 120)


@pytest.fixture(scope="module")
def vq_model():
    return EditARVQModel.from_pretrained(SCENE_EDITOR, subfolder="vq_model")


@pytest.fixture(scope="module")
def pair():
    """A photograph-like image, and the same with a box pasted in."""
    noise = draw_image(0, 12, 12).resize((256, 192), Image.Resampling.BICUBIC)
    edited = noise.copy()
    edited.paste("red", BOX)
    return noise, edited


def compress(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return Image.open(file)


def add_noise(image):
    noise = np.random.default_rng(0).normal(0, 3, np.asarray(image).shape)
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("spoil", [compress, add_noise, lambda image: image.resize((200, 150))])
def test_pixels_outside_the_edit_of_another_editor_are_the_sources(vq_model, pair, spoil):
    source, edited = pair
    spoiled = spoil(edited)
    kept = np.asarray(keep_source(source, spoiled, vq_model)).astype(int)
    result = np.asarray(spoiled.resize(source.size, Image.Resampling.LANCZOS)).astype(int)
    rows, columns = np.mgrid[: source.height, : source.width]
    left, top, right, bottom = BOX
    distance = np.maximum(np.maximum(left - columns, columns - right + 1), np.maximum(top - rows, rows - bottom + 1))
    far, inside = distance > 4 * 8, distance <= 0  # Tokens have 8 pixels a side.
    assert far.mean() > 0.5
    assert np.array_equal(kept[far], np.asarray(source)[far])
    assert (np.asarray(source)[far] != result[far]).any()
    assert np.array_equal(kept[inside], result[inside])


def test_the_edge_between_edit_and_source_is_soft(vq_model, pair):
    source = pair[0].point(lambda value: 40 + value // 2)
    edited = source.point(lambda value: value + 12)
    edited.paste("red", BOX)
    kept = np.asarray(keep_source(source, edited, vq_model)).astype(int)
    shares = (kept - np.asarray(source))[80, BOX[2] :, 1] / 12  # to the right of the box
    assert (np.diff(shares) <= 0).all()
    assert (shares[0], shares[-1]) == (1, 0)
    assert ((shares > 0) & (shares < 1)).sum() == 7  # between the middles of two pixels that are a token apart


def test_images_of_one_pixel_are_compared(vq_model):
    red, blue = (Image.new("RGB", (1, 1), color) for color in ("red", "blue"))
    assert keep_source(red, red, vq_model).getpixel((0, 0)) == (255, 0, 0)
    with pytest.warns(UserWarning, match="differs from `source` nearly everywhere") as record:
        assert keep_source(red, blue, vq_model).getpixel((0, 0)) == (0, 0, 255)
    assert record[0].filename == __file__


def test_transparent_pixels_become_white(vq_model, pair):
    source = pair[0].convert("RGBA")
    source.putalpha(0)
    assert np.array_equal(keep_source(source, source, vq_model), Image.new("RGB", source.size, "white"))


def test_an_edit_of_the_whole_image_stays_and_an_equal_image_returns_the_source(vq_model, pair):
    source, _ = pair
    drawing = draw_image(5, *source.size)
    with pytest.warns(UserWarning, match="`edited` differs from `source` nearly everywhere"):
        assert np.array_equal(keep_source(source, drawing, vq_model), drawing)
    assert np.array_equal(keep_source(source, source, vq_model), source)


def test_a_higher_threshold_keeps_more(vq_model, pair):
    source, edited = pair
    spoiled = add_noise(edited)
    counts = [
        (np.asarray(keep_source(source, spoiled, vq_model, threshold)) == np.asarray(source)).all(axis=2).sum()
        for threshold in (0.02, 0.1, 0.5)
    ]
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize(
    ("edited", "threshold", "message"),
    [
        (draw_image(0, 64, 32), 0.1, "`edited` is 64×32 pixels and `source` is 256×192"),
        (draw_image(0, 256, 192), 2, "`threshold` is 2.0; pass a cosine distance between 0 and 2"),
        ("missing.png", 0.1, "`edited` is 'missing.png', which does not open"),
        ([draw_image(0, 256, 192)], 0.1, "`edited` holds a list, not an image; pass a PIL image"),
        (np.full((192, 256, 3), np.nan), 0.1, r"`edited` holds floats in \[nan, nan\]"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(vq_model, pair, edited, threshold, message):
    with pytest.raises(ValueError, match=message):
        keep_source(pair[0], edited, vq_model, threshold)


@pytest.mark.parametrize("vq_model", [None, "scene-editor/vq_model", build_pipeline()])
def test_what_is_not_a_vq_model_is_refused(pair, vq_model):
    with pytest.raises(TypeError, match=r"`vq_model` is a \w+; pass an `EditARVQModel`, such as `pipe.vq_model`"):
        keep_source(*pair, vq_model)
