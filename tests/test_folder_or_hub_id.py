"""Names of folders that are missing are called missing; Hub ids go to the Hub."""

from pathlib import Path

import pytest

from editar_hf.pipelines.hub import check_folder_or_hub_id


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)


@pytest.mark.parametrize(
    "name", ["./mine", "../mine", "~/mine", "/nowhere/mine", "models/mien", "models/mine/no", "a/b/c", "a\\b", "a/", ""]
)
def test_a_missing_folder_is_called_missing(name):
    with pytest.raises(ValueError, match=r"`model` is .*there is no such folder or file, and it is not a Hub id"):
        check_folder_or_hub_id(name, "model")


def test_a_missing_path_object_is_called_missing():
    with pytest.raises(ValueError, match="no such folder"):
        check_folder_or_hub_id(Path("owner/name"), "model")


@pytest.mark.parametrize("name", ["models/mine", "./models", Path("models"), "owner/name", "t5-small"])
def test_folders_and_hub_ids_pass(name):
    check_folder_or_hub_id(name, "model")


def test_a_cached_hub_id_passes_beside_a_folder_of_its_owner(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "models--models--published").mkdir(parents=True)
    check_folder_or_hub_id("models/published", "model")
