"""A run: a folder with the predictions of one system for one benchmark, their metrics, and the configuration.

    run/
      config.json          how the predictions were made; a run with another configuration is refused
      images/<id>.png      the predictions
      samples.jsonl        the metrics of each prediction
      metrics.json         the metrics of the whole run

The seed of a sample depends only on the seed of the run and the id of the sample, and the batches are the same in every
run. The results therefore depend neither on the number of processes nor on interruptions. `generate` skips images that
exist, and `score` scores all predictions again.
"""

import hashlib
import json
import math
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from PIL import Image

from .. import __version__
from ..checks import check_choice, check_integer, check_path
from ..io import atomic_path
from .benchmarks import Benchmark, Sample, open_image
from .features import DEFAULT_MODELS, MISSING, Network, load_network
from .processes import get_process, show_progress
from .systems import System, find_commit
from .table import METRICS, PROTOCOLS, Pair


CONFIG_FILE, IMAGES, SAMPLES_FILE, METRICS_FILE = "config.json", "images", "samples.jsonl", "metrics.json"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PACKAGES = ("torch", "transformers", "diffusers", "pillow", "numpy")


# Files


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def encode_number(value: float | None) -> float | str | None:
    """Encode a number for JSON: NaN becomes `None` and infinity becomes "inf", because JSON has neither."""
    if value is None or math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)


def decode_number(value: float | str | None) -> float:
    """Undo `encode_number`."""
    return math.nan if value is None else float(value)


def read_config(output_dir: Path) -> dict:
    """Read the configuration of a run. If it has none, return an empty dict."""
    path = output_dir / CONFIG_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_config(output_dir: Path, **parts: dict) -> None:
    """Write some parts of the configuration of a run, and keep the others."""
    config = read_config(output_dir) | parts
    write_text(output_dir / CONFIG_FILE, json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def describe_environment() -> dict[str, str]:
    """Return the type of the device and the versions of Python and of the packages."""
    versions = {package: metadata.version(package) for package in PACKAGES}
    return {
        "device": get_process().device.type,
        "editar-hf": __version__,
        "python": platform.python_version(),
        **versions,
    }


# Predictions


def generate(benchmark: Benchmark, system: System, output_dir: str | Path, seed: int = 0, batch_size: int = 1) -> None:
    """Make the missing predictions of a run. Each process makes its share.

    Args:
        benchmark (`Benchmark`): The samples.
        system (`System`): The system. It is loaded only if a prediction is missing.
        output_dir (`str` or `Path`): The folder of the run.
        seed (`int`, *optional*, defaults to 0): The seeds of the samples are derived from this seed.
        batch_size (`int`, *optional*, defaults to 1): Samples per call of the system; 1 in published results.

    Raises:
        ValueError: If a sample lacks an image that the system needs, or if the folder holds predictions that were made
            with another configuration.
    """
    check_integer("batch_size", batch_size)
    check_path("output_dir", output_dir)
    if system.needs in benchmark.lacking:
        raise ValueError(
            f"`system` {system.name} needs the {system.needs} of every sample, but sample "
            f"{benchmark.lacking[system.needs]} has none; choose other options, or leave out samples without it."
        )
    output_dir, process = Path(output_dir), get_process()
    config = {"benchmark": benchmark.name, "source": benchmark.source, **benchmark.options}
    config |= {"num_samples": len(benchmark.categories), **system.describe(), "seed": seed, "batch_size": batch_size}
    with process.main_process_first():
        check_config(output_dir, config | describe_environment())
    batches = [benchmark.chains[start : start + batch_size] for start in range(0, len(benchmark.chains), batch_size)]
    batches = [
        batch
        for batch in batches[process.process_index :: process.num_processes]
        if not all(find_image(output_dir, sample_id).exists() for chain in batch for sample_id in chain)
    ]
    wanted = {sample_id for batch in batches for chain in batch for sample_id in chain}
    samples = benchmark.read(wanted)
    edit: Any = system.load() if batches else None
    with show_progress(total=len(wanted), desc=system.name) as progress:
        for batch in batches:
            waiting = {sample.id: sample for sample in islice(samples, sum(map(len, batch)))}
            # First the samples that edit their own source image, then the samples that edit the results of the first.
            for ids in zip_longest(*batch):
                turn = [waiting[sample_id] for sample_id in ids if sample_id is not None]
                for sample in turn:
                    if sample.previous is not None:
                        sample.source_image = open_image(find_image(output_dir, sample.previous))
                images = edit(turn, [derive_seed(seed, sample.id) for sample in turn])
                for sample, image in zip(turn, images, strict=True):
                    with atomic_path(find_image(output_dir, sample.id)) as unfinished:
                        image.save(unfinished, "PNG")
                progress.update(len(turn))
    process.wait_for_everyone()


def check_config(output_dir: Path, config: dict) -> None:
    """Write the configuration of new predictions, or check that existing predictions have the same configuration."""
    recorded = read_config(output_dir).get("generation")
    if recorded is None:
        if (output_dir / IMAGES).exists() or (output_dir / METRICS_FILE).exists():
            raise ValueError(
                f"`output_dir` {str(output_dir)!r} holds images or metrics that this command did not make. Choose "
                "another folder or delete it."
            )
        write_config(output_dir, generation=config)
    elif different := [name for name in recorded | config if recorded.get(name) != config.get(name)]:
        name = different[0]
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} was created with {name} {recorded.get(name)!r}, but this run uses "
            f"{config.get(name)!r}. Choose another folder or delete it."
        )


