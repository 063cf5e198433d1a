"""Masked edits: compute the tokens that may change, the blend weights of pixels, and the window that is edited.

A mask is an image of the same size as its source, white where the source may change. From a mask, `EditRegion` computes
an edit mask (a flag for each token), a feather (a blend weight for each pixel) and, with `crop_to_mask`, a window of
the source around the white pixels. A mask is resized and cropped exactly like its source.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_utils import ImageInput

from ..checks import warn_caller
from ..image_processing_editar import (
    MAX_SILENT_CUT,
    compute_crop_geometry,
    list_images,
    open_image,
    prepare_rgb_image,
)
from .inputs import compute_batch_size


# A mask pixel counts as white if its gray value, 0 to 255, is at least this.
WHITE = 128
# An edit is taken to change the whole image if more than this fraction of the tokens are above half the threshold. With
# that of the scene editor, the fraction was at most 0.75 in 300 edits of objects, and above in 59 of 60 edits of the
# whole image. The fraction above the threshold itself separates them less well.
MAX_CHANGED_FRACTION = 3 / 4
# Side of a window relative to the side of the white area. It is above 1, because the model needs to see context.
WINDOW_MARGIN = 1.5


def prepare_mask(mask_image: Image.Image | np.ndarray | torch.Tensor, source_size: tuple[int, int]) -> np.ndarray:
    """Read a mask as a bool array (height, width) at the size of its source, True where the mask is white.

    Args:
        mask_image (`PIL.Image.Image`, array, tensor, path or URL): The mask; see `prepare_rgb_image`. A pixel is white
            if its luminance is at least 128 of 255. Transparent pixels are black, so white strokes on a transparent
            background are a valid mask.
        source_size (`tuple[int, int]`): Width and height of the source, in pixels.

    Raises:
        ValueError: If the mask is not an image, its proportions differ from those of the source, or it has both
            transparent pixels and opaque pixels that are not white.
    """
    if isinstance(mask_image, str | Path):
        mask_image = open_image(mask_image, "mask_image")  # Open it only once for the two calls below.
    on_black, on_white = (prepare_rgb_image(mask_image, color, "mask_image") for color in ("black", "white"))
    check_transparency(np.asarray(on_black), np.asarray(on_white))
    mask = on_black.convert("L")
    is_white = np.asarray(mask) >= WHITE
    if mask.size == source_size:
        return is_white
    width, height = source_size
    # Proportions are equal if the sides differ only by rounding to whole pixels.
    if abs(mask.width * height - mask.height * width) > max(*mask.size, *source_size):
        raise ValueError(
            f"`mask_image` is {mask.width}×{mask.height} pixels and its image is {width}×{height}, so their "
            "proportions differ; pass a mask of the size of the image."
        )
    warn_caller(
        f"`mask_image` is {mask.width}×{mask.height} pixels and its image is {width}×{height}; the mask was resized."
    )
    return compute_coverage(is_white, source_size) > 0


def check_transparency(on_black: np.ndarray, on_white: np.ndarray) -> None:
    """Check that a mask is either opaque, or has white strokes on a transparent background.

    OpenAI's API uses another convention, which is refused here: the source image, transparent where it may change.

    Args:
        on_black, on_white (`np.ndarray`): The mask over a black and over a white background, uint8 (height, width, 3).
    """
    # The difference is 255 minus the alpha channel.
    is_opaque = (on_white - on_black).max(axis=2) < 256 - WHITE
    # Some software darkens soft edges by their transparency, which makes them at least 191 over white.
    if not is_opaque.all() and (on_white[is_opaque] < 190).any(axis=1).sum() > 0.01 * is_opaque.sum():
        raise ValueError(
            "`mask_image` has transparent pixels, and its opaque pixels are not white. Pass a mask that is white where "
            "the image may change. If the image may change where the mask is transparent, pass "
            '`ImageChops.invert(mask.getchannel("A"))`, with `mask` in mode "RGBA".'
        )


def compute_coverage(is_white: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask to (width, height); return the white fraction of each pixel, above 0 for thin strokes too."""
    mask = Image.fromarray(is_white.astype(np.float32))
    return np.asarray(mask.resize(size, Image.Resampling.BOX))


def resize_mask(is_white: np.ndarray, height: int, width: int, resize_mode: str) -> np.ndarray:
    """Resize and crop a mask like its source, bool (height, width): True for pixels with at least some white.

    Args:
        is_white (`np.ndarray`): The mask at the size of the source, bool.
        height, width (`int`): Size of the result in pixels.
        resize_mode (`str`): How the source is resized to that size.
    """
    source_height, source_width = is_white.shape
    crop = compute_crop_geometry(source_height, source_width, height, width, resize_mode)
    coverage = compute_coverage(is_white, (crop.resized_width, crop.resized_height))
    return coverage[crop.top : crop.top + height, crop.left : crop.left + width] > 0


