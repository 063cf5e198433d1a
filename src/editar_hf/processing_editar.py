"""Pictures and prompts in, tensors out; and tensors back into pictures.

`EditARImageProcessor` brings any picture to the size the model works at, as pixels in [−1, 1], and back.
`EditARProcessor` adds the prompts: task prefixes and token ids. Training, the pipeline and `AutoProcessor` share it.
"""

import numbers
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from diffusers.utils import load_image
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import ImageInput, SizeDict
from transformers.processing_utils import ProcessorMixin

from .checks import check_choice, check_has_values, check_integer, check_tensor, check_texts


# The task of a prompt without a source image.
TEXT_TO_IMAGE = "text-to-image"
# Source: EditAR (arXiv 2501.04699), the prompts of its training data.
TASK_PREFIXES = {
    "edit": "",
    "canny": "Given the canny edge image, generate an image following the description: ",
    "depth": "Given the depth image, generate an image following the description: ",
    "segmentation": "Given the segmentation mask, generate an image following the description: ",
    TEXT_TO_IMAGE: "",
}
RESIZE_MODES = ("crop", "stretch")
OUTPUT_TYPES = ("pil", "np", "pt")
# A larger side is a slip of the pen: its pixels fit no memory.
MAX_SIDE = 2**16
# More tokens of text are one, too.
MAX_TEXT_TOKENS = 2**16
# More than this part of a picture lost to the centre crop is worth a warning.
MAX_SILENT_CUT = 0.02


def check_task(task: str | Sequence[str]):
    """Refuse what is neither a task nor a list of tasks."""
    if not isinstance(task, str | list | tuple) or not task:
        raise ValueError(f"`task` is {task!r}; choose one of {', '.join(map(repr, TASK_PREFIXES))}, or a list of them.")
    for one_task in [task] if isinstance(task, str) else task:
        check_choice("task", one_task, TASK_PREFIXES)


def apply_task_prefix(text: str | Sequence[str], task: str | Sequence[str] = "edit") -> str | list[str]:
    """Put the published prompt prefix of each task before its text.

    Args:
        text (`str` or sequence of `str`): The prompts.
        task (`str` or sequence of `str`): `"edit"` (no prefix), `"canny"`, `"depth"` or `"segmentation"`; one for all
            texts, or one per text; also `"text-to-image"` (no prefix).

    Returns:
        A string for a string, a list for a sequence.

    Raises:
        ValueError: If a text is not a string, a task is unknown, or there are as many tasks neither as one nor as
            texts.
    """
    if not isinstance(text, str | list | tuple):
        raise ValueError(f"`text` is {text!r}; pass a string or a list of strings.")
    check_task(task)
    texts = [text] if isinstance(text, str) else list(text)
    tasks = [task] * len(texts) if isinstance(task, str) else list(task)
    for one_text in texts:
        if not isinstance(one_text, str):
            raise ValueError(f"`text` holds {one_text!r}; pass a string or a list of strings.")
        check_texts("text", one_text)
    if len(tasks) != len(texts):
        raise ValueError(f"`task` has {len(tasks)} entries for {len(texts)} texts; pass one task, or one per text.")
    prompts = [TASK_PREFIXES[one_task] + one_text for one_task, one_text in zip(tasks, texts, strict=True)]
    return prompts[0] if isinstance(text, str) else prompts


class CropGeometry(NamedTuple):
    """Say where the centre crop of a picture lies.

    Attributes:
        resized_height, resized_width (`int`): Size of the whole picture at the crop's scale, in pixels.
        top, left (`int`): The crop's corner in the resized picture, in pixels.
        box (`tuple[int, int, int, int]`): Left, top, right and bottom of the original pixels that lie wholly inside
            the crop, as PIL counts them.
        cut_fraction (`float`): Part of the picture's area that is cut away, in [0, 1).
    """

    resized_height: int
    resized_width: int
    top: int
    left: int
    box: tuple[int, int, int, int]
    cut_fraction: float


def compute_crop_geometry(source_height: int, source_width: int, height: int, width: int) -> CropGeometry:
    """Compute where the centre crop of `height`×`width` pixels comes from, after the picture is scaled to cover it.

    Source: the image preparation of LlamaGen (arXiv 2406.06525), which EditAR shares: shortest side, centre crop.

    Raises:
        ValueError: If the picture is so thin that the crop would hold less than one whole pixel of it.
    """
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
            f"A picture has {source_width}×{source_height} pixels, of which a crop to {width}×{height} keeps less than "
            'one; pass `resize_mode="stretch"`.'
        )
    cut_fraction = 1 - height * width / (resized_height * resized_width)
    return CropGeometry(resized_height, resized_width, top, left, box, cut_fraction)


