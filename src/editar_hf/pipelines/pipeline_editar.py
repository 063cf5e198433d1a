"""`EditARPipeline`: edit images by instruction.

`EditARPipeline.__call__` has five steps: check inputs, prepare them, encode them, decode tokens, make images. The
decoder is in `modeling_editar.py`, and its decoding loop is in `generation/`.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from PIL import Image
from transformers import StoppingCriteriaList, T5EncoderModel
from transformers.image_utils import ImageInput

from ..checks import check_choice, check_integer, warn_caller
from ..generation import SourceCache
from ..generation.cache import compute_target_logits
from ..generation.decoding import find_sources
from ..generation.inputs import (
    check_decoding,
    check_generator,
    check_source_cache,
    resolve_preserve_threshold,
    resolve_settings,
)
from ..image_processing_editar import ASPECTS, RESIZE_MODES, choose_grid, prepare_rgb_images
from ..modeling_editar import EditARForConditionalGeneration
from ..modeling_editar_vq import EditARVQModel, decode_one_by_one
from ..packing import is_packed, pack_linears, unpack_linears
from ..processing_editar import EditARProcessor, apply_task_prefix
from .callbacks import RowPreview, StepReporter
from .edit_region import EditRegion, average_neighbors, find_edited_tokens, repeat_rows, resize_masks
from .hub import EditARHubMixin
from .inputs import (
    add_task_prefixes,
    check_cached_images,
    check_detail,
    check_num_tokens,
    check_output,
    check_preserve,
    check_prompts,
    check_source,
    compute_batch_size,
    list_texts,
    warn_of_greedy_decoding,
)
from .lora import EditARLoraMixin


SIZE_POLICIES = ("strict", "fit")
# The largest height or width of a result with `size_policy="fit"`, in pixels.
MAX_SIDE = 16384
# A size that is chosen by the proportions of an image may differ from them by this factor without a warning.
MAX_SILENT_STRETCH = 1.25


@dataclass
class EditARPipelineOutput(BaseOutput):
    """Output of `EditARPipeline.__call__`.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): The images in the format of `output_type`;
            with `"tokens"`, the tokens.
        image_tokens (`torch.LongTensor` of shape `(batch, N)`): The tokens of the images, in raster order. The next
            call can use them as `source_image_tokens`.
        num_decode_steps (`int`): Number of decoder passes after the prefill of source image and text.
        preserved_mask (`list`, *optional*): With `preserve="auto"`, a mask for each image (`PIL.Image.Image`), white
            where its pixels are those of the source. `None` means that the whole image may have changed; pixels outside
            the crop of `resize_mode="crop"` stay even then. With `mask_blend=False`, none inside the crop stays if any
            token may change, so the mask is black there.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    image_tokens: torch.LongTensor
    num_decode_steps: int
    preserved_mask: list[Image.Image | None] | None = None

    @property
    def num_passes(self) -> int:
        """The former name of `num_decode_steps`."""
        warnings.warn("`num_passes` is now called `num_decode_steps`.", FutureWarning, stacklevel=2)
        return self.num_decode_steps


