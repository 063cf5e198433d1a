"""The table of metrics (title, scale, how to compute each for a prediction), and the protocols."""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import features, metrics
from .benchmarks import Sample


# A protocol is the way in which the metrics of one table are computed. Results are comparable only within a protocol.
# Published results contain quirks of the code that computed them, and the protocols reproduce these quirks.
EDITAR = {
    "description": "As in the evaluation of EditAR (arXiv 2501.04699).",
    "ssim_border": 0,  # pixels left out of SSIM at each side
    "masked_mean": False,  # whether to average over unedited pixels only, or over all, with edited pixels black
    # Parity: the reference does not divide pixels by 255 before it normalizes them for DINO.
    "structure": {"pixel_scale": 255, "antialias": True},
    "depth_variant": "editar",  # `variant` of `metrics.compute_depth_rmse`
}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "editar": EDITAR,
    "pnp-2023": EDITAR
    | {
        "description": "As in the code of PnPInversion (arXiv 2310.01506), with the library versions of 2023.",
        "ssim_border": 5,
        "structure": {"pixel_scale": 255, "antialias": False},
    },
    "controlnet++": EDITAR
    | {
        "description": "Depth as in the evaluation of ControlNet++ (arXiv 2404.07987): estimates over their maximum.",
        "depth_variant": "controlnet++",
    },
    "controlar": EDITAR
    | {
        "description": "Depth as in the evaluation of ControlAR (arXiv 2410.02705): at full image size, not rounded.",
        "depth_variant": "controlar",
    },
    "corrected": EDITAR
    | {
        "description": "Without the quirks of the published code; not comparable with published results.",
        "masked_mean": True,
        "structure": {"pixel_scale": 1, "antialias": True},
    },
}


def make_pixels(image: Any) -> torch.Tensor:
    """Convert a PIL image to pixels (1, channels, height, width) in [0, 1]."""
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)[None] / 255


