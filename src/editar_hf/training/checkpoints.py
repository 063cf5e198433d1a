"""Start a run, save its checkpoints, and resume it.

A checkpoint is written under a temporary name and renamed when it is complete, so a killed run leaves no partial
checkpoint. Older checkpoints are removed afterwards. `atomic_path` cannot be used here: it gives each process its own
name, and all processes write into the same checkpoint folder.
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
    """List the complete checkpoints of a run, oldest first. A folder such as `checkpoint-5-copy` is not listed."""
    folders = [folder for folder in Path(output_dir).glob(f"{PREFIX}*") if folder.is_dir()]
    return sorted((folder for folder in folders if folder.name.removeprefix(PREFIX).isdecimal()), key=read_step)


def read_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def start_accelerator(args: RunArguments, **options: Any) -> Accelerator:
    """Create the folder of a run, and start Accelerate and its trackers. `options` are passed to `Accelerator`.

    Raises:
        ValueError: If the run is new, but its folder already holds checkpoints.
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
    """Return whether any process has reached the time limit, so that all processes stop at the same step."""
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
    """Save the state of a run as `checkpoint-<step>`. If the run is killed meanwhile, the previous checkpoint remains.

    Every process also saves the position of its data loader.
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
        # An earlier run that was killed may have left a partial checkpoint of another step.
        leftovers = Path(output_dir).glob(f"unfinished-{PREFIX}*")
        for old in (*leftovers, *list_checkpoints(output_dir)[:-total_limit]):
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def name_place(accelerator: Accelerator, dataloader: StatefulDataLoader) -> str:
    """Name the file that holds the position of a data loader.

    The name includes the numbers of processes and workers, because the position is valid only for these numbers.
    """
    process = f"process-{accelerator.process_index}-of-{accelerator.num_processes}"
    return f"dataloader-{process}-with-{dataloader.num_workers}-workers.pt"


def load_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, name: str, dataloader: StatefulDataLoader | None = None
) -> int:
    """Restore a run from `"latest"` or a named checkpoint and return its step, or 0 if `"latest"` finds none.

    Checkpoints that are later than the named one are renamed, so that `"latest"` ignores them. They are not deleted.

    Raises:
        ValueError: If the named checkpoint does not exist, or was written with another number of processes or workers,
            other aspect ratios, or another number of data sets.
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
                f"`resume_from_checkpoint`: {folder} has no {place.name}; it has {others}. Resume with the same number "
                "of processes and the same `num_workers`, or start a new run from the weights of the checkpoint."
            )
        dataloader.load_state_dict(torch.load(place, weights_only=True))
        # The data loader reads its state only when it starts, which `state_dict` makes it do. Other data than that of
        # the checkpoint is thus refused before the weights are loaded and before later checkpoints are renamed.
        dataloader.state_dict()
    accelerator.load_state(folder)
    if accelerator.is_main_process:
        for later in checkpoints[checkpoints.index(folder) + 1 :]:
            renamed = later.rename(f"{later}-set-aside-{int(time.time())}")
            logger.warning(f"The run resumes from an earlier step than {later}. This checkpoint is now {renamed.name}.")
    accelerator.wait_for_everyone()
    return read_step(folder)
