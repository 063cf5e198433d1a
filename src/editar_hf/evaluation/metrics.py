"""The metrics as functions of tensors; what a network sees in an image is computed in `features.py`.

Images are (batch, 3, height, width) in [0, 1]. `images` are scored and `references` are what they are compared with. A
`mask` (batch, 1, height, width) is 1 where an image was to be edited. Every function returns one float64 value per
image, computed on the CPU so that the device does not change it. A value that is not defined is NaN.
"""

from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import canny
from kornia.metrics import ssim
from PIL import Image
from torchmetrics.functional.classification import binary_f1_score, multiclass_confusion_matrix
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure


DepthVariant = Literal["editar", "controlnet++", "controlar"]
SSIM_WINDOW = 11
# The side at which the window still fits into the last of five scales.
MS_SSIM_SMALLEST_SIDE = SSIM_WINDOW * 2**4


# Pixels


def check_pair(images: torch.Tensor, references: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Check that images, references and masks have matching shapes, and that masks hold only 0 and 1."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"`images` has shape {tuple(images.shape)}; pass images (batch, 3, height, width).")
    if references.shape != images.shape:
        raise ValueError(
            f"`references` has shape {tuple(references.shape)}, `images` {tuple(images.shape)}; resize one of them."
        )
    expected = (len(images), 1, *images.shape[2:])
    if mask is not None and tuple(mask.shape) != expected:
        raise ValueError(f"`mask` has shape {tuple(mask.shape)}; one channel for these images is {expected}.")
    if mask is not None and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("`mask` holds other values than 0 and 1; compare it with a threshold first.")


def blacken_edited(images: torch.Tensor, references: torch.Tensor, mask: torch.Tensor | None = None):
    """Check a pair and set its edited pixels to 0; return both in float64, and a map that is 1 at unedited pixels."""
    check_pair(images, references, mask)
    images, references = images.cpu().double(), references.cpu().double()
    unedited = torch.ones_like(images[:, :1]) if mask is None else 1 - mask.cpu().double()
    return images * unedited, references * unedited, unedited


def compute_mean(values: torch.Tensor, unedited: torch.Tensor, masked_mean: bool) -> torch.Tensor:
    """Average maps over all pixels, or with `masked_mean` over the unedited ones; NaN if no pixel is unedited."""
    weights = unedited.expand_as(values) if masked_mean else torch.ones_like(values)
    mean = (values * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)
    return mean.where(unedited.flatten(1).any(1), torch.nan)


def compute_l1(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Compute the mean absolute difference, in [0, 1].

    Source: MagicBrush (arXiv 2306.10012), section 4.1; the L2 of that benchmark is `compute_mse`.
    """
    images, references, _ = blacken_edited(images, references)
    return (images - references).abs().flatten(1).mean(1)


def compute_mse(
    images: torch.Tensor, references: torch.Tensor, mask: torch.Tensor | None = None, masked_mean: bool = False
) -> torch.Tensor:
    """Compute the mean squared difference, in [0, 1].

    Args:
        images, references (`torch.Tensor` of shape `(batch, 3, height, width)`): In [0, 1].
        mask (`torch.Tensor` of shape `(batch, 1, height, width)`, *optional*): 1 where edited. These pixels are set to
            0 in both images.
        masked_mean (`bool`, *optional*, defaults to `False`): Average over the unedited pixels only. The published
            figures average over all pixels, including those that were set to 0.

    Source: PnPInversion (arXiv 2310.01506), section 5.1.
    """
    images, references, unedited = blacken_edited(images, references, mask)
    return compute_mean((images - references).square(), unedited, masked_mean)


def compute_psnr(
    images: torch.Tensor, references: torch.Tensor, mask: torch.Tensor | None = None, masked_mean: bool = False
) -> torch.Tensor:
    """Compute the peak signal-to-noise ratio in dB, with the arguments of `compute_mse`; infinite for equal images."""
    return -10 * compute_mse(images, references, mask, masked_mean).log10()


def compute_ssim(
    images: torch.Tensor,
    references: torch.Tensor,
    mask: torch.Tensor | None = None,
    masked_mean: bool = False,
    border: int = 0,
) -> torch.Tensor:
    """Compute the structural similarity, at most 1, over three channels, with a Gaussian window of 11 pixels.

    Args:
        images, references, mask, masked_mean: As for `compute_mse`.
        border (`int`, *optional*, defaults to 0): Pixels to leave out at each side of the map. Older versions of the
            reference's library leave out 5.

    Raises:
        ValueError: If an image is smaller than the window and its border.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", equation 13.
    """
    images, references, unedited = blacken_edited(images, references, mask)
    if min(images.shape[2:]) < SSIM_WINDOW + 2 * border:
        raise ValueError(
            f"`images` are {images.shape[3]}×{images.shape[2]} pixels; a side needs at least "
            f"{SSIM_WINDOW + 2 * border}."
        )
    inside = (..., slice(border, -border or None), slice(border, -border or None))
    return compute_mean(ssim(images, references, SSIM_WINDOW, eps=0.0)[inside], unedited[inside], masked_mean)


def compute_ms_ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Compute the multi-scale structural similarity, in [0, 1].

    Raises:
        ValueError: If a side has fewer than 176 pixels.

    Source: Wang et al., "Multi-scale structural similarity for image quality assessment", equation 7.
    """
    images, references, _ = blacken_edited(images, references)
    values = multiscale_structural_similarity_index_measure(images, references, data_range=1.0, reduction="none")
    return values.double().reshape(len(images))


# Embeddings


def compute_cosine_similarity(embeds: torch.Tensor, reference_embeds: torch.Tensor) -> torch.Tensor:
    """Compute the cosine, in [−1, 1], of embeddings (batch, dim): CLIP-I, CLIP-T and DINO similarity.

    Source: MagicBrush (arXiv 2306.10012), section 4.1.
    """
    return F.cosine_similarity(embeds.cpu().double(), reference_embeds.cpu().double(), dim=1)


def compute_clip_similarity(image_embeds: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
    """Compute the CLIP score, in [0, 100], of image and text embeddings (batch, dim).

    Source: CLIPScore (arXiv 2104.08718), section 3, with the weight 100 of torchmetrics.
    """
    return (100 * compute_cosine_similarity(image_embeds, prompt_embeds)).clamp(min=0)


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
    """Compute the Fréchet distance between two sets of features (n, dim), modelled as normal distributions.

    A covariance is Σ = AᵀA with A the centred features over √(n − 1). The trace of (Σ₁Σ₂)^½ is the sum of the singular
    values of A₁A₂ᵀ, so no matrix root is taken, and sets with fewer images than dimensions stay exact.

    Raises:
        ValueError: If a set has fewer than two images, or the dimensions differ.

    Source: Heusel et al. (arXiv 1706.08500), equation 6, with unbiased covariances.
    """
    dim = features.shape[-1]
    for name, found in (("features", features), ("reference_features", reference_features)):
        if found.ndim != 2 or len(found) < 2 or found.shape[1] != dim:
            raise ValueError(f"`{name}` has shape {tuple(found.shape)}; pass two images or more: (n, {dim}).")

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
    """Find the edges of images: (batch, 1, height, width), 1 on an edge.

    Source: ControlNet++ (arXiv 2404.07987), whose evaluation uses kornia's detector with these thresholds.
    """
    return canny(images.float(), 0.1, 0.2)[1]


def compute_edge_f1(edges: torch.Tensor, reference_edges: torch.Tensor) -> torch.Tensor:
    """Compute the F1 score, in [0, 1], of binary maps (batch, 1, height, width); 0 if both are empty.

    Raises:
        ValueError: If the shapes differ or a map holds other values than 0 and 1.

    Source: ControlNet++ (arXiv 2404.07987), section 4.
    """
    if edges.shape != reference_edges.shape:
        raise ValueError(f"`edges` has shape {tuple(edges.shape)}, `reference_edges` {tuple(reference_edges.shape)}.")
    for name, maps in (("edges", edges), ("reference_edges", reference_edges)):
        if not ((maps == 0) | (maps == 1)).all():
            raise ValueError(f"`{name}` holds other values than 0 and 1.")
    return binary_f1_score(edges.cpu(), reference_edges.cpu().long(), multidim_average="samplewise").double()


def compute_depth_rmse(
    depth: torch.Tensor,
    labels: torch.Tensor,
    variant: DepthVariant = "editar",
    size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Compute the root mean squared difference, in [0, 255], between estimated depth and the condition map.

    Depth has no unit, so both are scaled first. The published variants differ in how:

    * `"editar"`: estimate and label are each spread over 0 to 255 and truncated to whole steps;
    * `"controlnet++"`: the label likewise; the estimate is divided by its maximum, times 255, truncated;
    * `"controlar"`: the label stays as it is; the estimate is divided by its maximum, times 255, not truncated.

    The first two resize the estimate to the image bilinearly and the label by nearest neighbour. The last one estimates
    depth at the size of the image.

    Args:
        depth (`torch.Tensor` of shape `(batch, depth_height, depth_width)`): The estimate, 0 or more.
        labels (`torch.Tensor` of shape `(batch, 1, label_height, label_width)`): The condition maps, in [0, 1].
        variant (`str`, *optional*, defaults to `"editar"`): One of the three.
        size (`tuple[int, int]`, *optional*): Height and width of the image; defaults to those of the labels.

    Returns:
        (batch,), NaN where a map has no range to scale.

    Raises:
        ValueError: If `variant` is none of these, or the shapes do not belong together.

    Source: the evaluations of EditAR (arXiv 2501.04699), ControlNet++ (arXiv 2404.07987) and ControlAR
    (arXiv 2410.02705).
    """
    if variant not in get_args(DepthVariant):
        raise ValueError(f"`variant` is {variant!r}; choose one of {', '.join(get_args(DepthVariant))}.")
    if depth.ndim != 3 or labels.ndim != 4 or labels.shape[1] != 1 or len(labels) != len(depth):
        raise ValueError(
            f"`depth` has shape {tuple(depth.shape)} and `labels` {tuple(labels.shape)}; pass (batch, height, width) "
            "and (batch, 1, height, width)."
        )
    depth, labels = depth.cpu().float(), 255 * labels.cpu().double()[:, 0]
    size = tuple(size or labels.shape[1:])
    least, greatest = depth.amin((1, 2), keepdim=True), depth.amax((1, 2), keepdim=True)
    if variant == "editar":
        estimates = (depth - least) / (greatest - least)
    else:
        estimates = (depth / greatest).where(greatest > 0, torch.nan)
    if variant == "controlar":
        if not depth.shape[1:] == labels.shape[1:] == size:
            raise ValueError(
                f"`depth` is {tuple(depth.shape[1:])} and `labels` {tuple(labels.shape[1:])} in size; with "
                f'`variant="controlar"` both need the size of the image, {size}.'
            )
        return (255 * estimates.double() - labels).square().flatten(1).mean(1).sqrt()
    # Labels are whole steps. Rounding removes float errors that truncation would turn into a step less.
    labels = labels.round()
    least, greatest = labels.amin((1, 2), keepdim=True), labels.amax((1, 2), keepdim=True)
    targets = (labels - least) / (greatest - least)
    is_defined = (estimates.flatten(1).sum(1) + targets.flatten(1).sum(1)).isfinite()
    estimates = resize_steps((255 * estimates.nan_to_num()).floor(), size, Image.Resampling.BILINEAR)
    targets = resize_steps((255 * targets.nan_to_num()).floor(), size, Image.Resampling.NEAREST)
    return (estimates - targets).square().flatten(1).mean(1).sqrt().where(is_defined, torch.nan)


def resize_steps(maps: torch.Tensor, size: tuple[int, int], resample: Image.Resampling) -> torch.Tensor:
    """Resize maps (batch, height, width) of whole steps, 0 to 255, as Pillow resizes images of 8 bits."""
    images = [Image.fromarray(steps.byte().numpy()).resize(size[::-1], resample) for steps in maps]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).double()


def compute_confusion_matrix(
    predicted_labels: torch.Tensor, labels: torch.Tensor, num_labels: int, ignore_label: int = 255
) -> torch.Tensor:
    """Count pixels by true class (rows) and predicted class (columns): (num_labels, num_labels), int64.

    Args:
        predicted_labels, labels (`torch.Tensor` of shape `(batch, height, width)`): Classes, integers.
        num_labels (`int`): Number of classes.
        ignore_label (`int`, *optional*, defaults to 255): Marks pixels of `labels` to leave out.

    Raises:
        ValueError: If the shapes differ or a class is not below `num_labels`.
    """
    if predicted_labels.shape != labels.shape:
        raise ValueError(
            f"`predicted_labels` has shape {tuple(predicted_labels.shape)}, `labels` {tuple(labels.shape)}."
        )
    is_counted = labels != ignore_label
    for name, maps in (("predicted_labels", predicted_labels), ("labels", labels)):
        classes = maps[is_counted]
        if len(classes) and not 0 <= classes.min() <= classes.max() < num_labels:
            raise ValueError(
                f"`{name}` go from {classes.min()} to {classes.max()}; with {num_labels} classes they go from 0 to "
                f"{num_labels - 1}, and {ignore_label} in `labels` is left out."
            )
    counts = multiclass_confusion_matrix(
        predicted_labels.cpu()[is_counted], labels.cpu()[is_counted], num_labels, validate_args=False
    )
    return counts.long()


def compute_class_iou(confusion_matrix: torch.Tensor) -> torch.Tensor:
    """Compute the intersection over union, in [0, 1], of each class; NaN for one that is neither true nor predicted."""
    confusion_matrix = confusion_matrix.double()
    shared = confusion_matrix.diagonal()
    return shared / (confusion_matrix.sum(0) + confusion_matrix.sum(1) - shared)


def compute_mean_iou(confusion_matrix: torch.Tensor) -> float:
    """Compute the mean intersection over union, in [0, 1], of the classes that occur.

    Source: Long et al., "Fully convolutional networks for semantic segmentation" (arXiv 1411.4038), section 5.
    """
    return compute_class_iou(confusion_matrix).nanmean().item()
