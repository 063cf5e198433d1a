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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from accelerate.utils import gather_object
from PIL import Image

from .. import __version__
from ..checks import check_path
from ..image_processing_editar import prepare_rgb_image
from ..io import atomic_path
from .benchmarks import RESOLUTION, Benchmark, Sample
from .features import DEFAULT_MODELS, MISSING, find_revision, load_network
from .processes import get_process, show_progress
from .systems import System
from .table import METRICS, PROTOCOLS, Pair, check_scoring


CONFIG_FILE, IMAGES, SAMPLES_FILE, METRICS_FILE = "config.json", "images", "samples.jsonl", "metrics.json"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PROBLEMS = ("missing", "unreadable", "wrong size")
PACKAGES = ("torch", "transformers", "diffusers", "pillow", "numpy")


# Files


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def encode_numbers(content):
    """Replace the numbers that JSON does not have: NaN by `None`, infinity by "inf"."""
    if isinstance(content, dict):
        return {name: encode_numbers(value) for name, value in content.items()}
    if isinstance(content, float) and not math.isfinite(content):
        return None if math.isnan(content) else str(content)
    return content


def decode_number(value: float | str | None) -> float:
    """Read a number as `encode_numbers` wrote it."""
    return math.nan if value is None else float(value)


def read_image(path: Path) -> Image.Image:
    """Read an image as RGB, transparency over white."""
    with Image.open(path) as image:
        return prepare_rgb_image(image)


def read_config(output_dir: Path) -> dict:
    """Read what a run depends on; an empty dict if there is none."""
    path = output_dir / CONFIG_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_config(output_dir: Path, **parts: dict) -> None:
    """Write parts of a run's configuration."""
    if get_process().is_main_process:
        config = read_config(output_dir) | parts
        write_text(output_dir / CONFIG_FILE, json.dumps(config, indent=1, ensure_ascii=False, default=str) + "\n")


def describe_environment() -> dict:
    """Return the versions and the kind of device that compute."""
    versions = {"editar-hf": __version__, "python": platform.python_version()}
    return {
        "versions": versions | {package: metadata.version(package) for package in PACKAGES},
        "device": get_process().device.type,
    }


def flatten(config: dict, prefix: str = "") -> dict:
    """Turn nested dicts into one, whose names are paths: {"a": {"b": 1}} → {"a.b": 1}."""
    flat = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


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
        ValueError: If `batch_size` is not positive, a sample lacks an image that the system needs, or the folder holds
            predictions that were made in another way.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
    for option, name in system.needs.items():
        if without := benchmark.lacking.get(name):
            raise ValueError(
                f"`{option}` is {system.options[option]!r}, but {len(without)} of {len(benchmark)} samples have no "
                f"{name}, such as {without[0]}; leave out the option or these samples."
            )
    check_path("output_dir", output_dir)
    output_dir, process = Path(output_dir), get_process()
    with process.main_process_first():
        check_config(
            output_dir,
            {
                "data": benchmark.info,
                "system": system.describe(),
                "seed": seed,
                "batch_size": batch_size,
                **describe_environment(),
            },
        )
    batches = [
        batch
        for batch in list_batches(benchmark, batch_size)[process.process_index :: process.num_processes]
        if not all(find_image(output_dir, sample_id).exists() for sample_id in batch)
    ]
    edit = system.load() if batches else None
    batch_of, waiting = {sample_id: tuple(batch) for batch in batches for sample_id in batch}, {}
    with show_progress(total=len(batch_of), desc=system.name) as progress:
        for sample in benchmark.read(batch_of):
            batch = batch_of[sample.id]
            waiting.setdefault(batch, []).append(sample)
            if len(waiting[batch]) == len(batch):
                edit_batch(edit, waiting.pop(batch), output_dir, seed)
                progress.update(len(batch))
    process.wait_for_everyone()


def check_config(output_dir: Path, config: dict) -> None:
    """Write how predictions are made, or check that those that are there were made in the same way."""
    recorded, config = read_config(output_dir), json.loads(json.dumps(config, default=str))
    if "generation" not in recorded:
        images = output_dir / IMAGES
        if recorded or (images.is_dir() and any(not path.name.startswith(".") for path in images.iterdir())):
            raise ValueError(
                f"`output_dir` {str(output_dir)!r} holds images or figures that this command did not make. Choose "
                "another folder or delete it."
            )
        return write_config(output_dir, generation=config)
    before, now = flatten(recorded["generation"]), flatten(config)
    for name in before | now:
        # The same weights may be in another folder; their revision tells.
        if before.get(name) != now.get(name) and name not in ("system.model", "system.lora"):
            raise ValueError(
                f"`output_dir` {str(output_dir)!r} was created with {name} {before.get(name)!r}, but this run uses "
                f"{now.get(name)!r}. Choose another folder or delete it."
            )
    return None


