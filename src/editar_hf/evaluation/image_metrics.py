"""Metrics of pictures as pure functions: pixels, structural similarity, and distances of embeddings.

Pictures are (batch, 3, height, width) in [0, 1]; `images` are what is scored, `references` what they are compared
with. A `mask` (batch, 1, height, width) is 1 where a picture was to be edited. Each function returns one float64 value
per picture, computed on the CPU, so that a device cannot change a digit; NaN where a value is not defined.
"""

from typing import Literal

import torch
import torch.nn.functional as F


# Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", section III-C.
SSIM_SIGMA, SSIM_WINDOW = 1.5, 11
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
# Source: Wang et al., "Multi-scale structural similarity for image quality assessment", section 3.2.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# So that the window still fits into the last scale.
MS_SSIM_SMALLEST_SIDE = SSIM_WINDOW * 2 ** (len(MS_SSIM_WEIGHTS) - 1)
# Source: the published structure distance, which divides by at least this product of lengths.
MIN_LENGTH_PRODUCT = 1e-8


def quantize_pixels(images: torch.Tensor, mode: Literal["round", "truncate"]) -> torch.Tensor:
    """Bring pixels in [0, 1] to the 256 steps of a file, to the nearest one or to the one below.

    Raises:
        ValueError: If `mode` is neither.
    """
    if mode not in ("round", "truncate"):
        raise ValueError(f'`mode` is {mode!r}; give "round" or "truncate".')
    steps = images.clamp(0, 1).float() * 255
    return (steps.round() if mode == "round" else steps.floor()) / 255


def prepare_pair(
    images: torch.Tensor, references: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bring two batches of pictures to the CPU in float64, edited pixels set to 0 in both.

    Returns:
        The pictures, the references and what is left of each picture, (batch, 1, height, width), 1 where unedited.

    Raises:
        ValueError: If the shapes do not belong together or a mask has other values than 0 and 1.
    """
    check_pair(images, references, mask)
    images, references = images.cpu().double(), references.cpu().double()
    unedited = torch.ones_like(images[:, :1]) if mask is None else 1 - mask.cpu().double()
    return images * unedited, references * unedited, unedited


def check_pair(images: torch.Tensor, references: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Refuse pictures and masks that do not belong together."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"`images` has shape {tuple(images.shape)}; give pictures (batch, 3, height, width).")
    if references.shape != images.shape:
        raise ValueError(
            f"`references` has shape {tuple(references.shape)}, `images` {tuple(images.shape)}; resize one of them."
        )
    if mask is not None:
        check_mask(images, mask)


def check_mask(images: torch.Tensor, mask: torch.Tensor) -> None:
    """Refuse a mask of another size, and one that is not 0 or 1 everywhere."""
    expected = (len(images), 1, *images.shape[2:])
    if tuple(mask.shape) != expected:
        raise ValueError(f"`mask` has shape {tuple(mask.shape)}; one channel for these pictures is {expected}.")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("`mask` holds other values than 0 and 1; compare it with a threshold first.")


def compute_mean(values: torch.Tensor, unedited: torch.Tensor, masked_mean: bool) -> torch.Tensor:
    """Compute the mean of maps (batch, channels, height, width) for each picture; NaN where nothing is unedited.

    Args:
        values (`torch.Tensor`): What to average.
        unedited (`torch.Tensor` of shape `(batch, 1, height, width)`): 1 where a pixel is unedited.
        masked_mean (`bool`): Whether to average over unedited pixels only, and not over all of them.
    """
    weights = unedited.expand_as(values) if masked_mean else torch.ones_like(values)
    mean = (values * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)
    return mean.where(unedited.flatten(1).any(1), torch.nan)


def compute_l1(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Compute the mean absolute difference, in [0, 1], for each picture.

    Source: MagicBrush (arXiv 2306.10012), section 4.1; the L2 of that benchmark is `compute_mse`.
    """
    images, references, _ = prepare_pair(images, references)
    return (images - references).abs().flatten(1).mean(1)


def compute_mse(
    images: torch.Tensor, references: torch.Tensor, mask: torch.Tensor | None = None, masked_mean: bool = False
) -> torch.Tensor:
    """Compute the mean squared difference, in [0, 1], for each picture.

    Args:
        images, references (`torch.Tensor` of shape `(batch, 3, height, width)`): In [0, 1].
        mask (`torch.Tensor` of shape `(batch, 1, height, width)`, *optional*): 1 where edited; these pixels are set to
            0 in both pictures.
        masked_mean (`bool`): Whether the mean is over unedited pixels only. The published figures average over all
            pixels, those set to 0 included.

    Source: PnPInversion (arXiv 2310.01506), section 5.1.
    """
    images, references, unedited = prepare_pair(images, references, mask)
    return compute_mean((images - references).square(), unedited, masked_mean)


def compute_psnr(
    images: torch.Tensor, references: torch.Tensor, mask: torch.Tensor | None = None, masked_mean: bool = False
) -> torch.Tensor:
    """Compute the peak signal-to-noise ratio, in dB, of each picture; infinity where nothing differs.

    The arguments are those of `compute_mse`, whose value is inside.
    """
    return -10 * compute_mse(images, references, mask, masked_mean).log10()


def compute_ssim(
    images: torch.Tensor,
    references: torch.Tensor,
    mask: torch.Tensor | None = None,
    masked_mean: bool = False,
    border: int = 0,
) -> torch.Tensor:
    """Compute the structural similarity, at most 1, of each picture, over its three channels.

    Args:
        images, references, mask, masked_mean: As for `compute_mse`.
        border (`int`): Pixels left out at each side: 0, or 5 as in older versions of the reference's library.

    Raises:
        ValueError: If the pictures are smaller than the window and its border.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", equation 13, with
    population variances.
    """
    images, references, unedited = prepare_pair(images, references, mask)
    check_side(images, SSIM_WINDOW + 2 * border)
    similarity, _ = compute_ssim_maps(images, references)
    inside = slice(border, -border or None)
    return compute_mean(similarity[..., inside, inside], unedited[..., inside, inside], masked_mean)


def compute_ms_ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Compute the multi-scale structural similarity, in [0, 1], of each picture: five scales, each half the last.

    Raises:
        ValueError: If a side has fewer than 176 pixels, too few for the window at the last scale.

    Source: Wang et al., "Multi-scale structural similarity for image quality assessment", equation 7.
    """
    images, references, _ = prepare_pair(images, references)
    check_side(images, MS_SSIM_SMALLEST_SIDE)
    product = 1
    radius = SSIM_WINDOW // 2
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        similarity, contrast = compute_ssim_maps(images, references)
        # Parity: torchmetrics leaves the border out of the contrast, and not out of the similarity of the last scale.
        is_last = scale == len(MS_SSIM_WEIGHTS) - 1
        value = similarity if is_last else contrast[..., radius:-radius, radius:-radius]
        product = product * value.flatten(1).mean(1).relu() ** weight
        images, references = F.avg_pool2d(images, 2), F.avg_pool2d(references, 2)
    return product


def check_side(images: torch.Tensor, smallest: int) -> None:
    """Refuse pictures with a side of fewer pixels than the window needs."""
    if min(images.shape[2:]) < smallest:
        raise ValueError(f"`images` are {images.shape[3]}×{images.shape[2]} pixels; a side needs at least {smallest}.")


def compute_ssim_maps(images: torch.Tensor, references: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute structural similarity and its contrast-structure factor at every pixel, (batch, 3, height, width)."""
    moments = torch.cat([images, references, images.square(), references.square(), images * references])
    mean, reference_mean, square, reference_square, product = apply_gaussian_window(moments).chunk(5)
    variance = (square - mean.square()).clamp(min=0)
    reference_variance = (reference_square - reference_mean.square()).clamp(min=0)
    covariance = product - mean * reference_mean
    contrast = (2 * covariance + SSIM_C2) / (variance + reference_variance + SSIM_C2)
    luminance = (2 * mean * reference_mean + SSIM_C1) / (mean.square() + reference_mean.square() + SSIM_C1)
    return luminance * contrast, contrast


def apply_gaussian_window(maps: torch.Tensor) -> torch.Tensor:
    """Average maps (batch, channels, height, width) over the Gaussian window, mirrored at the edges."""
    radius = SSIM_WINDOW // 2
    window = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=maps.dtype) / SSIM_SIGMA).square())
    window = window / window.sum()
    maps = F.pad(maps, (radius, radius, radius, radius), mode="reflect")
    # Shifted copies, one after the other: a fourth of the time that conv2d takes in float64 on a CPU.
    for dim in (2, 3):
        size = maps.shape[dim] - 2 * radius
        average = torch.zeros_like(maps.narrow(dim, 0, size))
        for offset, weight in enumerate(window.tolist()):
            average.add_(maps.narrow(dim, offset, size), alpha=weight)
        maps = average
    return maps


