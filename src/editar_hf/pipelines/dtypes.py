"""Choose the dtype of a pipeline. This module imports torch only, because `editar-hf env` uses it and must be fast."""

from collections.abc import Iterable

import torch


# The CPU instructions for each dtype, with their names in `torch.cpu.get_capabilities()`. Without them, torch computes
# in a slow loop (pytorch#146508).
CPU_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}


def has_cpu_instructions(dtype: torch.dtype) -> bool:
    """Return whether this CPU has instructions for a dtype of `CPU_INSTRUCTIONS`."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in CPU_INSTRUCTIONS[dtype])


def choose_dtype(stored: Iterable[torch.dtype]) -> tuple[torch.dtype | None, str]:
    """Choose the dtype of a pipeline that is loaded without `dtype`.

    Args:
        stored (iterable of `torch.dtype`): The dtypes of its weight files.

    Returns:
        The dtype, or None if each component keeps the dtype of its files; and the reason, for a message.
    """
    half = [dtype for dtype in CPU_INSTRUCTIONS if dtype in set(stored)]
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in half)
    if not half:
        return None, "as stored"
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and torch.accelerator.is_available():
        return None, f"as stored: the {accelerator.type} device computes in {names}"
    if all(map(has_cpu_instructions, half)):
        return None, f"as stored: this CPU has instructions for {names}"
    return torch.float32, f"this CPU has no instructions for {names}, in which the weights are stored"
