"""Score a scene editor on held-out samples: which share of the edits it carries out, by operation and by what is new.

    python projects/scenes/score.py --model editor --dataset scenes-test --features features.safetensors \
        --judge judge.safetensors --output-dir scores --settings greedy-3 sampled-3 greedy-1

The samples are those that `compose.py --split test` writes. An edit of an object counts as done when three things hold:

* inside the mask the result is nearer to the target than to the source, by the distance of Lite0's features; a moved
  object's old and new place are compared one by one;
* the judge (see `train_judge.py`) sees the asked noun there, or one of its kin, and the asked color; or nothing where
  an object was removed;
* farther than a token from the mask, the PSNR to the target is at least that of the target passed through the VQ
  model, minus 1 dB.

A global edit counts as done when the result is nearer to the target than to the source and to every other global edit
of the source. The image of a map counts as done when it is nearer to its target than to the map and to the targets of
15 other samples.

Beside the settings stand the target passed through the VQ model (the ceiling), the untouched source, and the model
given another sample's instruction. `output_dir` receives `scores.json`, `scores.md`, the marks of every sample in
`marks.json`, the sheets `samples.png` and `failures.png`, and `images/`. Images that are there are not made again. So a
run that was interrupted goes on after them, and a run with another judge scores them anew.
"""

import json
import random
import re
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from compose import MAPS, OPERATIONS
from features import FeatureNetwork, compute_feature_distance, load_features
from global_edits import GLOBAL_EDITS, apply_global_edit
from PIL import Image, ImageFilter
from train_judge import Judge, are_kin, cut_crop, decode_image, load_judge, stack_crops
from transformers import HfArgumentParser

from editar_hf import EditARPipeline
from editar_hf.evaluation.metrics import compute_psnr
from editar_hf.io import atomic_path
from editar_hf.training.validation import add_caption, build_contact_sheet


CONTROLS = ("ceiling", "untouched source", "another instruction")
LOCAL = tuple(operation for operation in OPERATIONS if operation not in (*MAPS, "global"))
# What a sample may have that training never showed, and the words for it.
KINDS = {
    "new_photograph": "new photograph",
    "new_view": "new view or model",
    "new_model": "new model",
    "new_color_pair": "new color–noun pair",
}
# What an edit of an object must have; `nearer` is reported of all others, too.
MARKS = ("nearer", "noun", "color", "kept")
PSNR_TOLERANCE = 1.0
NUM_MAP_TARGETS = 16
# The ground line that the other global edits are drawn with: the data set does not name the true one.
GROUND = 0.5


@dataclass
class Arguments:
    model: str = field(metadata={"help": "pipeline folder or Hub id"})
    dataset: Path = field(metadata={"help": "folder that compose.py wrote"})
    features: str = field(metadata={"help": "file that features.py made"})
    judge: str = field(metadata={"help": "file that train_judge.py made"})
    output_dir: Path
    settings: list[str] = field(
        default_factory=lambda: ["greedy-3"],
        metadata={"help": "such as greedy-3, sampled-1, sampled-1.5-0.3; the first one is the main one"},
    )
    controls: list[str] = field(default_factory=lambda: list(CONTROLS), metadata={"choices": CONTROLS})
    operations: list[str] = field(default_factory=lambda: list(OPERATIONS), metadata={"choices": OPERATIONS})
    num_samples: int | None = field(default=None, metadata={"help": "samples an operation; default: all"})
    num_sweep: int = field(default=100, metadata={"help": "samples an operation for other settings than the first"})
    num_control: int = field(default=100, metadata={"help": "samples an operation for another instruction"})
    num_shown: int = field(default=12, metadata={"help": "edits, and failures, on the sheets"})
    batch_size: int = 64
    device: str = "cpu"
    seed: int = 0


