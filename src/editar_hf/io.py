"""Write files and folders so that each is either complete or absent."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path to write a file or a folder to, and move it to `path` when the block ends.

    The temporary path is in the same folder, which is made if it does not exist, and has the same suffix. A file or
    folder that is already at `path` is replaced. If the block raises an error, what it wrote is deleted and `path`
    stays as it was.

    Args:
        path (`str` or `os.PathLike`): Where the file or folder belongs.

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
    # The process id keeps two processes that write the same path apart.
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
