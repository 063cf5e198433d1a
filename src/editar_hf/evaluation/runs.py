"""Runs: predictions of one system for one benchmark, in one folder that can be stopped and gone on with.

    run/
      config.json          what the run depends on; a run with another configuration is refused
      images/<id>.png      the predictions
      samples-<rank>.jsonl a line per sample that was scored (`scoring.py`)
      features/<id>.npz    what metrics over all samples are computed from
      metrics.json         the figures

A sample's seed is derived from the run's seed and its id, and the samples that go through a system together are
the same in every run. So the number of processes and where a run was interrupted change no digit.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from PIL import Image

from .. import __version__
from ..processing_editar import prepare_rgb_picture
from .files import write_file, write_json
from .processes import get_process, show_progress
from .samples import Benchmark, Sample
from .systems import System


CONFIG_FILE, IMAGES = "config.json", "images"
PACKAGES = ("torch", "transformers", "diffusers", "pillow", "numpy")


def generate(benchmark: Benchmark, system: System, output_dir: str | Path, seed: int = 0, batch_size: int = 1) -> None:
    """Make the predictions that are not there yet; each process makes its share.

    Args:
        benchmark (`Benchmark`): The samples.
        system (`System`): Who makes the predictions; loaded only if one is missing.
        output_dir (`str` or `Path`): The run's folder.
        seed (`int`): From which each sample's seed is derived.
        batch_size (`int`): Samples that go through the system together; published figures have 1.

    Raises:
        ValueError: If `batch_size` is not positive, a sample lacks a picture that the system needs, or the folder holds
            a run of another configuration or predictions from elsewhere.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
    check_pictures(benchmark, system)
    output_dir, process = Path(output_dir), get_process()
    config = {
        "data": describe_benchmark(benchmark),
        "system": system.describe(),
        "seed": seed,
        "batch_size": batch_size,
        **describe_environment(),
    }
    with process.main_process_first():
        check_no_foreign_predictions(output_dir)
        record_configuration(output_dir, "generation", config)
    batches = [
        batch
        for batch in list_batches(benchmark, batch_size)[process.process_index :: process.num_processes]
        if not all(find_image(output_dir, benchmark.ids[index]).exists() for index in batch)
    ]
    if batches:
        system.load()
    with show_progress(total=sum(map(len, batches)), desc=system.name) as progress:
        for batch in batches:
            generate_batch(benchmark, system, output_dir, seed, batch)
            progress.update(len(batch))
    process.wait_for_everyone()


def check_pictures(benchmark: Benchmark, system: System) -> None:
    """Refuse a system that needs pictures that some samples do not have."""
    for option, name in system.needs.items():
        is_missing = benchmark.rows.data.column(name).is_null().to_pylist()
        if without := [sample_id for sample_id, missing in zip(benchmark.ids, is_missing, strict=True) if missing]:
            raise ValueError(
                f"`{option}` is {getattr(system, option)!r}, and {len(without)} of {len(benchmark)} samples have no "
                f"{name}, such as {without[0]}; leave the option out, or the samples."
            )


def check_no_foreign_predictions(output_dir: Path) -> None:
    """Refuse a folder with predictions, or figures of predictions, that this command did not make."""
    recorded, images = read_configuration(output_dir), output_dir / IMAGES
    if "generation" in recorded:
        return
    if "scoring" in recorded:
        raise ValueError(f"`output_dir` {str(output_dir)!r} holds figures of predictions from elsewhere; name another.")
    if images.is_dir() and any(not path.name.startswith(".") for path in images.iterdir()):
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} holds pictures in {IMAGES}/, and no {CONFIG_FILE} says how they were "
            "made; name another folder, or delete them."
        )


def list_batches(benchmark: Benchmark, batch_size: int) -> list[list[int]]:
    """List which samples go through the system together; one whose source is another's result comes with that one.

    Samples come in the benchmark's order, and `batch_size` counts chains: first samples with all that follow on them.
    """
    chains, chain_of = [], {}
    for index, (sample_id, previous) in enumerate(zip(benchmark.ids, benchmark.read_column("previous"), strict=True)):
        chain = [] if previous is None else chain_of[previous]
        if previous is None:
            chains.append(chain)
        chain.append(index)
        chain_of[sample_id] = chain
    groups = [chains[start : start + batch_size] for start in range(0, len(chains), batch_size)]
    return [[index for chain in group for index in chain] for group in groups]


