"""Save trained weights with their model card, and upload them to the Hub."""

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
    """Write trained weights and their model card to a folder, completely or not at all. Upload it if `args` say so.

    Args:
        args (`RunArguments`): The output folder, and whether to upload. A failed upload is logged and does not raise.
        name (`str`): Name of the folder inside `output_dir`. An earlier result is replaced.
        save (`Callable`): Writes the weights into a given folder.
        make_card (`Callable`): Makes the model card for the name that loads the weights: a Hub id or a folder.
        validation_image (`Path`, *optional*): File that is copied into the folder as `validation.png`.
        suffix (`str`): Suffix of the names of the folder and the repository.
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
    """Quote the command of this run for a model card, with the versions of Python and of the main packages."""
    command = shlex.join(("accelerate", "launch", *sys.argv))
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"The command:\n\n```\n{command}\n```\n\nWith Python {platform.python_version()}, {versions}."


def create_repositories(accelerator: Accelerator, args: RunArguments, *suffixes: str) -> None:
    """Create the repositories to upload to, if `args` ask for an upload, and print who can see them.

    This runs before training, so that a missing Hub token is noticed at once.

    Raises:
        ValueError: If a repository must be private, but exists and is public.
    """
    if args.push_to_hub is None or not accelerator.is_main_process:
        return
    repo_ids = [f"{args.push_to_hub}{suffix}" for suffix in suffixes]
    for repo_id in repo_ids:
        create_repository(repo_id, args.hub_private_repo)
    who = (
        "private; `--no-hub-private-repo` makes new ones public"
        if args.hub_private_repo
        else "public if they are new: everyone can see the weights, the model card and its images of held-out pairs"
    )
    print(f"Results will be uploaded to {' and '.join(repo_ids)} ({who}).", flush=True)
