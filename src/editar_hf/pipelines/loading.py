"""What stands before a pipeline's weights are read: which files of a repository it needs, and whether they are sound.

diffusers downloads no component whose class is not its own or transformers', and transformers fills missing weights
with random ones; both are settled here, from file names and tensor headers alone.
"""

import json
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path

import torch
from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME


INDEX_FILE = "model_index.json"
# Whatever a component keeps beside its weights: configurations, tokenizers, chat templates.
SIDE_FILE_SUFFIXES = (".json", ".jinja", ".model", ".txt")
WEIGHTS_SUFFIX = ".safetensors"
# Of more layers than this, building a network would not end.
MAX_NUM_LAYERS = 1000


# What a CPU needs to compute in a dtype, of `torch.cpu.get_capabilities()`. Without, torch computes in a slow loop
# (pytorch#146508).
CPU_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}


def choose_dtype(stored: Iterable[torch.dtype]) -> tuple[torch.dtype | None, str]:
    """Choose the dtype of a pipeline that is loaded without `dtype`.

    Args:
        stored (iterable of `torch.dtype`): What its weight files hold.

    Returns:
        The dtype, None where each component keeps that of its files, and the reason as a sentence.
    """
    half = [dtype for dtype in CPU_INSTRUCTIONS if dtype in set(stored)]
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in half)
    if not half:
        return None, "as stored"
    if torch.accelerator.is_available():
        return None, f"as stored: the {torch.accelerator.current_accelerator().type} device computes in {names}"
    capabilities = torch.cpu.get_capabilities()
    if all(any(capabilities.get(name) for name in CPU_INSTRUCTIONS[dtype]) for dtype in half):
        return None, f"as stored: this CPU has instructions for {names}"
    return torch.float32, f"this CPU has no instructions for {names}, in which the weights are stored"


def read_json_object(path: Path) -> dict:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: If it holds something else, or no JSON; the message names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` is no JSON: {error}. Save or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` holds a {type(content).__name__}, not an object. Save or download it again.")
    return content


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


def check_pipeline_folder(folder: Path, components: dict[str, type], variant: str | None) -> set[torch.dtype]:
    """Refuse a folder that is no pipeline, or whose weights are not those of the networks it describes.

    Args:
        folder (`Path`): What is to be loaded.
        components (`dict[str, type]`): The class of each component to be loaded from it.
        variant (`str`, *optional*): Which weight files will be loaded.

    Returns:
        The dtypes of the weights.

    Raises:
        ValueError: If `model_index.json` is absent or lacks a component, a JSON file holds no object, or keys of a
            component's weights are missing, unexpected or wrongly shaped; the message lists them.
    """
    if folder.is_file():
        raise ValueError(
            f"`{folder}` is a file; give a pipeline folder. `editar-hf convert` makes one of published EditAR files."
        )
    if not (folder / INDEX_FILE).is_file():
        raise ValueError(f"`{folder}` has no `{INDEX_FILE}`; give a folder that `save_pretrained` of a pipeline wrote.")
    index = read_json_object(folder / INDEX_FILE)
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(f"`{folder / INDEX_FILE}` names no pipeline under `_class_name`. Save or download it again.")
    if absent := [name for name in components if name not in index]:
        raise ValueError(f"`{folder}` is no EditAR pipeline: its `{INDEX_FILE}` lacks {', '.join(absent)}.")
    filenames = {path.relative_to(folder).as_posix() for path in folder.glob("*/*")}
    weight_files = select_weight_files(filenames, variant)
    dtypes = set()
    for name, component_class in components.items():
        check_index_entry(folder, name, index[name], component_class)
        for path in sorted((folder / name).glob("*.json")):
            read_json_object(path)
        if index[name][1] is None:
            continue
        if not issubclass(component_class, PreTrainedModel):
            # A processor asks the Auto classes for its parts. They know ours once the package was asked for a name.
            check_loads(folder / name, getattr(import_module("editar_hf"), component_class.__name__))
        else:
            paths = [folder / file for file in sorted(weight_files) if file.startswith(f"{name}/")]
            dtypes |= check_weights(folder / name, component_class, paths)
    return dtypes


def check_index_entry(folder: Path, name: str, entry, component_class: type):
    """Refuse an entry of `model_index.json` that is neither the component's library and class, nor two nulls."""
    is_left_out = entry == [None, None]
    is_named = isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
    library = component_class.__module__.partition(".")[0]
    is_named = is_named and entry[0].partition(".")[0] == library and entry[1] == component_class.__name__
    if not is_left_out and not is_named:
        raise ValueError(
            f"`{folder / INDEX_FILE}` says {entry!r} for {name}; an EditAR pipeline has a {component_class.__name__}."
        )


def check_loads(folder: Path, loaded_class: type):
    """Refuse a folder from which a small part of a pipeline does not load; libraries raise errors of every kind."""
    try:
        loaded_class.from_pretrained(folder)
    except Exception as error:
        raise ValueError(f"`{folder}` holds no {loaded_class.__name__} that loads: {error}") from error


def check_weights(folder: Path, model_class: type[PreTrainedModel], paths: list[Path]) -> set[torch.dtype]:
    """Refuse weight files whose keys and shapes are not those of the network that the folder's configuration describes.

    Returns:
        The dtypes of the weights.

    Raises:
        ValueError: With a list of the keys at fault.
    """
    try:
        config = model_class.config_class.from_pretrained(folder)
        if "quantization_config" in config.to_dict():
            return set()  # Quantised weights have names and shapes of their own, which their library checks.
        check_config(config)
        with torch.device("meta"):
            model = model_class(config)
    # What a configuration may hold, and what networks make of it, is more than can be foreseen.
    except Exception as error:
        raise ValueError(f"`{folder / CONFIG_NAME}` describes no {model_class.__name__}: {error}") from error
    if (folder / GENERATION_CONFIG_NAME).is_file() and hasattr(model_class, "generation_config_class"):
        check_loads(folder, model_class.generation_config_class)
    # Of tied weights one is stored, under either name.
    tied = model.all_tied_weights_keys
    expected = {tied.get(name, name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: entry for path in paths for name, entry in read_header(path).items()}
    found = {tied.get(name, name): shape for name, (shape, _) in stored.items()}
    if problems := describe_key_problems(found, expected):
        raise ValueError(
            f"The weights in `{folder}` do not fit its configuration: {problems}. Save or download it again."
        )
    return {dtype for _, dtype in stored.values() if dtype.is_floating_point}


def check_config(config: PreTrainedConfig):
    """Refuse what would end a network's building late or never."""
    for name, kind in (("dtype", torch.dtype | None), ("model_type", str)):
        if not isinstance(value := getattr(config, name), kind):
            raise ValueError(f"`{name}` is {value!r}")
    for name, value in config.to_dict().items():
        if name.endswith(("layers", "blocks")) and isinstance(value, int) and value > MAX_NUM_LAYERS:
            raise ValueError(f"`{name}` is {value}, more than {MAX_NUM_LAYERS}")


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


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Read names, shapes and dtypes of the tensors in a safetensors file, without the tensors."""
    try:
        with safe_open(path, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            return {
                name: (tuple(part.get_shape()), str_to_torch_dtype[part.get_dtype()]) for name, part in slices.items()
            }
    except (SafetensorError, OSError, KeyError) as error:  # A dtype that transformers does not know is a `KeyError`.
        raise ValueError(f"`{path}` is not a safetensors checkpoint: {error}. Save or download it again.") from error
