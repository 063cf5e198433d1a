"""The processes of a run. There is one, unless a launcher such as `accelerate launch` starts several."""

import sys
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm


def get_process() -> PartialState:
    """Return the index of this process, the number of processes, and the device, as a `PartialState`."""
    # Without an accelerator, accelerate connects the processes only if it is told to use the CPU. The timeout is long,
    # because a process that has finished waits for the slowest one.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))


def show_progress(*args: Any, **options: Any) -> tqdm:
    """Show a progress bar of tqdm in the main process. If the output is not a terminal, update it every 30 seconds."""
    interval = {} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 30}
    return tqdm(*args, unit="image", disable=not get_process().is_main_process, **interval, **options)