def parse_setting(setting: str) -> dict:
    """Turn `greedy-3` or `sampled-3-0.5` into the arguments of the pipeline: choice, guidance scale and temperature."""
    match = re.fullmatch(r"(greedy|sampled)-(\d+\.?\d*)(?:-(\d+\.?\d*))?", setting)
    if match is None or (match[1] == "greedy" and match[3]):
        raise ValueError(
            f"`settings` holds {setting!r}; write greedy and a guidance scale, as in greedy-3, or sampled, a scale "
            "and, if it is not 1, a temperature, as in sampled-3-0.5."
        )
    if match[1] == "greedy":
        return {"do_sample": False, "guidance_scale": float(match[2])}
    return {"do_sample": True, "guidance_scale": float(match[2]), "temperature": float(match[3] or 1)}


# Samples and results


def load_samples(dataset: Path, operation: str, number: int | None) -> list[dict]:
    """Load the first samples of an operation; their images become uint8 arrays, their mask a bool array."""
    paths = sorted(dataset.glob(f"*-{operation}.parquet"))
    if not paths:
        raise ValueError(f"`dataset` {str(dataset)!r} has no file *-{operation}.parquet; write it with compose.py.")
    samples = pq.read_table(paths[0]).slice(0, number).to_pylist()
    for sample in samples:
        for name in ("source", "target"):
            sample[name] = decode_image(sample.pop(f"{name}_image")["bytes"])
        sample["mask"] = decode_image(sample["mask"]["bytes"], "L") > 127
    return samples


def pick_other_prompts(samples: list[dict]) -> list[str]:
    """Pick, for each sample, the prompt of the next one that asks for something else."""
    keys = ("noun", "new_noun", "color", "edit", "place", "others")
    prompts = []
    for index, sample in enumerate(samples):
        others = samples[index + 1 :] + samples[:index]
        asked = [sample[key] for key in keys]
        prompts.append(next((o["prompt"] for o in others if [o[key] for key in keys] != asked), "do nothing"))
    return prompts


def make_images(pipeline: EditARPipeline, samples: list[dict], setting: str, args: Arguments) -> list[Image.Image]:
    """Pass every target through the VQ model, or edit every source. Sample k always has seed `args.seed` + k."""
    is_other = setting == "another instruction"
    prompts = pick_other_prompts(samples) if is_other else [sample["prompt"] for sample in samples]
    images = []
    for start in range(0, len(samples), args.batch_size):
        batch = samples[start : start + args.batch_size]
        size = dict(zip(("height", "width"), batch[0]["source"].shape[:2], strict=True))
        if setting == "ceiling":
            targets = [Image.fromarray(sample["target"]) for sample in batch]
            images += pipeline.decode_image_tokens(pipeline.encode_image(targets, **size), **size)
            continue
        images += pipeline(
            prompts[start : start + args.batch_size],
            image=[Image.fromarray(sample["source"]) for sample in batch],
            task=[sample["task"] for sample in batch],
            **size,
            restore_size=False,
            generator=[torch.Generator().manual_seed(args.seed + start + k) for k in range(len(batch))],
            **parse_setting(args.settings[0] if is_other else setting),
        ).images
    return images


def load_images(pipeline: EditARPipeline, samples: list[dict], setting: str, args: Arguments) -> list[np.ndarray]:
    """Load the images of a setting for samples of one operation; make them first where they are missing."""
    if setting == "untouched source":
        return [sample["source"] for sample in samples]
    folder = args.output_dir / "images" / setting / samples[0]["operation"]
    if not folder.exists():
        with atomic_path(folder) as unfinished:
            unfinished.mkdir()
            for index, image in enumerate(make_images(pipeline, samples, setting, args)):
                image.save(unfinished / f"{index:04d}.png")
    return [decode_image((folder / f"{index:04d}.png").read_bytes()) for index in range(len(samples))]


def check_run(args: Arguments):
    """Refuse to mix images of other models, data or samples; paths count by their last name."""
    run = {name: getattr(args, name) for name in ("num_samples", "num_sweep", "num_control", "seed")}
    run |= {"model": Path(args.model).name, "dataset": args.dataset.name}
    path = args.output_dir / "run.json"
    before = json.loads(path.read_text()) if path.is_file() else run
    for name in run:
        if before[name] != run[name]:
            raise ValueError(
                f"`output_dir` {str(args.output_dir)!r} holds images of `{name}` {before[name]!r}, and this run has "
                f"{run[name]!r}; choose another folder or delete it."
            )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1))


