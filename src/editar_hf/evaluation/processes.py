"""The processes that share a run, as a launcher such as `accelerate launch` started them; most often one."""

import sys
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm


def get_process() -> PartialState:
    """Return this process's place among those of the run, and its device."""
    # Without an accelerator, accelerate joins processes only when it is told to use the CPU. A process that is done
    # waits for the slowest, for longer than the usual minutes.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))


def show_progress(*args: Any, **options: Any) -> tqdm:
    """Show `tqdm`'s progress in the first process: always on a terminal, every 30 seconds in a log."""
    interval = {} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 30}
    return tqdm(*args, unit="image", disable=not get_process().is_main_process, **interval, **options)
