"""The pictures of a report: bars by category, guidance against what it trades off, and contact sheets."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .files import decode_number, write_file
from .measures import METRICS
from .runs import read_image
from .samples import Benchmark, Sample
from .scoring import find_predictions, read_scores
from .tasks import TASKS


# In pixels: pictures of a sheet, the space between them, a line of text.
SIDE, GAP, LINE = 160, 6, 18
# Of a plot, in inches.
WIDEST = 16
# How many of the best and of the worst predictions a sheet has.
NUM_EACH = 4


def draw_pictures(runs: Sequence, output_dir: Path) -> list[tuple[str, Path]]:
    """Draw all pictures of a report; a list of (title, file).

    Args:
        runs (sequence of `report.Run`): The runs.
        output_dir (`Path`): Where to.
    """
    pictures = [draw_category_bars(runs, output_dir), draw_guidance(runs, output_dir)]
    return [
        picture for picture in (*pictures, *(draw_sheet_of(run, output_dir) for run in runs)) if picture is not None
    ]


def draw_category_bars(runs: Sequence, output_dir: Path) -> tuple[str, Path] | None:
    """Draw the first metric that single samples have, by category, with a bar for each run."""
    categories = list(runs[0].metrics["categories"])
    metric = pick_metric(runs[0])
    if len(categories) < 2 or metric is None:
        return None
    figure, axes = make_axes(1, width=min(1.5 + 0.35 * len(categories) * (1 + len(runs)), WIDEST))
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        places = [place + width * (number - (len(runs) - 1) / 2) for place in range(len(categories))]
        axes[0].bar(places, [run.get_scaled(metric, category) for category in categories], width, label=run.name)
    axes[0].set_xticks(range(len(categories)), categories, rotation=45, ha="right")
    axes[0].set_ylabel(METRICS[metric].heading)
    if len(runs) > 1:
        axes[0].legend(ncols=len(runs), loc="lower left", bbox_to_anchor=(0, 1), fontsize="small")
    return f"{METRICS[metric].title} by category", save_figure(figure, output_dir / "categories.png")


def draw_guidance(runs: Sequence, output_dir: Path) -> tuple[str, Path] | None:
    """Draw the two metrics that guidance trades off, a line for runs that differ in their guidance scale alone."""
    lines = [line for line in group_by_guidance(runs).values() if len(line) > 1]
    names = [name for name in TASKS[runs[0].task].trade_off if name in runs[0].metrics["overall"]]
    if not lines or not names:
        return None
    figure, axes = make_axes(len(names), width=6)
    for axis, name in zip(axes, names, strict=True):
        for line in lines:
            label = f"{line[0].name} … {line[-1].name}"
            scales = [run.system["guidance_scale"] for run in line]
            axis.plot(scales, [run.get_scaled(name) for run in line], marker="o", label=label)
        axis.set_ylabel(METRICS[name].heading)
    axes[-1].set_xlabel("guidance scale")
    if len(lines) > 1:
        axes[0].legend()
    return "Guidance", save_figure(figure, output_dir / "guidance.png")


def group_by_guidance(runs: Sequence) -> dict[str, list]:
    """Group runs that are alike but for their guidance scales, each group in the order of these."""
    groups = {}
    for run in runs:
        if run.system.get("guidance_scale") is not None:
            # A run's seed, batch size and versions too.
            others = run.config["generation"] | {"system": run.system | {"guidance_scale": None}}
            groups.setdefault(json.dumps(others, sort_keys=True), []).append(run)
    return {key: sorted(group, key=lambda run: run.system["guidance_scale"]) for key, group in groups.items()}


def make_axes(count: int, width: float):
    """Make a figure of plots one above another, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 1 + 2.5 * count), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(count, sharex=True, squeeze=False)[:, 0]


def save_figure(figure, path: Path) -> Path:
    """Save a figure, without the version of the library in it."""
    write_file(path, lambda unfinished: figure.savefig(unfinished, format="png", dpi=100, metadata={"Software": None}))
    return path


def pick_metric(run) -> str | None:
    """Pick the first metric that single samples have."""
    return next((name for name in run.metrics["overall"] if METRICS[name].reduce is None), None)


