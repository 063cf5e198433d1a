"""The processes that share a run, as a launcher such as `torchrun` started them; most often one."""

from datetime import timedelta

import torch
from accelerate import PartialState


def get_process() -> PartialState:
    """Get this process's place among those of the run, and its device."""
    # Without an accelerator, accelerate joins processes only when it is told that they are to use the CPU. A process
    # that is done waits for the slowest, for longer than the usual minutes.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
