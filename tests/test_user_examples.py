"""The short examples, run as written on the shipped sticker editor, and the minimal training at tiny size."""

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
# In pixels of `examples/photo.png`: the red circle's centre, and where the adapter copies it to.
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


def is_red(pixel):
    return pixel[0] > 150 and max(pixel[1:]) < 80


def is_blue(pixel):
    return pixel[2] > 150 and pixel[0] < 80


def at(image, place):
    return image[place[1], place[0]]


pytestmark = pytest.mark.filterwarnings("ignore:The centre crop cuts")
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
    side = PHOTO.shape[0]
    left = (PHOTO.shape[1] - side) // 2
    assert np.array_equal(both[:, :side], PHOTO[:, left : left + side])
    x, y = CIRCLE
    assert is_blue(at(both[:, -side:], (x - left, y)))


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
