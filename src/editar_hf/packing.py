"""Pack the weights of linear layers in float16 for decoding on CPUs, and unpack them again.

On a CPU, the time of a decoding step is mostly the time to read the weights. A packed layer reads 16 bits per weight
and computes with float32 activations, so it is faster than float32 and bfloat16 layers (see `benchmarks/results/`).
float16 holds every bfloat16 value from 2⁻¹⁷ to 65,504 exactly, and changes smaller values by at most 2⁻²⁵, so weights
that are stored in bfloat16 lose nothing that matters. Weights that need all 32 bits are rounded to 11 significant bits;
bfloat16 has 8.
"""

import copy
import ctypes
import itertools
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakValueDictionary

import torch
from torch import nn


if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The largest number in float16.
LARGEST_WEIGHT = 65_504.0
# A layer keeps the values that float16 does not hold exactly, if they are at most this share. Among bfloat16 values
# they are rare. Weights that need all 32 bits exceed any such share, and keeping them would cost more than float32.
MAX_INEXACT_SHARE = 1 / 8
# About how many weights of a layer `sample_weights` compares with those of a source cache.
NUM_SAMPLES = 32


def explain_missing_kernel() -> str | None:
    """Return why this machine cannot use packed weights, or None if it can."""
    machine = platform.machine()
    if machine.lower() not in ("x86_64", "amd64"):
        return f"this processor is {machine}, and packed weights are supported on x86-64 only"
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return "torch's FBGEMM kernels do not support this processor; they need AVX2"
    names = ("linear_prepack_fp16", "linear_unpack_fp16", "linear_dynamic_fp16")
    if not all(hasattr(torch.ops.quantized, name) for name in names):
        return f"torch {torch.__version__} does not have FBGEMM's operators for float16 weights"
    return None


def is_packed(model: nn.Module) -> bool:
    """Return True if a model has packed weights."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def check_not_packed(operation: str, model: nn.Module) -> None:
    """Raise a `ValueError` if a model has packed weights, which do not support the operation."""
    if is_packed(model):
        raise build_error(operation)


def build_error(operation: str) -> ValueError:
    """Build the error for an operation that packed weights do not support."""
    return ValueError(f"{operation} is not possible with packed weights; call `unpack_weights()` first.")


# torch's compiler does not accept packed weights as an argument of an operator, so compiled code passes their number.
PACKED_WEIGHTS: WeakValueDictionary[int, torch.ScriptObject] = WeakValueDictionary()
NUMBERS = itertools.count()
LIBRARY = torch.library.Library("editar_hf", "FRAGMENT")
LIBRARY.define("packed_linear(Tensor hidden_states, int number, int out_features) -> Tensor")


def compute_packed_linear(hidden_states: torch.Tensor, number: int, out_features: int) -> torch.Tensor:
    return torch.ops.quantized.linear_dynamic_fp16(hidden_states, PACKED_WEIGHTS[number])


def allocate_output(hidden_states: torch.Tensor, number: int, out_features: int) -> torch.Tensor:
    return hidden_states.new_empty(*hidden_states.shape[:-1], out_features)


LIBRARY.impl("packed_linear", compute_packed_linear, "CPU")
LIBRARY.impl("packed_linear", allocate_output, "Meta")


class PackedLinear(nn.Module):
    """A linear layer without bias, with packed float16 weights and float32 activations. It cannot be trained.

    It holds no parameters. Saving, loading and pickling raise a `ValueError`, and so does a conversion to another dtype
    or device. A deep copy shares the packed weights, which never change.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype, self.is_trainable = layer.weight.dtype, layer.weight.requires_grad
        weight = layer.weight.detach().float()
        # Some rows at a time: temporary tensors of the whole size would be slow, and would leave gaps in memory.
        is_inexact = torch.cat(
            [rows.view(torch.int32) != rows.half().float().view(torch.int32) for rows in weight.split(64)]
        )
        inexact = is_inexact.flatten().nonzero()[:, 0]
        self.is_exact = len(inexact) <= MAX_INEXACT_SHARE * weight.numel()
        samples = weight.flatten()[:: max(1, weight.numel() // NUM_SAMPLES)]
        if self.is_exact:
            self.inexact_indices, self.inexact_values = inexact.int(), layer.weight.detach().flatten()[inexact]
            self.weight_samples = samples.clone()
        else:
            self.weight_samples = samples.half().float()
        self.packed_weight = torch.ops.quantized.linear_prepack_fp16(weight, None)
        self.number = next(NUMBERS)
        PACKED_WEIGHTS[self.number] = self.packed_weight
        self.train(layer.training)

    @property
    def weight(self) -> torch.Tensor:
        """The shape and dtype of the weights, on the meta device. T5 reads the dtype."""
        return torch.empty(self.out_features, self.in_features, device="meta")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise build_error("A forward pass with gradients, outside `torch.no_grad()`,")
        hidden_states = hidden_states.float()
        if torch.compiler.is_compiling():
            return torch.ops.editar_hf.packed_linear(hidden_states, self.number, self.out_features)
        return torch.ops.quantized.linear_dynamic_fp16(hidden_states, self.packed_weight)

    def unpack(self) -> nn.Linear:
        """Make the original layer, with the same bits. The layer must be exact."""
        weight = torch.ops.quantized.linear_unpack_fp16(self.packed_weight)[0].to(self.dtype)
        weight.view(-1)[self.inexact_indices.long()] = self.inexact_values
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=self.is_trainable)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        check_conversion(fn)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any) -> None:
        raise build_error("Saving")

    def _load_from_state_dict(self, *args: Any) -> None:
        raise build_error("Loading other weights")

    def __getstate__(self) -> dict:
        raise build_error("Pickling")

    def __deepcopy__(self, memo: dict) -> Self:
        copied = self.__new__(type(self))
        shared = {"packed_weight": self.packed_weight}
        copied.__dict__ = {**copy.deepcopy({**self.__dict__, **dict.fromkeys(shared)}, memo), **shared}
        return copied


