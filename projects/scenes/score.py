"""Score a scene editor on held-out samples: which share of the edits it carries out, by operation and by what is new.

    python projects/scenes/score.py --model editor --dataset scenes-test --features features.safetensors \
        --judge judge.safetensors --output_dir scores --settings greedy-3 sampled-3 greedy-1

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
given another sample's instruction. `output_dir` holds `scores.json`, `scores.md`, `samples.png`, `failures.png`, and in
`parts/` the images and scores of each setting and operation: a run that was interrupted goes on after them, and
`--rescore` scores these images again, with another judge or on another machine, without editing anew.
"""

import io
import json
import random
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from compose import MAPS, OPERATIONS
from features import FeatureNetwork, compute_feature_distance, load_features
from global_edits import GLOBAL_EDITS, apply_global_edit
from PIL import Image, ImageDraw, ImageFilter
from train_judge import Judge, are_kin, cut_crop, load_judge, stack_crops
from transformers import HfArgumentParser

from editar_hf import EditARPipeline
from editar_hf.io import atomic_path


CONTROLS = ("ceiling", "untouched source", "another instruction")
LOCAL = tuple(operation for operation in OPERATIONS if operation not in (*MAPS, "global"))
# What a sample may have that training never showed, and the words for it.
KINDS = {
    "new_photograph": "new photograph",
    "new_view": "new view or model",
    "new_model": "new model",
    "new_color_pair": "new color–noun pair",
}
# What an edit of an object must have; `nearer` is reported of global edits, too.
MARKS = ("nearer", "noun", "color", "kept")
PSNR_TOLERANCE = 1.0
NUM_MAP_TARGETS = 16
# The ground line that the other global edits are drawn with: the data set does not name the true one.
GROUND = 0.5


@dataclass
class Arguments:
    model: str = field(metadata={"help": "pipeline folder or Hub id"})
    dataset: str = field(metadata={"help": "folder that compose.py wrote"})
    features: str = field(metadata={"help": "file that features.py made"})
    judge: str = field(metadata={"help": "file that train_judge.py made"})
    output_dir: str
    settings: list[str] = field(
        default_factory=lambda: ["greedy-3"],
        metadata={"help": "such as greedy-3, sampled-1, sampled-1.5-0.3; the first one is the main one"},
    )
    controls: list[str] = field(
        default_factory=lambda: list(CONTROLS),
        metadata={"help": "which of ceiling, untouched source, another instruction"},
    )
    operations: list[str] = field(default_factory=lambda: list(OPERATIONS))
    num_samples: int | None = field(default=None, metadata={"help": "samples an operation; default: all"})
    num_sweep: int = field(default=100, metadata={"help": "samples an operation for other settings than the first"})
    num_control: int = field(default=100, metadata={"help": "samples an operation for another instruction"})
    num_shown: int = field(default=12, metadata={"help": "edits, and failures, on the sheets"})
    rescore: bool = field(default=False, metadata={"help": "score the images of an earlier run again"})
    batch_size: int = 64
    device: str = "cpu"
    dtype: str = field(default="float32", metadata={"help": "of the editor"})
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


# Samples


def decode_image(encoded: dict, mode: str = "RGB") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded["bytes"])).convert(mode))


def load_samples(dataset: str, operation: str, number: int | None) -> list[dict]:
    """Load the first samples of an operation; their images become uint8 arrays, their mask a bool array."""
    paths = sorted(Path(dataset).glob(f"*-{operation}.parquet"))
    if not paths:
        raise ValueError(f"`dataset` {dataset!r} has no file *-{operation}.parquet; write it with compose.py.")
    samples = pq.read_table(paths[0]).slice(0, number).to_pylist()
    for sample in samples:
        sample["source"], sample["target"] = (
            decode_image(sample.pop(f"{name}_image")) for name in ("source", "target")
        )
        sample["mask"] = decode_image(sample["mask"], "L") > 127
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


# Results


