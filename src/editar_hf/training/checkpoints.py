"""Checkpoints that survive a kill.

A checkpoint is written under another name and renamed when complete; older ones are removed afterwards. All processes
write into the same folder, so `atomic_path`, whose names are for one process, does not serve here.
"""

import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers.utils import logging


PREFIX = "checkpoint-"
logger = logging.get_logger(__name__)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first. A folder such as `checkpoint-5-copy` is not one."""
    folders = [folder for folder in Path(output_dir).glob(f"{PREFIX}*") if folder.is_dir()]
    return sorted((folder for folder in folders if folder.name.removeprefix(PREFIX).isdecimal()), key=read_step)


def read_step(checkpoint: Path) -> int:
    """Read the step from a checkpoint's name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def check_output_dir(output_dir: str | Path, resume_from_checkpoint: str | None):
    """Refuse to start a new run in a folder that holds checkpoints."""
    checkpoints = list_checkpoints(output_dir)
    if checkpoints and resume_from_checkpoint is None:
        raise ValueError(
            f"`output_dir` {output_dir} holds {checkpoints[-1].name}; pass `--resume-from-checkpoint latest` to resume "
            "from it, or choose another folder."
        )


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    total_limit: int,
    dataloader: StatefulDataLoader | None = None,
) -> Path:
    """Save the state of a run as `checkpoint-<step>`. A kill meanwhile leaves the previous checkpoint usable.

    Every process also saves the place of its data loader.
    """
    folder = Path(output_dir) / f"{PREFIX}{step}"
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    accelerator.save_state(unfinished)
    if dataloader is not None:
        place = {"num_workers": dataloader.num_workers, "state": dataloader.state_dict()}
        torch.save(place, unfinished / name_place_file(accelerator))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        # A kill may have left a part of a checkpoint that the resumed run did not reach again.
        leftovers = Path(output_dir).glob(f"unfinished-{PREFIX}*")
        for old in (*leftovers, *list_checkpoints(output_dir)[:-total_limit]):
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def name_place_file(accelerator: Accelerator) -> str:
    return f"dataloader-{accelerator.process_index}-of-{accelerator.num_processes}.pt"


def load_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, name: str, dataloader: StatefulDataLoader | None = None
) -> int:
    """Restore a run from `"latest"` or a named checkpoint and return its step, or 0 if `"latest"` finds none.

    Later checkpoints than a named one are renamed, because the run resumes from before them.

    Raises:
        ValueError: If the named checkpoint does not exist, or if it was written with another number of processes or
            workers.
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
    if dataloader is not None:
        load_place(accelerator, folder, dataloader)
    accelerator.load_state(folder)
    set_aside(accelerator, [later for later in checkpoints if read_step(later) > read_step(folder)])
    return read_step(folder)


def set_aside(accelerator: Accelerator, checkpoints: list[Path]):
    """Rename checkpoints, so that `latest` does not mean them and the limit does not count them."""
    if accelerator.is_main_process:
        for checkpoint in checkpoints:
            name = checkpoint.with_name(f"{checkpoint.name}-set-aside-{int(time.time())}")
            logger.warning(f"The run resumes from before {checkpoint}, which is now called {name.name}.")
            checkpoint.rename(name)
    accelerator.wait_for_everyone()


def load_place(accelerator: Accelerator, folder: Path, dataloader: StatefulDataLoader):
    """Set a data loader to its place in the checkpoint."""
    file = folder / name_place_file(accelerator)
    if not file.exists():
        raise ValueError(
            f"{folder} has no {file.name}: not {accelerator.num_processes} processes wrote it. Resume with as many as "
            "did, or begin a new run from its weights."
        )
    place = torch.load(file, weights_only=True)
    if place["num_workers"] != dataloader.num_workers:
        raise ValueError(
            f"`num_workers` is {dataloader.num_workers}; {folder} was written with {place['num_workers']}. Resume with "
            "as many."
        )
    dataloader.load_state_dict(place["state"])
