"""Sources of a pipeline's call: pictures, their tokens or their cache, and the masks that say what of them may change.

Here they are prepared, encoded, and met again at the end, when a result is laid over its source and brought back to its
size.
"""

import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ImageInput

from ..generation import SourceCache
from ..image_processing_editar import list_images, prepare_rgb_image
from ..processing_masks import (
    Window,
    apply_blend,
    compute_edit_mask,
    compute_feather,
    compute_window,
    describe_lost_white,
    prepare_mask,
)
from .callbacks import RowPreview
from .inputs import SourceArguments, check_cached_pictures, compute_batch_size


@dataclass
class Sources:
    """What a call edits, prepared.

    Args:
        pictures (`list[Image.Image]`, *optional*): Upright RGB, or the windows cut out of them.
        pixel_values (`torch.Tensor` of shape `(pictures, 3, height, width)`, *optional*): In [−1, 1].
        image_tokens (`torch.LongTensor` of shape `(pictures, N)`, *optional*): Where they are known.
        cache (`SourceCache`, *optional*): Where there is one.
        masks (`list[np.ndarray]`, *optional*): Bool (height, width) each, at the size of its picture.
        frames (`list[tuple[Image.Image, Window]]`, *optional*): Whole images, and where in them the pictures lie.
        resize_mode (`str`): How the pictures were brought to the model's size.
    """

    pictures: list[Image.Image] | None
    pixel_values: torch.Tensor | None
    image_tokens: torch.LongTensor | None
    cache: SourceCache | None
    masks: list[np.ndarray] | None
    frames: list[tuple[Image.Image, Window]] | None
    resize_mode: str

    def count(self) -> dict[str, list | torch.Tensor | SourceCache | None]:
        """Name what takes part in pairing inputs up."""
        return {
            "image": self.pictures,
            "mask_image": self.masks,
            "source_image_tokens": self.image_tokens,
            "source_cache": self.cache,
        }


@dataclass
class EditRegion:
    """Where the images of a batch may differ from their sources.

    Args:
        edit_mask (`torch.BoolTensor` of shape `(batch, N)`): True for tokens that may change.
        weights (`torch.Tensor` of shape `(batch, 1, height, width)`): How much of the result shows, in [0, 1].
        pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): The sources, in [−1, 1].
    """

    edit_mask: torch.BoolTensor
    weights: torch.Tensor
    pixel_values: torch.Tensor


def prepare_pictures(image: ImageInput) -> list[Image.Image]:
    """Make upright RGB of the pictures of an `image` argument."""
    pictures = [prepare_rgb_image(picture, name="image") for picture in list_images(image)]
    if not pictures:
        raise ValueError("`image` is an empty list; pass at least one picture.")
    return pictures


def pair_up(pictures: list, masks: list) -> list[tuple]:
    """Pair pictures and masks; one picture serves many masks, one mask many pictures."""
    count = compute_batch_size(image=pictures, mask_image=masks)
    return [(pictures[index % len(pictures)], masks[index % len(masks)]) for index in range(count)]


