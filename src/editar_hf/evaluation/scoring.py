"""Scoring: from a folder of predictions to `metrics.json`.

Each process scores its share, one prediction at a time, and appends a line to `samples-<rank>.jsonl`; what metrics over
all predictions need goes to `features/<id>.npz`. Lines carry a fingerprint of the prediction's file, so that scoring
goes on where it was stopped and scores anew what was made anew. Then one process reads all lines and reduces them in
the order of the benchmark: neither the number of processes nor an interruption changes a digit of `metrics.json`.

Predictions that are missing, unreadable or of another size are counted and named there, and so are files that belong
to no sample. MagicBrush alone takes predictions of any size: its own evaluation resizes them (see `measures.Pair`).
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .files import append_line, decode_number, read_lines, repair_lines, write_file, write_json
from .measures import METRICS, Metric, Pair, check_sizes, get_metric
from .models import find_published, find_revision, load_models, resolve_models
from .processes import get_process, show_progress
from .protocols import Protocol, get_protocol
from .runs import (
    check_images,
    describe_benchmark,
    describe_environment,
    read_image,
    record_configuration,
    record_paths,
)
from .samples import Benchmark, Sample
from .tasks import get_task
from .tasks.translation import RESOLUTION


METRICS_FILE, FEATURES = "metrics.json", "features"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PROBLEMS = ("missing", "unreadable", "wrong size")


def score_predictions(
    benchmark: Benchmark,
    images_dir: str | Path,
    output_dir: str | Path,
    protocol: str = "editar",
    metrics: Sequence[str] | None = None,
    models: Mapping[str, str] | None = None,
) -> dict:
    """Score the predictions that are not scored yet, and write `metrics.json`.

    Args:
        benchmark (`Benchmark`): The samples.
        images_dir (`str` or `Path`): The predictions, `<id>.png` or of another common format; from any system.
        output_dir (`str` or `Path`): The run's folder.
        protocol (`str`): How; see `protocols.py`.
        metrics (sequence of `str`, *optional*): Which; default those of the task's table.
        models (mapping, *optional*): Folders or Hub ids in place of the default models, by `models.SCORING_MODELS`.

    Returns:
        What `metrics.json` says; in all processes but the first, an empty dict.

    Raises:
        ValueError: If `resolve_scoring` refuses, there are no predictions, or the folder was scored in another way.
    """
    images_dir, output_dir = Path(images_dir), Path(output_dir)
    if not images_dir.is_dir():
        raise ValueError(f"`images` is {str(images_dir)!r}, which is no folder.")
    protocol, names, models = resolve_scoring(benchmark, protocol, metrics, models)
    not_comparable = list_reasons(benchmark, protocol, names, models)
    config = {
        "data": describe_benchmark(benchmark),
        "protocol": asdict(protocol),
        "metrics": names,
        "models": {name: {"id": model, "revision": find_revision(model)} for name, model in models.items()},
        **describe_environment(),
    }
    check_images(output_dir, images_dir)
    predictions = find_predictions(benchmark, images_dir)
    if not predictions:
        raise ValueError(f"`images` {str(images_dir)!r} holds no prediction; a sample's is <id>.png.")
    record_configuration(output_dir, "scoring", config)
    record_paths(output_dir, benchmark.folder, images_dir)
    score_share(benchmark, predictions, output_dir, protocol, names, models)
    process = get_process()
    process.wait_for_everyone()
    summary = {}
    if process.is_main_process:
        summary = {
            **describe_benchmark(benchmark),
            "protocol": protocol.name,
            "not_comparable": not_comparable,
            **summarise(benchmark, predictions, images_dir, output_dir, names),
        }
        write_json(output_dir / METRICS_FILE, summary)
    process.wait_for_everyone()
    return summary


def resolve_scoring(
    benchmark: Benchmark,
    protocol: str = "editar",
    metrics: Sequence[str] | None = None,
    models: Mapping[str, str] | None = None,
) -> tuple[Protocol, list[str], dict[str, str]]:
    """Say how predictions will be scored: the protocol, the metrics, and where their models come from.

    The arguments are those of `score_predictions`. Called before pictures are made, it tells what cannot be scored.

    Raises:
        ValueError: If a metric or protocol is unknown, a model is missing, or pictures of the benchmark's sizes cannot
            have a metric.
    """
    task = get_task(benchmark.info["task"])
    protocol, names = get_protocol(protocol), list(dict.fromkeys(metrics or task.metrics))
    needed = [model for name in names for model in get_metric(name).models]
    check_sizes(names, benchmark.info["sizes"], protocol)
    return protocol, names, resolve_models(needed, models or {}, task.models)


def list_reasons(
    benchmark: Benchmark, protocol: Protocol, names: Sequence[str], models: Mapping[str, str]
) -> list[dict]:
    """List why figures are not comparable with published ones: each reason, and the metrics that it is about."""
    task, reasons = get_task(benchmark.info["task"]), []
    if not protocol.is_comparable:
        reasons.append({"reason": f"protocol {protocol.name}", "metrics": list(names)})
    published = f"{RESOLUTION}×{RESOLUTION}"
    if "resolution" in task.options and (others := sorted(set(benchmark.info["sizes"]) - {published})):
        reasons.append({"reason": f"pictures of {', '.join(others)}, not {published}", "metrics": list(names)})
    for model_name, model in models.items():
        if published := find_published(model_name, model, task.models):
            metrics = [name for name in names if model_name in METRICS[name].models]
            titles = ", ".join(METRICS[name].title for name in metrics)
            reasons.append({"reason": f"{titles} by {model}, not {published}", "metrics": metrics})
    return reasons


@dataclass(frozen=True)
class Prediction:
    """A sample's prediction: its file, and a fingerprint of what is in it, empty where it cannot be opened."""

    path: Path
    digest: str


