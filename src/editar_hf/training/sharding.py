"""Gather networks whose parameters are sharded over processes by PyTorch's `fully_shard`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor in every process if it is sharded. All processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Hold every parameter whole and in its own precision, for saving. The module must not be called meanwhile."""
    owned = [
        (owner, name, part)
        for owner in module.modules()
        for name, part in owner.named_parameters(recurse=False, remove_duplicate=False)
        if isinstance(part, DTensor)
    ]
    whole: dict[int, nn.Parameter] = {}  # A parameter that two modules share is gathered once.
    for owner, name, part in owned:
        if id(part) not in whole:
            whole[id(part)] = nn.Parameter(gather(part.detach()), requires_grad=part.requires_grad)
        setattr(owner, name, whole[id(part)])
    try:
        yield
    finally:
        for owner, name, part in owned:
            setattr(owner, name, part)


@contextmanager
def callable_parts(module: nn.Module) -> Iterator[None]:
    """Let all processes call the networks inside a sharded module directly."""
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()
