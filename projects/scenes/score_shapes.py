"""Score a scene editor on images of several shapes, and on images larger than it works at.

    python projects/scenes/score_shapes.py --model examples/scene-editor --bank bank --features features.safetensors \
        --judge judge.safetensors --output-dir shapes

First, test pairs are composed at each shape that `aspect="source"` chooses, and scored as in `score.py`. Each has
other scenes. Objects are sized by the shorter side, so they have fewer tokens in thin shapes, and smaller objects are
harder to edit. Therefore each shape is also compared with squares whose objects are as small as those of the shape.

Then test pairs are composed larger than the model works at, and edited in four ways: the centered square, the whole
image stretched to a square, `aspect="source"`, and this with `detail="source"`. All four are compared with the target
at its full size.

`output_dir` receives `shapes.json`, with the figures of each shape as soon as it is scored, and `shapes.md`. Figures
that are there are not computed again.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from bank import Bank
from compose import compose_pair
from features import compute_feature_distance, load_features
from PIL import Image
from score import LOCAL, Scorer, compute_outside_psnrs, format_table, make_images, parse_setting
from train_judge import load_judge, stack_crops
from transformers import HfArgumentParser

from editar_hf import EditARPipeline
from editar_hf.evaluation.metrics import compute_psnr
from editar_hf.io import atomic_path


OPERATIONS = (*LOCAL, "global")
# Width to height. The shipped editor was trained at the first ones.
TRAINED_SHAPES = ("1:1", "4:3", "3:4", "16:9", "9:16")
OTHER_SHAPES = ("3:2", "2:3", "5:4", "2:1")
LARGE_SHAPES = ("3:2", "1:1", "16:9")
# Longer side of large images, of that of the model.
SCALE = 3
SQUARES = {"crop": {"resize_mode": "crop"}, "stretch": {"resize_mode": "stretch"}}
WAYS = (*SQUARES, 'aspect="source"', 'detail="source"')


@dataclass
class Arguments:
    model: str = field(metadata={"help": "pipeline folder or Hub id"})
    bank: Path = field(metadata={"help": "folder that build_bank.py made"})
    features: str = field(metadata={"help": "file that features.py made"})
    judge: str = field(metadata={"help": "file that train_judge.py made"})
    output_dir: Path
    setting: str = field(default="sampled-1.5-0.3", metadata={"help": "as in score.py"})
    number: int = field(default=20, metadata={"help": "samples an operation at each shape"})
    num_large: int = field(default=12, metadata={"help": "samples an operation at each larger shape"})
    batch_size: int = 20
    seed: int = 7

    def __post_init__(self):
        parse_setting(self.setting)
        self.settings = [self.setting]


def choose_sizes(pipeline: EditARPipeline, shape: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Choose height and width, in pixels, of images of a shape: those the model works at, and large ones."""
    ratio = Image.new("RGB", tuple(map(int, shape.split(":"))))
    size = pipeline.choose_size([ratio])
    return size, tuple(round(SCALE * max(size) * side / max(ratio.size)) for side in (ratio.height, ratio.width))


def name_square(shape: str) -> str:
    """Name the squares with objects as small as those of a shape; a shape and its upright form have the same."""
    return ":".join(sorted(shape.split(":"), key=int, reverse=True))


def compose_samples(
    bank: Bank, operation: str, size: tuple[int, int], number: int, seed: int, object_scale: float = 1.0
) -> list[dict]:
    """Compose test pairs of an operation, in the form of `score.load_samples`."""
    pairs = [compose_pair(bank, seed, index, "test", *size, operation, object_scale) for index in range(number)]
    return [{**vars(pair), "prompt": pair.instruction} for pair in pairs]


def score_shape(pipeline: EditARPipeline, scorer: Scorer, samples: list[dict], args: Arguments) -> dict[str, list]:
    """Score edits and the ceiling as `score.py` does: setting → marks of each sample."""
    made = {
        setting: [np.asarray(image) for image in make_images(pipeline, samples, setting, args)]
        for setting in ("ceiling", args.setting)
    }
    return {setting: scorer.score(samples, images, made["ceiling"]) for setting, images in made.items()}


def edit_in_ways(pipeline: EditARPipeline, samples: list[dict], args: Arguments) -> dict[str, list[Image.Image]]:
    """Edit samples in every way; of square ones, all but the last are the same."""
    images = [Image.fromarray(sample["source"]) for sample in samples]

    def edit(**how):
        generators = [torch.Generator().manual_seed(args.seed + index) for index in range(len(images))]
        prompts = [sample["prompt"] for sample in samples]
        return pipeline(prompts, image=images, generator=generators, **how, **parse_setting(args.setting))

    is_square = images[0].width == images[0].height
    made = {} if is_square else {way: edit(aspect="model", **how).images for way, how in SQUARES.items()}
    detailed = edit(aspect="source", detail="source")
    decoded = pipeline.decode_image_tokens(detailed.image_tokens, *pipeline.choose_size(images))
    restore = pipeline.processor.image_processor.restore
    plain = [restore(one, image, "stretch") for one, image in zip(decoded, images, strict=True)]
    return {**made, WAYS[-2]: plain, WAYS[-1]: detailed.images}


