"""Reports that compare runs with each other and with published results: a page with tables, a plot and images."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .benchmarks import BENCHMARKS, Sample, open_image
from .run import CONFIG_FILE, METRICS_FILE, SAMPLES_FILE, decode_number, find_predictions, read_config, write_text
from .table import METRICS, PROTOCOLS


REPORT_FILE = "report.md"
# `rows` are rows of published tables, with scaled means as printed. `protocols` maps each paper to the protocols whose
# results are compared with its rows. The rows of ControlNet++ and NEP hold only metrics that all protocols share.
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
CAVEATS = "`docs/benchmarks.md` of editar-hf explains when your results are comparable with the quoted ones."
# Sizes in pixels: side of an image on a sheet, gap between images, height of a line of text.
SIDE, GAP, LINE = 160, 6, 18
# A sheet shows this number of best predictions, and the same number of worst predictions.
NUM_EACH = 4


@dataclass
class Run:
    """The content of the folder of a scored run."""

    name: str
    folder: Path
    metrics: dict
    generation: dict
    scoring: dict

    def get_scaled(self, metric: str, category: str | None = None) -> float:
        """Return the scaled mean of a metric over all samples or over a category; NaN if it is undefined."""
        group = self.metrics["overall"] if category is None else self.metrics["categories"][category]
        return decode_number(group[metric]["scaled"]) if metric in group else math.nan

    def list_remarks(self) -> list[str]:
        """List what sets the run apart from plain runs, why its results are not comparable, and its problems."""
        metrics, remarks = self.metrics, []
        if self.generation.get("use_masks"):
            remarks.append("mask-assisted: the system used the benchmark's masks; not comparable")
        if self.generation.get("preserve") == "auto":
            remarks.append("preserve auto: the system kept what it found to be unedited")
        if not metrics["is_complete"]:
            remarks.append(f"{metrics['num_samples']} samples, a part of the benchmark; not comparable")
        if metrics["num_scored"] < metrics["num_expected"]:
            remarks.append(f"{metrics['num_scored']} of {metrics['num_expected']} predictions scored")
        remarks += [f"{len(names)} {kind}" for kind, names in metrics["problems"].items() if names]
        return remarks

    def describe(self) -> str:
        """Return one list item: how the run was made and scored, with its remarks."""
        metrics, made = self.metrics, "predictions of an unnamed system"
        hidden = {"benchmark", "source", "num_samples", "resolution", "system", "model", "use_masks", "preserve"}
        hidden |= self.scoring["environment"].keys()
        if self.generation:
            made = f"{self.generation['system']} {self.generation.get('model', '')}".strip()
            shown = (f"{k} {v}" for k, v in self.generation.items() if k not in hidden and v is not None)
            made += f" ({', '.join(shown)})"
        sizes = list(metrics["sizes"])
        samples = f"{metrics['num_scored']} samples of {', '.join(sizes) if len(sizes) < 4 else 'several sizes'}"
        figures = metrics["overall"].items()
        fewer = [f"{METRICS[k].title} of {v['n']}" for k, v in figures if v["n"] < metrics["num_scored"]]
        networks = [f"{name} by {model['id']}" for name, model in self.scoring["models"].items()]
        remarks = [f"**{remark}**" for remark in self.list_remarks()]
        return f"* {self.name}: {made}; " + "; ".join([", ".join([samples, *fewer]), *networks, *remarks])


def read_run(folder: Path, name: str) -> Run:
    for file in (CONFIG_FILE, METRICS_FILE):
        if not (folder / file).exists():
            raise ValueError(f"`runs` contains {str(folder)!r}, which has no {file}; score its predictions first.")
    metrics, config = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8")), read_config(folder)
    return Run(name, folder, metrics, config.get("generation", {}), config["scoring"])


def write_report(folders: Sequence[str | Path], output_dir: str | Path) -> Path:
    """Write a report about runs with the same benchmark and protocol: a page, a plot, and a contact sheet per run.

    Args:
        folders (sequence of `str` or `Path`): The folders of the runs.
        output_dir (`str` or `Path`): The folder to write; may be the folder of a run.

    Returns:
        The path of the page.

    Raises:
        ValueError: If a run is not scored, the benchmarks or protocols differ, or a folder is given twice.
    """
    paths, output_dir = [Path(folder).resolve() for folder in folders], Path(output_dir)
    if len(set(paths)) < len(paths):
        raise ValueError(f"`runs` contains a folder twice: {', '.join(map(str, paths))}; give each folder once.")
    # The name of a run is its path below the folder that all runs share.
    common = os.path.commonpath([path.parent for path in paths])
    runs = [read_run(path, "-".join(path.relative_to(common).parts)) for path in paths]
    for key in ("benchmark", "protocol", "num_samples", "sizes"):
        values = {run.name: run.metrics[key] for run in runs}
        if any(value != runs[0].metrics[key] for value in values.values()):
            listed = ", ".join(f"{name} has {value}" for name, value in values.items())
            raise ValueError(f"`runs` differ in {key}: {listed}; give only runs that agree in it.")
    output_dir.mkdir(parents=True, exist_ok=True)
    images = [draw_guidance(runs, output_dir), *(draw_best_and_worst(run, output_dir) for run in runs)]
    page = output_dir / REPORT_FILE
    write_text(page, compose_report(runs, [image for image in images if image is not None]))
    return page


# The page


def compose_report(runs: Sequence[Run], images: Iterable[tuple[str, Path]]) -> str:
    """Compose the text of the page."""
    benchmark, protocol = runs[0].metrics["benchmark"], runs[0].metrics["protocol"]
    names = list(dict.fromkeys(name for run in runs for name in run.metrics["overall"]))
    rows = [(run.name, [run.get_scaled(name) for name in names]) for run in runs]
    published = list_published(benchmark, protocol, names)
    parts = [
        f"# {benchmark}",
        f"{BENCHMARKS[benchmark].summary}\n\nProtocol `{protocol}`: {PROTOCOLS[protocol]['description']}",
        compose_table("", names, rows + published),
        "\n".join(run.describe() for run in runs),
    ]
    if published:
        parts.append(CAVEATS)
    environments = dict.fromkeys(", ".join(map(" ".join, run.scoring["environment"].items())) for run in runs)
    parts += [f"Scored on {environment}." for environment in environments]
    for run in runs:
        categories = run.metrics["categories"]
        if len(categories) > 1:
            rows = [(category, [run.get_scaled(name, category) for name in names]) for category in categories]
            parts.append(f"## {run.name} by category\n\n{compose_table('category', names, rows)}")
    parts += [f"![{title}]({path.name})" for title, path in images]
    return "\n\n".join(parts) + "\n"


def list_published(benchmark: str, protocol: str, names: Sequence[str]) -> list[tuple[str, list[float]]]:
    """List the published rows of a benchmark that are comparable under a protocol."""
    rows = []
    for row in PUBLISHED["rows"]:
        values = [row["values"].get(name, math.nan) for name in names]
        belongs = row["benchmark"] == benchmark and protocol in PUBLISHED["protocols"][row["source"]]
        if belongs and not all(map(math.isnan, values)):
            rows.append((f"{row['name']} (quoted: {row['source']})", values))
    return rows


def compose_table(corner: str, names: Sequence[str], rows: Iterable[tuple[str, Sequence[float]]]) -> str:
    """Compose a Markdown table with a column for each metric. A row has a title and scaled values."""
    lines = [[corner, *(METRICS[name].heading for name in names)], ["---"] + ["---:"] * len(names)]
    lines += [
        [title, *(METRICS[name].format(value) for name, value in zip(names, values, strict=True))]
        for title, values in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Images


def draw_guidance(runs: Sequence[Run], output_dir: Path) -> tuple[str, Path] | None:
    """Plot two metrics against the guidance scale. One line joins runs that differ only in their guidance scale."""
    lines = [line for line in group_by_guidance(runs) if len(line) > 1]
    names = [name for name in BENCHMARKS[runs[0].metrics["benchmark"]].trade_off if name in runs[0].metrics["overall"]]
    if not lines or not names:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1 + 2.5 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for axis, name in zip(axes, names, strict=True):
        for line in lines:
            scales = [run.generation["guidance_scale"] for run in line]
            label = f"{line[0].name} … {line[-1].name}"
            axis.plot(scales, [run.get_scaled(name) for run in line], marker="o", label=label)
        axis.set_ylabel(METRICS[name].heading)
    axes[-1].set_xlabel("guidance scale")
    if len(lines) > 1:
        axes[0].legend()
    # Without metadata, the file does not depend on the version of Matplotlib.
    figure.savefig(output_dir / "guidance.png", dpi=100, metadata={"Software": None})
    return "Guidance", output_dir / "guidance.png"


def group_by_guidance(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs that differ only in their guidance scale. Each group is sorted by guidance scale."""
    groups: dict[str, list[Run]] = {}
    guided = [run for run in runs if run.generation.get("guidance_scale") is not None]
    for run in sorted(guided, key=lambda run: run.generation["guidance_scale"]):
        groups.setdefault(json.dumps(run.generation | {"guidance_scale": None}), []).append(run)
    return list(groups.values())


