"""A run: the predictions of one system for one benchmark in one folder, their figures, and what both depend on.

    run/
      config.json          how the predictions were made; a run with another configuration is refused
      images/<id>.png      the predictions
      samples.jsonl        the values of each prediction
      metrics.json         the figures

A sample's seed is derived from the run's seed and its id, and the samples that go through a system together are the
same in every run. So neither the number of processes nor an interruption changes the results: images that are there
are skipped, and scoring starts from scratch.
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
    """Encode a number for JSON, which has neither NaN (`None`) nor infinity ("inf")."""
    if value is None or math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)


def decode_number(value: float | str | None) -> float:
    """Read a number as `encode_number` wrote it."""
    return math.nan if value is None else float(value)


def read_config(output_dir: Path) -> dict:
    """Read what a run depends on; an empty dict if there is none."""
    path = output_dir / CONFIG_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_config(output_dir: Path, **parts: dict) -> None:
    """Write parts of a run's configuration."""
    config = read_config(output_dir) | parts
    write_text(output_dir / CONFIG_FILE, json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def describe_environment() -> dict[str, str]:
    """Return the kind of device and the versions that compute."""
    versions = {package: metadata.version(package) for package in PACKAGES}
    return {
        "device": get_process().device.type,
        "editar-hf": __version__,
        "python": platform.python_version(),
        **versions,
    }


# Predictions


def generate(benchmark: Benchmark, system: System, output_dir: str | Path, seed: int = 0, batch_size: int = 1) -> None:
    """Make the predictions that are not there yet; each process makes its share.

    Args:
        benchmark (`Benchmark`): The samples.
        system (`System`): It is loaded only if a prediction is missing.
        output_dir (`str` or `Path`): The run's folder.
        seed (`int`, *optional*, defaults to 0): Each sample's seed is derived from it.
        batch_size (`int`, *optional*, defaults to 1): Samples that go through the system together; published figures
            have 1.

    Raises:
        ValueError: If a sample lacks an image that the system needs, or the folder holds predictions that were made in
            another way.
    """
    check_integer("batch_size", batch_size)
    check_path("output_dir", output_dir)
    if system.needs in benchmark.lacking:
        raise ValueError(
            f"`system` {system.name} needs the {system.needs} of every sample, and "
            f"{benchmark.lacking[system.needs]} has none; choose other options or leave out such samples."
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
            # First the samples with sources of their own, then those that edit their results.
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
    """Write how predictions are made, or check that those that are there were made in the same way."""
    recorded = read_config(output_dir).get("generation")
    if recorded is None:
        if (output_dir / IMAGES).exists() or (output_dir / METRICS_FILE).exists():
            raise ValueError(
                f"`output_dir` {str(output_dir)!r} holds images or figures that this command did not make. Choose "
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
    """Derive a sample's seed, in [0, 2^63), from the run's and its id."""
    digest = hashlib.sha256(f"{seed} {sample_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def find_image(output_dir: Path, sample_id: str) -> Path:
    """Return the path of a sample's prediction."""
    return output_dir / IMAGES / f"{sample_id}.png"


# Figures


def score(
    benchmark: Benchmark,
    images_dir: str | Path,
    output_dir: str | Path,
    protocol: str = "editar",
    metrics: Sequence[str] | None = None,
    models: Mapping[str, str] | None = None,
) -> dict:
    """Score predictions and write `metrics.json`; each process scores its share.

    Predictions that are missing, unreadable or of another size are counted and named, and so are files that belong to
    no sample. For MagicBrush, predictions of any size are resized, as its own evaluation does.

    Args:
        benchmark (`Benchmark`): The samples.
        images_dir (`str` or `Path`): The predictions, `<id>.png` or of another common format, from any system.
        output_dir (`str` or `Path`): The run's folder.
        protocol (`str`, *optional*, defaults to `"editar"`): A key of `table.PROTOCOLS`.
        metrics (sequence of `str`, *optional*): Keys of `table.METRICS`; defaults to those of the benchmark's table.
        models (mapping, *optional*): Folders, files or Hub ids in place of the default networks, by name.

    Returns:
        What `metrics.json` holds; in all processes but the first, an empty dict.

    Raises:
        ValueError: If a name is unknown, a network is missing or not needed, or there are no predictions, or they are
            not those of the run.
    """
    check_path("output_dir", output_dir)
    images_dir, output_dir, process = Path(images_dir), Path(output_dir), get_process()
    if not images_dir.is_dir():
        raise ValueError(f"`images` is {str(images_dir)!r}, which is no folder.")
    own = output_dir / IMAGES
    if "generation" in read_config(output_dir) and images_dir.resolve() != own.resolve():
        raise ValueError(
            f"`images` is {str(images_dir)!r}, but `output_dir` has the run in {str(own)!r}; choose another."
        )
    names, models = resolve_scoring(benchmark, protocol, metrics, models)
    predictions = find_predictions(benchmark.categories, images_dir)
    if not predictions:
        raise ValueError(f"`images` {str(images_dir)!r} holds no prediction; a sample's is <id>.png.")
    networks = {name: load_network(name, model, process.device) for name, model in models.items()}
    found = [sample_id for sample_id in benchmark.scored if sample_id in predictions]
    share = set(found[process.process_index :: process.num_processes])
    rows = []
    for sample in show_progress(benchmark.read(share), total=len(share), desc="scoring"):
        row = {"id": sample.id}
        try:
            prediction = open_image(predictions[sample.id])
        except Exception as error:  # decoders raise anything on broken files, and one must not stop the others
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
        **summarise(benchmark.categories, rows, names),
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
    """Return the names of the metrics, and where their networks come from."""
    check_choice("protocol", protocol, PROTOCOLS)
    names, given = list(dict.fromkeys(metrics or benchmark.kind.metrics)), models or {}
    for name in names:
        check_choice("metrics", name, METRICS)
    needed = list(dict.fromkeys(model for name in names if (model := METRICS[name].model) is not None))
    for name in given:
        if name not in needed:
            raise ValueError(f"`{name}_model` is {given[name]!r}; none of the metrics asked for needs it.")
    defaults, resolved = {**DEFAULT_MODELS, **benchmark.kind.models, **given}, {}
    for name in needed:
        if (model := defaults[name]) is None:
            raise ValueError(f"`{name}_model` is missing; pass {MISSING[name]}, or choose other `metrics`.")
        resolved[name] = model
    return names, resolved


def rehearse_scoring(benchmark: Benchmark, protocol: str, metrics: Sequence[str] | None, models: Mapping) -> None:
    """Score the first source image as if it were a prediction; so what cannot be scored is told before generation."""
    names, models = resolve_scoring(benchmark, protocol, metrics, models)
    networks = {name: load_network(name, model, get_process().device) for name, model in models.items()}
    sample = next(benchmark.read())
    measure(sample, sample.source_image, protocol, names, networks)


def measure(
    sample: Sample, prediction: Image.Image, protocol: str, names: Iterable[str], networks: Mapping[str, Network]
) -> dict:
    """Compute metrics of a prediction, by name."""
    pair = Pair(prediction, sample, PROTOCOLS[protocol])
    return {name: METRICS[name].measure(pair, networks) for name in names}


def find_predictions(ids: Iterable[str], images_dir: Path) -> dict[str, Path]:
    """Find the predictions that are there, by sample; of several formats, the first of `IMAGE_SUFFIXES` counts."""
    there, predictions = {path.name: path for path in images_dir.iterdir()}, {}
    for sample_id in ids:
        names = [f"{sample_id}{suffix}" for suffix in IMAGE_SUFFIXES if f"{sample_id}{suffix}" in there]
        if names:
            predictions[sample_id] = there[names[0]]
    return predictions


def summarise(category_of: Mapping[str, str], rows: Iterable[dict], names: Sequence[str]) -> dict:
    """Reduce the rows of samples to figures over all and by category."""
    rows = [row for row in rows if "values" in row]
    categories: dict[str, dict] = {category: {} for category in dict.fromkeys(category_of.values())}
    for category in categories:
        group = [row["values"] for row in rows if category_of[row["id"]] == category]
        for name in names:
            if METRICS[name].is_mean:
                categories[category][name] = summarise_metric(name, [values[name] for values in group])
    overall = {name: summarise_metric(name, [row["values"][name] for row in rows]) for name in names}
    return {"num_scored": len(rows), "overall": overall, "categories": categories}


def summarise_metric(name: str, values: Iterable) -> dict:
    """Summarise one metric: mean, standard deviation (n − 1), how many samples it is defined for, scaled mean."""
    metric, values = METRICS[name], [value for value in values if value is not None]
    mean, deviation = metric.reduce(values) if values else math.nan, math.nan
    if metric.is_mean and len(values) > 1 and math.isfinite(mean):
        deviation = statistics.stdev(values)
    numbers = {"mean": mean, "std": deviation, "scaled": mean * metric.factor}
    return {"n": len(values), "factor": metric.factor} | {key: encode_number(value) for key, value in numbers.items()}
