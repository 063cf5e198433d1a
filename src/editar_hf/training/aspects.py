"""Train on images of several aspect ratios. All images of a batch have the same one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import datasets
import numpy as np
import torch
from PIL import ExifTags, Image

from ..image_processing_editar import EditARImageProcessor, choose_grid
from .dataset_specs import DatasetSpec
from .rows import BadRowCount, RowReader, open_stored_image
from .streams import EndlessRows, MixedRows, check_saved_number, check_saved_ratios


# The EXIF orientations that swap width and height (Exif 3.0, CIPA DC-008, tag 274).
SIDEWAYS = (5, 6, 7, 8)
# The index of a bucket that stands for an image that does not open.
NOT_OPENED = -1


def parse_aspect_ratio(text: str) -> float:
    """Parse an aspect ratio such as "3:2", width before height. Returns width / height.

    Raises:
        ValueError: If the text is not an aspect ratio between 1:2 and 2:1.
    """
    with suppress(ValueError):
        width, height = map(int, text.split(":"))
        if height > 0 and 0.5 <= width / height <= 2:
            return width / height
    raise ValueError(f"`aspect_ratios` holds {text!r}; pass ratios from 1:2 to 2:1, such as 1:1 3:2 2:3.")


class AspectReader:
    """Prepare rows for collation at the aspect ratio that is nearest to their images.

    Args:
        aspect_ratios (`Sequence[str]`): The aspect ratios; see `parse_aspect_ratio`.
        row_reader (`RowReader`): Prepares rows at one size. Its longer side is the longer side at every aspect ratio.

    Raises:
        ValueError: If an aspect ratio is not supported.
    """

    def __init__(self, aspect_ratios: Sequence[str], row_reader: RowReader):
        self.ratios = {text: parse_aspect_ratio(text) for text in aspect_ratios}
        self.readers = [build_row_reader(row_reader, ratio) for ratio in self.ratios.values()]

    def read(self, row: Mapping, spec: DatasetSpec) -> dict:
        """Prepare a row; see `RowReader.read`."""
        return self.readers[self.choose(row, spec)].read(row, spec)

    def choose(self, row: Mapping, spec: DatasetSpec) -> int:
        """Choose the nearest aspect ratio for a row. Returns its index."""
        measured = measure_aspect_ratio(row, spec)
        return int(np.abs(np.log(list(self.ratios.values())) - np.log(measured)).argmin())


def build_row_reader(row_reader: RowReader, ratio: float) -> RowReader:
    """Build a reader for an aspect ratio from a reader for one size. The longer side stays the same."""
    given = row_reader.image_processor
    rows, columns = choose_grid(ratio, 1.0, max(given.size.height, given.size.width) // given.stride)
    size = {"height": rows * given.stride, "width": columns * given.stride}
    image_processor = EditARImageProcessor(size=size, resize_mode=given.resize_mode, stride=given.stride)
    return replace(row_reader, image_processor=image_processor)


def measure_aspect_ratio(row: Mapping, spec: DatasetSpec) -> float:
    """Measure width / height of a pair from the header of an image, after the rotation of its EXIF block.

    Raises:
        ValueError: If the image does not open.
    """
    name = "source_image" if "source_image" in row else "target_image"
    image = open_stored_image(row[name], name, spec.image_folder)
    if not isinstance(image, Image.Image):
        raise ValueError(f"`{name}` holds {type(image).__name__}, and not an image")
    width, height = image.size
    orientation = None
    with suppress(Exception):  # The readers of PIL raise errors of many classes on broken EXIF blocks.
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    return height / width if orientation in SIDEWAYS else width / height


class BucketedRows(torch.utils.data.IterableDataset):
    """Yield rows without end, ready for collation. All rows of a batch come from one bucket: pairs of one aspect ratio.

    The bucket of a batch is drawn at random, with the probability that a row of `MixedRows` is in this bucket.

    Args:
        batch_size (`int`): Rows of a batch.
        specs, opened, bad_rows, seed, process, num_processes: See `MixedRows`.
        aspect_reader (`AspectReader`): Prepares the rows.

    A row whose image does not open is in no bucket. Bad rows are counted over all buckets, because one bad row may be a
    large fraction of a small bucket.

    Raises:
        ValueError: If a data set is streamed or holds tokens, or if too many images do not open.
    """

    other_remedy = ", or leave this ratio out of `aspect_ratios`"

    def __init__(
        self,
        batch_size: int,
        specs: Sequence[DatasetSpec],
        opened: Sequence[datasets.Dataset | datasets.IterableDataset],
        aspect_reader: AspectReader,
        bad_rows: BadRowCount,
        seed: int,
        process: int = 0,
        num_processes: int = 1,
    ):
        super().__init__()
        self.batch_size, self.seed, self.process, self.num_rows = batch_size, seed, process, 0
        self.aspect_ratios = list(aspect_reader.ratios)
        chosen = [
            choose_buckets(dataset, spec, aspect_reader, bad_rows) for spec, dataset in zip(specs, opened, strict=True)
        ]
        self.buckets, shares = [], []
        for index, ratio in enumerate(aspect_reader.ratios):
            own_specs, own_rows = [], []
            for spec, dataset, indices in zip(specs, opened, chosen, strict=True):
                if len(own := np.flatnonzero(indices == index)):
                    probability = spec.probability * len(own) / np.sum(indices != NOT_OPENED)
                    own_specs.append(replace(spec, name=f"{spec.name}, {ratio}", probability=probability))
                    own_rows.append(dataset.select(own))
            if own_rows:
                where = aspect_reader.readers[index], bad_rows, seed, process, num_processes
                self.buckets.append(MixedRows(own_specs, own_rows, *where))
                shares.append(sum(spec.probability for spec in own_specs))
        self.shares = np.array(shares) / sum(shares)

    @property
    def streams(self) -> list[EndlessRows]:
        return [stream for bucket in self.buckets for stream in bucket.streams]

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        index, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        buckets = [iter(bucket) for bucket in self.buckets]
        while True:
            # The generator depends on the index of the batch alone, so a resumed run continues with the same draws.
            # The last number distinguishes it from the generators of `MixedRows`.
            place = self.seed, self.process * num_workers + index, self.num_rows // self.batch_size, 1
            bucket = np.random.default_rng(place).choice(len(buckets), p=self.shares)
            self.num_rows += 1
            yield next(buckets[bucket])

    def state_dict(self) -> dict:
        buckets = [bucket.state_dict() for bucket in self.buckets]
        return {
            "aspect_ratios": self.aspect_ratios,
            "batch_size": self.batch_size,
            "num_rows": self.num_rows,
            "buckets": buckets,
        }

    def load_state_dict(self, state: Mapping) -> None:
        # The first checkpoints with buckets do not name their ratios, and have no batch size.
        check_saved_ratios(state, self.aspect_ratios if "buckets" in state else [], self.aspect_ratios)
        check_saved_number("aspect ratios that have pairs", state["buckets"], self.buckets)
        # The same number of batches, so that a run with another batch size resumes at the start of a batch.
        self.num_rows = state["num_rows"] // state.get("batch_size", self.batch_size) * self.batch_size
        for bucket, bucket_state in zip(self.buckets, state["buckets"], strict=True):
            bucket.load_state_dict(bucket_state)


def choose_buckets(
    dataset: datasets.Dataset | datasets.IterableDataset,
    spec: DatasetSpec,
    aspect_reader: AspectReader,
    bad_rows: BadRowCount,
) -> np.ndarray:
    """Choose the nearest aspect ratio for each pair of a data set.

    Returns:
        `np.ndarray` of shape `(number of pairs,)`: Indices of aspect ratios, or `NOT_OPENED`.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            f"`aspect_ratios`: {spec.name!r} is streamed, so its images cannot be measured before the run; pass "
            "`--no-streaming`, or write `streaming: false` into the recipe."
        )
    if "source_image_tokens" in dataset.column_names:
        raise ValueError(f"`aspect_ratios` needs images, but {spec.name!r} holds tokens; give the images.")
    name = "source_image" if "source_image" in dataset.column_names else "target_image"
    images = dataset.select_columns([name])

    def choose(position: int) -> tuple[int, int]:
        return position, aspect_reader.choose(images[position], spec)

    indices = np.full(len(images), NOT_OPENED)
    for position, index in bad_rows.read(enumerate(range(len(images))), choose, spec.name):
        indices[position] = index
    bad_rows.judge()
    return indices