def _quantise(array: np.ndarray, name: str) -> np.ndarray:
    """Bring pixels of 8 bits, of 16 bits or in [0, 1] to 8 bits, rounding to nearest."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind != "f":
        raise ValueError(f"`{name}` holds pixels of type {array.dtype}; pass uint8, uint16, or floats in [0, 1].")
    if not (array.min() >= 0 and array.max() <= 1):  # so written, it catches NaN too
        raise ValueError(
            f"`{name}` holds floats in [{array.min()}, {array.max()}]; scale them to [0, 1], or pass uint8 pixels."
        )
    return np.round(array * 255).astype(np.uint8)


def _make_picture(array: np.ndarray, name: str = "images") -> Image.Image:
    """Make a picture of an array of shape (height, width) or (height, width, channels)."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(
            f"`{name}` holds a picture of shape {array.shape}, read as (height, width, channels); pass arrays of that "
            "layout, or tensors of (channels, height, width), with 1, 3 or 4 channels and at least one pixel."
        )
    return Image.fromarray(_quantise(array, name))


def open_picture(source: str | Path, name: str) -> Image.Image:
    """Open the picture at a path or a URL that starts with `http://` or `https://`.

    Raises:
        ValueError: If there is none; the message names the argument that brought it, and the path or URL.
    """
    try:
        if str(source).startswith(("http://", "https://")):
            return load_image(str(source), convert_method=lambda image: image)
        return Image.open(Path(source).expanduser())
    # Networks, file systems and PIL's readers raise errors of many kinds.
    except Exception as error:
        raise ValueError(f"`{name}` is {str(source)!r}, from which no picture opens: {error}") from error


def _decode_picture(image: Image.Image, name: str) -> Image.Image:
    """Read the pixels of a picture, turned upright; where its EXIF block is damaged, as they lie in the file."""
    file_name = getattr(image, "filename", None) or "a file"
    try:
        image.load()
    # PIL reads a file's pixels late, and what its decoders raise on broken data is of many kinds.
    except Exception as error:
        raise ValueError(f"`{name}` holds {file_name!r}, which does not decode: {error}.") from error
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:
        warnings.warn(
            f"The EXIF block of {file_name!r} in `{name}` is damaged ({error}); its pixels are taken as they lie.",
            stacklevel=2,
        )
        return image.copy()


def prepare_rgb_picture(
    image: Image.Image | np.ndarray | torch.Tensor | str | Path, background: str = "white", name: str = "images"
) -> Image.Image:
    """Bring one picture to upright 8-bit RGB, without transparency.

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str` or `Path`): A picture of any mode ("I" is read as
            16 bits, "F" as [0, 1]), an array (height, width, channels), a tensor (channels, height, width), or a path
            or URL. Arrays and tensors hold uint8, uint16, or floats in [0, 1].
        background (`str`): The colour that transparency is laid over.
        name (`str`): The argument that brought the picture, for messages.

    Raises:
        ValueError: If it is none of these, does not decode, is empty, or its values are out of range.
    """
    if isinstance(image, str | Path):
        image = open_picture(image, name)
    if isinstance(image, torch.Tensor):
        check_has_values(name, image)
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
        image = _make_picture((image.movedim(0, -1) if image.ndim == 3 else image).numpy(), name)
    elif isinstance(image, np.ndarray):
        image = _make_picture(image, name)
    elif isinstance(image, Image.Image):
        image = _decode_picture(image, name)
    else:
        raise ValueError(
            f"`{name}` holds a {type(image).__name__}; pass PIL images, numpy arrays, torch tensors, paths, URLs, or a "
            "list of them."
        )
    if image.mode.startswith("I"):
        image = _make_picture(np.asarray(image).clip(0, 65535).astype(np.uint16), name)
    elif image.mode == "F":
        image = _make_picture(np.asarray(image), name)
    if 0 in image.size:
        raise ValueError(f"`{name}` holds a picture of {image.width}×{image.height} pixels; it needs at least one.")
    if image.mode == "La":
        image = image.convert("LA")  # from which alone other modes can be made
    profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P", "PA") else None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image.convert("RGB")
    # A colour profile says how to read RGB, unless it is one of grey or CMYK. Bytes 16 to 19 name its colour space
    # (ICC.1:2022, section 7.2).
    image.info.pop("icc_profile", None)
    if profile is not None and profile[16:20] == b"RGB ":
        image.info["icc_profile"] = profile
    return image


