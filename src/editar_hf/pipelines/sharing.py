"""How a pipeline is saved, loaded and shared: what `EditARPipeline` does otherwise than diffusers' pipelines."""

import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Self

import torch
from huggingface_hub import file_exists, get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers.utils import logging

from ..checks import check_integer, check_path, check_texts
from ..hub import check_folder_or_hub_id, create_repository
from ..model_card import CARD_FILE, compose_pipeline_card, write_pipeline_card
from .loading import INDEX_FILE, check_pipeline_folder, choose_dtype, select_pipeline_files


logger = logging.get_logger(__name__)
# transformers switches the initialisation of weights off for the whole process while it loads: two loads at once would
# draw each other's weights at random.
LOADING = threading.Lock()


def check_variant(variant: str | None):
    """Refuse what can be no part of the names of weight files."""
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"[\w.-]{1,80}", variant)):
        raise ValueError(f"`variant` is {variant!r:.80}; pass a part of files' names, such as 'fp16'.")


class EditARSharingMixin:
    """Folders and Hub repositories of a pipeline; goes before `DiffusionPipeline` among the bases."""

    def register_to_config(self, **kwargs):
        """Record components, ours under the name of the package: the modules they sit in are no published format."""
        package = __name__.partition(".")[0]
        for name, value in kwargs.items():
            if isinstance(value, tuple) and str(value[0]).startswith(f"{package}."):
                kwargs[name] = (package, value[1])
        super().register_to_config(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> Self:
        """Load a pipeline from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder that `save_pretrained` wrote, or a Hub id.
            dtype (`torch.dtype`, `dict` or `"auto"`, *optional*): One, one per component, or `"auto"` for that of the
                files. Default: that of the files where the device computes in it (GPUs; CPUs with instructions for
                it), and float32 elsewhere. The log says which.
            attn_implementation (`str`, *optional*): The decoder's attention: `"eager"`, `"sdpa"`, ….
            kwargs: As of `DiffusionPipeline.from_pretrained`: `variant`, `revision`, `token`, `cache_dir`,
                `local_files_only`, `device_map`, `quantization_config`, or components to be used in place of the stored
                ones.

        Raises:
            ValueError: If there is no pipeline, a component's weights have missing, unexpected or wrongly shaped keys,
                or `dtype` is unknown, before any weight is read; or if `attn_implementation` is unknown.
            OSError: If it is no folder, and the Hub does not give it.
        """
        check_folder_or_hub_id(pretrained_model_name_or_path, "pretrained_model_name_or_path")
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        if not (dtype is None or isinstance(dtype, torch.dtype | dict) or (isinstance(dtype, str) and dtype == "auto")):
            raise ValueError(f"`dtype` is {dtype!r}; pass a dtype such as `torch.bfloat16`, a dict of them, or 'auto'.")
        attn_implementation, variant = kwargs.pop("attn_implementation", None), kwargs.get("variant")
        if attn_implementation is not None:
            check_texts("attn_implementation", [attn_implementation])
        check_variant(variant)
        folder = Path(pretrained_model_name_or_path)
        if not folder.exists():
            try:
                folder = Path(cls.download(str(pretrained_model_name_or_path), **kwargs))
            except LocalEntryNotFoundError as error:  # which does not name what was asked for
                raise FileNotFoundError(
                    f"`{pretrained_model_name_or_path}` is no folder here, and neither the cache nor the Hub gives it: "
                    f"{error}"
                ) from error
        components = {name: kind for name, (kind,) in cls._get_signature_types().items() if name not in kwargs}
        stored = check_pipeline_folder(folder, components, variant)
        if dtype is None and "quantization_config" not in kwargs:
            dtype, reason = choose_dtype(stored)
            names = dtype or " and ".join(sorted(map(str, stored)))
            log = logger.info if dtype is None else logger.warning
            log(f"Loading in {names}: {reason}. Pass `dtype` to choose another, or 'auto' for that of the files.")
        with LOADING:
            pipeline = super().from_pretrained(str(folder), dtype=None if dtype == "auto" else dtype, **kwargs)
        if attn_implementation is not None:
            pipeline.transformer.set_attn_implementation(attn_implementation)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
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
        **kwargs,
    ) -> str:
        """Download what the pipeline needs of a Hub repository, and return the cached folder.

        diffusers' own `download` refuses components that are neither its own nor transformers', and leaves
        `transformer/generation_config.json` behind.

        Args:
            pretrained_model_name (`str`): The Hub id.
            revision, cache_dir, token, force_download, local_files_only (*optional*): As of `snapshot_download`.
            variant (`str`, *optional*): Which weight files to prefer.
            kwargs: Further arguments of `from_pretrained`; of a component among them, no file is downloaded.

        Raises:
            ValueError: If the repository holds no pipeline, or nothing of `variant`.
        """
        where = {"repo_id": pretrained_model_name, "revision": revision, "cache_dir": cache_dir}
        how = {"token": token, "force_download": force_download, "local_files_only": local_files_only}
        # The first call also leaves the list of all files in the cache, for when the Hub is out of reach.
        snapshot_download(**where, **how, allow_patterns=[INDEX_FILE])
        filenames = [file.path for file in get_cached_repo_tree(**where)]
        components = [name for name in cls._get_signature_keys(cls)[0] if name not in kwargs]
        return snapshot_download(**where, **how, allow_patterns=select_pipeline_files(filenames, components, variant))

    def save_pretrained(
        self, save_directory: str | Path, variant: str | None = None, max_shard_size: int | str | None = None
    ):
        """Write the pipeline as a folder; its model card too, if the folder has none.

        Args:
            save_directory (`str` or `Path`): The folder; made if it is not there.
            variant (`str`, *optional*): Marks the weight files, as in `model.fp16.safetensors`.
            max_shard_size (`int` or `str`, *optional*): Largest weight file, in bytes or as in `"5GB"`.

        Raises:
            ValueError: If the decoder has LoRA adapters: only they would be saved.
        """
        if names := self.list_adapters():
            raise ValueError(
                f"The pipeline has the adapters {', '.join(names)}. `save_lora_weights` saves one of them; to save a "
                "pipeline, call `unload_lora_weights` first, and before it `fuse_lora` to keep what they have learnt."
            )
        check_path("save_directory", save_directory)
        check_variant(variant)
        if not isinstance(max_shard_size, str | None):
            max_shard_size = check_integer("max_shard_size", max_shard_size)
        elif max_shard_size is not None and not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", max_shard_size.upper()):
            raise ValueError(f"`max_shard_size` is {max_shard_size!r:.80}; pass a number of bytes, or one as in '5GB'.")
        super().save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size)
        write_pipeline_card(save_directory, Path(save_directory).resolve().name)

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
        """Upload the pipeline to a Hub repository, with a card whose snippet names it; a card already there stays.

        Args:
            repo_id (`str`): The repository, made if it is not there.
            private (`bool`, *optional*): Whether only its owner sees it. As of huggingface_hub's `create_repo`, a new
                repository is public if this is left out, unless its organisation makes them private by default.
            commit_message, token, create_pr (*optional*): As of huggingface_hub's `create_repo` and `upload_folder`.
            variant, max_shard_size (*optional*): As of `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            ValueError: If `private` is true, and the repository exists and is public.
        """
        repo_id = create_repository(repo_id, private, token)
        with tempfile.TemporaryDirectory() as folder:
            card = Path(folder) / CARD_FILE
            if file_exists(repo_id, CARD_FILE, token=token):
                shutil.copyfile(hf_hub_download(repo_id, CARD_FILE, token=token), card)
            else:
                card.write_text(compose_pipeline_card(repo_id), encoding="utf-8")
            self.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
            return self._upload_folder(folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)
