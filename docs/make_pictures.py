"""Make the pictures in `docs/images/` with the scene editor.

    python docs/make_pictures.py --bank bank

Nothing is picked by hand but the photograph and the prompts: all seeds are 0, and failures stay. The maps are the first
test samples of `projects/scenes/compose.py`, which needs the bank that `projects/scenes/build_bank.py` makes.
`projects/stickers/show_frame_lora.py` makes `pairs.jpg` and `lora.jpg`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import HfArgumentParser

from editar_hf import EditARPipeline
from editar_hf.training.validation import build_contact_sheet


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "projects" / "scenes")]

from bank import Bank  # noqa: E402
from compose import compose_pair  # noqa: E402
from edit_photo import EDITS, join_images, write_caption  # noqa: E402


PHOTO = Image.open(ROOT / "examples" / "photo.png").convert("RGB")
MASK = Image.open(ROOT / "examples" / "photo-mask.png")
RECOLOR = "make the car red"
MAPS = ("canny", "depth", "segmentation")


@dataclass
class Arguments:
    bank: Path = field(metadata={"help": "folder that projects/scenes/build_bank.py made"})
    output_dir: Path = ROOT / "docs" / "images"


def edit(pipe: EditARPipeline, prompts: Sequence[str], **options) -> list[Image.Image]:
    """Edit the photograph with each prompt, all with the seed 0."""
    options = {"image": PHOTO, **options}
    return [pipe(prompt, generator=torch.Generator().manual_seed(0), **options).images[0] for prompt in prompts]


def draw_front(pipe: EditARPipeline) -> Image.Image:
    """The photograph, the edits of `make demo`, and below them a mask and two edits with this mask."""
    captioned = [("the photograph", PHOTO)]
    for prompt, options in EDITS.items():
        captioned += [(write_caption(prompt, options), *edit(pipe, [prompt], **options))]
    captioned.append(("a mask", MASK.convert("RGB")))
    for prompt, options in {"remove the car": {}, RECOLOR: {"detail": "source"}}.items():
        captioned += [
            (write_caption(f"{prompt}, with the mask", options), *edit(pipe, [prompt], mask_image=MASK, **options))
        ]
    return join_images(captioned)


def draw_edits(pipe: EditARPipeline) -> Image.Image:
    """The photograph, and five more edits of it."""
    prompts = ["remove the car", RECOLOR, "replace the car with a bus", "make it snow", "turn it into a pencil sketch"]
    return join_images([("the photograph", PHOTO), *zip(prompts, edit(pipe, prompts), strict=True)])


def draw_shapes(pipe: EditARPipeline) -> Image.Image:
    """Edits of the photograph in three ways, side by side. Below: the photograph, and two edits with its detail."""
    ways = [{"aspect": "model", "resize_mode": "crop"}, {"aspect": "model", "resize_mode": "stretch"}]
    ways += [{"aspect": "source"}, {"aspect": "source", "detail": "source"}]
    captions = ["the centered square", "stretched to a square", 'aspect="source"', 'aspect="source", detail="source"']
    shown = [edit(pipe, ["turn day into night"], **way)[0] for way in ways]
    removed = edit(pipe, ["remove the dog"], **ways[-1])
    edits = [*zip(captions, shown, strict=True), ('remove the dog, detail="source"', removed[0])]
    return join_images([*edits[:3], ("the photograph", PHOTO), *edits[3:]])


def draw_condition_maps(pipe: EditARPipeline, bank: Bank) -> Image.Image:
    """Upper row: two maps of each kind. Lower row: the image made from each."""
    pairs = [(task, compose_pair(bank, 1, index, "test", 128, 128, task)) for task in MAPS for index in range(2)]
    maps = [Image.fromarray(pair.source) for _, pair in pairs]
    print("condition maps:", *(f"{task}: {pair.instruction}" for task, pair in pairs), sep="\n  ")
    made = [
        pipe(pair.instruction, image=source, task=task, generator=torch.Generator().manual_seed(0)).images[0]
        for source, (task, pair) in zip(maps, pairs, strict=True)
    ]
    return build_contact_sheet([maps, made], 8)


def draw_mask(pipe: EditARPipeline) -> Image.Image:
    """The photograph, the mask, the edit with the mask, and the edit without it."""
    options = {"image": PHOTO, "generator": torch.Generator().manual_seed(0)}
    masked = pipe(RECOLOR, mask_image=MASK, **options)
    free = pipe(RECOLOR, **options | {"generator": torch.Generator().manual_seed(0)})
    print(f"passes with the mask: {masked.num_decode_steps}, without: {free.num_decode_steps}")
    return build_contact_sheet([[PHOTO, MASK.convert("RGB")], [masked.images[0], free.images[0]]], 8)


def draw_session(pipe: EditARPipeline) -> Image.Image:
    """The photograph, and the result of each turn of a session."""
    image, tokens, shown = PHOTO, pipe.encode_image(PHOTO), [PHOTO]
    for prompt in (RECOLOR, "make the car green", "remove the car"):
        output = pipe(
            prompt,
            image=image,
            source_image_tokens=tokens,
            mask_image=MASK,
            restore_size=True,
            generator=torch.Generator().manual_seed(0),
        )
        image, tokens = output.images[0], output.image_tokens
        shown.append(image)
    return build_contact_sheet([shown[:2], shown[2:]], 8)


def draw_previews(pipe: EditARPipeline) -> Image.Image:
    """Four previews of an edit, at equal distances."""
    previews = []

    def keep(pipe, step, timestep, tensors):
        previews.extend(tensors.get("preview", []))

    edit(pipe, ["make it sunset"], callback_on_step_end=keep, preview_every=1)
    shown = [preview.resize(PHOTO.size, Image.Resampling.BICUBIC) for preview in previews[1::3]]
    return build_contact_sheet([shown[:2], shown[2:]], 8)


def draw_edit_map(pipe: EditARPipeline) -> Image.Image:
    """The photograph, and the same darkened where the instruction does not speak against the tokens."""
    edit_map = pipe.compute_edit_map(PHOTO, "remove the dog")[0].clamp(min=0)
    light = Image.fromarray((255 * edit_map / edit_map.max()).byte().numpy()).resize(PHOTO.size, Image.Resampling.BOX)
    return build_contact_sheet([[PHOTO, Image.composite(PHOTO, Image.new("RGB", PHOTO.size), light)]], 8)


def draw_preserve(pipe: EditARPipeline) -> Image.Image:
    """The photograph and what an edit keeps of it, then the edit with and without keeping the rest."""
    prompt = "make the car red"
    output = pipe(prompt, image=PHOTO, preserve="auto", generator=torch.Generator().manual_seed(0))
    plain = pipe(prompt, image=PHOTO, generator=torch.Generator().manual_seed(0))
    mask = output.preserved_mask[0]
    shown = Image.new("RGB", PHOTO.size, "white") if mask is None else mask.convert("RGB")
    print(f"passes with preserve: {output.num_decode_steps}, without: {plain.num_decode_steps}")
    return build_contact_sheet([[PHOTO, shown], [output.images[0], plain.images[0]]], 8)


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    pipe = EditARPipeline.from_pretrained(ROOT / "examples" / "scene-editor", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pictures = {
        "front": draw_front,
        "edits": draw_edits,
        "shapes": draw_shapes,
        "condition-maps": lambda pipe: draw_condition_maps(pipe, Bank.load(args.bank)),
        "mask": draw_mask,
        "session": draw_session,
        "previews": draw_previews,
        "edit-map": draw_edit_map,
        "preserve": draw_preserve,
    }
    for name, draw in pictures.items():
        picture, file = draw(pipe), args.output_dir / f"{name}.jpg"
        picture.save(file, quality=88, optimize=True)
        print(f"{file.name}: {picture.width}×{picture.height} pixels, {file.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
