"""Endless streams of rows that resume exactly.

A reader is one worker of one process. Each reader reads its own rows, and the state of its stream is a few numbers. A
resumed run therefore reads exactly the rows that the interrupted run would have read. The tools of `datasets` do not
resume exactly: a resumed shuffle buffer is filled with other rows, and `interleave_datasets` repeats the same order in
each epoch. This module therefore shuffles data sets on disk by rows, and streamed data sets only by shards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torchdata.stateful_dataloader import StatefulDataLoader

from .dataset_specs import DatasetSpec
from .rows import BadRowCount, RowReader


if TYPE_CHECKING:
    from .aspects import BucketedRows


class EndlessRows:
    """Read a data set again and again. Each epoch has a new order.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The data set. A reader reads its own share: rows of
            a `Dataset`, shards of an `IterableDataset`.
        name (`str`): Name of the data set in messages.
        seed (`int`): Seed of the orders. Each order also depends on the epoch.
        process, num_processes (`int`): Index of this process, and number of processes.
    """

    def __init__(
        self,
        dataset: datasets.Dataset | datasets.IterableDataset,
        name: str,
        seed: int,
        process: int,
        num_processes: int,
    ):
        self.dataset, self.name, self.seed = dataset, name, seed
        self.process, self.num_processes = process, num_processes
        self.epoch, self.num_read, self.shard_state = 0, 0, None

    def check_readers(self, num_workers: int, other_remedy: str) -> None:
        """Refuse more workers than this process has rows or shards for.

        Raises:
            ValueError: If a worker would have nothing to read.
        """
        if is_local := isinstance(self.dataset, datasets.Dataset):
            num_parts = len(self.dataset) // self.num_processes
        else:
            num_parts = split_dataset_by_node(self.dataset, self.process, self.num_processes).num_shards
        if num_parts < max(1, num_workers):
            raise ValueError(
                f"`dataset` {self.name!r} has fewer {'rows' if is_local else 'shards'} than readers, which are "
                f"{max(1, num_workers)} in each of {self.num_processes} processes, as `num_workers` is {num_workers}. "
                f"Use fewer processes or workers{other_remedy}."
            )

    def read(self, worker: int, num_workers: int) -> Iterator[tuple[int, dict]]:
        """Yield (position, row) until the end of the epoch, then count a new epoch.

        Raises:
            ValueError: If this reader has no rows.
        """
        is_local = isinstance(self.dataset, datasets.Dataset)
        for position, row in self.read_local(worker, num_workers) if is_local else self.read_streamed():
            self.num_read += 1
            yield position, row
        if not self.num_read:
            raise ValueError(f"`dataset` {self.name!r} has a shard without rows. Lower `num_workers`, or remove it.")
        self.epoch, self.num_read, self.shard_state = self.epoch + 1, 0, None

    def read_local(self, worker: int, num_workers: int) -> Iterator[tuple[int, dict]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.dataset))
        own = order[self.process * num_workers + worker :: self.num_processes * num_workers]
        for position in own[self.num_read :].tolist():
            yield position, self.dataset[position]

    def read_streamed(self) -> Iterator[tuple[int, dict]]:
        """Read the shards of this reader. A position is an index among the rows of the reader.

        This method selects the shards of the process, and `datasets` divides them among the workers.
        """
        dataset = split_dataset_by_node(self.dataset, self.process, self.num_processes)
        # `datasets` seeds the shuffling of shards with the epoch alone, and does not shuffle in epoch 0.
        dataset.set_epoch(1 + self.seed * 1_000_003 + self.epoch)
        if self.shard_state is not None:
            dataset.load_state_dict(self.shard_state)
        for position, row in enumerate(dataset, self.num_read):
            self.shard_state = dataset.state_dict()
            yield position, row

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "num_read": self.num_read, "shard_state": self.shard_state}

    def load_state_dict(self, state: Mapping) -> None:
        self.epoch, self.num_read, self.shard_state = state["epoch"], state["num_read"], state["shard_state"]


class MixedRows(torch.utils.data.IterableDataset):
    """Yield rows of several data sets without end, ready for collation. Each row comes from a randomly drawn data set.

    Args:
        specs (`Sequence[DatasetSpec]`): The data sets, with their probabilities.
        opened (`Sequence`): The result of `open_dataset` for each data set.
        row_reader (`RowReader`): Prepares the rows.
        bad_rows (`BadRowCount`): Counts the rows that cannot be used, and stops the run if there are too many.
        seed, process, num_processes (`int`): See `EndlessRows`.
    """

    # What else to do than to use fewer readers, if a data set has too few rows. It ends a message.
    other_remedy = ""

    def __init__(
        self,
        specs: Sequence[DatasetSpec],
        opened: Sequence[datasets.Dataset | datasets.IterableDataset],
        row_reader: RowReader,
        bad_rows: BadRowCount,
        seed: int,
        process: int = 0,
        num_processes: int = 1,
    ):
        super().__init__()
        self.specs, self.row_reader, self.seed, self.process = specs, row_reader, seed, process
        self.streams = [
            EndlessRows(dataset, spec.name, seed, process, num_processes)
            for spec, dataset in zip(specs, opened, strict=True)
        ]
        probabilities = np.array([spec.probability for spec in specs])
        self.probabilities = probabilities / probabilities.sum()
        self.bad_rows = bad_rows
        self.num_draws = 0

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        index, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rows = [
            self.bad_rows.read(
                self.read_for_ever(stream, index, num_workers), partial(self.row_reader.read, spec=spec), spec.name
            )
            for spec, stream in zip(self.specs, self.streams, strict=True)
        ]
        while True:
            self.num_draws += 1
            # The generator depends on the index of the draw alone, so a resumed run continues with the same draws.
            generator = np.random.default_rng((self.seed, self.process * num_workers + index, self.num_draws))
            yield next(rows[generator.choice(len(rows), p=self.probabilities)])

    def read_for_ever(self, stream: EndlessRows, worker: int, num_workers: int) -> Iterator[tuple[int, dict]]:
        while True:
            yield from stream.read(worker, num_workers)
            self.bad_rows.judge()

    def state_dict(self) -> dict:
        return {
            "num_draws": self.num_draws,
            "streams": [stream.state_dict() for stream in self.streams],
            "num_read": self.bad_rows.num_read,
            "num_bad": self.bad_rows.num_bad,
        }

    def load_state_dict(self, state: Mapping) -> None:
        check_saved_ratios(state, [], [])
        check_saved_number("data sets", state["streams"], self.streams)
        self.num_draws = state["num_draws"]
        for stream, stream_state in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(stream_state)
        self.bad_rows.num_read, self.bad_rows.num_bad = state["num_read"], state["num_bad"]


def check_saved_ratios(state: Mapping, default: list[str], aspect_ratios: list[str]) -> None:
    """Refuse the state of a run at other aspect ratios. A state without ratios has those of `default`.

    Raises:
        ValueError: If the ratios, or their order, differ.
    """
    saved = state.get("aspect_ratios", default)
    if saved != aspect_ratios:
        old, new = (" ".join(ratios) or "not given" for ratios in (saved, aspect_ratios))
        raise ValueError(
            f"`aspect_ratios` was {old} in the checkpoint, and now it is {new}. Resume with the ratios of the "
            "checkpoint, in the same order, or start a new run from its weights."
        )


def check_saved_number(parts: str, saved: Sequence, own: Sequence) -> None:
    """Refuse the state of a run whose data had another number of parts.

    Raises:
        ValueError: If the numbers differ.
    """
    if len(saved) != len(own):
        raise ValueError(
            f"`dataset` or `recipe` gave {len(saved)} {parts} in the checkpoint, and now it gives {len(own)}. Resume "
            "with the data of the checkpoint, or start a new run from its weights."
        )


def build_dataloader(
    rows: "MixedRows | BucketedRows", collate: Callable, batch_size: int, num_workers: int
) -> StatefulDataLoader:
    """Build the endless data loader of a run. Its `state_dict` holds its position in the rows.

    Raises:
        ValueError: If a data set has fewer rows or shards than readers.
    """
    for stream in rows.streams:
        stream.check_readers(num_workers, rows.other_remedy)
    # A data loader draws a random number when it starts. With the default generator, this draw would change the
    # dropout of a resumed run.
    generator = torch.Generator().manual_seed(rows.seed)
    return StatefulDataLoader(
        rows, batch_size=batch_size, collate_fn=collate, num_workers=num_workers, generator=generator
    )