def find_predictions(benchmark: Benchmark, images_dir: Path) -> dict[str, Prediction]:
    """Find the predictions that are there, by sample; of several formats, the first of `IMAGE_SUFFIXES` counts."""
    there, predictions = {path.name: path for path in images_dir.iterdir()}, {}
    for sample_id in benchmark.ids:
        names = (f"{sample_id}{suffix}" for suffix in IMAGE_SUFFIXES)
        path = next((there[name] for name in names if name in there), None)
        if path is not None:
            predictions[sample_id] = Prediction(path, compute_digest(path))
    return predictions


def compute_digest(path: Path) -> str:
    """Compute a fingerprint of a file; of a folder or a link to nowhere, which scoring will name, an empty one."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def list_scored(benchmark: Benchmark) -> list[int]:
    """List the samples whose predictions count."""
    return [index for index, is_scored in enumerate(benchmark.read_column("is_scored")) if is_scored]


# Samples


def score_share(
    benchmark: Benchmark,
    predictions: Mapping[str, Prediction],
    output_dir: Path,
    protocol: Protocol,
    names: Sequence[str],
    models: Mapping[str, str],
) -> None:
    """Score this process's share of the predictions that are there and were not scored before."""
    process = get_process()
    path = output_dir / f"samples-{process.process_index}.jsonl"
    repair_lines(path)
    done = read_scores(output_dir, predictions)
    has_features = any(METRICS[name].reduce for name in names)
    waiting = []
    for index in list_scored(benchmark)[process.process_index :: process.num_processes]:
        sample_id = benchmark.ids[index]
        is_done = sample_id in done and (
            not has_features or "problem" in done[sample_id] or find_features(output_dir, sample_id).exists()
        )
        if sample_id in predictions and not is_done:
            waiting.append(index)
    loaded = load_models(models, process.device, protocol) if waiting else {}
    takes_any_size = get_task(benchmark.info["task"]).takes_any_size
    for index in show_progress(waiting, desc="scoring"):
        sample = benchmark[index]
        prediction = predictions[sample.id]
        score = score_prediction(sample, prediction.path, output_dir, protocol, names, loaded, takes_any_size)
        append_line(path, {"id": sample.id, "file": prediction.digest} | score)


