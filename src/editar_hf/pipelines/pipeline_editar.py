"""`EditARPipeline`: a picture and an instruction in, the edited picture out.

The pipeline joins the parts: processor, text encoder, VQ tokenizer, decoder. What is decoded, and how, is
`EditARForConditionalGeneration.generate`'s business; how a folder of parts is saved, loaded and shared stands in
`pipelines/hub.py`, adapters in `pipelines/lora.py`, pictures and masks in `pipelines/edit_region.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from PIL import Image
from transformers import StoppingCriteriaList, T5EncoderModel
from transformers.image_utils import ImageInput

from ..checks import check_choice, check_integer, check_tensor, check_texts
from ..generation import SourceCache
from ..generation.configuration import resolve_generation_config
from ..generation.inputs import check_generator
from ..image_processing_editar import OUTPUT_TYPES
from ..modeling_editar import EditARForConditionalGeneration
from ..modeling_editar_vq import EditARVQModel
from ..processing_editar import EditARProcessor, check_task
from .callbacks import RowPreview, StepReporter
from .edit_region import EditARSourcesMixin
from .hub import EditARHubMixin
from .inputs import (
    MAX_NUM_IMAGES,
    SourceArguments,
    add_task_prefixes,
    check_callback,
    check_known_arguments,
    check_output_options,
    check_prompts,
    check_source,
    check_tokenizer,
    compute_batch_size,
    resolve_restore_size,
    warn_of_no_effect,
)
from .lora import EditARLoraMixin


@dataclass
class EditARPipelineOutput(BaseOutput):
    """What `EditARPipeline` returns.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): The pictures, as `output_type` asks; with
            `"tokens"`, the tokens.
        image_tokens (`torch.LongTensor` of shape `(batch, N)`): Their tokens, in raster order; ready to be the next
            call's `source_image_tokens`.
        num_passes (`int`): Decoder forwards after the prefill of source image and text.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    image_tokens: torch.LongTensor
    num_passes: int


