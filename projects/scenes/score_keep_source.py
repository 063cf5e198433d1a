"""Measure `keep_source` on held-out samples.

    python projects/scenes/score_keep_source.py --model examples/scene-editor --dataset scenes-val \
        --output keep_source.md

The edited image is the target of a sample, spoiled as other editors spoil the whole image. For edits of objects, the
script measures the share of the pixels of the true mask that the result takes from the edited image ("taken"), and the
share of the pixels farther than two tokens from the mask that it keeps from the source ("kept"). For edits of the whole
image, it measures the share of results that are the whole edited image ("whole").
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from score import LOCAL, find_inside, format_table, load_samples
from transformers import HfArgumentParser

from editar_hf import EditARImageProcessor, EditARVQModel, keep_source
from editar_hf.io import atomic_path


THRESHOLDS = (0.05, 0.1, 0.2)
JPEG_QUALITY, NOISE, BLUR = 75, 4, 0.7
TINT = (1.04, 1, 0.96)


@dataclass
class Arguments:
    model: str = field(metadata={"help": "pipeline folder or Hub id, for its VQ model"})
    dataset: Path = field(metadata={"help": "folder of test sets that compose.py wrote"})
    output: Path = field(metadata={"help": "Markdown file to write"})
    num_samples: int = field(default=12, metadata={"help": "samples an operation"})


def compress(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return Image.open(file).convert("RGB")


def add_noise(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, NOISE, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).round().clip(0, 255).astype(np.uint8))


def blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(BLUR))


def tint(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image) * np.array(TINT)).round().clip(0, 255).astype(np.uint8))


def list_spoilers(vq_model: EditARVQModel) -> dict[str, Callable[[Image.Image], Image.Image]]:
    """List what spoils an image, by a description."""

    @torch.no_grad()
    def pass_through(image: Image.Image) -> Image.Image:
        stride = vq_model.config.stride
        processor = EditARImageProcessor(stride=stride, size={"height": image.height, "width": image.width})
        return processor.postprocess(vq_model(processor(image).pixel_values).reconstruction)[0]

    return {
        f"JPEG of quality {JPEG_QUALITY}": compress,
        f"noise of {NOISE} of 255": add_noise,
        f"a blur of {BLUR} pixels": blur,
        "a tint of 4 %": tint,
        "the VQ model itself": pass_through,
    }


def measure(sample: dict, edited: Image.Image, vq_model: EditARVQModel, threshold: float) -> dict[str, float]:
    """Measure one result: name of a figure → value."""
    source = sample["source"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`edited` differs from `source` nearly everywhere")
        result = np.asarray(keep_source(Image.fromarray(source), edited, vq_model, threshold))
    is_edited, is_source = ((result == np.asarray(image)).all(axis=2) for image in (edited, source))
    if sample["operation"] not in LOCAL:
        return {"whole": float(is_edited.all())}
    is_far = ~find_inside(sample["mask"], 2 * vq_model.config.stride)
    figures = {"taken": float(is_edited[sample["mask"]].mean())}
    return figures | ({"kept": float(is_source[is_far].mean())} if is_far.any() else {})


def main(arguments=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    vq_model = EditARVQModel.from_pretrained(args.model, subfolder="vq_model", dtype=torch.float32)
    samples = [sample for name in (*LOCAL, "global") for sample in load_samples(args.dataset, name, args.num_samples)]
    rows = []
    for name, spoil in list_spoilers(vq_model).items():
        spoiled = [spoil(Image.fromarray(sample["target"])) for sample in samples]
        for threshold in THRESHOLDS:
            figures = [measure(*pair, vq_model, threshold) for pair in zip(samples, spoiled, strict=True)]
            means = [np.mean([one[key] for one in figures if key in one]) for key in ("taken", "kept", "whole")]
            rows.append([name, str(threshold), *(f"{mean:.2f}" for mean in means)])
            print(*rows[-1], flush=True)
    with atomic_path(args.output) as unfinished:
        unfinished.write_text(format_table(["spoiled by", "threshold", "taken", "kept", "whole"], rows) + "\n")


if __name__ == "__main__":
    main()
