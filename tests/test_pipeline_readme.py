"""The README's snippets of the pipeline, run as written, one after the other, on the sticker editor."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch


ROOT = Path(__file__).parents[1]
# From the snippet that makes the pipeline to where edits get faster.
FIRST, LAST = "Nothing but Python", "**Faster, the same tokens**"


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working directory with the examples where the snippets look for them."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:More than 2% of a picture", "ignore:A prompt is longer")
def test_snippets_of_the_readme_run_as_written(desk):
    page = (ROOT / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page[page.index(FIRST) : page.index(LAST)], re.DOTALL)
    assert len(snippets) == 6
    names = {}
    for snippet in snippets:
        torch.manual_seed(0)
        exec(snippet, names)
    assert isinstance(names["processor"], names["EditARProcessor"])
    photo, picture = np.asarray(names["photo"]), np.asarray(names["picture"])
    # A token is 30 pixels of the photograph, whose crop begins at its column 60; the mask lies on 3 × 3 tokens, the
    # last ones of the first columns, and the feather ends one further.
    row, column = np.mgrid[:240, :360]
    may_change = (row >= 120) & (column >= 60) & (column < 180)
    assert np.array_equal(picture[~may_change], photo[~may_change])
    assert not np.array_equal(picture, photo)
    assert len(names["variants"]) == 2
    assert names["edges"].size == names["photo"].size
    assert (desk / "edited.png").exists()
