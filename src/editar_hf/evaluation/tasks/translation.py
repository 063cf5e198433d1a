"""Pictures from condition maps: depth, canny edges, COCOStuff segmentation.

Sources: the evaluation sets of ControlNet++ (arXiv 2404.07987), which EditAR (arXiv 2501.04699) shares; for edges it
takes those of the depth set's pictures.
"""

from collections.abc import Iterable, Iterator
from glob import escape, glob
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from ...condition_maps import make_canny_map
from ..samples import Sample, crop_labels, crop_picture


RESOLUTION = 512
NUM_CLASSES, IGNORED_CLASS = 171, 255


def open_rows(source: str, split: str, columns: tuple[str, ...]) -> Iterable[dict]:
    """Open a split of a folder of parquet files or of a data set on the Hub, read as it is downloaded.

    Raises:
        ValueError: If there is no such split, or a column is missing.
    """
    files = sorted(glob(f"{escape(source)}/**/{split}*.parquet", recursive=True))
    if not files and Path(source).exists():
        raise ValueError(f"`source` {source!r} has no parquet file whose name starts with {split!r}.")
    if files:
        rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    else:
        rows = datasets.load_dataset(source, split=split, streaming=True)
    if rows.column_names is not None and (missing := sorted(set(columns) - set(rows.column_names))):
        raise ValueError(f"`source` {source!r} lacks {', '.join(missing)}; it has {', '.join(rows.column_names)}.")
    return rows


def read_depth_samples(source: str, resolution: int = RESOLUTION) -> Iterator[Sample]:
    """Read pictures, their depth maps and captions."""
    for index, row in enumerate(open_rows(source, "validation", ("image", "control_depth", "text"))):
        yield Sample(
            id=f"{index:05}",
            prompt=row["text"],
            source_image=crop_picture(row["control_depth"], resolution),
            task="depth",
            target_image=crop_picture(row["image"], resolution),
        )


def read_canny_samples(source: str, resolution: int = RESOLUTION) -> Iterator[Sample]:
    """Read pictures and captions, and find the pictures' edges."""
    for index, row in enumerate(open_rows(source, "validation", ("image", "text"))):
        picture = crop_picture(row["image"], resolution)
        yield Sample(
            id=f"{index:05}",
            prompt=row["text"],
            source_image=make_canny_map(picture),
            task="canny",
            target_image=picture,
        )


def read_segmentation_samples(source: str, resolution: int = RESOLUTION) -> Iterator[Sample]:
    """Read pictures, their coloured segmentation maps, captions, and the class of every pixel.

    Raises:
        ValueError: If a class is neither one of the 171 nor 255, which stands for none.
    """
    rows = open_rows(source, "validation", ("image", "control_seg", "panoptic_seg_map"))
    for index, row in enumerate(rows):
        # The colours of `control_seg` are those of a palette of 133 and do not tell the 171 classes apart.
        labels = crop_labels(row["panoptic_seg_map"], resolution)
        check_labels(labels, index)
        yield Sample(
            id=f"{index:05}",
            prompt=row.get("detailed_prompt") or row["prompt"],
            source_image=crop_picture(row["control_seg"], resolution),
            task="segmentation",
            target_image=crop_picture(row["image"], resolution),
            labels=labels,
        )


def check_labels(labels: Image.Image, index: int) -> None:
    """Refuse a map of classes that COCOStuff does not have."""
    found = np.unique(np.asarray(labels))
    if strange := [int(value) for value in found if NUM_CLASSES <= value != IGNORED_CLASS]:
        raise ValueError(f"`panoptic_seg_map` of row {index} has the classes {strange}; they are 0 to 170, and 255.")
