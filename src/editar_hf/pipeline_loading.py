"""What stands before a pipeline's weights are read: which files of a repository it needs, and whether they are sound.

diffusers downloads no component whose class is not its own or transformers', and transformers fills missing weights
with random ones; both are settled here, from file names and tensor headers alone.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel


INDEX_FILE = "model_index.json"
# Whatever a component keeps beside its weights: configurations, tokenizers, chat templates.
SIDE_FILE_SUFFIXES = (".json", ".jinja", ".model", ".txt")
WEIGHTS_SUFFIX = ".safetensors"

logger = logging.getLogger(__name__)


def select_weight_files(filenames: Iterable[str], variant: str | None) -> set[str]:
    """Select the safetensors files to load; a component without files of `variant` gives its plain ones.

    Raises:
        ValueError: If no component has files of `variant`.
    """
    filenames = {name for name in filenames if name.endswith(WEIGHTS_SUFFIX)}
    return set(variant_compatible_siblings(filenames, variant)[0])


def select_pipeline_files(filenames: Iterable[str], components: Iterable[str], variant: str | None) -> list[str]:
    """Select what a pipeline of these components needs of a repository's files.

    Raises:
        ValueError: If the repository holds no pipeline, or nothing of `variant`.
    """
    filenames = set(filenames)
    if INDEX_FILE not in filenames:
        raise ValueError(f"The repository has no `{INDEX_FILE}`; give the id of a pipeline.")
    folders = tuple(f"{component}/" for component in components)
    filenames = {name for name in filenames if name.startswith(folders)}
    side_files = {name for name in filenames if name.endswith(SIDE_FILE_SUFFIXES)}
    return sorted({INDEX_FILE} | side_files | select_weight_files(filenames, variant))


def check_pipeline_folder(folder: Path, components: dict[str, type], variant: str | None):
    """Refuse a folder that is no pipeline, or whose weights are not those of the networks it describes.

    Args:
        folder (`Path`): What is to be loaded.
        components (`dict[str, type]`): The class of each component to be loaded from it.
        variant (`str`, *optional*): Which weight files will be loaded.

    Raises:
        ValueError: If `model_index.json` is absent or lacks a component, or keys of a component's weights are missing,
            unexpected or wrongly shaped; the message lists them.
    """
    if folder.is_file():
        raise ValueError(
            f"`{folder}` is a file; give a pipeline folder. `editar-hf convert` makes one of published EditAR files."
        )
    if not (folder / INDEX_FILE).is_file():
        raise ValueError(f"`{folder}` has no `{INDEX_FILE}`; give a folder that `save_pretrained` of a pipeline wrote.")
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    if absent := [name for name in components if name not in index]:
        raise ValueError(f"`{folder}` is no EditAR pipeline: its `{INDEX_FILE}` lacks {', '.join(absent)}.")
    filenames = {path.relative_to(folder).as_posix() for path in folder.glob("*/*")}
    weight_files = select_weight_files(filenames, variant)
    for name, component_class in components.items():
        if issubclass(component_class, PreTrainedModel):
            paths = [folder / file for file in sorted(weight_files) if file.startswith(f"{name}/")]
            check_weights(folder / name, component_class, paths)


def check_weights(folder: Path, model_class: type[PreTrainedModel], paths: list[Path]):
    """Refuse weight files whose keys and shapes are not those of the network that the folder's configuration describes.

    Raises:
        ValueError: With a list of the keys at fault.
    """
    config = model_class.config_class.from_pretrained(folder)
    if "quantization_config" in config.to_dict():
        return  # Quantised weights have names and shapes of their own, which their library checks.
    with torch.device("meta"):
        model = model_class(config)
    # Of tied weights one is stored, under either name.
    tied = model.all_tied_weights_keys
    expected = {tied.get(name, name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {tied.get(name, name): shape for path in paths for name, shape in read_shapes(path).items()}
    if problems := describe_key_problems(found, expected):
        raise ValueError(
            f"The weights in `{folder}` do not fit its configuration: {problems}. Save or download it again."
        )


def describe_key_problems(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """List what is missing, unexpected and wrongly shaped among named shapes; an empty string if nothing is."""
    wrong_shapes = [
        f"{name} {tuple(found[name])} instead of {tuple(expected[name])}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    problems = (
        list_keys("missing", expected.keys() - found.keys()),
        list_keys("unexpected", found.keys() - expected.keys()),
        list_keys("wrongly shaped", wrong_shapes),
    )
    return "; ".join(filter(None, problems))


def list_keys(kind: str, keys: Iterable[str]) -> str:
    """Say which keys are at fault, or nothing."""
    keys = sorted(keys)
    return f"{len(keys)} {kind} ({', '.join(keys)})" if keys else ""


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes of the tensors in a safetensors file, without the tensors."""
    try:
        with safe_open(path, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"`{path}` is not a safetensors checkpoint: {error}. Save or download it again.") from error
