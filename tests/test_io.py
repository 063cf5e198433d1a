"""What `atomic_path` promises: a file or folder is complete or absent, and nothing temporary stays."""

import pytest

from editar_hf.io import atomic_path


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "image.png"
    with atomic_path(path) as unfinished:
        unfinished.write_bytes(b"all of it")
        assert not path.exists()
        assert unfinished.suffix == ".png"
        assert unfinished.parent == path.parent
    assert path.read_bytes() == b"all of it"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_replaces_another_as_a_whole(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").touch()
    with atomic_path(path) as unfinished:
        unfinished.mkdir()
        (unfinished / "new").touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("is_folder", [False, True])
def test_after_an_error_everything_is_as_before(tmp_path, is_folder):
    path = tmp_path / "report"
    path.write_text("old")

    def fail():
        with atomic_path(path) as unfinished:
            if is_folder:
                unfinished.mkdir()
                (unfinished / "part").touch()
            else:
                unfinished.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"
