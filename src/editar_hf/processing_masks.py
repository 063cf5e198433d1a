"""Masks: which tokens of a picture may change, how the result is laid over the source, and which window is edited.

A mask is a picture as large as its source, white where the picture may change. It becomes an edit mask, a value for
each token; a feather, a weight for each pixel; and where wanted a window of the source around the white. A mask goes
through the same geometry as its source.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter

from .image_processing_editar import MAX_SILENT_CUT, compute_crop_geometry, open_image, prepare_rgb_image


# From this grey on, of 0 to 255, a pixel of a mask is white.
WHITE = 128
# A pixel of a clean mask is black or white, within these greys; other colours are coloured if their channels differ by
# more; of what is drawn on transparency this part may be neither.
CLEAN_TOLERANCE = 32
MAX_UNCLEAN_FRACTION = 0.01
# How much larger than the white part of its mask a window is, per side: what is around tells the model where it is.
WINDOW_MARGIN = 1.5


def prepare_mask(mask_image: Image.Image | np.ndarray | torch.Tensor, source_size: tuple[int, int]) -> np.ndarray:
    """Bring a mask to bool (height, width), True where it is white, at the size of its source.

    Args:
        mask_image (`PIL.Image.Image`, array, tensor, path or URL): The mask; read as `prepare_rgb_image` does,
            and arrays and tensors of bool as well. A pixel is white if its luminance is 128 or more of 255, whatever
            its colour. Transparency is black: a white stroke on nothing frees the stroke.
        source_size (`tuple[int, int]`): Width and height of the source, in pixels.

    Raises:
        ValueError: If it is no picture, or of other proportions than the source; or if it has transparency and what is
            drawn on it is no white mask, as where transparency means what may change.
    """
    if isinstance(mask_image, np.ndarray | torch.Tensor) and mask_image.dtype in (bool, torch.bool):
        mask_image = mask_image * np.uint8(255) if isinstance(mask_image, np.ndarray) else mask_image.byte() * 255
    if isinstance(mask_image, str | Path):
        mask_image = open_image(mask_image, "mask_image")  # once, for the two readings below
    picture = prepare_rgb_image(mask_image, background="black", name="mask_image")
    check_transparency(picture, prepare_rgb_image(mask_image, background="white", name="mask_image"))
    mask = picture.convert("L")
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


def check_transparency(on_black: Image.Image, on_white: Image.Image):
    """Refuse a mask with transparency whose opaque part is no mask; given as it looks on black and on white.

    White strokes on nothing free the strokes. Elsewhere (OpenAI) a transparent part of the photograph is what may
    change. The opaque part tells them apart: white strokes are black and white, with greys no more than two pixels wide
    at their edges.
    """
    # They differ by 255 less the alpha channel.
    is_opaque = np.asarray(ImageChops.difference(on_white, on_black).convert("L")) < 256 - WHITE
    if is_opaque.all() or not is_opaque.any():
        return
    on_black, on_white = np.asarray(on_black), np.asarray(on_white)
    highest, lowest = on_black.max(axis=2), on_white.min(axis=2)
    is_unclean = is_opaque & (highest > CLEAN_TOLERANCE) & (lowest < 255 - CLEAN_TOLERANCE)
    most = MAX_UNCLEAN_FRACTION * is_opaque.sum()
    if is_unclean.sum() > most:  # the filter is slow
        is_near_clean = np.asarray(Image.fromarray(~is_unclean).convert("L").filter(ImageFilter.MaxFilter(5))) > 0
        is_coloured = np.ptp(on_black, axis=2) > CLEAN_TOLERANCE
        is_unclean &= is_coloured | ~is_near_clean
    if is_unclean.sum() > most or not (is_opaque & (highest >= WHITE)).any():
        raise ValueError(
            "`mask_image` has transparency, and what is opaque is no white mask. Pass a mask that is white where the "
            "image may change. If its transparent part is what may change, pass "
            '`ImageChops.invert(mask.getchannel("A"))`, with `mask` in mode "RGBA".'
        )


def compute_coverage(is_white: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Compute the white part of every pixel, in [0, 1], of a mask resized to (width, height); no stroke is too thin."""
    mask = Image.fromarray(is_white.astype(np.float32))
    return np.asarray(mask.resize(size, Image.Resampling.BOX))