class EditARPipeline(EditARLoraMixin, EditARSourcesMixin, EditARHubMixin):
    """Edit images by instruction, or make them from text or from condition maps.

    Args:
        transformer (`EditARForConditionalGeneration`): The decoder.
        vq_model (`EditARVQModel`): The tokenizer between pixels and the decoder's tokens.
        text_encoder (`T5EncoderModel`): Reads the prompts. May be `None` if every call brings `prompt_embeds`.
        processor (`EditARProcessor`): Prepares pictures and prompts.

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

    # The tokenizer works before and after the decoder; it is small, and stays beside it once it has encoded.
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
        check_tokenizer(transformer, text_encoder, processor)
        self.register_modules(
            transformer=transformer, vq_model=vq_model, text_encoder=text_encoder, processor=processor
        )
        self._interrupt = False

    # Speed

    def compile(self, **options):
        """Compile decoding, for many edits of one size; see `EditARForConditionalGeneration.compile_passes`."""
        self.transformer.compile_passes(**options)

    def free_compiled_caches(self):
        """Free the caches that compiled decoding keeps between calls."""
        self.transformer.free_compiled_caches()

    # Parts of a call

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str], task: str | Sequence[str] = "edit") -> torch.Tensor:
        """Encode prompts as text states, `(batch, num_text_tokens, text_hidden_size)`.

        Args:
            prompt (`str` or sequence of `str`): The prompts.
            task (`str` or sequence of `str`): Whose prefix goes before them; see `apply_task_prefix`.

        Raises:
            ValueError: If a prompt is not a string, a task is unknown, there are as many tasks neither as one nor as
                prompts, or the pipeline has no text encoder.
            RuntimeError: If the states are NaN or infinite.
        """
        if self.text_encoder is None:
            raise ValueError(f"`prompt` is {prompt!r}, and the pipeline has no text encoder; pass `prompt_embeds`.")
        check_texts("prompt", prompt)
        inputs = self.processor(text=prompt, task=task).to(self._execution_device)
        # Parity: the text encoder masks padding, the decoder attends to its states.
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
    def decode_image_tokens(
        self,
        image_tokens: torch.LongTensor,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Draw the pictures of tokens `(batch, N)`.

        Args:
            image_tokens (`torch.LongTensor`): Tokens in raster order.
            height, width (`int`, *optional*): Pixels of the pictures; default the model's.
            output_type (`str`): `"pil"`, `"np"` or `"pt"`; see `EditARImageProcessor.postprocess`.

        Raises:
            ValueError: If the tokens do not fill the size or are out of range, or `output_type` is unknown.
        """
        check_tensor("image_tokens", image_tokens)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        grid_height, grid_width = self.compute_grid(*self.resolve_size(height, width))
        pixel_values = self.vq_model.decode(image_tokens.to(self._execution_device), grid_height, grid_width)
        return self.processor.postprocess(pixel_values, output_type)

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
        """Compute by how much the instruction lowers the likelihood of every source token: where it wants a change.

        Experimental. Two teacher-forced passes, in which the result is the source itself, once with the instruction and
        once with the null text. A token is judged after the source's own tokens, so the signal is strongest where an
        edit begins and may fade in its later rows, which the model takes for decided.

        Args:
            image: A picture, a batch, or a list of either; see `__call__`.
            prompt (`str` or sequence of `str`): The instructions; one for all pictures, or one for each.
            task (`str` or sequence of `str`): Whose prefix goes before them.
            height, width (`int`, *optional*): Pixels the model works at; default the model's.
            resize_mode (`str`, *optional*): `"crop"` or `"stretch"`; default the model's.

        Returns:
            `torch.Tensor` of shape `(batch, grid_height, grid_width)`, float32, in nats; above 0 where the instruction
            speaks against the source's token.

        Raises:
            ValueError: If the inputs do not fit the model or each other.
        """
        check_texts("prompt", prompt)
        check_task(task)
        grid = self.compute_grid(*self.resolve_size(height, width))
        pixel_values = self.prepare_pixel_values(image, height, width, resize_mode)
        prompts = add_task_prefixes(prompt, task)
        batch_size = compute_batch_size(image=pixel_values, prompt=prompts)
        tokens = self.repeat_rows(self.encode_pixel_values(pixel_values), batch_size, 1)
        prompt_embeds = self.repeat_rows(self.encode_prompt(prompts), batch_size, 1)
        losses = []
        for is_dropped in (False, True):
            drop_prompt = torch.full((batch_size,), is_dropped, device=tokens.device)
            logits = self.transformer(
                tokens,
                prompt_embeds,
                target_image_tokens=tokens,
                drop_prompt=drop_prompt,
                grid_height=grid[0],
                grid_width=grid[1],
            ).logits
            losses.append(F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none"))
        self.maybe_free_model_hooks()
        return (losses[0] - losses[1]).unflatten(1, grid)

    def resolve_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Fill in the model's own height and width, in pixels, and refuse what its grid does not cover."""
        default, stride = self.processor.image_processor.size, self.vq_model.config.stride
        largest = self.transformer.config.grid_size * stride
        height = default.height if height is None else check_integer("height", height, stride, largest, stride)
        width = default.width if width is None else check_integer("width", width, stride, largest, stride)
        return height, width

    def compute_grid(self, height: int, width: int) -> tuple[int, int]:
        """Compute tokens per column and row of a picture of that many pixels."""
        stride = self.vq_model.config.stride
        return height // stride, width // stride

    def repeat_rows(
        self, rows: torch.Tensor | None, batch_size: int, num_images_per_prompt: int
    ) -> torch.Tensor | None:
        """Give one row to the whole batch, then every row to its images (0, 0, …, 1, 1, …), where the decoder runs."""
        if rows is None:
            return None
        dtype = self.transformer.dtype if rows.is_floating_point() else rows.dtype
        rows = rows.to(self._execution_device, dtype).expand(batch_size, *rows.shape[1:])
        return rows.repeat_interleave(num_images_per_prompt, dim=0)

    def generate_image_tokens(
        self,
        rows: dict[str, torch.Tensor | None],
        settings: dict,
        grid: tuple[int, int],
        callback: Callable | None,
        callback_tensor_inputs: Sequence[str],
        preview: RowPreview | None,
    ) -> tuple[torch.LongTensor, int]:
        """Decode the tokens of all images, and count the passes; with progress bar, callback, previews, interrupt."""
        grid_height, grid_width = grid
        with self.progress_bar(total=grid_height * grid_width) as progress_bar:
            reporter = StepReporter(self, progress_bar, callback, rows, callback_tensor_inputs, preview)
            output = self.transformer.generate(
                **rows,
                **settings,
                grid_height=grid_height,
                grid_width=grid_width,
                stopping_criteria=StoppingCriteriaList([reporter]),
                return_dict_in_generate=True,
            )
        return self.complete_tokens(output.sequences, rows["source_image_tokens"], grid), output.num_passes

    def complete_tokens(
        self, image_tokens: torch.LongTensor, source_image_tokens: torch.LongTensor | None, grid: tuple[int, int]
    ) -> torch.LongTensor:
        """Fill the tokens that an interrupted call did not reach: with the source's, or those of a grey picture."""
        grid_height, grid_width = grid
        if image_tokens.shape[1] == grid_height * grid_width:
            return image_tokens
        if source_image_tokens is None:
            stride = self.vq_model.config.stride
            blank = self.encode_pixel_values(torch.zeros(1, 3, grid_height * stride, grid_width * stride))
            source_image_tokens = blank.expand(len(image_tokens), -1)
        return torch.cat([image_tokens, source_image_tokens[:, image_tokens.shape[1] :]], dim=1)

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
        **unknown,
    ) -> EditARPipelineOutput | tuple:
        """Edit images by instruction.

        Prompts and images pair up; one prompt serves many images, one image many prompts. Setting
        `pipe._interrupt = True`, in a callback or from another thread, stops the call within a pass; the tokens that
        are missing then are the source's, or those of a grey picture where there is no source.

        Args:
            prompt (`str` or sequence of `str`): The instructions, or the captions of condition maps.
            image (*optional*): The source image or condition map: a PIL image, an array (height, width, channels), a
                tensor (channels, height, width), a path or URL, a batch, or a list of these. `None`: the image is made
                from the text alone.
            task (`str` or sequence of `str`): `"edit"`, `"canny"`, `"depth"` or `"segmentation"`: puts the published
                prefix before the prompt, and before the negative prompt. `"text-to-image"` has no prefix, and says
                that there is no source; without a source, the other tasks warn.
            height, width (`int`, *optional*): Pixels the model works at; default the model's.
            resize_mode (`str`, *optional*): How the source is brought there: `"crop"` (shortest side, then the centre;
                warns when more than 2 % is cut away) or `"stretch"`; default the model's.
            restore_size (`bool`, *optional*): Return images of the source's size: after a crop, the edited part in its
                place in the full source; after a stretch, the inverse resize. Needs `image` and `output_type="pil"`.
                Default: True for edits of `image` as PIL images where `height`, `width`, tokens and cache are left out.
            mask_image (*optional*): White where the image may change; one mask, or one per image, each of its image's
                size (another size is resized with a warning); transparency is black. A token may change if any of its
                pixels is white; all others keep their source tokens, and a pass is needed only for those that may. A
                mask without white returns the source, with a warning.
            mask_blend (`bool`): Lay the result over the source's own pixels, with a feather that ends at most one token
                beyond those that may change; behind it no pixel differs from the source at the output's size.
            crop_to_mask (`bool`): Edit a window around the mask, of the proportions of `height` × `width`, at the
                model's size, and put it back into the full image. Needs `image`, `mask_image` and `output_type="pil"`,
                and no `resize_mode`.
            guidance_scale (`float`, *optional*): Weight of the prompt; 1 decodes without guidance. Default, as of the
                next four: the setting in `transformer/generation_config.json`.
            image_guidance_scale (`float`, *optional*): Weight of the source image, in guidance with two knobs; 1 is the
                same as `None`.
            negative_prompt (`str` or sequence of `str`, *optional*): What guidance leads away from, in place of the
                learned null text. Without guidance it has no part in decoding.
            do_sample, temperature, top_k, top_p (*optional*): Sampling; see `EditARGenerationConfig`.
            num_images_per_prompt (`int`): Images of each pair; those of the first pair come first.
            generator (`torch.Generator` or a list of them, *optional*): One for all, or one per image returned. An
                image depends on its own seed alone, not on its place in the batch.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor`, *optional*): From `encode_prompt`, in place of text.
            source_image_tokens (`torch.LongTensor` of shape `(batch, N)`, *optional*): From `encode_image` or an
                earlier output, in place of `image`. With `restore_size=True` or `mask_image` the picture of these
                tokens, and no other, may stand beside them: the result is laid over it. In a session at full size that
                is the last turn's result, `image=output.images[0]`; over the first photograph earlier turns are lost.
            source_cache (`SourceCache`, *optional*): From `prepare_source_cache`, in place of `image`: the source costs
                nothing any more. Beside `image` with `restore_size=True` or `mask_image`.
            decoding (`str`): `"exact"`, one token per pass; or `"speculative"`, the same tokens in fewer passes where
                the result is easy to foresee. Rounding can turn a near-tie, in bf16 often; from there on the tokens
                are others, as likely.
            callback_on_step_end (`Callable`, *optional*): Called after every token as
                `callback(pipe, step, step, tensors)`; a step is the index of a token. What it returns is not looked at.
            callback_on_step_end_tensor_inputs (sequence of `str`): What `tensors` holds: `"image_tokens"` (those so
                far), `"source_image_tokens"`, `"prompt_embeds"`.
            preview_every (`int`, *optional*): After so many rows of tokens `tensors` also holds `"preview"`, a PIL
                image for each result: what is decoded so far, above the source, under the mask and of the size that
                the result will have. The last one is the result. The others are drawn in strips, which is cheap, so
                they are near to the result, not equal.
            output_type (`str`): `"pil"`, `"np"` (batch, height, width, 3) in [0, 1], `"pt"` (batch, 3, height, width)
                in [0, 1], or `"tokens"`.
            return_dict (`bool`): Return an `EditARPipelineOutput`, or its values as a tuple.

        Raises:
            ValueError: If an argument is out of range, or inputs do not fit the model or each other; before any network
                runs.
            TypeError: If there is no argument of that name; for `seed`, `strength` and others it says what to use.
            RuntimeError: If text states or logits are NaN or infinite, as after an overflow in float16.
        """
        # 1. Check inputs
        check_known_arguments(unknown)
        size = self.resolve_size(height, width)
        settings = {"guidance_scale": guidance_scale, "do_sample": do_sample}
        settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        resolved = resolve_generation_config(self.transformer.generation_config, None, settings)
        check_prompts(self.transformer.config, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, task)
        given = SourceArguments(image, resize_mode, mask_image, crop_to_mask, source_image_tokens, source_cache)
        device, grid = self._execution_device, self.compute_grid(*size)
        check_source(self.transformer, device, given, image_guidance_scale, restore_size, decoding, grid, task)
        restore_size = resolve_restore_size(restore_size, given, task, (height, width), output_type)
        check_output_options(output_type, restore_size, crop_to_mask, mask_blend, return_dict)
        num_images_per_prompt = check_integer("num_images_per_prompt", num_images_per_prompt, maximum=MAX_NUM_IMAGES)
        observers = callback_on_step_end, callback_on_step_end_tensor_inputs
        check_callback(*observers, self._callback_tensor_inputs, preview_every)
        self._interrupt = False

        # 2. Prepare prompts, pictures and masks, and see how many images they ask for
        prompts, negative_prompts = add_task_prefixes(prompt, task), add_task_prefixes(negative_prompt, task)
        sources = self.prepare_sources(given, size)
        texts = {"prompt": prompts or prompt_embeds, "negative_prompt": negative_prompts or negative_prompt_embeds}
        batch_size = compute_batch_size(**texts, **sources.count())
        check_generator(generator, batch_size * num_images_per_prompt)
        warn_of_no_effect(resolved, settings, generator, num_images_per_prompt, prompt, given, task)

        # 3. Encode them, and give every image its row
        negative_states = self.encode_prompt(negative_prompts) if negative_prompts else negative_prompt_embeds
        rows = {
            "source_image_tokens": self.encode_sources(sources),
            "prompt_embeds": self.encode_prompt(prompts) if prompts else prompt_embeds,
            "negative_prompt_embeds": negative_states,
        }
        rows = {name: self.repeat_rows(entries, batch_size, num_images_per_prompt) for name, entries in rows.items()}
        region = self.prepare_region(sources, rows["source_image_tokens"], size, mask_blend)

        # 4. Decode the tokens of the edited images
        settings |= {"image_guidance_scale": image_guidance_scale, "generator": generator}
        settings |= {"decoding": decoding, "source_cache": source_cache}
        settings["edit_mask"] = None if region is None else region.edit_mask
        preview = self.prepare_preview(sources, rows, region, size, restore_size, preview_every)
        image_tokens, num_passes = self.generate_image_tokens(rows, settings, grid, *observers, preview)

        # 5. Draw them
        images = self.draw_images(image_tokens, sources, region, size, restore_size, output_type, preview)
        self.maybe_free_model_hooks()
        output = EditARPipelineOutput(images=images, image_tokens=image_tokens, num_passes=num_passes)
        return output if return_dict else output.to_tuple()
