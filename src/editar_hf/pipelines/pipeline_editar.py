"""`EditARPipeline`: edit images by instruction.

`EditARPipeline.__call__` is the recipe: check inputs, prepare images, encode, decode tokens, draw images. The decoder
itself is in `modeling_editar.py` and `generation/`.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from PIL import Image
from transformers import StoppingCriteriaList, T5EncoderModel
from transformers.image_utils import ImageInput

from ..checks import check_choice, check_integer
from ..generation import SourceCache
from ..generation.inputs import check_decoding, check_generator, check_source_cache, resolve_settings
from ..image_processing_editar import RESIZE_MODES, prepare_rgb_images
from ..modeling_editar import EditARForConditionalGeneration
from ..modeling_editar_vq import EditARVQModel
from ..processing_editar import EditARProcessor, apply_task_prefix
from .callbacks import RowPreview, StepReporter
from .edit_region import EditRegion, repeat_rows
from .hub import EditARHubMixin
from .inputs import (
    add_task_prefixes,
    check_cached_images,
    check_output,
    check_prompts,
    check_source,
    compute_batch_size,
    list_texts,
    warn_of_greedy_decoding,
)
from .lora import EditARLoraMixin


@dataclass
class EditARPipelineOutput(BaseOutput):
    """The result of a call.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): The images, as `output_type` asks; with
            `"tokens"`, the tokens.
        image_tokens (`torch.LongTensor` of shape `(batch, N)`): Their tokens, in raster order. They can be the next
            call's `source_image_tokens`.
        num_decode_steps (`int`): Decoder passes after the prefill of source image and text.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    image_tokens: torch.LongTensor
    num_decode_steps: int

    @property
    def num_passes(self) -> int:
        """The former name of `num_decode_steps`."""
        warnings.warn("`num_passes` is now called `num_decode_steps`.", FutureWarning, stacklevel=2)
        return self.num_decode_steps


