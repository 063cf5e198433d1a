"""Checkpoints that survive a kill: written beside their place and renamed into it, older ones removed afterwards."""

import shutil
from pathlib import Path

from accelerate import Accelerator


PREFIX = "checkpoint-"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first."""
    return sorted(Path(output_dir).glob(f"{PREFIX}[0-9]*"), key=lambda folder: int(folder.name.removeprefix(PREFIX)))


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, step: int, total_limit: int) -> Path:
    """Save the state of a run as `checkpoint-<step>`; a kill meanwhile leaves the previous checkpoint usable."""
    folder = Path(output_dir) / f"{PREFIX}{step}"
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    accelerator.save_state(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        for old in list_checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def load_checkpoint(accelerator: Accelerator, output_dir: str | Path, name: str) -> int:
    """Restore a run from `"latest"` or a named checkpoint and return its step; 0 if `"latest"` finds none.

    Raises:
        ValueError: If the named checkpoint is not there.
    """
    checkpoints = list_checkpoints(output_dir)
    if name == "latest":
        if not checkpoints:
            return 0
        folder = checkpoints[-1]
    else:
        folder = Path(output_dir) / name
        if folder not in checkpoints:
            names = ", ".join(checkpoint.name for checkpoint in checkpoints) or "none"
            raise ValueError(f"`resume_from_checkpoint` is {name!r}; the checkpoints in {output_dir} are: {names}.")
    accelerator.load_state(folder)
    return int(folder.name.removeprefix(PREFIX))
