"""Pairs of pictures, or of their tokens, as a data set whose columns have our names; and rows collated into batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F

from ..processing_editar import EditARProcessor


PIXEL_COLUMNS = ("source_image", "target_image", "prompt")
TOKEN_COLUMNS = ("source_image_tokens", "target_image_tokens", "prompt")


def load_edit_dataset(path: str, split: str = "train", columns: Mapping[str, str] | None = None) -> datasets.Dataset:
    """Load pairs by Hub id, by a folder or pattern of parquet files, or from an image folder with `metadata.jsonl`.

    Args:
        path (`str`): Hub id; a folder; or a glob of parquet files such as `"stickers/train-*.parquet"`. In a folder,
            parquet files whose names start with `split` are taken.
        split (`str`): Split of the data set.
        columns (`Mapping[str, str]`, *optional*): Where our names differ from those of the data set, ours → theirs.

    Raises:
        ValueError: If nothing is found, or a column is missing; the columns there are, are listed.
    """
    if parquet_files := find_parquet_files(path, split):
        dataset = datasets.load_dataset("parquet", data_files={split: parquet_files}, split=split)
    elif Path(path).is_dir():
        dataset = datasets.load_dataset("imagefolder", data_dir=path, split=split)
    elif "*" in path or path.endswith(".parquet"):
        raise ValueError(f"`dataset` is {path!r}; no parquet file matches it.")
    else:
        dataset = datasets.load_dataset(path, split=split)
    dataset = dataset.rename_columns({theirs: ours for ours, theirs in (columns or {}).items() if ours != theirs})
    wanted = TOKEN_COLUMNS if "source_image_tokens" in dataset.column_names else PIXEL_COLUMNS
    if missing := [name for name in wanted if name not in dataset.column_names]:
        raise ValueError(
            f"`dataset` {path!r} lacks {', '.join(missing)}; it has {', '.join(dataset.column_names)}. Name the "
            "columns that hold them."
        )
    return dataset


def find_parquet_files(path: str, split: str) -> list[str]:
    """Find the parquet files that `path` stands for: itself, a pattern, or a folder's files of this split."""
    folder = Path(path)
    pattern = folder.glob(f"{split}*.parquet") if folder.is_dir() else folder.parent.glob(folder.name)
    return sorted(str(file) for file in pattern if file.suffix == ".parquet")


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