class Pair:
    """A prediction and its sample as pixels (1, 3, height, width) in [0, 1].

    For MagicBrush, the sizes of prediction and sample may differ. As in its code, the prediction is then resized for L1
    and L2 (`pixels`), but not for CLIP and DINO (`prediction`).
    """

    def __init__(self, image: Image.Image, sample: Sample, protocol: dict[str, Any]):
        self.image, self.sample, self.protocol = image, sample, protocol
        self.prediction = make_pixels(image)
        resized = image if image.size == sample.size else image.resize(sample.size, Image.Resampling.BICUBIC)
        self.pixels, self.source = make_pixels(resized), make_pixels(sample.source_image)

    @cached_property
    def target(self) -> torch.Tensor:
        return make_pixels(self.sample.target_image)

    @cached_property
    def mask(self) -> torch.Tensor:
        return (make_pixels(self.sample.mask) > 0.5).float()

    @property
    def labels(self) -> torch.Tensor:
        return torch.from_numpy(np.array(self.sample.labels)).long()[None]

    @property
    def unedited(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
        """The arguments of metrics that compare prediction and source image outside the mask."""
        return self.pixels, self.source, self.mask, self.protocol["masked_mean"]

    @cached_property
    def edges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Edges (1, 3, height, width) of the prediction and of the condition map."""
        found, asked = metrics.apply_canny(self.pixels), (self.source[:, :1] > 0.5).float()
        return found.expand(-1, 3, -1, -1), asked.expand(-1, 3, -1, -1)

    @property
    def target_prompts(self) -> list[str]:
        """The caption of the true result, for CLIP, as a list."""
        return [str(self.sample.target_prompt)]


@dataclass(frozen=True)
class Metric:
    """A metric, a column of a table. `compute` is called for each sample, and `reduce` combines the results.

    Args:
        title (`str`): The title of the column, with the scale.
        compute (`Callable`): Maps a pair and a network to a number, a tensor with one number, or the input of `reduce`.
        factor (`float`, *optional*, defaults to 1): Factor by which tables multiply the metric.
        higher_is_better (`bool`, *optional*, defaults to `True`): Whether higher values are better.
        model (`str`, *optional*): The network that the metric needs, a key of `features.DEFAULT_MODELS`.
        needs (tuple of `str`, *optional*): Fields that the sample must have; without them, the metric is undefined.
        digits (`int`, *optional*, defaults to 2): Digits after the decimal point in tables.
        reduce (`Callable`, *optional*): Maps the list of results of `compute` to a number. Defaults to the mean.
    """

    title: str
    compute: Callable[[Pair, Any], Any]
    factor: float = 1
    higher_is_better: bool = True
    model: str | None = None
    needs: tuple[str, ...] = ()
    digits: int = 2
    reduce: Callable[[list], float] = statistics.fmean

    @property
    def heading(self) -> str:
        """The title with an arrow that points to better values."""
        return f"{self.title} {'↑' if self.higher_is_better else '↓'}"

    @property
    def is_mean(self) -> bool:
        """Whether the metric is the mean of metrics of single samples."""
        return self.reduce is statistics.fmean

    def format(self, value: float) -> str:
        """Format a scaled value for tables. An undefined value becomes a dash."""
        if math.isnan(value):
            return "–"
        return "∞" if math.isinf(value) else f"{value:.{self.digits}f}"

    def measure(self, pair: Pair, networks: Mapping[str, features.Network]) -> Any:
        """Compute the metric of a pair; `None` if it is undefined."""
        if any(getattr(pair.sample, name) is None for name in self.needs):
            return None
        value = self.compute(pair, networks.get(self.model or ""))
        if not self.is_mean:
            return value
        return None if math.isnan(value) else float(value)


def compare_structure(pair: Pair, dino: features.Network) -> torch.Tensor:
    switches = pair.protocol["structure"]
    keys = [features.encode_keys(dino, pixels, **switches) for pixels in (pair.pixels, pair.source)]
    return metrics.compute_structure_distance(*keys)


def compare_target(encode: Callable, pair: Pair, network: features.Network) -> torch.Tensor:
    """Compute the cosine similarity of embeddings of the prediction and the target image."""
    return metrics.compute_cosine_similarity(encode(network, pair.prediction), encode(network, pair.target))


def compare_prompt(pair: Pair, clip: features.Network) -> torch.Tensor:
    image_embeds = features.encode_images(clip, pair.prediction)
    return metrics.compute_cosine_similarity(image_embeds, features.encode_prompts(clip, pair.target_prompts))


def score_prompt(pair: Pair, clip: features.Network, mask: torch.Tensor | None = None) -> torch.Tensor:
    return features.compute_clip_score(clip, pair.pixels, pair.target_prompts, mask)


def compare_depth(pair: Pair, network: features.Network) -> torch.Tensor:
    variant = pair.protocol["depth_variant"]
    depth = features.estimate_depth(network, pair.pixels, keep_size=variant == "controlar")
    return metrics.compute_depth_rmse(depth, pair.source[:, :1], variant)


def compute_fid(collected: list) -> float:
    """Compute FID over all samples; NaN if there is only one."""
    if len(collected) < 2:
        return math.nan
    return metrics.compute_frechet_distance(*map(torch.cat, zip(*collected, strict=True)))


def count_classes(pair: Pair, network: features.Network) -> torch.Tensor:
    predicted = features.segment(network, pair.pixels, pair.sample.size[::-1])
    matrix = metrics.compute_confusion_matrix(predicted, pair.labels, network.model.config.num_labels)
    return matrix.to_sparse()  # most entries are 0, because one image shows few classes


MASK, TARGET, PROMPT = ("mask",), ("target_image",), ("target_prompt",)
METRICS = {
    "structure_distance": Metric("structure distance ×10³", compare_structure, 1e3, False, "structure"),
    "psnr_unedited": Metric("PSNR unedited", lambda pair, _: metrics.compute_psnr(*pair.unedited), needs=MASK),
    "lpips_unedited": Metric(
        "LPIPS unedited ×10³",
        lambda pair, network: features.compute_lpips(network, *pair.unedited),
        *(1e3, False, "lpips", MASK),
    ),
    "mse_unedited": Metric(
        "MSE unedited ×10⁴", lambda pair, _: metrics.compute_mse(*pair.unedited), 1e4, False, needs=MASK
    ),
    "ssim_unedited": Metric(
        "SSIM unedited ×10²",
        lambda pair, _: metrics.compute_ssim(*pair.unedited, border=pair.protocol["ssim_border"]),
        1e2,
        needs=MASK,
    ),
    "clip_whole": Metric("CLIP whole", score_prompt, model="clip", needs=PROMPT),
    "clip_edited": Metric(
        "CLIP edited", lambda pair, clip: score_prompt(pair, clip, pair.mask), model="clip", needs=PROMPT + MASK
    ),
    "depth_rmse": Metric("depth RMSE", compare_depth, 1, False, "depth"),
    "edge_f1": Metric("edge F1 ×10²", lambda pair, _: metrics.compute_edge_f1(*pair.edges), 1e2),
    "edge_ms_ssim": Metric("edge MS-SSIM ×10²", lambda pair, _: metrics.compute_ms_ssim(*pair.edges), 1e2),
    "edge_psnr": Metric("edge PSNR", lambda pair, _: metrics.compute_psnr(*pair.edges)),
    "l1": Metric("L1", lambda pair, _: metrics.compute_l1(pair.pixels, pair.target), 1, False, needs=TARGET, digits=4),
    "l2": Metric("L2", lambda pair, _: metrics.compute_mse(pair.pixels, pair.target), 1, False, needs=TARGET, digits=4),
    "psnr": Metric("PSNR", lambda pair, _: metrics.compute_psnr(pair.pixels, pair.target), needs=TARGET),
    "ssim": Metric(
        "SSIM ×10²",
        lambda pair, _: metrics.compute_ssim(pair.pixels, pair.target, border=pair.protocol["ssim_border"]),
        1e2,
        needs=TARGET,
    ),
    "lpips": Metric(
        "LPIPS ×10³",
        lambda pair, network: features.compute_lpips(network, pair.pixels, pair.target),
        *(1e3, False, "lpips", TARGET),
    ),
    "clip_i": Metric("CLIP-I", partial(compare_target, features.encode_images), 1, True, "clip", TARGET, 4),
    "clip_t": Metric("CLIP-T", compare_prompt, 1, True, "clip", PROMPT, 4),
    "dino": Metric("DINO", partial(compare_target, features.encode_class_tokens), 1, True, "dino", TARGET, 4),
    "fid": Metric(
        "FID",
        lambda pair, net: (features.encode_inception(net, pair.pixels), features.encode_inception(net, pair.target)),
        *(1, False, "inception", TARGET),
        reduce=compute_fid,
    ),
    "mean_iou": Metric(
        "mIoU %",
        count_classes,
        *(1e2, True, "segmentation", ("labels",)),
        reduce=lambda matrices: metrics.compute_mean_iou(sum(matrix.to_dense() for matrix in matrices)),
    ),
}
