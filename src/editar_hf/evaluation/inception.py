"""FID's Inception of 2015-12-05, which no library offers without torchvision; it reads the public weight file.

A block is a table of branches. A branch is a list of steps that are applied one after the other:
`(name, out_channels, kernel_size)` is a convolution, and a fourth entry its stride; `"average"`, `"max"` and `"reduce"`
are pooling; a tuple of convolutions at the end runs them side by side. Names are those of the public file.

Source: Szegedy et al. (arXiv 1512.00567), table 1; Heusel et al. (arXiv 1706.08500) for its use.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn


# The public file classifies 1008 classes. torchvision's Inception has ImageNet's 1000, and would give other figures.
NUM_CLASSES = 1008


class Convolution(nn.Module):
    """A convolution without bias, batch normalisation and a rectifier; one with a stride is not padded."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride: int = 1, padding: str = "same"):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(hidden_states)))


class Block(nn.Module):
    """Branches side by side, whose outputs are concatenated.

    Args:
        in_channels (`int`): Input width of the published network.
        branches (`list`): Branches, as the module's docstring describes them.
        width_divisor (`int`): Divides every width.
    """

    def __init__(self, in_channels: int, branches: list, width_divisor: int):
        super().__init__()
        self.branches = branches
        for branch in branches:
            channels = in_channels
            for step in branch:
                if isinstance(step, str):
                    continue
                for name, out_channels, *shape in step if isinstance(step[0], tuple) else [step]:
                    padding = "valid" if len(shape) > 1 else "same"
                    widths = channels // width_divisor, out_channels // width_divisor
                    self.add_module(name, Convolution(*widths, *shape, padding=padding))
                channels = out_channels

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.cat([output for branch in self.branches for output in self.run(branch, hidden_states)], dim=1)

    def run(self, branch: list, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        for step in branch:
            if step == "reduce":
                hidden_states = F.max_pool2d(hidden_states, kernel_size=3, stride=2)
            elif step == "max":
                hidden_states = F.max_pool2d(hidden_states, kernel_size=3, stride=1, padding=1)
            elif step == "average":
                # Parity: the network was trained in TensorFlow, whose average leaves out what lies beyond the edge.
                hidden_states = F.avg_pool2d(hidden_states, 3, stride=1, padding=1, count_include_pad=False)
            elif isinstance(step[0], tuple):
                return [getattr(self, name)(hidden_states) for name, *_ in step]
            else:
                hidden_states = getattr(self, step[0])(hidden_states)
        return [hidden_states]


def list_blocks() -> dict[str, tuple[int, list]]:
    """List the blocks: input width and branches by name."""
    row, column = (1, 7), (7, 1)
    blocks = {}
    for name, width, pooled in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        blocks[name] = (
            width,
            [
                [("branch1x1", 64, 1)],
                [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
                [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
                ["average", ("branch_pool", pooled, 1)],
            ],
        )
    blocks["Mixed_6a"] = (
        288,
        [
            [("branch3x3", 384, 3, 2)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
            ["reduce"],
        ],
    )
    for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        twice = [(f"branch7x7dbl_{k}", inner, shape) for k, shape in ((2, column), (3, row), (4, column))]
        blocks[name] = (
            768,
            [
                [("branch1x1", 192, 1)],
                [("branch7x7_1", inner, 1), ("branch7x7_2", inner, row), ("branch7x7_3", 192, column)],
                [("branch7x7dbl_1", inner, 1), *twice, ("branch7x7dbl_5", 192, row)],
                ["average", ("branch_pool", 192, 1)],
            ],
        )
    seven = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, row), ("branch7x7x3_3", 192, column)]
    blocks["Mixed_7a"] = (
        768,
        [
            [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
            [*seven, ("branch7x7x3_4", 192, 3, 2)],
            ["reduce"],
        ],
    )
    # Parity: the published network's last block takes the maximum where the others average.
    for name, width, pool in (("Mixed_7b", 1280, "average"), ("Mixed_7c", 2048, "max")):
        ends = {k: ((f"branch3x3{k}a", 384, (1, 3)), (f"branch3x3{k}b", 384, (3, 1))) for k in ("_2", "dbl_3")}
        blocks[name] = (
            width,
            [
                [("branch1x1", 320, 1)],
                [("branch3x3_1", 384, 1), ends["_2"]],
                [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), ends["dbl_3"]],
                [pool, ("branch_pool", 192, 1)],
            ],
        )
    return blocks


class FIDInception(nn.Module):
    """Compute the features whose Fréchet distance is FID, up to the last pooling.

    Args:
        width_divisor (`int`, *optional*, defaults to 1): Divides every width; with 16 the network is tiny.

    Example:

    ```python
    >>> import torch
    >>> from editar_hf.evaluation.inception import FIDInception
    >>> tuple(FIDInception(width_divisor=16).eval()(torch.zeros(2, 3, 299, 299)).shape)
    (2, 128)

    ```
    """

    def __init__(self, width_divisor: int = 1):
        super().__init__()
        self.width_divisor = width_divisor
        stem = {"Conv2d_1a_3x3": (3, 32, 3, 2), "Conv2d_2a_3x3": (32, 32, 3), "Conv2d_2b_3x3": (32, 64, 3)}
        stem |= {"Conv2d_3b_1x1": (64, 80, 1), "Conv2d_4a_3x3": (80, 192, 3)}
        for name, (in_channels, out_channels, *shape) in stem.items():
            in_channels = in_channels if in_channels == 3 else in_channels // width_divisor
            padding = "same" if name == "Conv2d_2b_3x3" else "valid"
            self.add_module(name, Convolution(in_channels, out_channels // width_divisor, *shape, padding=padding))
        self.blocks = list(list_blocks())
        for name, (in_channels, branches) in list_blocks().items():
            self.add_module(name, Block(in_channels, branches, width_divisor))

    @classmethod
    def from_weights(cls, weights: Mapping[str, torch.Tensor]) -> "FIDInception":
        """Build the network from the tensors of `pt_inception-2015-12-05-6726825d.pth`.

        Raises:
            ValueError: If they are torchvision's Inception.
        """
        if (classifier := weights.get("fc.weight")) is not None and len(classifier) != NUM_CLASSES:
            raise ValueError(
                f"The weights are an Inception of {len(classifier)} classes, but FID's has {NUM_CLASSES}; pass "
                "pt_inception-2015-12-05-6726825d.pth."
            )
        first = weights.get("Conv2d_1a_3x3.conv.weight")
        model = cls(1 if first is None else max(1, 32 // len(first)))
        model.load_state_dict({k: tensor.float() for k, tensor in weights.items() if not k.startswith("fc.")})
        return model.eval()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute features (batch, 2048) of images (batch, 3, 299, 299) in [−1, 1)."""
        hidden_states = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        hidden_states = self.Conv2d_3b_1x1(F.max_pool2d(hidden_states, kernel_size=3, stride=2))
        hidden_states = F.max_pool2d(self.Conv2d_4a_3x3(hidden_states), kernel_size=3, stride=2)
        for name in self.blocks:
            hidden_states = getattr(self, name)(hidden_states)
        return hidden_states.mean((2, 3))
