"""Endless streams of rows that resume exactly.

A reader is one worker of one process. Each reader reads its own rows, and the state of its stream is a few numbers. A
resumed run therefore reads exactly the rows that the interrupted run would have read. `datasets` refills its shuffle
buffer with other rows on resumption, and `interleave_datasets` repeats the same order each epoch. So data sets on disk
are shuffled here, row by row, and streamed data sets by their shards alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torchdata.stateful_dataloader import StatefulDataLoader

from .data import EditCollator
from .dataset_specs import DatasetSpec
from .rows import BadRowCount, RowReader


@dataclass(frozen=True)
class Reader:
    """Worker `worker` of `num_workers` in process `process` of `num_processes`."""

    process: int
    num_processes: int
    worker: int
    num_workers: int

    @property
    def reader_index(self) -> int:
        return self.process * self.num_workers + self.worker

    @property
    def num_readers(self) -> int:
        return self.num_processes * self.num_workers


class ShuffledRows:
    """Read a data set on disk epoch after epoch, each in a new order.

    Args:
        dataset (`datasets.Dataset`): The rows.
        seed (`int`): Seed of the orders, together with the epoch.
    """

    def __init__(self, dataset: datasets.Dataset, seed: int):
        self.dataset, self.seed = dataset, seed
        self.epoch, self.num_read = 0, 0

    def check(self, name: str, reader: Reader) -> None:
        """Refuse more readers than there are rows."""
        if len(self.dataset) < reader.num_readers:
            raise ValueError(
                f"`dataset` {name!r} has {len(self.dataset)} rows for {reader.num_readers} readers "
                f"({reader.num_processes} processes with {reader.num_workers} workers each). Lower "
                "`num_workers`, or add rows."
            )

    def read_epoch(self, reader: Reader) -> Iterator[tuple[int, dict]]:
        """Yield the rest of the epoch as (position, row), then begin the next epoch."""
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.dataset))
        for position in order[reader.reader_index :: reader.num_readers][self.num_read :].tolist():
            self.num_read += 1
            yield position, self.dataset[position]
        self.epoch, self.num_read = self.epoch + 1, 0

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "num_read": self.num_read}

    def load_state_dict(self, state: Mapping) -> None:
        self.epoch, self.num_read = state["epoch"], state["num_read"]


class StreamedRows:
    """Read a streamed data set epoch after epoch, its shards in a new order each time.

    Args:
        dataset (`datasets.IterableDataset`): The rows. Each process and worker reads its own shards.
        seed (`int`): Seed of the orders, together with the epoch.
    """

    def __init__(self, dataset: datasets.IterableDataset, seed: int):
        self.dataset, self.seed = dataset, seed
        self.epoch, self.num_read, self.state = 0, 0, None

    def check(self, name: str, reader: Reader) -> None:
        """Refuse more workers than a process has shards."""
        num_shards = split_dataset_by_node(self.dataset, reader.process, reader.num_processes).num_shards
        if num_shards < reader.num_workers:
            raise ValueError(
                f"`num_workers` is {reader.num_workers}; `dataset` {name!r} has {num_shards} shards for each of "
                f"{reader.num_processes} processes, and each worker reads shards of its own. Use {num_shards}."
            )

    def read_epoch(self, reader: Reader) -> Iterator[tuple[int, dict]]:
        """Yield the rest of the epoch as (position among the reader's rows, row), then begin the next epoch."""
        dataset = split_dataset_by_node(self.dataset, reader.process, reader.num_processes)
        # `datasets` shuffles shards by the epoch alone, and epoch 0 not at all.
        dataset.set_epoch(1 + self.seed * 1_000_003 + self.epoch)
        if self.state is not None:
            dataset.load_state_dict(self.state)
        for row in dataset:
            self.num_read, self.state = self.num_read + 1, dataset.state_dict()
            yield self.num_read - 1, row
        self.epoch, self.num_read, self.state = self.epoch + 1, 0, None

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "num_read": self.num_read, "state": self.state}

    def load_state_dict(self, state: Mapping) -> None:
        self.epoch, self.num_read, self.state = state["epoch"], state["num_read"], state["state"]


