"""The columns of the tables: what each metric is called, how it is scaled, and how a prediction gets one; protocols."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from . import features, metrics
from .lpips import LPIPS_SMALLEST_SIDE


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

    def __init__(self, prediction: Image.Image, sample, protocol: dict):
        self.sample, self.protocol, self.target_prompt = sample, protocol, sample.target_prompt
        self.image, self.prediction = prediction, make_pixels(prediction)
        resized = prediction
        if prediction.size != sample.size:
            resized = prediction.resize(sample.size, Image.Resampling.BICUBIC)
        self.pixels = make_pixels(resized)

    @cached_property
    def source(self) -> torch.Tensor:
        return make_pixels(self.sample.source_image)

    @cached_property
    def target(self) -> torch.Tensor | None:
        return make_pixels(self.sample.target_image)

    @cached_property
    def mask(self) -> torch.Tensor | None:
        mask = make_pixels(self.sample.mask)
        return None if mask is None else (mask > 0.5).float()

    @cached_property
    def labels(self) -> torch.Tensor | None:
        labels = self.sample.labels
        return None if labels is None else torch.from_numpy(np.array(labels)).long()[None]

    @cached_property
    def edges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Edges (1, 1, height, width) of the prediction, and those asked for."""
        return metrics.apply_canny(self.pixels), (self.source[:, :1] > 0.5).float()


@dataclass(frozen=True)
class Metric:
    """A column of a table.

    Args:
        title (`str`): Its heading.
        compute (`Callable`): Maps a pair and the networks by name to a number, or a tensor of one. For a metric of all
            predictions together, it returns a tuple of what `reduce` needs of one prediction.
        factor (`float`, *optional*, defaults to 1): Tables multiply the value by it.
        higher_is_better (`bool`, *optional*, defaults to `True`): Direction.
        model (`str`, *optional*): The network it needs, a key of `features.DEFAULT_MODELS`.
        needs (tuple of `str`, *optional*): What the sample must have; without it, the metric is undefined.
        digits (`int`, *optional*, defaults to 2): Digits after the point in tables.
        is_share (`bool`, *optional*, defaults to `False`): Tables give it in per cent.
        reduce (`Callable`, *optional*): For a metric of all predictions: maps the list of tuples to a number.
        smallest_side (`int`, *optional*, defaults to 1): The smallest image that it is defined for, in pixels.
    """

    title: str
    compute: Callable[[Pair, dict], object]
    factor: float = 1
    higher_is_better: bool = True
    model: str | None = None
    needs: tuple[str, ...] = ()
    digits: int = 2
    is_share: bool = False
    reduce: Callable[[list], float] | None = None
    smallest_side: int = 1

    @property
    def heading(self) -> str:
        """The title with factor and direction."""
        exponent = str(round(math.log10(self.factor))).translate(str.maketrans("01234", "⁰¹²³⁴"))
        scale = " %" if self.is_share else "" if self.factor == 1 else f" ×10{exponent}"
        return f"{self.title}{scale} {'↑' if self.higher_is_better else '↓'}"

    def format(self, value: float) -> str:
        """Format a scaled value as tables do: a dash if it is undefined."""
        if math.isnan(value):
            return "–"
        return "∞" if math.isinf(value) else f"{value:.{self.digits}f}"

    def measure(self, pair: Pair, networks: dict):
        """Compute the metric of a pair, NaN if it is undefined; for one of all predictions, its tuple or `None`."""
        if any(getattr(pair, name) is None for name in self.needs):
            return None if self.reduce else math.nan
        value = self.compute(pair, networks)
        return value if self.reduce else float(value)


def compare_unedited(function: Callable) -> Callable:
    """Compare prediction and source outside the mask."""
    return lambda pair, networks: function(pair.pixels, pair.source, pair.mask, pair.protocol["masked_mean"])