def edit_samples(pipeline: EditARPipeline, samples: list[dict], prompts: list[str], setting: str, args: Arguments):
    """Edit every sample: uint8 arrays of the samples' sizes. Sample k always has seed `args.seed` + k."""
    images = []
    for start in range(0, len(samples), args.batch_size):
        batch = samples[start : start + args.batch_size]
        height, width = batch[0]["source"].shape[:2]
        images += pipeline(
            prompts[start : start + args.batch_size],
            image=[Image.fromarray(sample["source"]) for sample in batch],
            task=[sample["task"] for sample in batch],
            height=height,
            width=width,
            restore_size=False,
            generator=[torch.Generator().manual_seed(args.seed + start + k) for k in range(len(batch))],
            **parse_setting(setting),
        ).images
    return [np.asarray(image) for image in images]


def pass_through_vq_model(pipeline: EditARPipeline, images: list[np.ndarray], batch_size: int) -> list[np.ndarray]:
    passed = []
    for start in range(0, len(images), batch_size):
        batch = [Image.fromarray(image) for image in images[start : start + batch_size]]
        size = {"height": batch[0].height, "width": batch[0].width}
        passed += pipeline.decode_image_tokens(pipeline.encode_image(batch, **size), **size)
    return [np.asarray(image) for image in passed]


# Scores


def find_outside(mask: np.ndarray, reach: int) -> np.ndarray:
    """Find the pixels farther than `reach` pixels, along rows and columns, from the mask: bool."""
    return np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(2 * reach + 1))) == 0


def compute_psnr(image: np.ndarray, target: np.ndarray, region: np.ndarray) -> float:
    """Compute the PSNR, in dB, of uint8 images over a region (bool); infinite if nothing differs there."""
    error = np.square(image[region].astype(float) - target[region]).mean() if region.any() else 0
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


class Scorer:
    """Score results against samples, a batch at a time.

    Args:
        network (`FeatureNetwork`): Whose distance says what is near.
        judge (`Judge`): Names objects and colors.
        token_size (`int`): Pixels a side that a token covers.
        device (`str` or `torch.device`): Where both networks are.
    """

    def __init__(self, network: FeatureNetwork, judge: Judge, token_size: int, device):
        self.network, self.judge, self.token_size, self.device = (
            network.to(device),
            judge.to(device),
            token_size,
            device,
        )

    @torch.no_grad()
    def compute_maps(self, images: list[np.ndarray]) -> list[torch.Tensor]:
        return self.network(stack_crops(images).to(self.device))

    def score(self, samples: list[dict], images: list[np.ndarray], ceilings: list[np.ndarray]) -> list[dict]:
        """Score images of samples of one operation; `ceilings` are the targets passed through the VQ model.

        Returns:
            `list[dict]`: `done` and the marks that it follows from.
        """
        operation = samples[0]["operation"]
        if operation == "global":
            return self.score_global(samples, images)
        return self.score_maps(samples, images) if operation in MAPS else self.score_local(samples, images, ceilings)

    def score_local(self, samples, images, ceilings):
        is_nearer = self.compare_inside(samples, images)
        crops = stack_crops(
            [cut_crop(image, s["box"], self.judge.crop_size) for image, s in zip(images, samples, strict=True)]
        )
        names = self.judge.name(crops.to(self.device))
        scores = []
        for index, (sample, image) in enumerate(zip(samples, images, strict=True)):
            noun, color = names[index]
            asked = "" if sample["operation"] == "remove" else sample["new_noun"] or sample["noun"]
            has_color = sample["color"] == color if sample["color"] else None
            outside = find_outside(sample["mask"], self.token_size)
            psnr, ceiling = (compute_psnr(one, sample["target"], outside) for one in (image, ceilings[index]))
            marks = {
                "nearer": is_nearer[index],
                "noun": are_kin(noun, asked),
                "color": has_color,
                "kept": psnr >= ceiling - PSNR_TOLERANCE,
            }
            is_done = all(mark is not False for mark in marks.values())
            scores.append({"done": is_done, **marks, "seen": f"{color} {noun}" if noun else "nothing"})
        return scores

    @torch.no_grad()
    def compare_inside(self, samples, images) -> list[bool]:
        """Tell whether results are nearer to the target than to the source, in each part of the mask."""
        result, target, source = (
            self.compute_maps(pixels)
            for pixels in (images, [s["target"] for s in samples], [s["source"] for s in samples])
        )
        is_nearer = torch.ones(len(samples), dtype=torch.bool)
        for parts in zip(*(split_mask(sample) for sample in samples), strict=True):
            mask = torch.from_numpy(np.stack(parts))[:, None].to(self.device)
            to_target, to_source = (compute_feature_distance(result, maps, mask) for maps in (target, source))
            is_nearer &= (to_target < to_source).cpu() | ~mask.any((1, 2, 3)).cpu()
        return is_nearer.tolist()

    @torch.no_grad()
    def score_global(self, samples, images):
        result, target, source = (
            self.compute_maps(pixels)
            for pixels in (images, [s["target"] for s in samples], [s["source"] for s in samples])
        )
        to_target, to_source = (compute_feature_distance(result, maps).cpu() for maps in (target, source))
        nearest = to_source.clone()
        for edit in GLOBAL_EDITS:
            others = [apply_global_edit(sample["source"], edit, GROUND, random.Random(0)) for sample in samples]
            distance = compute_feature_distance(result, self.compute_maps(others)).cpu()
            is_other = torch.tensor([sample["edit"] != edit for sample in samples])
            nearest = torch.where(is_other, torch.minimum(nearest, distance), nearest)
        scores = []
        for near, is_nearer in zip((to_target < nearest).tolist(), (to_target < to_source).tolist(), strict=True):
            scores.append({"done": near, "nearer": is_nearer})
        return scores

    @torch.no_grad()
    def score_maps(self, samples, images):
        result, target, source = (
            self.compute_maps(pixels)
            for pixels in (images, [s["target"] for s in samples], [s["source"] for s in samples])
        )
        own, nearest = (compute_feature_distance(result, maps) for maps in (target, source))
        for shift in range(1, min(NUM_MAP_TARGETS, len(samples))):
            others = [feature_map.roll(shift, 0) for feature_map in target]
            nearest = torch.minimum(nearest, compute_feature_distance(result, others))
        return [{"done": near} for near in (own < nearest).tolist()]


