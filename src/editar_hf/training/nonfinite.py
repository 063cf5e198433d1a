"""Skip and count steps without a finite loss or gradient, and stop a run that has too many of them."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator

from .sharding import gather


class NonFiniteGuard:
    """Decide which steps to skip, the same in every process.

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
        if self.num_skipped <= self.max_steps:
            return
        path = self.output_dir / f"nonfinite-step-{step}-process-{self.accelerator.process_index}.pt"
        torch.save(batches, path)
        raise FloatingPointError(
            f"{self.num_skipped} steps had no finite loss, more than `max_nonfinite_steps` {self.max_steps} allows. "
            f"The batches of the last one are in {path}; the last checkpoint is from before. Lower the learning rate, "
            "or look at the data."
        )