def resize_masks(
    mask_image: ImageInput, images: Sequence[Image.Image], height: int, width: int, resize_mode: str
) -> list[np.ndarray]:
    """Read masks, pair them with images, and resize and crop them like the images, bool (height, width).

    One mask is used for all images, or one image for all masks. The arguments are those of `EditRegion.from_masks` and
    of `resize_mask`.
    """
    masks = list_images(mask_image)
    resized = []
    for index in range(compute_batch_size(image=images, mask_image=masks)):
        is_white = prepare_mask(masks[index % len(masks)], images[index % len(images)].size)
        message = describe_lost_white(is_white, height, width, resize_mode)
        if is_white.any() and message is not None:
            warn_caller(message)
        resized.append(resize_mask(is_white, height, width, resize_mode))
    return resized


def compute_edit_mask(is_white: np.ndarray, height: int, width: int, stride: int, resize_mode: str) -> torch.Tensor:
    """Compute which tokens may change, bool (height / stride, width / stride): those with at least one white pixel.

    Args:
        is_white (`np.ndarray`): The mask at the size of the source, bool (height, width).
        height, width (`int`): Size the model works at, in pixels.
        stride (`int`): Pixels per side of a token.
        resize_mode (`str`): How the source is resized to that size.
    """
    resized = resize_mask(is_white, height, width, resize_mode)
    tokens = torch.from_numpy(resized).unflatten(0, (-1, stride)).unflatten(2, (-1, stride))
    return tokens.any(dim=3).any(dim=1)


def describe_lost_white(is_white: np.ndarray, height: int, width: int, resize_mode: str) -> str | None:
    """Return a warning if the mask has no white pixels, or if the center crop cuts away some of them; else `None`.

    The arguments are those of `compute_edit_mask`.
    """
    if not is_white.any():
        return (
            f"`mask_image` has no white pixels for an image, so its source is returned unchanged. White is {WHITE} to "
            "255; pass a mask of 0 and 1 as bool."
        )
    source_height, source_width = is_white.shape
    left, top, right, bottom = compute_crop_geometry(source_height, source_width, height, width, resize_mode).box
    part = 1 - is_white[top:bottom, left:right].sum() / is_white.sum()
    if part <= MAX_SILENT_CUT:
        return None
    return (
        f"The center crop cuts away {part:.0%} of the white pixels of `mask_image`, where the image cannot change. "
        'Pass `resize_mode="stretch"`, a `height` and `width` with the proportions of the image, or '
        "`crop_to_mask=True`."
    )


def average_neighbors(values: torch.Tensor) -> torch.Tensor:
    """Average values of tokens, (batch, rows, columns), over their 3 × 3 neighborhoods inside the grid."""
    return F.avg_pool2d(values[:, None], 3, stride=1, padding=1, count_include_pad=False)[:, 0]


def find_edited_tokens(edit_map: torch.Tensor, threshold: float) -> torch.Tensor:
    """Find the tokens that may change, bool (batch, rows, columns): those whose value is above a threshold.

    If more than three quarters of the tokens of an image are above half the threshold, all its tokens may change.

    Args:
        edit_map (`torch.Tensor` of shape `(batch, rows, columns)`): That of `EditARPipeline.compute_edit_map`, in
            nats.
        threshold (`float`): In nats.
    """
    is_whole = (edit_map > threshold / 2).float().mean(dim=(1, 2), keepdim=True) > MAX_CHANGED_FRACTION
    return (edit_map > threshold) | is_whole


def compute_feather(edit_mask: torch.Tensor, stride: int) -> torch.Tensor:
    """Compute the blend weight of the result in each pixel, (batch, 1, height, width) in [0, 1].

    The weight is 1 on all pixels of the tokens that may change. Outside them it falls linearly to 0 over the width of
    one token, along rows, columns and diagonals.

    Args:
        edit_mask (`torch.BoolTensor` of shape `(batch, rows, columns)`): True for tokens that may change.
        stride (`int`): Pixels per side of a token.
    """
    free = edit_mask[:, None].repeat_interleave(stride, 2).repeat_interleave(stride, 3).float()
    # The mean of masks grown by 0 … stride − 1 pixels: a pixel at distance d is inside all but d of these masks.
    grown = [F.max_pool2d(free, 2 * radius + 1, stride=1, padding=radius) for radius in range(stride)]
    return torch.stack(grown).mean(dim=0)


