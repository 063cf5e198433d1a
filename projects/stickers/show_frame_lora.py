"""Draw the pictures of docs/lora-guide.md: the pairs, and new images edited with the adapter that the guide trains.

    python projects/stickers/show_frame_lora.py --adapter runs/my-lora/adapter

Nothing is picked by hand: the pairs and the new images are the first ones, with the seeds 0, 1, 2, ...
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import HfArgumentParser

from editar_hf import EditARPipeline
from editar_hf.training.validation import build_contact_sheet


ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

from make_practice_pairs import PROMPT, draw_pair  # noqa: E402


NUM_SHOWN, SIDE = 6, 136


@dataclass
class Arguments:
    adapter: Path = field(metadata={"help": "adapter that the commands of docs/lora-guide.md have trained"})
    model: str = "projects/stickers/sticker-editor"
    output_dir: Path = ROOT / "docs" / "images"


def save_sheet(rows: list[list[Image.Image]], file: Path):
    rows = [[image.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for image in row] for row in rows]
    build_contact_sheet(rows, gap=8).save(file, quality=88, optimize=True)


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    pipe = EditARPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    pairs = [draw_pair(seed) for seed in range(NUM_SHOWN)]
    save_sheet([list(side) for side in zip(*pairs, strict=True)], args.output_dir / "pairs.jpg")

    sources = [draw_pair(2000 + index)[0] for index in range(NUM_SHOWN)]

    def edit() -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(seed) for seed in range(NUM_SHOWN)]
        return pipe(PROMPT, image=sources, generator=generators).images

    rows = [sources, edit()]
    pipe.load_lora_weights(args.adapter)
    save_sheet([*rows, edit()], args.output_dir / "lora.jpg")


if __name__ == "__main__":
    main()
