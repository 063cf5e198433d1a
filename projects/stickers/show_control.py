"""Draw what masks, sessions and a kept source are for, with the sticker editor: the picture of the README.

    python projects/stickers/show_control.py --model examples/sticker-editor --output docs/control.png

The sources are the first test samples of `make_sticker_edits.py` with its seed 0, made on the spot; nothing is picked.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from make_sticker_edits import make_sample
from PIL import Image, ImageDraw, ImageFont
from transformers import HfArgumentParser

from editar_hf import EditARPipeline


# In pixels: pictures, the space between them, and a line of text.
SIDE, GAP, LINE = 192, 6, 18


@dataclass
class Arguments:
    model: str
    output: Path
    seed: int = 0


def draw_box_mask(size: tuple[int, int], left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Draw a white box, in parts of the picture's sides, on black."""
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
    """Edit turn after turn in tokens, each inside a mask."""
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
    """Edit one picture in several ways, its work done once."""
    sample = make_sample(0, "test", 4, 64, ("move", "seen", None))
    cache = pipe.prepare_source_cache(sample["source_image"])
    prompts = [sample["prompt"], "add a red star at the bottom left", "add an orange square at the bottom"]
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    images = pipe(prompts, source_cache=cache, generator=generators).images
    return [("source", sample["source_image"]), *zip(prompts, images, strict=True)]


def draw_sheet(rows: list[list[tuple[str, Image.Image]]]) -> Image.Image:
    """Lay out rows of pictures, each with its text underneath."""
    font = ImageFont.load_default(size=11)
    height = SIDE + LINE + GAP
    sheet = Image.new("RGB", (len(rows[0]) * (SIDE + GAP) - GAP, len(rows) * height), "white")
    for place, row in enumerate(rows):
        for column, (text, picture) in enumerate(row):
            left, top = column * (SIDE + GAP), place * height
            sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
            while font.getlength(text) > SIDE:
                text = f"{text.rstrip(' …')[:-1]} …"
            ImageDraw.Draw(sheet).text((left, top + SIDE + 1), text, "black", font)
    return sheet


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    pipe = EditARPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    rows = [show(pipe, args.seed) for show in (show_mask, show_session, show_many_edits)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(rows).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
