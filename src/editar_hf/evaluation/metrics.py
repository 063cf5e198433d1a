"""The metrics as functions of tensors. `features.py` computes the features that some of them need.

Images are (batch, 3, height, width) in [0, 1]. `images` are compared with `references`. A `mask` (batch, 1, height,
width) is 1 inside the edit. Metrics of single images return one float64 value per image. All metrics are computed on
the CPU, so the device does not change them. An undefined value is NaN.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import canny
from kornia.metrics import ssim
from PIL import Image
from torchmetrics.functional.classification import binary_f1_score
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from ..checks import check_choice


# Pixels


def check_pair(images: torch.Tensor, references: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Check that images, references and mask have matching shapes, and that the mask holds only 0 and 1."""
    if images.ndim != 4 or references.shape != images.shape:
        raise ValueError(
            f"`images` has shape {tuple(images.shape)} and `references` {tuple(references.shape)}; pass two tensors "
            "(batch, 3, height, width) of the same shape."
        )
    expected = (len(images), 1, *images.shape[2:])
    if mask is not None and not (mask.shape == expected and ((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"`mask` has shape {tuple(mask.shape)} and values in [{mask.min()}, {mask.max()}]; for these images it "
            f"needs shape {expected} and holds only 0 and 1."
        )


def average_map(
    compute_map: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    references: torch.Tensor,
    mask: torch.Tensor | None = None,
    masked_mean: bool = False,
    border: int = 0,
) -> torch.Tensor:
    """Set edited pixels to 0 in both images, compute a map of both, and average the map.

    The mean is NaN if all pixels are edited.
    """
    check_pair(images, references, mask)
    unedited = torch.ones_like(images[:, :1]) if mask is None else 1 - mask.float()
    unedited = unedited.cpu().double().expand_as(images)
    values = compute_map(images.cpu().double() * unedited, references.cpu().double() * unedited)
    inside = (..., slice(border, -border or None), slice(border, -border or None))
    values, unedited = values[inside].flatten(1), unedited[inside].flatten(1)
    weights = unedited if masked_mean else torch.ones_like(unedited)
    mean = (values * weights).sum(1) / weights.sum(1)
    return mean.where(unedited.any(1), torch.nan)


def compute_l1(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Compute the mean absolute difference, in [0, 1].

    Source: MagicBrush (arXiv 2306.10012), section 4.1. The L2 metric of that benchmark is `compute_mse`.
    """
    return average_map(partial(F.l1_loss, reduction="none"), images, references)


def compute_mse(
    images: torch.Tensor, references: torch.Tensor, mask: torch.Tensor | None = None, masked_mean: bool = False
) -> torch.Tensor:
    """Compute the mean squared difference, in [0, 1].

    With a `mask`, edited pixels are set to 0 in both images. The mean is over all pixels, including the edited ones, as
    in published results. With `masked_mean`, the mean is over the unedited pixels only.

    Source: PnPInversion (arXiv 2310.01506), section 5.1.
    """
    return average_map(partial(F.mse_loss, reduction="none"), images, references, mask, masked_mean)


def compute_psnr(
    images: torch.Tensor, references: torch.Tensor, mask: torch.Tensor | None = None, masked_mean: bool = False
) -> torch.Tensor:
    """Compute the peak signal-to-noise ratio in dB. The arguments are the same as in `compute_mse`.

    The PSNR of equal images is infinite.
    """
    return -10 * compute_mse(images, references, mask, masked_mean).log10()


def compute_ssim(
    images: torch.Tensor,
    references: torch.Tensor,
    mask: torch.Tensor | None = None,
    masked_mean: bool = False,
    border: int = 0,
) -> torch.Tensor:
    """Compute the structural similarity, at most 1, over three channels, with a Gaussian window of 11 pixels.

    The first four arguments are the same as in `compute_mse`. No side of an image may be smaller than the window.
    `border` pixels are left out at each side of the map. Older versions of the library that the reference uses leave
    out 5.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", equation 13.
    """
    return average_map(partial(ssim, window_size=11, eps=0.0), images, references, mask, masked_mean, border)


def compute_ms_ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Compute the multi-scale structural similarity, in [0, 1]. Each side must have at least 176 pixels.

    Source: Wang et al., "Multi-scale structural similarity for image quality assessment", equation 7.
    """
    images, references = images.cpu().double(), references.cpu().double()
    values = multiscale_structural_similarity_index_measure(images, references, data_range=1.0, reduction="none")
    return values.double().reshape(len(images))


# Embeddings


def compute_cosine_similarity(embeds: torch.Tensor, reference_embeds: torch.Tensor) -> torch.Tensor:
    """Compute the cosine similarity, in [−1, 1], of embeddings (batch, dim), for CLIP-I, CLIP-T and DINO.

    Source: MagicBrush (arXiv 2306.10012), section 4.1.
    """
    return F.cosine_similarity(embeds.cpu().double(), reference_embeds.cpu().double(), dim=1)


def compute_structure_distance(keys: torch.Tensor, reference_keys: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared difference between the cosine self-similarities of keys (batch, tokens, dim).

    Source: Tumanyan et al., "Splicing ViT features for semantic appearance transfer" (arXiv 2201.00424), equation 3.
    """

    def compute_self_similarity(keys: torch.Tensor) -> torch.Tensor:
        keys = keys.cpu().double()
        lengths = keys.norm(dim=2, keepdim=True)
        # Parity: the published code divides by at least 1e-8.
        return (keys @ keys.mT) / (lengths @ lengths.mT).clamp(min=1e-8)

    difference = compute_self_similarity(keys) - compute_self_similarity(reference_keys)
    return difference.square().flatten(1).mean(1)


def compute_frechet_distance(features: torch.Tensor, reference_features: torch.Tensor) -> float:
    """Compute the Fréchet distance between two sets of features (n, dim), modeled as normal distributions.

    The covariance is Σ = AᵀA, where A holds the centered features divided by √(n − 1). The trace of (Σ₁Σ₂)^½ is the sum
    of the singular values of A₁A₂ᵀ. No matrix root is therefore needed, and the result is exact even if there are fewer
    images than dimensions.

    Source: Heusel et al. (arXiv 1706.08500), equation 6, with unbiased covariances.
    """
    if min(len(features), len(reference_features)) < 2:
        raise ValueError("`features` or `reference_features` has fewer than two images; pass at least two of each.")

    def compute_moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = features.cpu().double()
        mean = features.mean(0)
        return mean, torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R

    (mean, root), (reference_mean, reference_root) = map(compute_moments, (features, reference_features))
    spread = root.square().sum() + reference_root.square().sum()
    shared = torch.linalg.svdvals(root @ reference_root.T).sum()
    return ((mean - reference_mean).square().sum() + spread - 2 * shared).item()


# Edges, depth and classes


def apply_canny(images: torch.Tensor) -> torch.Tensor:
    """Detect the edges of images: (batch, 1, height, width), 1 on an edge and 0 elsewhere.

    Source: ControlNet++ (arXiv 2404.07987). Its evaluation uses kornia's Canny detector with these thresholds.
    """
    return canny(images.float(), 0.1, 0.2)[1]


def compute_edge_f1(edges: torch.Tensor, reference_edges: torch.Tensor) -> torch.Tensor:
    """Compute the F1 score, in [0, 1], of edge maps (batch, 1, height, width), where edges are above 0.5.

    If both maps are empty, the score is 0.

    Source: ControlNet++ (arXiv 2404.07987), section 4.
    """
    edges, reference_edges = ((maps.cpu() > 0.5).long() for maps in (edges, reference_edges))
    return binary_f1_score(edges, reference_edges, multidim_average="samplewise").double()


# Depth has no unit, so an estimate is scaled first: either stretched to [0, 1] or divided by its maximum. The first two
# variants also stretch the label, and truncate estimate and label to steps of 1/255.
# Variant → whether the estimate is stretched, and whether the label is stretched and both are truncated.
DEPTH_VARIANTS = {"editar": (True, True), "controlnet++": (False, True), "controlar": (False, False)}


def compute_depth_rmse(depth: torch.Tensor, labels: torch.Tensor, variant: str = "editar") -> torch.Tensor:
    """Compute the root mean squared difference, in [0, 255], between estimated depth and the condition map.

    Args:
        depth (`torch.Tensor` of shape `(batch, depth_height, depth_width)`): The estimate, 0 or more. The first two
            variants resize it to the size of the label. For the last variant, it must have this size.
        labels (`torch.Tensor` of shape `(batch, 1, height, width)`): The condition maps, in [0, 1].
        variant (`str`, *optional*, defaults to `"editar"`): A key of `DEPTH_VARIANTS`.

    Returns:
        (batch,), NaN where all values of a map are equal, so that it cannot be stretched.

    Source: the evaluations of EditAR (arXiv 2501.04699), ControlNet++ (arXiv 2404.07987) and ControlAR
    (arXiv 2410.02705).
    """
    check_choice("variant", variant, DEPTH_VARIANTS)
    is_spread, is_truncated = DEPTH_VARIANTS[variant]
    depth, labels = depth.cpu().float(), 255 * labels.cpu().double()[:, 0]
    estimates = 255 * (spread(depth) if is_spread else depth / depth.amax((1, 2), keepdim=True)).double()
    if is_truncated:
        # Labels are multiples of 1/255. Without rounding, a small float error could lower a label by a whole step.
        labels = (255 * spread(labels.round())).floor()
        estimates = resize_steps(estimates, labels.shape[2], labels.shape[1])
    return (estimates - labels).square().flatten(1).mean(1).sqrt()


def spread(maps: torch.Tensor) -> torch.Tensor:
    """Stretch each map (batch, height, width) to [0, 1]. A map whose values are all equal becomes NaN."""
    least, greatest = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - least) / (greatest - least)


def resize_steps(maps: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Truncate maps (batch, height, width) in [0, 255] to integers and resize them as 8-bit images. NaN stays NaN."""
    images = [Image.fromarray(one.nan_to_num().byte().numpy()) for one in maps]
    steps = [np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) for image in images]
    return torch.from_numpy(np.stack(steps)) + 0 * maps.amax((1, 2), keepdim=True)


def compute_confusion_matrix(
    predicted_labels: torch.Tensor, labels: torch.Tensor, num_labels: int, ignore_label: int = 255
) -> torch.Tensor:
    """Count pixels by true class (rows) and predicted class (columns): (num_labels, num_labels), int64.

    Both maps are (batch, height, width) and hold integers. Pixels where `labels` is `ignore_label` are not counted.

    Raises:
        ValueError: If a class is negative, or `num_labels` or more.
    """
    is_counted = labels.cpu() != ignore_label
    pairs = torch.stack([maps.cpu().long()[is_counted] for maps in (labels, predicted_labels)])
    if not ((pairs >= 0) & (pairs < num_labels)).all():
        raise ValueError(
            f"`labels` and `predicted_labels` go from {pairs.min()} to {pairs.max()}; with {num_labels} classes they "
            f"must be 0 to {num_labels - 1}, or {ignore_label} in `labels` for pixels to ignore."
        )
    return torch.bincount(num_labels * pairs[0] + pairs[1], minlength=num_labels**2).reshape(num_labels, num_labels)


def compute_class_iou(confusion_matrix: torch.Tensor) -> torch.Tensor:
    """Compute the intersection over union of each class, in [0, 1]; NaN if a class is neither true nor predicted."""
    confusion_matrix = confusion_matrix.double()
    shared = confusion_matrix.diagonal()
    return shared / (confusion_matrix.sum(0) + confusion_matrix.sum(1) - shared)


def compute_mean_iou(confusion_matrix: torch.Tensor) -> float:
    """Compute the mean intersection over union, in [0, 1], over the classes that are true or predicted somewhere.

    Source: Long et al., "Fully convolutional networks for semantic segmentation" (arXiv 1411.4038), section 5.
    """
    return compute_class_iou(confusion_matrix).nanmean().item()
