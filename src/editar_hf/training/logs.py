"""Log a training run to the terminal and to the trackers."""

import resource
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm


def log_figures(accelerator: Accelerator, figures: dict[str, float], step: int) -> None:
    """Print figures with four digits and send them to the trackers."""
    accelerator.log(figures, step=step)
    line = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    if accelerator.is_main_process:
        # Above the progress bar, if there is one.
        tqdm.write(f"step {step}: {line}", file=sys.stdout)
        sys.stdout.flush()


# A run warns of more epochs than these.
MANY_EPOCHS = 100


def print_banner(accelerator: Accelerator, facts: Mapping[str, str]) -> None:
    """Print facts about a run, one per line, on the main process."""
    width = max(map(len, facts))
    lines = [f"  {name:<{width}}  {fact}" for name, fact in facts.items()]
    accelerator.print("\n".join(["Training", *lines]), flush=True)


def print_epochs(
    accelerator: Accelerator, argument: str, num_steps: int, samples_per_step: int, num_samples: int
) -> None:
    """Print how many epochs the steps are, and warn if they are many."""
    num_epochs = num_steps * samples_per_step / num_samples
    line = f"{num_steps:,} steps are {num_epochs:,.1f} epochs of {num_samples:,} samples."
    if num_epochs > MANY_EPOCHS:
        enough = max(1, MANY_EPOCHS * num_samples // samples_per_step)
        line += (
            f" A model memorises a small data set long before: watch the loss on held-out samples, or lower "
            f"`--{argument}`; {enough:,} steps are {enough * samples_per_step / num_samples:,.1f} epochs."
        )
    accelerator.print(line, flush=True)


def measure_peak_memory(device: torch.device) -> float:
    """Measure the peak memory in GiB: allocations on the GPU, or else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Kilobytes; on macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class LossLog:
    """Sum losses on the device, and log their means and the speed. No step waits for a number.

    Args:
        accelerator (`Accelerator`): Accelerator of the run.
        tokens_per_sample (`int`): Positions of a pair in the decoder.
        num_steps (`int`): Total number of steps, for the progress bar.
        step (`int`): Steps already done.
    """

    def __init__(self, accelerator: Accelerator, tokens_per_sample: int, num_steps: int, step: int = 0):
        self.accelerator, self.tokens_per_sample = accelerator, tokens_per_sample
        # None hides the bar if the output is not a terminal.
        disable = None if accelerator.is_main_process else True
        self.progress_bar = tqdm(total=num_steps, initial=step, desc="steps", disable=disable)
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.groups: dict[str, list[torch.Tensor]] = {}
        self.num_samples = 0
        self.start_time = time.monotonic()

    def add(self, losses: dict[str, torch.Tensor], batch_size: int, **groups: Sequence[str]) -> None:
        """Add a batch of `batch_size` samples per process. Every batch has the same weight.

        Args:
            losses (`dict[str, torch.Tensor]`): Scalars by name; and `token_losses`, one for each sample.
            batch_size (`int`): Samples per process.
            groups (`Sequence[str]`): Group of each sample: `task=("edit", …)` logs `token_loss/task/edit`.
        """
        token_losses = losses["token_losses"].float()
        for name, loss in losses.items():
            if loss.ndim == 0:
                self.sums[name] = self.sums.get(name, 0) + loss.detach().float()
                self.counts[name] = self.counts.get(name, 0) + 1
        for kind, names in groups.items():
            for name in sorted(set(names)):
                members = torch.tensor([other == name for other in names]).to(token_losses.device)
                self.groups.setdefault(f"token_loss/{kind}/{name}", []).append(token_losses[members])
        self.num_samples += batch_size * self.accelerator.num_processes

    def flush(self, step: int, learning_rate: float, **more: float) -> None:
        """Log the means over processes and over the batches since the last flush, and start again."""
        self.log(step, learning_rate, **more)
        self.clear()

    def log(self, step: int, learning_rate: float, **more: float) -> None:
        """Log the means so far, and continue to add."""
        means = {
            name: self.accelerator.reduce(total / self.counts[name], "mean").item() for name, total in self.sums.items()
        }
        samples_per_second = self.num_samples / (time.monotonic() - self.start_time)
        speed = {
            "samples_per_second": samples_per_second,
            "tokens_per_second": samples_per_second * self.tokens_per_sample,
            "memory_gib": measure_peak_memory(self.accelerator.device),
        }
        self.progress_bar.set_postfix({name: f"{value:.4g}" for name, value in speed.items()})
        groups = self.average_groups()
        log_figures(self.accelerator, means | groups | {"learning_rate": learning_rate} | more | speed, step)

    def average_groups(self) -> dict[str, float]:
        """Average the losses of each group over processes; a single task or data set is left out."""
        sums = {name: (torch.cat(losses).sum().item(), sum(map(len, losses))) for name, losses in self.groups.items()}
        gathered = gather_object([sums])
        names = sorted({name for part in gathered for name in part})
        alone = {kind for kind in ("task", "dataset") if sum(f"/{kind}/" in name for name in names) == 1}
        totals = {name: [part[name] for part in gathered if name in part] for name in names}
        return {
            name: sum(total for total, _ in parts) / sum(count for _, count in parts)
            for name, parts in totals.items()
            if name.split("/")[1] not in alone
        }
