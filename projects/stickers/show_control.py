"""Draw the image of docs/masks-and-sessions.md: masks, sessions and a source cache with the sticker editor.

    python projects/stickers/show_control.py --model projects/stickers/sticker-editor --output docs/control.png

The source images are the first test samples of `make_sticker_edits.py` with seed 0. This script draws them, without any
selection.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from make_sticker_edits import make_sample
from PIL import Image
from transformers import HfArgumentParser

from editar_hf import EditARPipeline
from editar_hf.training.validation import add_caption, build_contact_sheet


SIDE = 192  # pixels of an image


@dataclass
class Arguments:
    model: str
    output: Path
    seed: int = 0


def draw_box_mask(size: tuple[int, int], left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Draw a white box on black. The coordinates are fractions of the sides of the image."""
    mask = Image.new("L", size)
    mask.paste(255, [round(part * side) for part, side in zip((left, top, right, bottom), 2 * size, strict=True)])
    return mask


def show_mask(pipe: EditARPipeline, seed: int) -> list[tuple[str, Image.Image]]:
    """Edit with a mask and without one."""
    sample = make_sample(0, "test", 0, 64, ("recolour", "seen", None))
    how = {"image": sample["source_image"], "generator": torch.Generator().manual_seed(seed)}
    masked = pipe(sample["prompt"], mask_image=sample["mask"], **how)
    how["generator"].manual_seed(seed)
    free = pipe(sample["prompt"], **how)
    return [
        (sample["prompt"], sample["source_image"]),
        ("mask", sample["mask"].convert("RGB")),
        (f"with the mask, {masked.num_decode_steps} passes", masked.images[0]),
        (f"without it, {free.num_decode_steps} passes", free.images[0]),
    ]


def show_session(pipe: EditARPipeline, seed: int) -> list[tuple[str, Image.Image]]:
    """Edit an image three times. Each edit has a mask and starts from the tokens of the previous result."""
    sample = make_sample(0, "test", 2, 64, ("remove", "seen", None))
    size = sample["source_image"].size
    turns = [
        (sample["prompt"], sample["mask"]),
        ("add a blue star at the bottom right", draw_box_mask(size, 0.5, 0.5, 1, 1)),
        ("add a yellow circle at the top right", draw_box_mask(size, 0.5, 0, 1, 0.5)),
    ]
    tokens, shown = pipe.encode_image(sample["source_image"]), [("source", sample["source_image"])]
    for turn, (prompt, mask) in enumerate(turns):
        generator = torch.Generator().manual_seed(seed + turn)
        output = pipe(prompt, source_image_tokens=tokens, mask_image=mask, generator=generator)
        tokens = output.image_tokens
        shown.append((prompt, output.images[0]))
    return shown


def show_many_edits(pipe: EditARPipeline, seed: int) -> list[tuple[str, Image.Image]]:
    """Edit one image in several ways. The source image is prepared once."""
    sample = make_sample(0, "test", 4, 64, ("move", "seen", None))
    cache = pipe.prepare_source_cache(sample["source_image"])
    prompts = [sample["prompt"], "add a red star at the bottom left", "add an orange square at the bottom"]
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    images = pipe(prompts, source_cache=cache, generator=generators).images
    return [("source", sample["source_image"]), *zip(prompts, images, strict=True)]


def draw_sheet(rows: list[list[tuple[str, Image.Image]]]) -> Image.Image:
    """Arrange rows of images, each below its text."""
    return build_contact_sheet(
        [
            [
                add_caption(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), text, num_lines=2)
                for text, image in row
            ]
            for row in rows
        ]
    )


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    pipe = EditARPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    rows = [show(pipe, args.seed) for show in (show_mask, show_session, show_many_edits)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(rows).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
