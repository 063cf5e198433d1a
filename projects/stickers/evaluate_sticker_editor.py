"""Evaluate the sticker editor on held-out samples: compute the fraction of edits that are done, and three controls.

    python projects/stickers/evaluate_sticker_editor.py --model projects/stickers/sticker-editor --dataset stickers \
        --settings greedy-3 sampled-3 greedy-1 greedy-7.5 --output results.json

A setting consists of `greedy` or `sampled`, a guidance scale and, if it is not 1, a temperature. There are three
controls: the target image that the VQ model has encoded and decoded (the ceiling), the unchanged source image, and the
model with the instruction of another sample. `projects/stickers/stickers.py` defines when an edit is done.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from stickers import aggregate_scores, compute_outside_psnr, score_sample
from tqdm import tqdm
from transformers import HfArgumentParser

from editar_hf import EditARPipeline
from editar_hf.data_files import load_files
from editar_hf.io import atomic_path
from editar_hf.training.dataset_specs import find_files


CONTROLS = ("ceiling", "untouched source", "another instruction")


@dataclass
class Arguments:
    model: str = field(metadata={"help": "pipeline folder or Hub id"})
    dataset: str = field(metadata={"help": "folder that make_sticker_edits.py wrote"})
    output: str = field(metadata={"help": "JSON file for the results"})
    lora: str | None = field(default=None, metadata={"help": "folder or Hub id of an adapter to edit with"})
    split: str = "test"
    settings: list[str] = field(
        default_factory=lambda: ["greedy-3"], metadata={"help": "for example greedy-3, sampled-1, sampled-1.5-0.3"}
    )
    controls: list[str] = field(default_factory=lambda: list(CONTROLS), metadata={"choices": CONTROLS})
    max_samples: int | None = field(default=None, metadata={"help": "number of evenly spaced samples; default: all"})
    batch_size: int = 64
    seed: int = 0


def parse_setting(setting: str) -> dict:
    """Turn a setting such as `greedy-3` or `sampled-3-0.5` into arguments of the pipeline."""
    match = re.fullmatch(r"(greedy|sampled)-(\d+\.?\d*)(?:-(\d+\.?\d*))?", setting)
    if match is None or (match[1] == "greedy" and match[3]):
        raise ValueError(
            f"`settings` holds {setting!r}; write greedy and a guidance scale, as in greedy-3, or sampled, a guidance "
            "scale and, if it is not 1, a temperature, as in sampled-3-0.5."
        )
    if match[1] == "greedy":
        return {"do_sample": False, "guidance_scale": float(match[2])}
    return {"do_sample": True, "guidance_scale": float(match[2]), "temperature": float(match[3] or 1)}


def load_samples(args: Arguments) -> list[dict]:
    """Load samples with their images, and parse their details."""
    files = find_files(args.dataset, args.split)
    if not files:
        raise ValueError(f"`dataset` {args.dataset!r} has no parquet file whose name starts with {args.split!r}.")
    dataset = load_files("parquet", files, "train")
    if args.max_samples is not None and args.max_samples < len(dataset):
        dataset = dataset.select(np.linspace(0, len(dataset) - 1, args.max_samples).astype(int))
    samples = []
    for row in tqdm(dataset, desc="samples", mininterval=5):
        samples.append({**row, "details": json.loads(row["details"])})
    return samples


def pick_other_prompts(samples: list[dict]) -> list[str]:
    """Pick another prompt for each sample: the different prompt of the next sample with the same operation."""
    prompts = []
    for index, sample in enumerate(samples):
        operation, prompt = sample["details"]["operation"], sample["prompt"]
        others = (other for other in samples[index + 1 :] + samples[:index] if other["prompt"] != prompt)
        other = next((other for other in others if other["details"]["operation"] == operation), None)
        if other is None:
            raise ValueError(f"`dataset` has one prompt of operation {operation!r}; give at least two different ones.")
        prompts.append(other["prompt"])
    return prompts


def edit_samples(args: Arguments, pipeline: EditARPipeline, samples: list[dict], prompts: list[str], setting: str):
    """Edit every source image, or encode and decode every target image. Sample k always has seed `args.seed` + k."""
    images = [None] * len(samples)
    for batch in tqdm(list_batches(args, samples), desc=setting, mininterval=5):
        width, height = samples[batch[0]]["source_image"].size
        size = {"height": height, "width": width}
        if setting == "ceiling":
            targets = [samples[k]["target_image"] for k in batch]
            results = pipeline.decode_image_tokens(pipeline.encode_image(targets, **size), **size)
        else:
            results = pipeline(
                [prompts[k] for k in batch],
                image=[samples[k]["source_image"] for k in batch],
                task=[samples[k]["task"] for k in batch],
                **parse_setting(args.settings[0] if setting == "another instruction" else setting),
                **size,
                generator=[torch.Generator().manual_seed(args.seed + k) for k in batch],
            ).images
        for k, image in zip(batch, results, strict=True):
            images[k] = image
    return images


def list_batches(args: Arguments, samples: list[dict]) -> list[list[int]]:
    """Divide the samples into batches of one size. Returns the indices of each batch."""
    places = {}
    for k, sample in enumerate(samples):
        places.setdefault(sample["source_image"].size, []).append(k)
    size = args.batch_size
    return [same[start : start + size] for same in places.values() for start in range(0, len(same), size)]


def score_images(samples: list[dict], images: list, ceilings: list, token_size: int) -> list[dict]:
    scores = []
    for sample, image, through in zip(samples, images, ceilings, strict=True):
        source, target = (np.asarray(sample[name]) for name in ("source_image", "target_image"))
        mask = np.asarray(sample["mask"].convert("L"))
        ceiling = compute_outside_psnr(np.asarray(through), target, mask, token_size)
        score = score_sample(np.asarray(image), ceiling, source, target, mask, sample["details"], token_size)
        scores.append(score | {"size": "×".join(map(str, image.size))})
    return scores


def summarise(scores: list[dict]) -> dict:
    """Average scores by part and operation, by size; for seen and held-out photographs, also by photograph."""
    parts = {
        part: [score for score in scores if score["part"] == part] for part in ("seen", "held_out", "unseen_pairs")
    }
    on_photographs = [score for score in parts["seen"] + parts["held_out"] if score["photograph"]]
    means = {part: aggregate_scores(members) for part, members in parts.items()}
    sizes = aggregate_scores([score for score in scores if score["photograph"]], "size")
    return means | {"photographs": aggregate_scores(on_photographs, "photograph"), "sizes": sizes}


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    for setting in args.settings:
        parse_setting(setting)
    output = Path(args.output)
    samples = load_samples(args)
    prompts = [sample["prompt"] for sample in samples]
    others = pick_other_prompts(samples) if "another instruction" in args.controls else None
    pipeline = EditARPipeline.from_pretrained(args.model, dtype=torch.float32)
    if args.lora is not None:
        pipeline.load_lora_weights(args.lora)
    pipeline.set_progress_bar_config(disable=True)
    side = pipeline.processor.image_processor.size.height
    if found := {sample["source_image"].size for sample in samples if max(sample["source_image"].size) != side}:
        raise ValueError(f"`dataset` has images of {min(found)} pixels; make one of {side} pixels.")
    ceilings, results = edit_samples(args, pipeline, samples, prompts, "ceiling"), {}
    known = {"ceiling": ceilings, "untouched source": [sample["source_image"] for sample in samples]}
    for setting in (*args.controls, *args.settings):
        asked = others if setting == "another instruction" else prompts
        images = known.get(setting) or edit_samples(args, pipeline, samples, asked, setting)
        results[setting] = summarise(score_images(samples, images, ceilings, pipeline.vq_model.config.stride))
        rates = {operation: round(100 * means["done"], 1) for operation, means in results[setting]["seen"].items()}
        print(setting, rates, flush=True)
        with atomic_path(output) as unfinished:
            unfinished.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
