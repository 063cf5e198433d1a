"""Load, save and share pipelines: folders, the Hub, model cards.

diffusers cannot download components with classes of other packages, so this module selects the files to download.
transformers initializes missing weights at random, so this module compares the keys and shapes of all weights with
those of the networks before any weight is read.
"""

import os
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_utils
from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings
from huggingface_hub import (
    EvalResult,
    ModelCard,
    ModelCardData,
    create_repo,
    file_exists,
    get_cached_repo_tree,
    hf_hub_download,
    repo_info,
    snapshot_download,
)
from huggingface_hub import upload_folder as upload_to_hub
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import GENERATION_CONFIG_NAME, logging

from ..checks import check_path
from ..packing import check_not_packed
from .dtypes import choose_dtype


logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
CARD_TAGS = {"adapter": ["image-editing", "lora"], "vq_model": ["vq-tokenizer"]}
INDEX_FILE = "model_index.json"
# Files of a pipeline folder through which serving engines and endpoints find this package; see docs/engines.md.
ENGINE_FILES = ("pipeline.py", "handler.py")
# Files of a component other than its weights: configurations, tokenizers, chat templates.
SIDE_FILE_SUFFIXES = (".json", ".jinja", ".model", ".txt")
WEIGHTS_SUFFIX = ".safetensors"
# Older versions of diffusers have another name for `dtype`, and ignore the new name.
DTYPE = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
# While transformers loads a model, it disables the initialization of weights in the whole process. Two
# loads at the same time could therefore leave weights random.
LOADING = threading.Lock()


# Model cards


def make_card(
    template: str,
    name: str,
    dataset: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    metrics: Mapping[str, float] | None = None,
    **sections: Any,
) -> str:
    """Make a model card from a template of this package, `editar_hf/model_cards/`.

    A section without text tells the author what to write there.

    Args:
        template (`str`): `"base"` (a pipeline), `"adapter"`, `"vq_model"` or `"converted"`.
        name (`str`): The Hub id or folder that the example code of the card loads.
        dataset, base_model (`str`, *optional*): The data set and the model that the training started from. The header
            of the card names them only if they are Hub ids.
        license (`str`, *optional*): Identifier of the license.
        metrics (mapping of `str` to `float`, *optional*): Results on held-out data of `dataset`, by the types of the
            metrics. They go into the `model-index` of the header, which the Hub shows beside the card.
        sections: Texts and numbers for the template.
    """
    title, is_public = name.rpartition("/")[2], dataset is not None and is_hub_id(dataset)
    where = ("image-to-image", dataset if is_public else "custom", Path(dataset or "custom").name)
    data = ModelCardData(
        library_name="editar-hf",
        pipeline_tag="image-to-image",
        tags=["editar", *CARD_TAGS.get(template, ["image-editing"])],
        datasets=[dataset] if is_public else None,
        base_model=base_model if base_model is not None and is_hub_id(base_model) else None,
        license=license,
        model_name=title if metrics else None,
        eval_results=[EvalResult(*where, kind, value) for kind, value in (metrics or {}).items()] or None,
    )
    path = str(files("editar_hf") / "model_cards" / f"{template}.md")
    facts = {"name": name, "title": title, "base_model": base_model, "license": license, **sections}
    return str(ModelCard.from_template(data, template_path=path, **facts))


# Names of folders and repositories