def compute_window(is_white: np.ndarray, height: int, width: int) -> tuple[int, ...]:
    """Compute the window of an image, around the white pixels of its mask, that the model edits.

    The window has the proportions of `height` × `width`. Its sides are 1.5 times those of the white area, and at least
    `height` × `width`, but not larger than the image. Without white pixels, it is in the middle of the image.

    Returns:
        Left, top, right and bottom in pixels, as in PIL.

    Raises:
        ValueError: If a window of these proportions inside the image cannot hold all white pixels.
    """
    image_size, size = np.array(is_white.shape[::-1]), np.array([width, height])
    box = Image.fromarray(is_white).getbbox() or (*image_size // 2, *image_size // 2)
    first, last = np.array(box[:2]), np.array(box[2:])
    # In units of the model's size; the window must fit into the image.
    scale = min(max(1, *WINDOW_MARGIN * (last - first) / size), *image_size / size)
    window_size = np.minimum(np.round(size * scale).astype(int), image_size)
    if (last - first > window_size).any():
        raise ValueError(
            f"`mask_image` has a white area of {'×'.join(map(str, last - first))} pixels, which does not fit into a "
            f"window with the proportions of {width}×{height} inside the image; leave `crop_to_mask` out, or pass "
            "another `height` and `width`."
        )
    corner = np.clip((first + last - window_size) // 2, 0, image_size - window_size)
    return *corner.tolist(), *(corner + window_size).tolist()


def repeat_rows(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Repeat each row equally often, in the order 0, 0, …, 1, 1, …, to get `num_rows` rows.

    `num_rows` must be a multiple of the number of rows.
    """
    return rows.repeat_interleave(num_rows // len(rows), dim=0)


@dataclass
class EditRegion:
    """The parts of the source images that a call may change.

    Args:
        edit_mask (`torch.BoolTensor` of shape `(batch, N)`): True for tokens that may change.
        weights (`torch.Tensor` of shape `(batch, 1, height, width)`): Blend weight of the result in each pixel, in
            [0, 1].
        windows (`torch.LongTensor` of shape `(batch, 4)`): The windows of the images that are edited: left, top, right
            and bottom in pixels, as in PIL.
    """

    edit_mask: torch.Tensor
    weights: torch.Tensor
    windows: torch.Tensor

    @classmethod
    def from_masks(
        cls,
        mask_image: ImageInput,
        images: Sequence[Image.Image],
        size: tuple[int, int],
        stride: int,
        resize_mode: str,
        mask_blend: bool,
        crop_to_mask: bool,
    ) -> Self:
        """Read masks and pair them with images. One mask is used for all images, or one image for all masks.

        Args:
            mask_image: A mask, a batch, or a list of masks and batches; see `prepare_mask`.
            images (sequence of `Image.Image`): The source images.
            size (`tuple[int, int]`): Height and width the model works at, in pixels.
            stride (`int`): Pixels per side of a token.
            resize_mode (`str`): How the images are resized to that size.
            mask_blend (`bool`): Blend the result into the source with a feather. If False, the result is used for all
                pixels, except if the mask has no white pixels.
            crop_to_mask (`bool`): Edit only a window around the white pixels.
        """
        masks = list_images(mask_image)
        count = compute_batch_size(image=images, mask_image=masks)
        masks = [prepare_mask(masks[i % len(masks)], images[i % len(images)].size) for i in range(count)]
        windows: list[tuple[int, ...]] = [(0, 0, mask.shape[1], mask.shape[0]) for mask in masks]
        if crop_to_mask:
            windows = [compute_window(mask, *size) for mask in masks]
            masks = [
                mask[top:bottom, left:right] for mask, (left, top, right, bottom) in zip(masks, windows, strict=True)
            ]
        for message in filter(None, {describe_lost_white(mask, *size, resize_mode) for mask in masks}):
            warn_caller(message)
        edit_mask = torch.stack([compute_edit_mask(mask, *size, stride, resize_mode) for mask in masks])
        return cls.from_edit_mask(edit_mask, windows, stride, mask_blend)

    @classmethod
    def from_edit_mask(
        cls, edit_mask: torch.Tensor, windows: Sequence[tuple[int, ...]], stride: int, mask_blend: bool
    ) -> Self:
        """Compute the blend weights of an edit mask, bool (batch, rows, columns); see `from_masks`."""
        weights = compute_feather(edit_mask, stride)
        if not mask_blend:
            weights = weights.amax(dim=(1, 2, 3), keepdim=True).expand_as(weights)
        return cls(edit_mask.flatten(1), weights, torch.tensor(windows))

    def crop(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Cut the windows out of the images."""
        return [images[i % len(images)].crop(window) for i, window in enumerate(self.windows.tolist())]

    def repeat_rows(self, num_rows: int, device: torch.device) -> Self:
        """Repeat the rows to `num_rows`, and move them to a device."""
        fields = (self.edit_mask, self.weights, self.windows)
        return type(self)(*(repeat_rows(rows, num_rows).to(device) for rows in fields))
