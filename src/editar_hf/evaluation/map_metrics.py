"""Metrics of maps: do a picture's edges, depth and classes agree with the condition it was made from?

Every function takes tensors; the networks that estimate depth and classes are in `scorers`.
"""

from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image


DepthVariant = Literal["editar", "controlnet++", "controlar"]


def apply_canny(images: torch.Tensor, low_threshold: float = 0.1, high_threshold: float = 0.2) -> torch.Tensor:
    """Find edges of pictures (batch, 3, height, width) in [0, 1]: (batch, 1, height, width), 1 on an edge.

    Source: ControlNet++ (arXiv 2404.07987), whose evaluation uses kornia's detector with these thresholds.
    """
    from kornia.filters import canny

    return canny(images.float(), low_threshold, high_threshold)[1]


def compute_edge_f1(edges: torch.Tensor, reference_edges: torch.Tensor) -> torch.Tensor:
    """Compute the F1 score, in [0, 1], of binary maps (batch, 1, height, width); 0 where both are empty.

    Raises:
        ValueError: If the shapes differ or a map has other values than 0 and 1.

    Source: ControlNet++ (arXiv 2404.07987), section 4.
    """
    if edges.shape != reference_edges.shape:
        raise ValueError(f"`edges` has shape {tuple(edges.shape)}, `reference_edges` {tuple(reference_edges.shape)}.")
    for name, maps in (("edges", edges), ("reference_edges", reference_edges)):
        if not ((maps == 0) | (maps == 1)).all():
            raise ValueError(f"`{name}` holds other values than 0 and 1.")
    edges, reference_edges = (maps.cpu().double().flatten(1) for maps in (edges, reference_edges))
    num_shared = (edges * reference_edges).sum(1)
    # Twice the shared pixels over all: where both maps are empty, 0 / 1.
    return 2 * num_shared / (edges.sum(1) + reference_edges.sum(1)).clamp(min=1)


def compute_depth_rmse(
    depth: torch.Tensor,
    labels: torch.Tensor,
    variant: DepthVariant = "editar",
    size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Compute the root of the mean squared difference, on a scale of 0 to 255, of estimated depth and its condition.

    Depth has no unit, so both are scaled first. The published variants differ in how:

    * `"editar"`: estimate and label each go from 0 to 255, in whole steps, truncated;
    * `"controlnet++"`: so does the label; the estimate's greatest value becomes 255, in whole steps, truncated;
    * `"controlar"`: the label stays as it is; the estimate's greatest value becomes 255, not truncated.

    The first two bring the estimate to the size of the picture bilinearly, and the label by its nearest value; the last
    estimates depth at that size.

    Args:
        depth (`torch.Tensor` of shape `(batch, depth_height, depth_width)`): As a model estimates it, 0 or more.
        labels (`torch.Tensor` of shape `(batch, 1, label_height, label_width)`): The condition maps, in [0, 1].
        variant (`str`): One of the three.
        size (`tuple[int, int]`, *optional*): Height and width of the picture; default: those of the labels.

    Returns:
        (batch,), NaN where a map has no range to scale.

    Raises:
        ValueError: If `variant` is none of these, or the shapes do not belong together.

    Source: the evaluations of EditAR (arXiv 2501.04699), ControlNet++ (arXiv 2404.07987) and ControlAR
    (arXiv 2410.02705).
    """
    check_depth(depth, labels, variant)
    depth, labels = depth.cpu().float(), 255 * labels.cpu().double()[:, 0]
    size = tuple(size or labels.shape[1:])
    if variant == "controlar":
        if not depth.shape[1:] == labels.shape[1:] == size:
            raise ValueError(
                f"`depth` is {tuple(depth.shape[1:])} and `labels` {tuple(labels.shape[1:])} in size; with "
                f'`variant="controlar"` both have that of the picture, {size}.'
            )
        return compute_rmse(255 * divide_by_greatest(depth), labels)
    estimates = spread_values(depth) if variant == "editar" else divide_by_greatest(depth)
    # Steps are whole before they are spread; what is left of a float's rounding would be truncated to a step less.
    targets = spread_values(labels.round())
    is_defined = (estimates.flatten(1).sum(1) + targets.flatten(1).sum(1)).isfinite()
    estimates, targets = ((255 * maps.nan_to_num()).floor() for maps in (estimates, targets))
    distance = compute_rmse(resize_steps(estimates, size, Image.BILINEAR), resize_steps(targets, size, Image.NEAREST))
    return distance.where(is_defined, torch.nan)


def check_depth(depth: torch.Tensor, labels: torch.Tensor, variant: str) -> None:
    """Refuse an unknown variant and maps that do not belong together."""
    if variant not in get_args(DepthVariant):
        raise ValueError(f"`variant` is {variant!r}; choose one of {', '.join(get_args(DepthVariant))}.")
    if depth.ndim != 3 or labels.ndim != 4 or labels.shape[1] != 1 or len(labels) != len(depth):
        raise ValueError(
            f"`depth` has shape {tuple(depth.shape)} and `labels` {tuple(labels.shape)}; give (batch, height, width) "
            "and (batch, 1, height, width)."
        )


def compute_rmse(maps: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Compute the root of the mean squared difference of maps (batch, height, width), for each."""
    return (maps.double() - references.double()).square().flatten(1).mean(1).sqrt()


def divide_by_greatest(maps: torch.Tensor) -> torch.Tensor:
    """Scale maps (batch, height, width) so that the greatest value of each is 1; NaN where it is not positive."""
    greatest = maps.amax((1, 2), keepdim=True)
    return (maps / greatest).where(greatest > 0, torch.nan)


def spread_values(maps: torch.Tensor) -> torch.Tensor:
    """Scale maps (batch, height, width) so that each goes from 0 to 1; NaN where a map has one value only."""
    least, greatest = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - least) / (greatest - least)


