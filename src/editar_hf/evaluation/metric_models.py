"""The two networks that metrics need and no library has without torchvision: LPIPS on SqueezeNet, and FID's Inception.

Modules carry the names of the public checkpoints' keys, so that `metric_conversion` has little to rename. Both networks
are for inference only. The file reads bottom-up, first LPIPS, then Inception.
"""

from functools import partial

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


# All widths of both networks are multiples of it.
LARGEST_WIDTH_DIVISOR = 16

# Source: the official LPIPS, version 0.1: ImageNet's statistics for pixels in [−1, 1], and what keeps a division by the
# length of a feature from failing.
LPIPS_SHIFT, LPIPS_SCALE, LPIPS_EPSILON = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450), 1e-10
# Source: SqueezeNet 1.1, the authors' release: the width of the first convolution, and those of the (squeeze, expand)
# convolutions of the fire modules, in three groups that pooling begins.
SQUEEZENET_WIDTH = 64
FIRE_GROUPS = (((16, 64), (16, 64)), ((32, 128), (32, 128)), ((48, 192), (48, 192), (64, 256), (64, 256)))
# Source: the official LPIPS, version 0.1: the layers whose outputs are compared.
COMPARED_LAYERS = (1, 4, 7, 9, 10, 11, 12)
# The side of the smallest picture of which the last pooling leaves something.
LPIPS_SMALLEST_SIDE = 17


class MetricModelConfig(PreTrainedConfig):
    """What the configurations of both networks share."""

    width_divisor: int = 1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.width_divisor < 1 or LARGEST_WIDTH_DIVISOR % self.width_divisor:
            raise ValueError(f"`width_divisor` is {self.width_divisor}; give a divisor of {LARGEST_WIDTH_DIVISOR}.")


@strict
class LPIPSConfig(MetricModelConfig):
    """Configuration of LPIPS on SqueezeNet 1.1; the default is the published network.

    Args:
        width_divisor (`int`): Divides every width: 1 is the published network, 16 a tiny one.

    Raises:
        ValueError: If `width_divisor` does not divide 16.

    Example:

    ```python
    >>> from editar_hf.evaluation.metric_models import LPIPSConfig
    >>> LPIPSConfig(width_divisor=16).width_divisor
    16

    ```
    """

    model_type = "editar_lpips"


class SqueezeNetFire(nn.Module):
    """A 1×1 convolution that squeezes, then 1×1 and 3×3 ones, side by side, that expand.

    Source: SqueezeNet (arXiv 1602.07360), section 3.2.
    """

    def __init__(self, in_channels: int, squeeze_channels: int, expand_channels: int):
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze_channels, kernel_size=1)
        self.expand1x1 = nn.Conv2d(squeeze_channels, expand_channels, kernel_size=1)
        self.expand3x3 = nn.Conv2d(squeeze_channels, expand_channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = F.relu(self.squeeze(hidden_states))
        return torch.cat([F.relu(self.expand1x1(hidden_states)), F.relu(self.expand3x3(hidden_states))], dim=1)


class LPIPSModel(PreTrainedModel):
    """Compute the learned perceptual distance of two pictures, version 0.1, on SqueezeNet 1.1.

    Example:

    ```python
    >>> import torch
    >>> from editar_hf.evaluation.metric_models import LPIPSConfig, LPIPSModel
    >>> model = LPIPSModel(LPIPSConfig(width_divisor=16)).eval()
    >>> model(torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 64, 64)).tolist()
    [0.0, 0.0]

    ```

    Source: Zhang et al. (arXiv 1801.03924), equation 1.
    """

    config_class = LPIPSConfig
    base_model_prefix = "lpips"

    def __init__(self, config: LPIPSConfig):
        super().__init__(config)
        channels = SQUEEZENET_WIDTH // config.width_divisor
        layers, widths = [nn.Conv2d(3, channels, kernel_size=3, stride=2), nn.ReLU()], {1: channels}
        for group in FIRE_GROUPS:
            layers.append(nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True))
            for squeeze_channels, expand_channels in group:
                expand_channels //= config.width_divisor
                layers.append(SqueezeNetFire(channels, squeeze_channels // config.width_divisor, expand_channels))
                channels = widths[len(layers) - 1] = 2 * expand_channels
        self.features = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Conv2d(widths[layer], 1, kernel_size=1, bias=False) for layer in COMPARED_LAYERS)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        reference_pixel_values: torch.Tensor,
        pixel_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the distances (batch,), 0 or more, of pictures (batch, 3, height, width) in [−1, 1].

        Args:
            pixel_values, reference_pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): In [−1, 1].
            pixel_weights (`torch.Tensor` of shape `(batch, 1, height, width)`, *optional*): How much each place counts;
                default: all the same. A layer's cell weighs what its pixels do on average.
        """
        distance = 0
        compared = zip(self.compute_features(pixel_values), self.compute_features(reference_pixel_values), strict=True)
        for head, (features, reference_features) in zip(self.heads, compared, strict=True):
            difference = head((features - reference_features).square())
            if pixel_weights is None:
                distance = distance + difference.mean((1, 2, 3))
            else:
                weights = F.adaptive_avg_pool2d(pixel_weights, difference.shape[2:])
                distance = distance + (difference * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3))
        return distance

    def compute_features(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Compute the features of the compared layers, each of unit length at every place."""
        shift, scale = (pixel_values.new_tensor(values)[:, None, None] for values in (LPIPS_SHIFT, LPIPS_SCALE))
        hidden_states, compared = (pixel_values - shift) / scale, []
        for index, layer in enumerate(self.features):
            hidden_states = layer(hidden_states)
            if index in COMPARED_LAYERS:
                compared.append(hidden_states / (hidden_states.norm(dim=1, keepdim=True) + LPIPS_EPSILON))
        return compared