class EditARPipeline(EditARLoraMixin, EditARHubMixin):
    """Edit images by instruction, or generate images from text or from condition maps.

    Args:
        transformer (`EditARForConditionalGeneration`): The decoder.
        vq_model (`EditARVQModel`): Encodes pixels as tokens, and decodes tokens to pixels.
        text_encoder (`T5EncoderModel`): Encodes the prompts. It may be `None` if every call passes `prompt_embeds`.
        processor (`EditARProcessor`): Prepares images and prompts.

    Source: EditAR (arXiv 2501.04699).

    Example:

    ```python
    >>> import torch
    >>> from editar_hf import EditARPipeline
    >>> pipe = EditARPipeline.from_pretrained("examples/scene-editor")
    >>> generator = torch.Generator().manual_seed(0)
    >>> pipe("remove the dog", image="examples/photo.png", generator=generator).images[0].size
    (384, 256)

    ```
    """

    # The VQ model runs before and after the decoder. It is small, so it stays on the device after it has encoded.
    model_cpu_offload_seq = "text_encoder->transformer->vq_model"
    _callback_tensor_inputs = ("image_tokens", "source_image_tokens", "prompt_embeds")
    # The default of the argument `size_policy`.
    size_policy = "strict"

    def __init__(
        self,
        transformer: EditARForConditionalGeneration,
        vq_model: EditARVQModel,
        text_encoder: T5EncoderModel,
        processor: EditARProcessor,
    ):
        super().__init__()
        if processor and processor.tokenizer.pad_token is None:
            raise ValueError(
                "`processor` has a tokenizer without a padding token; save or download the tokenizer again."
            )
        if text_encoder and processor and len(processor.tokenizer) > text_encoder.config.vocab_size:
            raise ValueError(
                f"`processor` has a tokenizer of {len(processor.tokenizer)} entries and `text_encoder` has "
                f"{text_encoder.config.vocab_size}; pass the tokenizer that the text encoder was trained with."
            )
        self.register_modules(
            transformer=transformer, vq_model=vq_model, text_encoder=text_encoder, processor=processor
        )
        self._interrupt = False

    def interrupt(self) -> None:
        """Stop the call in progress after the current decoder pass. Call this from a callback or another thread."""
        self._interrupt = True

    def compile(self, **options: Any) -> None:
        """Compile decoding, which makes later edits faster; see `EditARForConditionalGeneration.compile_decoding`."""
        self.transformer.compile_decoding(**options)

    def free_compiled_caches(self) -> None:
        """Free the caches that compiled decoding keeps between calls."""
        self.transformer.free_compiled_caches()

    def pack_weights(self) -> None:
        """Pack the weights of decoder and text encoder in float16, for faster edits on CPUs.

        See `EditARForConditionalGeneration.pack_weights`. The VQ model keeps its dtype; if it is not float32, then
        `.to(torch.float32)` gives the results of float32. Load LoRA adapters before. Edits are faster if you also fuse
        them, but fused adapters cannot be changed.

        Raises:
            ValueError: If the weights cannot be packed, before any is packed.
        """
        pack_linears(*(model for model in (self.transformer, self.text_encoder) if model is not None))

    def unpack_weights(self) -> None:
        """Undo `pack_weights`: restore the original weights and dtypes, to the bit.

        Raises:
            ValueError: If packing has rounded a weight, before any is unpacked; then load the pipeline again.
        """
        unpack_linears(*(model for model in (self.transformer, self.text_encoder) if model is not None))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the pipeline to a device or convert it to a dtype; see `DiffusionPipeline.to`."""
        if is_packed(self.transformer):  # An error of the decoder must come before other parts are converted.
            self.transformer.to(*args, **{name: kwargs[name] for name in ("device", "dtype") if name in kwargs})
        return super().to(*args, **kwargs)

    # Parts of a call

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str], task: str | Sequence[str] = "edit") -> torch.Tensor:
        """Encode prompts as text states, `(batch, num_text_tokens, text_hidden_size)`.

        Args:
            prompt (`str` or sequence of `str`): The prompts.
            task (`str` or sequence of `str`): The tasks whose prefixes go before the prompts; see `apply_task_prefix`.

        Raises:
            ValueError: If a prompt is not a string, a task is unknown, the numbers of tasks and prompts differ, or the
                pipeline has no text encoder.
            RuntimeError: If the states are NaN or infinite.
        """
        if self.text_encoder is None:
            raise ValueError(f"`prompt` is {prompt!r}, but the pipeline has no text encoder; pass `prompt_embeds`.")
        inputs = self.processor(text=prompt, task=task).to(self._execution_device)
        # Parity: the text encoder masks padding, but the decoder attends to the padding's states.
        states = self.text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
        states = states.to(self.transformer.dtype)
        if not states.isfinite().all():
            raise RuntimeError(
                f"The text encoder's states of `prompt` are NaN or infinite in {states.dtype}. The likely cause is an "
                "overflow in float16: load the pipeline with `dtype=torch.bfloat16` or `torch.float32`. In float32, "
                "the weights of the text encoder are damaged."
            )
        return states

    @torch.no_grad()
    def encode_image(
        self,
        image: ImageInput,
        height: int | None = None,
        width: int | None = None,
        resize_mode: str | None = None,
        aspect: str | None = None,
    ) -> torch.LongTensor:
        """Encode images as tokens, `(batch, N)` in raster order. Pass them as `source_image_tokens` to any calls.

        Args:
            image: An image, a batch, or a list of images and batches; see `__call__`.
            height, width (`int`, *optional*): Size the model works at, in pixels; *defaults to* that of the model.
            resize_mode (`str`, *optional*): `"crop"` or `"stretch"`; *defaults to* that of the model.
            aspect (`str`, *optional*): `"source"` chooses height and width by the image; see `__call__`.

        Raises:
            ValueError: If `image` is not an image, or the size or the mode is not supported.
        """
        return self.encode_pixel_values(self.prepare_pixel_values(image, height, width, resize_mode, aspect))

    @torch.no_grad()
    def prepare_source_cache(
        self,
        image: ImageInput,
        height: int | None = None,
        width: int | None = None,
        resize_mode: str | None = None,
        aspect: str | None = None,
    ) -> SourceCache:
        """Compute the tokens, keys and values of images once. Pass them as `source_cache` to any number of calls.

        A call with a cache neither encodes its source nor runs it through the decoder. A cache takes 200 MiB for one
        image of the published size in bf16. If the decoder's weights or adapters change, calls refuse the cache.

        Args:
            image, height, width, resize_mode, aspect: See `encode_image`.

        Raises:
            ValueError: If `image` is not an image, or the size or the mode is not supported.
        """
        pixel_values = self.prepare_pixel_values(image, height, width, resize_mode, aspect)
        grid = self.compute_grid(*pixel_values.shape[-2:])
        cache = self.transformer.prepare_source_cache(self.encode_pixel_values(pixel_values), *grid)
        cache.pixel_values = pixel_values
        self.maybe_free_model_hooks()
        return cache

    @torch.no_grad()
    def decode_image_tokens(
        self,
        image_tokens: torch.LongTensor,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Decode tokens `(batch, N)` to images.

        Args:
            image_tokens (`torch.LongTensor`): Tokens in raster order.
            height, width (`int`, *optional*): Size of the images in pixels; *defaults to* that of the model.
            output_type (`str`): `"pil"`, `"np"` or `"pt"`; see `EditARImageProcessor.postprocess`.

        Raises:
            ValueError: If the number of tokens does not match the size, a token is out of range, or `output_type` is
                unknown.
        """
        size = self.resolve_size(height, width)
        grid = self.compute_grid(*size)
        check_num_tokens("image_tokens", image_tokens, size, grid)
        return self.processor.postprocess(self.decode_pixel_values(image_tokens, grid), output_type)

    @torch.no_grad()
    def compute_edit_map(
        self,
        image: ImageInput,
        prompt: str | Sequence[str],
        task: str | Sequence[str] = "edit",
        height: int | None = None,
        width: int | None = None,
        resize_mode: str | None = None,
        aspect: str | None = None,
    ) -> torch.Tensor:
        """Compute a map of where the instruction changes the image: how unlikely it makes the source's own tokens.

        The decoder runs one teacher-forced pass in which the target is the source itself. The value of a token is the
        mean negative log-likelihood of the tokens in its 3 × 3 neighborhood. Each token is predicted after the source's
        own tokens, not after edited tokens. Therefore the map marks all places where an edit may begin.

        Args:
            image, height, width, resize_mode, aspect: See `encode_image`.
            prompt (`str` or sequence of `str`): The instructions; one for all images, or one for each.
            task (`str` or sequence of `str`): The tasks whose prefixes go before the instructions.

        Returns:
            `torch.Tensor` of shape `(batch, grid_height, grid_width)`, float32, in nats, at least 0; the higher, the
            less likely the tokens stay those of the source.

        Raises:
            ValueError: If the inputs do not fit the model or each other.
        """
        pixel_values = self.prepare_pixel_values(image, height, width, resize_mode, aspect)
        grid = self.compute_grid(*pixel_values.shape[-2:])
        prompts = list_texts(apply_task_prefix(prompt, task))
        batch_size = compute_batch_size(image=pixel_values, prompt=prompts)
        source_cache = self.transformer.prepare_source_cache(self.encode_pixel_values(pixel_values), *grid)
        edit_map = self.predict_edit_map(source_cache, repeat_rows(self.encode_prompt(prompts), batch_size))
        self.maybe_free_model_hooks()
        return edit_map

    def predict_edit_map(self, source_cache: SourceCache, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Compute the edit map of encoded inputs, `(batch, grid_height, grid_width)`; see `compute_edit_map`."""
        tokens = source_cache.expand_tokens(None, prompt_embeds)
        logits = compute_target_logits(self.transformer, source_cache, prompt_embeds, tokens)
        losses = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")
        return average_neighbors(losses.unflatten(1, (source_cache.grid_height, source_cache.grid_width)))

    def resolve_size(self, height: int | None, width: int | None, size_policy: str = "strict") -> tuple[int, int]:
        """Choose the height and width the model works at, in pixels.

        Args:
            height, width (`int`, *optional*): The size that is asked for; *defaults to* that of the model.
            size_policy (`str`): `"strict"` refuses a size that the model cannot work at. `"fit"` replaces it by the
                nearest size of the same proportions.

        Raises:
            ValueError: If the policy is unknown, or refuses the size, or a side has more than 16384 pixels.
        """
        check_choice("size_policy", size_policy, SIZE_POLICIES)
        default, stride = self.processor.image_processor.size, self.vq_model.config.stride
        grid_size = self.transformer.config.grid_size
        limits = (1, MAX_SIDE) if size_policy == "fit" else (stride, grid_size * stride, stride)
        height = default.height if height is None else check_integer("height", height, *limits)
        width = default.width if width is None else check_integer("width", width, *limits)
        tokens_per_pixel = min(1 / stride, grid_size / max(height, width))
        rows, columns = (min(max(round(side * tokens_per_pixel), 1), grid_size) for side in (height, width))
        return rows * stride, columns * stride

    def resolve_aspect(
        self, aspect: str | None, images: Sequence[Image.Image] | None, height: int | None, width: int | None
    ) -> str:
        """Replace None by the model's own aspect, if there are images and no size is given, and check the aspect.

        Raises:
            ValueError: If the aspect is unknown, or is `"source"` and there are no images or a size is given too.
        """
        if aspect is None:
            is_free = images is not None and height is None and width is None
            aspect = self.processor.image_processor.aspect if is_free else "model"
        check_choice("aspect", aspect, ASPECTS)
        if aspect == "source" and images is None:
            raise ValueError(
                "`aspect` is 'source', but there is no `image`; leave `aspect` out. A `source_cache` has a size of its "
                "own; with `source_image_tokens`, pass the `height` and `width` at which they were made."
            )
        if aspect == "source" and (height is not None or width is not None):
            raise ValueError(
                f"`aspect` is 'source', which chooses the size, but `height` is {height} and `width` is {width}; pass "
                "`aspect`, or the size."
            )
        return aspect

    def choose_size(self, image: ImageInput) -> tuple[int, int]:
        """Choose the height and width, in pixels, whose proportions are nearest to those of the images.

        The longer side is the largest one that the model can work at, and the shorter side at least half of it. Warns
        if the proportions of an image differ from the chosen ones by more than a factor of 1.25.

        Args:
            image: An image, a batch, or a list of images and batches; see `__call__`.

        Raises:
            ValueError: If `image` is not an image, or the images need several sizes.
        """
        images = prepare_rgb_images(image, "image")
        grid_size, stride = self.transformer.config.grid_size, self.vq_model.config.stride
        grids = {choose_grid(*one.size, grid_size) for one in images}
        if len(grids) > 1:
            found = ", ".join(f"{columns * stride}×{rows * stride}" for rows, columns in sorted(grids))
            raise ValueError(
                f"`aspect` is 'source', but the images of `image` have different proportions, which need {found} "
                "pixels; edit them in calls of their own, or pass `aspect='model'`."
            )
        rows, columns = grids.pop()
        for one in images:
            change = one.width * rows / (one.height * columns)
            if not 1 / MAX_SILENT_STRETCH <= change <= MAX_SILENT_STRETCH:
                warn_caller(
                    f"An image of {one.width}×{one.height} pixels is edited at the proportions {columns}:{rows}, "
                    "so the model sees it distorted; edit a part of it, or pass a mask with `crop_to_mask=True`."
                )
        return rows * stride, columns * stride

    def resolve_resize_mode(self, resize_mode: str | None, aspect: str = "model") -> str:
        """Replace None by the mode of the aspect, `"stretch"` for `"source"`, and check that the mode exists."""
        if resize_mode is None:
            resize_mode = "stretch" if aspect == "source" else self.processor.image_processor.resize_mode
        check_choice("resize_mode", resize_mode, RESIZE_MODES)
        return resize_mode

    def plan_size(
        self,
        images: Sequence[Image.Image],
        height: int | None = None,
        width: int | None = None,
        resize_mode: str | None = None,
        aspect: str | None = None,
    ) -> tuple[tuple[int, int], str]:
        """Choose the height and width, in pixels, at which images are encoded, and how they are resized to this size.

        The arguments are those of `encode_image`; so are the defaults and the errors.
        """
        aspect = self.resolve_aspect(aspect, images, height, width)
        if aspect == "source":
            height, width = self.choose_size(images)
        return self.resolve_size(height, width), self.resolve_resize_mode(resize_mode, aspect)

    def compute_grid(self, height: int, width: int) -> tuple[int, int]:
        """Compute how many tokens an image of `height` × `width` pixels has per column and per row."""
        stride = self.vq_model.config.stride
        return height // stride, width // stride

    def prepare_pixel_values(
        self,
        image: ImageInput,
        height: int | None,
        width: int | None,
        resize_mode: str | None,
        aspect: str | None = None,
    ) -> torch.Tensor:
        """Convert images to pixels `(batch, 3, height, width)` in [−1, 1]."""
        images = prepare_rgb_images(image, "image")
        size, resize_mode = self.plan_size(images, height, width, resize_mode, aspect)
        return self.processor.image_processor.compute_pixel_values(images, *size, resize_mode)

    def encode_pixel_values(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """Encode pixels `(batch, 3, height, width)` in [−1, 1] to tokens `(batch, N)`."""
        # One by one, for the reason that `decode_one_by_one` gives.
        images = pixel_values.to(self._execution_device).split(1)
        image_tokens: Any = torch.cat([self.vq_model.encode(image).image_tokens for image in images])
        return image_tokens

    def decode_pixel_values(self, image_tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Decode tokens `(batch, N)` to float32 pixels `(batch, 3, height, width)`, nominally in [−1, 1]."""
        return decode_one_by_one(self.vq_model, image_tokens.to(self._execution_device), grid)

    def compute_source_pixels(
        self,
        pixel_values: torch.Tensor | None,
        source_image_tokens: torch.Tensor | None,
        num_rows: int,
        size: tuple[int, int],
    ) -> torch.Tensor:
        """Compute the source pixels of every row: the given ones, else decoded source tokens, else gray pixels."""
        if pixel_values is not None:
            return repeat_rows(pixel_values.to(self._execution_device), num_rows)
        if source_image_tokens is not None:
            return repeat_rows(self.decode_pixel_values(source_image_tokens, self.compute_grid(*size)), num_rows)
        return torch.zeros(num_rows, 3, *size, device=self._execution_device)

    def complete_tokens(
        self, image_tokens: torch.Tensor, source_image_tokens: torch.Tensor | None, size: tuple[int, int]
    ) -> torch.Tensor:
        """Fill in the tokens that an interrupted call did not decode, from the source or from a gray image."""
        num_tokens = image_tokens.shape[1]
        height, width = self.compute_grid(*size)
        if num_tokens == height * width:
            return image_tokens
        if source_image_tokens is None:
            source_image_tokens = self.encode_pixel_values(torch.zeros(1, 3, *size)).expand(len(image_tokens), -1)
        return torch.cat([image_tokens, source_image_tokens[:, num_tokens:]], dim=1)

    def compose_images(
        self,
        pixel_values: torch.Tensor,
        output_type: str = "pil",
        *,
        images: list[Image.Image] | None,
        source_pixel_values: torch.Tensor,
        region: EditRegion | None,
        resize_mode: str,
        detail: str,
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Convert pixels to images, keep the source outside the region, and put results back into `images` if given.

        For arrays and tensors, the images must all have the same size.
        """
        if images is None:
            if region is not None:
                # Where the weight is 0, the source's pixels stay unchanged; where it is 1, the result's pixels do.
                pixel_values = torch.lerp(source_pixel_values, pixel_values, region.weights)
            return self.processor.postprocess(pixel_values, output_type)
        reconstructions = self.processor.postprocess(source_pixel_values) if detail == "source" else None
        composed = []
        for index, result in enumerate(self.processor.postprocess(pixel_values)):
            image = images[index * len(images) // len(pixel_values)].copy()
            window, weights = (0, 0, *image.size), None
            if region is not None:
                left, top, right, bottom = region.windows[index].tolist()
                window, weights = (left, top, right, bottom), region.weights[index, 0].cpu().numpy()
            reconstruction = None if reconstructions is None else reconstructions[index]
            result = self.processor.image_processor.restore(
                result, image.crop(window), resize_mode, weights, reconstruction
            )
            image.paste(result, window[:2])
            composed.append(image)
        if output_type == "pil":
            return composed
        pixels = np.stack([np.asarray(image) for image in composed]) / np.float32(255)
        return pixels if output_type == "np" else torch.from_numpy(pixels).permute(0, 3, 1, 2).to(pixel_values.device)

    def draw_preserved_masks(
        self,
        images: list[Image.Image] | None,
        source_pixel_values: torch.Tensor,
        region: EditRegion,
        resize_mode: str,
    ) -> list[Image.Image | None]:
        """Draw, for each result of `compose_images`, a mask that is white where the pixels are those of the source.

        The mask is `None` where all tokens may change.
        """
        # Where nothing black shows, nothing of a result does.
        white = None if images is None else [Image.new("RGB", image.size, "white") for image in images]
        black = torch.full_like(source_pixel_values, -1.0)
        drawn: Any = self.compose_images(
            black, images=white, source_pixel_values=-black, region=region, resize_mode=resize_mode, detail="model"
        )
        return [
            None if is_free else image.convert("L").point(lambda value: 255 * (value == 255))
            for image, is_free in zip(drawn, region.edit_mask.all(dim=1).tolist(), strict=True)
        ]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: ImageInput | None = None,
        task: str | Sequence[str] = "edit",
        height: int | None = None,
        width: int | None = None,
        size_policy: str | None = None,
        aspect: str | None = None,
        resize_mode: str | None = None,
        restore_size: bool | None = None,
        detail: str = "model",
        mask_image: ImageInput | None = None,
        mask_blend: bool = True,
        crop_to_mask: bool = False,
        preserve: str = "off",
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        source_image_tokens: torch.LongTensor | None = None,
        source_cache: SourceCache | None = None,
        decoding: str = "exact",
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("image_tokens",),
        preview_every: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> EditARPipelineOutput | tuple:
        """Edit images by instruction.

        Prompts and images are paired. One prompt is used for all images, or one image for all prompts. To stop a call
        after the current decoder pass, call `pipe.interrupt()` in a callback or from another thread. The tokens that
        are not decoded then are those of the source, or of a gray image if there is no source.

        Args:
            prompt (`str` or sequence of `str`): The instructions, or the captions of condition maps.
            image (*optional*): The source image or condition map: a PIL image, an array (height, width, channels), a
                tensor (channels, height, width), a path or URL, a batch, or a list of these. With `None`, the result is
                generated from the text alone.
            task (`str` or sequence of `str`): `"edit"`, `"canny"`, `"depth"`, `"segmentation"` or `"text-to-image"`.
                The published prefix of the task goes before the prompt and the negative prompt. `"text-to-image"` takes
                no source; with the other tasks, a call without a source warns.
            height, width (`int`, *optional*): Size the model works at, in pixels; *defaults to* that of the model.
            size_policy (`str`, *optional*): What happens if the model cannot work at `height` × `width`. `"strict"`
                (*default*) raises an error. `"fit"` resizes source and mask to this size, edits them at the nearest
                size of the same proportions that the model can work at, and returns images of `height` × `width`; with
                a mask, all pixels that may not change are those of the resized source. With `restore_size=True` or
                `crop_to_mask`, images have the size of the source instead, and with `output_type="tokens"`, the result
                is the tokens at the size the model worked at.
            aspect (`str`, *optional*): `"model"` works at the model's size; for the published weights, a square.
                `"source"` works at the size whose proportions are nearest to those of `image`, between 1:2 and 2:1; the
                longer side is the longest one of the model. `resize_mode` then *defaults to* `"stretch"`, which hardly
                changes the proportions, except those of longer images, with a warning. *Defaults to* that of the model,
                unless `height` or `width` is given. Only a model that was trained at several aspect ratios edits well
                at them.
            resize_mode (`str`, *optional*): How the source is resized to that size: `"crop"` (resize the shortest side,
                then crop the center; warns if more than 2 % is cut away) or `"stretch"`; *defaults to* that of the
                model.
            restore_size (`bool`, *optional*): Return images of the size of the source. After a crop, the result is put
                back into the full source; after a stretch, it is resized back. Needs `image` and `output_type="pil"`.
                *Defaults to* True if the task is `"edit"` or the aspect is `"source"`, `image` is given, the output is
                PIL images, and `height`, `width`, `source_image_tokens` and `source_cache` are not given.
            detail (`str`): Where the fine detail of a result comes from if the image is larger than the size the model
                works at. `"model"` resizes the result. `"source"` applies the change of colors to `image` at its full
                size, and so keeps its detail; what is new is resized. It suits edits of light and colors; of an object
                that is removed, replaced or moved, traces stay. Needs `restore_size=True` or `crop_to_mask`, and the
                task `"edit"`.
            mask_image (*optional*): White where the image may change. Pass one mask for all images, or one for each, of
                the size of the image; a mask of another size is resized with a warning. Transparent pixels count as
                black. A token may change if at least one of its pixels is white. All other tokens are copied from the
                source and need no pass of their own. For a mask without white, the source is returned with a warning.
            mask_blend (`bool`): Blend the result into the pixels of the source. The blend ends at most one token beyond
                the tokens that may change; all pixels farther away are those of the source.
            crop_to_mask (`bool`): Edit only a window around the white area of the mask, at the model's size, and put
                the result back into the full image. The window has the proportions of `height` × `width`. Needs
                `image`, `mask_image` and `output_type="pil"`, and no `resize_mode`.
            preserve (`str`): `"auto"` keeps what the instruction does not change, without a mask. One more decoder pass
                finds the tokens that may change: those whose value in the edit map (see `compute_edit_map`) is above
                `preserve_threshold` of the generation config. The edit then works as with a mask of them. If more than
                three quarters of the tokens are above half the threshold, the instruction is taken to change the whole
                image, and nothing is kept. If no token may change, the source is returned with a warning.
                `preserved_mask` of the output shows what was kept. `"auto"` needs a source and the task `"edit"`, and
                takes no `mask_image`. *Defaults to* `"off"`.
            guidance_scale (`float`, *optional*): Weight of the prompt; 1 means no guidance. `guidance_scale`,
                `do_sample`, `temperature`, `top_k` and `top_p` *default to* the settings in
                `transformer/generation_config.json`.
            image_guidance_scale (`float`, *optional*): Weight of the source image; `None` and 1 mean guidance by the
                prompt only.
            negative_prompt (`str` or sequence of `str`, *optional*): What the result should not show. It replaces the
                learned null text in guidance, and has no effect without guidance.
            do_sample, temperature, top_k, top_p (*optional*): Settings of sampling; see `DecodingSettings`.
            num_images_per_prompt (`int`): Number of results for each pair; the results of the first pair come first.
            generator (`torch.Generator` or a list of them, *optional*): One for all results, or one for each. A result
                depends only on its own seed, not on its place in the batch.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor`, *optional*): Text states from `encode_prompt`; they
                replace `prompt` and `negative_prompt`.
            source_image_tokens (`torch.LongTensor` of shape `(batch, N)`, *optional*): Tokens from `encode_image` or
                from an earlier output; they replace `image`. With `restore_size=True` or `mask_image`, also pass the
                image of these tokens, because the result is blended into it. When you edit an image several times, that
                is `image=output.images[0]`; with the original image, earlier edits would be lost.
            source_cache (`SourceCache`, *optional*): A cache from `prepare_source_cache`; it replaces `image`, and
                the source is neither encoded nor run through the decoder again. With `restore_size=True` or
                `mask_image`, `image` may also be given.
            decoding (`str`): `"exact"` decodes one token per pass. `"speculative"` gives the same tokens in fewer
                passes if the result is easy to predict. In bf16, rounding often decides near-ties differently; the
                tokens after a near-tie are then different, but equally likely.
            callback_on_step_end (`Callable`, *optional*): Called after every token as
                `callback(pipe, step, step, tensors)`, where `step` is the index of the token. Its return value is
                ignored.
            callback_on_step_end_tensor_inputs (sequence of `str`): Names of the tensors in `tensors`: `"image_tokens"`
                (the tokens so far), `"source_image_tokens"`, `"prompt_embeds"`.
            preview_every (`int`, *optional*): After every `preview_every` rows of tokens, `tensors` also holds
                `"preview"`: one PIL image for each result, with the decoded rows at the top and the source below. The
                last preview is the result. Earlier previews are fast and soft, because new rows are decoded small.
            output_type (`str`): `"pil"`, `"np"` (batch, height, width, 3) in [0, 1], `"pt"` (batch, 3, height, width)
                in [0, 1], or `"tokens"`.
            return_dict (`bool`): Return an `EditARPipelineOutput`; if False, return its values as a tuple.

        Raises:
            ValueError: If an argument is out of range, or inputs do not fit the model or each other.
            RuntimeError: If text states or logits are NaN or infinite, for example after an overflow in float16.
        """
        # 1. Check the inputs, and fill in the defaults
        check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, task)
        has_source = any(source is not None for source in (image, source_image_tokens, source_cache))
        check_preserve(preserve, mask_image, has_source, task)
        is_composed = mask_image is not None or preserve == "auto"
        how = crop_to_mask, resize_mode, restore_size, is_composed, task
        check_source(image, source_image_tokens, source_cache, mask_image, *how)
        check_decoding(decoding, None, 1 if image_guidance_scale is None else image_guidance_scale, has_source)
        images = None if image is None else prepare_rgb_images(image, "image")
        is_size_given = height is not None or width is not None
        aspect = self.resolve_aspect(aspect, images, height, width)
        if images is not None and aspect == "source":
            height, width = self.choose_size(images)
        if source_cache is not None and images is None and not is_size_given:
            stride = self.vq_model.config.stride
            height, width = source_cache.grid_height * stride, source_cache.grid_width * stride
        size = self.resolve_size(height, width, self.size_policy if size_policy is None else size_policy)
        default = self.processor.image_processor.size
        asked_size = (height or default.height, width or default.width)
        resize_mode = self.resolve_resize_mode(resize_mode, aspect)
        if crop_to_mask:
            resize_mode = "stretch"  # The window has the model's proportions.
        if restore_size is None:
            is_default = images is not None and not is_size_given and source_image_tokens is source_cache is None
            is_whole = aspect == "source" and resize_mode == "stretch"
            is_edit = set(list_texts(task)) == {"edit"}
            restore_size = is_default and (is_edit or is_whole) and output_type == "pil"
        check_detail(detail, restore_size, crop_to_mask, task)
        observers = callback_on_step_end, callback_on_step_end_tensor_inputs
        check_output(output_type, restore_size, crop_to_mask, *observers, self._callback_tensor_inputs, preview_every)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        given = {"guidance_scale": guidance_scale, "do_sample": do_sample, **sampling}
        model_config = self.transformer.generation_config
        settings = resolve_settings(model_config, None, given)
        num_images_per_prompt = check_integer("num_images_per_prompt", num_images_per_prompt)
        preserve_threshold: Any = resolve_preserve_threshold(model_config) if preserve == "auto" else None
        warn_of_greedy_decoding(settings, num_images_per_prompt, **sampling)
        self._interrupt = False

        # 2. Prepare and pair prompts, images and masks
        prompts, negative_prompts = add_task_prefixes(prompt, task), add_task_prefixes(negative_prompt, task)
        is_fitted = size != asked_size and not (restore_size or crop_to_mask)
        if is_fitted:
            if images is not None:
                if mask_image is not None:
                    mask_image = resize_masks(mask_image, images, *asked_size, resize_mode)
                resize_and_crop = self.processor.image_processor.resize_and_crop
                images = [resize_and_crop(one, *asked_size, resize_mode) for one in images]
            resize_mode = "stretch"
        sources, region, pixel_values = images, None, None
        whole = images or [Image.new("RGB", (asked_size if is_fitted else size)[::-1])]
        if mask_image is not None:
            how = size, self.vq_model.config.stride, resize_mode, mask_blend, crop_to_mask
            region = EditRegion.from_masks(mask_image, whole, *how)
            sources = region.crop(whole) if crop_to_mask else images
        if sources is not None:
            pixel_values = self.processor.image_processor.compute_pixel_values(sources, *size, resize_mode)
        num_rows = num_images_per_prompt * compute_batch_size(
            prompt=prompts or prompt_embeds,
            negative_prompt=negative_prompts or negative_prompt_embeds,
            image=sources,
            mask_image=None if region is None else region.edit_mask,
            source_image_tokens=source_image_tokens,
            source_cache=source_cache,
        )
        check_generator(generator, num_rows)

        # 3. Encode them, and repeat them to one row for each result
        device, grid = self._execution_device, self.compute_grid(*size)
        if source_image_tokens is not None:
            check_num_tokens("source_image_tokens", source_image_tokens, size, grid)
        if source_cache is not None:
            check_source_cache(source_cache, self.transformer.dtype, device, *grid)
            check_cached_images(source_cache, pixel_values)
            source_image_tokens = source_cache.source_image_tokens
            pixel_values = source_cache.pixel_values if pixel_values is None else pixel_values
        elif source_image_tokens is None and pixel_values is not None:
            source_image_tokens = self.encode_pixel_values(pixel_values)
        if prompts:
            prompt_embeds = self.encode_prompt(prompts)
        if negative_prompts:
            negative_prompt_embeds = self.encode_prompt(negative_prompts)
        rows: dict[str, torch.Tensor | None] = {
            "source_image_tokens": source_image_tokens,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
        }
        for name, entries in rows.items():
            if entries is not None:
                dtype = self.transformer.dtype if entries.is_floating_point() else entries.dtype
                rows[name] = repeat_rows(entries.to(device, dtype), num_rows)
        if preserve == "auto":
            inputs: Any = rows["source_image_tokens"], rows["prompt_embeds"]
            tokens, embeds = (entries[::num_images_per_prompt] for entries in inputs)
            if source_cache is None:  # The edit reads it, too.
                source_cache = self.transformer.prepare_source_cache(find_sources(tokens), *grid)
            edit_mask = find_edited_tokens(self.predict_edit_map(source_cache, embeds), preserve_threshold)
            if not edit_mask.flatten(1).any(dim=1).all():
                warn_caller(
                    '`preserve` is "auto", and no value of the edit map is above `preserve_threshold`, so the source '
                    'is returned unchanged. Pass `mask_image`, or `preserve="off"`.'
                )
            windows = [(0, 0, *image.size) for image in whole] * (len(edit_mask) // len(whole))
            region = EditRegion.from_edit_mask(edit_mask, windows, self.vq_model.config.stride, mask_blend)
        region = None if region is None else region.repeat_rows(num_rows, device)
        source_pixel_values: Any = None
        if region is not None or preview_every is not None or detail == "source":
            # The source's detail is what the VQ model loses of it, so the source must have passed through it, too.
            seen = None if detail == "source" else pixel_values
            source_pixel_values = self.compute_source_pixels(seen, source_image_tokens, num_rows, size)
        if is_fitted and images is None:
            shown = self.compute_source_pixels(pixel_values, source_image_tokens, num_rows, size)
            images = [one.resize(asked_size[::-1]) for one in self.processor.postprocess(shown)]

        # 4. Decode the tokens of the edited images
        composition: dict[str, Any] = {
            "images": images if restore_size or crop_to_mask or is_fitted else None,
            "source_pixel_values": source_pixel_values,
            "region": region,
            "resize_mode": resize_mode,
        }
        compose_images: Any = partial(self.compose_images, **composition, detail=detail)
        edit_mask = None if region is None else region.edit_mask
        preview = None
        if preview_every is not None:
            preview = RowPreview(self.vq_model, source_pixel_values, edit_mask, grid, preview_every, compose_images)
        with self.progress_bar(total=grid[0] * grid[1]) as progress_bar:
            reporter = StepReporter(self, progress_bar, *observers, rows, preview)
            output = self.transformer.generate(
                **rows,
                **settings._asdict(),
                image_guidance_scale=image_guidance_scale,
                generator=generator,
                source_cache=source_cache,
                edit_mask=edit_mask,
                decoding=decoding,
                grid_height=grid[0],
                grid_width=grid[1],
                stopping_criteria=StoppingCriteriaList([reporter]),
                return_dict_in_generate=True,
            )
        image_tokens = self.complete_tokens(output.sequences, rows["source_image_tokens"], size)

        # 5. Make the images
        if output_type == "tokens":
            results = image_tokens
        elif preview is not None and preview.is_complete:
            results = compose_images(preview.canvas, output_type)
        else:
            results = compose_images(self.decode_pixel_values(image_tokens, grid), output_type)
        self.maybe_free_model_hooks()
        preserved_mask = self.draw_preserved_masks(**composition) if preserve == "auto" else None
        output = EditARPipelineOutput(results, image_tokens, output.num_decode_steps, preserved_mask)
        return output if return_dict else output.to_tuple()
