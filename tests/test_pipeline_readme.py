"""The README's snippets of the pipeline, run as written, one after the other, on the sticker editor."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw


ROOT = Path(__file__).parents[1]
# From the snippet that makes the pipeline to where edits get faster.
FIRST, LAST = "Nothing but Python", "**Faster, the same tokens**"


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working directory with the pictures that the snippets open, and the checkpoint where they look for it."""
    for name, size in (("photo", (96, 80)), ("first", (64, 64)), ("second", (64, 64))):
        picture = Image.new("RGB", size, "grey")
        ImageDraw.Draw(picture).ellipse((10, 10, 30, 30), fill=(205, 0, 30))
        picture.save(tmp_path / f"{name}.png")
    mask = Image.new("L", (96, 80))
    mask.paste(255, (24, 16, 40, 32))
    mask.save(tmp_path / "mask.png")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:More than 2% of a picture", "ignore:A prompt is longer")
def test_snippets_of_the_readme_run_as_written(desk):
    page = (ROOT / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page[page.index(FIRST) : page.index(LAST)], re.DOTALL)
    assert len(snippets) == 5
    names = {}
    for snippet in snippets:
        torch.manual_seed(0)
        exec(snippet, names)
    photo, picture = np.asarray(names["photo"]), np.asarray(names["picture"])
    # A token is 10 pixels of the photograph, whose crop begins at its column 8; the mask lies on 3 × 3 tokens, and the
    # feather ends one further.
    row, column = np.mgrid[:80, :96]
    may_change = (row < 50) & (column >= 8) & (column < 58)
    assert np.array_equal(picture[~may_change], photo[~may_change])
    assert not np.array_equal(picture, photo)
    assert len(names["variants"]) == 2
    assert names["edges"].size == names["photo"].size
    assert (desk / "edited.png").exists()
