"""The notebook, run as shipped but for its installation: it trains an adapter on the sticker editor."""

from pathlib import Path

import pytest


nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed; install the extra `test`.")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed; install the extra `test`.")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "lora_notebook.ipynb"
# The fraction of the frame that is nearly black, for each image. A frame is an eighth of the side wide.
MEASURE = """
import numpy as np

def measure(images):
    pixels = np.stack([np.asarray(image.resize((64, 64))) for image in images])
    pixels[:, 8:-8, 8:-8] = 255  # The inside does not count.
    return (pixels.max(-1) < 60).sum((1, 2)) / (64 * 64 - 48 * 48)

print(measure(before).max(), measure(after).min(), len(before))
"""


def test_notebook_teaches_the_model_a_frame(tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    notebook.cells.append(nbformat.v4.new_code_cell(MEASURE))
    for name in ("examples", "projects"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    nbclient.NotebookClient(notebook, timeout=280, resources={"metadata": {"path": tmp_path}}).execute()
    before, after, number = map(float, notebook.cells[-1].outputs[0].text.split())
    assert number == 4
    assert before < 0.1
    assert after > 0.5


def test_notebook_is_committed_without_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    assert not [cell for cell in cells if cell.outputs or cell.execution_count]
