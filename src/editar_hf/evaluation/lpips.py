"""LPIPS 0.1 with SqueezeNet 1.1 and the weights of the two public files.

It is written here because other libraries need torchvision for it.

Source: Zhang et al. (arXiv 1801.03924), equation 1; SqueezeNet (arXiv 1602.07360), section 3.2.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn


# ImageNet's statistics for pixels in [−1, 1], and the compared layers. Source: the official code of LPIPS.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
COMPARED_LAYERS = (1, 4, 7, 9, 10, 11, 12)
# Layer 0 is a convolution and layer 1 its ReLU. The other layers, except these pooling layers, are fire modules.
POOLING_LAYERS = (2, 5, 8)
NUM_LAYERS = 13


class LPIPS(nn.Module):
    """Compute the learned perceptual distance of two images. Each side must have at least 17 pixels.

    Args:
        weights (`dict[str, torch.Tensor]`): The tensors of `squeezenet1_1-b8a52dc0.pth` and `squeeze.pth` together,
            as `features.read_weights` returns them. Their shapes set the widths of the network.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor]):
        super().__init__()
        self.weights = nn.ParameterDict(weights).requires_grad_(False)

    def forward(
        self, pixels: torch.Tensor, reference_pixels: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the distances (batch,), 0 or more.

        Args:
            pixels, reference_pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): In [−1, 1].
            weights (`torch.Tensor` of shape `(batch, 1, height, width)`, *optional*): Weight of each pixel; defaults to
                equal weights. The weights are averaged over the pixels of each cell of a layer.
        """
        distance = pixels.new_zeros(len(pixels))
        compared = zip(self.compute_features(pixels), self.compute_features(reference_pixels), strict=True)
        for index, (features, reference_features) in enumerate(compared):
            difference = F.conv2d((features - reference_features).square(), self.weights[f"lin{index}/model/1/weight"])
            cells = torch.ones_like(difference)
            if weights is not None:
                height, width = difference.shape[2:]
                cells = F.adaptive_avg_pool2d(weights, (height, width))
            distance = distance + (difference * cells).sum((1, 2, 3)) / cells.sum((1, 2, 3))
        return distance

    def compute_features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Compute the features of the compared layers, normalized to unit length at every position."""
        shift, scale = (pixels.new_tensor(values)[:, None, None] for values in (SHIFT, SCALE))
        hidden_states = self.convolve("0", (pixels - shift) / scale, stride=2)
        compared = [hidden_states]
        for layer in range(2, NUM_LAYERS):
            if layer in POOLING_LAYERS:
                hidden_states = F.max_pool2d(hidden_states, kernel_size=3, stride=2, ceil_mode=True)
                continue
            hidden_states = self.convolve(f"{layer}/squeeze", hidden_states)
            narrow = self.convolve(f"{layer}/expand1x1", hidden_states)
            wide = self.convolve(f"{layer}/expand3x3", hidden_states, padding=1)
            hidden_states = torch.cat([narrow, wide], dim=1)
            if layer in COMPARED_LAYERS:
                compared.append(hidden_states)
        return [states / (states.norm(dim=1, keepdim=True) + 1e-10) for states in compared]

    def convolve(self, name: str, hidden_states: torch.Tensor, stride: int = 1, padding: int = 0) -> torch.Tensor:
        """Apply a convolution and ReLU."""
        weight, bias = self.weights[f"features/{name}/weight"], self.weights[f"features/{name}/bias"]
        return F.relu(F.conv2d(hidden_states, weight, bias, stride, padding))
