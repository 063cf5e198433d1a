"""Files that are whole or not there: written under a temporary name, then renamed; and lines that survive a kill."""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` write a file under a temporary name in the same folder, then give it its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    write(unfinished)
    unfinished.replace(path)


def write_json(path: Path, content) -> None:
    """Write JSON that any reader can read: NaN becomes null, infinity the string "inf"."""
    text = json.dumps(encode_numbers(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def append_line(path: Path, content) -> None:
    """Append one line of JSON and hand it to the system at once."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(encode_numbers(content), ensure_ascii=False, allow_nan=False) + "\n")


def repair_lines(path: Path) -> None:
    """Cut off a last line that a kill left without its end."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_file(path, lambda unfinished: unfinished.write_bytes(whole))


def read_lines(path: Path) -> Iterator[dict]:
    """Read the whole lines of a file of JSON lines; a torn last one is left out."""
    for line in path.read_bytes().split(b"\n")[:-1]:
        yield json.loads(line)


def encode_numbers(content):
    """Replace the numbers that JSON does not have: NaN by `None`, infinity by "inf"."""
    if isinstance(content, dict):
        return {name: encode_numbers(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [encode_numbers(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None if math.isnan(content) else str(content)
    return content


def decode_number(value: float | str | None) -> float:
    """Read a number as `encode_numbers` wrote it."""
    return math.nan if value is None else float(value)