class MixedRows(torch.utils.data.IterableDataset):
    """Yield rows of several data sets without end, ready for collation. Each row's data set is drawn by probability.

    Args:
        specs (`Sequence[DatasetSpec]`): The data sets.
        opened (`Sequence`): What `open_dataset` returned for each.
        row_reader (`RowReader`): Makes rows ready.
        max_bad_rows_fraction (`float`): Fraction of rows that may be unusable before a `ValueError` stops the run.
        seed (`int`): Seed of the orders and draws.
        process, num_processes (`int`): Index of this process, and number of processes.
    """

    def __init__(
        self,
        specs: Sequence[DatasetSpec],
        opened: Sequence[datasets.Dataset | datasets.IterableDataset],
        row_reader: RowReader,
        max_bad_rows_fraction: float,
        seed: int,
        process: int = 0,
        num_processes: int = 1,
    ):
        super().__init__()
        self.specs, self.row_reader, self.seed = specs, row_reader, seed
        self.process, self.num_processes = process, num_processes
        self.streams = [
            ShuffledRows(dataset, seed) if isinstance(dataset, datasets.Dataset) else StreamedRows(dataset, seed)
            for dataset in opened
        ]
        probabilities = np.array([spec.probability for spec in specs])
        self.probabilities = probabilities / probabilities.sum()
        self.bad_rows = BadRowCount(max_bad_rows_fraction)
        self.num_draws = 0

    def check(self, num_workers: int) -> None:
        """Refuse, before a run begins, more readers than a data set can serve."""
        reader = Reader(self.process, self.num_processes, 0, max(1, num_workers))
        for spec, stream in zip(self.specs, self.streams, strict=True):
            stream.check(spec.name, reader)

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        reader = Reader(self.process, self.num_processes, *((worker.id, worker.num_workers) if worker else (0, 1)))
        rows = [
            self.bad_rows.read(self.read_for_ever(stream, reader), partial(self.row_reader.read, spec=spec), spec.name)
            for spec, stream in zip(self.specs, self.streams, strict=True)
        ]
        while True:
            yield next(rows[self.draw_dataset(reader)])

    def draw_dataset(self, reader: Reader) -> int:
        """Draw the index of a data set. The n-th draw of a reader is the same in every run."""
        self.num_draws += 1
        if len(self.specs) == 1:
            return 0
        generator = np.random.default_rng((self.seed, reader.reader_index, self.num_draws))
        return int(generator.choice(len(self.specs), p=self.probabilities))

    def read_for_ever(self, stream: ShuffledRows | StreamedRows, reader: Reader) -> Iterator[tuple[int, dict]]:
        while True:
            yield from stream.read_epoch(reader)
            self.bad_rows.judge()

    def state_dict(self) -> dict:
        return {
            "num_draws": self.num_draws,
            "streams": [stream.state_dict() for stream in self.streams],
            "num_read": self.bad_rows.num_read,
            "num_bad": self.bad_rows.num_bad,
        }

    def load_state_dict(self, state: Mapping) -> None:
        self.num_draws = state["num_draws"]
        for stream, stream_state in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(stream_state)
        self.bad_rows.num_read, self.bad_rows.num_bad = state["num_read"], state["num_bad"]


def build_dataloader(rows: MixedRows, collator: EditCollator, batch_size: int, num_workers: int) -> StatefulDataLoader:
    """Build the endless loader of a run's batches. Its `state_dict` holds its place in the rows.

    Raises:
        ValueError: If there are more workers than a data set can serve.
    """
    rows.check(num_workers)
    # A data loader draws a number when it starts. A draw from the default generator would change the dropout of a
    # resumed run.
    generator = torch.Generator().manual_seed(rows.seed)
    return StatefulDataLoader(
        rows, batch_size=batch_size, collate_fn=collator, num_workers=num_workers, generator=generator
    )


def collate_first_rows(
    opened: Iterable[Mapping],
    spec: DatasetSpec,
    row_reader: RowReader,
    collator: EditCollator,
    batch_size: int,
    num_batches: int,
    bad_rows: BadRowCount,
) -> list[dict]:
    """Collate the first usable rows of an opened data set, in their order, for validation.

    Raises:
        ValueError: If no row is usable, or too many are not.
    """
    usable = bad_rows.read(enumerate(opened), partial(row_reader.read, spec=spec), spec.name)
    rows = list(islice(usable, batch_size * num_batches))
    if not rows:
        raise ValueError(f"`validation_dataset` {spec.dataset!r} has no usable row.")
    batches = [collator(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    return [{name: value for name, value in batch.items() if name != "groups"} for batch in batches]
