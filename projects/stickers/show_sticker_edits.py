"""Draw how the sticker editor edits the first test samples: a row for each task, with source, result and target.

    python projects/stickers/show_sticker_edits.py --model projects/stickers/sticker-editor \
        --output projects/stickers/sticker-edits.png

The samples are the first test samples of `make_sticker_edits.py` with seed 0. This script draws them, without any
selection.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from make_sticker_edits import OPERATIONS, TRANSLATIONS, make_sample
from PIL import Image
from transformers import HfArgumentParser

from editar_hf import EditARPipeline
from editar_hf.training.validation import add_caption, build_contact_sheet


TASKS = (*OPERATIONS, *TRANSLATIONS)
SIDE = 128  # pixels of an image


@dataclass
class Arguments:
    model: str
    output: Path
    num_per_task: int = 2
    seed: int = 0


def make_samples(num_per_task: int, resolution: int) -> list[dict]:
    """Make the first test samples of each task, task after task."""
    # The test split repeats the tasks in the same order.
    return [
        make_sample(0, "test", start + turn * len(TASKS), resolution, (task, "seen", None))
        for start, task in enumerate(TASKS)
        for turn in range(num_per_task)
    ]


def draw_sheet(samples: list[dict], results: list[Image.Image], num_columns: int) -> Image.Image:
    """Arrange source | result | target of every sample below its prompt."""
    cells = []
    for sample, result in zip(samples, results, strict=True):
        images = (sample["source_image"], result, sample["target_image"])
        enlarged = [image.resize((SIDE, SIDE), Image.Resampling.NEAREST) for image in images]
        text = f"{sample['details']['operation']}: {sample['prompt']}"
        cells.append(add_caption(build_contact_sheet([enlarged]), text, num_lines=2))
    return build_contact_sheet([cells[start : start + num_columns] for start in range(0, len(cells), num_columns)])


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    pipeline = EditARPipeline.from_pretrained(args.model)
    samples = make_samples(args.num_per_task, pipeline.processor.image_processor.size.height)
    results = pipeline(
        [sample["prompt"] for sample in samples],
        image=[sample["source_image"] for sample in samples],
        task=[sample["task"] for sample in samples],
        generator=[torch.Generator().manual_seed(args.seed + index) for index in range(len(samples))],
    ).images
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(samples, results, args.num_per_task).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