def count_samples(args: Arguments, setting: str) -> int | None:
    """Count the samples an operation of a setting; `None` is all."""
    if setting in (args.settings[0], "ceiling", "untouched source"):
        return args.num_samples
    most = args.num_control if setting in CONTROLS else args.num_sweep
    return most if args.num_samples is None else min(most, args.num_samples)


# Scores


def find_inside(mask: np.ndarray, reach: int) -> np.ndarray:
    """Find the pixels within `reach` pixels, along rows and columns, of the mask: bool."""
    return np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(2 * reach + 1))) > 0


def compute_outside_psnrs(samples: list[dict], images: list[np.ndarray], reach: int) -> np.ndarray:
    """Compute the PSNR to the target farther than `reach` pixels from the mask, (samples,); NaN where nothing is."""
    inside = torch.from_numpy(np.stack([find_inside(s["mask"], reach) for s in samples]))[:, None]
    pixels, targets = ((stack_crops(arrays) + 1) / 2 for arrays in (images, [s["target"] for s in samples]))
    return compute_psnr(pixels, targets, inside, masked_mean=True).numpy()


def split_mask(sample: dict) -> tuple[np.ndarray, np.ndarray]:
    """Split a mask into the part to compare at once and, for a moved object, the part outside its new place."""
    mask = sample["mask"]
    if sample["operation"] != "move":
        return mask, np.zeros_like(mask)
    left, top, right, bottom = sample["box"]
    is_new = np.zeros_like(mask)
    is_new[top:bottom, left:right] = True
    return mask & is_new, mask & ~is_new


class Scorer:
    """Score results against samples, a batch at a time.

    Args:
        network (`FeatureNetwork`): Whose distance says what is near.
        judge (`Judge`): Names objects and colors.
        token_size (`int`): Pixels a side that a token covers.
        device (`str` or `torch.device`): Where both networks are.
    """

    def __init__(self, network: FeatureNetwork, judge: Judge, token_size: int, device):
        self.network, self.judge = network.to(device), judge.to(device)
        self.token_size, self.device = token_size, device

    def compute_maps(self, images: list[np.ndarray]) -> list[torch.Tensor]:
        return self.network(stack_crops(images).to(self.device))

    @torch.no_grad()
    def score(self, samples: list[dict], images: list[np.ndarray], ceilings: list[np.ndarray]) -> list[dict]:
        """Score images of samples of one operation; `ceilings` are the targets passed through the VQ model.

        Returns:
            `list[dict]`: `done` and the marks that it follows from.
        """
        sources, targets = ([sample[name] for sample in samples] for name in ("source", "target"))
        maps = [self.compute_maps(pixels) for pixels in (images, targets, sources)]
        if samples[0]["operation"] in LOCAL:
            return self.score_objects(samples, images, ceilings, self.compare_inside(samples, *maps))
        result, target, source = maps
        own, nearest = (compute_feature_distance(result, other) for other in (target, source))
        is_nearer = own < nearest
        for rival in self.list_rivals(samples, target):
            nearest = torch.minimum(nearest, compute_feature_distance(result, rival))
        pairs = zip((own < nearest).tolist(), is_nearer.tolist(), strict=True)
        return [{"done": done, "nearer": nearer} for done, nearer in pairs]

    def list_rivals(self, samples: list[dict], target: list[torch.Tensor]):
        """Yield the maps of what must be farther away: the other global edits, or the targets of other samples."""
        if samples[0]["operation"] in MAPS:
            for shift in range(1, min(NUM_MAP_TARGETS, len(samples))):
                yield [feature_map.roll(shift, 0) for feature_map in target]
            return
        for edit in GLOBAL_EDITS:
            # In place of the asked edit stands the source, which must be farther away, too.
            yield self.compute_maps(
                [
                    s["source"] if s["edit"] == edit else apply_global_edit(s["source"], edit, GROUND, random.Random(0))
                    for s in samples
                ]
            )

    def compare_inside(self, samples, result, target, source) -> list[bool]:
        """Tell whether results are nearer to the target than to the source, in each part of the mask."""
        is_nearer = torch.ones(len(samples), dtype=torch.bool)
        for parts in zip(*(split_mask(sample) for sample in samples), strict=True):
            mask = torch.from_numpy(np.stack(parts))[:, None].to(self.device)
            to_target, to_source = (compute_feature_distance(result, maps, mask) for maps in (target, source))
            is_nearer &= ((to_target < to_source) | ~mask.any((1, 2, 3))).cpu()
        return is_nearer.tolist()

    def score_objects(self, samples, images, ceilings, is_nearer) -> list[dict]:
        """Score edits of objects."""
        crops = [cut_crop(image, s["box"], self.judge.crop_size) for image, s in zip(images, samples, strict=True)]
        names = self.judge.name(stack_crops(crops).to(self.device))
        psnrs, best = (compute_outside_psnrs(samples, one, self.token_size).tolist() for one in (images, ceilings))
        scores = []
        for index, sample in enumerate(samples):
            noun, color = names[index]
            asked = "" if sample["operation"] == "remove" else sample["new_noun"] or sample["noun"]
            marks = {
                "nearer": is_nearer[index],
                "noun": are_kin(noun, asked),
                "color": sample["color"] == color if sample["color"] else None,
                # Where the mask leaves nothing outside, both are NaN.
                "kept": not psnrs[index] < best[index] - PSNR_TOLERANCE,
            }
            is_done = all(mark is not False for mark in marks.values())
            scores.append({"done": is_done, **marks, "seen": f"{color} {noun}" if noun else "nothing"})
        return scores


