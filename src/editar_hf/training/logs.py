"""Log a training run to the terminal, to `metrics.jsonl` and to the trackers of Accelerate."""

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm


# More epochs than these get a warning.
MANY_EPOCHS = 100


def log_figures(accelerator: Accelerator, figures: dict[str, float], step: int) -> None:
    """Print numbers with four digits, send them to the trackers, and append them to `metrics.jsonl`."""
    accelerator.log(figures, step=step)
    line = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    if accelerator.is_main_process:
        with open(f"{accelerator.project_dir}/metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        # Above the progress bar, if there is one.
        tqdm.write(f"step {step}: {line}", file=sys.stdout)
        sys.stdout.flush()


def print_banner(
    accelerator: Accelerator,
    facts: Mapping[str, object],
    module: torch.nn.Module,
    step: int,
    num_steps: int,
    samples_per_step: int,
    num_samples: int | None,
) -> None:
    """Print the model, the data and the number of steps, and warn if the run takes many epochs.

    `num_samples` is `None` if it is unknown.
    """
    parameters = list(module.parameters())
    num_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    facts = dict(facts) | {
        "samples": "streamed, their number is unknown" if num_samples is None else f"{num_samples:,}",
        "steps": f"{step:,} to {num_steps:,}, each of {samples_per_step:,} samples",
        "trained": f"{num_trained:,} of {sum(parameter.numel() for parameter in parameters):,} parameters",
        "devices": f"{accelerator.num_processes} × {accelerator.device}, mixed precision {accelerator.mixed_precision}",
    }
    accelerator.print("\n".join(["Training", *(f"  {name:<10}{fact}" for name, fact in facts.items())]), flush=True)
    if num_samples is not None:
        line = f"{num_steps:,} steps are {num_steps * samples_per_step / num_samples:,.1f} epochs."
        if num_steps * samples_per_step > MANY_EPOCHS * num_samples:
            line += (
                " In so many epochs a model memorizes a small data set. Watch the loss on held-out samples, or take "
                f"fewer steps: {MANY_EPOCHS * num_samples // samples_per_step:,} steps are {MANY_EPOCHS} epochs."
            )
        accelerator.print(line, flush=True)


def measure_peak_memory(device: torch.device) -> float:
    """Measure the peak memory in GiB: allocated GPU memory, or the memory of the process if there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # `ru_maxrss` is in kilobytes, but in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class LossLog:
    """Keep losses on the device, so that steps do not wait for them, and log their means and the speed.

    Args:
        accelerator (`Accelerator`): Accelerator of the run.
        num_steps (`int`): Total number of steps, for the progress bar.
        step (`int`): Steps already done.
    """

    def __init__(self, accelerator: Accelerator, num_steps: int, step: int = 0):
        self.accelerator = accelerator
        # With `None`, tqdm hides the bar if the output is not a terminal.
        disable = None if accelerator.is_main_process else True
        self.progress_bar = tqdm(total=num_steps, initial=step, desc="steps", disable=disable)
        self.clear()

    def clear(self) -> None:
        self.losses: dict[str, list[torch.Tensor]] = {}
        # One loss for each sample, and the groups of each sample.
        self.token_losses: list[torch.Tensor] = []
        self.groups: list[tuple[str, ...]] = []
        self.num_samples = self.num_tokens = 0
        self.start_time = time.monotonic()

    def add(
        self, losses: Mapping[str, torch.Tensor], batch_size: int, tokens_per_sample: int, **groups: Sequence[str]
    ) -> None:
        """Add a batch of `batch_size` samples per process. Every batch has the same weight.

        Args:
            losses (`Mapping`): Scalars by name. With groups, also `token_losses`, one loss for each sample.
            batch_size (`int`): Samples per process.
            tokens_per_sample (`int`): Tokens per sample in the input of the network.
            groups (`Sequence[str]`): The group of each sample. `task=("edit", …)` logs `token_loss/task/edit`.
        """
        for name, loss in losses.items():
            if loss.ndim == 0:
                self.losses.setdefault(name, []).append(loss.detach().float())
        if groups:
            self.token_losses.append(losses["token_losses"].float())
            names = [[f"{kind}/{name}" for name in members] for kind, members in groups.items()]
            self.groups += zip(*names, strict=True)
        self.num_samples += batch_size * self.accelerator.num_processes
        self.num_tokens += batch_size * self.accelerator.num_processes * tokens_per_sample

    def log(self, step: int, learning_rate: float, clear: bool = True, **more: float) -> None:
        """Log the means over processes and over the batches since the last `clear`."""
        means = {
            name: self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            for name, losses in self.losses.items()
        }
        seconds = time.monotonic() - self.start_time
        speed = {
            "samples_per_second": self.num_samples / seconds,
            "tokens_per_second": self.num_tokens / seconds,
            "memory_gib": measure_peak_memory(self.accelerator.device),
        }
        self.progress_bar.set_postfix({name: f"{value:.4g}" for name, value in speed.items()})
        means |= self.average_groups() | {"learning_rate": learning_rate} | more | speed
        log_figures(self.accelerator, means, step)
        if clear:
            self.clear()

    def average_groups(self) -> dict[str, float]:
        """Average the losses of each group over processes. If all samples have the same task, tasks are left out."""
        token_losses = torch.cat(self.token_losses).tolist() if self.token_losses else []
        members: dict[str, list[float]] = {}
        for loss, names in gather_object(list(zip(token_losses, self.groups, strict=True))):
            for name in names:
                members.setdefault(name, []).append(loss)
        kinds = [name.partition("/")[0] for name in members]
        return {
            f"token_loss/{name}": sum(losses) / len(losses)
            for name, losses in sorted(members.items())
            if kinds.count(name.partition("/")[0]) > 1
        }
