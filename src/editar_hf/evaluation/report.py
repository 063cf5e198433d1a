"""Reports: runs beside one another and beside published figures, as a page with tables, plots and contact sheets."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .benchmarks import BENCHMARKS, Sample
from .run import (
    CONFIG_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    decode_number,
    find_predictions,
    read_config,
    read_image,
    write_text,
)
from .table import METRICS, PROTOCOLS


REPORT_FILE = "report.md"
LOSSLESS = (".png", ".bmp")
# Rows of published tables with scaled means as printed, and the protocols beside which figures of a source stand: those
# of the paper's own code. ControlNet++ and NEP are quoted with figures that all protocols compute alike.
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
# In pixels: images of a sheet, the space between them, a line of text.
SIDE, GAP, LINE = 160, 6, 18
# How many of the best and of the worst predictions a sheet has.
NUM_EACH = 4


class Run:
    """A run that was scored, read from its folder.

    Raises:
        ValueError: If the folder holds none.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        for name in (CONFIG_FILE, METRICS_FILE):
            if not (self.folder / name).exists():
                raise ValueError(f"`runs` has {str(folder)!r}, which has no {name}: score its predictions first.")
        self.name = self.folder.resolve().name
        self.metrics = json.loads((self.folder / METRICS_FILE).read_text(encoding="utf-8"))
        config = read_config(self.folder)
        self.generation, self.scoring = config.get("generation", {}), config["scoring"]
        self.system = self.generation.get("system", {})

    @property
    def benchmark(self) -> str:
        return self.metrics["benchmark"]

    def get_scaled(self, metric: str, category: str | None = None) -> float:
        """Return a scaled mean, over all or over a category; NaN if it is undefined."""
        group = self.metrics["overall"] if category is None else self.metrics["categories"][category]
        return decode_number(group[metric]["scaled"]) if metric in group else math.nan

    def list_remarks(self) -> list[str]:
        """List what keeps the figures from being compared with published ones, or reduces their number."""
        metrics, remarks = self.metrics, []
        if self.system.get("use_masks"):
            remarks.append("mask-assisted: it was given the benchmark's masks; not comparable")
        if not metrics["is_complete"]:
            remarks.append(f"{metrics['num_samples']} samples, a part of the benchmark; not comparable")
        for entry in metrics["not_comparable"]:
            remarks.append(f"{entry['reason']}; not comparable with published figures")
        if metrics["num_scored"] < metrics["num_expected"]:
            remarks.append(f"{metrics['num_scored']} of {metrics['num_expected']} predictions scored")
        for kind, names in metrics["problems"].items():
            if names:
                more = [f"and {len(names) - 5} more"] if len(names) > 5 else []
                remarks.append(f"{kind}: {', '.join([*names[:5], *more])}")
        if lossy := [suffix for suffix in metrics["formats"] if suffix not in LOSSLESS]:
            remarks.append(f"predictions are {', '.join(lossy)} files, which change pixels")
        return remarks

    def describe(self) -> str:
        """Return one list item: how the run was made, and what to mind about it."""
        metrics, made, options = self.metrics, "predictions of an unnamed system", ""
        if self.system:
            made = f"{self.system['name']} {self.system.get('model', '')}".strip()
            shown = self.system | {name: self.generation[name] for name in ("seed", "batch_size")}
            hidden = ("name", "model", "revisions", "use_masks")
            options = ", ".join(f"{k} {value}" for k, value in shown.items() if k not in hidden and value is not None)
        fewer = [
            f"{METRICS[name].title} of {figure['n']}"
            for name, figure in metrics["overall"].items()
            if figure["n"] < metrics["num_scored"]
        ]
        samples = ", ".join([f"{metrics['num_scored']} samples", *fewer])
        remarks = "".join(f"; **{remark}**" for remark in self.list_remarks())
        return f"* {self.name}: {made}{f' ({options})' if options else ''}; {samples}{remarks}"

    def describe_scoring(self) -> str:
        """Return the versions, the kind of device and the networks that the run was scored with."""
        versions = ", ".join(f"{package} {version}" for package, version in self.scoring["versions"].items())
        models = "".join(f"; {name}: {model['id']}" for name, model in self.scoring["models"].items())
        return f"Scored on {self.scoring['device']} with {versions}{models}."