def resize_steps(maps: torch.Tensor, size: tuple[int, int], resample: Image.Resampling) -> torch.Tensor:
    """Resize maps (batch, height, width) of whole steps, 0 to 255, as Pillow resizes pictures of 8 bits."""
    height, width = size
    pictures = [Image.fromarray(steps.byte().numpy()).resize((width, height), resample) for steps in maps]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))


def compute_confusion_matrix(
    predicted_labels: torch.Tensor, labels: torch.Tensor, num_labels: int, ignore_label: int = 255
) -> torch.Tensor:
    """Count pixels by true class (rows) and predicted class (columns): (num_labels, num_labels), int64.

    Matrices of several pictures add up to that of all.

    Args:
        predicted_labels, labels (`torch.Tensor` of shape `(batch, height, width)`): Classes, integers.
        num_labels (`int`): Number of classes.
        ignore_label (`int`): Marks pixels of `labels` that do not count.

    Raises:
        ValueError: If the shapes differ or a class is not below `num_labels`.
    """
    if predicted_labels.shape != labels.shape:
        raise ValueError(
            f"`predicted_labels` has shape {tuple(predicted_labels.shape)}, `labels` {tuple(labels.shape)}."
        )
    predicted_labels, labels = predicted_labels.cpu().long(), labels.cpu().long()
    is_counted = labels != ignore_label
    predicted_labels, labels = predicted_labels[is_counted], labels[is_counted]
    for name, classes in (("predicted_labels", predicted_labels), ("labels", labels)):
        if len(classes) and not 0 <= classes.min() <= classes.max() < num_labels:
            raise ValueError(
                f"`{name}` go from {classes.min()} to {classes.max()}; with {num_labels} classes they go from 0 to "
                f"{num_labels - 1}, and {ignore_label} in `labels` is left out."
            )
    counts = torch.bincount(labels * num_labels + predicted_labels, minlength=num_labels**2)
    return counts.reshape(num_labels, num_labels)


def compute_class_iou(confusion_matrix: torch.Tensor) -> torch.Tensor:
    """Compute intersection over union, in [0, 1], of each class; NaN for one that is neither true nor predicted."""
    confusion_matrix = confusion_matrix.double()
    shared = confusion_matrix.diagonal()
    return shared / (confusion_matrix.sum(0) + confusion_matrix.sum(1) - shared)


def compute_mean_iou(confusion_matrix: torch.Tensor) -> float:
    """Compute the mean intersection over union, in [0, 1], of the classes that occur.

    Source: Long et al., "Fully convolutional networks for semantic segmentation" (arXiv 1411.4038), section 5.
    """
    return compute_class_iou(confusion_matrix).nanmean().item()
