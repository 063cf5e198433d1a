"""The models that score, and which weights were used: a Hub id's commit, or a fingerprint of a folder."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig

from ..pipelines.hub import check_folder_or_hub_id
from . import scorers
from .protocols import Protocol


@dataclass(frozen=True)
class ScoringModel:
    """A model that metrics need.

    Args:
        build (`Callable`): Builds its scorer from a folder or Hub id, a device and a protocol.
        default (`str`, *optional*): The Hub id that is used where none is given.
        published (`str`, *optional*): The model of published figures, where that is not `default`.
    """

    build: Callable
    default: str | None = None
    published: str | None = None


SCORING_MODELS = {
    "structure": ScoringModel(
        lambda model, device, protocol: scorers.StructureScorer(
            model,
            device,
            pixel_scale=protocol.structure_pixel_scale,
            antialias=protocol.structure_antialias,
        ),
        "facebook/dino-vitb8",
    ),
    "clip": ScoringModel(
        lambda model, device, protocol: scorers.CLIPScorer(model, device), "openai/clip-vit-large-patch14"
    ),
    "dino": ScoringModel(lambda model, device, protocol: scorers.DINOScorer(model, device), "facebook/dino-vits16"),
    "depth": ScoringModel(
        lambda model, device, protocol: scorers.DepthScorer(model, device, variant=protocol.depth_variant),
        "Intel/dpt-large",
    ),
    "segmentation": ScoringModel(
        lambda model, device, protocol: scorers.SegmentationScorer(model, device),
        "facebook/maskformer-resnet101-coco-stuff",
        published="mmsegmentation's DeepLabV3-R101",
    ),
    # These two exist as no class of transformers: `editar-hf convert-metric-model` makes folders of the public files.
    "lpips": ScoringModel(lambda model, device, protocol: scorers.LPIPSScorer(model, device)),
    "inception": ScoringModel(lambda model, device, protocol: scorers.InceptionScorer(model, device)),
}


def resolve_models(names: Iterable[str], given: Mapping[str, str], defaults: Mapping[str, str]) -> dict[str, str]:
    """Say which folder or Hub id each model that is needed comes from.

    Args:
        names (iterable of `str`): The models, keys of `SCORING_MODELS`.
        given (mapping): Those the user named.
        defaults (mapping): Those of the task, where they are not the general ones.

    Raises:
        ValueError: If one has no default and none was given, or one was given that no metric needs or that is missing.
    """
    names = list(dict.fromkeys(names))
    if unused := sorted(set(given) - set(names)):
        raise ValueError(f"`{unused[0]}_model` is {given[unused[0]]!r}; none of the metrics asked for needs it.")
    for name, model in given.items():
        check_folder_or_hub_id(model, f"{name}_model")
    resolved = {name: given.get(name) or defaults.get(name) or SCORING_MODELS[name].default for name in names}
    if missing := [name for name, model in resolved.items() if model is None]:
        raise ValueError(
            f"`{missing[0]}_model` is missing: give the folder that `editar-hf convert-metric-model` made of the "
            "public weights, or list other `metrics`."
        )
    return resolved


def find_published(name: str, model: str, defaults: Mapping[str, str]) -> str | None:
    """Say which model published figures were computed with, where it is another one than `model`; else `None`.

    Models go by their Hub ids: a folder is not known to hold the same weights. Those that have none, which
    `editar-hf convert-metric-model` made of public files, are known by their width alone.

    Args:
        name (`str`): A key of `SCORING_MODELS`.
        model (`str`): The folder or Hub id that is used.
        defaults (mapping): Models of the task's published figures, where they are not the general ones.
    """
    published = defaults.get(name) or SCORING_MODELS[name].published or SCORING_MODELS[name].default
    if published is None:
        config, _ = PreTrainedConfig.get_config_dict(model)
        return None if config.get("width_divisor", 1) == 1 else "the network at its full width"
    return None if model == published else published


def load_models(models: Mapping[str, str], device, protocol: Protocol) -> dict:
    """Load the scorers of models."""
    return {name: SCORING_MODELS[name].build(model, device, protocol) for name, model in models.items()}


def find_revision(model: str | Path) -> str:
    """Find what names a model's weights: the commit of a Hub id, or a fingerprint of a folder's files.

    Args:
        model (`str` or `Path`): A folder or a Hub id; without a network, one that was downloaded before.

    Raises:
        ValueError: If it is neither.
    """
    if Path(model).exists():
        return f"sha256:{compute_fingerprint(Path(model))}"
    check_folder_or_hub_id(model, "model")
    try:
        # The last part of a snapshot's path is its commit; the configurations alone are enough to learn it.
        return Path(snapshot_download(str(model), allow_patterns=["*.json"])).name
    except OSError as error:  # which need not name the model
        raise OSError(f"`{model}` is not a folder here, and could not be downloaded from the Hub: {error}") from error


def compute_fingerprint(path: Path) -> str:
    """Compute a SHA-256 over a file, or over the names and contents of a folder's files.

    Cards and hidden files, such as those of git, change no picture and are left out.
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if file.suffix == ".md" or any(part.startswith(".") for part in file.relative_to(path).parts):
            continue
        digest.update(file.relative_to(path).as_posix().encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
