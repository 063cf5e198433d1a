"""The columns of the tables: what each metric is called, how it is scaled, and how a prediction gets one; protocols."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import features, metrics
from .benchmarks import Sample


# How the figures of one table were computed. Figures compare only within a protocol. The published ones contain quirks
# of the code that made them, which are kept here under names.
PROTOCOLS = {
    "editar": {
        "description": "As in the evaluation of EditAR (arXiv 2501.04699).",
        "ssim_border": 0,  # pixels left out of SSIM at each side
        "masked_mean": False,  # average over the unedited pixels, not over all with the edited ones black
        # Parity: the reference never divides pixels by 255 before it normalises them for DINO.
        "structure": {"pixel_scale": 255, "antialias": True},
        "depth_variant": "editar",  # of `metrics.compute_depth_rmse`
    },
}
PROTOCOLS |= {
    "pnp-2023": PROTOCOLS["editar"]
    | {
        "description": "As in PnPInversion's code (arXiv 2310.01506), with the libraries of 2023.",
        "ssim_border": 5,
        "structure": {"pixel_scale": 255, "antialias": False},
    },
    "controlnet++": PROTOCOLS["editar"]
    | {
        "description": "Depth as in the evaluation of ControlNet++ (arXiv 2404.07987), whose estimates are divided by "
        "their maximum.",
        "depth_variant": "controlnet++",
    },
    "controlar": PROTOCOLS["editar"]
    | {
        "description": "Depth as in the evaluation of ControlAR (arXiv 2410.02705), estimated at the size of the image "
        "and never rounded.",
        "depth_variant": "controlar",
    },
    "corrected": PROTOCOLS["editar"]
    | {
        "description": "Without the quirks of the published code; not comparable with published figures.",
        "masked_mean": True,
        "structure": {"pixel_scale": 1, "antialias": True},
    },
}


def make_pixels(image: Image.Image | None) -> torch.Tensor | None:
    """Turn an image into pixels (1, channels, height, width) in [0, 1]."""
    if image is None:
        return None
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)[None] / 255


class Pair:
    """A prediction and its sample as pixels (1, 3, height, width) in [0, 1]; what the sample does not have is `None`.

    A prediction of another size than the sample, which only MagicBrush allows, is resized for L1 and L2, as that
    benchmark's code does. CLIP and DINO see it as it was made (`prediction`).
    """

    def __init__(self, prediction: Image.Image, sample: Sample, protocol: dict):
        self.sample, self.protocol, self.target_prompt = sample, protocol, sample.target_prompt
        self.image, self.prediction = prediction, make_pixels(prediction)
        resized = prediction
        if prediction.size != sample.size:
            resized = prediction.resize(sample.size, Image.Resampling.BICUBIC)
        self.pixels = make_pixels(resized)
        self.source, self.target = make_pixels(sample.source_image), make_pixels(sample.target_image)
        self.mask = None if sample.mask is None else (make_pixels(sample.mask) > 0.5).float()
        self.labels = None if sample.labels is None else torch.from_numpy(np.array(sample.labels)).long()[None]

    @cached_property
    def edges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Edges (1, 3, height, width) of the prediction, and those asked for."""
        found, asked = metrics.apply_canny(self.pixels), (self.source[:, :1] > 0.5).float()
        return found.expand(-1, 3, -1, -1), asked.expand(-1, 3, -1, -1)


def compute_mean(values: list[float]) -> float:
    """Average the values of single samples; infinite if one is."""
    return statistics.fmean(values)


