"""Any folder of pictures with a `metadata.jsonl`, whose lines are such as

    {"source_image_file_name": "0-before.png", "prompt": "make the car red", "target_image_file_name": "0-after.png"}

`target_image_file_name`, `mask_file_name` (white where the edit is), `target_prompt` (what the result shows),
`category`, `task` and `id` may be left out; without the first three, metrics that need them are undefined.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ...processing_editar import prepare_rgb_picture
from ..samples import Sample


PICTURE_FIELDS = {"source_image": "RGB", "target_image": "RGB", "mask": "L"}
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
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        entry = json.loads(line)
        if not {"source_image_file_name", "prompt"} <= entry.keys() <= known:
            raise ValueError(f"`source`: line {number} of {path} has {', '.join(entry)}; there are {', '.join(known)}.")
        words = {name: entry[name] for name in WORDS if name in entry}
        yield Sample(**{"id": f"{number:05}"} | words | read_pictures(Path(source), entry))


def read_pictures(folder: Path, entry: dict) -> dict[str, Image.Image]:
    """Read the pictures that a line names."""
    return {
        name: prepare_rgb_picture(Image.open(folder / entry[f"{name}_file_name"])).convert(mode)
        for name, mode in PICTURE_FIELDS.items()
        if f"{name}_file_name" in entry
    }
