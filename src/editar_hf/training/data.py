"""Pairs of pictures, or of their tokens, as a data set whose columns have our names; and rows collated into batches."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow.compute as pc
import torch
import torch.nn.functional as F

from ..processing_editar import EditARProcessor


PIXEL_COLUMNS = ("source_image", "target_image", "prompt")
TOKEN_COLUMNS = ("source_image_tokens", "target_image_tokens", "prompt")
# A mask says where the edit is, as a picture or per token; a task says which prefix the prompt gets.
OPTIONAL_COLUMNS = ("mask", "edit_mask", "task")


def load_edit_dataset(path: str, split: str = "train", columns: Mapping[str, str] | None = None) -> datasets.Dataset:
    """Load pairs by Hub id, by a folder or pattern of parquet files, or from an image folder with `metadata.jsonl`.

    Args:
        path (`str`): Hub id; a folder; or a glob of parquet files such as `"stickers/train-*.parquet"`. In a folder,
            parquet files whose names start with `split` are taken; an image folder may have a folder per split.
        split (`str`): Split of the data set.
        columns (`Mapping[str, str]`, *optional*): Where our names differ from those of the data set, ours → theirs.

    Returns:
        The data set with the columns that training reads, under our names.

    Raises:
        ValueError: If nothing is found, or a column is missing; the columns there are, are listed.
    """
    dataset = load_split(path, split)
    columns = dict(columns or {})
    wanted = TOKEN_COLUMNS if "source_image_tokens" in dataset.column_names else PIXEL_COLUMNS
    theirs = {ours: columns.get(ours, ours) for ours in (*wanted, *OPTIONAL_COLUMNS)}
    present = {ours: name for ours, name in theirs.items() if name in dataset.column_names}
    # A mask and a task are optional, unless their columns were named.
    absent = theirs.keys() - present.keys()
    if missing := [theirs[ours] for ours in dict.fromkeys((*wanted, *columns)) if ours in absent]:
        raise ValueError(
            f"`dataset` {path!r} lacks {', '.join(missing)}; it has {', '.join(dataset.column_names)}. Name the "
            "columns that hold source image, target image and prompt."
        )
    dataset = dataset.select_columns(list(dict.fromkeys(present.values())))
    return dataset.rename_columns({name: ours for ours, name in present.items()})


def load_split(path: str, split: str) -> datasets.Dataset:
    """Load a split with the columns it has; a `ValueError` says where nothing was found."""
    folder, parquet_files = Path(path), find_parquet_files(path, split)
    if not parquet_files and ("*" in path or path.endswith(".parquet")):
        raise ValueError(f"`dataset` is {path!r}; no parquet file matches it.")
    others = sorted(file.name for file in folder.glob("*.parquet"))
    if others and not parquet_files:
        raise ValueError(
            f"`dataset` {path!r} has no parquet file whose name starts with {split!r}; it has {', '.join(others[:5])}. "
            "Rename the files, or give a pattern such as `folder/*.parquet`."
        )
    try:
        if parquet_files:
            return datasets.load_dataset("parquet", data_files={split: parquet_files}, split=split)
        if not folder.is_dir():
            return datasets.load_dataset(path, split=split)
        pictures = folder / split if (folder / split).is_dir() else folder
        return datasets.load_dataset("imagefolder", data_files={split: f"{pictures}/**"}, split=split)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise ValueError(
            f"`dataset` {path!r} does not load: {error} Give a Hub id, a folder of parquet files or pictures, or a "
            f"pattern of parquet files, that has the split {split!r}."
        ) from error


def find_parquet_files(path: str, split: str) -> list[str]:
    """Find the parquet files that `path` stands for: itself, a pattern, or a folder's files of this split."""
    folder = Path(path)
    pattern = f"{glob.escape(str(folder))}/{split}*.parquet" if folder.is_dir() else path
    return sorted(file for file in glob.glob(pattern) if file.endswith(".parquet"))


def check_image_tokens(dataset: datasets.Dataset, vocab_size: int, grid_height: int, grid_width: int):
    """Refuse tokens made in advance that another tokenizer, or another resolution, must have made.

    Raises:
        ValueError: If rows have another number of tokens than the grid, or ids are outside the model's vocabulary.
    """
    for name in ("source_image_tokens", "target_image_tokens", "edit_mask"):
        if name not in dataset.column_names:
            continue
        column = dataset.data.column(name)
        lengths = pc.min_max(pc.list_value_length(column)).as_py()
        if set(lengths.values()) != {grid_height * grid_width}:
            raise ValueError(
                f"`{name}` holds {lengths['min']} to {lengths['max']} tokens a row; the model's grid of {grid_height} "
                f"× {grid_width} has {grid_height * grid_width}. Make the tokens at the resolution you train at."
            )
        ids = {"min": 0, "max": 0} if name == "edit_mask" else pc.min_max(pc.list_flatten(column)).as_py()
        if ids["min"] < 0 or ids["max"] >= vocab_size:
            raise ValueError(
                f"`{name}` runs from {ids['min']} to {ids['max']}; the model has codes 0 to {vocab_size - 1}. Make the "
                "tokens with the model's own tokenizer."
            )


def compute_edit_mask(mask_pixel_values: torch.Tensor, stride: int) -> torch.BoolTensor:
    """Compute which tokens may change, `(batch, N)`, from masks as pixels in [−1, 1], `(batch, 3, height, width)`.

    White may change; a token is free if any of its pixels is white.
    """
    is_white = (mask_pixel_values.mean(dim=1, keepdim=True) > 0).float()
    return F.max_pool2d(is_white, stride).flatten(1).bool()


@dataclass
class EditCollator:
    """Collate rows of pictures, or of tokens made in advance, into one batch of tensors.

    Two rows of 16×16 pictures and a tokenizer of stride 8, as pictures and as tokens:

    ```python
    {"source_pixel_values": (2, 3, 16, 16), "target_pixel_values": (2, 3, 16, 16), "input_ids": (2, L),
     "attention_mask": (2, L)}
    {"source_image_tokens": [[5, 0, 3, 1], [2, 2, 7, 4]], "target_image_tokens": [[5, 0, 3, 6], [2, 1, 7, 4]],
     "edit_mask": [[False, False, False, True], [False, True, False, False]], "input_ids": ..., "attention_mask": ...}
    ```

    Args:
        processor (`EditARProcessor`): Prepares pictures and prompts.
        height, width (`int`): Pixels the pictures are brought to.
        resize_mode (`str`): `"crop"` or `"stretch"`.
        stride (`int`): Pixels per token and side, for masks.
    """

    processor: EditARProcessor
    height: int
    width: int
    resize_mode: str
    stride: int

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        prompts = [row["prompt"] for row in rows]
        tasks = [row.get("task", "edit") for row in rows]
        if "source_image_tokens" in rows[0]:
            return {**self.processor(text=prompts, task=tasks), **self.collate_tokens(rows)}
        geometry = {"height": self.height, "width": self.width, "resize_mode": self.resize_mode}
        batch = self.processor(
            images=[row["source_image"] for row in rows],
            target_images=[row["target_image"] for row in rows],
            text=prompts,
            task=tasks,
            **geometry,
        )
        if "mask" in rows[0]:
            masks = self.processor(images=[row["mask"] for row in rows], **geometry).source_pixel_values
            batch["edit_mask"] = compute_edit_mask(masks, self.stride)
        return dict(batch)

    def collate_tokens(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        names = ("source_image_tokens", "target_image_tokens", "edit_mask")
        return {name: torch.tensor([row[name] for row in rows]) for name in names if name in rows[0]}
