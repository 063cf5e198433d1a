"""Names of folders that are missing are called missing; Hub ids go to the Hub."""

from pathlib import Path

import pytest

from editar_hf.pipelines.hub import check_folder_or_hub_id


@pytest.mark.parametrize("name", ["./mine", "~/mine", "/nowhere/mine", "models/mine/no", "a\\b", Path("/nowhere")])
def test_a_missing_folder_is_called_missing(name):
    with pytest.raises(ValueError, match=r"`model` is .*there is no such folder or file, and it is not a Hub id"):
        check_folder_or_hub_id(name, "model")


@pytest.mark.parametrize("name", ["tests", "./tests", Path(__file__), "owner/name", "t5-small"])
def test_folders_and_hub_ids_pass(name):
    check_folder_or_hub_id(name, "model")
