"""PIE-Bench, from its authors' folder: `mapping_file.json`, `annotation_images/`, run-length masks.

Source: PnPInversion (arXiv 2310.01506).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ..processes import show_progress
from ..samples import Sample
from .sources import check_entry, open_picture, parse_json, read_text


SIZE = 512
# The ten kinds of edits and how many of each there are, in the order of `editing_type_id`.
NUM_SAMPLES = {
    "random": 140,
    "change object": 80,
    "add object": 80,
    "delete object": 80,
    "change content": 40,
    "change pose": 40,
    "change colour": 40,
    "change material": 40,
    "change background": 80,
    "change style": 80,
}
CATEGORIES = tuple(NUM_SAMPLES)
FIELDS = {
    "image_path": str,
    "original_prompt": str,
    "editing_prompt": str,
    "editing_instruction": str,
    "editing_type_id": str,
    "mask": list,
}


def read_samples(source: str) -> Iterator[Sample]:
    """Read the samples of PIE-Bench.

    Raises:
        ValueError: If the folder, an entry, a mask or a picture is not as published.
    """
    mapping_file = Path(source) / "mapping_file.json"
    if not mapping_file.exists():
        raise ValueError(f"`source` {source!r} has no mapping_file.json; give the folder that its authors share.")
    mapping = parse_json(read_text(mapping_file), mapping_file)
    for key, entry in show_progress(mapping.items(), desc="preparing"):
        check_entry(entry, {}, f"{key} in {mapping_file}")
        if missing := [name for name in FIELDS if name not in entry]:
            raise ValueError(
                f"`source`: {key} in {mapping_file} has no {', '.join(missing)}. Copies on the Hub lack instructions; "
                "give the folder that its authors share."
            )
        check_entry(entry, FIELDS, f"{key} in {mapping_file}")
        picture = open_picture(Path(source) / "annotation_images" / entry["image_path"], key)
        if picture.size != (SIZE, SIZE):
            raise ValueError(f"`source`: the picture of {key} has {picture.size} pixels; they all have 512×512.")
        yield Sample(
            id=key,
            prompt=entry["editing_instruction"],
            source_image=picture,
            category=get_category(key, entry["editing_type_id"]),
            mask=Image.fromarray(decode_mask(entry["mask"], key)),
            target_prompt=entry["editing_prompt"].replace("[", "").replace("]", ""),
        )


def get_category(key: str, type_id: str) -> str:
    """Name the kind of edit."""
    if type_id not in map(str, range(len(CATEGORIES))):
        raise ValueError(f"`source`: the `editing_type_id` of {key} is {type_id!r}; it must be 0 to 9.")
    return CATEGORIES[int(type_id)]


def decode_mask(runs: list[int], key: str = "a sample") -> np.ndarray:
    """Decode a mask to uint8 (512, 512), 255 where the edit is.

    Args:
        runs (list of `int`): Start, length, start, length, … over the grid's rows; a run over the end is cut there.

    Source: the evaluation of PnPInversion.
    """
    starts, lengths = runs[::2], runs[1::2]
    is_whole = all(type(value) is int and value >= 0 for value in runs)
    if not is_whole or len(starts) != len(lengths) or max(starts, default=0) >= SIZE * SIZE:
        raise ValueError(f"`source`: the mask of {key} is no list of starts and lengths within 512×512 pixels.")
    mask = np.zeros(SIZE * SIZE, dtype=np.uint8)
    for start, length in zip(starts, lengths, strict=True):
        mask[start : start + length] = 255
    mask = mask.reshape(SIZE, SIZE)
    # Parity: the border always counts as edited; its annotations are unreliable.
    mask[[0, -1], :] = mask[:, [0, -1]] = 255
    return mask
