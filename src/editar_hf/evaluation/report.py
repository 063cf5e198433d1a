"""Reports: runs beside one another and beside published figures, as a page with tables, plots and contact sheets."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .files import decode_number, write_file
from .measures import METRICS
from .protocols import PROTOCOLS
from .runs import CONFIG_FILE
from .scoring import METRICS_FILE
from .tasks import TASKS


REPORT_FILE = "report.md"
LOSSLESS = (".png", ".bmp")
PNPINVERSION = "PnPInversion, arXiv 2310.01506"
EDITAR = "EditAR, arXiv 2501.04699"
CONTROLNET_PP = "ControlNet++, arXiv 2404.07987"
NEP = "NEP, arXiv 2508.06044"
# Beside which protocols the figures of a source stand: that of the paper's own code; of ControlNet++ and NEP are quoted
# figures that all protocols compute alike (FID, edge F1, mIoU, MagicBrush's), so they stand beside the default one too.
PROTOCOLS_OF = {
    PNPINVERSION: ("pnp-2023",),
    EDITAR: ("editar",),
    CONTROLNET_PP: ("editar", "controlnet++"),
    NEP: ("editar",),
}


@dataclass(frozen=True)
class QuotedRow:
    """A row of a published table, for comparison.

    Args:
        name (`str`): The system.
        task (`str`): The task, a key of `TASKS`.
        source (`str`): Where it was published.
        values (dict): Scaled means, as printed.
    """

    name: str
    task: str
    source: str
    values: dict[str, float]


PIE_METRICS = TASKS["pie-bench"].metrics
EDITAR_PIE_METRICS = ("structure_distance", "psnr_unedited", "lpips_unedited", "clip_whole", "clip_edited")


def quote_pie_bench(name: str, source: str, metrics: Sequence[str], *values: float) -> QuotedRow:
    return QuotedRow(name, "pie-bench", source, dict(zip(metrics, values, strict=True)))


# ControlNet++'s tables also have the RMSE of depth: in a variant of its own, which must not stand beside EditAR's.
QUOTED_ROWS = (
    quote_pie_bench(
        "DDIM + Prompt-to-Prompt", PNPINVERSION, PIE_METRICS, 69.43, 17.87, 208.80, 219.88, 71.14, 25.01, 22.44
    ),
    quote_pie_bench(
        "PnP-Inversion + Prompt-to-Prompt", PNPINVERSION, PIE_METRICS, 11.65, 27.22, 54.55, 32.86, 84.76, 25.02, 22.10
    ),
    quote_pie_bench("InstructPix2Pix", EDITAR, EDITAR_PIE_METRICS, 107.43, 16.69, 271.33, 23.49, 22.20),
    quote_pie_bench("MGIE", EDITAR, EDITAR_PIE_METRICS, 67.41, 21.20, 142.25, 24.28, 21.79),
    quote_pie_bench("EditAR", EDITAR, EDITAR_PIE_METRICS, 39.43, 21.32, 117.15, 24.87, 21.87),
    QuotedRow("Uni-ControlNet", "canny", CONTROLNET_PP, {"edge_f1": 27.32, "fid": 17.14}),
    QuotedRow("UniControl", "canny", CONTROLNET_PP, {"edge_f1": 30.82, "fid": 19.94}),
    QuotedRow("ControlNet", "canny", CONTROLNET_PP, {"edge_f1": 34.65, "fid": 14.73}),
    QuotedRow("ControlNet++", "canny", CONTROLNET_PP, {"edge_f1": 37.04, "fid": 18.23}),
    QuotedRow("EditAR", "canny", EDITAR, {"fid": 13.91}),
    QuotedRow("Uni-ControlNet", "depth", CONTROLNET_PP, {"fid": 20.27}),
    QuotedRow("UniControl", "depth", CONTROLNET_PP, {"fid": 18.66}),
    QuotedRow("ControlNet", "depth", CONTROLNET_PP, {"fid": 17.76}),
    QuotedRow("ControlNet++", "depth", CONTROLNET_PP, {"fid": 16.66}),
    QuotedRow("EditAR", "depth", EDITAR, {"fid": 15.97}),
    QuotedRow("ControlNet", "segmentation", CONTROLNET_PP, {"mean_iou": 27.46, "fid": 21.33}),
    QuotedRow("ControlNet++", "segmentation", CONTROLNET_PP, {"mean_iou": 34.56, "fid": 19.29}),
    QuotedRow("EditAR", "segmentation", EDITAR, {"fid": 16.13}),
    QuotedRow("EditAR", "magicbrush", NEP, {"l1": 0.1028, "l2": 0.0285, "clip_i": 0.8679, "dino": 0.8042}),
    QuotedRow("EditAR", "magicbrush-multi-turn", NEP, {"l1": 0.1341, "l2": 0.0433, "clip_i": 0.8256, "dino": 0.7200}),
)


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
        self.config, self.metrics = (
            json.loads((self.folder / name).read_text(encoding="utf-8")) for name in (CONFIG_FILE, METRICS_FILE)
        )
        self.system = self.config.get("generation", {}).get("system", {})
        self.paths = {name: Path(path) for name, path in self.config["paths"].items()}

    @property
    def task(self) -> str:
        return self.metrics["task"]

    def get_scaled(self, metric: str, category: str | None = None) -> float:
        """Get a scaled mean, over all or over a category; NaN where it is undefined."""
        group = self.metrics["overall"] if category is None else self.metrics["categories"][category]
        return decode_number(group[metric]["scaled"]) if metric in group else float("nan")

    def list_remarks(self) -> list[str]:
        """List what keeps the figures from being compared with published ones, or makes them fewer."""
        metrics, problems = self.metrics, self.metrics["problems"]
        remarks = []
        if self.system.get("use_masks"):
            remarks.append("mask-assisted: it was given the benchmark's masks; not comparable")
        if not metrics["is_complete"]:
            remarks.append(f"{metrics['num_samples']} samples, a part of the benchmark; not comparable")
        for entry in metrics["not_comparable"]:
            remarks.append(f"{entry['reason']}; not comparable with published figures")
        if metrics["num_scored"] < metrics["num_expected"]:
            remarks.append(f"{metrics['num_scored']} of {metrics['num_expected']} predictions scored")
        remarks += [f"{kind}: {', '.join(shorten(names))}" for kind, names in problems.items() if names]
        if lossy := [suffix for suffix in metrics["formats"] if suffix not in LOSSLESS]:
            remarks.append(f"predictions are {', '.join(lossy)} files, which change pixels")
        return remarks

    def list_fewer(self) -> list[str]:
        """List the metrics that are undefined for some of the samples scored, with the number they are of."""
        overall, num_scored = self.metrics["overall"], self.metrics["num_scored"]
        fewer = {name: figure["n"] for name, figure in overall.items() if figure["n"] < num_scored}
        return [f"{METRICS[name].title} of {count}" for name, count in fewer.items()]


def write_report(folders: Sequence[str | Path], output_dir: str | Path) -> Path:
    """Write the report of runs of one benchmark, scored in one way: a page, plots, and a contact sheet for each run.

    Args:
        folders (sequence of `str` or `Path`): The runs.
        output_dir (`str` or `Path`): Where to; may be a run's own folder.

    Returns:
        The page.

    Raises:
        ValueError: If the runs are not scored, not about the same samples, not scored in the same way and by the same
            models, or a folder is named twice.
    """
    from .pictures import draw_pictures

    runs = [Run(folder) for folder in folders]
    name_runs(runs)
    check_alike(runs)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(runs, output_dir)
    page = output_dir / REPORT_FILE
    text = compose_report(runs, pictures)
    write_file(page, lambda path: path.write_text(text, encoding="utf-8"))
    return page


def name_runs(runs: Sequence[Run]) -> None:
    """Name runs by the last part of their folders, and by as many more as tell them apart.

    Raises:
        ValueError: If a folder is there twice.
    """
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
    """Refuse runs about other samples, or scored by another protocol or other models, and say which differ."""
    found = {name: {run.name: run.metrics[name] for run in runs} for name in ("fingerprint", "protocol")}
    for run in runs:
        for name, model in run.config["scoring"]["models"].items():
            found.setdefault(f"{name} model", {})[run.name] = model["revision"]
    for name, values in found.items():
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{run} has {value}" for run, value in values.items())
            raise ValueError(f"`runs` differ in their {name}: {listed}; compare only like with like.")


def compose_report(runs: Sequence[Run], pictures: Iterable[tuple[str, Path]]) -> str:
    """Compose the page."""
    first, protocol = runs[0], PROTOCOLS[runs[0].metrics["protocol"]]
    names = list(dict.fromkeys(name for run in runs for name in run.metrics["overall"]))
    parts = [
        f"# {first.task}",
        f"{TASKS[first.task].summary}\n\nProtocol `{protocol.name}`: {protocol.description}",
        compose_table("", names, compose_rows(runs, names)),
        "\n".join(describe_run(run) for run in runs),
        "\n".join(describe_scorings(runs)),
    ]
    for run in runs:
        categories = run.metrics["categories"]
        if len(categories) > 1:
            rows = [(category, [run.get_scaled(name, category) for name in names]) for category in categories]
            parts.append(f"## {run.name} by category\n\n{compose_table('category', names, rows)}")
    parts += [f"![{title}]({path.name})" for title, path in pictures]
    return "\n\n".join(parts) + "\n"


def compose_rows(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, list[float]]]:
    """List a row for each run, then those quoted that the protocol belongs to, as far as figures here compare."""
    rows = [(run.name, [run.get_scaled(name) for name in names]) for run in runs]
    task, protocol = runs[0].task, runs[0].metrics["protocol"]
    excluded = {name for entry in runs[0].metrics["not_comparable"] for name in entry["metrics"]}
    for row in QUOTED_ROWS:
        values = {name: value for name, value in row.values.items() if name in names and name not in excluded}
        if row.task == task and protocol in PROTOCOLS_OF[row.source] and values:
            title = f"{row.name} (quoted: {row.source})"
            rows.append((title, [values.get(name, float("nan")) for name in names]))
    return rows


def compose_table(corner: str, names: Sequence[str], rows: Iterable[tuple[str, Sequence[float]]]) -> str:
    """Compose a table: a heading for each metric, a row for each name and its scaled values."""
    lines = [[corner, *(METRICS[name].heading for name in names)], ["---"] + ["---:"] * len(names)]
    lines += [
        [title, *(METRICS[name].format(value) for name, value in zip(names, values, strict=True))]
        for title, values in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe_run(run: Run) -> str:
    """Say in one list item how a run was made, and what to mind about it."""
    system = {name: value for name, value in run.system.items() if value is not None}
    elsewhere = ("name", "model", "revisions", "use_masks")
    drawn = {name: run.config["generation"][name] for name in ("seed", "batch_size")} if system else {}
    options = ", ".join(f"{name} {value}" for name, value in (system | drawn).items() if name not in elsewhere)
    made = f"{system['name']} {system.get('model', '')}".strip() if system else "predictions of an unnamed system"
    remarks = "".join(f"; **{remark}**" for remark in run.list_remarks())
    samples = ", ".join([f"{run.metrics['num_scored']} samples", *run.list_fewer()])
    return f"* {run.name}: {made}{f' ({options})' if options else ''}; {samples}{remarks}"


def describe_scorings(runs: Sequence[Run]) -> list[str]:
    """Say how runs were scored, once for those that were scored in the same way."""
    names = {}
    for run in runs:
        names.setdefault(describe_scoring(run), []).append(run.name)
    if len(names) == 1:
        return list(names)
    return [f"* {', '.join(those)}: {how[0].lower()}{how[1:]}" for how, those in names.items()]


def describe_scoring(run: Run) -> str:
    """Say with which versions, on which kind of device and with which models a run was scored."""
    scoring = run.config["scoring"]
    versions = ", ".join(f"{package} {version}" for package, version in scoring["versions"].items())
    models = "".join(f"; {name}: {model['id']}" for name, model in scoring["models"].items())
    return f"Scored on {scoring['device']} with {versions}{models}."


def shorten(names: Sequence[str], most: int = 5) -> list[str]:
    """Shorten a long list to its first names and how many more there are."""
    return [*names[:most], f"and {len(names) - most} more"] if len(names) > most else list(names)
