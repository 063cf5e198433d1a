"""Draw what the sticker editor makes of the first test samples: a row for each task, with source, result and target.

    python projects/stickers/show_sticker_edits.py --model examples/sticker-editor --output docs/sticker-editor.png

The samples are those of `make_sticker_edits.py` with its seed 0, made on the spot; nothing is picked.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from make_sticker_edits import OPERATIONS, TRANSLATIONS, make_sample
from PIL import Image, ImageDraw, ImageFont
from transformers import HfArgumentParser

from editar_hf import EditARPipeline


TASKS = (*OPERATIONS, *TRANSLATIONS)
# In pixels: pictures, the space between them, a line of text, and the space between columns.
SIDE, GAP, LINE, MARGIN = 128, 4, 18, 20


@dataclass
class Arguments:
    model: str
    output: Path
    num_per_task: int = 2
    seed: int = 0


def make_samples(num_per_task: int, resolution: int) -> list[dict]:
    """Make the first test samples of each task, task after task."""
    # The test split goes through the tasks again and again.
    return [
        make_sample(0, "test", start + turn * len(TASKS), resolution, (task, "seen", None))
        for start, task in enumerate(TASKS)
        for turn in range(num_per_task)
    ]


def edit_samples(pipeline: EditARPipeline, samples: list[dict], seed: int) -> list[Image.Image]:
    return pipeline(
        [sample["prompt"] for sample in samples],
        image=[sample["source_image"] for sample in samples],
        task=[sample["task"] for sample in samples],
        generator=[torch.Generator().manual_seed(seed + index) for index in range(len(samples))],
    ).images


def wrap(text: str, font, width: int) -> list[str]:
    """Break a text into lines of at most that many pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return lines


def draw_sheet(samples: list[dict], results: list[Image.Image], num_columns: int) -> Image.Image:
    """Lay out source | result | target of every sample, its prompt underneath."""
    font, width = ImageFont.load_default(size=12), 3 * SIDE + 2 * GAP
    texts = [wrap(f"{sample['details']['operation']}: {sample['prompt']}", font, width) for sample in samples]
    height = SIDE + GAP + LINE * max(map(len, texts)) + GAP
    num_rows = -(-len(samples) // num_columns)
    sheet = Image.new("RGB", (num_columns * (width + MARGIN) - MARGIN, num_rows * height), "white")
    for index, (sample, result, lines) in enumerate(zip(samples, results, texts, strict=True)):
        left, top = index % num_columns * (width + MARGIN), index // num_columns * height
        for place, picture in enumerate((sample["source_image"], result, sample["target_image"])):
            enlarged = picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + place * (SIDE + GAP), top))
        for line, text in enumerate(lines):
            ImageDraw.Draw(sheet).text((left, top + SIDE + GAP + line * LINE), text, "black", font)
    return sheet


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    pipeline = EditARPipeline.from_pretrained(args.model)
    samples = make_samples(args.num_per_task, pipeline.processor.image_processor.size.height)
    results = edit_samples(pipeline, samples, args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(samples, results, args.num_per_task).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