def write_report(folders: Sequence[str | Path], output_dir: str | Path) -> Path:
    """Write the report of runs of one benchmark, scored in one way: a page, plots, and a contact sheet for each run.

    Args:
        folders (sequence of `str` or `Path`): The runs.
        output_dir (`str` or `Path`): Where to; may be a run's own folder.

    Returns:
        The page.

    Raises:
        ValueError: If the runs are not scored, not about the same samples, not scored in the same way and by the same
            networks, or a folder is named twice.
    """
    runs, output_dir = [Run(folder) for folder in folders], Path(output_dir)
    name_runs(runs)
    check_alike(runs)
    output_dir.mkdir(parents=True, exist_ok=True)
    images = [draw_category_bars(runs, output_dir), draw_guidance(runs, output_dir)]
    images += [draw_best_and_worst(run, output_dir) for run in runs]
    page = output_dir / REPORT_FILE
    write_text(page, compose_report(runs, [image for image in images if image is not None]))
    return page


def name_runs(runs: Sequence[Run]) -> None:
    """Name runs by the last part of their folders, and by as many more as tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    else:
        raise ValueError(f"`runs` has a folder twice, of {', '.join(str(run.folder) for run in runs)}; name each once.")
    for run, name in zip(runs, names, strict=True):
        run.name = name


def check_alike(runs: Sequence[Run]) -> None:
    """Check that runs are about the same samples and scored by the same protocol and networks."""
    found = {name: {run.name: run.metrics[name] for run in runs} for name in ("fingerprint", "protocol")}
    for run in runs:
        for name, model in run.scoring["models"].items():
            found.setdefault(f"{name} model", {})[run.name] = model["revision"]
    for name, values in found.items():
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{run} has {value}" for run, value in values.items())
            raise ValueError(f"`runs` differ in their {name}: {listed}; compare only like with like.")


# The page


def compose_report(runs: Sequence[Run], images: Iterable[tuple[str, Path]]) -> str:
    """Compose the page."""
    first, protocol = runs[0], runs[0].metrics["protocol"]
    names = list(dict.fromkeys(name for run in runs for name in run.metrics["overall"]))
    scorings = {}
    for run in runs:
        scorings.setdefault(run.describe_scoring(), []).append(run.name)
    if len(scorings) > 1:
        scorings = [f"* {', '.join(those)}: {how[0].lower()}{how[1:]}" for how, those in scorings.items()]
    parts = [
        f"# {first.benchmark}",
        f"{BENCHMARKS[first.benchmark].summary}\n\nProtocol `{protocol}`: {PROTOCOLS[protocol]['description']}",
        compose_table("", names, compose_rows(runs, names)),
        "\n".join(run.describe() for run in runs),
        "\n".join(scorings),
    ]
    for run in runs:
        categories = run.metrics["categories"]
        if len(categories) > 1:
            rows = [(category, [run.get_scaled(name, category) for name in names]) for category in categories]
            parts.append(f"## {run.name} by category\n\n{compose_table('category', names, rows)}")
    parts += [f"![{title}]({path.name})" for title, path in images]
    return "\n\n".join(parts) + "\n"


def compose_rows(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, list[float]]]:
    """List a row for each run, then the published ones that the protocol belongs to, as far as figures compare."""
    rows = [(run.name, [run.get_scaled(name) for name in names]) for run in runs]
    excluded = {name for entry in runs[0].metrics["not_comparable"] for name in entry["metrics"]}
    for row in PUBLISHED["rows"]:
        values = {name: value for name, value in row["values"].items() if name in names and name not in excluded}
        belongs = runs[0].metrics["protocol"] in PUBLISHED["protocols"][row["source"]]
        if row["benchmark"] == runs[0].benchmark and belongs and values:
            title = f"{row['name']} (quoted: {row['source']})"
            rows.append((title, [values.get(name, math.nan) for name in names]))
    return rows


def compose_table(corner: str, names: Sequence[str], rows: Iterable[tuple[str, Sequence[float]]]) -> str:
    """Compose a table: a heading for each metric, a row for each name and its scaled values."""
    lines = [[corner, *(METRICS[name].heading for name in names)], ["---"] + ["---:"] * len(names)]
    lines += [
        [title, *(METRICS[name].format(value) for name, value in zip(names, values, strict=True))]
        for title, values in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Plots


def draw_category_bars(runs: Sequence[Run], output_dir: Path) -> tuple[str, Path] | None:
    """Draw the first metric of single samples, by category, with a bar for each run; return title and file."""
    categories, metric = list(runs[0].metrics["categories"]), pick_metric(runs[0])
    if len(categories) < 2 or metric is None:
        return None
    figure, (axis,) = make_axes(1, width=min(1.5 + 0.35 * len(categories) * (1 + len(runs)), 16))
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        places = [place + width * (number - (len(runs) - 1) / 2) for place in range(len(categories))]
        axis.bar(places, [run.get_scaled(metric, category) for category in categories], width, label=run.name)
    axis.set_xticks(range(len(categories)), categories, rotation=45, ha="right")
    axis.set_ylabel(METRICS[metric].heading)
    if len(runs) > 1:
        axis.legend(ncols=len(runs), loc="lower left", bbox_to_anchor=(0, 1), fontsize="small")
    return f"{METRICS[metric].title} by category", save_figure(figure, output_dir / "categories.png")


def draw_guidance(runs: Sequence[Run], output_dir: Path) -> tuple[str, Path] | None:
    """Draw the two metrics that guidance trades off, a line for runs that differ only in their guidance scale."""
    lines = [line for line in group_by_guidance(runs).values() if len(line) > 1]
    names = [name for name in BENCHMARKS[runs[0].benchmark].trade_off if name in runs[0].metrics["overall"]]
    if not lines or not names:
        return None
    figure, axes = make_axes(len(names), width=6)
    for axis, name in zip(axes, names, strict=True):
        for line in lines:
            scales = [run.system["guidance_scale"] for run in line]
            label = f"{line[0].name} … {line[-1].name}"
            axis.plot(scales, [run.get_scaled(name) for run in line], marker="o", label=label)
        axis.set_ylabel(METRICS[name].heading)
    axes[-1].set_xlabel("guidance scale")
    if len(lines) > 1:
        axes[0].legend()
    return "Guidance", save_figure(figure, output_dir / "guidance.png")


def group_by_guidance(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs that are alike except for their guidance scales, each group in the order of these."""
    groups = {}
    for run in sorted(runs, key=lambda run: run.system.get("guidance_scale") or 0):
        if run.system.get("guidance_scale") is not None:
            others = run.generation | {"system": run.system | {"guidance_scale": None}}
            groups.setdefault(json.dumps(others, sort_keys=True), []).append(run)
    return groups


