"""Save what a run has trained, with its card, and upload it to the Hub."""

import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from ..io import atomic_path
from ..pipelines.hub import CARD_FILE, create_repository, try_to_upload_folder


VALIDATION_IMAGE = "validation.png"
PACKAGES = ("editar-hf", "torch", "transformers", "diffusers", "accelerate", "datasets")


def save_result(
    folder: Path,
    save: Callable[[Path], None],
    card: str,
    validation_image: Path | None = None,
    repo_id: str | None = None,
    private: bool = True,
):
    """Write trained weights with their card to a folder, completely or not at all, and upload it if asked to.

    Args:
        folder (`Path`): Where they belong. An earlier result is replaced.
        save (`Callable`): Writes the weights into the folder that it is given.
        card (`str`): The model card.
        validation_image (`Path`, *optional*): A file that becomes `validation.png` beside the card.
        repo_id (`str`, *optional*): The repository to upload to. A failed upload is logged and raises nothing.
        private (`bool`): Whether to make a new repository private.
    """
    previous = folder / CARD_FILE
    previous_card = previous.read_text(encoding="utf-8") if previous.exists() else None
    with atomic_path(folder) as unfinished:
        save(unfinished)
        (unfinished / CARD_FILE).write_text(card, encoding="utf-8")
        if validation_image is not None:
            shutil.copyfile(validation_image, unfinished / VALIDATION_IMAGE)
    if repo_id is not None:
        try_to_upload_folder(folder, repo_id, previous_card, private)


def describe_command() -> str:
    """Quote the command of this run for a card, with the versions of the packages that it uses."""
    command = shlex.join(("accelerate", "launch", *sys.argv))
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"The command:\n\n```\n{command}\n```\n\nWith Python {platform.python_version()}, {versions}."


def check_push_arguments(push_to_hub: str | None, push_steps: int | None):
    """Refuse `push_steps` without a repository, and a repository id without its owner.

    Raises:
        ValueError: In either case.
    """
    if push_steps is not None and push_to_hub is None:
        raise ValueError("`push_steps` goes with `push_to_hub`, the id of the repository to upload to.")
    if push_to_hub is not None and push_to_hub.count("/") != 1:
        raise ValueError(f"`push_to_hub` is {push_to_hub!r}; give a full id, owner and name, for the card to say.")


def create_repositories(repo_ids: Sequence[str], private: bool):
    """Create the repositories to upload to, and print who will see them.

    Called before training, so that a missing token is noticed at once.

    Raises:
        ValueError: If a repository shall be private, but exists and is public.
    """
    for repo_id in repo_ids:
        create_repository(repo_id, private)
    who = (
        "private; `--no-hub-private-repo` makes new ones public"
        if private
        else "public if they are new: everyone will see the weights, the card and its images of held-out pairs"
    )
    print(f"Results will be uploaded to {' and '.join(repo_ids)} ({who}).", flush=True)
