"""Make pairs of an edit that the sticker editor was never taught: "clear the picture", which removes every sticker.

    python examples/make_clear_edits.py --output_dir clear --resolution 64

writes `train.parquet` and `test.parquet`, with the columns of `make_sticker_edits.py`. They show how a LoRA adapter
learns a new operation from few pairs.
"""

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import Dataset
from make_sticker_edits import (
    FEATURES,
    PLACES,
    are_apart,
    draw_background,
    draw_mask,
    draw_pair,
    draw_sticker,
    draw_stickers,
    find_legible,
)
from transformers import HfArgumentParser


PROMPTS = ("clear the picture", "wipe the picture clean", "leave nothing but the photograph")


@dataclass
class Arguments:
    output_dir: Path
    resolution: int = field(metadata={"help": "pixels per side"})
    num_train: int = 300
    num_test: int = 500
    seed: int = 0


def draw_scene(rng, split, resolution):
    """Draw a photograph and two to four stickers that stand out from it."""
    while True:
        name, background = draw_background(rng, split, resolution)
        legible = find_legible(background)
        for _ in range(50):
            places = rng.sample(PLACES, rng.randint(2, 4))
            stickers = [draw_sticker(rng, draw_pair(rng), place, split) for place in places]
            are_legible = all((sticker.place, sticker.colour) in legible for sticker in stickers)
            if are_legible and are_apart(stickers):
                return name, background, stickers


def make_clearing(seed, split, index, resolution):
    """Make one pair; it depends on its seed, split, index and resolution alone."""
    rng = random.Random(f"clear {seed} {split} {index}")
    name, background, stickers = draw_scene(rng, split, resolution)
    details = {"part": "seen", "operation": "clear", "photograph": name, "old": None, "new": None}
    return {
        "source_image": draw_stickers(background, stickers),
        "target_image": background,
        "prompt": rng.choice(PROMPTS),
        "mask": draw_mask(stickers, resolution),
        "task": "edit",
        "details": json.dumps(details | {"stickers": [asdict(sticker) for sticker in stickers]}),
    }


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, num_pairs in (("train", args.num_train), ("test", args.num_test)):
        rows = [make_clearing(args.seed, split, index, args.resolution) for index in range(num_pairs)]
        Dataset.from_list(rows, features=FEATURES).to_parquet(args.output_dir / f"{split}.parquet")


if __name__ == "__main__":
    main()