def is_hub_id(name: str) -> bool:
    """Return True if a name is a valid Hub id and not a local folder or file."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def check_folder_or_hub_id(value: str | os.PathLike, argument: str) -> None:
    """Check that a value is a local folder or file, or a valid Hub id. This does not access the Hub.

    Args:
        value (`str` or `os.PathLike`): The folder, file or Hub id.
        argument (`str`): Name of the user's argument, for the message.

    Raises:
        TypeError: If `value` is neither a string nor a path.
        ValueError: If `value` is neither a local folder or file nor a valid Hub id.
    """
    check_path(argument, value)
    name = os.fspath(value)
    if not (os.path.exists(name) or is_hub_id(name)):
        raise ValueError(
            f"`{argument}` is {name!r}: there is no such folder or file, and it is not a Hub id (`owner/name`). Check "
            f"the path; relative paths start in {os.getcwd()}."
        )


# Uploads


def create_repository(repo_id: str, private: bool | None = None, token: str | bool | None = None) -> str:
    """Create a model repository on the Hub if it does not exist, and return its full id.

    Args:
        repo_id (`str`): The id of the repository.
        private (`bool`, *optional*): Whether only the owner can see the repository. With `None`, a new repository is
            public, unless its organization makes repositories private by default; an existing repository keeps its
            visibility.
        token (`str` or `bool`, *optional*): See `huggingface_hub.create_repo`.

    Raises:
        ValueError: If `private` is True, but the repository exists and is public.
    """
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    # `create_repo` does not change an existing repository.
    if private and not repo_info(repo_id, token=token).private:
        raise ValueError(
            f"`private` is True, but the repository {repo_id} exists and is public. Pass another repository, make this "
            "one private in its settings on the Hub, or allow a public repository (`private=False`; in training "
            "`--no-hub-private-repo`)."
        )
    return repo_id


def upload_folder(
    folder: str | Path,
    repo_id: str,
    previous_card: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> str:
    """Upload a folder to the Hub without overwriting a hand-written model card, or files for serving engines.

    Args:
        folder (`str` or `Path`): The folder.
        repo_id (`str`): The repository; it is created if it does not exist.
        previous_card (`str`, *optional*): The card of an earlier upload. If the repository has exactly this card, the
            new card replaces it.
        private (`bool`, *optional*): See `create_repository`.
        token (`str` or `bool`, *optional*): See `huggingface_hub.create_repo`.
        options: Further arguments of `huggingface_hub.upload_folder`.

    Returns:
        The address of the commit.
    """
    create_repository(repo_id, private, token)
    names = [name for name in ENGINE_FILES if (Path(folder) / name).exists()]
    ignored = [name for name in names if file_exists(repo_id, name, token=token)]
    if file_exists(repo_id, CARD_FILE, token=token):
        card = Path(hf_hub_download(repo_id, CARD_FILE, token=token)).read_text(encoding="utf-8")
        if card != previous_card:
            ignored.append(CARD_FILE)
            logger.warning(f"{repo_id} keeps its own model card; {Path(folder) / CARD_FILE} was not uploaded.")
    commit = upload_to_hub(repo_id=repo_id, folder_path=folder, ignore_patterns=ignored, token=token, **options)
    return commit.commit_url


def try_to_upload_folder(
    folder: str | Path, repo_id: str, previous_card: str | None = None, private: bool | None = None
) -> str | None:
    """Upload a folder with `upload_folder`. If the upload fails, log the command that repeats it, and return None.

    Training uses this function, because a failed upload must not end a training run.
    """
    try:
        return upload_folder(folder, repo_id, previous_card, private)
    except Exception as error:  # such as the network, the Hub, or a token that has expired
        logger.error(
            f"The upload to {repo_id} failed: {error}\nAll files are still in {folder}. To try again, run:\n"
            f"    hf upload {repo_id} {folder}{' --private' if private else ''}"
        )
        return None


# Checks before weights are read


def select_weight_files(filenames: Iterable[str], variant: str | None) -> set[str]:
    """Select the safetensors files to load. For a component without files of `variant`, select its plain files.

    Raises:
        ValueError: If no component has files of `variant`.
    """
    filenames = {name for name in filenames if name.endswith(WEIGHTS_SUFFIX)}
    return set(variant_compatible_siblings(filenames, variant)[0])


def check_pipeline_folder(
    folder: Path, components: dict[str, type], variant: str | None
) -> tuple[set[torch.dtype], dict[str, Any]]:
    """Check that a folder is a pipeline, and that its weights match the networks that its configurations describe.

    Args:
        folder (`Path`): The pipeline folder.
        components (`dict[str, type]`): The class of each component to be loaded from the folder.
        variant (`str`, *optional*): The variant of the weight files to be loaded.

    Returns:
        The dtypes of the weights; and the components that have no weights, which are already loaded.

    Raises:
        ValueError: If `model_index.json` does not exist or lacks a component, a component's files are damaged, or keys
            of its weights are missing, unexpected or have the wrong shape; the message lists them.
    """
    if folder.is_file():
        raise ValueError(
            f"`{folder}` is a file; pass a pipeline folder. `editar-hf convert` converts published EditAR files to one."
        )
    if not (folder / INDEX_FILE).is_file():
        raise ValueError(f"`{folder}` has no `{INDEX_FILE}`; pass a folder that a pipeline's `save_pretrained` wrote.")
    index = DiffusionPipeline.load_config(folder) or {}
    if absent := [name for name in components if name not in index]:
        raise ValueError(
            f"`{folder}` is not an EditAR pipeline: its `{INDEX_FILE}` lacks {', '.join(absent)}; pass another folder."
        )
    weight_files = select_weight_files((path.relative_to(folder).as_posix() for path in folder.glob("*/*")), variant)
    dtypes, loaded = set(), {}
    for name, component_class in components.items():
        if index[name] == [None, None]:
            continue  # The pipeline was saved without it.
        try:
            if issubclass(component_class, PreTrainedModel):
                paths = [folder / file for file in sorted(weight_files) if file.startswith(f"{name}/")]
                dtypes |= check_weights(folder / name, component_class, paths)
            else:
                # Reading the class from the package registers our classes with the Auto classes, which load the parts
                # of a processor.
                loaded_class = getattr(import_module("editar_hf"), component_class.__name__)
                loaded[name] = loaded_class.from_pretrained(folder / name)
                # Without its file, a tokenizer loads with an empty vocabulary, and prompts have no effect.
                files = loaded[name].tokenizer.vocab_files_names.values()
                if files and not any((folder / name / file).is_file() for file in files):
                    raise ValueError(f"there is no {' or '.join(files)}")
        except Exception as error:  # For damaged files, libraries raise many types of errors.
            raise ValueError(
                f"`{folder / name}` does not load as {component_class.__name__}: {error}. Save or download it again."
            ) from error
    return dtypes, loaded


def check_weights(folder: Path, model_class: type[PreTrainedModel], paths: Sequence[Path]) -> set[torch.dtype]:
    """Check that weights have the keys and shapes of the network that the configuration in `folder` describes.

    Returns:
        The dtypes of the weights.
    """
    config = model_class.config_class.from_pretrained(folder)
    if "quantization_config" in config.to_dict():
        return set()  # Quantized weights have other names and shapes. The quantization library checks them.
    with torch.device("meta"):
        model = model_class(config)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        # If this file is damaged, this raises an error; transformers would silently use its own defaults.
        GenerationConfig.from_pretrained(folder)
    shapes, dtypes = {}, set()
    for path in paths:
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor = weights.get_slice(name)
                shapes[name] = tuple(tensor.get_shape())
                dtypes.add(str_to_torch_dtype[tensor.get_dtype()])
    # A file holds only one of two tied weights, under either name.
    tied = model.all_tied_weights_keys
    expected = {tied.get(name, name): tensor.shape for name, tensor in model.state_dict().items()}
    found = {tied.get(name, name): shape for name, shape in shapes.items()}
    if problems := describe_key_problems(found, expected):
        raise ValueError(f"its weights have the wrong keys: {problems}")
    return {dtype for dtype in dtypes if dtype.is_floating_point}


def describe_key_problems(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> str:
    """Compare two dictionaries of shapes; list missing, unexpected and wrongly shaped keys, or return ""."""
    problems = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "wrongly shaped": {
            f"{name} {tuple(found[name])} instead of {tuple(expected[name])}"
            for name in expected.keys() & found.keys()
            if tuple(found[name]) != tuple(expected[name])
        },
    }
    return "; ".join(f"{len(keys)} {kind} ({', '.join(sorted(keys))})" for kind, keys in problems.items() if keys)


# The pipeline's own methods


class EditARHubMixin(DiffusionPipeline):
    """Load, save and push a pipeline, where `EditARPipeline` differs from diffusers' pipelines."""

    def register_to_config(self, **kwargs: Any) -> None:
        """Record our components under the name of the package, so that saved pipelines do not name modules."""
        package = __name__.partition(".")[0]
        for name, value in kwargs.items():
            if isinstance(value, tuple) and str(value[0]).startswith(f"{package}."):
                kwargs[name] = (package, value[1])
        super().register_to_config(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a pipeline from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder that `save_pretrained` wrote, or a Hub id.
            dtype (`torch.dtype`, `dict` or `"auto"`, *optional*): One dtype, a dictionary with one for each component,
                or `"auto"` for the dtype of the files. *Defaults to* the dtype of the files if the device supports it
                (GPUs, and CPUs with instructions for it), and to float32 otherwise. The log shows the chosen dtype.
            attn_implementation (`str`, *optional*): The attention function of the decoder: `"eager"`, `"sdpa"`, ….
            kwargs: Arguments of `DiffusionPipeline.from_pretrained`: `variant`, `revision`, `token`, `cache_dir`,
                `local_files_only`, `device_map`, `quantization_config`, or components that replace the stored ones.

        Raises:
            ValueError: If the folder is not a pipeline, keys of a component's weights are missing, unexpected or have
                the wrong shape, or `dtype` or `attn_implementation` is unknown. All but the last are checked before
                any weight is read.
            OSError: If there is no such folder, and no such repository on the Hub or in its cache.
        """
        name = str(pretrained_model_name_or_path)
        check_folder_or_hub_id(pretrained_model_name_or_path, "pretrained_model_name_or_path")
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        if not isinstance(dtype, torch.dtype | dict | None) and str(dtype) != "auto":
            raise ValueError(f"`dtype` is {dtype!r}; pass a dtype such as `torch.bfloat16`, a dict of them, or 'auto'.")
        attn_implementation = kwargs.pop("attn_implementation", None)
        folder = Path(pretrained_model_name_or_path)
        if not folder.exists():
            try:
                folder = Path(cls.download(name, **kwargs))
            except OSError as error:
                raise OSError(
                    f"`{name}` is not a local folder, and it could not be loaded from the Hub or its cache: {error}"
                ) from error
        components = {part: kind for part, (kind,) in cls._get_signature_types().items() if part not in kwargs}
        stored, loaded = check_pipeline_folder(folder, components, kwargs.get("variant"))
        kwargs |= loaded
        if dtype is None and "quantization_config" not in kwargs:
            dtype, reason = choose_dtype(stored)
            names = dtype or " and ".join(sorted(map(str, stored)))
            log = logger.info if dtype is None else logger.warning
            log(f"Loading in {names}: {reason}. Pass `dtype` to choose another, or 'auto' for that of the files.")
        with LOADING:
            kwargs[DTYPE] = None if dtype == "auto" else dtype
            pipeline = super().from_pretrained(str(folder), **kwargs)
        if attn_implementation is not None:
            pipeline.transformer.set_attn_implementation(attn_implementation)
        pipeline.register_to_config(_name_or_path=name)
        return pipeline

    @classmethod
    def download(
        cls,
        pretrained_model_name: str,
        revision: str | None = None,
        variant: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> str:
        """Download the files of a Hub repository that the pipeline needs, and return the cached folder.

        diffusers' own `download` refuses components with classes of other packages, and does not download
        `transformer/generation_config.json`.

        Args:
            pretrained_model_name (`str`): The Hub id.
            revision, cache_dir, token, force_download, local_files_only (*optional*): See `snapshot_download`.
            variant (`str`, *optional*): The preferred variant of the weight files.
            kwargs: Further arguments of `from_pretrained`. Files of components that are passed are not downloaded.

        Raises:
            ValueError: If the repository is not a pipeline, or no component has files of `variant`.
        """
        where = {"repo_id": pretrained_model_name, "revision": revision, "cache_dir": cache_dir}
        how = {"token": token, "force_download": force_download, "local_files_only": local_files_only}
        # The first call also caches the list of all files, for later calls without a connection.
        snapshot_download(**where, **how, allow_patterns=[INDEX_FILE])
        filenames = {file.path for file in get_cached_repo_tree(**where)}
        if INDEX_FILE not in filenames:
            raise ValueError(
                f"The repository {pretrained_model_name} has no `{INDEX_FILE}`; pass the id of a pipeline."
            )
        folders = tuple(f"{part}/" for part in cls._get_signature_keys(cls)[0] if part not in kwargs)
        filenames = {name for name in filenames if name.startswith(folders)}
        needed = {name for name in filenames if name.endswith(SIDE_FILE_SUFFIXES)}
        needed |= {INDEX_FILE} | select_weight_files(filenames, variant)
        return snapshot_download(**where, **how, allow_patterns=sorted(needed))

    def save_pretrained(
        self, save_directory: str | Path, variant: str | None = None, max_shard_size: int | str | None = None
    ) -> None:
        """Write the pipeline to a folder, with a model card and files for serving engines unless the folder has them.

        Args:
            save_directory (`str` or `Path`): The folder; it is created if it does not exist.
            variant (`str`, *optional*): Part of the names of the weight files, as in `model.fp16.safetensors`.
            max_shard_size (`int` or `str`, *optional*): Size of the largest weight file, in bytes or as in `"5GB"`.

        Raises:
            ValueError: If weights are packed, or the decoder has LoRA adapters, because transformers would then save
                only the adapters.
        """
        check_not_packed("Saving", self.transformer)
        if names := list(getattr(self.transformer, "peft_config", {})):
            raise ValueError(
                f"The pipeline has the adapters {', '.join(names)}. To save an adapter, call `save_lora_weights`. To "
                "save the pipeline without its adapters, call `unload_lora_weights` first. To save it with its "
                "adapters, call `fuse_lora` and then `unload_lora_weights` first."
            )
        check_path("save_directory", save_directory)
        super().save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size)
        card = Path(save_directory) / CARD_FILE
        if not card.exists():
            card.write_text(make_card("base", card.resolve().parent.name), encoding="utf-8")
        for name in ENGINE_FILES:
            file = Path(save_directory) / name
            if not file.exists():
                file.write_bytes((files("editar_hf") / "engine_files" / name).read_bytes())

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> str:
        """Upload the pipeline to a Hub repository, with a model card unless the repository has one.

        Args:
            repo_id (`str`): The repository; it is created if it does not exist.
            private (`bool`, *optional*): Whether only the owner can see the repository; see `create_repository`.
            commit_message, token, create_pr (*optional*): See huggingface_hub's `upload_folder`.
            variant, max_shard_size (*optional*): See `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            ValueError: If `private` is True, but the repository exists and is public, or weights are packed.
        """
        check_not_packed("Saving", self.transformer)
        repo_id = create_repository(repo_id, private, token)
        with tempfile.TemporaryDirectory() as folder:
            card = make_card("base", repo_id)
            (Path(folder) / CARD_FILE).write_text(card, encoding="utf-8")
            self.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
            message = commit_message or f"Upload {type(self).__name__}"
            return upload_folder(folder, repo_id, card, token=token, commit_message=message, create_pr=create_pr)