def draw_best_and_worst(run: Run, output_dir: Path) -> tuple[str, Path] | None:
    """Draw the best and the worst predictions of a run. Return `None` if samples or predictions no longer exist."""
    source, images = run.scoring["source"], Path(run.scoring["images"])
    metric = next((name for name in run.metrics["overall"] if METRICS[name].is_mean), None)
    lines = (run.folder / SAMPLES_FILE).read_text(encoding="utf-8").splitlines()
    values_of = {row["id"]: row["values"] for row in map(json.loads, lines) if "values" in row}
    if not values_of or not images.is_dir() or (Path(source).is_absolute() and not Path(source).exists()):
        return None
    chosen = choose_samples({name: decode_number(values.get(metric)) for name, values in values_of.items()}, metric)
    paths, rows = find_predictions(chosen, images), {}
    for sample in BENCHMARKS[run.metrics["benchmark"]].read_samples(source, chosen, **run.scoring["options"]):
        shown = {name: decode_number(value) * METRICS[name].factor for name, value in values_of[sample.id].items()}
        figures = [f"{METRICS[k].title} {METRICS[k].format(v)}" for k, v in shown.items() if not math.isnan(v)]
        rows[sample.id] = f"{chosen[sample.id]} {', '.join(figures)}", sample, open_image(paths[sample.id])
    path = output_dir / f"{run.name}-sheet.png"
    draw_sheet([rows[sample_id] for sample_id in chosen]).save(path, "PNG", optimize=True)
    ranked = f": best and worst by {METRICS[metric].title}" if metric else ""
    return f"{run.name}{ranked}; source, mask, output, target", path