def make_axes(count: int, width: float):
    """Make a figure of plots one above another, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 1 + 2.5 * count), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(count, sharex=True, squeeze=False)[:, 0]


def save_figure(figure, path: Path) -> Path:
    """Save a figure, without the version of the library in it."""
    figure.savefig(path, format="png", dpi=100, metadata={"Software": None})
    return path


def pick_metric(run: Run) -> str | None:
    """Return the first metric that single samples have."""
    return next((name for name in run.metrics["overall"] if METRICS[name].reduce is None), None)


# Contact sheets


def draw_best_and_worst(run: Run, output_dir: Path) -> tuple[str, Path] | None:
    """Draw a run's best and worst predictions, if its samples and predictions are still there."""
    source, images = run.scoring["source"], Path(run.scoring["images"])
    if not images.is_dir() or (Path(source).is_absolute() and not Path(source).exists()):
        return None
    lines = (run.folder / SAMPLES_FILE).read_text(encoding="utf-8").splitlines()
    sound = {row["id"]: row["values"] for row in map(json.loads, filter(None, lines)) if "values" in row}
    metric = pick_metric(run)
    chosen = choose_samples({name: decode_number(values.get(metric)) for name, values in sound.items()}, metric)
    paths = find_predictions(chosen, images)
    samples = BENCHMARKS[run.benchmark].read(source, chosen, **run.scoring["options"])
    samples = {sample.id: sample for sample in samples if sample.id in paths}
    rows = []
    for sample_id, title in chosen.items():
        if sample_id in samples and (prediction := read_scored(paths[sample_id])) is not None:
            value = decode_number(sound[sample_id].get(metric))
            title += f" {METRICS[metric].format(value * METRICS[metric].factor)}" if metric else ""
            title += describe_checks(sound[sample_id], metric)
            rows.append((title, samples[sample_id], prediction))
    if not rows:
        return None
    path = output_dir / f"{run.name}-sheet.png"
    draw_sheet(rows).save(path, "PNG", optimize=True)
    heading = f": best and worst by {METRICS[metric].title}" if metric else ""
    return f"{run.name}{heading}; source, mask, output, target", path


