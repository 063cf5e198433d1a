"""Pictures from condition maps: depth, canny edges, COCOStuff segmentation.

Sources: the evaluation sets of ControlNet++ (arXiv 2404.07987), which EditAR (arXiv 2501.04699) shares; for edges it
takes those of the depth set's pictures.
"""

import io
from collections.abc import Iterator, Mapping
from glob import escape, glob
from itertools import count
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ...condition_maps import make_canny_map
from ...data_files import load_files
from ...pipelines.hub import check_folder_or_hub_id
from ..processes import show_progress
from ..samples import Sample, crop_labels, crop_picture
from .sources import check_entry


RESOLUTION = 512
NUM_CLASSES, IGNORED_CLASS = 171, 255


def read_rows(source: str, split: str, columns: Mapping[str, type]) -> Iterator[tuple[int, dict]]:
    """Read a split of a folder of parquet files or of a data set on the Hub, as it is downloaded: (number, row).

    Raises:
        ValueError: If there is no such folder or split, a column is missing, or a row cannot be read or holds something
            else.
    """
    check_folder_or_hub_id(source, "source", repo_type="dataset")
    files = sorted(glob(f"{escape(source)}/**/{split}*.parquet", recursive=True))
    if not files and Path(source).exists():
        raise ValueError(f"`source` {source!r} has no parquet file whose name starts with {split!r}.")
    if files:
        total = sum(map(count_rows, files))
        rows = load_files("parquet", files, "train", streaming=True)
    else:
        rows = datasets.load_dataset(source, split=split, streaming=True)
        total = rows.info.splits[split].num_examples if split in (rows.info.splits or {}) else None
    if rows.column_names is not None and (missing := sorted(set(columns) - set(rows.column_names))):
        raise ValueError(f"`source` {source!r} lacks {', '.join(missing)}; it has {', '.join(rows.column_names)}.")
    # `datasets` turns images by their EXIF block, and fails where that is damaged.
    images = [name for name, feature in (rows.features or {}).items() if isinstance(feature, datasets.Image)]
    for name in images:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    rows = iter(show_progress(rows, total=total, desc="preparing"))
    for index in count():
        try:
            if (row := next(rows, None)) is None:
                return
            row |= {name: decode_image(row[name]) for name in images if name in columns and row[name] is not None}
        except Exception as error:  # what PIL's decoders raise on broken data is of many kinds
            raise ValueError(f"`source`: row {index} of {source} cannot be read: {error}") from error
        check_entry(row, columns, f"row {index}")
        yield index, row


def decode_image(stored: Mapping) -> Image.Image:
    """Decode an image that `datasets` stores as bytes or a path, as it lies in the file."""
    image = Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"])
    image.load()
    return image


def count_rows(file: str) -> int:
    """Count the rows of a parquet file; one that is none, or a part of one, is refused."""
    try:
        return pq.read_metadata(file).num_rows
    except pa.ArrowException as error:
        raise ValueError(f"`source`: {file} is no whole parquet file; download it again. {error}") from error


def read_depth_samples(source: str, resolution: int = RESOLUTION) -> Iterator[Sample]:
    """Read pictures, their depth maps and captions."""
    columns = {"image": Image.Image, "control_depth": Image.Image, "text": str}
    for index, row in read_rows(source, "validation", columns):
        yield Sample(
            id=f"{index:05}",
            prompt=row["text"],
            source_image=crop_picture(row["control_depth"], resolution),
            task="depth",
            target_image=crop_picture(row["image"], resolution),
        )


def read_canny_samples(source: str, resolution: int = RESOLUTION) -> Iterator[Sample]:
    """Read pictures and captions, and find the pictures' edges."""
    for index, row in read_rows(source, "validation", {"image": Image.Image, "text": str}):
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
        ValueError: If a map does not hold a class for every pixel, one of the 171 or 255, which stands for none.
    """
    columns = {"image": Image.Image, "control_seg": Image.Image, "panoptic_seg_map": Image.Image}
    for index, row in read_rows(source, "validation", columns):
        # The colours of `control_seg` are those of a palette of 133 and do not tell the 171 classes apart.
        labels = read_labels(row["panoptic_seg_map"], index)
        caption = "detailed_prompt" if row.get("detailed_prompt") else "prompt"
        check_entry(row, {caption: str}, f"row {index}")
        yield Sample(
            id=f"{index:05}",
            prompt=row[caption],
            source_image=crop_picture(row["control_seg"], resolution),
            task="segmentation",
            target_image=crop_picture(row["image"], resolution),
            labels=crop_labels(labels, resolution),
        )


def read_labels(picture: Image.Image, index: int) -> Image.Image:
    """Read a map of classes as mode "L"; the class of a pixel with a palette is its index, whatever its colour."""
    classes = np.asarray(picture)
    if classes.ndim != 2 or classes.dtype.kind not in "iu":
        raise ValueError(
            f"`panoptic_seg_map` of row {index} has the mode {picture.mode!r}; give a picture whose pixels are the "
            'numbers of their classes, of mode "L", "P" or "I": colours do not tell the classes.'
        )
    known = (*range(NUM_CLASSES), IGNORED_CLASS)
    if strange := sorted(set(np.unique(classes).tolist()).difference(known)):
        raise ValueError(f"`panoptic_seg_map` of row {index} has the classes {strange}; they are 0 to 170, and 255.")
    return Image.fromarray(classes.astype(np.uint8))
