"""MagicBrush's test set, from its unzipped folder: `edit_sessions.json`, `local_descriptions.json`, `images/`.

Single-turn edits every turn from its true source; multi-turn edits on from the turn before, and counts the last turn.

Source: MagicBrush (arXiv 2306.10012) and its evaluation code.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ...processing_editar import prepare_rgb_picture
from ..samples import Sample


NUM_TURNS = 1053


def read_single_turns(source: str) -> Iterator[Sample]:
    """Read every turn, with its true source."""
    return read_turns(source, is_multi_turn=False)


def read_multi_turns(source: str) -> Iterator[Sample]:
    """Read every turn; all but the first of a session have the turn before as their source."""
    return read_turns(source, is_multi_turn=True)


def read_turns(source: str, is_multi_turn: bool) -> Iterator[Sample]:
    """Read the turns of all sessions, in their order.

    Raises:
        ValueError: If the folder is not the unzipped test set.
    """
    folder = Path(source)
    for name in ("edit_sessions.json", "local_descriptions.json", "images"):
        if not (folder / name).exists():
            raise ValueError(f"`source` {source!r} has no {name}; give the folder of MagicBrush's unzipped test set.")
    sessions, captions = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("edit_sessions", "local_descriptions")
    )
    for session, turns in sessions.items():
        for number, turn in enumerate(turns, 1):
            pictures = folder / "images" / session
            target = prepare_rgb_picture(Image.open(pictures / turn["output"]))
            yield Sample(
                id=f"{session}-{number}",
                prompt=turn["instruction"],
                # The evaluation code resizes predictions to the size of the truth; so what is edited has it already.
                source_image=resize(prepare_rgb_picture(Image.open(pictures / turn["input"])), target.size),
                category=f"turn {number}",
                target_image=target,
                target_prompt=captions[session][turn["output"]],
                previous=f"{session}-{number - 1}" if is_multi_turn and number > 1 else None,
                is_scored=not is_multi_turn or number == len(turns),
            )


def resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize a picture, if it has another size."""
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)
