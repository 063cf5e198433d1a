"""Where an edit may change its source image: which tokens, with which feather, in which window.

A mask is an image as large as its source, white where the source may change. `EditRegion` makes of it an edit mask (a
flag for each token), a feather (a weight for each pixel) and, if the call asks for it, a window of the source around
the white pixels. A mask is resized and cropped exactly as its source.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_utils import ImageInput

from ..image_processing_editar import (
    MAX_SILENT_CUT,
    compute_crop_geometry,
    list_images,
    open_image,
    prepare_rgb_image,
)
from .inputs import compute_batch_size


# A pixel of a mask is white from this grey on, of 0 to 255.
WHITE = 128
# How much larger than the white area a window is, per side: the model needs to see the surroundings.
WINDOW_MARGIN = 1.5


def prepare_mask(mask_image: Image.Image | np.ndarray | torch.Tensor, source_size: tuple[int, int]) -> np.ndarray:
    """Read a mask as bool (height, width), True where it is white, at the size of its source.

    Args:
        mask_image (`PIL.Image.Image`, array, tensor, path or URL): The mask; see `prepare_rgb_image`. A pixel is white
            if its luminance is 128 or more of 255, whatever its colour. Transparency is black: a white stroke on
            nothing frees the stroke.
        source_size (`tuple[int, int]`): Width and height of the source, in pixels.

    Raises:
        ValueError: If it is no image, has other proportions than the source, or has transparent pixels beside opaque
            ones that are not white.
    """
    if isinstance(mask_image, str | Path):
        mask_image = open_image(mask_image, "mask_image")  # Once, for the two calls below.
    on_black, on_white = (prepare_rgb_image(mask_image, colour, "mask_image") for colour in ("black", "white"))
    check_transparency(np.asarray(on_black), np.asarray(on_white))
    mask = on_black.convert("L")
    is_white = np.asarray(mask) >= WHITE
    if mask.size == source_size:
        return is_white
    width, height = source_size
    # Proportions are the same if a side differs by no more than rounding to whole pixels.
    if abs(mask.width * height - mask.height * width) > max(*mask.size, *source_size):
        raise ValueError(
            f"`mask_image` is {mask.width}×{mask.height} pixels and its image {width}×{height}, of other proportions; "
            "pass a mask of the image's size."
        )
    warnings.warn(
        f"`mask_image` is {mask.width}×{mask.height} pixels and its image {width}×{height}; it was resized.",
        stacklevel=2,
    )
    return compute_coverage(is_white, source_size) > 0


def check_transparency(on_black: np.ndarray, on_white: np.ndarray) -> None:
    """Refuse a mask with transparent pixels, unless its opaque pixels are white strokes.

    Other software (OpenAI) passes the source image, transparent where it may change.

    Args:
        on_black, on_white (`np.ndarray`): The mask over a black and over a white background, uint8 (height, width, 3).
    """
    # The difference is 255 minus the alpha channel.
    is_opaque = (on_white - on_black).max(axis=2) < 256 - WHITE
    # Some software darkens soft edges by their transparency, which makes them at least 191 over white.
    if not is_opaque.all() and (on_white[is_opaque] < 190).any(axis=1).sum() > 0.01 * is_opaque.sum():
        raise ValueError(
            "`mask_image` has transparency, and what is opaque is not white. Pass a mask that is white where the image "
            "may change. If its transparent part is what may change, pass "
            '`ImageChops.invert(mask.getchannel("A"))`, with `mask` in mode "RGBA".'
        )


def compute_coverage(is_white: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask to (width, height); return the white fraction of every pixel, above 0 for the thinnest stroke."""
    mask = Image.fromarray(is_white.astype(np.float32))
    return np.asarray(mask.resize(size, Image.Resampling.BOX))


def compute_edit_mask(is_white: np.ndarray, height: int, width: int, stride: int, resize_mode: str) -> torch.Tensor:
    """Compute which tokens may change, bool (height / stride, width / stride): those with any white pixel.

    Args:
        is_white (`np.ndarray`): Bool (height, width) at the size of the source.
        height, width (`int`): Pixels the model works at.
        stride (`int`): Pixels per token and side.
        resize_mode (`str`): How the source is brought there.
    """
    source_height, source_width = is_white.shape
    crop = compute_crop_geometry(source_height, source_width, height, width, resize_mode)
    coverage = compute_coverage(is_white, (crop.resized_width, crop.resized_height))
    coverage = coverage[crop.top : crop.top + height, crop.left : crop.left + width]
    tokens = torch.from_numpy(coverage > 0).unflatten(0, (-1, stride)).unflatten(2, (-1, stride))
    return tokens.any(dim=3).any(dim=1)


