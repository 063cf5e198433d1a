"""Compute in bfloat16 where that is fast."""

import torch

from editar_hf.pipelines.dtypes import has_cpu_instructions


def autocast(device: str | torch.device) -> torch.autocast:
    """Return a context that computes in bfloat16, except on a CPU without instructions for it: there in float32."""
    kind = torch.device(device).type
    is_fast = kind != "cpu" or has_cpu_instructions(torch.bfloat16)
    return torch.autocast(kind, torch.bfloat16, enabled=is_fast)
