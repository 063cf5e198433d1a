"""`examples/batch/edit_folder.py`: several processes share the edits of a folder."""

import os
from pathlib import Path

import pytest
from processes import run_python, start_ranks
from tiny import build_pipeline, draw_image

from editar_hf.commands.edit import RECORD_FILE


SCRIPT = Path(__file__).parents[1] / "examples" / "batch" / "edit_folder.py"
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true"}
NUM_IMAGES = int(os.environ.get("BATCH_IMAGES", "7"))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a model and images; the first image, which falls to the first process, is damaged."""
    desk = tmp_path_factory.mktemp("desk")
    build_pipeline().save_pretrained(desk / "model")
    (desk / "images").mkdir()
    (desk / "images" / "000.png").write_bytes(b"no image")
    for index in range(1, NUM_IMAGES):
        draw_image(index, 24, 16).save(desk / "images" / f"{index:03}.png")
    return desk


def list_words(desk, output):
    options = {"model": desk / "model", "image": desk / "images", "prompt": "make the red circle blue"}
    options |= {"output": desk / output, "device": "cpu"}
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def read_images(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != RECORD_FILE}


def test_two_processes_write_the_bytes_of_one_and_another_run_finds_them_done(desk):
    ranks = start_ranks(2, SCRIPT, *list_words(desk, "two"), environment=ENVIRONMENT)
    finished = [rank.wait() for rank in ranks]
    assert [one.returncode for one in finished] == [1, 0], finished[1].stderr
    for one, count in zip(finished, ((NUM_IMAGES + 1) // 2, NUM_IMAGES // 2), strict=True):
        assert f"{count} edits, 0 of them done before" in one.stdout
    assert "000.png: ValueError: `image` is" in finished[0].stderr
    assert "1 failed" in finished[0].stdout
    assert f"{NUM_IMAGES // 2} done, 0 failed" in finished[1].stdout

    words = ["-m", "editar_hf.commands", "edit"]
    assert run_python(*words, *list_words(desk, "one"), environment=ENVIRONMENT).returncode == 1
    two = read_images(desk / "two")
    assert len(two) == NUM_IMAGES - 1
    assert two == read_images(desk / "one")

    # A single process resumes the work of two.
    again = run_python(*words, *list_words(desk, "two"), environment=ENVIRONMENT)
    assert f"{NUM_IMAGES} edits, {NUM_IMAGES - 1} of them done before" in again.stdout
