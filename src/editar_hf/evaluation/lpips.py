"""LPIPS 0.1 on SqueezeNet 1.1, which no library offers without torchvision; it reads the two public weight files.

Source: Zhang et al. (arXiv 1801.03924), equation 1; SqueezeNet (arXiv 1602.07360), section 3.2.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn


# Source: the official LPIPS: ImageNet's statistics for pixels in [−1, 1], and the compared layers.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
COMPARED_LAYERS = (1, 4, 7, 9, 10, 11, 12)
# The (squeeze, expand) widths of the fire modules. Each group starts with pooling.
FIRE_GROUPS = (((16, 64), (16, 64)), ((32, 128), (32, 128)), ((48, 192), (48, 192), (64, 256), (64, 256)))
# The side of the smallest image of which the last pooling leaves something.
LPIPS_SMALLEST_SIDE = 17


class Fire(nn.Module):
    """A 1×1 convolution, followed by a 1×1 and a 3×3 convolution side by side."""

    def __init__(self, in_channels: int, squeeze_channels: int, expand_channels: int):
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze_channels, kernel_size=1)
        self.expand1x1 = nn.Conv2d(squeeze_channels, expand_channels, kernel_size=1)
        self.expand3x3 = nn.Conv2d(squeeze_channels, expand_channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = F.relu(self.squeeze(hidden_states))
        return torch.cat([F.relu(self.expand1x1(hidden_states)), F.relu(self.expand3x3(hidden_states))], dim=1)


class LPIPS(nn.Module):
    """Compute the learned perceptual distance of two images.

    Args:
        width_divisor (`int`, *optional*, defaults to 1): Divides every width; with 16 the network is tiny.

    Example:

    ```python
    >>> import torch
    >>> from editar_hf.evaluation.lpips import LPIPS
    >>> LPIPS(width_divisor=16)(torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 64, 64)).tolist()
    [0.0, 0.0]

    ```
    """

    def __init__(self, width_divisor: int = 1):
        super().__init__()
        self.width_divisor = width_divisor
        channels = 64 // width_divisor
        layers, widths = [nn.Conv2d(3, channels, kernel_size=3, stride=2), nn.ReLU()], {1: channels}
        for group in FIRE_GROUPS:
            layers.append(nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True))
            for squeeze_channels, expand_channels in group:
                layers.append(Fire(channels, squeeze_channels // width_divisor, expand_channels // width_divisor))
                channels = widths[len(layers) - 1] = 2 * expand_channels // width_divisor
        self.features = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Conv2d(widths[layer], 1, kernel_size=1, bias=False) for layer in COMPARED_LAYERS)

    @classmethod
    def from_weights(cls, weights: Mapping[str, torch.Tensor]) -> "LPIPS":
        """Build the network from the tensors of `squeezenet1_1-b8a52dc0.pth` and `squeeze.pth` together."""
        weights = {
            re.sub(r"^lin(\d+)\.model\.1\.", r"heads.\1.", name): tensor.float()
            for name, tensor in weights.items()
            if not name.startswith("classifier.")
        }
        first = weights.get("features.0.weight")
        model = cls(1 if first is None else max(1, 64 // len(first)))
        model.load_state_dict(weights)
        return model.eval()

    def forward(
        self, pixels: torch.Tensor, reference_pixels: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the distances (batch,), 0 or more.

        Args:
            pixels, reference_pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): In [−1, 1].
            weights (`torch.Tensor` of shape `(batch, 1, height, width)`, *optional*): How much each pixel counts;
                defaults to the same for all. They are averaged over the pixels of each cell of a layer.
        """
        distance = 0
        compared = zip(self.compute_features(pixels), self.compute_features(reference_pixels), strict=True)
        for head, (features, reference_features) in zip(self.heads, compared, strict=True):
            difference = head((features - reference_features).square())
            if weights is None:
                distance = distance + difference.mean((1, 2, 3))
            else:
                cells = F.adaptive_avg_pool2d(weights, difference.shape[2:])
                distance = distance + (difference * cells).sum((1, 2, 3)) / cells.sum((1, 2, 3))
        return distance

    def compute_features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Compute the features of the compared layers, scaled to unit length at every place."""
        shift, scale = (pixels.new_tensor(values)[:, None, None] for values in (SHIFT, SCALE))
        hidden_states, compared = (pixels - shift) / scale, []
        for index, layer in enumerate(self.features):
            hidden_states = layer(hidden_states)
            if index in COMPARED_LAYERS:
                compared.append(hidden_states / (hidden_states.norm(dim=1, keepdim=True) + 1e-10))
        return compared