class EditARSourcesMixin:
    """Sources and regions of `EditARPipeline`."""

    @torch.no_grad()
    def encode_image(
        self, image: ImageInput, height: int | None = None, width: int | None = None, resize_mode: str | None = None
    ) -> torch.LongTensor:
        """Encode pictures as tokens, `(batch, N)` in raster order: `source_image_tokens` for any number of calls.

        Args:
            image: A picture, a batch, or a list of either; see `__call__`.
            height, width (`int`, *optional*): Pixels the model works at; default the model's.
            resize_mode (`str`, *optional*): `"crop"` or `"stretch"`; default the model's.

        Raises:
            ValueError: If an image is not an image, or the size or the mode does not fit.
        """
        return self.encode_pixel_values(self.prepare_pixel_values(image, height, width, resize_mode))

    def encode_pixel_values(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """Encode prepared pixels `(batch, 3, height, width)` in [−1, 1] as tokens."""
        return self.vq_model.encode(pixel_values.to(self._execution_device)).image_tokens

    def prepare_pixel_values(
        self, image: ImageInput, height: int | None, width: int | None, resize_mode: str | None
    ) -> torch.Tensor:
        """Bring pictures to pixels `(batch, 3, height, width)` in [−1, 1]."""
        height, width = self.resolve_size(height, width)
        pictures = prepare_pictures(image)
        return self.processor(images=pictures, height=height, width=width, resize_mode=resize_mode).source_pixel_values

    @torch.no_grad()
    def prepare_source_cache(
        self, image: ImageInput, height: int | None = None, width: int | None = None, resize_mode: str | None = None
    ) -> SourceCache:
        """Compute what the networks know of pictures before any instruction: `source_cache` for any number of calls.

        A call with it neither encodes its source nor runs it through the decoder. It holds 180 MiB for a picture of the
        published size in bf16, and becomes invalid when the decoder's weights or adapters change: calls refuse it then.

        Args:
            image: A picture, a batch, or a list of either; see `__call__`.
            height, width (`int`, *optional*): Pixels the model works at; default the model's.
            resize_mode (`str`, *optional*): `"crop"` or `"stretch"`; default the model's.

        Raises:
            ValueError: If an image is not an image, or the size or the mode does not fit.
        """
        pixel_values = self.prepare_pixel_values(image, height, width, resize_mode)
        grid = self.compute_grid(*pixel_values.shape[-2:])
        cache = self.transformer.prepare_source_cache(self.encode_pixel_values(pixel_values), *grid)
        cache.pixel_values = pixel_values
        self.maybe_free_model_hooks()
        return cache

    def prepare_sources(self, given: SourceArguments, size: tuple[int, int]) -> Sources:
        """Prepare pictures and masks, and cut windows where they are asked for; no network runs."""
        height, width = size
        resize_mode = self.processor.image_processor.resize_mode if given.resize_mode is None else given.resize_mode
        pictures = None
        if given.image is not None:
            pictures = prepare_pictures(given.image)
        masks, frames = None, None
        if given.mask_image is not None:
            masks = list_images(given.mask_image)
            pairs = pair_up(pictures or [Image.new("RGB", (width, height))], masks)
            masks = [prepare_mask(mask, picture.size) for picture, mask in pairs]
        if given.crop_to_mask:
            windows = [compute_window(mask, height, width) for mask in masks]
            frames = [(photograph, window) for (photograph, _), window in zip(pairs, windows, strict=True)]
            pictures = [photograph.crop(window) for photograph, window in frames]
            masks = [mask[w.top : w.bottom, w.left : w.right] for mask, w in zip(masks, windows, strict=True)]
            resize_mode = "stretch"  # a window has the proportions of the model's size
        pixel_values = None
        if pictures is not None:
            pixel_values = self.prepare_pixel_values(pictures, height, width, resize_mode)
        check_cached_pictures(given.source_cache, pixel_values)
        return Sources(
            pictures, pixel_values, given.source_image_tokens, given.source_cache, masks, frames, resize_mode
        )

    def encode_sources(self, sources: Sources) -> torch.LongTensor | None:
        """Give the tokens of the sources, encoding pictures where they are not known."""
        if sources.cache is not None:
            return sources.cache.source_image_tokens
        if sources.image_tokens is not None or sources.pixel_values is None:
            return sources.image_tokens
        return self.encode_pixel_values(sources.pixel_values)

    def prepare_region(
        self, sources: Sources, source_image_tokens: torch.LongTensor, size: tuple[int, int], is_blended: bool
    ) -> EditRegion | None:
        """Compute where images may change, for every row of `source_image_tokens`.

        Without blending the result shows everywhere, but for images in which nothing may change.
        """
        if sources.masks is None:
            return None
        stride, num_rows = self.vq_model.config.stride, len(source_image_tokens)
        edit_mask = torch.stack([compute_edit_mask(mask, *size, stride, sources.resize_mode) for mask in sources.masks])
        for message in {describe_lost_white(mask, *size, sources.resize_mode) for mask in sources.masks} - {None}:
            warnings.warn(message, stacklevel=4)  # torch's no_grad stands between the pipeline and its caller
        has_free = edit_mask.flatten(1).any(dim=1)
        weights = has_free.float()[:, None, None, None].expand(-1, 1, *size)
        if is_blended:
            weights = compute_feather(edit_mask, stride)
        edit_mask, weights = (
            rows.repeat_interleave(num_rows // len(rows), dim=0).to(self._execution_device)
            for rows in (edit_mask.flatten(1), weights)
        )
        return EditRegion(edit_mask, weights, self.compute_source_pixels(sources, source_image_tokens, size))

    def compute_source_pixels(
        self, sources: Sources, source_image_tokens: torch.LongTensor | None, size: tuple[int, int]
    ) -> torch.Tensor:
        """Compute the pixels of every row's source: the picture's own, or else those that its tokens draw."""
        pixel_values = sources.pixel_values
        if pixel_values is None and sources.cache is not None:
            pixel_values = sources.cache.pixel_values
        if pixel_values is None:
            return self.vq_model.decode(source_image_tokens, *self.compute_grid(*size)).float()
        pixel_values = pixel_values.to(self._execution_device)
        return pixel_values.repeat_interleave(len(source_image_tokens) // len(pixel_values), dim=0)

    def prepare_preview(
        self,
        sources: Sources,
        rows: dict[str, torch.Tensor | None],
        region: EditRegion | None,
        size: tuple[int, int],
        restore_size: bool,
        rows_per_preview: int | None,
    ) -> RowPreview | None:
        """Begin the previews of a batch with its sources, or with grey where there are none.

        They are laid over the sources and brought to their sizes as the results will be.
        """
        if rows_per_preview is None:
            return None
        if rows["source_image_tokens"] is None:
            pixel_values = torch.zeros(len(rows["prompt_embeds"]), 3, *size, device=self._execution_device)
        else:
            pixel_values = self.compute_source_pixels(sources, rows["source_image_tokens"], size)
        compose = partial(self.compose_images, sources=sources, region=region, size=size, restore_size=restore_size)
        return RowPreview(self, pixel_values, self.compute_grid(*size), rows_per_preview, compose)

    def restore_images(
        self, images: list[Image.Image], sources: Sources, region: EditRegion | None, size: tuple[int, int]
    ) -> list[Image.Image]:
        """Bring results back to the sizes of the pictures they were made from; one picture serves many.

        In a region they are laid over the pictures; a window goes back into its image.
        """
        weights = [None] * len(images) if region is None else region.weights[:, 0].cpu().numpy()
        restored = []
        for index, image in enumerate(images):
            picture = sources.pictures[index * len(sources.pictures) // len(images)]
            image = self.processor.image_processor.restore(image, picture, *size, sources.resize_mode, weights[index])
            if sources.frames is not None:
                photograph, window = sources.frames[index * len(sources.frames) // len(images)]
                whole = photograph.copy()
                whole.paste(image, window[:2])
                image = whole
            restored.append(image)
        return restored

    def draw_images(
        self,
        image_tokens: torch.LongTensor,
        sources: Sources,
        region: EditRegion | None,
        size: tuple[int, int],
        restore_size: bool,
        output_type: str,
        preview: RowPreview | None,
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Draw the results, unless the last preview has, and compose them."""
        if output_type == "tokens":
            return image_tokens
        if preview is not None and preview.is_complete:
            pixel_values = preview.canvas
        else:
            pixel_values = self.vq_model.decode(image_tokens, *self.compute_grid(*size)).float()
        return self.compose_images(pixel_values, sources, region, size, restore_size, output_type)

    def compose_images(
        self,
        pixel_values: torch.Tensor,
        sources: Sources,
        region: EditRegion | None,
        size: tuple[int, int],
        restore_size: bool,
        output_type: str = "pil",
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Lay what was drawn over its sources in a region, and where wanted bring it to their sizes."""
        if restore_size or sources.frames is not None:
            return self.restore_images(self.processor.postprocess(pixel_values), sources, region, size)
        if region is not None:
            pixel_values = apply_blend(pixel_values, region.pixel_values, region.weights)
        return self.processor.postprocess(pixel_values, output_type)
