"""Make the pictures in `docs/images/` with the small checkpoint, and with the adapter of the LoRA guide.

    python docs/make_pictures.py --adapter runs/my-lora/adapter

Nothing is picked by hand: all seeds are 0, or 0, 1, 2, ... for several results. `projects/stickers/show_control.py` and
`show_sticker_edits.py` make the two pictures in `docs/`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import HfArgumentParser

from editar_hf import EditARPipeline
from editar_hf.training.validation import build_contact_sheet


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "projects" / "stickers")]

from make_practice_pairs import PROMPT, draw_pair  # noqa: E402
from make_sticker_edits import make_sample  # noqa: E402


PHOTO = Image.open(ROOT / "examples" / "photo.png").convert("RGB")
MASK = Image.open(ROOT / "examples" / "photo-mask.png")
RECOLOUR = "make the red circle blue"
MAPS = ("canny", "depth", "segmentation")


@dataclass
class Arguments:
    adapter: Path = field(metadata={"help": "adapter that the commands of docs/lora-guide.md have trained"})
    output_dir: Path = ROOT / "docs" / "images"


def make_generators(number: int = 1) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(number)]


def draw_edits(pipe: EditARPipeline) -> list[list[Image.Image]]:
    """The photograph, and three edits of it."""
    prompts = [RECOLOUR, "remove the red circle", "turn the red circle into a star"]
    return [[PHOTO, *pipe(prompts, image=PHOTO, generator=make_generators(3)).images]]


def draw_condition_maps(pipe: EditARPipeline) -> list[list[Image.Image]]:
    """Upper row: a canny, a depth and a segmentation map. Lower row: the image made from each."""
    samples = [make_sample(0, "test", index, 64, (task, "seen", None)) for index, task in enumerate(MAPS, start=10)]
    maps = [sample["source_image"] for sample in samples]
    prompts = [sample["prompt"] for sample in samples]
    print("condition maps:", *prompts, sep="\n  ")
    return [maps, pipe(prompts, image=maps, task=list(MAPS), generator=make_generators(len(MAPS))).images]


def draw_mask(pipe: EditARPipeline) -> list[list[Image.Image]]:
    """The photograph, the mask, the edit with the mask, and the edit without it."""
    masked = pipe(RECOLOUR, image=PHOTO, mask_image=MASK, generator=make_generators()).images[0]
    free = pipe(RECOLOUR, image=PHOTO, generator=make_generators()).images[0]
    return [[PHOTO, MASK.convert("RGB"), masked, free]]


def draw_session(pipe: EditARPipeline) -> list[list[Image.Image]]:
    """The photograph, and the result of each turn of a session."""
    image, tokens, shown = PHOTO, pipe.encode_image(PHOTO), [PHOTO]
    for prompt in (RECOLOUR, "turn the blue circle into a star", "remove the blue star"):
        output = pipe(
            prompt,
            image=image,
            source_image_tokens=tokens,
            mask_image=MASK,
            restore_size=True,
            generator=make_generators(),
        )
        image, tokens = output.images[0], output.image_tokens
        shown.append(image)
    return [shown]


def draw_previews(pipe: EditARPipeline) -> list[list[Image.Image]]:
    """Every second preview of an edit."""
    previews = []

    def keep(pipe, step, timestep, tensors):
        previews.extend(tensors.get("preview", []))

    square = PHOTO.crop((60, 0, 300, 240))
    pipe(RECOLOUR, image=square, callback_on_step_end=keep, preview_every=1, generator=make_generators())
    return [[preview.resize(square.size, Image.Resampling.BICUBIC) for preview in previews[1::2]]]


def draw_edit_map(pipe: EditARPipeline) -> list[list[Image.Image]]:
    """A square of the photograph, and the same darkened where the instruction does not speak against the tokens."""
    square = PHOTO.crop((60, 0, 300, 240))
    edit_map = pipe.compute_edit_map(square, RECOLOUR)[0].clamp(min=0)
    light = Image.fromarray((255 * edit_map / edit_map.max()).byte().numpy()).resize(square.size, Image.Resampling.BOX)
    return [[square, Image.composite(square, Image.new("RGB", square.size), light)]]


def draw_pairs(pipe: EditARPipeline) -> list[list[Image.Image]]:
    """Upper row: the source images of the first pairs. Lower row: their target images."""
    return [list(row) for row in zip(*(draw_pair(seed) for seed in range(6)), strict=True)]


def draw_lora(pipe: EditARPipeline, adapter: Path) -> list[list[Image.Image]]:
    """Upper row: new images. Middle row: edited without the adapter. Lower row: edited with it."""
    sources = [draw_pair(2000 + index)[0] for index in range(6)]
    rows = [sources, pipe(PROMPT, image=sources, generator=make_generators(6)).images]
    pipe.load_lora_weights(adapter)
    rows.append(pipe(PROMPT, image=sources, generator=make_generators(6)).images)
    return rows


def save_sheet(rows: list[list[Image.Image]], file: Path, width: int = 864):
    """Save rows of images as one picture of at most `width` pixels and a margin."""
    side = min(width // len(rows[0]), 288) - 8
    columns, lines = rows[0][0].size
    size = side, round(side * lines / columns)
    sheet = build_contact_sheet([[image.resize(size, Image.Resampling.LANCZOS) for image in row] for row in rows], 8)
    sheet.save(file, quality=88, optimize=True)
    print(f"{file.name}: {sheet.width}×{sheet.height} pixels, {file.stat().st_size / 1024:.0f} KiB")


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    pipe = EditARPipeline.from_pretrained(ROOT / "projects" / "stickers" / "sticker-editor")
    pipe.set_progress_bar_config(disable=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pictures = {
        "edits": draw_edits,
        "condition-maps": draw_condition_maps,
        "mask": draw_mask,
        "session": draw_session,
        "previews": draw_previews,
        "edit-map": draw_edit_map,
        "pairs": draw_pairs,
        "lora": lambda pipe: draw_lora(pipe, args.adapter),
    }
    for name, draw in pictures.items():
        save_sheet(draw(pipe), args.output_dir / f"{name}.jpg")


if __name__ == "__main__":
    main()
