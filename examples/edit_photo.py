"""Edit a photograph in five ways with the included scene editor, and save one picture of them. `make demo` runs it.

    python examples/edit_photo.py
    python examples/edit_photo.py --prompts "replace the car with a bus" "turn day into night" --seed 3

To edit another photograph, pass `--image`. The scene editor is small: it knows 180 everyday objects, and it edits at
about 128×128 pixels, so the results are soft.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from editar_hf import EditARPipeline


EXAMPLES = Path(__file__).parent
# Prompts, and further arguments of their calls. `preserve="auto"` keeps what the prompt does not change.
# `detail="source"` keeps the fine detail where only colors or light change.
EDITS = {
    "remove the dog": {},
    "add a snowman in the middle": {"preserve": "auto"},
    "make the car red": {"preserve": "auto", "detail": "source"},
    "make it sunset": {"detail": "source"},
    "turn day into night": {"detail": "source"},
}
CAPTION_HEIGHT, GAP, COLUMNS = 26, 8, 3


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EXAMPLES / "scene-editor"), help="pipeline folder or Hub id")
    parser.add_argument("--image", type=Path, default=EXAMPLES / "photo.png", help="photograph to edit")
    parser.add_argument("--prompts", nargs="+", help="other instructions, one for each result")
    parser.add_argument("--output", type=Path, default=Path("outputs/edited_photo.png"), help="file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling, the same for all results")
    return parser.parse_args(arguments)


def write_caption(prompt: str, options: dict[str, str]) -> str:
    return ", ".join([prompt, *(f'{name}="{value}"' for name, value in options.items())])


def join_images(captioned: list[tuple[str, Image.Image]]) -> Image.Image:
    """Join images of the same size in rows, each under its caption."""
    width, height = captioned[0][1].size
    rows = -(-len(captioned) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + GAP), rows * (height + CAPTION_HEIGHT)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for index, (caption, image) in enumerate(captioned):
        left, top = index % COLUMNS * (width + GAP), index // COLUMNS * (height + CAPTION_HEIGHT)
        draw.text((left, top + 2), caption, "black", font)
        sheet.paste(image, (left, top + CAPTION_HEIGHT))
    return sheet


def main(arguments=None):
    args = parse_arguments(arguments)
    pipe = EditARPipeline.from_pretrained(args.model)
    photo = Image.open(args.image).convert("RGB")
    edits = {prompt: {} for prompt in args.prompts} if args.prompts else EDITS
    shown = [("the photograph", photo)]
    for prompt, options in edits.items():
        generator = torch.Generator().manual_seed(args.seed)
        edited = pipe(prompt, image=photo, generator=generator, **options).images[0]
        shown.append((write_caption(prompt, options), edited))

    args.output.parent.mkdir(parents=True, exist_ok=True)
    join_images(shown).save(args.output)
    print(f"The photograph and {len(edits)} edits of it: {args.output}")


if __name__ == "__main__":
    main()
