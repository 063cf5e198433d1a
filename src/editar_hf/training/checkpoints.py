"""Start a run, save checkpoints that survive a kill, and resume.

A checkpoint is written under another name and renamed when complete; older ones are removed afterwards. All processes
write into the same folder, so `atomic_path`, whose names are for one process, does not serve here.
"""

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers.utils import logging

from .arguments import RunArguments


PREFIX = "checkpoint-"
logger = logging.get_logger(__name__)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first. A folder such as `checkpoint-5-copy` is not one."""
    folders = [folder for folder in Path(output_dir).glob(f"{PREFIX}*") if folder.is_dir()]
    return sorted((folder for folder in folders if folder.name.removeprefix(PREFIX).isdecimal()), key=read_step)


def read_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def start_accelerator(args: RunArguments, **options: Any) -> Accelerator:
    """Make the folder of a run, and start Accelerate with its trackers; `options` are further ones of `Accelerator`.

    Raises:
        ValueError: If the run is new, and its folder holds checkpoints.
    """
    checkpoints = list_checkpoints(args.output_dir)
    if checkpoints and args.resume_from_checkpoint is None:
        raise ValueError(
            f"`output_dir` {args.output_dir} holds {checkpoints[-1].name}; pass `--resume-from-checkpoint latest` to "
            "resume from it, or choose another folder."
        )
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    project = ProjectConfiguration(project_dir=args.output_dir, logging_dir=f"{args.output_dir}/logs")
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, log_with=args.log_with, project_config=project, **options
    )
    accelerator.init_trackers("editar", config={name: str(value) for name, value in vars(args).items()})
    return accelerator


def is_out_of_time(accelerator: Accelerator, start_time: float, max_minutes: float) -> bool:
    """Ask whether the time of any process is up, so that all of them stop at the same step."""
    if math.isinf(max_minutes):
        return False
    if time.monotonic() - start_time > 60 * max_minutes:
        accelerator.set_trigger()
    return accelerator.check_trigger()


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    total_limit: int,
    dataloader: StatefulDataLoader | None = None,
) -> None:
    """Save the state of a run as `checkpoint-<step>`. A kill meanwhile leaves the previous checkpoint usable.

    Every process also saves the place of its data loader.
    """
    folder = Path(output_dir) / f"{PREFIX}{step}"
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    accelerator.save_state(unfinished)
    if dataloader is not None:
        torch.save(dataloader.state_dict(), unfinished / name_place(accelerator, dataloader))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        # A kill may have left a part of a checkpoint that the resumed run did not reach again.
        leftovers = Path(output_dir).glob(f"unfinished-{PREFIX}*")
        for old in (*leftovers, *list_checkpoints(output_dir)[:-total_limit]):
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def name_place(accelerator: Accelerator, dataloader: StatefulDataLoader) -> str:
    """Name the file with the place of a data loader, which fits no other number of processes or workers."""
    process = f"process-{accelerator.process_index}-of-{accelerator.num_processes}"
    return f"dataloader-{process}-with-{dataloader.num_workers}-workers.pt"


def load_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, name: str, dataloader: StatefulDataLoader | None = None
) -> int:
    """Restore a run from `"latest"` or a named checkpoint and return its step, or 0 if `"latest"` finds none.

    Later checkpoints than a named one are renamed, so that `"latest"` does not mean them and none is deleted.

    Raises:
        ValueError: If the named checkpoint does not exist, or if it was written with another number of processes or
            workers.
    """
    checkpoints = list_checkpoints(output_dir)
    if name == "latest" and not checkpoints:
        return 0
    folder = checkpoints[-1] if name == "latest" else Path(output_dir) / name
    if folder not in checkpoints:
        names = ", ".join(checkpoint.name for checkpoint in checkpoints) or "none"
        raise ValueError(f"`resume_from_checkpoint` is {name!r}; the checkpoints in {output_dir} are: {names}.")
    if dataloader is not None:
        place = folder / name_place(accelerator, dataloader)
        if not place.exists():
            others = ", ".join(file.name for file in folder.glob("dataloader-*"))
            raise ValueError(
                f"{folder} has no {place.name}, but {others}. Resume with as many processes and `num_workers`, or "
                "begin a new run from its weights."
            )
        dataloader.load_state_dict(torch.load(place, weights_only=True))
    accelerator.load_state(folder)
    if accelerator.is_main_process:
        for later in checkpoints[checkpoints.index(folder) + 1 :]:
            renamed = later.rename(f"{later}-set-aside-{int(time.time())}")
            logger.warning(f"The run resumes from before {later}, which is now called {renamed.name}.")
    accelerator.wait_for_everyone()
    return read_step(folder)