@strict
class FIDInceptionConfig(MetricModelConfig):
    """Configuration of FID's Inception; the default is the published network.

    Args:
        width_divisor (`int`): Divides every width: 1 is the published network, 16 a tiny one.

    Raises:
        ValueError: If `width_divisor` does not divide 16.

    Example:

    ```python
    >>> from editar_hf.evaluation.metric_models import FIDInceptionConfig
    >>> FIDInceptionConfig().num_features
    2048

    ```
    """

    model_type = "editar_fid_inception"

    @property
    def num_features(self) -> int:
        """Width of the features that the Fréchet distance is computed of."""
        return 2048 // self.width_divisor


class InceptionConv(nn.Module):
    """A convolution without bias, normalised, then rectified."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride: int = 1, padding: str = "same"):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(hidden_states)))


def build_conv(config: FIDInceptionConfig, in_channels: int, out_channels: int, *args, **kwargs) -> InceptionConv:
    """Build a convolution between the published widths."""
    return InceptionConv(in_channels // config.width_divisor, out_channels // config.width_divisor, *args, **kwargs)


def apply_average_pool(hidden_states: torch.Tensor) -> torch.Tensor:
    """Average over 3×3 places."""
    # Parity: the network was trained in TensorFlow, whose average leaves out what lies beyond the edge.
    return F.avg_pool2d(hidden_states, kernel_size=3, stride=1, padding=1, count_include_pad=False)


class InceptionBlockA(nn.Module):
    """1×1, 5×5 and twice 3×3 convolutions beside pooling, on maps of 35×35."""

    def __init__(self, config: FIDInceptionConfig, in_channels: int, pool_channels: int):
        super().__init__()
        conv = partial(build_conv, config)
        self.branch1x1 = conv(in_channels, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = conv(in_channels, 48, 1), conv(48, 64, 5)
        self.branch3x3dbl_1 = conv(in_channels, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = conv(64, 96, 3), conv(96, 96, 3)
        self.branch_pool = conv(in_channels, pool_channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        branches = [
            self.branch1x1(hidden_states),
            self.branch5x5_2(self.branch5x5_1(hidden_states)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(hidden_states))),
            self.branch_pool(apply_average_pool(hidden_states)),
        ]
        return torch.cat(branches, dim=1)


class InceptionBlockB(nn.Module):
    """The step from maps of 35×35 to 17×17."""

    def __init__(self, config: FIDInceptionConfig):
        super().__init__()
        conv = partial(build_conv, config)
        self.branch3x3 = conv(288, 384, 3, stride=2, padding="valid")
        self.branch3x3dbl_1, self.branch3x3dbl_2 = conv(288, 64, 1), conv(64, 96, 3)
        self.branch3x3dbl_3 = conv(96, 96, 3, stride=2, padding="valid")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        branches = [
            self.branch3x3(hidden_states),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(hidden_states))),
            F.max_pool2d(hidden_states, kernel_size=3, stride=2),
        ]
        return torch.cat(branches, dim=1)


class InceptionBlockC(nn.Module):
    """Convolutions of 7 places along rows and columns, once and twice, on maps of 17×17."""

    def __init__(self, config: FIDInceptionConfig, inner_channels: int):
        super().__init__()
        conv = partial(build_conv, config)
        self.branch1x1 = conv(768, 192, 1)
        self.branch7x7_1 = conv(768, inner_channels, 1)
        self.branch7x7_2 = conv(inner_channels, inner_channels, (1, 7))
        self.branch7x7_3 = conv(inner_channels, 192, (7, 1))
        self.branch7x7dbl_1 = conv(768, inner_channels, 1)
        self.branch7x7dbl_2 = conv(inner_channels, inner_channels, (7, 1))
        self.branch7x7dbl_3 = conv(inner_channels, inner_channels, (1, 7))
        self.branch7x7dbl_4 = conv(inner_channels, inner_channels, (7, 1))
        self.branch7x7dbl_5 = conv(inner_channels, 192, (1, 7))
        self.branch_pool = conv(768, 192, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(hidden_states)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(hidden_states)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        pooled = self.branch_pool(apply_average_pool(hidden_states))
        return torch.cat([self.branch1x1(hidden_states), once, twice, pooled], dim=1)


class InceptionBlockD(nn.Module):
    """The step from maps of 17×17 to 8×8."""

    def __init__(self, config: FIDInceptionConfig):
        super().__init__()
        conv = partial(build_conv, config)
        self.branch3x3_1, self.branch3x3_2 = conv(768, 192, 1), conv(192, 320, 3, stride=2, padding="valid")
        self.branch7x7x3_1, self.branch7x7x3_2 = conv(768, 192, 1), conv(192, 192, (1, 7))
        self.branch7x7x3_3 = conv(192, 192, (7, 1))
        self.branch7x7x3_4 = conv(192, 192, 3, stride=2, padding="valid")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(hidden_states)))
        branches = [
            self.branch3x3_2(self.branch3x3_1(hidden_states)),
            self.branch7x7x3_4(seven),
            F.max_pool2d(hidden_states, kernel_size=3, stride=2),
        ]
        return torch.cat(branches, dim=1)


class InceptionBlockE(nn.Module):
    """Convolutions of 3 places along rows and columns side by side, on maps of 8×8."""

    def __init__(self, config: FIDInceptionConfig, in_channels: int, is_last: bool = False):
        super().__init__()
        conv = partial(build_conv, config)
        self.is_last = is_last
        self.branch1x1 = conv(in_channels, 320, 1)
        self.branch3x3_1 = conv(in_channels, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = conv(384, 384, (1, 3)), conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = conv(in_channels, 448, 1), conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = conv(384, 384, (1, 3)), conv(384, 384, (3, 1))
        self.branch_pool = conv(in_channels, 192, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        once = self.branch3x3_1(hidden_states)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(hidden_states))
        # Parity: the published network's last block takes the greatest value where the others average.
        if self.is_last:
            pooled = F.max_pool2d(hidden_states, kernel_size=3, stride=1, padding=1)
        else:
            pooled = apply_average_pool(hidden_states)
        branches = [
            self.branch1x1(hidden_states),
            *(self.branch3x3_2a(once), self.branch3x3_2b(once)),
            *(self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, dim=1)


class FIDInceptionModel(PreTrainedModel):
    """Compute the features whose Fréchet distance is FID: the Inception of 2015-12-05, up to its last pooling.

    Example:

    ```python
    >>> import torch
    >>> from editar_hf.evaluation.metric_models import FIDInceptionConfig, FIDInceptionModel
    >>> model = FIDInceptionModel(FIDInceptionConfig(width_divisor=16)).eval()
    >>> tuple(model(torch.zeros(2, 3, 299, 299)).shape)
    (2, 128)

    ```

    Source: Szegedy et al. (arXiv 1512.00567), table 1; Heusel et al. (arXiv 1706.08500) for its use.
    """

    config_class = FIDInceptionConfig
    base_model_prefix = "fid_inception"

    def __init__(self, config: FIDInceptionConfig):
        super().__init__(config)
        conv = partial(build_conv, config)
        self.Conv2d_1a_3x3 = InceptionConv(3, 32 // config.width_divisor, 3, stride=2, padding="valid")
        self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = conv(32, 32, 3, padding="valid"), conv(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = conv(64, 80, 1), conv(80, 192, 3, padding="valid")
        self.Mixed_5b = InceptionBlockA(config, 192, pool_channels=32)
        self.Mixed_5c = InceptionBlockA(config, 256, pool_channels=64)
        self.Mixed_5d = InceptionBlockA(config, 288, pool_channels=64)
        self.Mixed_6a = InceptionBlockB(config)
        self.Mixed_6b = InceptionBlockC(config, inner_channels=128)
        self.Mixed_6c = InceptionBlockC(config, inner_channels=160)
        self.Mixed_6d = InceptionBlockC(config, inner_channels=160)
        self.Mixed_6e = InceptionBlockC(config, inner_channels=192)
        self.Mixed_7a = InceptionBlockD(config)
        self.Mixed_7b = InceptionBlockE(config, 1280)
        self.Mixed_7c = InceptionBlockE(config, 2048, is_last=True)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute features (batch, num_features) of pictures (batch, 3, 299, 299) in [−1, 1)."""
        hidden_states = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixel_values)))
        hidden_states = F.max_pool2d(hidden_states, kernel_size=3, stride=2)
        hidden_states = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden_states))
        hidden_states = F.max_pool2d(hidden_states, kernel_size=3, stride=2)
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d):
            hidden_states = block(hidden_states)
        for block in (self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e):
            hidden_states = block(hidden_states)
        for block in (self.Mixed_7a, self.Mixed_7b, self.Mixed_7c):
            hidden_states = block(hidden_states)
        return hidden_states.mean((2, 3))
