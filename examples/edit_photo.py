"""Edit a photograph with the shipped sticker editor, and put before and after side by side.

    python examples/edit_photo.py
    python examples/edit_photo.py --prompt "turn the yellow square into a star" --seed 3

The photograph is the cat of scikit-image (CC0), which the editor was never trained on, with two stickers on it. Another
picture comes with `--image`; but stickers are all that the editor knows, and its pictures are small.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from skimage import data

from editar_hf import EditARPipeline


# As the training pictures have them: the names stand for these colours, and a sticker is this part of the side.
RED, YELLOW = (205, 0, 30), (255, 240, 60)
STICKER_SIZE = 0.29
OVERSAMPLING = 4
# Small pictures are enlarged for viewing to about this many pixels.
VIEW_SIZE = 384


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent / "sticker-editor"), help="folder or Hub id")
    parser.add_argument("--image", type=Path, help="default: a photograph of a cat with two stickers on it")
    parser.add_argument("--prompt", default="make the red circle blue")
    parser.add_argument("--output", type=Path, default=Path("outputs/edited_photo.png"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def draw_photo_with_stickers(size):
    """Draw a red circle and a yellow square on the photograph, cut to the size (width, height)."""
    photo = ImageOps.fit(Image.fromarray(data.chelsea()), size, Image.Resampling.LANCZOS)
    reach = STICKER_SIZE / 2
    for colour, shape, x, y in ((RED, "ellipse", 1 / 6, 5 / 6), (YELLOW, "rectangle", 5 / 6, 5 / 6)):
        box = [(x - reach) * size[0], (y - reach) * size[1], (x + reach) * size[0], (y + reach) * size[1]]
        coverage = Image.new("L", [OVERSAMPLING * side for side in size])
        getattr(ImageDraw.Draw(coverage), shape)([OVERSAMPLING * edge for edge in box], fill=255)
        photo.paste(colour, mask=coverage.reduce(OVERSAMPLING))
    return photo


def join_for_viewing(before, after):
    """Put two pictures of one size side by side, small ones enlarged pixel by pixel."""
    scale = max(1, VIEW_SIZE // max(before.size))
    width, height = scale * before.width, scale * before.height
    joined = Image.new("RGB", (2 * width + width // 16, height), "white")
    for picture, left in ((before, 0), (after, joined.width - width)):
        joined.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, 0))
    return joined


def main(arguments=None):
    args = parse_arguments(arguments)
    pipe = EditARPipeline.from_pretrained(args.model)
    size = pipe.processor.image_processor.size
    if args.image is None:
        before = draw_photo_with_stickers((size.width, size.height))
    else:
        before = ImageOps.exif_transpose(Image.open(args.image)).convert("RGB")
    generator = torch.Generator().manual_seed(args.seed)
    after = pipe(args.prompt, image=before, restore_size=True, generator=generator).images[0]

    args.output.parent.mkdir(parents=True, exist_ok=True)
    join_for_viewing(before, after).save(args.output)
    print(f'"{args.prompt}", before and after: {args.output}')


if __name__ == "__main__":
    main()
