"""The Inception network of FID, of 2015-12-05, with the weights of the public file.

It is written here because other libraries need torchvision for it. The network is a table of steps. A step is the name
of a convolution in the public file, or `average`, `max` or `halve` (pooling). A convolution keeps the size of its
input. If a stride follows its name, as in `branch3x3:2`, the convolution has no padding. Convolutions that are
separated by `|` are applied to the same input, and their outputs are concatenated.

Source: Szegedy et al. (arXiv 1512.00567), table 1; Heusel et al. (arXiv 1706.08500) for its use.
"""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


# The network of the public file has 1008 classes. torchvision's Inception has the 1000 classes of ImageNet and would
# give other FID values.
NUM_CLASSES = 1008

STEM = "Conv2d_1a_3x3:2 Conv2d_2a_3x3:1 Conv2d_2b_3x3 halve Conv2d_3b_1x1 Conv2d_4a_3x3:1 halve"
AVERAGE, DOUBLE = "average branch_pool", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
SEVEN = (
    "branch7x7_1 branch7x7_2 branch7x7_3",
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5",
)
EIGHT = (
    "branch1x1",
    "branch3x3_1 branch3x3_2a|branch3x3_2b",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a|branch3x3dbl_3b",
)
# Name of a block → its branches, whose outputs are concatenated.
BLOCKS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), ("branch1x1", "branch5x5_1 branch5x5_2", DOUBLE, AVERAGE)),
    "Mixed_6a": ("branch3x3:2", f"{DOUBLE}:2", "halve"),
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), ("branch1x1", *SEVEN, AVERAGE)),
    "Mixed_7a": (
        "branch3x3_1 branch3x3_2:2",
        "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4:2",
        "halve",
    ),
    "Mixed_7b": (*EIGHT, AVERAGE),
    # Parity: the last block of the published network uses max pooling, and the other blocks average pooling.
    "Mixed_7c": (*EIGHT, "max branch_pool"),
}
BATCH_NORM = ("running_mean", "running_var", "weight", "bias")
POOLING = {
    "halve": partial(F.max_pool2d, kernel_size=3, stride=2),
    "max": partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
    # Parity: the network was trained in TensorFlow, whose average pooling does not count padding.
    "average": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
}


class FIDInception(nn.Module):
    """Compute the features whose Fréchet distance is FID, up to the last pooling.

    Args:
        weights (`dict[str, torch.Tensor]`): The tensors of `pt_inception-2015-12-05-6726825d.pth`, as
            `features.read_weights` returns them. Their shapes set the widths of the network.

    Raises:
        ValueError: If the weights belong to another Inception network, such as torchvision's.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor]):
        classifier = weights.get("fc/weight")
        if classifier is not None and len(classifier) != NUM_CLASSES:
            raise ValueError(
                f"`weights` are an Inception network of {len(classifier)} classes, but FID needs the one of "
                f"{NUM_CLASSES} classes; pass pt_inception-2015-12-05-6726825d.pth."
            )
        super().__init__()
        self.weights = nn.ParameterDict(weights).requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute features (batch, 2048) of images (batch, 3, 299, 299) in [−1, 1)."""
        hidden_states = self.run(STEM, pixels)
        for block, branches in BLOCKS.items():
            hidden_states = torch.cat([self.run(branch, hidden_states, f"{block}/") for branch in branches], dim=1)
        return hidden_states.mean((2, 3))

    def run(self, steps: str, hidden_states: torch.Tensor, prefix: str = "") -> torch.Tensor:
        """Apply steps one after the other. The names of their weights start with `prefix`."""
        for step in steps.split():
            if step in POOLING:
                hidden_states = POOLING[step](hidden_states)
            else:
                outputs = [self.convolve(prefix + name, hidden_states) for name in step.split("|")]
                hidden_states = torch.cat(outputs, dim=1)
        return hidden_states

    def convolve(self, step: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply a convolution without bias, batch normalization and ReLU."""
        name, _, stride = step.partition(":")
        shape = {"stride": int(stride)} if stride else {"padding": "same"}
        hidden_states = F.conv2d(hidden_states, self.weights[f"{name}/conv/weight"], **shape)
        mean, variance, weight, bias = (self.weights[f"{name}/bn/{part}"] for part in BATCH_NORM)
        return F.relu(F.batch_norm(hidden_states, mean, variance, weight, bias, eps=0.001))
