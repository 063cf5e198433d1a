"""Edit a photograph with the included sticker editor, and save original and result side by side. `make demo` runs it.

    python examples/edit_photo.py
    python examples/edit_photo.py --prompt "turn the red circle into a star" --seed 3

To edit another photograph, pass `--image`; its largest centred square is edited. The sticker editor knows only coloured
stickers, and it edits at 64×64 pixels.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageOps

from editar_hf import EditARPipeline


ROOT = Path(__file__).parents[1]
EDITOR = ROOT / "projects/stickers/sticker-editor"


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EDITOR), help="pipeline folder or Hub id")
    parser.add_argument("--image", type=Path, default=ROOT / "examples/photo.png", help="photograph to edit")
    parser.add_argument("--prompt", default="make the red circle blue", help="instruction")
    parser.add_argument("--output", type=Path, default=Path("outputs/edited_photo.png"), help="file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse_arguments(arguments)
    pipe = EditARPipeline.from_pretrained(args.model)
    photo = ImageOps.exif_transpose(Image.open(args.image)).convert("RGB")
    before = ImageOps.fit(photo, (min(photo.size),) * 2)
    generator = torch.Generator().manual_seed(args.seed)
    after = pipe(args.prompt, image=before, generator=generator).images[0]

    gap = before.width // 16
    joined = Image.new("RGB", (2 * before.width + gap, before.height), "white")
    joined.paste(before, (0, 0))
    joined.paste(after, (before.width + gap, 0))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    joined.save(args.output)
    print(f'"{args.prompt}", before and after: {args.output}')


if __name__ == "__main__":
    main()
