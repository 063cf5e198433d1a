"""Build the optimizers (AdamW as published, Muon for training from scratch), and skip steps that are not finite."""

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
    """Split the trained parameters into the matrices of hidden layers, for Muon, and all others, for AdamW.

    Muon is not meant for embeddings, the output head and vectors. Source: Jordan et al., "Muon" (2024).
    """
    heads = [part.get_output_embeddings() for part in module.modules() if isinstance(part, PreTrainedModel)]
    linears = [part for part in module.modules() if isinstance(part, nn.Linear) and part not in heads]
    matrices = [linear.weight for linear in linears if linear.weight.requires_grad]
    ids = {id(matrix) for matrix in matrices}
    return matrices, [p for p in module.parameters() if p.requires_grad and id(p) not in ids]


def build_muon(parameters: Iterable[torch.Tensor], learning_rate: float, weight_decay: float) -> torch.optim.Muon:
    """Build Muon. Its steps are as large as the steps of AdamW, so learning rates of the two are comparable.

    Source: Muon is Scalable for LLM Training (arXiv 2502.16982), section 2.2.
    """
    return torch.optim.Muon(parameters, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


class NonFiniteGuard:
    """Skip and count steps with a non-finite loss or gradient, and stop after too many. All processes agree.

    Args:
        accelerator (`Accelerator`): Accelerator of the run.
        output_dir (`Path`): Folder where the batches of the last step are saved when the run stops.
        max_steps (`int`): Number of steps that may be skipped.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, max_steps: int):
        self.accelerator, self.output_dir, self.max_steps = accelerator, output_dir, max_steps
        self.num_skipped = 0

    def admits(self, loss: torch.Tensor, gradient_norm: torch.Tensor | float | None) -> bool:
        """Return whether the weights may be updated. In fp16 the loss scaler handles infinite gradients.

        The host waits for the device at every step. Otherwise it could not skip the whole update, which covers the
        weights, the moments, the step counts and the averaged weights, with every optimizer.
        """
        figures = [loss.detach().float()]
        # DeepSpeed returns a plain number or `None`.
        if self.accelerator.scaler is None and gradient_norm is not None:
            figures.append(gather(torch.as_tensor(gradient_norm)).to(loss.device).float())
        return math.isfinite(self.accelerator.reduce(torch.stack(figures), "sum").sum().item())

    def skip(self, step: int, batches: list[dict]) -> None:
        """Count and log a skipped step.

        Raises:
            FloatingPointError: If more than `max_steps` steps were skipped. The batches of the last are saved first.
        """
        self.num_skipped += 1
        self.accelerator.print(
            f"step {step}: skipped, because the loss or gradient is not finite; {self.num_skipped} skipped so far"
        )
        if self.num_skipped > self.max_steps:
            path = self.output_dir / f"nonfinite-step-{step}-process-{self.accelerator.process_index}.pt"
            torch.save(batches, path)
            raise FloatingPointError(
                f"{self.num_skipped} steps had a non-finite loss or gradient, more than `max_nonfinite_steps` "
                f"{self.max_steps} allows. The batches of the last of these steps are in {path}. Check the data or "
                "lower the learning rate, then resume from the last checkpoint."
            )
