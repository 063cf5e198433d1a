"""Draw `examples/photo.png`, a photograph for the examples, and `examples/photo-mask.png`, which is white at its car.

    python projects/scenes/draw_example.py --bank bank

A dog and a car stand on a photograph of a place. Photograph and views are of the split "test": training shows none of
them. The script prints where they come from.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from bank import Bank
from PIL import Image
from scene import Scene, Thing, make_scene
from transformers import HfArgumentParser


WIDTH, HEIGHT = 384, 256
NOUNS = {"dog": "left", "car": "right"}
EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass
class Arguments:
    bank: Path = field(metadata={"help": "folder that build_bank.py made"})
    output_dir: Path = EXAMPLES
    seed: int = 209


def draw_example(bank: Bank, seed: int) -> tuple[Scene, list[Thing]]:
    """Draw a scene with its objects, which stand apart."""
    scene = make_scene(bank, random.Random(f"{seed} example"), "test", HEIGHT, WIDTH)
    things = []
    for noun, place in NOUNS.items():
        thing = Thing(scene.draw_view(noun), is_mirrored=scene.rng.random() < 0.5)
        scene.place_thing(thing, things, place)
        things.append(thing)
    return scene, things


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    scene, things = draw_example(Bank.load(args.bank), args.seed)
    scene.draw(things).save(args.output_dir / "photo.png", optimize=True)
    mask = Image.fromarray(scene.draw_mask(things[1:], things[:1]).astype(np.uint8) * 255)
    mask.save(args.output_dir / "photo-mask.png", optimize=True)
    print(scene.photograph.id, *(thing.view.id for thing in things), sep="\n")


if __name__ == "__main__":
    main()