def choose_samples(values: dict[str, float], metric: str | None) -> dict[str, str]:
    """Choose the best and the worst samples: id → label. If no sample has a value, choose the first samples."""
    ranked = [sample_id for sample_id, value in values.items() if not math.isnan(value)]
    if metric is None or not ranked:
        return dict.fromkeys(list(values)[: 2 * NUM_EACH], "")
    ranked.sort(key=lambda sample_id: values[sample_id], reverse=METRICS[metric].higher_is_better)
    best, others = ranked[:NUM_EACH], ranked[NUM_EACH:]
    return dict.fromkeys(best, "best:") | dict.fromkeys(others[::-1][:NUM_EACH], "worst:")


def draw_sheet(rows: Sequence[tuple[str, Sample, Image.Image]]) -> Image.Image:
    """Draw each row as source | mask | output | target, with the metrics and the prompt below."""
    font, width = ImageFont.load_default(size=12), 4 * SIDE + 3 * GAP
    height = SIDE + 2 * LINE + 2 * GAP
    sheet = Image.new("RGB", (width, height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, sample, prediction) in enumerate(rows):
        images = (sample.source_image, sample.mask, prediction, sample.target_image)
        for place, image in enumerate(images):
            if image is not None:
                scale = SIDE / max(image.size)
                size = [max(1, round(side * scale)) for side in image.size]
                resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
                sheet.paste(image.convert("RGB").resize(size, resampling), (place * (SIDE + GAP), number * height))
        for line, text in enumerate((f"{sample.id} {title}", sample.prompt)):
            while font.getlength(text) > width:
                text = text[:-2] + "…"
            draw.text((0, number * height + SIDE + GAP + line * LINE), text, "black", font)
    return sheet
