"""MagicBrush's test set, from its unzipped folder: `edit_sessions.json`, `local_descriptions.json`, `images/`.

Single-turn edits every turn from its true source; multi-turn edits on from the turn before, and counts the last turn.

Source: MagicBrush (arXiv 2306.10012) and its evaluation code.
"""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..processes import show_progress
from ..samples import Sample
from .sources import check_entry, open_picture, parse_json, read_text


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
    sessions_file, captions_file = folder / "edit_sessions.json", folder / "local_descriptions.json"
    sessions, captions = (parse_json(read_text(path), path) for path in (sessions_file, captions_file))
    check_entry(sessions, dict.fromkeys(sessions, list), f"{sessions_file}")
    check_entry(captions, dict.fromkeys(sessions, dict), f"{captions_file}")
    turns = [(session, number, turn) for session in sessions for number, turn in enumerate(sessions[session], 1)]
    for session, number, turn in show_progress(turns, desc="preparing"):
        sample_id, pictures = f"{session}-{number}", folder / "images" / session
        check_entry(turn, {"input": str, "output": str, "instruction": str}, f"{sample_id} in {sessions_file}")
        check_entry(captions[session], {turn["output"]: str}, f"{session} in {captions_file}")
        target = open_picture(pictures / turn["output"], sample_id)
        yield Sample(
            id=sample_id,
            prompt=turn["instruction"],
            # The evaluation code resizes predictions to the size of the truth; so what is edited has it already.
            source_image=resize(open_picture(pictures / turn["input"], sample_id), target.size),
            category=f"turn {number}",
            target_image=target,
            target_prompt=captions[session][turn["output"]],
            previous=f"{session}-{number - 1}" if is_multi_turn and number > 1 else None,
            is_scored=not is_multi_turn or number == len(sessions[session]),
        )


def resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize a picture, if it has another size."""
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)