def score_all(pipeline: EditARPipeline, scorer: Scorer, args: Arguments) -> tuple[dict, list]:
    """Score every setting: setting → operation → marks of each sample; and edits of the main setting to show."""
    marks = {setting: {} for setting in (*args.controls, *args.settings)}
    shown = []
    for operation in args.operations:
        all_samples = load_samples(args.dataset, operation, args.num_samples)
        ceilings = load_images(pipeline, all_samples, "ceiling", args)
        for setting in marks:
            samples = all_samples[: count_samples(args, setting)]
            images = load_images(pipeline, samples, setting, args)
            scores = []
            for start in range(0, len(samples), args.batch_size):
                batch = slice(start, min(start + args.batch_size, len(samples)))
                scores += scorer.score(samples[batch], images[batch], ceilings[batch])
            kinds = [{kind: sample[kind] for kind in KINDS} for sample in samples]
            marks[setting][operation] = [{**new, **score} for new, score in zip(kinds, scores, strict=True)]
            done = np.mean([score["done"] for score in scores])
            print(f"{setting}, {operation}: {100 * done:.1f} % of {len(scores)}", flush=True)
            if setting == args.settings[0]:
                edits = list(zip(samples, images, scores, strict=True))
                random.Random(f"{args.seed} {operation}").shuffle(edits)
                # From the other end, so that the two sheets show different edits.
                failures = [edit for edit in reversed(edits) if not edit[2]["done"]]
                shown.append([part[: args.num_shown] for part in (edits, failures)])
    return marks, shown


# Reports


def summarize(rows: list[dict]) -> dict:
    """Average the marks of samples, `color` over those that ask for one; `count` says how many samples there are."""
    means = {"count": len(rows)}
    for mark in ("done", *MARKS):
        if values := [row[mark] for row in rows if row.get(mark) is not None]:
            means[mark] = round(float(np.mean(values)), 4)
    return means


def summarize_all(marks: dict, main_setting: str) -> dict:
    """Average marks by setting and operation; for the main setting and the ceiling also by what is new."""
    results = {"settings": {}, "kinds": {}}
    for setting, by_operation in marks.items():
        results["settings"][setting] = {operation: summarize(rows) for operation, rows in by_operation.items()}
        if setting in ("ceiling", main_setting):
            rows = [row for operation in LOCAL for row in by_operation.get(operation, ())]
            results["kinds"][setting] = {
                kind: {
                    "new": summarize([row for row in rows if row[kind]]),
                    "known": summarize([row for row in rows if not row[kind]]),
                }
                for kind in KINDS
            }
    return results


