"""Prepare rows of a data set for training, count the rows that cannot be used, and collate the others into batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from ..checks import check_choice, check_texts
from ..condition_maps import make_canny_map
from ..image_processing_editar import EditARImageProcessor, compute_crop_geometry, prepare_rgb_image
from ..pipelines.edit_region import compute_edit_mask, prepare_mask
from ..processing_editar import TASK_PREFIXES, EditARProcessor
from .dataset_specs import DatasetSpec


logger = logging.get_logger(__name__)
ADDITION = "add "
# With fewer rows than this, the fraction of bad rows is checked only at the end of the data set.
MIN_ROWS_TO_JUDGE = 100
NUM_OFFENDERS_NAMED = 5
Row = TypeVar("Row")
Prepared = TypeVar("Prepared")


# Rows


def decode_image(value: Any, name: str = "image", image_folder: str | None = None) -> Image.Image:
    """Decode a stored image to upright RGB. `value` is an image, `{bytes, path}`, bytes or a path.

    Raises:
        ValueError: If `value` has another type or does not decode; the message gives `name`, the column.
    """
    return prepare_rgb_image(open_stored_image(value, name, image_folder), name=name)


def open_stored_image(value: Any, name: str, image_folder: str | None = None) -> Any:
    """Open a value as `decode_image` takes it. The pixels of a file are not read yet."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise ValueError(f"`{name}` is empty")
    try:
        if isinstance(value, bytes):
            return Image.open(BytesIO(value))
        return Image.open(Path(image_folder or "") / value) if isinstance(value, str) else value
    except Exception as error:  # the readers of PIL raise errors of many classes on broken data
        raise ValueError(f"`{name}` does not decode: {error}") from error


def pack_states(states: torch.Tensor) -> bytes:
    """Pack the text states of a prompt into bytes: `(num_text_tokens, text_hidden_size)`, float32 or bfloat16."""
    return states.contiguous().view(torch.uint8).numpy().tobytes()


def unpack_states(packed: bytes, num_text_tokens: int, text_hidden_size: int) -> torch.Tensor:
    """Undo `pack_states`. The number of bytes shows whether the states are float32 or bfloat16.

    Raises:
        ValueError: If the number of bytes fits neither dtype.
    """
    size = num_text_tokens * text_hidden_size
    dtypes = {4 * size: torch.float32, 2 * size: torch.bfloat16}
    if not isinstance(packed, bytes) or len(packed) not in dtypes:
        raise ValueError(
            f"`prompt_embeds` does not hold {num_text_tokens} states of width {text_hidden_size}. Compute them with "
            "the text encoder of the model."
        )
    return torch.frombuffer(bytearray(packed), dtype=dtypes[len(packed)]).view(num_text_tokens, text_hidden_size)


@dataclass
class RowReader:
    """Prepare rows for collation. Everything that can fail for a single row happens here.

    Images are decoded to upright RGB, a mask becomes `edit_mask`, and the rewrite of the data set is applied.

    Args:
        image_processor (`EditARImageProcessor`): Holds the size, resize mode and stride of training.
        num_codes (`int`): Number of codes of the VQ model; needed for rows of tokens.
        states_shape (`tuple[int, int]`): Number and width of the text states; needed for rows with `prompt_embeds`.
    """

    image_processor: EditARImageProcessor
    num_codes: int = 0
    states_shape: tuple[int, int] = (0, 0)

    def read(self, row: Mapping, spec: DatasetSpec) -> dict:
        """Return a row of the data set `spec`, ready for collation, with its task and the name of the data set.

        Raises:
            ValueError: If the row has no prompt, an unknown task, or an image, tokens or states that cannot be used.
        """
        image_processor = self.image_processor
        height, width, mode = image_processor.size.height, image_processor.size.width, image_processor.resize_mode
        row = {**row, "dataset": spec.name, "task": spec.task or row.get("task") or "edit", "size": (height, width)}
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            raise ValueError("`prompt` is empty")
        check_texts("prompt", row["prompt"])
        check_choice("task", row["task"], TASK_PREFIXES)
        if spec.rewrite == "removal":
            row["prompt"] = ask_for_removal(row["prompt"])
        for name in ("source_image", "target_image"):
            if name in row:
                row[name] = decode_image(row[name], name, spec.image_folder)
                if mode == "crop":
                    # Raises an error if the image is too thin.
                    compute_crop_geometry(row[name].height, row[name].width, height, width)
        if "mask" in row:
            # The mask has the size of the source image, or of the target image if the source image is computed from it.
            mask = open_stored_image(row.pop("mask"), "mask", spec.image_folder)
            image = row["source_image"] if "source_image" in row else row["target_image"]
            is_white = prepare_mask(mask, image.size)
            row["edit_mask"] = compute_edit_mask(is_white, height, width, image_processor.stride, mode).flatten()
        if spec.rewrite == "canny":
            # The edges are computed at the size of training, because resized edges would be gray.
            pixel_values = image_processor(row["target_image"]).pixel_values
            row["source_image"] = make_canny_map(image_processor.postprocess(pixel_values)[0])
        for name in ("source_image_tokens", "target_image_tokens", "edit_mask"):
            if name in row:
                row[name] = self.read_tokens(name, row[name])
        if "prompt_embeds" in row:
            row["prompt_embeds"] = unpack_states(row["prompt_embeds"], *self.states_shape)
        return row

    def read_tokens(self, name: str, values: Any) -> torch.Tensor:
        """Convert tokens to a tensor. Tokens must fill the grid and be codes of the model's own VQ model."""
        size, stride = self.image_processor.size, self.image_processor.stride
        num_tokens, num_codes = size.height // stride * (size.width // stride), self.num_codes
        tokens = np.asarray(values)
        if tokens.shape != (num_tokens,) or tokens.dtype.kind not in "biu":
            raise ValueError(f"`{name}` does not hold {num_tokens} tokens. Compute it at the resolution of training.")
        if name != "edit_mask" and not 0 <= tokens.min() <= tokens.max() < num_codes:
            raise ValueError(
                f"`{name}` runs from {tokens.min()} to {tokens.max()}; the model has codes 0 to {num_codes - 1}. "
                "Compute the tokens with the VQ model of this model."
            )
        return torch.from_numpy(tokens)