def compare_ssim(pair: Pair, reference: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    masked_mean, border = pair.protocol["masked_mean"], pair.protocol["ssim_border"]
    return metrics.compute_ssim(pair.pixels, reference, mask, masked_mean if mask is not None else False, border)


def compare_structure(pair: Pair, networks: dict) -> torch.Tensor:
    keys = (
        features.encode_keys(networks["structure"], pixels, **pair.protocol["structure"])
        for pixels in (pair.pixels, pair.source)
    )
    return metrics.compute_structure_distance(*keys)


def compare_embeddings(encode: Callable, name: str) -> Callable:
    """Compare prediction and true result by an embedding."""
    return lambda pair, networks: metrics.compute_cosine_similarity(
        *(encode(networks[name], pixels) for pixels in (pair.prediction, pair.target))
    )


def compare_prompt(pair: Pair, networks: dict) -> torch.Tensor:
    embeds = features.encode_images(networks["clip"], pair.prediction)
    return metrics.compute_cosine_similarity(embeds, features.encode_prompts(networks["clip"], [pair.target_prompt]))


def compare_depth(pair: Pair, networks: dict) -> torch.Tensor:
    variant = pair.protocol["depth_variant"]
    depth = features.estimate_depth(networks["depth"], pair.pixels, keep_size=variant == "controlar")
    return metrics.compute_depth_rmse(depth, pair.source[:, :1], variant, tuple(pair.pixels.shape[2:]))


def collect_inception(pair: Pair, networks: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(features.encode_inception(networks["inception"], pixels) for pixels in (pair.pixels, pair.target))


def reduce_inception(collected: list) -> float:
    return metrics.compute_frechet_distance(*map(torch.cat, zip(*collected, strict=True)))


def count_classes(pair: Pair, networks: dict) -> tuple[torch.Tensor]:
    network = networks["segmentation"]
    predicted = features.segment(network, pair.pixels, pair.labels.shape[1:])
    matrix = metrics.compute_confusion_matrix(predicted, pair.labels, network.model.config.num_labels)
    return (matrix.to_sparse(),)  # few pairs of classes occur in one image


def reduce_classes(collected: list) -> float:
    return metrics.compute_mean_iou(sum(matrix.to_dense() for (matrix,) in collected))


EDIT, TRUTH, CAPTION = ("mask",), ("target",), ("target_prompt",)
LOWER = {"higher_is_better": False}
METRICS = {
    "structure_distance": Metric("structure distance", compare_structure, 1e3, False, "structure"),
    "psnr_unedited": Metric("PSNR unedited", compare_unedited(metrics.compute_psnr), needs=EDIT),
    "lpips_unedited": Metric(
        "LPIPS unedited",
        lambda pair, networks: features.compute_lpips(
            networks["lpips"], pair.pixels, pair.source, pair.mask, pair.protocol["masked_mean"]
        ),
        *(1e3, False, "lpips", EDIT),
        smallest_side=LPIPS_SMALLEST_SIDE,
    ),
    "mse_unedited": Metric("MSE unedited", compare_unedited(metrics.compute_mse), 1e4, False, needs=EDIT),
    "ssim_unedited": Metric(
        "SSIM unedited",
        lambda pair, networks: compare_ssim(pair, pair.source, pair.mask),
        *(1e2, True, None, EDIT),
        smallest_side=metrics.SSIM_WINDOW,
    ),
    "clip_whole": Metric(
        "CLIP whole",
        lambda pair, networks: features.compute_clip_score(networks["clip"], pair.pixels, [pair.target_prompt]),
        *(1, True, "clip", CAPTION),
    ),
    "clip_edited": Metric(
        "CLIP edited",
        lambda pair, networks: features.compute_clip_score(
            networks["clip"], pair.pixels, [pair.target_prompt], pair.mask
        ),
        *(1, True, "clip", CAPTION + EDIT),
    ),
    "depth_rmse": Metric("depth RMSE", compare_depth, 1, False, "depth"),
    "edge_f1": Metric("edge F1", lambda pair, networks: metrics.compute_edge_f1(*pair.edges), 1e2),
    "edge_ms_ssim": Metric(
        "edge MS-SSIM",
        lambda pair, networks: metrics.compute_ms_ssim(*(edges.expand(-1, 3, -1, -1) for edges in pair.edges)),
        1e2,
        smallest_side=metrics.MS_SSIM_SMALLEST_SIDE,
    ),
    "edge_psnr": Metric(
        "edge PSNR",
        lambda pair, networks: metrics.compute_psnr(*(edges.expand(-1, 3, -1, -1) for edges in pair.edges)),
    ),
    "l1": Metric(
        "L1", lambda pair, networks: metrics.compute_l1(pair.pixels, pair.target), needs=TRUTH, digits=4, **LOWER
    ),
    "l2": Metric(
        "L2", lambda pair, networks: metrics.compute_mse(pair.pixels, pair.target), needs=TRUTH, digits=4, **LOWER
    ),
    "psnr": Metric("PSNR", lambda pair, networks: metrics.compute_psnr(pair.pixels, pair.target), needs=TRUTH),
    "ssim": Metric(
        "SSIM",
        lambda pair, networks: compare_ssim(pair, pair.target),
        *(1e2, True, None, TRUTH),
        smallest_side=metrics.SSIM_WINDOW,
    ),
    "lpips": Metric(
        "LPIPS",
        lambda pair, networks: features.compute_lpips(networks["lpips"], pair.pixels, pair.target),
        *(1e3, False, "lpips", TRUTH),
        smallest_side=LPIPS_SMALLEST_SIDE,
    ),
    "clip_i": Metric("CLIP-I", compare_embeddings(features.encode_images, "clip"), 1, True, "clip", TRUTH, 4),
    "clip_t": Metric("CLIP-T", compare_prompt, 1, True, "clip", CAPTION, 4),
    "dino": Metric("DINO", compare_embeddings(features.encode_class_tokens, "dino"), 1, True, "dino", TRUTH, 4),
    "fid": Metric("FID", collect_inception, 1, False, "inception", TRUTH, reduce=reduce_inception),
    "mean_iou": Metric("mIoU", count_classes, 1e2, True, "segmentation", ("labels",), 2, True, reduce_classes),
}


def check_scoring(names: Iterable[str], sizes: Iterable[str], protocol: str) -> None:
    """Check that protocol and metrics exist, and that images of the sizes "width×height" can have the metrics.

    Raises:
        ValueError: If a name is unknown, or a size is too small for a metric or one that its network cannot keep.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"`protocol` is {protocol!r}; choose one of {', '.join(PROTOCOLS)}.")
    for name in names:
        if name not in METRICS:
            raise ValueError(f"`metrics` holds {name!r}; there are {', '.join(METRICS)}.")
        least, factor = METRICS[name].smallest_side, 1
        if name in ("ssim", "ssim_unedited"):
            least += 2 * PROTOCOLS[protocol]["ssim_border"]
        if name == "depth_rmse" and PROTOCOLS[protocol]["depth_variant"] == "controlar":
            least = factor = 32
        for size in sizes:
            if any(side < least or side % factor for side in map(int, size.split("×"))):
                needed = f"of at least {least} pixels" if factor == 1 else f"that are multiples of {factor} pixels"
                raise ValueError(
                    f"`metrics` holds {name!r}, which needs sides {needed} in the protocol {protocol}, but there are "
                    f"samples of {size}; choose other `metrics` or other images."
                )