def split_mask(sample: dict) -> tuple[np.ndarray, np.ndarray]:
    """Split a mask into the part to compare at once and, for a moved object, the part outside its new place."""
    mask = sample["mask"]
    if sample["operation"] != "move":
        return mask, np.zeros_like(mask)
    left, top, right, bottom = sample["box"]
    is_new = np.zeros_like(mask)
    is_new[top:bottom, left:right] = True
    return mask & is_new, mask & ~is_new


# Parts: what one setting made of one operation


def write_part(path: Path, samples: list[dict], images: list[np.ndarray], scores: list[dict]):
    """Write the images, compressed, with their scores and with what is new about the samples."""
    rows = []
    for sample, image, score in zip(samples, images, scores, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "WEBP", quality=90)
        kinds = {kind: sample[kind] for kind in KINDS}
        rows.append({"index": sample["index"], "image": buffer.getvalue(), **kinds, **score})
    write_rows(path, rows)


def write_rows(path: Path, rows: list[dict]):
    with atomic_path(path) as unfinished:
        pq.write_table(pa.Table.from_pylist(rows), unfinished)


def read_part(path: Path, with_images: bool = False) -> list[dict]:
    columns = [name for name in pq.read_schema(path).names if with_images or name != "image"]
    return pq.read_table(path, columns=columns).to_pylist()


def check_run(folder: Path, args: Arguments):
    """Refuse to mix parts of other models, data or samples; paths count by their last name."""
    names = ["model", "dataset", "num_samples", "num_sweep", "num_control", "seed"]
    if not args.rescore:
        names += ["features", "judge"]
    paths = ("model", "dataset", "features", "judge")
    run = {name: Path(value).name if name in paths else value for name, value in asdict(args).items()}
    path = folder / "run.json"
    before = json.loads(path.read_text()) if path.is_file() else run
    for name in names:
        if before[name] != run[name]:
            raise ValueError(
                f"`output_dir` {str(folder)!r} holds scores of `{name}` {before[name]!r}, and this run has "
                f"{run[name]!r}; choose another folder or delete it."
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1))


def count_samples(args: Arguments, setting: str) -> int | None:
    """Count the samples an operation of a setting; `None` is all."""
    if setting == args.settings[0] or setting in ("ceiling", "untouched source"):
        return args.num_samples
    most = args.num_control if setting in CONTROLS else args.num_sweep
    return most if args.num_samples is None else min(most, args.num_samples)