def list_pictures(images: ImageInput, depth: int = 3) -> list:
    """List the single pictures of a picture, a batch, or a list of either; a list may even hold itself."""
    if isinstance(images, list | tuple) and depth:
        return [picture for one in images for picture in list_pictures(one, depth - 1)]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]


def check_return_tensors(return_tensors: str | None):
    """Refuse a kind of arrays that is not made here; None leaves tensors as they are."""
    if return_tensors is not None:
        check_choice("return_tensors", return_tensors, ("pt", "np"))


class EditARImageProcessorKwargs(TypedDict, total=False):
    """What an `EditARImageProcessor` is built from."""

    size: int | dict[str, int] | SizeDict
    resize_mode: str
    stride: int


class EditARImageProcessor(PilBackend):
    """Bring pictures to pixels in [−1, 1] at the size the model works at, and pixels back to pictures.

    Args:
        size (`int` or `dict[str, int]`, *optional*): `height` and `width` in pixels; 512×512 when left out.
        resize_mode (`str`, *optional*): `"crop"` (default, published) scales the picture until it covers the size and
            keeps the centre; `"stretch"` resizes it as it is.
        stride (`int`, *optional*): Pixels per side of the VQ tokenizer's tokens; 16 when left out. It divides every
            height and width.

    Raises:
        ValueError: If `stride` does not divide the size, or `resize_mode` is unknown.

    Source: LlamaGen (arXiv 2406.06525), whose image preparation EditAR (arXiv 2501.04699) shares.

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
    stride = 16

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._check_arguments(self.size, self.resize_mode)

    def _standardize_kwargs(self, size=None, **kwargs):
        try:
            return super()._standardize_kwargs(size=size, default_to_square=True, **kwargs)  # a number is both sides
        except (IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"`size` is {size!r}; pass a number of pixels, or a dict of `height` and `width`."
            ) from error

    def _check_arguments(self, size: SizeDict, resize_mode: str):
        check_integer("stride", self.stride)
        for name, value in (("height", size and size.height), ("width", size and size.width)):
            if not isinstance(value, numbers.Integral) or not 1 <= value <= MAX_SIDE or value % self.stride:
                raise ValueError(
                    f"`{name}` is {value!r}; it must be a positive multiple of {self.stride}, the pixels per token of "
                    f"the VQ tokenizer, and at most {MAX_SIDE}."
                )
        check_choice("resize_mode", resize_mode, RESIZE_MODES)

    def preprocess(
        self,
        images: ImageInput,
        size: int | dict[str, int] | None = None,
        resize_mode: str | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Bring pictures to `pixel_values` (batch, 3, height, width) in [−1, 1].

        Args:
            images: A picture, a batch (4-D array or tensor), or a list of either; see `prepare_rgb_picture`.
            size (`int` or `dict[str, int]`, *optional*): `height` and `width` in pixels, in place of the processor's.
            resize_mode (`str`, *optional*): `"crop"` or `"stretch"`, in place of the processor's.
            return_tensors (`str`): `"pt"` or `"np"`.

        Raises:
            ValueError: If the size or the mode does not fit, or `images` is empty or holds what is not a picture.
        """
        size = self.size if size is None else self._standardize_kwargs(size=size)["size"]
        resize_mode = self.resize_mode if resize_mode is None else resize_mode
        self._check_arguments(size, resize_mode)
        check_return_tensors(return_tensors)
        pictures = [prepare_rgb_picture(image) for image in list_pictures(images)]
        if not pictures:
            raise ValueError("`images` is empty; pass at least one picture.")
        pictures = [self._resize_picture(picture, size.height, size.width, resize_mode) for picture in pictures]
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        pixel_values = pixels.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def _resize_picture(self, picture: Image.Image, height: int, width: int, resize_mode: str) -> Image.Image:
        if resize_mode == "stretch":
            return picture.resize((width, height), Image.Resampling.LANCZOS)
        crop = compute_crop_geometry(picture.height, picture.width, height, width)
        if crop.cut_fraction > MAX_SILENT_CUT:
            # One fixed text: Python shows it once, however many pictures follow.
            warnings.warn(
                f"More than {MAX_SILENT_CUT:.0%} of a picture is cut away by the centre crop; pass "
                '`resize_mode="stretch"`, or a `height` and `width` of its proportions, to keep all of it.',
                stacklevel=2,
            )
        resized = picture.resize((crop.resized_width, crop.resized_height), Image.Resampling.LANCZOS)
        return resized.crop((crop.left, crop.top, crop.left + width, crop.top + height))

    def postprocess(
        self, pixel_values: torch.Tensor, output_type: str = "pil"
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Turn `pixel_values` (batch, 3, height, width) back into pictures; values outside [−1, 1] are clamped.

        Args:
            pixel_values (`torch.Tensor`): Pixels, nominally in [−1, 1].
            output_type (`str`): `"pil"` for a list of 8-bit pictures (rounded to nearest), `"np"` for an array
                (batch, height, width, 3) in [0, 1], `"pt"` for a tensor (batch, 3, height, width) in [0, 1].

        Raises:
            ValueError: If `output_type` is none of these.
        """
        check_tensor("pixel_values", pixel_values)
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"`pixel_values` has shape {tuple(pixel_values.shape)}; give (batch, 3, height, width).")
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if pixel_values.isnan().any():
            raise RuntimeError(
                "`pixel_values` holds NaN: the VQ model overflowed in float16, or its weights are damaged."
            )
        pixels = ((pixel_values.detach().float() + 1) / 2).clamp(0, 1)
        if output_type == "pt":
            return pixels
        pixels = pixels.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return pixels
        return [_make_picture(picture) for picture in pixels]

    def restore(
        self,
        edited_image: Image.Image,
        source_image: Image.Image | np.ndarray | torch.Tensor,
        height: int,
        width: int,
        resize_mode: str,
        weights: np.ndarray | None = None,
    ) -> Image.Image:
        """Bring an edited picture back to the size of its source.

        After a crop, the edited part returns to its place and the source's pixels around it stay as they are (upright
        RGB, transparency over white). A stretch is undone by the inverse resize.

        Args:
            edited_image (`PIL.Image.Image`): The edited picture.
            source_image: The picture that was edited, as it was passed in.
            height, width (`int`): Pixels the model worked at. The edited picture may have been enlarged since.
            resize_mode (`str`): How the source was brought to that size.
            weights (`np.ndarray` of shape `(height, width)`, *optional*): How much of the edited picture shows, in
                [0, 1]; where it is 0 the source's very pixels stand. Default: 1 everywhere.

        Raises:
            ValueError: If the size or the mode does not fit, or `source_image` is not a picture.
        """
        self._check_arguments(SizeDict(height=height, width=width), resize_mode)
        source = prepare_rgb_picture(source_image)
        geometry = (source.size, height, width, resize_mode)
        edited, corner = self._return_to_source(edited_image, *geometry, Image.Resampling.LANCZOS)
        if weights is None:
            source.paste(edited, corner)
            return source
        # Neither filter reaches further than a pixel of the larger picture: a weight that ends, ends.
        is_smaller = edited.width < width or edited.height < height
        resample = Image.Resampling.BOX if is_smaller else Image.Resampling.BILINEAR
        weights, _ = self._return_to_source(Image.fromarray(weights.astype(np.float32)), *geometry, resample)
        box = (*corner, corner[0] + edited.width, corner[1] + edited.height)
        below, above = (np.asarray(picture, np.float32) for picture in (source.crop(box), edited))
        blended = below + np.asarray(weights)[:, :, None] * (above - below)
        source.paste(Image.fromarray(np.round(blended).astype(np.uint8)), corner)
        return source

    def _return_to_source(
        self,
        picture: Image.Image,
        source_size: tuple[int, int],
        height: int,
        width: int,
        resize_mode: str,
        resample: Image.Resampling,
    ) -> tuple[Image.Image, tuple[int, int]]:
        """Undo the resize; return the picture and the place of its left upper corner in the source."""
        if resize_mode == "stretch":
            return picture.resize(source_size, resample), (0, 0)
        source_width, source_height = source_size
        crop = compute_crop_geometry(source_height, source_width, height, width)
        left, top, right, bottom = crop.box
        # The same box in the picture, to a fraction of a pixel: what was edited lands where it was.
        columns = [(x * crop.resized_width - crop.left * source_width) / source_width for x in (left, right)]
        rows = [(y * crop.resized_height - crop.top * source_height) / source_height for y in (top, bottom)]
        columns = [x * picture.width / width for x in columns]
        rows = [y * picture.height / height for y in rows]
        box = (columns[0], rows[0], columns[1], rows[1])
        return picture.resize((right - left, bottom - top), resample, box=box), (left, top)


class EditARProcessor(ProcessorMixin):
    """Prepare pictures and prompts for EditAR, and turn pixels back into pictures.

    Args:
        image_processor (`EditARImageProcessor`): Brings pictures to pixels in [−1, 1].
        tokenizer (`T5Tokenizer`): Splits prompts.
        num_text_tokens (`int`): Length every prompt is padded (on the right) or cut to, its end token included.

    Raises:
        ValueError: If `num_text_tokens` is not positive.

    Source: EditAR (arXiv 2501.04699) for the prefixes and the length.

    Example:

    ```python
    >>> from PIL import Image
    >>> from editar_hf import EditARImageProcessor, EditARProcessor
    >>> from editar_hf.training.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer(["make the red circle blue"], vocab_size=120)
    >>> processor = EditARProcessor(EditARImageProcessor(size=64), tokenizer, num_text_tokens=32)
    >>> inputs = processor(images=Image.new("RGB", (64, 64)), text="make the red circle blue")
    >>> inputs.source_pixel_values.shape, inputs.input_ids.shape
    (torch.Size([1, 3, 64, 64]), torch.Size([1, 32]))

    ```
    """

    model_input_names = ("source_pixel_values", "target_pixel_values", "input_ids", "attention_mask")

    def __init__(self, image_processor, tokenizer, num_text_tokens: int = 120):
        num_text_tokens = check_integer("num_text_tokens", num_text_tokens, maximum=MAX_TEXT_TOKENS)
        super().__init__(image_processor, tokenizer)
        self.num_text_tokens = num_text_tokens

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | Sequence[str] | None = None,
        task: str | Sequence[str] = "edit",
        height: int | None = None,
        width: int | None = None,
        resize_mode: str | None = None,
        target_images: ImageInput | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prepare what is given of source images, prompts and target images.

        Args:
            images (*optional*): Source images or condition maps; see `EditARImageProcessor.preprocess`.
            text (`str` or sequence of `str`, *optional*): The prompts.
            task (`str` or sequence of `str`): Whose prefix goes before the prompts; see `apply_task_prefix`.
            height, width (`int`, *optional*): Pixels of the result; the image processor's when left out.
            resize_mode (`str`, *optional*): `"crop"` or `"stretch"`; the image processor's when left out.
            target_images (*optional*): Edited images, for training.
            return_tensors (`str`): `"pt"` or `"np"`.

        Returns:
            `BatchFeature` with `source_pixel_values` and `target_pixel_values` (batch, 3, height, width) in [−1, 1],
            `input_ids` and `attention_mask` (batch, num_text_tokens); of each, what was asked for. A prompt that is
            too long is cut, with a warning that says what was lost.

        Raises:
            ValueError: If nothing is given, or an argument does not fit (a size, a mode, a task, a picture, a text).
        """
        if images is None and text is None and target_images is None:
            raise ValueError("`images`, `text` and `target_images` are all None; pass at least one of them.")
        check_return_tensors(return_tensors)
        features = {} if text is None else self._tokenize(apply_task_prefix(text, task))
        default = self.image_processor.size
        size = {
            "height": default.height if height is None else height,
            "width": default.width if width is None else width,
        }
        for name, pictures in (("source_pixel_values", images), ("target_pixel_values", target_images)):
            if pictures is not None:
                features[name] = self.image_processor(pictures, size=size, resize_mode=resize_mode).pixel_values
        return BatchFeature(features, tensor_type=return_tensors)

    def _tokenize(self, prompts: str | list[str]) -> dict[str, torch.Tensor]:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not prompts:
            raise ValueError("`text` is empty; pass at least one prompt.")
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.num_text_tokens,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        # The end and padding tokens point at character 0, so the largest offset is where the kept text ends.
        ends = tokens.pop("offset_mapping")[..., 1].amax(dim=1).tolist()
        for prompt, end in zip(prompts, ends, strict=True):
            if cut := prompt[end:].strip():
                warnings.warn(
                    f"A prompt is longer than {self.num_text_tokens} tokens; this part was cut: {cut!r}", stacklevel=3
                )
        return dict(tokens)

    def postprocess(
        self, pixel_values: torch.Tensor, output_type: str = "pil"
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Turn pixels back into pictures; see `EditARImageProcessor.postprocess`."""
        return self.image_processor.postprocess(pixel_values, output_type)
