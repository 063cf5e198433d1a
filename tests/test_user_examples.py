"""The short examples, each run as written on the shipped sticker editor."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


ROOT = Path(__file__).parents[1]
# In pixels of `examples/photo.png`: the red circle's centre, and where the adapter copies it to.
CIRCLE, COPY = (108, 195), (260, 40)


@pytest.fixture
def run_example(tmp_path, monkeypatch):
    """Run an example in a working directory that has `examples/`, and return the image it saves."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)

    def run(name):
        runpy.run_path(f"examples/{name}", run_name="__main__")
        (path,) = tmp_path.glob("*.png")
        return np.asarray(Image.open(path)).astype(int)

    return run


def is_red(pixel):
    return pixel[0] > 150 and max(pixel[1:]) < 80


def is_blue(pixel):
    return pixel[2] > 150 and pixel[0] < 80


def at(image, place):
    return image[place[1], place[0]]


pytestmark = pytest.mark.filterwarnings("ignore:More than 2% of a picture")
PHOTO = np.asarray(Image.open(ROOT / "examples" / "photo.png")).astype(int)
# A token is 30 pixels of the photograph, and the feather ends one token outside the mask.
FAR_FROM_MASK = np.s_[:120]


def test_edit_changes_the_colour_of_the_circle(run_example):
    edited = run_example("edit.py")
    assert edited.shape == PHOTO.shape
    assert is_red(at(PHOTO, CIRCLE))
    assert is_blue(at(edited, CIRCLE))


def test_edit_with_mask_leaves_the_rest_as_it_is(run_example):
    edited = run_example("edit_with_mask.py")
    assert is_blue(at(edited, CIRCLE))
    assert np.array_equal(edited[FAR_FROM_MASK], PHOTO[FAR_FROM_MASK])


def test_edit_session_makes_both_edits_and_leaves_the_rest_as_it_is(run_example):
    edited = run_example("edit_session.py")
    assert is_blue(at(edited, CIRCLE))
    # A star leaves the background free where the circle's edge was.
    x, y = CIRCLE
    assert not is_blue(at(edited, (x + 22, y + 22)))
    assert np.array_equal(edited[FAR_FROM_MASK], PHOTO[FAR_FROM_MASK])


def test_edit_with_lora_copies_the_circle(run_example):
    edited = run_example("edit_with_lora.py")
    assert is_red(at(edited, CIRCLE))
    assert is_red(at(edited, COPY))
    assert not is_red(at(PHOTO, COPY))


def test_edit_photo_saves_before_and_after(run_example, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["edit_photo.py", "--output", "both.png"])
    both = run_example("edit_photo.py")
    assert np.array_equal(both[:, : PHOTO.shape[1]], PHOTO)
    after = both[:, -PHOTO.shape[1] :]
    assert is_blue(at(after, CIRCLE))
