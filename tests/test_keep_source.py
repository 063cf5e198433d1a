"""What `keep_source` keeps of the source in the results of other editors."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import draw_image

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
    ],
)
def test_pairs_that_do_not_fit_are_refused(vq_model, pair, edited, threshold, message):
    with pytest.raises(ValueError, match=message):
        keep_source(pair[0], edited, vq_model, threshold)