def make_images(pipeline, samples, setting, ceilings, args) -> list[np.ndarray]:
    if setting == "ceiling":
        return ceilings
    if setting == "untouched source":
        return [sample["source"] for sample in samples]
    is_other = setting == "another instruction"
    prompts = pick_other_prompts(samples) if is_other else [sample["prompt"] for sample in samples]
    return edit_samples(pipeline, samples, prompts, args.settings[0] if is_other else setting, args)


def score_operation(pipeline, scorer: Scorer, operation: str, args: Arguments, folder: Path):
    """Write the parts of an operation that are missing."""
    all_samples = ceilings = None
    for setting in (*args.controls, *args.settings):
        path = folder / "parts" / setting / f"{operation}.parquet"
        if path.is_file() and not args.rescore:
            continue
        if all_samples is None:
            all_samples = load_samples(args.dataset, operation, args.num_samples)
            targets = [sample["target"] for sample in all_samples]
            ceilings = pass_through_vq_model(pipeline, targets, args.batch_size)
        samples = all_samples[: count_samples(args, setting)]
        if path.is_file():
            rows = read_part(path, with_images=True)
            images = [np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")) for row in rows]
            samples = samples[: len(images)]
        else:
            images = make_images(pipeline, samples, setting, ceilings[: len(samples)], args)
        scores = []
        for start in range(0, len(samples), args.batch_size):
            batch = slice(start, start + args.batch_size)
            scores += scorer.score(samples[batch], images[batch], ceilings[batch])
        if path.is_file():
            write_rows(path, [{**row, **score} for row, score in zip(rows, scores, strict=True)])
        else:
            write_part(path, samples, images, scores)
        done = np.mean([score["done"] for score in scores])
        print(f"{setting}, {operation}: {100 * done:.1f} % of {len(scores)}", flush=True)


# Reports


def summarize(rows: list[dict]) -> dict:
    """Average the marks of samples, `color` over those that ask for one; `count` says how many samples there are."""
    means = {"count": len(rows)}
    for mark in ("done", *MARKS):
        if values := [row[mark] for row in rows if row.get(mark) is not None]:
            means[mark] = round(float(np.mean(values)), 4)
    return means


def collect_results(args: Arguments, folder: Path) -> dict:
    """Collect setting → operation → means, and for the main setting and the ceiling the means by what is new."""
    results = {"settings": {}, "kinds": {}}
    for setting in (*args.controls, *args.settings):
        parts = {
            operation: read_part(folder / "parts" / setting / f"{operation}.parquet") for operation in args.operations
        }
        results["settings"][setting] = {operation: summarize(rows) for operation, rows in parts.items()}
        if setting not in ("ceiling", args.settings[0]):
            continue
        rows = [row for operation, part in parts.items() if operation in LOCAL for row in part]
        results["kinds"][setting] = {}
        for kind in KINDS:
            halves = {True: [row for row in rows if row[kind]], False: [row for row in rows if not row[kind]]}
            results["kinds"][setting][kind] = {
                "new" if is_new else "known": summarize(half) for is_new, half in halves.items() if half
            }
    return results


def format_results(results: dict, main_setting: str) -> str:
    """Format the results as Markdown tables, in percent."""
    settings = results["settings"]
    operations = list(settings[main_setting])
    lines = ["| setting | " + " | ".join(operations) + " |", "|---|" + "---|" * len(operations)]
    for setting, means in settings.items():
        cells = [f"{100 * means[operation]['done']:.1f}" for operation in operations]
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    if "ceiling" in settings:
        shares = []
        for operation in operations:
            ceiling = settings["ceiling"][operation]["done"]
            shares.append(f"{100 * settings[main_setting][operation]['done'] / ceiling:.1f}" if ceiling else "–")
        lines.append(f"| {main_setting}, of the ceiling | " + " | ".join(shares) + " |")
    lines += ["", "| setting: mark | " + " | ".join(operations) + " |", "|---|" + "---|" * len(operations)]
    for setting in results["kinds"]:
        for mark in MARKS:
            means = [settings[setting][operation].get(mark) for operation in operations]
            if any(mean is not None for mean in means):
                cells = ["" if mean is None else f"{100 * mean:.1f}" for mean in means]
                lines.append(f"| {setting}: {mark} | " + " | ".join(cells) + " |")
    lines += ["", "| edits of objects | " + " | ".join(f"{setting} | count" for setting in results["kinds"]) + " |"]
    lines.append("|---|" + "---|---|" * len(results["kinds"]))
    for kind, words in KINDS.items():
        for half in ("new", "known"):
            means = [by_kind[kind].get(half) for by_kind in results["kinds"].values()]
            if any(means):
                cells = [f"{100 * m['done']:.1f} | {m['count']}" if m else " | 0" for m in means]
                lines.append(f"| {words if half == 'new' else 'no ' + words} | " + " | ".join(cells) + " |")
    for name, accuracy in results["judge"].items():
        shares = [f"{kind} {100 * share:.1f}" for kind, share in accuracy.items() if kind != "confused"]
        lines += ["", f"Accuracy of the judge in percent, {name} crops: {', '.join(shares)}."]
    return "\n".join(lines) + "\n"


def pick_rows(args: Arguments, folder: Path, failures_alone: bool) -> list[tuple[dict, dict]]:
    """Pick (sample, row) of the main setting by a fixed seed, from all operations in turn."""
    drawn = {}
    for operation in args.operations:
        rows = read_part(folder / "parts" / args.settings[0] / f"{operation}.parquet", with_images=True)
        numbers = [number for number, row in enumerate(rows) if not (failures_alone and row["done"])]
        random.Random(f"{args.seed} {operation}").shuffle(numbers)
        drawn[operation] = [(number, rows[number]) for number in numbers[: args.num_shown]]
    picked = []
    for place in range(args.num_shown):
        picked += [(operation, *drawn[operation][place]) for operation in drawn if place < len(drawn[operation])]
    picked = sorted(picked[: args.num_shown], key=lambda pick: args.operations.index(pick[0]))
    samples = {
        operation: load_samples(args.dataset, operation, 1 + max(n for o, n, _ in picked if o == operation))
        for operation in {operation for operation, _, _ in picked}
    }
    return [(samples[operation][number], row) for operation, number, row in picked]


def draw_sheet(picks: list[tuple[dict, dict]], columns: int = 2, scale: int = 2, text_height: int = 14) -> Image.Image:
    """Draw source, result and target of each pick, enlarged, under its prompt and whether it counts as done."""
    height = scale * max((sample["source"].shape[0] for sample, _ in picks), default=8)
    width = scale * max((sample["source"].shape[1] for sample, _ in picks), default=8)
    cell = (3 * width + 12, height + text_height + 6)
    sheet = Image.new("RGB", (columns * cell[0], max(1, -(-len(picks) // columns)) * cell[1]), "white")
    drawing = ImageDraw.Draw(sheet)
    for number, (sample, row) in enumerate(picks):
        left, top = number % columns * cell[0], number // columns * cell[1]
        failed = [mark for mark in MARKS if row.get(mark) is False]
        verdict = "done" if row["done"] else "failed: " + (", ".join(failed) or "not nearest")
        drawing.text((left + 2, top), f"{sample['prompt']}  [{verdict}]", fill="black")
        result = np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB"))
        for place, pixels in enumerate((sample["source"], result, sample["target"])):
            image = Image.fromarray(pixels)
            image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
            sheet.paste(image, (left + place * (width + 2), top + text_height))
    return sheet


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    for setting in args.settings:
        parse_setting(setting)
    for name, known in (("controls", CONTROLS), ("operations", OPERATIONS)):
        if unknown := set(getattr(args, name)) - set(known):
            raise ValueError(f"`{name}` holds {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
    folder = Path(args.output_dir)
    check_run(folder, args)
    pipeline = EditARPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    judge = load_judge(args.judge)
    scorer = Scorer(load_features(args.features), judge, pipeline.vq_model.config.stride, args.device)
    for operation in args.operations:
        score_operation(pipeline, scorer, operation, args, folder)
    results = collect_results(args, folder) | {"judge": judge.accuracy}
    (folder / "scores.json").write_text(json.dumps(results, indent=1))
    (folder / "scores.md").write_text(format_results(results, args.settings[0]), encoding="utf-8")
    draw_sheet(pick_rows(args, folder, failures_alone=False)).save(folder / "samples.png")
    draw_sheet(pick_rows(args, folder, failures_alone=True)).save(folder / "failures.png")
    print((folder / "scores.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
