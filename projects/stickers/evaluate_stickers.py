"""Evaluate editors on the test set of make_sticker_edits.py: `editar-hf evaluate` with the benchmark `sticker-edits`.

    python projects/stickers/evaluate_stickers.py run --benchmark sticker-edits --source stickers \
        --model projects/stickers/sticker-editor --output-dir runs/stickers

The steps and options are the same as in `editar-hf evaluate`. There is one more option, `--vq-model`, a pipeline whose
VQ model reconstructs the target image. The reconstruction sets how close an edit must be to the target image outside
the mask. `--vq-model` defaults to `--model`. `stickers.py` defines when an edit is done.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import cache, lru_cache, partial

import numpy as np
import torch
from stickers import TRANSLATIONS, compute_outside_psnr, score_sample

from editar_hf import EditARPipeline
from editar_hf.commands import main
from editar_hf.evaluation.benchmarks import BENCHMARKS, Kind, Sample, decode_image, list_rows
from editar_hf.evaluation.processes import get_process
from editar_hf.evaluation.table import METRICS, Metric, Pair


TITLES = {
    "done": "edits done %",
    "inside": "right inside %",
    "outside": "kept outside %",
    "colour": "right colour %",
    "shape": "right shape %",
    "gone": "gone %",
    "stickers": "stickers right %",
    "placed": "colours placed %",
    "background": "right background %",
}


def make_sample(source: str, sample_id: str, row: dict) -> Sample:
    """Make a sample of the test split that `make_sticker_edits.py` wrote."""
    details = json.loads(row["details"])
    part = "" if details["part"] == "seen" else f" ({details['part'].replace('_', ' ')})"
    return Sample(
        sample_id,
        row["prompt"],
        decode_image(row["source_image"]),
        row["task"],
        details["operation"] + part,
        decode_image(row["target_image"]),
        decode_image(row["mask"]).convert("L"),
        details=details,
    )


def make_metrics(vq_model: str | None) -> dict[str, Metric]:
    """Make the metrics. `vq_model` is loaded when the first edit is scored."""

    @cache
    def load_pipeline() -> EditARPipeline:
        if vq_model is None:
            raise ValueError("`vq_model` is missing; pass a pipeline whose VQ model reconstructs the target images.")
        pipeline = EditARPipeline.from_pretrained(vq_model, dtype=torch.float32, text_encoder=None)
        return pipeline.to(get_process().device)

    @lru_cache(maxsize=1)
    def score(pair: Pair) -> dict:
        """Score a prediction, once for all metrics."""
        sample, pipeline, ceiling = pair.sample, load_pipeline(), None
        images = (pair.image, sample.source_image, sample.target_image, sample.mask)
        image, source, target, mask = map(np.asarray, images)
        token_size = pipeline.vq_model.config.stride
        if sample.details["operation"] not in TRANSLATIONS:
            size = pipeline.processor.image_processor.size
            if sample.size != (size.width, size.height):
                raise ValueError(
                    f"`vq_model` works at {size.width}×{size.height} pixels, but the images have {sample.size}; pass "
                    "another pipeline."
                )
            (through,) = pipeline.decode_image_tokens(pipeline.encode_image(sample.target_image))
            ceiling = compute_outside_psnr(np.asarray(through), target, mask, token_size)
        return score_sample(image, ceiling, source, target, mask, sample.details, token_size)

    def pick(name: str):
        """Return a function that picks one score, or NaN where it does not apply."""
        return lambda pair, network: score(pair).get(name, math.nan)

    shares = {name: Metric(title, pick(name), 1e2) for name, title in TITLES.items()}
    return shares | {"outside_psnr": Metric("PSNR outside", pick("outside_psnr"))}


def run(words: Sequence[str]) -> int:
    """Run a step of `editar-hf evaluate` and return its exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--vq-model", "--tokenizer")
    args, words = parser.parse_known_args(words)
    BENCHMARKS["sticker-edits"] = Kind(
        "stickers on photographs; a folder that projects/stickers/make_sticker_edits.py wrote",
        *(partial(list_rows, split="test"), make_sample),
        ("done", "inside", "outside", "psnr_unedited", "ssim_unedited", "psnr"),
        ("outside", "inside"),
    )
    METRICS.update(make_metrics(args.vq_model or args.model))
    return main(["evaluate", *words, *(["--model", args.model] if args.model else [])])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
