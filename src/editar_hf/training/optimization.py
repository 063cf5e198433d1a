"""Optimisers, AdamW as published and Muon for training from scratch; and which steps are left out."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from .sharding import gather


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    learning_rate: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.05,
) -> torch.optim.AdamW:
    """Build AdamW with weight decay on tensors of two or more dimensions only.

    Source: the defaults are those of EditAR (arXiv 2501.04699), section 4.1, and of its published training script.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def split_hidden_matrices(module: nn.Module) -> tuple[list[torch.Tensor], list[nn.Parameter]]:
    """Split trained parameters into the matrices of hidden layers, for Muon, and all others.

    Muon is not meant for embeddings, the output head and vectors. Source: Jordan et al., "Muon" (2024).
    """
    heads = [part.get_output_embeddings() for part in module.modules() if isinstance(part, PreTrainedModel)]
    linears = [part for part in module.modules() if isinstance(part, nn.Linear) and part not in heads]
    matrices = [linear.weight for linear in linears if linear.weight.requires_grad]
    ids = {id(matrix) for matrix in matrices}
    return matrices, [p for p in module.parameters() if p.requires_grad and id(p) not in ids]


def build_muon(parameters: Iterable[torch.Tensor], learning_rate: float, weight_decay: float) -> torch.optim.Muon:
    """Build Muon with steps as large as AdamW's, so that their learning rates compare.

    Source: Muon is Scalable for LLM Training (arXiv 2502.16982), section 2.2.
    """
    return torch.optim.Muon(parameters, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


class NonFiniteGuard:
    """Skip and count steps without a finite loss or gradient, the same in every process, and stop after too many.

    Args:
        accelerator (`Accelerator`): Accelerator of the run.
        output_dir (`Path`): Folder for the last batches when the run stops.
        max_steps (`int`): Number of steps that may be skipped.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, max_steps: int):
        self.accelerator, self.output_dir, self.max_steps = accelerator, output_dir, max_steps
        self.num_skipped = 0

    def admits(self, loss: torch.Tensor, gradient_norm: torch.Tensor | float | None) -> bool:
        """Tell whether the weights may be stepped. In fp16 the loss scaler handles infinite gradients.

        This waits for the device at every step. Only then can the host leave weights, moments, step counts and
        averages exactly as they were, whatever the optimiser.
        """
        figures = [loss.detach().float()]
        # DeepSpeed gives a plain number, or none.
        if self.accelerator.scaler is None and gradient_norm is not None:
            figures.append(gather(torch.as_tensor(gradient_norm)).to(loss.device).float())
        return math.isfinite(self.accelerator.reduce(torch.stack(figures), "sum").sum().item())

    def skip(self, step: int, batches: list[dict]) -> None:
        """Count and log a skipped step.

        Raises:
            FloatingPointError: If more than `max_steps` were skipped; the batches of the last one are saved first.
        """
        self.num_skipped += 1
        self.accelerator.print(
            f"step {step}: skipped, no finite loss or gradient; {self.num_skipped} such steps so far"
        )
        if self.num_skipped > self.max_steps:
            path = self.output_dir / f"nonfinite-step-{step}-process-{self.accelerator.process_index}.pt"
            torch.save(batches, path)
            raise FloatingPointError(
                f"{self.num_skipped} steps had no finite loss, more than `max_nonfinite_steps` {self.max_steps} "
                f"allows. The batches of the last one are in {path}; the last checkpoint is from before. Lower the "
                "learning rate, or look at the data."
            )
