"""Checkpoints that survive a kill: written beside their place and renamed into it, older ones removed afterwards."""

import shutil
from pathlib import Path

from accelerate import Accelerator


PREFIX = "checkpoint-"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first; a folder such as `checkpoint-5-copy` is none of them."""
    folders = [folder for folder in Path(output_dir).glob(f"{PREFIX}*") if read_step(folder) is not None]
    return sorted(folders, key=read_step)


def read_step(folder: Path) -> int | None:
    """Read the step from a checkpoint's name; None if it is not one."""
    step = folder.name.removeprefix(PREFIX)
    return int(step) if step.isdecimal() and folder.is_dir() else None


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, step: int, total_limit: int) -> Path:
    """Save the state of a run as `checkpoint-<step>`; a kill meanwhile leaves the previous checkpoint usable."""
    folder = Path(output_dir) / f"{PREFIX}{step}"
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    accelerator.save_state(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        # What a kill left of a checkpoint that the resumed run did not reach again.
        leftovers = Path(output_dir).glob(f"unfinished-{PREFIX}*")
        for old in (*leftovers, *list_checkpoints(output_dir)[:-total_limit]):
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
    return read_step(folder)