def list_batches(benchmark: Benchmark, batch_size: int) -> list[list[str]]:
    """List the ids that go through the system together: `batch_size` samples, each with all that edit its result."""
    chains, chain_of = [], {}
    for sample_id, previous in zip(benchmark.ids, benchmark.previous, strict=True):
        chain = [] if previous is None else chain_of[previous]
        if previous is None:
            chains.append(chain)
        chain.append(sample_id)
        chain_of[sample_id] = chain
    groups = [chains[start : start + batch_size] for start in range(0, len(chains), batch_size)]
    return [[sample_id for chain in group for sample_id in chain] for group in groups]


def edit_batch(edit: Callable, samples: list[Sample], output_dir: Path, seed: int) -> None:
    """Make the predictions of a batch: first of the samples with sources of their own, then of those that follow."""
    for turn in list_turns(samples):
        for sample in turn:
            if sample.previous is not None:
                sample.source_image = read_image(find_image(output_dir, sample.previous))
        images = edit(turn, [derive_seed(seed, sample.id) for sample in turn])
        for sample, image in zip(turn, images, strict=True):
            with atomic_path(find_image(output_dir, sample.id)) as unfinished:
                image.save(unfinished, "PNG")


def list_turns(samples: list[Sample]) -> Iterator[list[Sample]]:
    """List samples turn by turn: those whose sources are there, those that edit their results, and so on."""
    done = {None}
    while samples:
        ready = [sample for sample in samples if sample.previous in done]
        yield ready
        done |= {sample.id for sample in ready}
        samples = [sample for sample in samples if sample.id not in done]


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
        ValueError: If `resolve_scoring` refuses, there are no predictions, or they are not those of the run.
    """
    check_path("output_dir", output_dir)
    images_dir, output_dir, process = Path(images_dir), Path(output_dir), get_process()
    if not images_dir.is_dir():
        raise ValueError(f"`images` is {str(images_dir)!r}, which is no folder.")
    names, models = resolve_scoring(benchmark, protocol, metrics, models)
    own = (output_dir / IMAGES).resolve()
    if "generation" in read_config(output_dir) and images_dir.resolve() != own:
        raise ValueError(
            f"`images` is {str(images_dir)!r}, but the predictions of the run in `output_dir` {str(output_dir)!r} are "
            f"in {own}; choose another `output_dir`."
        )
    predictions = find_predictions(benchmark.ids, images_dir)
    if not predictions:
        raise ValueError(f"`images` {str(images_dir)!r} holds no prediction; a sample's is <id>.png.")
    counted = [sample_id for sample_id, is_scored in zip(benchmark.ids, benchmark.is_scored, strict=True) if is_scored]
    share = [sample_id for sample_id in counted if sample_id in predictions]
    share = set(share[process.process_index :: process.num_processes])
    networks = {name: load_network(name, model, process.device) for name, model in models.items()}
    rows = [
        score_prediction(sample, predictions[sample.id], protocol, names, networks, benchmark.kind.takes_any_size)
        for sample in show_progress(benchmark.read(share), total=len(share), desc="scoring")
    ]
    rows = {row["id"]: row for row in gather_object(rows)}
    if not process.is_main_process:
        return {}
    summary = {
        **benchmark.info,
        "protocol": protocol,
        "not_comparable": list_reasons(benchmark, protocol, names, models),
        "num_expected": len(counted),
        **summarise(benchmark, [rows[sample_id] for sample_id in counted if sample_id in rows], names),
        "formats": dict(sorted(Counter(path.suffix for path in predictions.values()).items())),
        "problems": list_problems(counted, predictions, images_dir, rows),
    }
    lines = [
        {name: value for name, value in rows[key].items() if name != "collected"} for key in counted if key in rows
    ]
    lines = [json.dumps(encode_numbers(line), ensure_ascii=False) for line in lines]
    write_text(output_dir / SAMPLES_FILE, "\n".join(lines) + "\n")
    write_text(output_dir / METRICS_FILE, json.dumps(encode_numbers(summary), indent=1, ensure_ascii=False) + "\n")
    write_config(
        output_dir,
        scoring={
            "source": benchmark.source,
            "options": benchmark.options,
            "images": str(images_dir.resolve()),
            "models": {name: {"id": model, "revision": find_revision(model)} for name, model in models.items()},
            **describe_environment(),
        },
    )
    return summary


def resolve_scoring(
    benchmark: Benchmark,
    protocol: str = "editar",
    metrics: Sequence[str] | None = None,
    models: Mapping[str, str] | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Return the metrics and where their networks come from; before images are made, it tells what cannot be scored.

    Raises:
        ValueError: If a metric or protocol is unknown, images of the benchmark's sizes cannot have a metric, or a
            network has no default and was not given, or was given and is missing or not needed.
    """
    names, given = list(dict.fromkeys(metrics or benchmark.kind.metrics)), models or {}
    check_scoring(names, benchmark.sizes, protocol)
    needed = list(dict.fromkeys(METRICS[name].model for name in names if METRICS[name].model))
    if unused := sorted(set(given) - set(needed)):
        raise ValueError(f"`{unused[0]}_model` is {given[unused[0]]!r}; none of the metrics asked for needs it.")
    defaults = DEFAULT_MODELS | benchmark.kind.models
    resolved = {name: given.get(name) or defaults[name] for name in needed}
    for name, model in resolved.items():
        if model is None:
            raise ValueError(f"`{name}_model` is missing; pass {MISSING[name]}, or choose other `metrics`.")
    return names, resolved


