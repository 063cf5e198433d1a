"""LoRA in the pipeline: adapters in PEFT's own format, loaded into the decoder, weighed, fused and saved.

diffusers' `LoraBaseMixin` does the work on LoRA layers. Here are the files, and the modules that an adapter replaces as
a whole (PEFT's `modules_to_save`), which that class does not know.
"""

import copy
import os
import tempfile
import warnings
from pathlib import Path
from typing import ClassVar

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from .pipeline_loading import describe_key_problems


CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# PEFT names weights as its wrapper around a model sees them.
KEY_PREFIX = "base_model.model."


def find_adapter_folder(name: str | Path, **kwargs) -> Path:
    """Find an adapter's files, in a folder or on the Hub.

    Raises:
        ValueError: If one of the two files is not there.
    """
    folder = Path(name)
    if not folder.exists():
        folder = Path(snapshot_download(str(name), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], **kwargs))
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise ValueError(f"`{name}` has no `{file}`; give a folder or Hub id with an adapter in PEFT's format.")
    return folder


def check_weights(weights: dict[str, torch.Tensor], config, transformer: PreTrainedModel):
    """Refuse weights that are not those an adapter's `PeftConfig` asks for; tried on a decoder without memory.

    Raises:
        ValueError: If weights are missing, unexpected or wrongly shaped; they are listed.
    """
    from peft import get_peft_model_state_dict, inject_adapter_in_model

    with torch.device("meta"):
        skeleton = type(transformer)(transformer.config)
    inject_adapter_in_model(copy.deepcopy(config), skeleton)
    expected = get_peft_model_state_dict(skeleton, save_embedding_layers=False)
    shapes = ({name: tuple(tensor.shape) for name, tensor in found.items()} for found in (weights, expected))
    if problems := describe_key_problems(*shapes):
        raise ValueError(f"The weights are no adapter of this decoder: {problems}.")


def attach_adapter(transformer: PreTrainedModel, config, adapter_name: str):
    """Give a decoder the adapter that a `PeftConfig` describes, beside those it has."""
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        # Several adapters in one model are what is wanted.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, transformer, adapter_name)
    # transformers' own saving, enabling and deleting of adapters ask for it.
    transformer._hf_peft_config_loaded = True