def check_conversion(fn: Any) -> None:
    """Raise a `ValueError` if a function of `Module._apply` changes the dtype or the device."""
    converted = fn(torch.empty(0))
    if converted.dtype != torch.float32 or converted.device.type != "cpu":
        raise build_error(f"A conversion to {converted.dtype} on {converted.device}")


def list_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """List the linear layers without bias that can be packed, together with their paths.

    The layers of adapters are left out. So are layers below an adapter that reads their weights, such as DoRA, unless
    it is fused. Plain LoRA only calls the layer below it.
    """
    kept: list[str] = []
    for path, layer in model.named_modules():
        is_plain = hasattr(layer, "original_module") or (hasattr(layer, "lora_A") and not layer.lora_magnitude_vector)
        if hasattr(layer, "adapter_layer_names") and not (is_plain or layer.merged):
            kept.append(f"{path}.")
        is_adapter = ".lora_" in path or ".modules_to_save." in path
        is_linear = isinstance(layer, nn.Linear) and layer.bias is None
        if is_linear and not is_adapter and not path.startswith(tuple(kept)):
            yield path, layer


def list_floats(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """List the parameters and buffers of floating-point dtypes, together with their names."""
    for tensors in (model.named_parameters(), model.named_buffers()):
        yield from ((name, tensor) for name, tensor in tensors if tensor.is_floating_point())


def check_can_pack(model: nn.Module) -> None:
    """Check that the linear layers of a model can be packed.

    Raises:
        ValueError: If this machine has no kernel, or a weight is not on the CPU, is quantized, not finite or too large
            for float16.
    """
    if (reason := explain_missing_kernel()) is not None:
        raise ValueError(f"The weights cannot be packed: {reason}. Use the model without `pack_weights()`.")
    if devices := {str(tensor.device) for _, tensor in list_floats(model) if tensor.device.type != "cpu"}:
        raise ValueError(
            f"The weights are on {', '.join(sorted(devices))}; packed weights are for CPUs. Move the model with "
            "`.to('cpu')` first, or use it without `pack_weights()`. Offloaded weights cannot be packed."
        )
    for path, layer in list_linears(model):
        if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
            raise ValueError(f"`{path}` is quantized; to pack weights, load the model without `quantization_config`.")
        lowest, highest = layer.weight.aminmax()
        if not max(-lowest, highest) <= LARGEST_WEIGHT:  # NaN does not fulfil any comparison.
            raise ValueError(
                f"`{path}` has weights from {lowest} to {highest}, and packed weights must be finite and within "
                f"±{LARGEST_WEIGHT:,.0f}; use the model without `pack_weights()`, or check for damaged weights."
            )


@torch.no_grad()
def pack_linears(*models: "PreTrainedModel") -> None:
    """Pack the linear layers without bias of models in place, and convert everything else to float32.

    The layers are packed one by one, so that memory never holds all weights twice. A model that is already packed does
    not change.

    Raises:
        ValueError: See `check_can_pack`. All models are checked before any is packed.
    """
    for model in models:
        check_can_pack(model)
    for model in models:
        for path in [path for path, _ in list_linears(model)]:
            model.set_submodule(path, PackedLinear(model.get_submodule(path)))
            trim_memory()
        if not hasattr(model, "dtypes_before_packing"):
            model.dtypes_before_packing = {name: tensor.dtype for name, tensor in list_floats(model)}
        for _, tensor in list_floats(model):
            tensor.data = tensor.data.float()


@torch.no_grad()
def unpack_linears(*models: "PreTrainedModel") -> None:
    """Undo `pack_linears`: restore all weights and their dtypes, to the bit. Other models do not change.

    Raises:
        ValueError: If packing has rounded a weight of any model, before any is unpacked.
    """
    layers = [
        (model, path) for model in models for path, layer in model.named_modules() if isinstance(layer, PackedLinear)
    ]
    for model, path in layers:
        if not model.get_submodule(path).is_exact:
            raise ValueError(
                f"Packing has rounded `{path}` to float16, because its weights need more bits; load the model again to "
                "get its original weights."
            )
    for model, path in layers:
        model.set_submodule(path, model.get_submodule(path).unpack())
        trim_memory()
    for model in models:
        dtypes = model.__dict__.pop("dtypes_before_packing", {})
        for name, tensor in list_floats(model):
            tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))


