"""Files of data sets, loaded as they are named."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import datasets


def load_files(
    kind: str, files: Sequence[str | os.PathLike], split: str, streaming: bool = False
) -> "datasets.Dataset | datasets.IterableDataset":
    """Load files of one kind, by the name that `datasets` has for it, as a split or a slice of it.

    `datasets` takes brackets, stars and question marks in names for patterns. A list that it has made itself, as this
    one seems to be, it takes as it is.

    Returns:
        A `datasets.Dataset`, or a `datasets.IterableDataset` when `streaming`.
    """
    import datasets
    from datasets.data_files import DataFilesList

    files = [os.path.abspath(file) for file in files]
    # Its own lists hold what tells a changed file from the one in the cache, too.
    listed = DataFilesList(files, [(str(os.path.getmtime(file)),) for file in files])
    return datasets.load_dataset(kind, data_files={name_split(split): listed}, split=split, streaming=streaming)


def name_split(split: str) -> str:
    """Name the split that a slice such as `train[:100]` is of."""
    return split.partition("[")[0]
