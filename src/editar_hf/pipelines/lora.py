"""LoRA: load adapters in PEFT's format into the decoder, set their weights, fuse them and save them.

PEFT's layers compute the adapted layers. This module adds three things: checks of the files; weights for modules that
an adapter replaces as a whole (PEFT's `modules_to_save`); and the rule that no adapter may change while an adapter is
fused. The rule is needed because PEFT unfuses an adapter with its current weight, not with its weight at fusing.
"""

import itertools
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..checks import check_number, check_path
from ..io import atomic_path
from ..packing import check_not_packed
from .hub import check_folder_or_hub_id, describe_key_problems


if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Prefix of all keys in PEFT's files, which PEFT's wrapper around the model adds.
KEY_PREFIX = "base_model.model."
# Name of DoRA's magnitudes in PEFT's layers and files.
MAGNITUDES = "lora_magnitude_vector"
# Settings of LoRA, rsLoRA and DoRA. All other settings belong to other methods, some of which change the decoder's own
# weights permanently.
KNOWN_SETTINGS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "inference_mode"),
}


def read_config(file: Path) -> "LoraConfig":
    """Read the configuration of an adapter, and check that it is LoRA, rsLoRA or DoRA."""
    from peft import LoraConfig

    settings, defaults = json.loads(file.read_text(encoding="utf-8")), LoraConfig().to_dict()
    if (peft_type := settings.get("peft_type")) != "LORA":
        raise ValueError(f"Its `peft_type` is {peft_type!r}, not 'LORA'.")
    if settings.get("init_lora_weights") in (False, "gaussian"):
        settings["init_lora_weights"] = True  # The initial weights do not matter: they are read from the file.
    others = settings.keys() & (defaults.keys() - KNOWN_SETTINGS)
    if others := sorted(name for name in others if settings[name] not in (None, defaults[name])):
        raise ValueError(
            f"The adapter sets {', '.join(others)}, but the pipeline loads only LoRA, rsLoRA and DoRA. Train an "
            "adapter without these settings."
        )
    return LoraConfig.from_peft_type(**settings)


def attach_adapter(transformer: PreTrainedModel, config: "LoraConfig", adapter_name: str) -> None:
    """Add the adapter that a `LoraConfig` describes to a decoder, and keep the other adapters."""
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        # PEFT warns about several adapters in one model, which are intended here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, transformer, adapter_name)
    # transformers' own methods for adapters read this attribute.
    transformer._hf_peft_config_loaded = True


def list_layers(transformer: PreTrainedModel) -> list[tuple[str, Any]]:
    """List the layers that adapters adapt or replace, together with their paths."""
    if not getattr(transformer, "peft_config", None):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    return [(path, layer) for path, layer in transformer.named_modules() if isinstance(layer, kinds)]


def get_original(layer: Any) -> torch.nn.Module:
    """Get the original layer, without adapters."""
    return layer.original_module if is_replaced(layer) else layer.get_base_layer()


def is_replaced(layer: Any) -> bool:
    """Return True if adapters replace the whole layer by a trained copy, instead of adding matrices to it."""
    return hasattr(layer, "original_module")


def get_adapter_weights(transformer: PreTrainedModel, adapter_name: str) -> dict[str, torch.Tensor]:
    """Get the trained weights of an adapter in a decoder, by their names in PEFT's files."""
    weights = {}
    for path, layer in list_layers(transformer):
        for key, tensor in layer.state_dict().items():
            part, _, rest = key.partition(".")
            if part in layer.adapter_layer_names and f"{rest}.".startswith(f"{adapter_name}."):
                middle = "" if is_replaced(layer) else f".{part}"
                rest = "" if part == MAGNITUDES else rest.removeprefix(adapter_name)
                weights[f"{path}{middle}{rest}"] = tensor
        _, trained = vars(layer).get("blends", {}).get(adapter_name, (1.0, {}))
        weights |= {f"{path}.{name}": tensor for name, tensor in trained.items()}
    return weights


