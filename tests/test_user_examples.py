"""The short examples, run as written on the shipped checkpoints, and the minimal training at tiny size."""

import re
import runpy
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from tiny import build_pipeline, draw_image

from editar_hf import EditARPipeline


ROOT = Path(__file__).parents[1]
# In pixels of `examples/photo.png`: on the dog, on the car's door, and on the sky.
DOG, CAR, SKY = (55, 140), (265, 195), (330, 30)
# In pixels of the photograph of stickers: the red circle's center, and where the adapter copies it to.
CIRCLE, COPY = (108, 195), (260, 40)


@pytest.fixture
def run_example(tmp_path, monkeypatch):
    """Run an example in a working directory that has `examples/`, and return the image it saves."""
    for name in ("examples", "projects"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)

    def run(name):
        runpy.run_path(f"examples/{name}", run_name="__main__")
        (path,) = tmp_path.glob("*.png")
        return np.asarray(Image.open(path)).astype(int)

    return run


def read_image(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


PHOTO, STICKERS = read_image(ROOT / "examples" / "photo.png"), read_image(ROOT / "projects" / "stickers" / "photo.png")
# A token is 24 pixels of the photograph. The mask of the car begins at its column 185 and its row 134, and the feather
# ends one token outside the tokens of the mask.
FAR_FROM_MASK = np.s_[:, :140]


def at(image, place):
    """Average the color around a place."""
    x, y = place
    return image[y - 6 : y + 6, x - 6 : x + 6].mean((0, 1))


def is_red(color):
    return color[0] > 150 and max(color[1:]) < 80


def is_brown(color):
    """Tell whether the color is that of the dog, which is browner than the ground."""
    return color[0] - color[2] > 60


def test_edit_removes_the_dog_and_leaves_the_car(run_example):
    edited = run_example("edit.py")
    assert edited.shape == PHOTO.shape
    assert is_brown(at(PHOTO, DOG))
    assert not is_brown(at(edited, DOG))
    assert np.abs(at(edited, CAR) - at(PHOTO, CAR)).max() < 40


def test_edit_with_mask_colors_the_car_and_leaves_the_rest_as_it_is(run_example):
    edited = run_example("edit_with_mask.py")
    assert is_red(at(edited, CAR))
    assert not is_red(at(PHOTO, CAR))
    assert np.array_equal(edited[FAR_FROM_MASK], PHOTO[FAR_FROM_MASK])


def test_edit_session_makes_both_edits_and_leaves_the_rest_as_it_is(run_example):
    edited = run_example("edit_session.py")
    # The car has gone: the ground is there, which is neither red nor blue.
    assert np.ptp(at(edited, CAR)) < 50
    assert np.array_equal(edited[FAR_FROM_MASK], PHOTO[FAR_FROM_MASK])


@pytest.mark.filterwarnings("ignore:The center crop cuts")
def test_edit_with_lora_copies_the_circle(run_example):
    edited = run_example("edit_with_lora.py")
    assert is_red(at(edited, CIRCLE))
    assert is_red(at(edited, COPY))
    assert not is_red(at(STICKERS, COPY))


def test_edit_photo_shows_the_photograph_and_the_edits(run_example, monkeypatch):
    words = ["edit_photo.py", "--prompts", "remove the dog", "make it sunset", "--output", "all.png"]
    monkeypatch.setattr("sys.argv", words)
    shown = run_example("edit_photo.py")
    caption = shown.shape[0] - PHOTO.shape[0]
    photo, removed, sunset = np.split(shown[caption:], 3, axis=1)
    photo, removed, sunset = (image[:, : PHOTO.shape[1]] for image in (photo, removed, sunset))
    assert np.array_equal(photo, PHOTO)
    assert not is_brown(at(removed, DOG))
    assert at(sunset, SKY)[0] > at(sunset, SKY)[1] + 30


def test_train_minimal_learns_pairs_and_saves_a_pipeline(tmp_path, capsys, monkeypatch):
    build_pipeline().save_pretrained(tmp_path / "start")
    (tmp_path / "pairs").mkdir()
    features = datasets.Features(
        {"source_image": datasets.Image(), "target_image": datasets.Image(), "prompt": datasets.Value("string")}
    )
    rows = {
        "source_image": [draw_image(seed) for seed in range(4)],
        "target_image": [draw_image(100 + seed) for seed in range(4)],
        "prompt": ["make it blue"] * 4,
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "pairs" / "train.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    main = runpy.run_path(str(ROOT / "examples" / "train_minimal.py"))["main"]
    paths = ["--model", tmp_path / "start", "--dataset", tmp_path / "pairs", "--output-dir", tmp_path / "trained"]
    options = ["--batch-size", 4, "--num-steps", 60, "--learning-rate", 0.01, "--num-warmup-steps", 5]
    main([str(word) for word in paths + options])
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 4
    assert losses[-1] < 0.5 * losses[0]
    trained = EditARPipeline.from_pretrained(tmp_path / "trained")
    assert trained("make it blue", image=draw_image(0)).images[0].size == (16, 16)
    with pytest.raises(ValueError, match="`batch_size` is 5; the data set has only 4 pairs"):
        main([str(word) for word in [*paths, "--batch-size", 5]])
