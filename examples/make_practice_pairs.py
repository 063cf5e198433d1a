"""Draw pairs to practice on: an image with colored stickers, and the same image with a black frame.

    python examples/make_practice_pairs.py --output-dir my-pairs

The script writes an image folder with the splits `train` and `validation`. Put your own pairs into the same form.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from transformers import HfArgumentParser


PROMPT = "add a black frame"
SIDE, FRAME = 256, 32  # pixels
# Colors that the sticker editor knows: gray, pink and brown; red, orange, yellow, green, blue and purple.
BACKGROUNDS = ("#808080", "#ffaac8", "#6e4628")
COLORS = ("#cd001e", "#ff8c00", "#fff03c", "#009628", "#143ce6", "#aa32be")


@dataclass
class Arguments:
    output_dir: Path
    num_train: int = 20
    num_validation: int = 8


def draw_pair(seed: int) -> tuple[Image.Image, Image.Image]:
    """Draw a source image with one to three stickers, and its target image."""
    rng = random.Random(seed)
    source = Image.new("RGB", (SIDE, SIDE), rng.choice(BACKGROUNDS))
    draw = ImageDraw.Draw(source)
    places = rng.sample([(80, 80), (176, 80), (80, 176), (176, 176)], rng.randint(1, 3))
    for place, color in zip(places, rng.sample(COLORS, len(places)), strict=True):
        num_corners = rng.choice((3, 4, 64))  # a triangle, a square or a circle
        draw.regular_polygon((*place, 44 if num_corners < 64 else 38), num_corners, fill=color)
    target = source.copy()
    ImageDraw.Draw(target).rectangle((0, 0, SIDE - 1, SIDE - 1), outline="black", width=FRAME)
    return source, target


def write_pairs(folder: Path, seeds: range):
    """Write pairs and their `metadata.jsonl`, which has a line for each pair."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in seeds:
        names = [f"{seed}-before.png", f"{seed}-after.png"]
        for name, image in zip(names, draw_pair(seed), strict=True):
            image.save(folder / name)
        lines.append({"source_image_file_name": names[0], "target_image_file_name": names[1], "prompt": PROMPT})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    write_pairs(args.output_dir / "train", range(args.num_train))
    write_pairs(args.output_dir / "validation", range(1000, 1000 + args.num_validation))


if __name__ == "__main__":
    main()