def describe_lost_white(is_white: np.ndarray, height: int, width: int, resize_mode: str) -> str | None:
    """Say why less may change than a mask seems to ask for; return `None` if all of it may.

    The arguments are those of `compute_edit_mask`.
    """
    if not is_white.any():
        return (
            f"`mask_image` is white nowhere in an image, whose source is returned; white is {WHITE} to 255, so pass a "
            "mask of 0 and 1 as bool."
        )
    source_height, source_width = is_white.shape
    left, top, right, bottom = compute_crop_geometry(source_height, source_width, height, width, resize_mode).box
    part = 1 - is_white[top:bottom, left:right].sum() / is_white.sum()
    if part <= MAX_SILENT_CUT:
        return None
    return (
        f"Of the white of `mask_image` {part:.0%} lies in what the centre crop cuts away, and cannot change; pass "
        '`resize_mode="stretch"`, a `height` and `width` of the image\'s proportions, or `crop_to_mask=True`.'
    )


def compute_feather(edit_mask: torch.Tensor, stride: int) -> torch.Tensor:
    """Compute the weight of the result in each pixel, (batch, 1, height, width) in [0, 1].

    It is 1 on every pixel of a token that may change, and falls linearly to 0 over the width of one token, along rows,
    columns and diagonals.

    Args:
        edit_mask (`torch.BoolTensor` of shape `(batch, rows, columns)`): Which tokens may change.
        stride (`int`): Pixels per token and side.
    """
    free = edit_mask[:, None].repeat_interleave(stride, 2).repeat_interleave(stride, 3).float()
    # The mean over squares of growing size: a pixel that is d pixels outside lies in all but d of the `stride` squares.
    grown = [F.max_pool2d(free, 2 * radius + 1, stride=1, padding=radius) for radius in range(stride)]
    return torch.stack(grown).mean(dim=0)


def compute_window(is_white: np.ndarray, height: int, width: int) -> tuple[int, ...]:
    """Compute the window of an image, around the white pixels of its mask, that is edited by itself.

    The window has the proportions of `height` × `width`. Its sides are 1.5 times those of the white area, and at least
    `height` × `width`, as far as the image allows. Without white pixels it is in the middle of the image.

    Returns:
        Left, top, right and bottom, in pixels as PIL counts them.

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
            f"`mask_image` is white over {'×'.join(map(str, last - first))} pixels, more than a window of the "
            f"proportions of {width}×{height} inside the image can hold; leave `crop_to_mask` out, or pass another "
            "`height` and `width`."
        )
    corner = np.clip((first + last - window_size) // 2, 0, image_size - window_size)
    return *corner.tolist(), *(corner + window_size).tolist()


def repeat_rows(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Repeat each row for the images made of it: 0, 0, …, 1, 1, ….

    `rows` has one row, or a number of rows that divides `num_rows`.
    """
    return rows.repeat_interleave(num_rows // len(rows), dim=0)


@dataclass
class EditRegion:
    """Where the results of a call may differ from their source images.

    Args:
        edit_mask (`torch.BoolTensor` of shape `(batch, N)`): True for tokens that may change.
        weights (`torch.Tensor` of shape `(batch, 1, height, width)`): Share of the result in each pixel, in [0, 1].
        windows (`torch.LongTensor` of shape `(batch, 4)`): The parts of the images that are edited: left, top, right
            and bottom, in pixels as PIL counts them.
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
        """Read masks and pair them with images; one mask serves many images, one image many masks.

        Args:
            mask_image: A mask, a batch, or a list of either; see `prepare_mask`.
            images (sequence of `Image.Image`): The source images.
            size (`tuple[int, int]`): Height and width the model works at, in pixels.
            stride (`int`): Pixels per token and side.
            resize_mode (`str`): How the images are brought to that size.
            mask_blend (`bool`): Feather the result into the source. Without it, the result shows everywhere, except
                for masks without white.
            crop_to_mask (`bool`): Edit a window around the white.
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
            warnings.warn(message, stacklevel=4)  # torch's no_grad is between the pipeline and its caller.
        edit_mask = torch.stack([compute_edit_mask(mask, *size, stride, resize_mode) for mask in masks])
        if mask_blend:
            weights = compute_feather(edit_mask, stride)
        else:
            weights = edit_mask.flatten(1).any(dim=1).float()[:, None, None, None].expand(-1, 1, *size)
        return cls(edit_mask.flatten(1), weights, torch.tensor(windows))

    def crop(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Cut the windows out of the images."""
        return [images[i % len(images)].crop(window) for i, window in enumerate(self.windows.tolist())]

    def repeat_rows(self, num_rows: int, device: torch.device) -> Self:
        """Give every image of a batch its row, on the device of the batch."""
        fields = (self.edit_mask, self.weights, self.windows)
        return type(self)(*(repeat_rows(rows, num_rows).to(device) for rows in fields))