def compute_cosine_similarity(embeds: torch.Tensor, reference_embeds: torch.Tensor) -> torch.Tensor:
    """Compute the cosine, in [−1, 1], between embeddings (batch, dim): CLIP-I, CLIP-T and DINO similarity.

    Source: MagicBrush (arXiv 2306.10012), section 4.1.
    """
    return F.cosine_similarity(embeds.cpu().double(), reference_embeds.cpu().double(), dim=1)


def compute_clip_similarity(image_embeds: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
    """Compute the CLIP score, in [0, 100], of image and text embeddings (batch, dim): 100 times the cosine, or 0.

    Source: CLIPScore (arXiv 2104.08718), section 3, with the weight 100 of torchmetrics.
    """
    return (100 * compute_cosine_similarity(image_embeds, prompt_embeds)).clamp(min=0)


def compute_structure_distance(keys: torch.Tensor, reference_keys: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared difference between the self-similarities of two pictures' keys, for each picture.

    Args:
        keys, reference_keys (`torch.Tensor` of shape `(batch, tokens, dim)`): What the tokens of a vision transformer
            are attended by. A self-similarity is the matrix of cosines between all tokens.

    Source: Tumanyan et al., "Splicing ViT features for semantic appearance transfer" (arXiv 2201.00424), equation 3.
    """
    difference = compute_self_similarity(keys) - compute_self_similarity(reference_keys)
    return difference.square().flatten(1).mean(1)


def compute_self_similarity(keys: torch.Tensor) -> torch.Tensor:
    """Compute the cosines (batch, tokens, tokens) between the keys (batch, tokens, dim) of each picture."""
    keys = keys.cpu().double()
    lengths = keys.norm(dim=2, keepdim=True)
    return (keys @ keys.mT) / (lengths @ lengths.mT).clamp(min=MIN_LENGTH_PRODUCT)