def ask_for_removal(instruction: str) -> str:
    """Turn "add a dog on the left" into "Remove a dog on the left", for a pair whose two images are swapped.

    Raises:
        ValueError: If the instruction does not begin with "add ".

    Source: the published training code, which cuts off the first four characters of each PIPE instruction unchecked.
    """
    if not instruction.lower().startswith(ADDITION):
        raise ValueError(f"`prompt` {instruction!r} does not begin with {ADDITION!r}")
    return "Remove " + instruction[len(ADDITION) :]


@dataclass
class BadRowCount:
    """Skip, count and log rows that cannot be used, and stop the run if there are too many.

    Args:
        max_fraction (`float`): Fraction of the rows that may be skipped.
    """

    max_fraction: float
    num_read: int = 0
    num_bad: int = 0
    offenders: list[str] = field(default_factory=list)

    def read(
        self, rows: Iterable[tuple[int, Row]], prepare: Callable[[Row], Prepared], name: str
    ) -> Iterator[Prepared]:
        """Apply `prepare` to each row and yield the results. Skip rows for which `prepare` raises a `ValueError`.

        Args:
            rows (iterable): Pairs (position of the row in its data set, row).
            prepare (`Callable`): Prepares a row.
            name (`str`): Name of the data set in messages.

        Raises:
            ValueError: If too many rows have been skipped.
        """
        for position, row in rows:
            self.num_read += 1
            try:
                prepared = prepare(row)
            except ValueError as error:
                offender = f"{name}, row {position}: {error}"
                self.num_bad += 1
                self.offenders = [*self.offenders, offender][:NUM_OFFENDERS_NAMED]
                logger.warning(f"Skipped {offender} ({self.num_bad} of {self.num_read} rows so far)")
                if self.num_read >= MIN_ROWS_TO_JUDGE:
                    self.judge()
            else:
                yield prepared

    def judge(self) -> None:
        """Raise a `ValueError` if too many rows have been skipped."""
        if self.num_bad > self.max_fraction * self.num_read:
            raise ValueError(
                f"{self.num_bad} of {self.num_read} rows cannot be used, more than `max_bad_rows_fraction` "
                f"{self.max_fraction} allows. The first: {'; '.join(self.offenders)}. Repair the data, or raise "
                "`max_bad_rows_fraction`."
            )


# Batches


def collate_rows(rows: Sequence[Mapping], processor: EditARProcessor) -> dict:
    """Collate rows from `RowReader` into one batch. The rows hold images or tokens of one size.

    Args:
        rows (sequence of `Mapping`): The rows.
        processor (`EditARProcessor`): Tokenizes prompts, and resizes images to the size of training.

    Returns:
        `input_ids` and `attention_mask`; `source_pixel_values` and `target_pixel_values`, or `source_image_tokens` and
        `target_image_tokens`; `edit_mask` and `prompt_embeds` if the rows have them; `grid`, the rows and columns of
        image tokens; and, for logs, `groups`, such as `{"task": ["edit", "canny"], "dataset": ["pairs", "pairs"]}`.
    """
    height, width = rows[0]["size"]
    stride = processor.image_processor.stride
    tasks = [row["task"] for row in rows]
    images: dict[str, Any] = {}
    if "source_image" in rows[0]:
        images["images"] = [row["source_image"] for row in rows]
        images["target_images"] = [row["target_image"] for row in rows]
    prompts = [row["prompt"] for row in rows]
    batch = dict(processor(text=prompts, task=tasks, height=height, width=width, **images))
    for name in ("source_image_tokens", "target_image_tokens", "prompt_embeds"):
        if name in rows[0]:
            batch[name] = torch.stack([row[name] for row in rows])
    if masks := [row["edit_mask"] for row in rows if "edit_mask" in row]:
        # A row without a mask comes from a data set without masks. All its tokens may change.
        everywhere = torch.ones_like(masks[0])
        batch["edit_mask"] = torch.stack([row.get("edit_mask", everywhere) for row in rows])
    batch["grid"] = height // stride, width // stride
    return {**batch, "groups": {"task": tasks, "dataset": [row["dataset"] for row in rows]}}