def derive_seed(seed: int, sample_id: str) -> int:
    """Derive the seed of a sample, in [0, 2^63), from the seed of the run and the id of the sample."""
    digest = hashlib.sha256(f"{seed} {sample_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def find_image(output_dir: Path, sample_id: str) -> Path:
    """Return the path of the prediction of a sample."""
    return output_dir / IMAGES / f"{sample_id}.png"


# Scoring


def score(
    benchmark: Benchmark,
    images_dir: str | Path,
    output_dir: str | Path,
    protocol: str = "editar",
    metrics: Sequence[str] | None = None,
    models: Mapping[str, str] | None = None,
) -> dict:
    """Score predictions and write `metrics.json`. Each process scores its share.

    `metrics.json` lists predictions that are missing, unreadable or of the wrong size, and files that belong to no
    sample. For MagicBrush, predictions of any size are resized, as in its own evaluation.

    Args:
        benchmark (`Benchmark`): The samples.
        images_dir (`str` or `Path`): Folder of predictions from any system, `<id>.png` or another common format.
        output_dir (`str` or `Path`): The folder of the run.
        protocol (`str`, *optional*, defaults to `"editar"`): A key of `table.PROTOCOLS`.
        metrics (sequence of `str`, *optional*): Keys of `table.METRICS`; defaults to the metrics of the benchmark.
        models (mapping, *optional*): Name of a network → folder, file or Hub id that replaces the default network.

    Returns:
        The content of `metrics.json` in the main process, and an empty dict in the others.

    Raises:
        ValueError: If a name is unknown, a network is missing or not needed, there are no predictions, or the
            predictions belong to another run.
    """
    check_path("output_dir", output_dir)
    images_dir, output_dir, process = Path(images_dir), Path(output_dir), get_process()
    if not images_dir.is_dir():
        raise ValueError(f"`images` is {str(images_dir)!r}, which is not a folder; give the folder of predictions.")
    own = output_dir / IMAGES
    if "generation" in read_config(output_dir) and images_dir.resolve() != own.resolve():
        raise ValueError(
            f"`images` is {str(images_dir)!r}, but `output_dir` already holds other predictions, in {str(own)!r}; "
            "choose another `output_dir`."
        )
    names, models = resolve_scoring(benchmark, protocol, metrics, models)
    predictions = find_predictions(benchmark.categories, images_dir)
    if not predictions:
        raise ValueError(f"`images` {str(images_dir)!r} holds no prediction; name each prediction <id of sample>.png.")
    networks = {name: load_network(name, model, process.device) for name, model in models.items()}
    found = [sample_id for sample_id in benchmark.scored if sample_id in predictions]
    share = set(found[process.process_index :: process.num_processes])
    rows = []
    for sample in show_progress(benchmark.read(share), total=len(share), desc="scoring"):
        row = {"id": sample.id}
        try:
            prediction = open_image(predictions[sample.id])
        except Exception as error:  # decoders raise errors of many classes; a broken file must not end the run
            row |= {"problem": "unreadable", "reason": str(error) or type(error).__name__}
        else:
            if prediction.size == sample.size or benchmark.kind.takes_any_size:
                row["values"] = measure(sample, prediction, protocol, names, networks)
            else:
                reason = "{}×{}, not {}×{}".format(*prediction.size, *sample.size)
                row |= {"problem": "wrong size", "reason": reason}
        rows.append(row)
    rows = {row["id"]: row for row in gather_object(rows)}
    rows = [rows[sample_id] for sample_id in found]
    if not process.is_main_process:
        return {}
    used = {path.name for path in predictions.values()}
    others = sorted(path.name for path in images_dir.iterdir() if path.name not in used)
    problems = {"missing": [sample_id for sample_id in benchmark.scored if sample_id not in predictions]}
    for kind in ("unreadable", "wrong size"):
        problems[kind] = [f"{row['id']}: {row['reason']}" for row in rows if row.get("problem") == kind]
    summary = {
        **benchmark.info,
        "protocol": protocol,
        "num_expected": len(benchmark.scored),
        **summarize(benchmark.categories, rows, names),
        "problems": problems | {"extra": [name for name in others if not name.startswith(".")]},
    }
    means = [name for name in names if METRICS[name].is_mean]
    for row in rows:
        if "values" in row:
            row["values"] = {name: encode_number(row["values"][name]) for name in means}
    write_text(output_dir / SAMPLES_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_text(output_dir / METRICS_FILE, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    scoring = {"source": benchmark.source, "options": benchmark.options, "images": str(images_dir.resolve())}
    scoring["models"] = {name: {"id": str(model), "commit": find_commit(model)} for name, model in models.items()}
    write_config(output_dir, scoring=scoring | {"environment": describe_environment()})
    return summary


def resolve_scoring(
    benchmark: Benchmark,
    protocol: str = "editar",
    metrics: Sequence[str] | None = None,
    models: Mapping[str, str] | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Return the names of the metrics, and the folder, file or Hub id of each network that they need."""
    check_choice("protocol", protocol, PROTOCOLS)
    names, given = list(dict.fromkeys(metrics or benchmark.kind.metrics)), models or {}
    for name in names:
        check_choice("metrics", name, METRICS)
    needed = list(dict.fromkeys(model for name in names if (model := METRICS[name].model) is not None))
    for name in given:
        if name not in needed:
            raise ValueError(f"`{name}_model` is {given[name]!r}, but none of the `metrics` needs it; leave it out.")
    defaults, resolved = {**DEFAULT_MODELS, **benchmark.kind.models, **given}, {}
    for name in needed:
        if (model := defaults[name]) is None:
            raise ValueError(f"`{name}_model` is missing; pass {MISSING[name]}, or choose other `metrics`.")
        resolved[name] = model
    return names, resolved


def rehearse_scoring(benchmark: Benchmark, protocol: str, metrics: Sequence[str] | None, models: Mapping) -> None:
    """Score the first source image as if it were a prediction, to find problems with scoring before generation."""
    names, models = resolve_scoring(benchmark, protocol, metrics, models)
    networks = {name: load_network(name, model, get_process().device) for name, model in models.items()}
    sample = next(benchmark.read())
    measure(sample, sample.source_image, protocol, names, networks)


def measure(
    sample: Sample, prediction: Image.Image, protocol: str, names: Iterable[str], networks: Mapping[str, Network]
) -> dict:
    """Compute metrics of a prediction. Return a dict from names to values."""
    pair = Pair(prediction, sample, PROTOCOLS[protocol])
    return {name: METRICS[name].measure(pair, networks) for name in names}


def find_predictions(ids: Iterable[str], images_dir: Path) -> dict[str, Path]:
    """Find the predictions of samples: id → path. Of several formats, the first in `IMAGE_SUFFIXES` is used."""
    files, predictions = {path.name: path for path in images_dir.iterdir()}, {}
    for sample_id in ids:
        names = [f"{sample_id}{suffix}" for suffix in IMAGE_SUFFIXES if f"{sample_id}{suffix}" in files]
        if names:
            predictions[sample_id] = files[names[0]]
    return predictions


def summarize(category_of: Mapping[str, str], rows: Iterable[dict], names: Sequence[str]) -> dict:
    """Reduce the metrics of samples to metrics over all samples and by category."""
    rows = [row for row in rows if "values" in row]
    categories: dict[str, dict] = {category: {} for category in dict.fromkeys(category_of.values())}
    for category in categories:
        group = [row["values"] for row in rows if category_of[row["id"]] == category]
        for name in names:
            if METRICS[name].is_mean:
                categories[category][name] = summarize_metric(name, [values[name] for values in group])
    overall = {name: summarize_metric(name, [row["values"][name] for row in rows]) for name in names}
    return {"num_scored": len(rows), "overall": overall, "categories": categories}


def summarize_metric(name: str, values: Iterable) -> dict:
    """Summarize a metric: number n of samples where it is defined, mean, standard deviation (n − 1), scaled mean."""
    metric, values = METRICS[name], [value for value in values if value is not None]
    mean, deviation = metric.reduce(values) if values else math.nan, math.nan
    if metric.is_mean and len(values) > 1 and math.isfinite(mean):
        deviation = statistics.stdev(values)
    numbers = {"mean": mean, "std": deviation, "scaled": mean * metric.factor}
    return {"n": len(values), "factor": metric.factor} | {key: encode_number(value) for key, value in numbers.items()}