class EditARPipeline(EditARLoraMixin, EditARHubMixin):
    """Edit images by instruction, or make them from text or from condition maps.

    Args:
        transformer (`EditARForConditionalGeneration`): The decoder.
        vq_model (`EditARVQModel`): Turns pixels into tokens, and tokens into pixels.
        text_encoder (`T5EncoderModel`): Reads the prompts. May be `None` if every call passes `prompt_embeds`.
        processor (`EditARProcessor`): Prepares images and prompts.

    Source: EditAR (arXiv 2501.04699).

    Example:

    ```python
    >>> import torch
    >>> from PIL import Image, ImageDraw
    >>> from editar_hf import EditARPipeline
    >>> pipe = EditARPipeline.from_pretrained("examples/sticker-editor")
    >>> image = Image.new("RGB", (64, 64), "lightgrey")
    >>> ImageDraw.Draw(image).ellipse((20, 20, 40, 40), fill="red")
    >>> pipe("make the red circle blue", image=image, generator=torch.Generator().manual_seed(0)).images[0].size
    (64, 64)

    ```
    """

    # The VQ model works before and after the decoder. It is small, so it stays on the device once it has encoded.
    model_cpu_offload_seq = "text_encoder->transformer->vq_model"
    _callback_tensor_inputs = ("image_tokens", "source_image_tokens", "prompt_embeds")

    def __init__(
        self,
        transformer: EditARForConditionalGeneration,
        vq_model: EditARVQModel,
        text_encoder: T5EncoderModel,
        processor: EditARProcessor,
    ):
        super().__init__()
        if processor and processor.tokenizer.pad_token is None:
            raise ValueError("`processor` has a tokenizer without a padding token; save or download its files again.")
        if text_encoder and processor and len(processor.tokenizer) > text_encoder.config.vocab_size:
            raise ValueError(
                f"`processor` has a tokenizer of {len(processor.tokenizer)} entries and `text_encoder` reads "
                f"{text_encoder.config.vocab_size}; pass the tokenizer that it was trained with."
            )
        self.register_modules(
            transformer=transformer, vq_model=vq_model, text_encoder=text_encoder, processor=processor
        )
        self._interrupt = False

    def interrupt(self) -> None:
        """Stop the call in progress, from a callback or another thread, within one decoder pass."""
        self._interrupt = True

    def compile(self, **options: Any) -> None:
        """Compile decoding, for many edits of one size; see `EditARForConditionalGeneration.compile_decoding`."""
        self.transformer.compile_decoding(**options)

    def free_compiled_caches(self) -> None:
        """Free the caches that compiled decoding keeps between calls."""
        self.transformer.free_compiled_caches()

    # Parts of a call

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str], task: str | Sequence[str] = "edit") -> torch.Tensor:
        """Encode prompts as text states, `(batch, num_text_tokens, text_hidden_size)`.

        Args:
            prompt (`str` or sequence of `str`): The prompts.
            task (`str` or sequence of `str`): The tasks whose prefixes go before them; see `apply_task_prefix`.

        Raises:
            ValueError: If a prompt is not a string, a task is unknown, the numbers of tasks and prompts differ, or the
                pipeline has no text encoder.
            RuntimeError: If the states are NaN or infinite.
        """
        if self.text_encoder is None:
            raise ValueError(f"`prompt` is {prompt!r}, and the pipeline has no text encoder; pass `prompt_embeds`.")
        inputs = self.processor(text=prompt, task=task).to(self._execution_device)
        # Parity: the text encoder masks padding, but the decoder attends to the padding's states.
        states = self.text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
        states = states.to(self.transformer.dtype)
        if not states.isfinite().all():
            raise RuntimeError(
                f"The text encoder's states of `prompt` are NaN or infinite in {states.dtype}. The likely cause is an "
                "overflow in float16: load the pipeline with `dtype=torch.bfloat16` or `torch.float32`. In float32, "
                "its weights are damaged."
            )
        return states

    @torch.no_grad()
    def encode_image(
        self, image: ImageInput, height: int | None = None, width: int | None = None, resize_mode: str | None = None
    ) -> torch.LongTensor:
        """Encode images as tokens, `(batch, N)` in raster order: `source_image_tokens` for any number of calls.

        Args:
            image: An image, a batch, or a list of either; see `__call__`.
            height, width (`int`, *optional*): Pixels the model works at; *defaults to* the model's.
            resize_mode (`str`, *optional*): `"crop"` or `"stretch"`; *defaults to* the model's.

        Raises:
            ValueError: If an image is not an image, or the size or the mode does not fit.
        """
        return self.encode_pixel_values(self.prepare_pixel_values(image, height, width, resize_mode))

    @torch.no_grad()
    def prepare_source_cache(
        self, image: ImageInput, height: int | None = None, width: int | None = None, resize_mode: str | None = None
    ) -> SourceCache:
        """Compute what the networks know of images before any instruction: `source_cache` for any number of calls.

        A call with a cache neither encodes its source nor runs it through the decoder. A cache holds 180 MiB for an
        image of the published size in bf16. Calls refuse it once the decoder's weights or adapters have changed.

        Args:
            image, height, width, resize_mode: See `encode_image`.

        Raises:
            ValueError: If an image is not an image, or the size or the mode does not fit.
        """
        pixel_values = self.prepare_pixel_values(image, height, width, resize_mode)
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
            height, width (`int`, *optional*): Pixels of the images; *defaults to* the model's.
            output_type (`str`): `"pil"`, `"np"` or `"pt"`; see `EditARImageProcessor.postprocess`.

        Raises:
            ValueError: If the tokens do not fill the size or are out of range, or `output_type` is unknown.
        """
        grid = self.compute_grid(*self.resolve_size(height, width))
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
    ) -> torch.Tensor:
        """Compute by how much the instruction lowers the likelihood of every source token: where it asks for a change.

        Experimental. A teacher-forced pass, whose result is the source itself, runs with the instruction and with the
        null text. Each token is judged after the source's own tokens, so the signal is
        strongest where an edit begins, and may fade in its later rows.

        Args:
            image, height, width, resize_mode: See `encode_image`.
            prompt (`str` or sequence of `str`): The instructions; one for all images, or one for each.
            task (`str` or sequence of `str`): The tasks whose prefixes go before them.

        Returns:
            `torch.Tensor` of shape `(batch, grid_height, grid_width)`, float32, in nats; above 0 where the instruction
            speaks against the source's token.

        Raises:
            ValueError: If the inputs do not fit the model or each other.
        """
        pixel_values = self.prepare_pixel_values(image, height, width, resize_mode)
        grid = self.compute_grid(*pixel_values.shape[-2:])
        prompts = list_texts(apply_task_prefix(prompt, task))
        batch_size = compute_batch_size(image=pixel_values, prompt=prompts)
        tokens = repeat_rows(self.encode_pixel_values(pixel_values), batch_size)
        prompt_embeds = repeat_rows(self.encode_prompt(prompts), batch_size)
        # One batch: first with the instructions, then without.
        twice = tokens.repeat(2, 1)
        logits = self.transformer(
            twice,
            prompt_embeds.repeat(2, 1, 1),
            target_image_tokens=twice,
            drop_prompt=torch.arange(2 * batch_size, device=tokens.device) >= batch_size,
            grid_height=grid[0],
            grid_width=grid[1],
        ).logits
        losses = F.cross_entropy(logits.float().transpose(1, 2), twice, reduction="none")
        self.maybe_free_model_hooks()
        return (losses[:batch_size] - losses[batch_size:]).unflatten(1, grid)

    def resolve_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Fill in the model's own height and width, in pixels, and refuse what its grid does not cover."""
        default, stride = self.processor.image_processor.size, self.vq_model.config.stride
        largest = self.transformer.config.grid_size * stride
        height = default.height if height is None else check_integer("height", height, stride, largest, stride)
        width = default.width if width is None else check_integer("width", width, stride, largest, stride)
        return height, width

    def resolve_resize_mode(self, resize_mode: str | None) -> str:
        """Fill in the model's own mode."""
        if resize_mode is None:
            return self.processor.image_processor.resize_mode
        check_choice("resize_mode", resize_mode, RESIZE_MODES)
        return resize_mode

    def compute_grid(self, height: int, width: int) -> tuple[int, int]:
        """Compute how many tokens an image of that many pixels has per column and per row."""
        stride = self.vq_model.config.stride
        return height // stride, width // stride

    def prepare_pixel_values(
        self, image: ImageInput, height: int | None, width: int | None, resize_mode: str | None
    ) -> torch.Tensor:
        """Bring images to pixels `(batch, 3, height, width)` in [−1, 1]."""
        size, resize_mode = self.resolve_size(height, width), self.resolve_resize_mode(resize_mode)
        return self.processor.image_processor.compute_pixel_values(
            prepare_rgb_images(image, "image"), *size, resize_mode
        )

    def encode_pixel_values(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """Encode pixels `(batch, 3, height, width)` in [−1, 1] to tokens `(batch, N)`."""
        return self.vq_model.encode(pixel_values.to(self._execution_device)).image_tokens

    def decode_pixel_values(self, image_tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Decode tokens `(batch, N)` to pixels `(batch, 3, height, width)` around [−1, 1], in float32."""
        return self.vq_model.decode(image_tokens.to(self._execution_device), *grid).float()

    def compute_source_pixels(
        self,
        pixel_values: torch.Tensor | None,
        source_image_tokens: torch.Tensor | None,
        num_rows: int,
        size: tuple[int, int],
    ) -> torch.Tensor:
        """Give every row the pixels of its source, or those that its tokens decode to; without a source, grey ones."""
        if pixel_values is not None:
            return repeat_rows(pixel_values.to(self._execution_device), num_rows)
        if source_image_tokens is not None:
            return self.decode_pixel_values(source_image_tokens, self.compute_grid(*size))
        return torch.zeros(num_rows, 3, *size, device=self._execution_device)

    def complete_tokens(
        self, image_tokens: torch.Tensor, source_image_tokens: torch.Tensor | None, size: tuple[int, int]
    ) -> torch.Tensor:
        """Add the tokens that an interrupted call did not reach: the source's, or those of a grey image."""
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
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Make images of pixels: keep the source outside the region, and return results into `images`, if given."""
        if images is None:
            if region is not None:
                # Where a weight is 0 or 1, the pixels of one of the two stay exactly.
                pixel_values = torch.lerp(source_pixel_values, pixel_values, region.weights)
            return self.processor.postprocess(pixel_values, output_type)
        composed = []
        for index, result in enumerate(self.processor.postprocess(pixel_values)):
            image = images[index * len(images) // len(pixel_values)].copy()
            window, weights = (0, 0, *image.size), None
            if region is not None:
                left, top, right, bottom = region.windows[index].tolist()
                window, weights = (left, top, right, bottom), region.weights[index, 0].cpu().numpy()
            result = self.processor.image_processor.restore(result, image.crop(window), resize_mode, weights)
            image.paste(result, window[:2])
            composed.append(image)
        return composed

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: ImageInput | None = None,
        task: str | Sequence[str] = "edit",
        height: int | None = None,
        width: int | None = None,
        resize_mode: str | None = None,
        restore_size: bool | None = None,
        mask_image: ImageInput | None = None,
        mask_blend: bool = True,
        crop_to_mask: bool = False,
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

        Prompts and images pair up: one prompt serves many images, and one image many prompts. `pipe.interrupt()`, in a
        callback or from another thread, stops the call within one pass. The tokens that are missing then are the
        source's, or those of a grey image if there is no source.

        Args:
            prompt (`str` or sequence of `str`): The instructions, or the captions of condition maps.
            image (*optional*): The source image or condition map: a PIL image, an array (height, width, channels), a
                tensor (channels, height, width), a path or URL, a batch, or a list of these. With `None`, the image is
                made from the text alone.
            task (`str` or sequence of `str`): `"edit"`, `"canny"`, `"depth"` or `"segmentation"`. Its published prefix
                goes before the prompt and the negative prompt. `"text-to-image"` has no prefix and no source; the
                other tasks warn if there is no source.
            height, width (`int`, *optional*): Pixels the model works at; *defaults to* the model's.
            resize_mode (`str`, *optional*): How the source is brought there: `"crop"` (shortest side, then the centre;
                warns if more than 2 % is cut away) or `"stretch"`; *defaults to* the model's.
            restore_size (`bool`, *optional*): Return images of the source's size: after a crop, the edited part in its
                place in the full source; after a stretch, the inverse resize. Needs `image` and `output_type="pil"`.
                *Defaults to* True for edits of `image` to PIL images without `height`, `width`, tokens and cache.
            mask_image (*optional*): White where the image may change; one mask, or one per image, of the image's size.
                A mask of another size is resized with a warning. Transparent pixels are black. A token may change if
                any of its pixels is white. All other tokens are copied from the source, and need no pass of their own.
                A mask without white returns the source, with a warning.
            mask_blend (`bool`): Blend the result into the source's own pixels. The feather ends at most one token
                beyond the tokens that may change; outside it, no pixel differs from the source.
            crop_to_mask (`bool`): Edit a window around the mask, of the proportions of `height` × `width`, at the
                model's size, and put it back into the full image. Needs `image`, `mask_image` and `output_type="pil"`,
                and no `resize_mode`.
            guidance_scale (`float`, *optional*): Weight of the prompt; 1 decodes without guidance. This and the four
                settings of sampling *default to* those in `transformer/generation_config.json`.
            image_guidance_scale (`float`, *optional*): Weight of the source image, beside that of the prompt; 1 is the
                same as `None`.
            negative_prompt (`str` or sequence of `str`, *optional*): What guidance leads away from, in place of the
                learned null text. It has no effect without guidance.
            do_sample, temperature, top_k, top_p (*optional*): Sampling; see `DecodingSettings`.
            num_images_per_prompt (`int`): Images of each pair; those of the first pair come first.
            generator (`torch.Generator` or a list of them, *optional*): One for all, or one per image returned. An
                image depends on its own seed alone, not on its place in the batch.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor`, *optional*): From `encode_prompt`, in place of text.
            source_image_tokens (`torch.LongTensor` of shape `(batch, N)`, *optional*): From `encode_image` or an
                earlier output, in place of `image`. With `restore_size=True` or `mask_image`, pass the image of these
                tokens beside them, in a session `image=output.images[0]`: the result is blended into it. The original
                image there would lose the edits of earlier turns.
            source_cache (`SourceCache`, *optional*): From `prepare_source_cache`, in place of `image`: the source is
                neither encoded nor prefilled again. `image` may stand beside it with `restore_size=True` or
                `mask_image`.
            decoding (`str`): `"exact"`, one token per pass, or `"speculative"`, the same tokens in fewer passes if the
                result is easy to predict. Rounding can decide near-ties differently, in bf16 often; the tokens after
                one are then others, as likely.
            callback_on_step_end (`Callable`, *optional*): Called after every token as
                `callback(pipe, step, step, tensors)`; a step is the index of a token. What it returns is ignored.
            callback_on_step_end_tensor_inputs (sequence of `str`): What `tensors` holds: `"image_tokens"` (those so
                far), `"source_image_tokens"`, `"prompt_embeds"`.
            preview_every (`int`, *optional*): After so many rows of tokens, `tensors` also holds `"preview"`, a PIL
                image for each result, made as the result will be: the rows decoded so far above the source's. The last
                preview is the result. The others are decoded in strips, which is cheap but not exact.
            output_type (`str`): `"pil"`, `"np"` (batch, height, width, 3) in [0, 1], `"pt"` (batch, 3, height, width)
                in [0, 1], or `"tokens"`.
            return_dict (`bool`): Return an `EditARPipelineOutput`, or its values as a tuple.

        Raises:
            ValueError: If an argument is out of range, or inputs do not fit the model or each other.
            RuntimeError: If text states or logits are NaN or infinite, as after an overflow in float16.
        """
        # 1. Check the inputs, and fill in the defaults
        check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, task)
        check_source(
            image, source_image_tokens, source_cache, mask_image, crop_to_mask, resize_mode, restore_size, task
        )
        has_source = any(source is not None for source in (image, source_image_tokens, source_cache))
        check_decoding(decoding, None, 1 if image_guidance_scale is None else image_guidance_scale, has_source)
        size = self.resolve_size(height, width)
        resize_mode = self.resolve_resize_mode(resize_mode)
        if crop_to_mask:
            resize_mode = "stretch"  # The window has the model's proportions.
        if restore_size is None:
            is_default = image is not None and height is width is source_image_tokens is source_cache is None
            restore_size = is_default and set(list_texts(task)) == {"edit"} and output_type == "pil"
        observers = callback_on_step_end, callback_on_step_end_tensor_inputs
        check_output(output_type, restore_size, crop_to_mask, *observers, self._callback_tensor_inputs, preview_every)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        given = {"guidance_scale": guidance_scale, "do_sample": do_sample, **sampling}
        settings = resolve_settings(self.transformer.generation_config, None, given)
        num_images_per_prompt = check_integer("num_images_per_prompt", num_images_per_prompt)
        warn_of_greedy_decoding(settings, num_images_per_prompt, **sampling)
        self._interrupt = False

        # 2. Prepare prompts, images and masks, and pair them up
        prompts, negative_prompts = add_task_prefixes(prompt, task), add_task_prefixes(negative_prompt, task)
        images = sources = None if image is None else prepare_rgb_images(image, "image")
        region = pixel_values = None
        if mask_image is not None:
            masked = images or [Image.new("RGB", size[::-1])]
            how = size, self.vq_model.config.stride, resize_mode, mask_blend, crop_to_mask
            region = EditRegion.from_masks(mask_image, masked, *how)
            sources = region.crop(masked) if crop_to_mask else images
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

        # 3. Encode them, and give every result its row
        device, grid = self._execution_device, self.compute_grid(*size)
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
        region = None if region is None else region.repeat_rows(num_rows, device)
        source_pixel_values: Any = None
        if region is not None or preview_every is not None:
            source_pixel_values = self.compute_source_pixels(pixel_values, rows["source_image_tokens"], num_rows, size)

        # 4. Decode the tokens of the edited images
        compose_images = partial(
            self.compose_images,
            images=images if restore_size or crop_to_mask else None,
            source_pixel_values=source_pixel_values,
            region=region,
            resize_mode=resize_mode,
        )
        preview = None
        if preview_every is not None:
            preview = RowPreview(self.vq_model, source_pixel_values, grid, preview_every, compose_images)
        with self.progress_bar(total=grid[0] * grid[1]) as progress_bar:
            reporter = StepReporter(self, progress_bar, *observers, rows, preview)
            output = self.transformer.generate(
                **rows,
                **settings._asdict(),
                image_guidance_scale=image_guidance_scale,
                generator=generator,
                source_cache=source_cache,
                edit_mask=None if region is None else region.edit_mask,
                decoding=decoding,
                grid_height=grid[0],
                grid_width=grid[1],
                stopping_criteria=StoppingCriteriaList([reporter]),
                return_dict_in_generate=True,
            )
        image_tokens = self.complete_tokens(output.sequences, rows["source_image_tokens"], size)

        # 5. Draw the images
        if output_type == "tokens":
            results = image_tokens
        elif preview is not None and preview.is_complete:
            results = compose_images(preview.canvas, output_type)
        else:
            results = compose_images(self.decode_pixel_values(image_tokens, grid), output_type)
        self.maybe_free_model_hooks()
        output = EditARPipelineOutput(results, image_tokens, output.num_decode_steps)
        return output if return_dict else output.to_tuple()