def score_ways(pipeline: EditARPipeline, scorer: Scorer, samples: list[dict], args: Arguments) -> dict[str, dict]:
    """Compare edits with the target at its full size: way → averages over samples."""
    targets = [sample["target"] for sample in samples]
    target_maps, target_pixels = scorer.compute_maps(targets), (stack_crops(targets) + 1) / 2
    figures = {}
    for way, images in edit_in_ways(pipeline, samples, args).items():
        images = [np.asarray(image) for image in images]
        pixels = (stack_crops(images) + 1) / 2
        # With the images as their own ceilings, the mark `kept` is never missed: the PSNR below stands for it.
        marks = scorer.score(samples, images, images)
        figures[way] = {
            "done": [mark["done"] for mark in marks],
            "psnr": compute_psnr(pixels, target_pixels).tolist(),
            "distance": compute_feature_distance(scorer.compute_maps(images), target_maps).tolist(),
        }
        if samples[0]["operation"] in LOCAL:
            outside = compute_outside_psnrs(samples, images, SCALE * scorer.token_size)
            figures[way]["outside"] = outside[np.isfinite(outside)].tolist()
    return figures


def average(
    figures: dict, shapes: Sequence[str], mark: str, setting: str, operations: Sequence[str]
) -> tuple[float, float]:
    """Average a mark over shapes and operations, in percent. Return the mean and its standard error."""
    mean = variance = 0.0
    for shape, count in Counter(shapes).items():
        groups = [[row[mark] for row in figures[shape][operation][setting]] for operation in operations]
        shares = np.array([np.mean(group) for group in groups])
        numbers = np.array([len(group) for group in groups])
        weight = count / len(shapes)
        mean += weight * shares.mean()
        variance += (weight / len(groups)) ** 2 * (shares * (1 - shares) / numbers).sum()
    return 100 * mean, 100 * variance**0.5


def format_mean(mean_and_error: tuple[float, float]) -> str:
    return "{:.1f} ± {:.1f}".format(*mean_and_error)


def format_shapes(figures: dict, setting: str) -> str:
    """Format the share of edits done, by shape."""
    rows = []
    for shapes in [[shape] for shape in figures] + [TRAINED_SHAPES[1:], OTHER_SHAPES]:
        means = [
            format_mean(average(figures, shapes, *how, OPERATIONS))
            for how in (("done", setting), ("done", "ceiling"), ("nearer", setting))
        ]
        by_operation = [f"{average(figures, shapes, 'done', setting, [name])[0]:.1f}" for name in OPERATIONS]
        rows.append([", ".join(shapes), "yes" if shapes[0] in TRAINED_SHAPES else "no", *means, *by_operation])
    return format_table(["shape", "trained", "done", "ceiling", "nearer", *OPERATIONS], rows)


def format_squares(figures: dict, squares: dict, setting: str) -> str:
    """Format the share of edits of objects done, by shape, beside that in squares with objects of the same size."""
    rows = []
    for shapes in [[shape] for shape in figures if name_square(shape) in squares] + [TRAINED_SHAPES[1:], OTHER_SHAPES]:
        row = [", ".join(shapes)]
        for how in (("done", setting), ("done", "ceiling")):
            shape = average(figures, shapes, *how, LOCAL)
            square = average(squares, [*map(name_square, shapes)], *how, LOCAL)
            row += [format_mean(shape), format_mean(square)]
            row.append(f"{shape[0] - square[0]:+.1f} ± {np.hypot(shape[1], square[1]):.1f}")
        rows.append(row)
    names = ["shape", "square", "difference"]
    return format_table(["", *(f"{mark}: {name}" for mark in ("done", "ceiling") for name in names)], rows)


def format_ways(figures: dict) -> str:
    """Format edits of large images: share done, PSNR in dB and distance, for edits of objects and global ones."""
    rows = []
    for name, by_operation in figures.items():
        for way in by_operation["global"]:
            local = [by_operation[operation][way] for operation in OPERATIONS if operation in LOCAL]
            whole = by_operation["global"][way]
            means = {
                key: np.mean([value for one in local for value in one[key]])
                for key in ("done", "outside", "psnr", "distance")
            }
            cells = [f"{100 * means['done']:.1f}", *(f"{means[key]:.2f}" for key in ("outside", "psnr", "distance"))]
            cells += [
                f"{100 * np.mean(whole['done']):.1f}",
                *(f"{np.mean(whole[k]):.2f}" for k in ("psnr", "distance")),
            ]
            rows.append([name, way, *cells])
    header = ["shape", "way", "objects: done", "PSNR outside", "PSNR", "distance", "global: done", "PSNR", "distance"]
    return format_table(header, rows)


def main(arguments=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    bank = Bank.load(args.bank)
    pipeline = EditARPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scorer = Scorer(load_features(args.features), load_judge(args.judge), pipeline.vq_model.config.stride, "cpu")
    path = args.output_dir / "shapes.json"
    figures = {"shapes": {}, "squares": {}, "ways": {}}
    figures |= json.loads(path.read_text()) if path.exists() else {}
    jobs = []
    for shape in (*TRAINED_SHAPES, *OTHER_SHAPES):
        size, large_size = choose_sizes(pipeline, shape)
        side = max(size)
        jobs.append(("shapes", shape, score_shape, OPERATIONS, (size, args.number, args.seed)))
        if shape == name_square(shape) != "1:1":
            how = ((side, side), args.number, args.seed, min(size) / side)
            jobs.append(("squares", shape, score_shape, LOCAL, how))
        if shape in LARGE_SHAPES:
            jobs.append(("ways", shape, score_ways, OPERATIONS, (large_size, args.num_large, args.seed)))
    for part, shape, score, operations, how in jobs:
        if shape not in figures[part]:
            figures[part][shape] = {
                operation: score(pipeline, scorer, compose_samples(bank, operation, *how), args)
                for operation in operations
            }
            with atomic_path(path) as unfinished:
                unfinished.write_text(json.dumps(figures))
            print(f"{part}, {shape} is scored", flush=True)
    parts = [
        format_shapes(figures["shapes"], args.setting),
        format_squares(figures["shapes"], figures["squares"], args.setting),
        format_ways(figures["ways"]),
    ]
    report = "\n\n".join(parts) + "\n"
    (args.output_dir / "shapes.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