@dataclass(frozen=True)
class Metric:
    """A column of a table: a function of single samples, and one that reduces what it returns.

    Args:
        title (`str`): Its heading, with the scale.
        compute (`Callable`): Maps a pair and the networks by name to a number, a tensor of one, or what `reduce` needs.
        factor (`float`, *optional*, defaults to 1): Tables multiply the value by it.
        higher_is_better (`bool`, *optional*, defaults to `True`): Direction.
        model (`str`, *optional*): The network it needs, a key of `features.DEFAULT_MODELS`.
        needs (tuple of `str`, *optional*): What the pair must have; without it, the metric is undefined.
        digits (`int`, *optional*, defaults to 2): Digits after the point in tables.
        reduce (`Callable`, *optional*): Maps the list of what `compute` returned to a number. Defaults to the mean.
    """

    title: str
    compute: Callable[[Pair, dict], Any]
    factor: float = 1
    higher_is_better: bool = True
    model: str | None = None
    needs: tuple[str, ...] = ()
    digits: int = 2
    reduce: Callable[[list], float] = compute_mean

    @property
    def heading(self) -> str:
        """The title with the direction."""
        return f"{self.title} {'↑' if self.higher_is_better else '↓'}"

    @property
    def is_mean(self) -> bool:
        """Whether single samples have values."""
        return self.reduce is compute_mean

    def format(self, value: float) -> str:
        """Format a scaled value as tables do: a dash if it is undefined."""
        if math.isnan(value):
            return "–"
        return "∞" if math.isinf(value) else f"{value:.{self.digits}f}"

    def measure(self, pair: Pair, networks: dict) -> Any:
        """Compute the metric of a pair; `None` if it is undefined."""
        if any(getattr(pair, name) is None for name in self.needs):
            return None
        value = self.compute(pair, networks)
        if not self.is_mean:
            return value
        return None if math.isnan(value) else float(value)


def compare_unedited(function: Callable) -> Callable:
    """Compare prediction and source outside the mask."""
    return lambda pair, networks: function(pair.pixels, pair.source, pair.mask, pair.protocol["masked_mean"])


def compare_target(function: Callable) -> Callable:
    """Compare prediction and true result."""
    return lambda pair, networks: function(pair.pixels, pair.target)


def compare_embeddings(encode: Callable, name: str) -> Callable:
    """Compare prediction and true result by an embedding."""
    return lambda pair, networks: metrics.compute_cosine_similarity(
        *(encode(networks[name], pixels) for pixels in (pair.prediction, pair.target))
    )


def compare_ssim(pair: Pair, networks: dict) -> torch.Tensor:
    return metrics.compute_ssim(pair.pixels, pair.target, border=pair.protocol["ssim_border"])


def compare_unedited_ssim(pair: Pair, networks: dict) -> torch.Tensor:
    masked_mean, border = pair.protocol["masked_mean"], pair.protocol["ssim_border"]
    return metrics.compute_ssim(pair.pixels, pair.source, pair.mask, masked_mean, border)


def compare_lpips(pair: Pair, networks: dict) -> torch.Tensor:
    return features.compute_lpips(networks["lpips"], pair.pixels, pair.target)


def compare_unedited_lpips(pair: Pair, networks: dict) -> torch.Tensor:
    masked_mean = pair.protocol["masked_mean"]
    return features.compute_lpips(networks["lpips"], pair.pixels, pair.source, pair.mask, masked_mean)


def compare_structure(pair: Pair, networks: dict) -> torch.Tensor:
    network, switches = networks["structure"], pair.protocol["structure"]
    keys = (features.encode_keys(network, pixels, **switches) for pixels in (pair.pixels, pair.source))
    return metrics.compute_structure_distance(*keys)


def score_prompt(pair: Pair, networks: dict, mask: torch.Tensor | None = None) -> torch.Tensor:
    return features.compute_clip_score(networks["clip"], pair.pixels, [pair.target_prompt], mask)


def compare_prompt(pair: Pair, networks: dict) -> torch.Tensor:
    embeds = features.encode_images(networks["clip"], pair.prediction)
    return metrics.compute_cosine_similarity(embeds, features.encode_prompts(networks["clip"], [pair.target_prompt]))


