"""Save what a run has trained, with its card, and upload it to the Hub."""

import platform
import shlex
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from accelerate import Accelerator

from ..io import atomic_path
from ..pipelines.hub import CARD_FILE, create_repository, try_to_upload_folder
from .arguments import RunArguments


VALIDATION_IMAGE = "validation.png"
PACKAGES = ("editar-hf", "torch", "transformers", "diffusers", "accelerate", "datasets")


def save_result(
    args: RunArguments,
    name: str,
    save: Callable[[Path], None],
    make_card: Callable[[str], str],
    validation_image: Path | None = None,
    suffix: str = "",
) -> None:
    """Write trained weights with their card to a folder, completely or not at all, and upload it if asked to.

    Args:
        args (`RunArguments`): Where to, and whether to upload. A failed upload is logged and raises nothing.
        name (`str`): The folder in `output_dir`. An earlier result is replaced.
        save (`Callable`): Writes the weights into the folder that it is given.
        make_card (`Callable`): Makes the card, given what the weights load under: a Hub id or the folder.
        validation_image (`Path`, *optional*): A file that becomes `validation.png` beside the card.
        suffix (`str`): What is appended to the names of folder and repository.
    """
    folder = Path(args.output_dir) / f"{name}{suffix}"
    repo_id = None if args.push_to_hub is None else f"{args.push_to_hub}{suffix}"
    card = folder / CARD_FILE
    previous_card = card.read_text(encoding="utf-8") if card.exists() else None
    with atomic_path(folder) as unfinished:
        save(unfinished)
        (unfinished / CARD_FILE).write_text(make_card(repo_id or str(folder)), encoding="utf-8")
        if validation_image is not None:
            shutil.copyfile(validation_image, unfinished / VALIDATION_IMAGE)
    if repo_id is not None:
        try_to_upload_folder(folder, repo_id, previous_card, args.hub_private_repo)


def describe_command() -> str:
    """Quote the command of this run for a card, with the versions of the packages that it uses."""
    command = shlex.join(("accelerate", "launch", *sys.argv))
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"The command:\n\n```\n{command}\n```\n\nWith Python {platform.python_version()}, {versions}."


def create_repositories(accelerator: Accelerator, args: RunArguments, *suffixes: str) -> None:
    """Create the repositories to upload to, if asked to, and print who will see them.

    Called before training, so that a missing token is noticed at once.

    Raises:
        ValueError: If a repository shall be private, but exists and is public.
    """
    if args.push_to_hub is None or not accelerator.is_main_process:
        return
    repo_ids = [f"{args.push_to_hub}{suffix}" for suffix in suffixes]
    for repo_id in repo_ids:
        create_repository(repo_id, args.hub_private_repo)
    who = (
        "private; `--no-hub-private-repo` makes new ones public"
        if args.hub_private_repo
        else "public if they are new: everyone will see the weights, the card and its images of held-out pairs"
    )
    print(f"Results will be uploaded to {' and '.join(repo_ids)} ({who}).", flush=True)
