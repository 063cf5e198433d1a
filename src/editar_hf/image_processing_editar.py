"""Convert images to pixels, and pixels to images.

`prepare_rgb_image` converts everything that a user can pass as an image to an upright RGB image.
`EditARImageProcessor` converts images to pixels in [−1, 1] at the size the model works at, and converts pixels back.
"""

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, overload

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import load_image
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import ImageInput, SizeDict

from .checks import check_choice, check_integer, warn_caller


RESIZE_MODES = ("crop", "stretch")
ASPECTS = ("model", "source")
DETAILS = ("model", "source")
OUTPUT_TYPES = ("pil", "np", "pt")
# The center crop warns if it cuts away more than this fraction of an image.
MAX_SILENT_CUT = 0.02


# Upright RGB


def list_images(images: ImageInput) -> list:
    """List the single images of an image, of a batch, or of a list of images and batches."""
    listed: list = []
    for one in images if isinstance(images, list | tuple) else [images]:
        listed.extend(one if isinstance(one, np.ndarray | torch.Tensor) and one.ndim == 4 else [one])
    return listed


def open_image(source: str | Path, name: str = "images") -> Image.Image:
    """Open the image at a path, or at a URL that starts with `http://` or `https://`.

    Raises:
        ValueError: If the image does not open; the message names the argument `name`, and the path or URL.
    """
    try:
        if str(source).startswith(("http://", "https://")):
            return load_image(str(source), convert_method=lambda image: image)
        return Image.open(Path(source).expanduser())
    # Networks, file systems and PIL's readers raise many types of errors.
    except Exception as error:
        raise ValueError(f"`{name}` is {str(source)!r}, which does not open as an image: {error}") from error


