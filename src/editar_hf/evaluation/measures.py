"""The metrics of the tables: what each is called, how it is scaled, what it needs, and how a prediction gets one.

A metric of single predictions is a function of a `Pair` and of the models it needs. One of all predictions together
(FID, mIoU) takes an array of each instead, and reduces them in the order of the benchmark.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from . import image_metrics, map_metrics
from .distribution_metrics import compute_frechet_distance
from .metric_models import LPIPS_SMALLEST_SIDE
from .protocols import Protocol
from .samples import Sample


def make_pixels(picture: Image.Image | None) -> torch.Tensor | None:
    """Make pixels (1, channels, height, width) in [0, 1] of a picture."""
    if picture is None:
        return None
    array = np.array(picture)
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(array).permute(2, 0, 1)[None] / 255


class Pair:
    """A prediction and its sample, as pixels (1, 3, height, width) in [0, 1]; what the sample does not have is `None`.

    `image` has the size of the sample. A prediction of another size, which scoring lets through for MagicBrush alone,
    is resized to it, as that benchmark's code does for L1 and L2; its CLIP and DINO see `image_as_made`.

    Args:
        prediction (`PIL.Image.Image`): The prediction, RGB.
        sample (`Sample`): The sample.
        protocol (`Protocol`): How it is scored.
    """

    def __init__(self, prediction: Image.Image, sample: Sample, protocol: Protocol):
        self.prediction, self.sample, self.protocol = prediction, sample, protocol
        self.target_prompt = sample.target_prompt

    @cached_property
    def image_as_made(self) -> torch.Tensor:
        return make_pixels(self.prediction)

    @cached_property
    def image(self) -> torch.Tensor:
        if self.prediction.size == self.sample.size:
            return self.image_as_made
        return make_pixels(self.prediction.resize(self.sample.size, Image.Resampling.BICUBIC))

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
        """Edges (1, 1, height, width) of the prediction and those asked for."""
        return map_metrics.apply_canny(self.image), (self.source[:, :1] > 0.5).float()

    @cached_property
    def stickers(self) -> dict:
        """What the sticker scoring finds."""
        from .stickers import score_sample

        pictures = (self.prediction, self.sample.source_image, self.sample.target_image, self.sample.mask)
        picture, source, target, mask = map(np.asarray, pictures)
        details = self.sample.details
        ceiling, token_size = details["outside_psnr_ceiling"], details["token_size"]
        return score_sample(picture, ceiling, source, target, mask, details, token_size)


@dataclass(frozen=True)
class Metric:
    """A column of a table.

    Args:
        title (`str`): Its heading.
        compute (`Callable`): Maps a pair and a dict of models to a tensor (1,) or a number; for a metric of all
            predictions, to a dict of arrays.
        factor (`float`): What tables multiply it by.
        higher_is_better (`bool`): Which way is better.
        models (tuple of `str`): The models it needs, keys of `models.SCORING_MODELS`.
        needs (tuple of `str`): What the sample must have; without, the metric is undefined.
        digits (`int`): How many digits after the point tables have.
        is_share (`bool`): Whether it is a share, which tables give in per cent.
        reduce (`Callable`, *optional*): For a metric of all predictions: maps the lists of their arrays to a number.
        sides (`Callable`): Maps a protocol to the fewest pixels that a side of a picture may have, and to what it must
            be a multiple of.
    """

    title: str
    compute: Callable[[Pair, dict], object]
    factor: float = 1
    higher_is_better: bool = True
    models: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    digits: int = 2
    is_share: bool = False
    reduce: Callable[..., float] | None = None
    sides: Callable[[Protocol], tuple[int, int]] = lambda protocol: (1, 1)

    @property
    def heading(self) -> str:
        """The title with its factor and its direction."""
        exponent = str(round(math.log10(self.factor))).translate(str.maketrans("01234", "⁰¹²³⁴"))
        scale = " %" if self.is_share else "" if self.factor == 1 else f" ×10{exponent}"
        return f"{self.title}{scale} {'↑' if self.higher_is_better else '↓'}"

    def format(self, value: float) -> str:
        """Write a scaled value as tables do: a dash where it is undefined."""
        if math.isnan(value):
            return "–"
        return "∞" if math.isinf(value) else f"{value:.{self.digits}f}"

    def measure(self, pair: Pair, models: dict) -> float | dict[str, np.ndarray]:
        """Compute the metric of a pair, NaN where it is undefined; of a metric of all predictions, its arrays."""
        if any(getattr(pair, name) is None for name in self.needs):
            return {} if self.reduce else math.nan
        value = self.compute(pair, models)
        return value if self.reduce else float(value)


def apply_unedited(function: Callable, pair: Pair, **switches) -> torch.Tensor:
    """Compare prediction and source where nothing was to be edited."""
    return function(pair.image, pair.source, mask=pair.mask, masked_mean=pair.protocol.masked_mean, **switches)


def compare_clip_images(pair: Pair, models: dict) -> torch.Tensor:
    """Compare prediction and truth by CLIP."""
    embeds = (models["clip"].encode_images(pixels) for pixels in (pair.image_as_made, pair.target))
    return image_metrics.compute_cosine_similarity(*embeds)


def compare_clip_prompt(pair: Pair, models: dict) -> torch.Tensor:
    """Compare prediction and caption by CLIP, as a cosine."""
    embeds = models["clip"].encode_images(pair.image_as_made), models["clip"].encode_prompts([pair.target_prompt])
    return image_metrics.compute_cosine_similarity(*embeds)


def collect_features(pair: Pair, models: dict) -> dict[str, np.ndarray]:
    """Collect the Inception features (1, 2048) of prediction and truth."""
    return {
        "features": models["inception"](pair.image).cpu().numpy(),
        "reference_features": models["inception"](pair.target).cpu().numpy(),
    }


def reduce_features(features: list[np.ndarray], reference_features: list[np.ndarray]) -> float:
    """Compute the Fréchet distance of all features; undefined for fewer than two samples."""
    if len(features) < 2:
        return math.nan
    return compute_frechet_distance(*(torch.from_numpy(np.concatenate(f)) for f in (features, reference_features)))


def reduce_confusion(confusion: list[np.ndarray]) -> float:
    """Compute the mean IoU of all pixels together."""
    return map_metrics.compute_mean_iou(torch.from_numpy(sum(confusion)))


def pick_sticker_score(name: str) -> Callable:
    """Pick one of the sticker scores, NaN where it does not apply."""
    return lambda pair, models: pair.stickers.get(name, math.nan)


def get_ssim_sides(protocol: Protocol) -> tuple[int, int]:
    """Say what sides structural similarity needs: room for the window and the border that is left out."""
    return image_metrics.SSIM_WINDOW + 2 * protocol.ssim_border, 1


EDIT, TRUTH, CAPTION = ("mask",), ("target",), ("target_prompt",)
METRICS = {
    "structure_distance": Metric(
        "structure distance",
        lambda pair, models: models["structure"](pair.image, pair.source),
        factor=1e3,
        higher_is_better=False,
        models=("structure",),
    ),
    "psnr_unedited": Metric(
        "PSNR unedited", lambda pair, models: apply_unedited(image_metrics.compute_psnr, pair), needs=EDIT
    ),
    "lpips_unedited": Metric(
        "LPIPS unedited",
        lambda pair, models: apply_unedited(models["lpips"], pair),
        factor=1e3,
        higher_is_better=False,
        models=("lpips",),
        needs=EDIT,
        sides=lambda protocol: (LPIPS_SMALLEST_SIDE, 1),
    ),
    "mse_unedited": Metric(
        "MSE unedited",
        lambda pair, models: apply_unedited(image_metrics.compute_mse, pair),
        factor=1e4,
        higher_is_better=False,
        needs=EDIT,
    ),
    "ssim_unedited": Metric(
        "SSIM unedited",
        lambda pair, models: apply_unedited(image_metrics.compute_ssim, pair, border=pair.protocol.ssim_border),
        factor=1e2,
        needs=EDIT,
        sides=get_ssim_sides,
    ),
    "clip_whole": Metric(
        "CLIP whole",
        lambda pair, models: models["clip"](pair.image, [pair.target_prompt]),
        models=("clip",),
        needs=CAPTION,
    ),
    "clip_edited": Metric(
        "CLIP edited",
        lambda pair, models: models["clip"](pair.image, [pair.target_prompt], mask=pair.mask),
        models=("clip",),
        needs=CAPTION + EDIT,
    ),
    "depth_rmse": Metric(
        "depth RMSE",
        lambda pair, models: models["depth"](pair.image, pair.source[:, :1]),
        higher_is_better=False,
        models=("depth",),
        # Where the network sees the picture at its own size, it keeps that only of such sides.
        sides=lambda protocol: (32, 32) if protocol.depth_variant == "controlar" else (1, 1),
    ),
    "edge_f1": Metric("edge F1", lambda pair, models: map_metrics.compute_edge_f1(*pair.edges), factor=1e2),
    "edge_ms_ssim": Metric(
        "edge MS-SSIM",
        lambda pair, models: image_metrics.compute_ms_ssim(*(edges.expand(-1, 3, -1, -1) for edges in pair.edges)),
        factor=1e2,
        sides=lambda protocol: (image_metrics.MS_SSIM_SMALLEST_SIDE, 1),
    ),
    "edge_psnr": Metric(
        "edge PSNR",
        lambda pair, models: image_metrics.compute_psnr(*(edges.expand(-1, 3, -1, -1) for edges in pair.edges)),
    ),
    "l1": Metric(
        "L1",
        lambda pair, models: image_metrics.compute_l1(pair.image, pair.target),
        higher_is_better=False,
        needs=TRUTH,
        digits=4,
    ),
    "l2": Metric(
        "L2",
        lambda pair, models: image_metrics.compute_mse(pair.image, pair.target),
        higher_is_better=False,
        needs=TRUTH,
        digits=4,
    ),
    "psnr": Metric("PSNR", lambda pair, models: image_metrics.compute_psnr(pair.image, pair.target), needs=TRUTH),
    "ssim": Metric(
        "SSIM",
        lambda pair, models: image_metrics.compute_ssim(pair.image, pair.target, border=pair.protocol.ssim_border),
        factor=1e2,
        needs=TRUTH,
        sides=get_ssim_sides,
    ),
    "lpips": Metric(
        "LPIPS",
        lambda pair, models: models["lpips"](pair.image, pair.target),
        factor=1e3,
        higher_is_better=False,
        models=("lpips",),
        needs=TRUTH,
        sides=lambda protocol: (LPIPS_SMALLEST_SIDE, 1),
    ),
    "clip_i": Metric("CLIP-I", compare_clip_images, models=("clip",), needs=TRUTH, digits=4),
    "clip_t": Metric("CLIP-T", compare_clip_prompt, models=("clip",), needs=CAPTION, digits=4),
    "dino": Metric(
        "DINO",
        lambda pair, models: models["dino"](pair.image_as_made, pair.target),
        models=("dino",),
        needs=TRUTH,
        digits=4,
    ),
    "fid": Metric(
        "FID",
        collect_features,
        higher_is_better=False,
        models=("inception",),
        needs=TRUTH,
        reduce=reduce_features,
    ),
    "mean_iou": Metric(
        "mIoU",
        lambda pair, models: {"confusion": models["segmentation"](pair.image, pair.labels).cpu().numpy()},
        factor=1e2,
        models=("segmentation",),
        needs=("labels",),
        is_share=True,
        reduce=reduce_confusion,
    ),
    "outside_psnr": Metric("PSNR outside", pick_sticker_score("outside_psnr")),
    **{
        name: Metric(title, pick_sticker_score(name), factor=1e2, is_share=True)
        for name, title in {
            "done": "edits done",
            "inside": "right inside",
            "outside": "kept outside",
            "colour": "right colour",
            "shape": "right shape",
            "gone": "gone",
            "stickers": "stickers right",
            "placed": "colours placed",
            "background": "right background",
        }.items()
    },
}


def check_sizes(names: Iterable[str], sizes: Iterable[str], protocol: Protocol) -> None:
    """Refuse metrics that pictures of the sizes "width×height" cannot have.

    Raises:
        ValueError: If a size is too small for a metric, or one that its network cannot keep.
    """
    for name in names:
        least, factor = METRICS[name].sides(protocol)
        for size in sizes:
            if any(side < least or side % factor for side in map(int, size.split("×"))):
                needed = f"of at least {least} pixels" if factor == 1 else f"that are multiples of {factor} pixels"
                raise ValueError(
                    f"`metrics` holds {name!r}, which needs sides {needed} in the protocol {protocol.name}, and there "
                    f"are samples of {size}; list other `metrics`, or prepare the benchmark with other pictures."
                )


def get_metric(name: str) -> Metric:
    """Find a metric by its name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in METRICS:
        raise ValueError(f"`metrics` holds {name!r}; there are {', '.join(METRICS)}.")
    return METRICS[name]
