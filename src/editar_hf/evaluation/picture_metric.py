"""What the metrics for `evaluate` share: pictures are read from paths, one at a time, and values averaged."""

from collections.abc import Callable, Iterable

import datasets
import evaluate
import numpy as np
import torch
from PIL import Image

from ..processing_editar import prepare_rgb_picture


class PictureMetric(evaluate.Metric):
    """Describe a metric of pictures given as paths; the docstring of a subclass is what users read."""

    def _info(self) -> evaluate.MetricInfo:
        features = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=self._compute.__doc__,
            features=datasets.Features(features),
        )


def read_picture(path: str) -> torch.Tensor:
    """Read a picture as (1, 3, height, width) in [0, 1]."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(prepare_rgb_picture(picture))).permute(2, 0, 1)[None] / 255


def read_mask(path: str) -> torch.Tensor:
    """Read a mask, white where edited, as (1, 1, height, width) of 0 and 1."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("L")) >= 128).float()[None, None]


def read_labels(path: str) -> torch.Tensor:
    """Read a picture whose grey levels are classes as (1, height, width)."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture)).long()[None]


def average(name: str, score: Callable[..., torch.Tensor], *columns: Iterable) -> dict[str, float | int]:
    """Average a score over samples, leaving out those where it is NaN, and say how many were left."""
    values = torch.cat([score(*row) for row in zip(*columns, strict=True)])
    return {name: values.nanmean().item(), "num_samples": int((~values.isnan()).sum())}