def format_table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def format_percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def format_results(results: dict, main_setting: str) -> str:
    """Format the results as Markdown tables, in percent."""
    settings = results["settings"]
    operations = list(settings[main_setting])
    rows = [
        [setting, *(format_percent(means[operation]["done"]) for operation in operations)]
        for setting, means in settings.items()
    ]
    if "ceiling" in settings:
        pairs = [[settings[name][operation]["done"] for name in (main_setting, "ceiling")] for operation in operations]
        shares = [format_percent(ours / ceiling) if ceiling else "–" for ours, ceiling in pairs]
        rows.append([f"{main_setting}, of the ceiling", *shares])
    parts = [format_table(["setting", *operations], rows)]
    rows = [
        [f"{setting}: {mark}", *(format_percent(settings[setting][operation].get(mark)) for operation in operations)]
        for setting in results["kinds"]
        for mark in MARKS
    ]
    parts.append(format_table(["setting: mark", *operations], [row for row in rows if any(row[1:])]))
    rows = []
    for kind, words in KINDS.items():
        for half, title in (("new", words), ("known", f"no {words}")):
            means = [by_kind[kind][half] for by_kind in results["kinds"].values()]
            rows.append([title, *chain(*((format_percent(m.get("done")), str(m["count"])) for m in means))])
    parts.append(
        format_table(["edits of objects", *chain(*((setting, "count") for setting in results["kinds"]))], rows)
    )
    for name, accuracy in results["judge"].items():
        shares = [f"{kind} {format_percent(share)}" for kind, share in accuracy.items() if kind != "confused"]
        parts.append(f"Accuracy of the judge in percent, {name} crops: {', '.join(shares)}.")
    return "\n\n".join(parts) + "\n"


def draw_sheet(edits_of_operations: list[list[tuple]], number: int) -> Image.Image:
    """Draw edits of all operations in turn: source, result and target, twice as large, under what was asked."""
    in_turn = [edit for edits in zip_longest(*edits_of_operations) for edit in edits if edit is not None]
    cells = []
    for sample, image, score in in_turn[:number]:
        failed = [mark for mark in MARKS if score.get(mark) is False]
        verdict = "done" if score["done"] else "failed: " + (", ".join(failed) or "not nearest")
        images = [Image.fromarray(pixels) for pixels in (sample["source"], image, sample["target"])]
        enlarged = [one.resize((2 * one.width, 2 * one.height), Image.Resampling.BICUBIC) for one in images]
        cells.append(add_caption(build_contact_sheet([enlarged]), f"{sample['prompt']}  [{verdict}]"))
    rows = [cells[start : start + 2] for start in range(0, len(cells), 2)]
    return build_contact_sheet(rows or [[Image.new("RGB", (8, 8), "white")]])


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    for setting in args.settings:
        parse_setting(setting)
    check_run(args)
    pipeline = EditARPipeline.from_pretrained(args.model).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    judge = load_judge(args.judge)
    scorer = Scorer(load_features(args.features), judge, pipeline.vq_model.config.stride, args.device)
    marks, shown = score_all(pipeline, scorer, args)
    results = summarize_all(marks, args.settings[0]) | {"judge": judge.accuracy}
    report = format_results(results, args.settings[0])
    (args.output_dir / "marks.json").write_text(json.dumps(marks))
    (args.output_dir / "scores.json").write_text(json.dumps(results, indent=1))
    (args.output_dir / "scores.md").write_text(report, encoding="utf-8")
    for name, edits in zip(("samples", "failures"), zip(*shown, strict=True), strict=True):
        draw_sheet(edits, args.num_shown).save(args.output_dir / f"{name}.png")
    print(report)


if __name__ == "__main__":
    main()
