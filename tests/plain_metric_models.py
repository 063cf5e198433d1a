"""LPIPS and FID's Inception once more, as functions of published weights: what the package's own are compared with.

Written from the papers and the layout of the published files, not from the package. Weights are kept in a dictionary
under their published names. A name that is not there yet is drawn, so one pass makes a whole file.
"""

import torch
import torch.nn.functional as F


class Weights(dict):
    """Published names and tensors, drawn where they are asked for first; `divisor` makes the networks narrow."""

    def __init__(self, divisor=1, seed=0):
        super().__init__()
        self.divisor = divisor
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, name, shape, scale=1.0, offset=0.0):
        if name not in self:
            self[name] = offset + scale * torch.randn(shape, generator=self.generator)
        assert self[name].shape == shape
        return self[name]


# LPIPS


def convolve(weights, x, name, channels, kernel=1, **kwargs):
    channels //= weights.divisor
    shape = (channels, x.shape[1], kernel, kernel)
    weight = weights.draw(f"{name}.weight", shape, (2 / (x.shape[1] * kernel**2)) ** 0.5)
    return F.relu(F.conv2d(x, weight, weights.draw(f"{name}.bias", (channels,), 0.1), **kwargs))


def fire(weights, x, index, squeezed, expanded):
    x = convolve(weights, x, f"features.{index}.squeeze", squeezed)
    narrow = convolve(weights, x, f"features.{index}.expand1x1", expanded)
    wide = convolve(weights, x, f"features.{index}.expand3x3", expanded, 3, padding=1)
    return torch.cat([narrow, wide], 1)


def pool(x):
    return F.max_pool2d(x, 3, 2, ceil_mode=True)


def compute_squeezenet_features(weights, x):
    """SqueezeNet 1.1: the seven maps that LPIPS looks at."""
    first = convolve(weights, x, "features.0", 64, 3, stride=2)
    second = fire(weights, fire(weights, pool(first), 3, 16, 64), 4, 16, 64)
    third = fire(weights, fire(weights, pool(second), 6, 32, 128), 7, 32, 128)
    fourth = fire(weights, pool(third), 9, 48, 192)
    fifth = fire(weights, fourth, 10, 48, 192)
    sixth = fire(weights, fifth, 11, 64, 256)
    return [first, second, third, fourth, fifth, sixth, fire(weights, sixth, 12, 64, 256)]


