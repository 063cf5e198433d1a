"""Folders to the Hub, so that a card that is somebody's work stays, and a failed upload costs nothing."""

from pathlib import Path

from transformers.utils import logging

from .model_card import CARD_FILE


logger = logging.get_logger(__name__)


def upload_folder(folder: str | Path, repo_id: str, previous_card: str | None = None) -> str:
    """Upload a folder to a repository of the Hub, made if it is not there; a card that somebody wrote there stays.

    Args:
        folder (`str` or `Path`): What to upload.
        repo_id (`str`): Where to.
        previous_card (`str`, *optional*): The card of an earlier upload, which a new one may replace.

    Returns:
        The address of the commit.
    """
    import huggingface_hub

    huggingface_hub.create_repo(repo_id, exist_ok=True)
    keeps_card = False
    if huggingface_hub.file_exists(repo_id, CARD_FILE):
        present = Path(huggingface_hub.hf_hub_download(repo_id, CARD_FILE)).read_text(encoding="utf-8")
        keeps_card = present != previous_card
    if keeps_card:
        logger.warning(f"{repo_id} had a card, which stays; the new one is {Path(folder) / CARD_FILE}.")
    ignored = [CARD_FILE] if keeps_card else None
    return huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=ignored).commit_url


def try_to_upload_folder(folder: str | Path, repo_id: str, previous_card: str | None = None) -> str | None:
    """Upload a folder; if that fails, say how to do it later and return None: hours of training stand behind it."""
    try:
        return upload_folder(folder, repo_id, previous_card)
    except Exception as error:  # whatever it is: the network, the Hub, a token that has expired
        logger.error(
            f"The upload to {repo_id} failed: {error}\nNothing is lost: {folder} holds all of it. To try again:\n"
            f"    hf upload {repo_id} {folder}"
        )
        return None