def generate_batch(benchmark: Benchmark, system: System, output_dir: Path, seed: int, batch: list[int]) -> None:
    """Make the predictions of a batch: first of the samples with sources of their own, then of those that follow."""
    for samples in list_turns([benchmark[index] for index in batch]):
        for sample in samples:
            if sample.previous is not None:
                sample.source_image = read_image(find_image(output_dir, sample.previous))
        images = system.edit(samples, [derive_seed(seed, sample.id) for sample in samples])
        for sample, image in zip(samples, images, strict=True):
            write_file(find_image(output_dir, sample.id), lambda path, image=image: image.save(path, "PNG"))


def list_turns(samples: list[Sample]) -> Iterator[list[Sample]]:
    """List samples turn by turn: those whose sources are there, those that follow on these, and so on."""
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
    """Say where a run keeps a sample's prediction."""
    return output_dir / IMAGES / f"{sample_id}.png"


def read_image(path: Path) -> Image.Image:
    """Read a picture as RGB, transparency over white.

    Raises:
        OSError, ValueError: If it does not decode.
    """
    with Image.open(path) as image:
        return prepare_rgb_picture(image)


# Configurations


def describe_benchmark(benchmark: Benchmark) -> dict:
    """Say which samples a run is about."""
    return {name: benchmark.info[name] for name in ("task", "num_samples", "is_complete", "fingerprint")}


def describe_environment() -> dict:
    """Say which versions and which kind of device compute."""
    versions = {package: metadata.version(package) for package in PACKAGES}
    versions = {"editar-hf": __version__, "python": platform.python_version(), **versions}
    return {"versions": versions, "device": get_process().device.type}


def read_configuration(output_dir: Path) -> dict:
    """Read what a run depends on, part by part; nothing of one that was not begun."""
    path = output_dir / CONFIG_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record_configuration(output_dir: Path, part: str, config: dict) -> None:
    """Write a part of a run's configuration, or see that it is the one written before.

    Raises:
        ValueError: If the run was begun with another one.
    """
    recorded = read_configuration(output_dir)
    config = json.loads(json.dumps(config, default=str))
    if part in recorded:
        check_same(recorded[part], config, output_dir)
    elif get_process().is_main_process:
        write_json(output_dir / CONFIG_FILE, recorded | {part: config})


def check_images(output_dir: Path, images: Path) -> None:
    """Refuse to score other predictions in the folder of a run that made its own."""
    own = (output_dir / IMAGES).resolve()
    if "generation" in read_configuration(output_dir) and images.resolve() != own:
        raise ValueError(
            f"`images` is {str(images)!r}, and `output_dir` {str(output_dir)!r} holds a run whose predictions are in "
            f"{own}; name another `output_dir`."
        )


def record_paths(output_dir: Path, data: Path, images: Path) -> None:
    """Write where samples and predictions lie, for reports; they may be moved without making it another run."""
    if get_process().is_main_process:
        paths = {"data": str(data.resolve()), "images": str(images.resolve())}
        write_json(output_dir / CONFIG_FILE, read_configuration(output_dir) | {"paths": paths})


def check_same(recorded: dict, config: dict, output_dir: Path) -> None:
    """Refuse a configuration that differs, and say where."""
    before, now = flatten(recorded), flatten(config)
    for name in before | now:
        if resolve(before.get(name)) != resolve(now.get(name)):
            raise ValueError(
                f"`output_dir` {str(output_dir)!r} holds a run with {name} = {before.get(name)!r}, and this one has "
                f"{now.get(name)!r}; name another folder, or delete that one."
            )


def resolve(value):
    """Resolve what is a path; the same folder has many names."""
    return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value


def flatten(config: dict, prefix: str = "") -> dict:
    """Turn nested dicts into one, whose names are paths: {"a": {"b": 1}} → {"a.b": 1}."""
    flat = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