def compare_depth(pair: Pair, networks: dict) -> torch.Tensor:
    variant = pair.protocol["depth_variant"]
    depth = features.estimate_depth(networks["depth"], pair.pixels, keep_size=variant == "controlar")
    return metrics.compute_depth_rmse(depth, pair.source[:, :1], variant)


def compare_edges(function: Callable) -> Callable:
    return lambda pair, networks: function(*pair.edges)


def encode_both(pair: Pair, networks: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(features.encode_inception(networks["inception"], pixels) for pixels in (pair.pixels, pair.target))


def compute_fid(collected: list) -> float:
    """Compute FID of all samples; undefined for a single one."""
    if len(collected) < 2:
        return math.nan
    return metrics.compute_frechet_distance(*map(torch.cat, zip(*collected, strict=True)))


def count_classes(pair: Pair, networks: dict) -> torch.Tensor:
    network = networks["segmentation"]
    predicted = features.segment(network, pair.pixels, pair.labels.shape[1:])
    matrix = metrics.compute_confusion_matrix(predicted, pair.labels, network.model.config.num_labels)
    return matrix.to_sparse()  # few pairs of classes occur in one image


def compute_mean_iou(collected: list) -> float:
    return metrics.compute_mean_iou(sum(matrix.to_dense() for matrix in collected))


MASK, TARGET, PROMPT = ("mask",), ("target",), ("target_prompt",)
METRICS = {
    "structure_distance": Metric("structure distance ×10³", compare_structure, 1e3, False, "structure"),
    "psnr_unedited": Metric("PSNR unedited", compare_unedited(metrics.compute_psnr), needs=MASK),
    "lpips_unedited": Metric("LPIPS unedited ×10³", compare_unedited_lpips, 1e3, False, "lpips", MASK),
    "mse_unedited": Metric("MSE unedited ×10⁴", compare_unedited(metrics.compute_mse), 1e4, False, needs=MASK),
    "ssim_unedited": Metric("SSIM unedited ×10²", compare_unedited_ssim, 1e2, needs=MASK),
    "clip_whole": Metric("CLIP whole", score_prompt, model="clip", needs=PROMPT),
    "clip_edited": Metric(
        "CLIP edited",
        lambda pair, networks: score_prompt(pair, networks, pair.mask),
        model="clip",
        needs=PROMPT + MASK,
    ),
    "depth_rmse": Metric("depth RMSE", compare_depth, 1, False, "depth"),
    "edge_f1": Metric("edge F1 ×10²", compare_edges(metrics.compute_edge_f1), 1e2),
    "edge_ms_ssim": Metric("edge MS-SSIM ×10²", compare_edges(metrics.compute_ms_ssim), 1e2),
    "edge_psnr": Metric("edge PSNR", compare_edges(metrics.compute_psnr)),
    "l1": Metric("L1", compare_target(metrics.compute_l1), 1, False, needs=TARGET, digits=4),
    "l2": Metric("L2", compare_target(metrics.compute_mse), 1, False, needs=TARGET, digits=4),
    "psnr": Metric("PSNR", compare_target(metrics.compute_psnr), needs=TARGET),
    "ssim": Metric("SSIM ×10²", compare_ssim, 1e2, needs=TARGET),
    "lpips": Metric("LPIPS ×10³", compare_lpips, 1e3, False, "lpips", TARGET),
    "clip_i": Metric("CLIP-I", compare_embeddings(features.encode_images, "clip"), 1, True, "clip", TARGET, 4),
    "clip_t": Metric("CLIP-T", compare_prompt, 1, True, "clip", PROMPT, 4),
    "dino": Metric("DINO", compare_embeddings(features.encode_class_tokens, "dino"), 1, True, "dino", TARGET, 4),
    "fid": Metric("FID", encode_both, 1, False, "inception", TARGET, reduce=compute_fid),
    "mean_iou": Metric("mIoU %", count_classes, 1e2, True, "segmentation", ("labels",), reduce=compute_mean_iou),
}
