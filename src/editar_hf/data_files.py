"""Load data files with `datasets`, even if their names contain pattern characters."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import datasets


def load_files(
    kind: str, files: Sequence[str | os.PathLike], split: str, streaming: bool = False
) -> "datasets.Dataset | datasets.IterableDataset":
    """Load files as a split or a slice of a split. `kind` is the name of their format in `datasets`.

    `datasets` reads brackets, stars and question marks in file names as patterns, but not in a `DataFilesList`. The
    files are therefore passed as a `DataFilesList`.

    Returns:
        A `datasets.Dataset`, or a `datasets.IterableDataset` when `streaming`.
    """
    import datasets
    from datasets.data_files import DataFilesList

    files = [os.path.abspath(file) for file in files]
    # `datasets` compares the modification times in the list with its cache, so that changed files are loaded again.
    listed = DataFilesList(files, [(str(os.path.getmtime(file)),) for file in files])
    return datasets.load_dataset(kind, data_files={name_split(split): listed}, split=split, streaming=streaming)


def name_split(split: str) -> str:
    """Return the name of the split in a slice such as `train[:100]`."""
    return split.partition("[")[0]
