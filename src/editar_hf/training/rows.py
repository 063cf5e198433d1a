"""Make rows of a data set ready for collation, and count those that cannot be used."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError
from transformers.utils import logging

from ..checks import check_texts
from ..condition_maps import make_canny_map
from ..image_processing_editar import EditARImageProcessor, compute_crop_geometry, prepare_rgb_image
from ..pipelines.edit_region import compute_edit_mask, prepare_mask
from ..processing_editar import TASK_PREFIXES
from .dataset_specs import DatasetSpec


logger = logging.get_logger(__name__)
IMAGES = ("source_image", "target_image", "mask")
TOKENS = ("source_image_tokens", "target_image_tokens", "edit_mask")
ADDITION = "add "
# A few bad rows among fewer than this say little. The end of a data set is judged in any case.
MIN_ROWS_TO_JUDGE = 100
NUM_OFFENDERS_NAMED = 5
Row = TypeVar("Row")
Prepared = TypeVar("Prepared")


class UnusableRow(Exception):
    """A row that training must skip; the message says why."""


def decode_image(value: Image.Image | Mapping | bytes | str, image_folder: str | None = None) -> Image.Image:
    """Decode an image that is stored as an image, as `{bytes, path}`, as bytes or as a path.

    Raises:
        UnusableRow: If it is none of these or does not decode.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, bytes):
            value = Image.open(BytesIO(value))
        elif isinstance(value, str):
            value = Image.open(Path(image_folder or "") / value)
        if not isinstance(value, Image.Image):
            raise UnusableRow(f"is {'empty' if value is None else f'a {type(value).__name__}'}")
        value.load()
    except UnidentifiedImageError as error:
        raise UnusableRow("does not decode: it is in no known format") from error
    except UnusableRow:
        raise
    # PIL's decoders raise errors of many classes on broken data.
    except Exception as error:
        raise UnusableRow(f"does not decode: {error}") from error
    return value


@dataclass
class RowReader:
    """Make rows ready for collation. Everything that can fail for a single row happens here.

    Images are decoded to upright RGB, a mask becomes `edit_mask`, and the rewrite of the recipe is applied.

    Args:
        image_processor (`EditARImageProcessor`): Resizes images before edges are found.
        height, width (`int`): Size of the training images in pixels.
        resize_mode (`str`): `"crop"` or `"stretch"`.
        stride (`int`): Pixels per token and side, for masks.
    """

    image_processor: EditARImageProcessor
    height: int
    width: int
    resize_mode: str
    stride: int

    def read(self, row: Mapping, spec: DatasetSpec) -> dict:
        """Return a row of `spec` ready for collation, with its task and the name of its data set.

        Raises:
            UnusableRow: If it has no instruction, an unknown task, or an image or tokens that cannot be used.
        """
        row = {**row, "dataset": spec.name, "task": spec.task or row.get("task") or "edit"}
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            raise UnusableRow("`prompt` is empty")
        try:
            check_texts("prompt", row["prompt"])
        except ValueError as error:
            raise UnusableRow(str(error)) from error
        if row["task"] not in tuple(TASK_PREFIXES):
            raise UnusableRow(f"`task` is {row['task']!r}; the tasks are {', '.join(TASK_PREFIXES)}")
        self.check_tokens(row)
        for name in IMAGES:
            if name in row:
                try:
                    row[name] = decode_image(row[name], spec.image_folder)
                except UnusableRow as error:
                    raise UnusableRow(f"`{name}` {error}") from error
        try:
            self.prepare_images(row)
            if spec.rewrite == "canny":
                row["source_image"] = self.find_edges(row["target_image"])
        except ValueError as error:
            raise UnusableRow(str(error)) from error
        if spec.rewrite == "removal":
            row["prompt"] = ask_for_removal(row["prompt"])
        return row

    def check_tokens(self, row: Mapping) -> None:
        """Refuse tokens that are missing or do not fill the grid, and text states that are missing."""
        num_tokens = self.height // self.stride * (self.width // self.stride)
        for name in TOKENS:
            tokens = row.get(name, ())
            if name in row and not (isinstance(tokens, Sequence) and len(tokens) == num_tokens):
                raise UnusableRow(f"`{name}` does not hold {num_tokens} tokens")
            if not all(isinstance(token, int) and 0 <= token < 2**31 for token in tokens):
                raise UnusableRow(f"`{name}` holds what is no token")
        if not isinstance(row.get("prompt_embeds", b""), bytes):
            raise UnusableRow("`prompt_embeds` is empty, or no bytes")

    def prepare_images(self, row: dict) -> None:
        """Convert the images of a row to upright RGB and its mask to tokens, in place; raises `ValueError`."""
        images = [name for name in ("source_image", "target_image") if name in row]
        for name in images:
            row[name] = prepare_rgb_image(row[name], name=name)
            if self.resize_mode == "crop":
                compute_crop_geometry(row[name].height, row[name].width, self.height, self.width)
        if "mask" in row:
            # The mask has the source image's size, or the target's if edges become the source image later.
            is_white = prepare_mask(row.pop("mask"), row[images[0]].size)
            edit_mask = compute_edit_mask(is_white, self.height, self.width, self.stride, self.resize_mode)
            row["edit_mask"] = edit_mask.flatten().tolist()

    def find_edges(self, image: Image.Image) -> Image.Image:
        """Find an image's edges at the size of training: resized edges would be grey."""
        size = {"height": self.height, "width": self.width}
        pixel_values = self.image_processor(image, size=size, resize_mode=self.resize_mode).pixel_values
        return make_canny_map(self.image_processor.postprocess(pixel_values)[0])


def ask_for_removal(instruction: str) -> str:
    """Turn "add a dog on the left" into "Remove a dog on the left", for a pair read backwards.

    Raises:
        UnusableRow: If the instruction does not begin with "add ".

    Source: the published training, which cuts off the first four characters of PIPE's instructions, whatever they are.
    """
    if not instruction.lower().startswith(ADDITION):
        raise UnusableRow(f"`prompt` {instruction!r} does not begin with {ADDITION!r}")
    return "Remove " + instruction[len(ADDITION) :]


@dataclass
class BadRowCount:
    """Skip, count and log rows that cannot be used, and stop a run with too many of them.

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
        """Yield what `prepare` makes of each row, and skip the rows for which it raises `UnusableRow`.

        Args:
            rows (iterable): Pairs of a row's position in its data set and the row.
            prepare (`Callable`): Makes a row ready, or raises `UnusableRow`.
            name (`str`): What messages call the data set.

        Raises:
            ValueError: If too many rows were skipped so far.
        """
        for position, row in rows:
            self.num_read += 1
            try:
                prepared = prepare(row)
            except UnusableRow as error:
                self.add(f"{name}, row {position}: {error}")
            else:
                yield prepared

    def add(self, offender: str) -> None:
        """Count and log a skipped row."""
        self.num_bad += 1
        self.offenders = [*self.offenders, offender][:NUM_OFFENDERS_NAMED]
        logger.warning(f"Skipped {offender} ({self.num_bad} of {self.num_read} rows so far)")
        if self.num_read >= MIN_ROWS_TO_JUDGE:
            self.judge()

    def judge(self) -> None:
        """Raise a `ValueError` if too many rows were skipped so far."""
        if self.num_bad > self.max_fraction * self.num_read:
            raise ValueError(
                f"{self.num_bad} of {self.num_read} rows cannot be used, more than `max_bad_rows_fraction` "
                f"{self.max_fraction} allows. The first: {'; '.join(self.offenders)}. Repair the data, or allow more."
            )