def trim_memory() -> None:
    """Return freed memory to the system, where the C library has a function for it (glibc).

    Without it, the gaps that weights of another size left keep as much memory as the packed weights.
    """
    if hasattr(ctypes.pythonapi, "malloc_trim"):
        ctypes.pythonapi.malloc_trim(0)


def list_weight_samples(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """List the numbers that `sample_weights` picks from each packed weight, by the name of its parameter."""
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield f"{path}.weight", module.weight_samples


class PackedWeightsMixin:
    """Add `pack_weights` and `unpack_weights` to a model. Put it before `PreTrainedModel` among the base classes."""

    def pack_weights(self) -> None:
        """Pack the weights of the linear layers in float16, for faster decoding on CPUs.

        The model then computes in float32, with half the memory for its weights. Its tokens are those of the same
        weights in float32, if the weights are stored in 16 bits. Weights that need all 32 bits, such as those with
        fused adapters, are rounded to float16, which is finer than bfloat16. LoRA adapters that are not fused stay in
        float32, and can be activated and deactivated; weights below DoRA adapters are not packed. Until
        `unpack_weights`, the model cannot be trained, saved, pickled or moved to another device or dtype, and adapters
        cannot be loaded, fused or saved.

        Raises:
            ValueError: If this machine has no kernel (it exists for x86-64 with AVX2), a weight is not on the CPU, is
                quantized, not finite, or beyond ±65,504.
        """
        pack_linears(self)

    def unpack_weights(self) -> None:
        """Undo `pack_weights`: restore the original weights and dtypes, to the bit.

        Raises:
            ValueError: If packing has rounded a weight; then load the model again.
        """
        unpack_linears(self)

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        # Checked before any weight is converted.
        if is_packed(self):
            check_conversion(fn)
        return super()._apply(fn, recurse)  # type: ignore[misc]
