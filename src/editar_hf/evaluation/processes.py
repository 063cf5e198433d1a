"""The processes that share a run, as a launcher such as `torchrun` started them; most often one."""

import sys
from datetime import timedelta

import torch
from accelerate import PartialState
from tqdm import tqdm


# How often progress is written into a log, in seconds.
LOG_INTERVAL = 30


def get_process() -> PartialState:
    """Get this process's place among those of the run, and its device."""
    # Without an accelerator, accelerate joins processes only when it is told that they are to use the CPU. A process
    # that is done waits for the slowest, for longer than the usual minutes.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))


def show_progress(*args, **options) -> tqdm:
    """Show progress, rate and time left in the first process: on a terminal all the time, in a log now and then.

    Args:
        args, options: Those of `tqdm`.
    """
    interval = {} if sys.stderr.isatty() else {"mininterval": LOG_INTERVAL, "maxinterval": LOG_INTERVAL}
    return tqdm(*args, unit="picture", disable=not get_process().is_main_process, **interval, **options)
