"""Collate rows of images or of precomputed tokens into batches, and check precomputed tokens."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets
import pyarrow.compute as pc
import torch

from ..processing_editar import EditARProcessor


def check_image_tokens(dataset: datasets.Dataset, vocab_size: int, grid_height: int, grid_width: int) -> None:
    """Refuse precomputed tokens of another VQ model or another resolution.

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
                f"× {grid_width} has {grid_height * grid_width}. Compute the tokens at the resolution of training."
            )
        ids = {"min": 0, "max": 0} if name == "edit_mask" else pc.min_max(pc.list_flatten(column)).as_py()
        if ids["min"] < 0 or ids["max"] >= vocab_size:
            raise ValueError(
                f"`{name}` runs from {ids['min']} to {ids['max']}; the model has codes 0 to {vocab_size - 1}. Compute "
                "the tokens with the model's own VQ model."
            )


def pack_states(states: torch.Tensor) -> bytes:
    """Pack the text states of a prompt, `(num_text_tokens, text_hidden_size)` in float32 or bfloat16, as bytes."""
    return states.contiguous().view(torch.uint8).numpy().tobytes()


def unpack_states(packed: bytes, num_text_tokens: int, text_hidden_size: int) -> torch.Tensor:
    """Undo `pack_states`. The number of bytes tells float32 from bfloat16.

    Raises:
        ValueError: If the number of bytes fits neither.
    """
    size = num_text_tokens * text_hidden_size
    dtype = {4 * size: torch.float32, 2 * size: torch.bfloat16}.get(len(packed))
    if dtype is None:
        raise ValueError(
            f"`prompt_embeds` holds {len(packed)} bytes a row; the model reads {num_text_tokens} states of width "
            f"{text_hidden_size}. Compute them with the model's own text encoder."
        )
    return torch.frombuffer(bytearray(packed), dtype=dtype).view(num_text_tokens, text_hidden_size)


@dataclass
class EditCollator:
    """Collate rows from `RowReader`, of images or of tokens, into one batch.

    Two rows of 16×16 images and a VQ model of stride 8, as images and as tokens; `groups` is for logs:

    ```python
    {"source_pixel_values": (2, 3, 16, 16), "target_pixel_values": (2, 3, 16, 16), "input_ids": (2, L),
     "attention_mask": (2, L), "groups": {"task": ["edit", "canny"], "dataset": ["my-pairs", "my-pairs"]}}
    {"source_image_tokens": [[5, 0, 3, 1], [2, 2, 7, 4]], "target_image_tokens": [[5, 0, 3, 6], [2, 1, 7, 4]],
     "edit_mask": [[False, False, False, True], [False, True, False, False]], "input_ids": ..., ...}
    ```

    Args:
        processor (`EditARProcessor`): Prepares images and prompts.
        height, width (`int`): Size of the training images in pixels.
        resize_mode (`str`): `"crop"` or `"stretch"`.
        stride (`int`): Pixels per token and side.
        text_hidden_size (`int`): Width of precomputed text states.
    """

    processor: EditARProcessor
    height: int
    width: int
    resize_mode: str
    stride: int
    text_hidden_size: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return self.height // self.stride, self.width // self.stride

    def __call__(self, rows: Sequence[Mapping]) -> dict:
        tasks = [row["task"] for row in rows]
        text = self.processor(text=[row["prompt"] for row in rows], task=tasks)
        groups = {"task": tasks, "dataset": [row["dataset"] for row in rows]}
        images = self.collate_tokens(rows) if "source_image_tokens" in rows[0] else self.collate_images(rows)
        if "prompt_embeds" in rows[0]:
            size = self.processor.num_text_tokens, self.text_hidden_size
            text["prompt_embeds"] = torch.stack([unpack_states(row["prompt_embeds"], *size) for row in rows])
        return {**text, **images, "groups": groups}

    def collate_images(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        batch = dict(
            self.processor(
                images=[row["source_image"] for row in rows],
                target_images=[row["target_image"] for row in rows],
                height=self.height,
                width=self.width,
                resize_mode=self.resize_mode,
            )
        )
        if any("edit_mask" in row for row in rows):
            # A row without a mask, of a data set without masks, may change everywhere.
            everywhere = [True] * math.prod(self.grid)
            batch["edit_mask"] = torch.tensor([row.get("edit_mask", everywhere) for row in rows])
        return batch

    def collate_tokens(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        names = ("source_image_tokens", "target_image_tokens", "edit_mask")
        return {name: torch.tensor([row[name] for row in rows]) for name in names if name in rows[0]}