class EditARLoraMixin(LoraBaseMixin):
    """Load LoRA adapters into the decoder, weigh them against each other, fuse them, and save them.

    On disk an adapter is plain PEFT: `adapter_config.json` and `adapter_model.safetensors`.
    """

    _lora_loadable_modules: ClassVar = ["transformer"]

    def load_lora_weights(
        self,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ):
        """Load an adapter beside those already there, and make it the active one.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder in PEFT's format, or a Hub id.
            adapter_name (`str`, *optional*): What to call it; default `"default_0"`, `"default_1"`, ….
            revision, cache_dir, token, local_files_only (*optional*): As of huggingface_hub's `snapshot_download`.

        Raises:
            ValueError: If there is no adapter, the name is taken, or the weights are not those of this decoder.
        """
        from peft import PeftConfig, set_peft_model_state_dict

        names = self.list_adapters()
        adapter_name = f"default_{len(names)}" if adapter_name is None else adapter_name
        if adapter_name in names:
            raise ValueError(f"`adapter_name` is {adapter_name!r}, which is taken; there are {', '.join(names)}.")
        where = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        folder = find_adapter_folder(pretrained_model_name_or_path, **where)
        config, weights = PeftConfig.from_pretrained(folder), load_file(folder / WEIGHTS_FILE)
        weights = {name.removeprefix(KEY_PREFIX): tensor for name, tensor in weights.items()}
        check_weights(weights, config, self.transformer)
        attach_adapter(self.transformer, config, adapter_name)
        set_peft_model_state_dict(self.transformer, weights, adapter_name=adapter_name)
        self.set_adapters(adapter_name)

    def save_lora_weights(self, save_directory: str | Path, adapter_name: str | None = None):
        """Write an adapter in PEFT's format.

        Args:
            save_directory (`str` or `Path`): The folder; made if it is not there.
            adapter_name (`str`, *optional*): Which one; may be left out if there is one.

        Raises:
            ValueError: If the pipeline has no such adapter, or several and none is named.
        """
        from peft import get_peft_model_state_dict

        names = self.list_adapters()
        if adapter_name is None and len(names) == 1:
            (adapter_name,) = names
        if adapter_name not in names:
            raise ValueError(f"`adapter_name` is {adapter_name!r}; there are {', '.join(names) or 'no adapters'}.")
        weights = get_peft_model_state_dict(self.transformer, adapter_name=adapter_name, save_embedding_layers=False)
        weights = {f"{KEY_PREFIX}{name}": tensor.contiguous() for name, tensor in weights.items()}
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory) as temporary:
            save_file(weights, f"{temporary}/{WEIGHTS_FILE}", metadata={"format": "pt"})
            self.transformer.peft_config[adapter_name].save_pretrained(temporary)
            for file in (WEIGHTS_FILE, CONFIG_FILE):
                os.replace(f"{temporary}/{file}", f"{save_directory}/{file}")

    def list_adapters(self) -> list[str]:
        """List the names of the decoder's adapters, active or not."""
        return list(getattr(self.transformer, "peft_config", {}))

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: float | list[float] | None = None):
        """Choose the active adapters, and how much each counts.

        Args:
            adapter_names (`str` or list of `str`): Which.
            adapter_weights (`float` or list of `float`, *optional*): One for all, or one for each; default 1.

        Raises:
            ValueError: If an adapter is not there, the lengths differ, or two adapters replace the same module.
        """
        from peft.functional import set_adapter

        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for path, module in self._list_replaced_modules():
            if len(both := [name for name in names if name in module.modules_to_save]) > 1:
                raise ValueError(f"`adapter_names`: {' and '.join(both)} both replace `{path}`; choose one of them.")
        super().set_adapters(adapter_names, adapter_weights)
        set_adapter(self.transformer, adapter_names, inference_mode=True)

    def disable_lora(self):
        """Edit as if no adapter were there, until `enable_lora`."""
        super().disable_lora()
        self._enable_replaced_modules(False)

    def enable_lora(self):
        """Let the active adapters work again."""
        super().enable_lora()
        self._enable_replaced_modules(True)

    def delete_adapters(self, adapter_names: list[str] | str):
        """Remove adapters; the decoder is as before if none is left.

        Raises:
            ValueError: If an adapter is not there.
        """
        from peft.functional import delete_adapter

        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if missing := [name for name in names if name not in self.list_adapters()]:
            raise ValueError(
                f"`adapter_names` names {', '.join(missing)}; there are {', '.join(self.list_adapters()) or 'none'}."
            )
        for name in names:
            # Not transformers' own method: its releases may ask for a peft that is not out yet.
            prefix = f"{self.transformer.peft_config.pop(name).peft_type.value.lower()}_"
            delete_adapter(self.transformer, name, prefix)
        if not self.list_adapters():
            self.unload_lora_weights()

    def fuse_lora(self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None):
        """Add adapters to the weights they adapt: no slower than without, until `unfuse_lora`.

        Args:
            lora_scale (`float`): How much they count.
            safe_fusing (`bool`): Leave weights alone that would become NaN.
            adapter_names (list of `str`, *optional*): Which; default the active ones.
        """
        super().fuse_lora(self._lora_loadable_modules, lora_scale, safe_fusing, adapter_names)

    def unfuse_lora(self):
        """Take fused adapters out of the weights again."""
        super().unfuse_lora(self._lora_loadable_modules)

    def unload_lora_weights(self):
        """Remove all adapters; what was fused stays in the weights."""
        for path, module in self._list_replaced_modules():
            is_fused = set(module.active_adapters) & self.fused_loras
            kept = module.modules_to_save[module.active_adapter] if is_fused else module.original_module
            self.transformer.set_submodule(path, kept)
        super().unload_lora_weights()
        self.transformer._hf_peft_config_loaded = False
        self._merged_adapters = set()

    def _enable_replaced_modules(self, enabled: bool):
        for _, module in self._list_replaced_modules():
            module.enable_adapters(enabled)

    def _list_replaced_modules(self) -> list[tuple[str, torch.nn.Module]]:
        """List the modules of which an adapter has a copy of its own, with their paths."""
        from peft.utils import ModulesToSaveWrapper

        return [(path, m) for path, m in self.transformer.named_modules() if isinstance(m, ModulesToSaveWrapper)]
