"""Make pairs for an edit that the sticker editor was not trained on: "copy the red circle to the top left".

    python projects/stickers/make_copy_edits.py --output-dir copy --resolution 64

The script writes `train.parquet` and `test.parquet`, with the same columns as `make_sticker_edits.py`. A LoRA adapter
learns the new operation from these few pairs. The editor can already add and move stickers, but it has never seen an
edit that keeps a sticker and adds a copy of it.
"""

import json
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from datasets import Dataset
from make_sticker_edits import (
    FEATURES,
    PLACES,
    SQUARE,
    are_apart,
    describe,
    describe_place,
    draw_background,
    draw_mask,
    draw_pair,
    draw_sticker,
    draw_stickers,
    find_legible,
)
from transformers import HfArgumentParser


PROMPTS = (
    "copy the {old} {to}",
    "copy the {old_turned} {to}",
    "duplicate the {old} {at}",
    "repeat the {old} {at}",
)


@dataclass
class Arguments:
    output_dir: Path
    resolution: int = field(metadata={"help": "pixels per side"})
    num_train: int = 300
    num_test: int = 500
    seed: int = 0


def draw_scene(rng, split, resolution):
    """Draw a photograph, one to three different stickers that stand out from it, and a copy of the first sticker."""
    while True:
        name, background = draw_background(rng, split, resolution)
        legible = find_legible(background)
        for _ in range(50):
            pairs = [draw_pair(rng) for _ in range(rng.randint(1, 3))]
            places = rng.sample(PLACES, len(pairs) + 1)
            stickers = [draw_sticker(rng, pair, place, split) for pair, place in zip(pairs, places, strict=False)]
            x, y = SQUARE.get_centre(places[-1])
            copy = replace(stickers[0], place=places[-1], x=x, y=y)
            are_legible = all((sticker.place, sticker.colour) in legible for sticker in (*stickers, copy))
            if len(set(pairs)) == len(pairs) and are_legible and are_apart([*stickers, copy]):
                return name, background, stickers, copy


def make_copy(seed, split, index, resolution):
    """Make one pair. It depends only on the seed, the split, the index and the resolution."""
    rng = random.Random(f"copy {seed} {split} {index}")
    name, background, stickers, copy = draw_scene(rng, split, resolution)
    prompt = rng.choice(PROMPTS).format(
        old=describe(copy),
        old_turned=describe(copy, turned=True),
        at=describe_place(copy.place),
        to=describe_place(copy.place, motion=True),
    )
    details = {"part": "seen", "operation": "copy", "photograph": name, "old": None, "new": asdict(copy)}
    return {
        "source_image": draw_stickers(background, stickers),
        "target_image": draw_stickers(background, [*stickers, copy]),
        "prompt": prompt,
        "mask": draw_mask([copy], background.size),
        "task": "edit",
        "details": json.dumps(details | {"bystanders": [asdict(sticker) for sticker in stickers]}),
    }


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, num_pairs in (("train", args.num_train), ("test", args.num_test)):
        rows = [make_copy(args.seed, split, index, args.resolution) for index in range(num_pairs)]
        Dataset.from_list(rows, features=FEATURES).to_parquet(args.output_dir / f"{split}.parquet")


if __name__ == "__main__":
    main()