def read_scored(path: Path) -> Image.Image | None:
    """Read a prediction; `None` if it broke after it was scored."""
    try:
        return read_image(path)
    except Exception:  # decoders raise anything on broken files
        return None


def choose_samples(values: dict[str, float], metric: str | None) -> dict[str, str]:
    """Choose the best and the worst samples, none twice: id → which; the first ones if none has a value."""
    ranked = [sample_id for sample_id, value in values.items() if not math.isnan(value)]
    if not ranked:
        return dict.fromkeys(list(values)[: 2 * NUM_EACH], "")
    ranked.sort(key=values.get, reverse=METRICS[metric].higher_is_better)
    best = ranked[:NUM_EACH]
    worst = ranked[len(best) :][::-1][:NUM_EACH]
    return dict.fromkeys(best, "best:") | dict.fromkeys(worst, "worst:")


def describe_checks(values: dict[str, float | str | None], metric: str | None) -> str:
    """Return which checks a prediction passed, except for the metric that ranks the predictions."""
    found = {name: decode_number(value) for name, value in values.items() if METRICS[name].is_share and name != metric}
    answers = {0: "no", 1: "yes"}
    return "".join(
        f", {METRICS[name].title}: {answers.get(value) or METRICS[name].format(value * METRICS[name].factor)}"
        for name, value in found.items()
        if not math.isnan(value)
    )


def draw_sheet(rows: Sequence[tuple[str, Sample, Image.Image]]) -> Image.Image:
    """Lay out source | mask | output | target of each row, with the prompt and the values underneath."""
    font, width = ImageFont.load_default(size=12), 4 * SIDE + 3 * GAP
    height = SIDE + 2 * LINE + 2 * GAP
    sheet = Image.new("RGB", (width, height * len(rows)), "white")
    for number, (title, sample, prediction) in enumerate(rows):
        images = (sample.source_image, sample.mask, prediction, sample.target_image)
        for place, image in enumerate(images):
            if image is not None:
                scale = SIDE / max(image.size)
                size = tuple(max(1, round(side * scale)) for side in image.size)
                resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
                fitted = image.convert("RGB").resize(size, resampling)
                sheet.paste(fitted, (place * (SIDE + GAP), number * height))
        for line, text in enumerate((f"{sample.id} {title}", sample.prompt)):
            shown = text
            while font.getlength(shown) > width:
                shown = shown[:-2] + "…"
            position = (0, number * height + SIDE + GAP + line * LINE)
            ImageDraw.Draw(sheet).text(position, shown, "black", font)
    return sheet