# Contact sheets


def draw_sheet_of(run, output_dir: Path) -> tuple[str, Path] | None:
    """Draw a run's best and worst predictions, where its samples and predictions are still at hand."""
    if not run.paths["data"].is_dir() or not run.paths["images"].is_dir():
        return None
    benchmark = Benchmark(run.paths["data"])
    predictions = find_predictions(benchmark, run.paths["images"])
    metric = pick_metric(run)
    # Only what was scored is shown, and as it was scored: not what does not decode, nor what was made anew since.
    sound = {name: line["values"] for name, line in read_scores(run.folder, predictions).items() if "values" in line}
    values = {name: decode_number(found.get(metric)) for name, found in sound.items()}
    chosen = choose_samples([name for name in benchmark.ids if name in sound], values, metric)
    rows = []
    for title, sample_id in chosen:
        sample = benchmark[benchmark.ids.index(sample_id)]
        value = METRICS[metric].format(values[sample_id] * METRICS[metric].factor) if metric else ""
        checks = describe_checks(sound[sample_id], metric)
        rows.append((f"{title} {value}{checks}", sample, read_image(predictions[sample_id].path)))
    if not rows:
        return None
    path = output_dir / f"{run.name}-sheet.png"
    sheet = draw_sheet(rows)
    write_file(path, lambda unfinished: sheet.save(unfinished, "PNG", optimize=True))
    heading = f": best and worst by {METRICS[metric].title}" if metric else ""
    return f"{run.name}{heading}; source, mask, output, target", path


def choose_samples(ids: Sequence[str], values: dict[str, float], metric: str | None) -> list[tuple[str, str]]:
    """Choose the best and the worst samples as (which, id), none twice; the first ones where none has a value."""
    ranked = [sample_id for sample_id in ids if not math.isnan(values.get(sample_id, math.nan))]
    if not ranked:
        return [("", sample_id) for sample_id in ids[: 2 * NUM_EACH]]
    ranked.sort(key=values.get, reverse=METRICS[metric].higher_is_better)
    best = ranked[:NUM_EACH]
    worst = ranked[len(best) :][::-1][:NUM_EACH]
    return [("best:", sample_id) for sample_id in best] + [("worst:", sample_id) for sample_id in worst]


def describe_checks(values: dict[str, float | str | None], metric: str | None) -> str:
    """Say which checks a prediction passed, so that a sheet shows why one failed.

    Args:
        values (`dict`): The prediction's values, as they are recorded.
        metric (`str`, *optional*): The metric that ranks the predictions, which is left out.
    """
    found = {name: decode_number(value) for name, value in values.items() if METRICS[name].is_share and name != metric}
    answers = {0: "no", 1: "yes"}
    return "".join(
        f", {METRICS[name].title}: {answers.get(value) or METRICS[name].format(value * METRICS[name].factor)}"
        for name, value in found.items()
        if not math.isnan(value)
    )


def draw_sheet(rows: Sequence[tuple[str, Sample, Image.Image]]) -> Image.Image:
    """Lay out source | mask | output | target of each row, with what was asked and its value underneath."""
    font, width = ImageFont.load_default(size=12), 4 * SIDE + 3 * GAP
    height = SIDE + 2 * LINE + 2 * GAP
    sheet = Image.new("RGB", (width, height * len(rows)), "white")
    for number, (title, sample, prediction) in enumerate(rows):
        pictures = (sample.source_image, sample.mask, prediction, sample.target_image)
        for place, picture in enumerate(pictures):
            if picture is not None:
                sheet.paste(fit_picture(picture), (place * (SIDE + GAP), number * height))
        for line, text in enumerate((f"{sample.id} {title}", sample.prompt)):
            position = (0, number * height + SIDE + GAP + line * LINE)
            ImageDraw.Draw(sheet).text(position, cut_text(text, font, width), "black", font)
    return sheet


def fit_picture(picture: Image.Image) -> Image.Image:
    """Scale a picture to a sheet's square: small ones without blur."""
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def cut_text(text: str, font, width: int) -> str:
    """Cut a text that is longer than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
