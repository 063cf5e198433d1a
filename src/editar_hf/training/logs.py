"""What a training run says of itself: a line of figures to the terminal and to the trackers."""

import time

import torch
from accelerate import Accelerator


def log_figures(accelerator: Accelerator, figures: dict[str, float], step: int):
    """Print figures with four digits and hand them to the trackers."""
    accelerator.log(figures, step=step)
    line = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    accelerator.print(f"step {step}: {line}", flush=True)


class LossLog:
    """Add up losses on the device, and log their means and the speed now and then: no step waits for a number."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.clear()

    def clear(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.num_batches, self.num_samples = 0, 0
        self.start_time = time.monotonic()

    def add(self, losses: dict[str, torch.Tensor], batch_size: int):
        """Count a batch of `batch_size` samples per process; every batch counts the same."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach().float()
        self.num_batches += 1
        self.num_samples += batch_size * self.accelerator.num_processes

    def flush(self, step: int, learning_rate: float):
        """Log the means over processes and over the batches since the last time, and begin anew."""
        means = {
            name: self.accelerator.reduce(total / self.num_batches, "mean").item() for name, total in self.sums.items()
        }
        seconds = time.monotonic() - self.start_time
        speed = {"learning_rate": learning_rate, "samples_per_second": self.num_samples / seconds}
        log_figures(self.accelerator, means | speed, step)
        self.clear()
