"""What a run has made, to its folder and to the Hub: whole and with its card, or not at all."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ..pipelines.hub import CARD_FILE, create_repository, try_to_upload_folder
from .card import PICTURE_FILE


def save_result(
    folder: Path,
    save: Callable[[Path], None],
    card: str,
    picture: Path | None = None,
    repo_id: str | None = None,
    private: bool = True,
):
    """Write a result and its card beside its place, put both there, and upload them if that was asked for.

    Args:
        folder (`Path`): Its place; what an earlier call left there is replaced.
        save (`Callable`): Writes the weights into a folder it is given.
        card (`str`): The model card.
        picture (`Path`, *optional*): A file that becomes `validation.png` beside the card.
        repo_id (`str`, *optional*): The repository of the Hub to upload to; a failure there costs nothing.
        private (`bool`): Whether that is to be a private one.
    """
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    save(unfinished)
    (unfinished / CARD_FILE).write_text(card, encoding="utf-8")
    if picture is not None:
        shutil.copyfile(picture, unfinished / PICTURE_FILE)
    previous = folder / CARD_FILE
    previous_card = previous.read_text(encoding="utf-8") if previous.exists() else None
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    if repo_id is not None:
        try_to_upload_folder(folder, repo_id, previous_card, private)


def check_push_arguments(push_to_hub: str | None, push_steps: int | None):
    """Refuse what `--push_to_hub` and `--push_steps` cannot mean.

    Raises:
        ValueError: If there are steps without a repository, or its id is not whole.
    """
    if push_steps is not None and push_to_hub is None:
        raise ValueError("`push_steps` goes with `push_to_hub`, the id of the repository to upload to.")
    if push_to_hub is not None and push_to_hub.count("/") != 1:
        raise ValueError(f"`push_to_hub` is {push_to_hub!r}; give a full id, owner and name, for the card to say.")


def create_repositories(repo_ids: Sequence[str], private: bool):
    """Create the repositories that results will be uploaded to, and say who will see them.

    A token that is missing shows now, and not after the training.

    Raises:
        ValueError: If one is to be private, and exists and is public.
    """
    for repo_id in repo_ids:
        create_repository(repo_id, private)
    who = (
        "private; `--no_hub_private_repo` makes new ones public"
        if private
        else "public if they are new: everyone will see the weights, the card and its images of pairs held out"
    )
    print(f"Results will be uploaded to {' and '.join(repo_ids)} ({who}).", flush=True)