def compute_lpips(weights, first, second):
    """LPIPS 0.1 of two images in [−1, 1]: (batch,)."""
    # The mean and deviation of ImageNet in [0, 1], moved to [−1, 1], as the authors rounded them.
    mean = torch.tensor([-0.030, -0.088, -0.188]).reshape(3, 1, 1)
    deviation = torch.tensor([0.458, 0.448, 0.450]).reshape(3, 1, 1)
    maps = [compute_squeezenet_features(weights, (x - mean) / deviation) for x in (first, second)]
    total = torch.zeros(len(first))
    for index, (a, b) in enumerate(zip(*maps, strict=True)):
        a, b = (x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
        # No published head is negative.
        head = weights.draw(f"lin{index}.model.1.weight", (1, a.shape[1], 1, 1), 0.1, 0.5)
        total += torch.einsum("c,nchw->nhw", head.flatten(), (a - b) ** 2).mean((1, 2))
    return total


# Inception


NORM = {"weight": (0.2, 1.0), "bias": (0.2,), "running_mean": (0.2,), "running_var": (0.15, 1.0)}


def unit(weights, x, name, channels, height, width, stride=1, padding=(0, 0)):
    """A convolution, batch normalization with ε = 0.001, and a rectifier."""
    channels //= weights.divisor
    scale = (2 / (x.shape[1] * height * width)) ** 0.5
    weight = weights.draw(f"{name}.conv.weight", (channels, x.shape[1], height, width), scale)
    x = F.conv2d(x, weight, stride=stride, padding=padding)
    drawn = (weights.draw(f"{name}.bn.{part}", (channels,), *scale) for part, scale in NORM.items())
    gain, bias, mean, variance = (value.reshape(-1, 1, 1) for value in drawn)
    return F.relu((x - mean) / (variance + 0.001).sqrt() * gain + bias)


def chain(weights, x, block, *steps):
    """Units one after the other: (name, channels, height, width), padded to keep the size, or with a stride of 2."""
    for name, channels, height, width, *stride in steps:
        kwargs = {"stride": 2} if stride else {"padding": (height // 2, width // 2)}
        x = unit(weights, x, f"{block}.{name}", channels, height, width, **kwargs)
    return x


def average(x):
    """The mean over 3×3, of those places that exist."""
    ones = torch.ones_like(x[:, :1])
    return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)


def compute_inception_features(weights, x):
    """The Inception of FID up to its last mean: (batch, 2048) of images (batch, 3, 299, 299)."""
    x = unit(weights, x, "Conv2d_1a_3x3", 32, 3, 3, stride=2)
    x = unit(weights, unit(weights, x, "Conv2d_2a_3x3", 32, 3, 3), "Conv2d_2b_3x3", 64, 3, 3, padding=(1, 1))
    x = unit(weights, F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1", 80, 1, 1)
    x = F.max_pool2d(unit(weights, x, "Conv2d_4a_3x3", 192, 3, 3), 3, 2)
    double = [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3)]
    for block, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        branches = [
            chain(weights, x, block, ("branch1x1", 64, 1, 1)),
            chain(weights, x, block, ("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 5)),
            chain(weights, x, block, *double, ("branch3x3dbl_3", 96, 3, 3)),
            chain(weights, average(x), block, ("branch_pool", pooled, 1, 1)),
        ]
        x = torch.cat(branches, 1)
    single = chain(weights, x, "Mixed_6a", ("branch3x3", 384, 3, 3, 2))
    double = chain(weights, x, "Mixed_6a", *double, ("branch3x3dbl_3", 96, 3, 3, 2))
    x = torch.cat([single, double, F.max_pool2d(x, 3, 2)], 1)
    for block, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        once = [("branch7x7_1", inner, 1, 1), ("branch7x7_2", inner, 1, 7), ("branch7x7_3", 192, 7, 1)]
        twice = [("branch7x7dbl_1", inner, 1, 1), ("branch7x7dbl_2", inner, 7, 1), ("branch7x7dbl_3", inner, 1, 7)]
        twice += [("branch7x7dbl_4", inner, 7, 1), ("branch7x7dbl_5", 192, 1, 7)]
        branches = [chain(weights, x, block, *steps) for steps in ([("branch1x1", 192, 1, 1)], once, twice)]
        x = torch.cat([*branches, chain(weights, average(x), block, ("branch_pool", 192, 1, 1))], 1)
    seven = [("branch7x7x3_1", 192, 1, 1), ("branch7x7x3_2", 192, 1, 7)]
    seven += [("branch7x7x3_3", 192, 7, 1), ("branch7x7x3_4", 192, 3, 3, 2)]
    single = chain(weights, x, "Mixed_7a", ("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 3, 2))
    x = torch.cat([single, chain(weights, x, "Mixed_7a", *seven), F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_7b", "Mixed_7c"):
        once = chain(weights, x, block, ("branch3x3_1", 384, 1, 1))
        twice = chain(weights, x, block, ("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 3))
        pooled = average(x) if block == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        branches = [
            chain(weights, x, block, ("branch1x1", 320, 1, 1)),
            chain(weights, once, block, ("branch3x3_2a", 384, 1, 3)),
            chain(weights, once, block, ("branch3x3_2b", 384, 3, 1)),
            chain(weights, twice, block, ("branch3x3dbl_3a", 384, 1, 3)),
            chain(weights, twice, block, ("branch3x3dbl_3b", 384, 3, 1)),
            chain(weights, pooled, block, ("branch_pool", 192, 1, 1)),
        ]
        x = torch.cat(branches, 1)
    return x.flatten(2).mean(2)
