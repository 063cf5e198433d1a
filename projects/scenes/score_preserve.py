"""Measure `preserve="auto"` on held-out samples, and calibrate its threshold.

    python projects/scenes/score_preserve.py --model editor --dataset scenes-val --calibrate
    python projects/scenes/score_preserve.py --model editor --dataset scenes-test --features features.safetensors \
        --judge judge.safetensors --output-dir scores --num-samples 100

`--calibrate` computes the edit maps of all samples with a true mask, and takes the threshold that 90 % of the tokens
inside the masks exceed. It writes the threshold to the generation config of the model, which must be a folder, and
prints how many edits fall back with it, so that the whole image may change. Use other samples than for scoring.

Without it, the script makes every edit three times with equal seeds: with `preserve="off"`, with `preserve="auto"` and
with the true mask. It writes `preserve.md`, with figures by operation, and `preserve.json`. `score.py` says what counts
as done. Figures of other operations in `preserve.json` stay. Images that are there are not made again: a run that was
interrupted goes on, and a run can start from the images that `score.py` made with the first of `--settings`. Time is
processor time of edits made one by one, of each kind on the first `--num-timed` samples of an operation.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from features import load_features
from PIL import Image
from score import (
    LOCAL,
    Arguments,
    Scorer,
    compute_outside_psnrs,
    format_table,
    load_images,
    load_samples,
    parse_setting,
)
from train_judge import decode_image, load_judge
from transformers import HfArgumentParser

from editar_hf import EditARPipeline
from editar_hf.generation.inputs import resolve_preserve_threshold
from editar_hf.io import atomic_path
from editar_hf.pipelines.edit_region import compute_edit_mask, find_edited_tokens


# The fraction of the tokens inside true masks that the calibrated threshold frees.
RECALL = 0.9
MODES = ("off", "auto", "mask")


@dataclass
class PreserveArguments(Arguments):
    features: str | None = field(default=None, metadata={"help": "file that features.py made"})
    judge: str | None = field(default=None, metadata={"help": "file that train_judge.py made"})
    output_dir: Path | None = None
    settings: list[str] = field(default_factory=lambda: ["sampled-1.5-0.3"], metadata={"help": "one, as for score.py"})
    calibrate: bool = field(default=False, metadata={"help": "only choose the threshold and write it to the model"})
    num_timed: int = field(default=12, metadata={"help": "samples an operation that are edited once more for the time"})


def find_true_tokens(sample: dict, stride: int) -> torch.Tensor:
    """Find the tokens inside the true mask, bool (rows, columns)."""
    return compute_edit_mask(sample["mask"], *sample["mask"].shape, stride, "stretch")


def calibrate(pipeline: EditARPipeline, args: PreserveArguments):
    """Choose the threshold, write it to the generation config of the model, and print how often edits fall back."""
    edit_maps = {}
    inside = []
    for operation in (*LOCAL, "global"):
        samples = load_samples(args.dataset, operation, args.num_samples)
        edit_maps[operation] = torch.cat([pipeline.compute_edit_map(s["source"], s["prompt"]) for s in samples])
        if operation in LOCAL:
            true = torch.stack([find_true_tokens(sample, pipeline.vq_model.config.stride) for sample in samples])
            inside.append(edit_maps[operation][true])
    threshold = round(float(torch.cat(inside).quantile(1 - RECALL)), 2)
    path = Path(args.model) / "transformer" / "generation_config.json"
    config = {**json.loads(path.read_text()), "preserve_threshold": threshold}
    with atomic_path(path) as unfinished:
        unfinished.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    print(f"preserve_threshold {threshold} nats, written to {path}")
    for operation, maps in edit_maps.items():
        num_whole = int(find_edited_tokens(maps, threshold).flatten(1).all(dim=1).sum())
        print(f"{operation}: {num_whole} of {len(maps)} edits fall back")


def edit_one(pipeline: EditARPipeline, sample: dict, mode: str, seed: int, setting: str) -> tuple[Image.Image, dict]:
    """Edit a sample alone. Return the image, and processor seconds, passes and tokens that may change."""
    height, width = sample["mask"].shape
    how = {"mask_image": Image.fromarray(sample["mask"])} if mode == "mask" else {"preserve": mode}
    start = time.process_time()
    output = pipeline(
        sample["prompt"],
        image=Image.fromarray(sample["source"]),
        height=height,
        width=width,
        restore_size=False,
        generator=torch.Generator().manual_seed(seed),
        **how,
        **parse_setting(setting),
    )
    facts = {"seconds": time.process_time() - start, "passes": output.num_decode_steps}
    if mode == "auto":
        facts["fell_back"] = output.preserved_mask[0] is None
    return output.images[0], facts


def make_edits(pipeline: EditARPipeline, samples: list[dict], mode: str, args: PreserveArguments):
    """Edit samples one by one. Return images and facts of each. With `preserve="off"`, only some are timed."""
    setting, operation = args.settings[0], samples[0]["operation"]
    folder = args.output_dir / "images" / f"{setting} {mode}" / operation
    if not folder.exists():
        number = args.num_timed if mode == "off" else len(samples)
        with atomic_path(folder) as unfinished:
            unfinished.mkdir()
            all_facts = []
            for index, sample in enumerate(samples[:number]):
                image, facts = edit_one(pipeline, sample, mode, args.seed + index, setting)
                image.save(unfinished / f"{index:04d}.png")
                all_facts.append(facts)
            (unfinished / "facts.json").write_text(json.dumps(all_facts))
    all_facts = json.loads((folder / "facts.json").read_text())
    if mode == "off":
        return load_images(pipeline, samples, setting, args), all_facts
    return [decode_image((folder / f"{index:04d}.png").read_bytes()) for index in range(len(samples))], all_facts


def compute_ious(pipeline: EditARPipeline, samples: list[dict]) -> list[float]:
    """Compute the IoU of the tokens that `preserve="auto"` frees and those of the true mask."""
    threshold = resolve_preserve_threshold(pipeline.transformer.generation_config)
    ious = []
    for sample in samples:
        found = find_edited_tokens(pipeline.compute_edit_map(sample["source"], sample["prompt"]), threshold)[0]
        true = find_true_tokens(sample, pipeline.vq_model.config.stride)
        ious.append(float((found & true).sum() / (found | true).sum()))
    return ious


def score_operation(pipeline: EditARPipeline, scorer: Scorer, samples: list[dict], args: PreserveArguments) -> dict:
    """Score all modes on samples of one operation: mode → name of a figure → value."""
    ceilings = load_images(pipeline, samples, "ceiling", args)
    token_size, is_local = pipeline.vq_model.config.stride, samples[0]["operation"] in LOCAL
    floors = compute_outside_psnrs(samples, ceilings, token_size) if is_local else None
    results = {}
    for mode in MODES if is_local else MODES[:2]:
        images, facts = make_edits(pipeline, samples, mode, args)
        marks = []
        for start in range(0, len(samples), args.batch_size):
            batch = slice(start, start + args.batch_size)
            marks += scorer.score(samples[batch], images[batch], ceilings[batch])
        timed = facts[: args.num_timed]
        figures: dict[str, float] = {"samples": len(samples)}
        figures |= {name: float(np.mean([mark[name] for mark in marks])) for name in ("done", "nearer")}
        figures |= {name: float(np.mean([fact[name] for fact in timed])) for name in ("seconds", "passes")}
        if is_local:
            psnrs = compute_outside_psnrs(samples, images, token_size)
            is_defined = ~np.isnan(psnrs)
            figures["psnr"] = float(np.median(psnrs[is_defined]))
            figures["at_floor"] = float(np.mean((psnrs >= floors)[is_defined]))
        if mode == "auto":
            figures["fell_back"] = float(np.mean([fact["fell_back"] for fact in facts]))
            if is_local:
                figures["iou"] = float(np.mean(compute_ious(pipeline, samples)))
        results[mode] = figures
        print(samples[0]["operation"], mode, figures, flush=True)
    return results


def format_report(results: dict) -> str:
    """Format figures by operation as a Markdown table; shares in percent."""
    rows = []
    for operation, modes in results.items():
        for mode, figures in modes.items():
            cell = {name: f"{100 * value:.0f}" for name, value in figures.items() if name != "samples"}
            seconds = figures["seconds"] / modes["off"]["seconds"]
            row = [f"{operation} ({figures['samples']})" if mode == "off" else ""]
            row += [{"mask": "true mask"}.get(mode, mode)]
            row += [cell["done"], cell["nearer"], f"{figures['psnr']:.1f}" if "psnr" in figures else ""]
            row += [cell.get("at_floor", ""), f"{figures['iou']:.2f}" if "iou" in figures else ""]
            rows.append([*row, cell.get("fell_back", ""), f"{figures['passes']:.0f}", f"{seconds:.2f}"])
    header = ["operation (samples)", "kept", "done, %", "nearer, %", "PSNR outside, dB", "at the floor, %", "IoU"]
    return format_table([*header, "fell back, %", "passes", "time"], rows)


def main():
    (args,) = HfArgumentParser(PreserveArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    pipeline = EditARPipeline.from_pretrained(args.model).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    if args.calibrate:
        calibrate(pipeline, args)
        return
    scorer = Scorer(load_features(args.features), load_judge(args.judge), pipeline.vq_model.config.stride, args.device)
    path = args.output_dir / "preserve.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for operation in (*LOCAL, "global"):
        if operation in args.operations:
            samples = load_samples(args.dataset, operation, args.num_samples)
            results[operation] = score_operation(pipeline, scorer, samples, args)
            with atomic_path(path) as unfinished:
                unfinished.write_text(json.dumps(results, indent=1))
    report = format_report(results)
    (args.output_dir / "preserve.md").write_text(report + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
