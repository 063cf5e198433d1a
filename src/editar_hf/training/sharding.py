"""Gather the parameters of networks that PyTorch's `fully_shard` has sharded over processes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor. A sharded tensor is gathered in every process, so all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Replace every sharded parameter by the full tensor, in its own precision, so that the module can be saved.

    The module must not be called inside this context.
    """
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
