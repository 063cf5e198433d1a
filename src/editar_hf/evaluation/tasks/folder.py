"""Any folder of pictures with a `metadata.jsonl`, whose lines are such as

    {"source_image_file_name": "0-before.png", "prompt": "make the car red", "target_image_file_name": "0-after.png"}

`target_image_file_name`, `mask_file_name` (white where the edit is), `target_prompt` (what the result shows),
`category`, `task` and `id` may be left out or null; without the first three, metrics that need them are undefined.
"""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..processes import show_progress
from ..samples import Sample
from .sources import check_entry, open_mask, open_picture, parse_json, read_text


PICTURE_FIELDS = ("source_image", "target_image", "mask")
WORDS = ("id", "prompt", "target_prompt", "category", "task")


def read_samples(source: str) -> Iterator[Sample]:
    """Read the samples that `metadata.jsonl` lists.

    Raises:
        ValueError: If there is no such file, or a line is not what it should be.
    """
    path = Path(source) / "metadata.jsonl"
    if not path.exists():
        raise ValueError(f"`source` {source!r} has no metadata.jsonl; its lines name pictures and prompts.")
    known = {*WORDS, *(f"{name}_file_name" for name in PICTURE_FIELDS)}
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    for number, line in show_progress(lines, desc="preparing"):
        entry, where = parse_json(line, path, number), f"line {number} of {path}"
        if not entry.keys() <= known:
            raise ValueError(f"`source`: {where} has {', '.join(entry)}; there are {', '.join(known)}.")
        entry = {name: value for name, value in entry.items() if value is not None}
        check_entry(entry, {"source_image_file_name": str, "prompt": str} | dict.fromkeys(entry, str), where)
        words = {name: entry[name] for name in WORDS if name in entry}
        yield Sample(**{"id": f"{number:05}"} | words | read_pictures(Path(source), entry, where))


def read_pictures(folder: Path, entry: dict, where: str) -> dict[str, Image.Image]:
    """Read the pictures that a line names."""
    files = {name: folder / entry[f"{name}_file_name"] for name in PICTURE_FIELDS if f"{name}_file_name" in entry}
    mask_file = files.pop("mask", None)
    pictures = {name: open_picture(file, where) for name, file in files.items()}
    if mask_file is not None:
        pictures["mask"] = open_mask(mask_file, pictures["source_image"].size, where)
    return pictures