def compute_edit_mask(is_white: np.ndarray, height: int, width: int, stride: int, resize_mode: str) -> torch.BoolTensor:
    """Compute which tokens may change, bool (height / stride, width / stride): those with any white pixel.

    Args:
        is_white (`np.ndarray`): Bool (height, width) at the size of the source.
        height, width (`int`): Pixels the model works at.
        stride (`int`): Pixels per token and side.
        resize_mode (`str`): How the source is brought there.
    """
    if resize_mode == "stretch":
        coverage = compute_coverage(is_white, (width, height))
    else:
        crop = compute_crop_geometry(*is_white.shape, height, width)
        coverage = compute_coverage(is_white, (crop.resized_width, crop.resized_height))
        coverage = coverage[crop.top : crop.top + height, crop.left : crop.left + width]
    tokens = torch.from_numpy(coverage > 0).unflatten(0, (-1, stride)).unflatten(2, (-1, stride))
    return tokens.any(dim=3).any(dim=1)


def describe_lost_white(is_white: np.ndarray, height: int, width: int, resize_mode: str) -> str | None:
    """Say why of a mask less may change than its owner may think; `None` where all is well.

    Args:
        is_white (`np.ndarray`): Bool (height, width) at the size of the source.
        height, width (`int`): Pixels the model works at.
        resize_mode (`str`): How the source is brought there.
    """
    num_white = is_white.sum()
    if not num_white:
        return (
            f"`mask_image` is white nowhere in an image, whose source is returned; white is {WHITE} to 255, so pass a "
            "mask of 0 and 1 as bool."
        )
    if resize_mode == "stretch":
        return None
    left, top, right, bottom = compute_crop_geometry(*is_white.shape, height, width).box
    part = 1 - is_white[top:bottom, left:right].sum() / num_white
    if part <= MAX_SILENT_CUT:
        return None
    return (
        f"Of the white of `mask_image` {part:.0%} lies in what the centre crop cuts away, and cannot change; pass "
        '`resize_mode="stretch"`, a `height` and `width` of the image\'s proportions, or `crop_to_mask=True`.'
    )


def compute_feather(edit_mask: torch.BoolTensor, stride: int) -> torch.Tensor:
    """Compute the weight of the edited picture, (batch, 1, height, width) in [0, 1], from masks (batch, rows, columns).

    1 on every pixel of a free token, falling linearly to 0 over one token around it, along rows, columns and diagonals
    alike.
    """
    free = edit_mask[:, None].repeat_interleave(stride, 2).repeat_interleave(stride, 3).float()
    # The mean over discs of growing size: a pixel d pixels outside lies in all but the first d of `stride` discs.
    grown = [F.max_pool2d(free, 2 * radius + 1, stride=1, padding=radius) for radius in range(stride)]
    return torch.stack(grown).mean(dim=0)


def apply_blend(edited: torch.Tensor, source: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Lay the edited picture over the source; where its weight is 0 or 1 the very values of one of them stand."""
    return torch.lerp(source, edited, weights)


class Window(NamedTuple):
    """A rectangle of a picture, in pixels as PIL counts them."""

    left: int
    top: int
    right: int
    bottom: int


def compute_window(is_white: np.ndarray, height: int, width: int) -> Window:
    """Compute the part of a picture around the white of its mask that is edited by itself.

    It has the proportions of `height` × `width`, is half as large again as the white where it can be, and no smaller
    than `height` × `width` where the picture is not. Without white it is in the middle.

    Raises:
        ValueError: If a window of these proportions inside the picture cannot hold all of the white.
    """
    picture_height, picture_width = is_white.shape
    rows, columns = is_white.any(axis=1).nonzero()[0], is_white.any(axis=0).nonzero()[0]
    if not len(rows):
        rows, columns = [picture_height // 2], [picture_width // 2]
    white = Window(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    white_width, white_height = white.right - white.left, white.bottom - white.top
    # In units of the model's size; the largest that fits inside the picture bounds it.
    scale = max(1, WINDOW_MARGIN * white_width / width, WINDOW_MARGIN * white_height / height)
    scale = min(scale, picture_width / width, picture_height / height)
    window_width, window_height = min(round(width * scale), picture_width), min(round(height * scale), picture_height)
    if white_width > window_width or white_height > window_height:
        raise ValueError(
            f"`mask_image` is white over {white_width}×{white_height} pixels, more than a window of the proportions of "
            f"{width}×{height} inside the image can hold; leave `crop_to_mask` out, or pass another `height` and "
            "`width`."
        )
    left = (white.left + white.right - window_width) // 2
    top = (white.top + white.bottom - window_height) // 2
    left = min(max(left, 0), picture_width - window_width)
    top = min(max(top, 0), picture_height - window_height)
    return Window(left, top, left + window_width, top + window_height)