def set_weight(layer: Any, adapter_name: str, weight: float) -> None:
    """Set the weight of an adapter in a layer.

    PEFT ignores the weight for replaced modules. Here, the module becomes O + weight · (T - O), where O is the original
    and T the trained module. While the weight is not 1, T is stored in the layer's `blends`.
    """
    if not is_replaced(layer):
        layer.set_scale(adapter_name, weight)
        return
    blends, module = vars(layer).setdefault("blends", {}), layer.modules_to_save[adapter_name]
    before, trained = blends.get(adapter_name) or (1.0, module.state_dict())
    if weight != before:
        original = layer.original_module.state_dict()
        blend = {name: tensor.lerp(trained[name].to(tensor), weight) for name, tensor in original.items()}
        module.load_state_dict(blend, assign=True)
        blends[adapter_name] = (weight, trained)
    if weight == 1:
        blends.pop(adapter_name, None)


class EditARLoraMixin(LoraBaseMixin):
    """Load LoRA adapters into the decoder, set their weights, fuse them and save them.

    With the weights wᵢ of the active adapters, every adapted matrix is W + Σ Δᵢ.

    * LoRA: Δᵢ = wᵢ · alphaᵢ / rᵢ · Bᵢ Aᵢ.
    * rsLoRA ([arXiv 2312.03732](https://arxiv.org/abs/2312.03732)): Δᵢ = wᵢ · alphaᵢ / √rᵢ · Bᵢ Aᵢ.
    * DoRA ([arXiv 2402.09353](https://arxiv.org/abs/2402.09353), Eq. 5): the rows of W + wᵢ · alphaᵢ / rᵢ · Bᵢ Aᵢ are
      scaled to the trained lengths. The weight 0 still changes the lengths of W's rows. A DoRA adapter cannot be active
      together with another adapter.

    A module that an adapter replaces as a whole is O + wᵢ · (Tᵢ - O), where O is the original and Tᵢ the trained
    module. While adapters are fused, every change of adapters raises a `ValueError`, except `unfuse_lora` and
    `unload_lora_weights`. After `unload_lora_weights`, fused adapters stay in the weights.

    On disk, an adapter has PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.
    """

    _lora_loadable_modules: ClassVar = ["transformer"]

    @property
    def _merged_adapters(self) -> set[str]:
        """The fused adapters, as the layers record them. diffusers' `fused_loras` and `num_fused_loras` read this."""
        return {name for _, layer in list_layers(self.transformer) for name in layer.merged_adapters}

    @torch.no_grad()
    def load_lora_weights(
        self,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str | None = None,
        weight_name: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        hotswap: bool = False,
    ) -> None:
        """Load an adapter, keep the adapters already loaded, and make the new adapter the only active one.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder in PEFT's format, or a Hub id.
            adapter_name (`str`, *optional*): Name of the adapter, without dots; *defaults to* the first unused name of
                `"default_0"`, `"default_1"`, ….
            weight_name (`str`, *optional*): Name of the file with the weights; *defaults to*
                `"adapter_model.safetensors"`.
            revision, cache_dir, token, local_files_only (*optional*): See huggingface_hub's `snapshot_download`.
            hotswap (`bool`): Write the new values over those of the loaded adapter `adapter_name`, which stays as
                active as it is and keeps its weight. Compiled decoding is not compiled again. Both adapters must have
                the same modules, ranks and scales.

        Raises:
            ValueError: If there is no adapter, it is neither LoRA nor DoRA, it does not fit this decoder or its other
                adapters, the name is in use or invalid, adapters are fused, or the decoder's weights are packed or
                offloaded; with `hotswap`, if no adapter has the name, or the adapters differ in more than their values.
        """
        names = self.list_adapters()
        if hotswap:
            adapter_name = self._choose_name(adapter_name)
        elif adapter_name is None:
            adapter_name = next(name for i in itertools.count() if (name := f"default_{i}") not in names)
        # Adapters become entries of a `ModuleDict`, which does not allow the names of its attributes as keys.
        is_usable = isinstance(adapter_name, str) and adapter_name and "." not in adapter_name
        if not hotswap and (not is_usable or adapter_name in names or hasattr(torch.nn.ModuleDict, adapter_name)):
            raise ValueError(
                f"`adapter_name` is {adapter_name!r}; pass a name without dots that is not in use. In use are: {names}."
            )
        self._check_not_fused()
        self._check_weights()
        check_folder_or_hub_id(pretrained_model_name_or_path, "pretrained_model_name_or_path")
        folder, active = Path(pretrained_model_name_or_path), self.get_active_adapters()
        weights_file = weight_name or WEIGHTS_FILE
        is_disabled = any(layer.disable_adapters for _, layer in list_layers(self.transformer))
        try:
            if not folder.exists():
                downloaded = snapshot_download(
                    str(pretrained_model_name_or_path),
                    revision=revision,
                    cache_dir=cache_dir,
                    token=token,
                    local_files_only=local_files_only,
                    allow_patterns=[CONFIG_FILE, weights_file],
                )
                folder = Path(downloaded)
            config, weights = read_config(folder / CONFIG_FILE), load_file(folder / weights_file)
            if hotswap:
                self._swap_weights(config, weights, adapter_name)
                return
            self._attach_weights(config, weights, adapter_name)
        except Exception as error:  # For files that are damaged or do not fit, libraries raise many types of errors.
            if not hotswap:
                self._remove([adapter_name], active)
            missing = "is not a local folder, and it could not be loaded from the Hub or its cache"
            problem = "holds no LoRA adapter for this decoder" if folder.exists() else missing
            raise ValueError(f"`{pretrained_model_name_or_path}` {problem}: {error}") from error
        # New layers start in training mode, with dropout.
        self.transformer.train(self.transformer.training)
        self._enable(not is_disabled)
        self.set_adapters(adapter_name)

    def _attach_weights(self, config: "LoraConfig", weights: dict[str, torch.Tensor], adapter_name: str) -> None:
        """Attach an adapter and copy its weights. After an error, the adapter may be attached in part."""
        attach_adapter(self.transformer, config, adapter_name)
        paths = [path for path, _ in list_layers(self.transformer)]
        if inner := [path for path in paths if any(path.startswith(f"{other}.") for other in paths)]:
            raise ValueError(f"One adapter adapts {inner[0]}, which is part of a module that another adapter replaces.")
        self._copy_weights(weights, adapter_name)

    def _swap_weights(self, config: "LoraConfig", weights: dict[str, torch.Tensor], adapter_name: str) -> None:
        """Write the weights of another adapter over those of a loaded one, unless their configurations differ."""
        loaded = self.transformer.peft_config[adapter_name]
        kept = ("peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "auto_mapping")
        new, old = ({**each.to_dict(), **dict.fromkeys(kept)} for each in (config, loaded))
        if different := sorted(name for name in new if new[name] != old[name]):
            raise ValueError(
                f"The adapter differs from the loaded {adapter_name!r} in {', '.join(different)}. Load it with another "
                "`adapter_name` and without `hotswap`."
            )
        self._copy_weights(weights, adapter_name)
        replaced = [layer for _, layer in list_layers(self.transformer) if is_replaced(layer)]
        for layer in replaced:  # Blend the new modules with the original ones.
            if blend := vars(layer).get("blends", {}).pop(adapter_name, None):
                weight, trained = blend
                layer.modules_to_save[adapter_name].load_state_dict(trained)
                set_weight(layer, adapter_name, weight)

    def _copy_weights(self, weights: dict[str, torch.Tensor], adapter_name: str) -> None:
        """Copy weights with PEFT's names into a loaded adapter, if all names and shapes fit."""
        stored = {name.removeprefix(KEY_PREFIX): tensor for name, tensor in weights.items()}
        own = get_adapter_weights(self.transformer, adapter_name)
        found, expected = ({name: tensor.shape for name, tensor in each.items()} for each in (stored, own))
        if problems := describe_key_problems(found, expected):
            raise ValueError(f"{problems}.")
        for name, tensor in own.items():
            tensor.copy_(stored[name])

    def enable_lora_hotswap(self, **kwargs: Any) -> None:
        """Refuse: `hotswap` needs no preparation, and no rank can be prepared for.

        Raises:
            ValueError: Always. diffusers' own method would silently do nothing for this decoder.
        """
        raise ValueError(
            "The pipeline cannot prepare for adapters of other ranks. Call `load_lora_weights(..., hotswap=True)` with "
            "adapters of the same rank, without `enable_lora_hotswap`."
        )

    def _choose_name(self, adapter_name: str | None) -> str:
        """Return the name of a loaded adapter, by default that of the only one."""
        names = self.list_adapters()
        if adapter_name is None and len(names) == 1:
            (adapter_name,) = names
        if not isinstance(adapter_name, str) or adapter_name not in names:
            raise ValueError(
                f"`adapter_name` is {adapter_name!r}; pass one of the loaded adapters: {', '.join(names) or 'none'}."
            )
        return adapter_name

    def save_lora_weights(self, save_directory: str | Path, adapter_name: str | None = None) -> None:
        """Write an adapter in PEFT's format. The trained values are written, without the weight of `set_adapters`.

        Args:
            save_directory (`str` or `Path`): The folder; it is created if it does not exist.
            adapter_name (`str`, *optional*): Name of the adapter; required if there are several.

        Raises:
            ValueError: If there is no such adapter, there are several and no name is given, or weights are packed or
                offloaded.
        """
        check_path("save_directory", save_directory)
        adapter_name = self._choose_name(adapter_name)
        self._check_weights()
        weights = get_adapter_weights(self.transformer, adapter_name)
        weights = {f"{KEY_PREFIX}{name}": tensor.contiguous() for name, tensor in weights.items()}
        with atomic_path(Path(save_directory) / WEIGHTS_FILE) as unfinished:
            save_file(weights, unfinished, metadata={"format": "pt"})
        self.transformer.peft_config[adapter_name].save_pretrained(save_directory)

    def list_adapters(self) -> list[str]:
        """List the names of all adapters of the decoder, including those that are not active."""
        return list(getattr(self.transformer, "peft_config", {}))

    def get_active_adapters(self) -> list[str]:
        """List the names of the active adapters, also while `disable_lora` is in effect."""
        # diffusers' own method sees only models of diffusers until its version 0.42.
        active = [layer.active_adapters for _, layer in list_layers(self.transformer) if not is_replaced(layer)]
        return list(active[0]) if active else []

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: float | list[float] | None = None) -> None:
        """Set the active adapters and their weights.

        Args:
            adapter_names (`str` or list of `str`): The adapters to activate; an empty list activates none.
            adapter_weights (`float` or list of `float`, *optional*): One weight for all, or one for each; *defaults to*
                1.

        Raises:
            TypeError: If a name is not a string.
            ValueError: If an adapter does not exist, the lengths differ, a weight is not a finite number, two adapters
                replace the same module, or one of several adapters is DoRA.
        """
        names = self._check_choice(adapter_names)
        weights = adapter_weights if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(
                f"`adapter_weights` has {len(weights)} numbers; pass one number, or one for each of {names}."
            )
        weights = [check_number("adapter_weights", 1 if weight is None else weight) for weight in weights]
        before = vars(self.transformer).get("adapter_weights", {})
        weights = before | dict(zip(names, weights, strict=True))
        is_changed = any(weights[name] != before.get(name, 1.0) for name in names)
        if is_changed and any(is_replaced(layer) for _, layer in list_layers(self.transformer)):
            self._check_weights()
        self.transformer.adapter_weights = weights
        self._activate(names)

    def disable_lora(self) -> None:
        """Disable all adapters until `enable_lora` is called, including adapters that are loaded or set later."""
        self._check_not_fused()
        self._enable(False)

    def enable_lora(self) -> None:
        """Enable the active adapters again."""
        self._check_not_fused()
        self._enable(True)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Remove adapters. Other adapters do not change; if no adapter is left, the decoder is the original one.

        Raises:
            TypeError: If a name is not a string.
            ValueError: If an adapter does not exist.
        """
        names = self._check_names(adapter_names)
        self._check_not_fused()
        self._remove(names, [name for name in self.get_active_adapters() if name not in names])

    @torch.no_grad()
    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | str | None = None
    ) -> None:
        """Fuse adapters into the weights they adapt, until `unfuse_lora`. Edits are then as fast as without adapters.

        Args:
            lora_scale (`float`): A factor for the weights of the adapters.
            safe_fusing (`bool`): Accepted for compatibility with diffusers, without effect: fusing always refuses
                weights that would not be finite.
            adapter_names (`str` or list of `str`, *optional*): *Defaults to* the active adapters. Until `unfuse_lora`,
                these adapters are the active ones.

        Raises:
            TypeError: If a name is not a string.
            ValueError: If the scale is not a finite number, an adapter does not exist, no adapter is active, adapters
                are disabled, or weights are quantized, packed, offloaded, or would not be finite.
        """
        names = self._check_choice(self.get_active_adapters() if adapter_names is None else adapter_names)
        lora_scale = check_number("lora_scale", lora_scale)
        self._check_weights()
        if any(layer.disable_adapters for _, layer in list_layers(self.transformer)):
            raise ValueError("Adapters are disabled; call `enable_lora()` before `fuse_lora()`.")
        if not names:
            raise ValueError("`adapter_names` is empty, or no adapter is active; pass the names of adapters to fuse.")
        layers = [(path, layer) for path, layer in list_layers(self.transformer) if not is_replaced(layer)]
        for path, layer in layers:
            update = sum(layer.get_delta_weight(name) for name in names if name in layer.scaling)
            lengths = sum(
                layer.lora_magnitude_vector[name].weight.sum() for name in names if name in layer.lora_magnitude_vector
            )
            if not layer.weight.is_floating_point():
                raise ValueError(
                    f"`{path}` is quantized, so `unfuse_lora` could not restore it; fuse before quantizing."
                )
            if not (layer.weight + lora_scale * update + lengths).isfinite().all():
                raise ValueError(
                    f"`{path}` would get infinite weights or NaN: the adapter is damaged, or `lora_scale` is too large."
                )
        self.transformer.active_before_fusing = self.get_active_adapters()
        self._activate(names, lora_scale)
        for _, layer in layers:
            layer.merge(adapter_names=names)

    @torch.no_grad()
    def unfuse_lora(self) -> None:
        """Remove fused adapters from the weights. The active adapters and their weights are then as before `fuse_lora`.

        The decoder's weights are restored except for rounding errors: within 0.4 % of |W| + |W + Δ| in bfloat16. To get
        exactly the original weights, load the pipeline again.

        Raises:
            ValueError: If weights are packed or offloaded.
        """
        if not self.fused_loras:
            return
        self._check_weights()
        for _, layer in list_layers(self.transformer):
            if not is_replaced(layer) and layer.merged:
                layer.unmerge()
        self._activate(self.get_active_adapters())
        self._activate(self.transformer.active_before_fusing)

    def unload_lora_weights(self) -> None:
        """Remove all adapters. Fused adapters stay in the weights, and can no longer be unfused."""
        keeps_fused = bool(self.fused_loras)
        for path, layer in list_layers(self.transformer):
            is_kept = keeps_fused and is_replaced(layer) and layer.active_adapters
            kept = layer.modules_to_save[layer.active_adapters[0]] if is_kept else get_original(layer)
            self.transformer.set_submodule(path, kept)
        for name in ("peft_config", "adapter_weights", "active_before_fusing"):
            self.transformer.__dict__.pop(name, None)
        self.transformer._hf_peft_config_loaded = False

    def _remove(self, names: list[str], active: list[str]) -> None:
        """Remove adapters, including those attached in part, and activate the adapters in `active`."""
        layers = list_layers(self.transformer)
        # Without this line, PEFT would activate another adapter, which can differ between layers.
        self._activate(active)
        for name in names:
            vars(self.transformer).get("peft_config", {}).pop(name, None)
            for _, layer in layers:
                vars(layer).get("blends", {}).pop(name, None)
                layer.delete_adapter(*([name, layer.active_adapters] if is_replaced(layer) else [name]))
        for path, layer in reversed(layers):  # Inner layers first.
            if not any(getattr(layer, part) for part in layer.adapter_layer_names):
                self.transformer.set_submodule(path, get_original(layer))
        if not self.list_adapters():
            self.unload_lora_weights()

    def _activate(self, names: list[str], scale: float = 1.0) -> None:
        """Set the active adapters, each with `scale` times its own weight."""
        weights = vars(self.transformer).get("adapter_weights", {})
        for _, layer in list_layers(self.transformer):
            present = [name for name in names if name in layer.modules_to_save] if is_replaced(layer) else list(names)
            layer.set_adapter(present, inference_mode=True)
            for name in present:
                set_weight(layer, name, scale * weights.get(name, 1.0))

    def _enable(self, enabled: bool) -> None:
        for _, layer in list_layers(self.transformer):
            layer.enable_adapters(enabled)
        self._activate(self.get_active_adapters())  # PEFT's `enable_adapters` makes adapters trainable; this undoes it.

    def _check_names(self, adapter_names: list[str] | str) -> list[str]:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"`adapter_names` is {adapter_names!r}; pass a name or a list of names.")
        known = self.list_adapters()
        if missing := [name for name in names if name not in known]:
            raise ValueError(
                f"`adapter_names` holds {', '.join(missing)}; pass names of loaded adapters: "
                f"{', '.join(known) or 'none'}."
            )
        if len(set(names)) < len(names):
            raise ValueError(f"`adapter_names` is {names}; pass each adapter only once.")
        return list(names)

    def _check_choice(self, adapter_names: list[str] | str) -> list[str]:
        names = self._check_names(adapter_names)
        self._check_not_fused()
        dora = [name for name in names if self.transformer.peft_config[name].use_dora]
        if dora and len(names) > 1:  # In PEFT, the result would depend on their order.
            raise ValueError(f"`adapter_names` is {names}; pass the DoRA adapter {dora[0]} alone.")
        for path, layer in list_layers(self.transformer):
            both = [name for name in names if is_replaced(layer) and name in layer.modules_to_save]
            if len(both) > 1:
                raise ValueError(
                    f"`adapter_names` holds {' and '.join(both)}, which all replace `{path}`; pass only one of them."
                )
        return names

    def _check_not_fused(self) -> None:
        if fused := self.fused_loras:
            raise ValueError(f"Adapters are fused ({', '.join(sorted(fused))}); call `unfuse_lora()` first.")

    def _check_weights(self) -> None:
        """Check that the decoder's weights are neither packed nor offloaded."""
        check_not_packed("Changing or saving adapters", self.transformer)
        # accelerate's offload keeps weights on the meta device. diffusers' group offload does not move new layers.
        is_grouped = any(hasattr(module, "_diffusers_hook") for module in self.transformer.modules())
        if is_grouped or any(parameter.is_meta for parameter in self.transformer.parameters()):
            raise ValueError(
                "The decoder's weights are offloaded. Change adapters before `enable_sequential_cpu_offload()` or "
                "`enable_group_offload()`. `remove_all_hooks()` undoes the former."
            )