def make_image(array: np.ndarray, name: str = "images") -> Image.Image:
    """Convert an array of shape (height, width) or (height, width, channels) to an 8-bit image.

    Args:
        array (`np.ndarray`): bool, uint8, uint16, or floats in [0, 1]; uint16 and floats are rounded to nearest.
        name (`str`): Name of the argument that holds the array, for messages.

    Raises:
        ValueError: If the array has another shape or dtype, or floats outside [0, 1].
    """
    array = array[:, :, 0] if array.shape[2:] == (1,) else array
    if 0 in array.shape or not (array.ndim == 2 or array.shape[2:] in ((3,), (4,))):
        raise ValueError(
            f"`{name}` holds an image of shape {array.shape}, read as (height, width, channels). Pass arrays of shape "
            "(height, width, channels) or tensors of shape (channels, height, width), with 1, 3 or 4 channels and at "
            "least one pixel."
        )
    if array.dtype == bool:
        array = array * np.uint8(255)
    if array.dtype == np.uint8:
        return Image.fromarray(array)
    if array.dtype.newbyteorder("=") == np.uint16:
        return Image.fromarray(((array.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if array.dtype.kind != "f":
        raise ValueError(f"`{name}` holds pixels of type {array.dtype}; pass uint8, uint16, or floats in [0, 1].")
    if not (array.min() >= 0 and array.max() <= 1):  # This form also refuses NaN.
        raise ValueError(
            f"`{name}` holds floats in [{array.min()}, {array.max()}]; scale them to [0, 1], or pass uint8 pixels."
        )
    return Image.fromarray(np.round(array * 255).astype(np.uint8))


def turn_upright(image: Image.Image, name: str) -> Image.Image:
    """Read the pixels of an image, and rotate it according to its EXIF block. If the block is damaged, only warn."""
    file_name = getattr(image, "filename", None) or "a file"
    try:
        image.load()
    # PIL reads the pixels of a file only now, and its decoders raise many types of errors for damaged data.
    except Exception as error:
        raise ValueError(f"`{name}` holds {file_name!r}, which does not decode: {error}.") from error
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:
        warn_caller(f"The EXIF block of {file_name!r} in `{name}` is damaged ({error}); the image is not rotated.")
        return image.copy()


def prepare_rgb_image(
    image: Image.Image | np.ndarray | torch.Tensor | str | Path, background: str = "white", name: str = "images"
) -> Image.Image:
    """Convert an image to an upright 8-bit RGB image without transparency. The result shares no memory with the input.

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str` or `Path`): A PIL image (mode "I" is read as 16
            bits, mode "F" as [0, 1]), an array (height, width, channels), a tensor (channels, height, width), a path or
            a URL. Arrays and tensors hold bool, uint8, uint16, or floats in [0, 1].
        background (`str`): The color behind transparent pixels; *defaults to* white.
        name (`str`): Name of the argument that holds the image, for messages.

    Raises:
        ValueError: If `image` has another type, does not decode, has no pixels, or has values out of range.
    """
    if isinstance(image, str | Path):
        image = open_image(image, name)
    if isinstance(image, Image.Image):
        image = turn_upright(image, name)
        if image.mode.startswith("I"):
            image = np.asarray(image).clip(0, 65535).astype(np.uint16)
        elif image.mode == "F":
            image = np.asarray(image)
    elif isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
        image = (image.movedim(0, -1) if image.ndim == 3 else image).numpy()
    if isinstance(image, np.ndarray):
        image = make_image(image, name)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"`{name}` holds a {type(image).__name__}, not an image; pass a PIL image, a numpy array, a torch tensor, "
            "a path or a URL."
        )
    if 0 in image.size:
        raise ValueError(
            f"`{name}` holds an image of {image.width}×{image.height} pixels; pass images of at least 1×1 pixel."
        )
    profile = image.info.get("icc_profile") or b""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image.convert("RGB")
    # Keep a color profile only if it describes RGB, not gray or CMYK. Bytes 16 to 19 name its color space
    # (ICC.1:2022, section 7.2).
    image.info = {"icc_profile": profile} if profile[16:20] == b"RGB " else {}
    return image


def prepare_rgb_images(images: ImageInput, name: str = "images") -> list[Image.Image]:
    """Convert an image, a batch (4-D array or tensor), or a list of images and batches to upright RGB images."""
    prepared = [prepare_rgb_image(image, name=name) for image in list_images(images)]
    if not prepared:
        raise ValueError(f"`{name}` is an empty list; pass at least one image.")
    return prepared


# Sizes


def choose_grid(width: float, height: float, grid_size: int) -> tuple[int, int]:
    """Choose the rows and columns of tokens whose proportions are nearest to `width` : `height`.

    The longer side has `grid_size` tokens, and the shorter side at least half as many.
    """
    ratio = min(width, height) / max(width, height)
    # Proportions differ by a factor, so the nearest ones are those on a log scale.
    sides = range(-(-grid_size // 2), grid_size + 1)
    shorter = min(sides, key=lambda side: abs(math.log(side / grid_size / ratio)))
    return (grid_size, shorter) if height > width else (shorter, grid_size)


class CropGeometry(NamedTuple):
    """The part of an image that the model sees, and its scale.

    Attributes:
        resized_height, resized_width (`int`): Size of the whole image after the resize and before the crop, in pixels.
        top, left (`int`): Top left corner of the crop in the resized image, in pixels.
        box (`tuple[int, int, int, int]`): Left, top, right and bottom of the original pixels that lie completely inside
            the crop, as in PIL.
        cut_fraction (`float`): Fraction of the image's area that is cut away, in [0, 1).
    """

    resized_height: int
    resized_width: int
    top: int
    left: int
    box: tuple[int, int, int, int]
    cut_fraction: float


def compute_crop_geometry(
    source_height: int, source_width: int, height: int, width: int, resize_mode: str = "crop"
) -> CropGeometry:
    """Compute which part of an image is kept at `height`×`width` pixels: its center, or all of it if it is stretched.

    Source: LlamaGen (arXiv 2406.06525) and EditAR, which resize the shortest side and crop the center.

    Raises:
        ValueError: If the image is so thin that no pixel lies completely inside the crop.
    """
    if resize_mode == "stretch":
        return CropGeometry(height, width, 0, 0, (0, 0, source_width, source_height), 0.0)
    scale = max(height / source_height, width / source_width)
    resized_height, resized_width = round(source_height * scale), round(source_width * scale)
    top, left = (resized_height - height) // 2, (resized_width - width) // 2
    box = (
        -(-left * source_width // resized_width),
        -(-top * source_height // resized_height),
        (left + width) * source_width // resized_width,
        (top + height) * source_height // resized_height,
    )
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(
            f"An image has {source_width}×{source_height} pixels; a crop to {width}×{height} would keep less than one "
            'of them. Pass `resize_mode="stretch"`.'
        )
    cut_fraction = 1 - height * width / (resized_height * resized_width)
    return CropGeometry(resized_height, resized_width, top, left, box, cut_fraction)


def apply_crop(
    image: Image.Image,
    crop: CropGeometry,
    height: int,
    width: int,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """Resize and crop an image as `compute_crop_geometry` says, to `height`×`width` pixels."""
    resized = image.resize((crop.resized_width, crop.resized_height), resampling)
    return resized.crop((crop.left, crop.top, crop.left + width, crop.top + height))


# The processor


class EditARImageProcessorKwargs(TypedDict, total=False):
    """The settings of an `EditARImageProcessor`."""

    size: int | dict[str, int] | SizeDict
    resize_mode: str
    aspect: str
    stride: int


class EditARImageProcessor(PilBackend):
    """Convert images to pixels in [−1, 1] at the size the model works at, and convert pixels back to images.

    Args:
        size (`int` or `dict[str, int]`, *optional*): `height` and `width` in pixels; *defaults to* 512×512.
        resize_mode (`str`, *optional*): `"crop"` (default, as published) scales the image until it covers the size, and
            keeps the center; `"stretch"` resizes the image to the size and changes its proportions.
        aspect (`str`, *optional*): What `EditARPipeline` works at unless a call says otherwise: `"model"` (default, as
            published) at `size`, `"source"` at the proportions of the source; see `EditARPipeline.__call__`. Training
            at several aspect ratios sets it to `"source"`. `preprocess` does not use it.
        stride (`int`, *optional*): Pixels per side of a token of the VQ model; *defaults to* 16. Every height and width
            must be a multiple of it.

    Raises:
        ValueError: If `stride` does not divide the size, or `resize_mode` or `aspect` is unknown.

    Source: LlamaGen (arXiv 2406.06525) and EditAR (arXiv 2501.04699), which prepare images in the same way.

    Example:

    ```python
    >>> from PIL import Image
    >>> from editar_hf import EditARImageProcessor
    >>> image_processor = EditARImageProcessor(size=64)
    >>> pixel_values = image_processor(Image.new("RGB", (80, 80), "red")).pixel_values
    >>> pixel_values.shape
    torch.Size([1, 3, 64, 64])
    >>> image_processor.postprocess(pixel_values)[0].getpixel((0, 0))
    (255, 0, 0)

    ```
    """

    valid_kwargs = EditARImageProcessorKwargs

    size = SizeDict(height=512, width=512)
    resize_mode = "crop"
    aspect = "model"
    stride = 16

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._check_arguments(self.size, self.resize_mode)
        check_choice("aspect", self.aspect, ASPECTS)

    def _standardize_kwargs(self, **kwargs: Any) -> dict:
        return super()._standardize_kwargs(**{"default_to_square": True, **kwargs})  # One number sets both sides.

    def _check_arguments(self, size: SizeDict, resize_mode: str) -> None:
        check_integer("stride", self.stride)
        for name in ("height", "width"):
            check_integer(name, getattr(size, name), minimum=self.stride, step=self.stride)
        check_choice("resize_mode", resize_mode, RESIZE_MODES)

    def preprocess(
        self,
        images: ImageInput,
        size: int | dict[str, int] | None = None,
        resize_mode: str | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Convert images to `pixel_values` (batch, 3, height, width) in [−1, 1].

        Args:
            images: An image, a batch (4-D array or tensor), or a list of images and batches; see `prepare_rgb_image`.
            size (`int` or `dict[str, int]`, *optional*): `height` and `width` in pixels; *defaults to* `self.size`.
            resize_mode (`str`, *optional*): `"crop"` or `"stretch"`; *defaults to* `self.resize_mode`.
            return_tensors (`str`): `"pt"` or `"np"`.

        Raises:
            ValueError: If the size is not a multiple of the stride, the mode is unknown, or `images` is empty or holds
                something that is not an image.
        """
        size = self.size if size is None else self._standardize_kwargs(size=size)["size"]
        resize_mode = self.resize_mode if resize_mode is None else resize_mode
        self._check_arguments(size, resize_mode)
        pixel_values = self.compute_pixel_values(prepare_rgb_images(images), size.height, size.width, resize_mode)
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def compute_pixel_values(
        self, images: list[Image.Image], height: int, width: int, resize_mode: str
    ) -> torch.Tensor:
        """Resize upright RGB images and return pixels (batch, 3, height, width) in [−1, 1]."""
        resized = [self.resize_and_crop(image, height, width, resize_mode) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized]))
        return pixels.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1

    def resize_and_crop(self, image: Image.Image, height: int, width: int, resize_mode: str) -> Image.Image:
        """Resize an upright RGB image to `height`×`width` pixels; warn if the center crop cuts away more than 2 %."""
        crop = compute_crop_geometry(image.height, image.width, height, width, resize_mode)
        if crop.cut_fraction > MAX_SILENT_CUT:
            # The message is the same for all images, so Python shows it once for each line that calls.
            warn_caller(
                f"The center crop cuts away more than {MAX_SILENT_CUT:.0%} of an image. To keep the whole image, pass "
                '`resize_mode="stretch"`, or a `height` and `width` with the proportions of the image.'
            )
        return apply_crop(image, crop, height, width)

    @overload
    def postprocess(self, pixel_values: torch.Tensor, output_type: Literal["pil"] = "pil") -> list[Image.Image]: ...
    @overload
    def postprocess(
        self, pixel_values: torch.Tensor, output_type: str
    ) -> list[Image.Image] | np.ndarray | torch.Tensor: ...
    def postprocess(
        self, pixel_values: torch.Tensor, output_type: str = "pil"
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Convert `pixel_values` (batch, 3, height, width) to images; values outside [−1, 1] are clamped.

        Args:
            pixel_values (`torch.Tensor`): Pixels, nominally in [−1, 1].
            output_type (`str`): `"pil"` for a list of 8-bit images (rounded to nearest), `"np"` for an array
                (batch, height, width, 3) in [0, 1], `"pt"` for a tensor (batch, 3, height, width) in [0, 1].

        Raises:
            ValueError: If `output_type` is unknown.
            RuntimeError: If the pixels hold NaN.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if pixel_values.isnan().any():
            raise RuntimeError(
                "`pixel_values` holds NaN: the VQ model overflowed in float16, or its weights are damaged. Load it in "
                "bfloat16 or float32."
            )
        pixels = ((pixel_values.detach().float() + 1) / 2).clamp(0, 1)
        if output_type == "pt":
            return pixels
        pixels = pixels.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return pixels
        return [make_image(image) for image in pixels]

    def restore(
        self,
        edited_image: Image.Image,
        source_image: Image.Image | np.ndarray | torch.Tensor,
        resize_mode: str | None = None,
        weights: np.ndarray | None = None,
        reconstruction: Image.Image | None = None,
    ) -> Image.Image:
        """Resize an edited image to the size of its source, and put it into the source.

        With `"crop"`, the edited image replaces the part of the source that was cropped, and the source's pixels around
        it stay unchanged (in upright RGB, with transparency over white). With `"stretch"`, it replaces the whole
        source.

        Args:
            edited_image (`PIL.Image.Image`): The edited image, at the size the model worked at.
            source_image: The image that was edited; see `prepare_rgb_image`.
            resize_mode (`str`, *optional*): How the source was resized for the model; *defaults to* `self.resize_mode`.
            weights (`np.ndarray` of shape `(height, width)`, *optional*): Weight of the edited image in each pixel, in
                [0, 1]; where it is 0, the source's pixels stay unchanged. *Defaults to* 1 everywhere.
            reconstruction (`PIL.Image.Image`, *optional*): The source passed through the VQ model, at the size of the
                edited image. With it, the result has the detail of the source where the edited image agrees with it;
                see `apply_change`.

        Raises:
            ValueError: If the mode is unknown, or `source_image` is not an image.
        """
        resize_mode = self.resize_mode if resize_mode is None else resize_mode
        check_choice("resize_mode", resize_mode, RESIZE_MODES)
        restored = prepare_rgb_image(source_image)
        width, height = restored.size
        crop = compute_crop_geometry(height, width, edited_image.height, edited_image.width, resize_mode)
        place = left, top, right, bottom = crop.box
        # The same box in the edited image, in fractions of a pixel, so that the content does not move.
        columns = [(x * crop.resized_width - crop.left * width) / width for x in (left, right)]
        rows = [(y * crop.resized_height - crop.top * height) / height for y in (top, bottom)]
        box = (columns[0], rows[0], columns[1], rows[1])
        size = right - left, bottom - top
        if reconstruction is None:
            edited = edited_image.resize(size, Image.Resampling.LANCZOS, box)
        else:
            seen = apply_crop(restored, crop, edited_image.height, edited_image.width)
            edited = apply_change(restored.crop(place), seen, reconstruction, edited_image, self.stride, box)
        if weights is not None:
            # Both filters read at most one pixel beyond a pixel of the larger image, so weights of 0 stay 0.
            is_smaller = size[0] < edited_image.width or size[1] < edited_image.height
            resample = Image.Resampling.BOX if is_smaller else Image.Resampling.BILINEAR
            shares = np.asarray(Image.fromarray(weights.astype(np.float32)).resize(size, resample, box))
            below, above = (np.asarray(image, np.float32) for image in (restored.crop(place), edited))
            blended = below + shares[:, :, None] * (above - below)
            edited = Image.fromarray(np.round(blended).astype(np.uint8))
        restored.paste(edited, place[:2])
        return restored


# Detail

# Windows whose colors, in [0, 1], vary less than this say little about the change of colors.
FIT_EPSILON = 1e-3


def apply_change(
    source: Image.Image,
    seen: Image.Image,
    reconstruction: Image.Image,
    edited: Image.Image,
    radius: int,
    box: tuple[float, float, float, float],
) -> Image.Image:
    """Apply the change from a small image, `reconstruction`, to another one, `edited`, to the source at its full size.

    Around each pixel, an affine transform of colors is fitted that turns the reconstruction into the edited image. The
    source is transformed in this way at its full size, so it keeps its detail. Where the transform does not explain the
    edited image, for example inside a new object, the result is the edited image, resized. Differences as large as
    the VQ model's own errors count as noise, so a Wiener filter sets the weight of the edited image.

    Args:
        source (`PIL.Image.Image`): The source at its full size, RGB.
        seen (`PIL.Image.Image`): The source at the size the model works at.
        reconstruction (`PIL.Image.Image`): `seen`, passed through the VQ model.
        edited (`PIL.Image.Image`): The edited image, at the same size.
        radius (`int`): Pixels from the middle of the square windows of the fit to their border.
        box (`tuple[float, ...]`): The part of `edited` that shows `source`: left, top, right and bottom in pixels.

    Source: He, Sun and Tang, "Guided Image Filtering", 2010, with a guide in color, applied at full size as in He and
    Sun, "Fast Guided Filter", 2015 (arXiv 1505.00996). Here flat windows follow the transform of the whole image.
    """

    def average(values: torch.Tensor) -> torch.Tensor:
        """Average the windows around all pixels, (…, height, width)."""
        shape = values.shape
        values = values.reshape(-1, 1, *shape[-2:])
        for kernel, padding in (((2 * radius + 1, 1), (radius, 0)), ((1, 2 * radius + 1), (0, radius))):
            values = F.avg_pool2d(values, kernel, 1, padding, count_include_pad=False)
        return values.reshape(shape)

    def transform(colors: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ihw,ijhw->jhw", colors, matrices)

    def resize(values: torch.Tensor) -> np.ndarray:
        return np.asarray(Image.fromarray(values.numpy()).resize(source.size, Image.Resampling.BILINEAR, box))

    small = (np.asarray(image, np.float32) / 255 for image in (seen, reconstruction, edited))
    shown, before, after = (torch.from_numpy(pixels).permute(2, 0, 1) for pixels in small)
    mean_before, mean_after = average(before), average(after)
    # Covariances of the colors before the edit with themselves and with those after it, (height, width, 3, 3).
    spread, shared = (
        (average(before[:, None] * colors) - mean_before[:, None] * mean).permute(2, 3, 0, 1)
        for colors, mean in ((before, mean_before), (after, mean_after))
    )
    identity = torch.eye(3)
    # An image of one color, whose covariances are 0, keeps its colors.
    whole = torch.linalg.solve(*(covariances.mean(dim=(0, 1)) + 1e-6 * identity for covariances in (spread, shared)))
    matrices = torch.linalg.solve(spread + FIT_EPSILON * identity, shared + FIT_EPSILON * whole).permute(2, 3, 0, 1)
    offsets = average(mean_after - transform(mean_before))
    matrices = average(matrices)
    unexplained = average((after - transform(before) - offsets).square().mean(dim=0))
    error = average(transform(before - shown).square().mean(dim=0))
    weights = resize((1 - error / unexplained.clamp(min=1e-12)).clamp(min=0))

    colors = np.asarray(source, np.float32)
    result = np.asarray(edited.resize(source.size, Image.Resampling.LANCZOS, box), np.float32)
    channels = []
    for channel in range(3):
        changed = 255 * resize(offsets[channel])
        for index in range(3):
            changed += resize(matrices[index, channel]) * colors[:, :, index]
        channels.append(changed + weights * (result[:, :, channel] - changed))
    return Image.fromarray(np.round(np.stack(channels, axis=-1).clip(0, 255)).astype(np.uint8))


# Comparison


def compute_psnr(reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """Compute the peak signal-to-noise ratio of each image in dB, shape (batch_size,), from pixels in [−1, 1].

    The reconstruction is clamped to this range. The value is at most 100 dB, which equal images have.
    """
    error = (reconstruction.float().clamp(-1, 1) - pixel_values.float()) / 2
    return -10 * error.square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()