def score_prediction(
    sample: Sample,
    path: Path,
    output_dir: Path,
    protocol: Protocol,
    names: Sequence[str],
    models: dict,
    takes_any_size: bool,
) -> dict:
    """Score one prediction: its values, or what is the matter with it."""
    try:
        prediction = read_image(path)
    except Exception as error:  # Decoders raise anything on broken files, and one must not keep the others away.
        return {"problem": "unreadable", "reason": str(error) or type(error).__name__}
    if prediction.size != sample.size and not takes_any_size:
        return {"problem": "wrong size", "reason": "{}×{}, not {}×{}".format(*prediction.size, *sample.size)}
    pair = Pair(prediction, sample, protocol)
    measured = {name: METRICS[name].measure(pair, models) for name in names}
    features = {name: value for name, value in measured.items() if METRICS[name].reduce}
    if features:
        arrays = {f"{name}/{part}": array for name, value in features.items() for part, array in value.items()}
        write_file(find_features(output_dir, sample.id), lambda path: save_arrays(path, arrays))
    return {"values": {name: value for name, value in measured.items() if name not in features}}


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Save arrays under exactly this name; numpy would add an ending."""
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def find_features(output_dir: Path, sample_id: str) -> Path:
    """Say where a run keeps what metrics over all samples need of one."""
    return output_dir / FEATURES / f"{sample_id}.npz"


def read_scores(output_dir: Path, predictions: Mapping[str, Prediction]) -> dict[str, dict]:
    """Read the lines that all processes wrote about these very predictions, by sample."""
    lines = (line for path in sorted(output_dir.glob("samples-*.jsonl")) for line in read_lines(path))
    digests = {sample_id: prediction.digest for sample_id, prediction in predictions.items()}
    return {line["id"]: line for line in lines if digests.get(line["id"]) == line["file"]}


# All samples


def summarise(
    benchmark: Benchmark,
    predictions: Mapping[str, Prediction],
    images_dir: Path,
    output_dir: Path,
    names: Sequence[str],
) -> dict:
    """Reduce the lines of all samples, in the benchmark's order, to figures."""
    scores, categories = read_scores(output_dir, predictions), benchmark.read_column("category")
    scored = [index for index in list_scored(benchmark) if benchmark.ids[index] in predictions]
    lines = {index: scores[benchmark.ids[index]] for index in scored}
    sound = [index for index, line in lines.items() if "values" in line]
    overall = {name: summarise_metric(name, [lines[index] for index in sound], output_dir) for name in names}
    groups = {category: [index for index in sound if categories[index] == category] for category in categories}
    return {
        "num_expected": len(list_scored(benchmark)),
        "num_scored": len(sound),
        "formats": dict(sorted(Counter(prediction.path.suffix for prediction in predictions.values()).items())),
        "problems": collect_problems(benchmark, predictions, images_dir, lines),
        "overall": overall,
        "categories": {
            category: {
                name: summarise_metric(name, [lines[index] for index in group], output_dir)
                for name in names
                if not METRICS[name].reduce
            }
            for category, group in groups.items()
        },
    }


def summarise_metric(name: str, lines: Sequence[Mapping], output_dir: Path) -> dict:
    """Summarise one metric over samples: mean, standard deviation, how many it is defined for, and the scaled mean."""
    metric = METRICS[name]
    if metric.reduce:
        mean, num_samples = reduce_features(name, metric, [line["id"] for line in lines], output_dir)
        deviation = math.nan
    else:
        values = [decode_number(line["values"][name]) for line in lines]
        values = [value for value in values if not math.isnan(value)]
        mean, deviation, num_samples = *compute_moments(values), len(values)
    return {"mean": mean, "std": deviation, "n": num_samples, "factor": metric.factor, "scaled": mean * metric.factor}


def reduce_features(name: str, metric: Metric, ids: Iterable[str], output_dir: Path) -> tuple[float, int]:
    """Reduce what one metric collected of each sample; the value, and of how many it is."""
    collected: dict[str, list] = {}
    for sample_id in ids:
        with np.load(find_features(output_dir, sample_id)) as arrays:
            for key in arrays.files:
                if key.partition("/")[0] == name:
                    collected.setdefault(key.partition("/")[2], []).append(arrays[key])
    if not collected:
        return math.nan, 0
    return metric.reduce(**collected), len(next(iter(collected.values())))


def compute_moments(values: Sequence[float]) -> tuple[float, float]:
    """Compute mean and standard deviation (of a sample, n − 1); NaN where there are too few values."""
    if not values or math.inf in values:
        return (math.inf if values else math.nan), math.nan
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def collect_problems(
    benchmark: Benchmark, predictions: Mapping[str, Prediction], images_dir: Path, lines: Mapping[int, Mapping]
) -> dict[str, list[str]]:
    """Name the predictions that do not count, with the reason, and the files that belong to no sample."""
    ids = [benchmark.ids[index] for index in list_scored(benchmark)]
    problems = {"missing": [sample_id for sample_id in ids if sample_id not in predictions]}
    for kind in PROBLEMS[1:]:
        problems[kind] = [f"{line['id']}: {line['reason']}" for line in lines.values() if line.get("problem") == kind]
    names = {prediction.path.name for prediction in predictions.values()}
    others = sorted(path.name for path in images_dir.iterdir() if path.name not in names)
    return problems | {"extra": [name for name in others if not name.startswith(".")]}
