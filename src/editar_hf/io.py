"""Write files and folders atomically, so that each is either complete or absent, and images with few changes."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# Pillow's default options would change pixels that the edit did not change, so these formats get other options.
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "WEBP": {"lossless": True},
}


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path to write a file or a folder to, and move it to `path` when the block ends.

    The temporary path is in the same folder as `path` and has the same suffix. The folder is created if it does not
    exist. A file or folder that already exists at `path` is replaced. If the block raises an error, the temporary file
    or folder is deleted and `path` stays unchanged.

    Args:
        path (`str` or `os.PathLike`): Final path of the file or folder.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from editar_hf.io import atomic_path
    >>> path = Path(tempfile.mkdtemp()) / "results" / "report.txt"
    >>> with atomic_path(path) as unfinished:
    ...     _ = unfinished.write_text("PSNR 30 dB")
    >>> path.read_text()
    'PSNR 30 dB'

    ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id gives two processes that write the same path different temporary paths.
    unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    try:
        yield unfinished
        if unfinished.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        unfinished.replace(path)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        else:
            unfinished.unlink(missing_ok=True)
