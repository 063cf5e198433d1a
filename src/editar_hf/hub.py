"""Folders and the Hub: which of the two a name stands for, and uploads that keep a card somebody has written."""

import os
from pathlib import Path

from huggingface_hub import constants, repo_exists
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import logging

from .model_card import CARD_FILE


logger = logging.get_logger(__name__)


def check_folder_or_hub_id(value: str | os.PathLike, argument: str, repo_type: str = "model"):
    """Refuse a name of a folder or file that is missing, before the Hub is asked for it.

    A name such as `examples/my-model` could be either. It is a Hub id unless there is a folder `examples` here, and
    neither the local cache nor the Hub knows the id.

    Args:
        value (`str` or `os.PathLike`): What the user gave.
        argument (`str`): The name of the user's argument, for the message.
        repo_type (`str`): `"model"` or `"dataset"`.

    Raises:
        TypeError: If it is neither a string nor a path.
        ValueError: If there is no such folder or file, and it is no Hub id either.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"`{argument}` is {value!r:.80}; give a folder or a Hub id, as a string or a path.")
    name = os.fspath(value)
    if os.path.exists(name) or (isinstance(value, str) and is_hub_id(name, repo_type)):
        return
    raise ValueError(
        f"`{argument}` is {name!r}: there is no such folder or file, and it is not a Hub id (`owner/name`). Check the "
        f"path; relative ones start in {os.getcwd()}."
    )


def is_hub_id(name: str, repo_type: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    owner, slash, _ = name.partition("/")
    if not (slash and os.path.isdir(owner)):
        return True
    if Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=repo_type)).is_dir():
        return True
    try:
        return repo_exists(name, repo_type=repo_type)
    except Exception:  # whatever it is that keeps the Hub out of reach
        return False


def create_repository(repo_id: str, private: bool | None = None, token: str | bool | None = None) -> str:
    """Create a model repository of the Hub if it is not there, and return its full id.

    Args:
        repo_id (`str`): Its id.
        private (`bool`, *optional*): Whether only its owner sees it. `None` leaves that to the Hub: a new one is
            public, unless its organisation makes them private by default; one that exists stays as it is.
        token (`str` or `bool`, *optional*): As of `huggingface_hub.create_repo`.

    Raises:
        ValueError: If it is to be private, and exists and is public: `create_repo` would leave it so.
    """
    import huggingface_hub

    repo_id = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if private and not huggingface_hub.repo_info(repo_id, token=token).private:
        raise ValueError(
            f"The repository {repo_id} is to be private, but it exists and is public. Name another one, make it "
            "private in its settings on the Hub, or upload to a public one (`private=False`; in training "
            "`--no_hub_private_repo`)."
        )
    return repo_id


def upload_folder(
    folder: str | Path, repo_id: str, previous_card: str | None = None, private: bool | None = None
) -> str:
    """Upload a folder to a repository of the Hub, made if it is not there; a card that somebody wrote there stays.

    Args:
        folder (`str` or `Path`): What to upload.
        repo_id (`str`): Where to.
        previous_card (`str`, *optional*): The card of an earlier upload, which a new one may replace.
        private (`bool`, *optional*): See `create_repository`.

    Returns:
        The address of the commit.
    """
    import huggingface_hub

    create_repository(repo_id, private)
    keeps_card = False
    if huggingface_hub.file_exists(repo_id, CARD_FILE):
        present = Path(huggingface_hub.hf_hub_download(repo_id, CARD_FILE)).read_text(encoding="utf-8")
        keeps_card = present != previous_card
    if keeps_card:
        logger.warning(f"{repo_id} had a card, which stays; the new one is {Path(folder) / CARD_FILE}.")
    ignored = [CARD_FILE] if keeps_card else None
    return huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=ignored).commit_url


def try_to_upload_folder(
    folder: str | Path, repo_id: str, previous_card: str | None = None, private: bool | None = None
) -> str | None:
    """Upload a folder; if that fails, say how to do it later and return None: hours of training stand behind it."""
    try:
        return upload_folder(folder, repo_id, previous_card, private)
    except Exception as error:  # whatever it is: the network, the Hub, a token that has expired
        logger.error(
            f"The upload to {repo_id} failed: {error}\nNothing is lost: {folder} holds all of it. To try again:\n"
            f"    hf upload {repo_id} {folder}{' --private' if private else ''}"
        )
        return None