def list_reasons(benchmark: Benchmark, protocol: str, names: Sequence[str], models: Mapping[str, str]) -> list[dict]:
    """List why figures are not comparable with published ones: each reason, and its metrics."""
    reasons, published = [], f"{RESOLUTION}×{RESOLUTION}"
    if protocol == "corrected":
        reasons.append({"reason": f"protocol {protocol}", "metrics": list(names)})
    if benchmark.kind.has_resolution and (others := sorted(set(benchmark.sizes) - {published})):
        reasons.append({"reason": f"images of {', '.join(others)}, not {published}", "metrics": list(names)})
    defaults = DEFAULT_MODELS | benchmark.kind.models
    for name, model in models.items():
        # Published mIoU is by a network that transformers does not have.
        default = "mmsegmentation's DeepLabV3-R101" if name == "segmentation" else defaults[name]
        if default not in (None, model):
            columns = [column for column in names if METRICS[column].model == name]
            titles = ", ".join(METRICS[column].title for column in columns)
            reason = f"{titles} by {model}, not {default}"
            reasons.append({"reason": reason, "metrics": columns})
    return reasons


def find_predictions(ids: Iterable[str], images_dir: Path) -> dict[str, Path]:
    """Find the predictions that are there, by sample; of several formats, the first of `IMAGE_SUFFIXES` counts."""
    there, predictions = {path.name: path for path in images_dir.iterdir()}, {}
    for sample_id in ids:
        names = (f"{sample_id}{suffix}" for suffix in IMAGE_SUFFIXES)
        if (name := next((name for name in names if name in there), None)) is not None:
            predictions[sample_id] = there[name]
    return predictions


def score_prediction(
    sample: Sample, path: Path, protocol: str, names: Sequence[str], networks: dict, takes_any_size: bool
) -> dict:
    """Score one prediction: its values and what metrics of all predictions collect, or what is wrong with it."""
    try:
        prediction = read_image(path)
    except Exception as error:  # decoders raise anything on broken files, and one must not stop the others
        return {"id": sample.id, "problem": "unreadable", "reason": str(error) or type(error).__name__}
    if prediction.size != sample.size and not takes_any_size:
        reason = "{}×{}, not {}×{}".format(*prediction.size, *sample.size)
        return {"id": sample.id, "problem": "wrong size", "reason": reason}
    pair = Pair(prediction, sample, PROTOCOLS[protocol])
    measured = {name: METRICS[name].measure(pair, networks) for name in names}
    return {
        "id": sample.id,
        "values": {name: value for name, value in measured.items() if not METRICS[name].reduce},
        "collected": {name: value for name, value in measured.items() if METRICS[name].reduce},
    }


def summarise(benchmark: Benchmark, rows: Sequence[dict], names: Sequence[str]) -> dict:
    """Reduce the rows of all samples, in the benchmark's order, to figures over all and by category."""
    rows = [row for row in rows if "values" in row]
    category_of = dict(zip(benchmark.ids, benchmark.categories, strict=True))
    single = [name for name in names if not METRICS[name].reduce]
    categories = {
        category: [row for row in rows if category_of[row["id"]] == category]
        for category in dict.fromkeys(benchmark.categories)
    }
    return {
        "num_scored": len(rows),
        "overall": {name: summarise_metric(name, rows) for name in names},
        "categories": {
            category: {name: summarise_metric(name, group) for name in single} for category, group in categories.items()
        },
    }


def summarise_metric(name: str, rows: Sequence[dict]) -> dict:
    """Summarise one metric: mean, standard deviation (n − 1), how many samples it is defined for, scaled mean."""
    metric, mean, deviation = METRICS[name], math.nan, math.nan
    if metric.reduce:
        values = [row["collected"][name] for row in rows if row["collected"][name] is not None]
        if len(values) > 1:
            mean = metric.reduce(values)
    else:
        values = [row["values"][name] for row in rows if not math.isnan(row["values"][name])]
        if math.inf in values:
            mean = math.inf
        elif values:
            mean = statistics.fmean(values)
            deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    factor = metric.factor
    return {"mean": mean, "std": deviation, "n": len(values), "factor": factor, "scaled": mean * factor}


def list_problems(
    counted: Sequence[str], predictions: Mapping[str, Path], images_dir: Path, rows: Mapping[str, dict]
) -> dict[str, list[str]]:
    """Name the predictions that do not count, with the reason, and the files that belong to no sample."""
    problems = {"missing": [sample_id for sample_id in counted if sample_id not in predictions]}
    for kind in PROBLEMS[1:]:
        found = [rows[sample_id] for sample_id in counted if rows.get(sample_id, {}).get("problem") == kind]
        problems[kind] = [f"{row['id']}: {row['reason']}" for row in found]
    names = {path.name for path in predictions.values()}
    others = sorted(path.name for path in images_dir.iterdir() if path.name not in names)
    return problems | {"extra": [name for name in others if not name.startswith(".")]}
