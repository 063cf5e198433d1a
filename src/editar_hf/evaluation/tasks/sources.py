"""Reading what authors share: JSON and pictures of which any part may be broken.

What is not as it should be is refused with its place: the file and line, or the entry.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as shorten

from PIL import Image

from ...pipelines.edit_region import prepare_mask
from ...processing_editar import prepare_rgb_picture


# How messages call the types that entries have.
KINDS = {str: "text", list: "a list", dict: "an object", Image.Image: "a picture, of a column of type `datasets.Image`"}


def read_text(path: Path) -> str:
    """Read a file of UTF-8, with or without a byte order mark.

    Raises:
        ValueError: If it is none.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`source`: {path} is not UTF-8: {error}.") from error


def parse_json(text: str, path: Path | str, first_line: int = 1) -> dict:
    """Parse a JSON object that stands in a file from a line on.

    Raises:
        ValueError: If it is none.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers that are too long, and lists that are too deep
        line = first_line + getattr(error, "lineno", 1) - 1
        raise ValueError(f"`source`: line {line} of {path} is no JSON: {getattr(error, 'msg', error)}.") from error
    check_entry(content, {}, f"line {first_line} of {path}")
    return content


def check_entry(entry, fields: Mapping[str, type], where: str) -> None:
    """Refuse an entry that is no object, or of whose fields one is missing or of another type."""
    if not isinstance(entry, dict):
        raise ValueError(f"`source`: {where} is {shorten(entry)}; it must be an object, {{…}}.")
    for name, kind in fields.items():
        if not isinstance(entry.get(name), kind):
            found = f"is {shorten(entry[name])}" if name in entry else "is missing"
            raise ValueError(f"`source`: `{name}` of {where} {found}; it must be {KINDS[kind]}.")


def open_picture(path: Path, where: str) -> Image.Image:
    """Open a picture as upright RGB.

    Raises:
        ValueError: If it is not there or does not decode.
    """
    with refusing(path, where), Image.open(path) as picture:
        return prepare_rgb_picture(picture)


def open_mask(path: Path, source_size: tuple[int, int], where: str) -> Image.Image:
    """Open a mask as the pipeline reads it, as mode "L" of the size of its source: 255 where the edit is, 0 elsewhere.

    Raises:
        ValueError: If it is not there, does not decode, or is no mask of this source.
    """
    with refusing(path, where), Image.open(path) as mask:
        is_white = prepare_mask(mask, source_size)
        if is_white.any():
            return Image.fromarray(is_white).convert("L")
        # It is empty, or its white is too dark, which `check_sample` refuses.
        return prepare_rgb_picture(mask, background="black").convert("L")


@contextmanager
def refusing(path: Path, where: str) -> Iterator[None]:
    """Turn an error of any kind, as PIL's decoders raise them, into a `ValueError` that names the picture."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"`source`: the picture {path} of {where} cannot be read: {error}") from error
