"""`EditARPipeline`: a picture and an instruction in, the edited picture out.

The pipeline joins the parts (processor, text encoder, VQ tokenizer, decoder) and knows how a folder of them is saved,
loaded and shared. What is decoded, and how, is `EditARForConditionalGeneration.generate`'s business.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from huggingface_hub import create_repo, file_exists, get_cached_repo_tree, hf_hub_download, snapshot_download
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, T5EncoderModel
from transformers.image_utils import ImageInput

from .generation.configuration import resolve_generation_config
from .model_card import CARD_FILE, compose_pipeline_card, write_pipeline_card
from .modeling_editar import EditARForConditionalGeneration
from .modeling_editar_vq import EditARVQModel
from .pipeline_inputs import (
    add_task_prefixes,
    check_callback_tensors,
    check_generator,
    check_output_options,
    check_prompts,
    check_source,
    compute_batch_size,
)
from .pipeline_loading import INDEX_FILE, check_pipeline_folder, select_pipeline_files
from .pipeline_lora import EditARLoraMixin
from .processing_editar import EditARProcessor, list_pictures


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


class StepReporter(StoppingCriteria):
    """After every token: move the progress bar, call the user's callback, and stop a pipeline that is interrupted."""

    def __init__(self, pipeline, progress_bar, callback: Callable | None, tensors: dict[str, torch.Tensor], names):
        self.pipeline = pipeline
        self.progress_bar = progress_bar
        self.callback = callback
        self.tensors = tensors
        self.names = names

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        self.progress_bar.update()
        if self.callback is not None:
            step = input_ids.shape[1] - 1
            # A copy: what is decoded next depends on these tokens.
            tensors = {**self.tensors, "image_tokens": input_ids.clone()}
            self.callback(self.pipeline, step, step, {name: tensors[name] for name in self.names})
        return torch.full((len(input_ids),), self.pipeline._interrupt, device=input_ids.device)


class EditARPipeline(EditARLoraMixin, DiffusionPipeline):
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
        self.register_modules(
            transformer=transformer, vq_model=vq_model, text_encoder=text_encoder, processor=processor
        )
        self._interrupt = False

    # Saving, loading, sharing

    def register_to_config(self, **kwargs):
        """Record components, ours under the name of the package: the modules they sit in are no published format."""
        package = __name__.partition(".")[0]
        for name, value in kwargs.items():
            if isinstance(value, tuple) and str(value[0]).startswith(f"{package}."):
                kwargs[name] = (package, value[1])
        super().register_to_config(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> Self:
        """Load a pipeline from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder that `save_pretrained` wrote, or a Hub id.
            kwargs: As of `DiffusionPipeline.from_pretrained`: `dtype` (one, or a dict per component), `variant`,
                `revision`, `token`, `cache_dir`, `local_files_only`, `device_map`, `quantization_config`, or components
                to be used in place of the stored ones.

        Raises:
            ValueError: If there is no pipeline, or a component's weights have missing, unexpected or wrongly shaped
                keys; before any weight is read.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.exists():
            folder = Path(cls.download(str(pretrained_model_name_or_path), **kwargs))
        components = {name: kind for name, (kind,) in cls._get_signature_types().items() if name not in kwargs}
        check_pipeline_folder(folder, components, kwargs.get("variant"))
        pipeline = super().from_pretrained(str(folder), **kwargs)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline

    @classmethod
    def download(
        cls,
        pretrained_model_name: str,
        revision: str | None = None,
        variant: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **kwargs,
    ) -> str:
        """Download what the pipeline needs of a Hub repository, and return the cached folder.

        diffusers' own `download` refuses components that are neither its own nor transformers', and leaves
        `transformer/generation_config.json` behind.

        Args:
            pretrained_model_name (`str`): The Hub id.
            revision, cache_dir, token, force_download, local_files_only (*optional*): As of `snapshot_download`.
            variant (`str`, *optional*): Which weight files to prefer.
            kwargs: Further arguments of `from_pretrained`; of a component among them, no file is downloaded.

        Raises:
            ValueError: If the repository holds no pipeline, or nothing of `variant`.
        """
        where = {"repo_id": pretrained_model_name, "revision": revision, "cache_dir": cache_dir}
        how = {"token": token, "force_download": force_download, "local_files_only": local_files_only}
        # The first call also leaves the list of all files in the cache, for when the Hub is out of reach.
        snapshot_download(**where, **how, allow_patterns=[INDEX_FILE])
        filenames = [file.path for file in get_cached_repo_tree(**where)]
        components = [name for name in cls._get_signature_keys(cls)[0] if name not in kwargs]
        return snapshot_download(**where, **how, allow_patterns=select_pipeline_files(filenames, components, variant))

    def save_pretrained(
        self, save_directory: str | Path, variant: str | None = None, max_shard_size: int | str | None = None
    ):
        """Write the pipeline as a folder; its model card too, if the folder has none.

        Args:
            save_directory (`str` or `Path`): The folder; made if it is not there.
            variant (`str`, *optional*): Marks the weight files, as in `model.fp16.safetensors`.
            max_shard_size (`int` or `str`, *optional*): Largest weight file, in bytes or as in `"5GB"`.

        Raises:
            ValueError: If the decoder has LoRA adapters: only they would be saved.
        """
        if names := self.list_adapters():
            raise ValueError(
                f"The pipeline has the adapters {', '.join(names)}. `save_lora_weights` saves one of them; to save a "
                "pipeline, call `unload_lora_weights` first, and before it `fuse_lora` to keep what they have learnt."
            )
        super().save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size)
        write_pipeline_card(save_directory, Path(save_directory).resolve().name)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> str:
        """Upload the pipeline to a Hub repository, with a card whose snippet names it; a card already there stays.

        Args:
            repo_id (`str`): The repository, made if it is not there.
            commit_message, private, token, create_pr (*optional*): As of huggingface_hub's `create_repo` and
                `upload_folder`.
            variant, max_shard_size (*optional*): As of `save_pretrained`.

        Returns:
            The address of the commit.
        """
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            card = Path(folder) / CARD_FILE
            if file_exists(repo_id, CARD_FILE, token=token):
                shutil.copyfile(hf_hub_download(repo_id, CARD_FILE, token=token), card)
            else:
                card.write_text(compose_pipeline_card(repo_id), encoding="utf-8")
            self.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
            return self._upload_folder(folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)

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
        """
        if self.text_encoder is None:
            raise ValueError(f"`prompt` is {prompt!r}, and the pipeline has no text encoder; pass `prompt_embeds`.")
        inputs = self.processor(text=prompt, task=task).to(self._execution_device)
        # Parity: the text encoder masks padding, the decoder attends to its states.
        states = self.text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
        return states.to(self.transformer.dtype)

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
        height, width = self.resolve_size(height, width)
        _, pixel_values = self.prepare_pictures(image, height, width, resize_mode)
        return self.encode_pixel_values(pixel_values)

    def encode_pixel_values(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """Encode prepared pixels `(batch, 3, height, width)` in [−1, 1] as tokens."""
        return self.vq_model.encode(pixel_values.to(self._execution_device)).image_tokens

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
        grid_height, grid_width = self.compute_grid(*self.resolve_size(height, width))
        pixel_values = self.vq_model.decode(image_tokens.to(self._execution_device), grid_height, grid_width)
        return self.processor.postprocess(pixel_values, output_type)

    def resolve_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Fill in the model's own height and width, in pixels, and refuse what its grid does not cover."""
        default, stride = self.processor.image_processor.size, self.vq_model.config.stride
        largest = self.transformer.config.grid_size * stride
        height = default.height if height is None else height
        width = default.width if width is None else width
        for name, value in (("height", height), ("width", width)):
            if not isinstance(value, int) or value % stride or not stride <= value <= largest:
                raise ValueError(
                    f"`{name}` is {value!r}; it must be a multiple of {stride}, the pixels per token, from {stride} to "
                    f"{largest}, which this model covers."
                )
        return height, width

    def compute_grid(self, height: int, width: int) -> tuple[int, int]:
        """Compute tokens per column and row of a picture of that many pixels."""
        stride = self.vq_model.config.stride
        return height // stride, width // stride

    def prepare_pictures(
        self, image: ImageInput | None, height: int, width: int, resize_mode: str | None
    ) -> tuple[list | None, torch.Tensor | None]:
        """List the pictures, and bring them to pixels `(batch, 3, height, width)` in [−1, 1]."""
        if image is None:
            return None, None
        pictures = list_pictures(image)
        inputs = self.processor(images=pictures, height=height, width=width, resize_mode=resize_mode)
        return pictures, inputs.source_pixel_values

    def repeat_rows(
        self, rows: torch.Tensor | None, batch_size: int, num_images_per_prompt: int
    ) -> torch.Tensor | None:
        """Give one row to the whole batch, then every row to its images (0, 0, …, 1, 1, …), where the decoder runs."""
        if rows is None:
            return None
        dtype = self.transformer.dtype if rows.is_floating_point() else rows.dtype
        rows = rows.to(self._execution_device, dtype).expand(batch_size, *rows.shape[1:])
        return rows.repeat_interleave(num_images_per_prompt, dim=0)

    def restore_images(
        self, images: list[Image.Image], pictures: list, height: int, width: int, resize_mode: str | None
    ) -> list[Image.Image]:
        """Bring edited images back to the sizes of the pictures they were made from; one picture serves all."""
        image_processor = self.processor.image_processor
        resize_mode = image_processor.resize_mode if resize_mode is None else resize_mode
        num_images_per_picture = len(images) // len(pictures)
        return [
            image_processor.restore(image, pictures[index // num_images_per_picture], height, width, resize_mode)
            for index, image in enumerate(images)
        ]

    def generate_image_tokens(
        self,
        rows: dict[str, torch.Tensor | None],
        sampling: dict,
        height: int,
        width: int,
        callback: Callable | None,
        callback_tensor_inputs: Sequence[str],
    ) -> tuple[torch.LongTensor, int]:
        """Decode the tokens of all images, and count the passes; with progress bar, callback and interrupt."""
        grid_height, grid_width = self.compute_grid(height, width)
        with self.progress_bar(total=grid_height * grid_width) as progress_bar:
            reporter = StepReporter(self, progress_bar, callback, rows, callback_tensor_inputs)
            output = self.transformer.generate(
                **rows,
                **sampling,
                grid_height=grid_height,
                grid_width=grid_width,
                stopping_criteria=StoppingCriteriaList([reporter]),
                return_dict_in_generate=True,
            )
        image_tokens = self.complete_tokens(output.sequences, rows["source_image_tokens"], height, width)
        return image_tokens, output.num_passes

    def complete_tokens(
        self, image_tokens: torch.LongTensor, source_image_tokens: torch.LongTensor | None, height: int, width: int
    ) -> torch.LongTensor:
        """Fill the tokens that an interrupted call did not reach: with the source's, or those of a grey picture."""
        grid_height, grid_width = self.compute_grid(height, width)
        if image_tokens.shape[1] == grid_height * grid_width:
            return image_tokens
        if source_image_tokens is None:
            blank = self.encode_pixel_values(torch.zeros(1, 3, height, width))
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
        restore_size: bool = False,
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
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("image_tokens",),
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> EditARPipelineOutput | tuple:
        """Edit images by instruction.

        Prompts and images pair up; one prompt serves many images, one image many prompts. Setting
        `pipe._interrupt = True`, in a callback or from another thread, stops the call after the token at hand; the
        tokens that are missing then are the source's, or those of a grey picture where there is no source.

        Args:
            prompt (`str` or sequence of `str`): The instructions, or the captions of condition maps.
            image (*optional*): The source image or condition map: a PIL image, an array (height, width, channels), a
                tensor (channels, height, width), a batch, or a list of these. `None`: text-to-image.
            task (`str` or sequence of `str`): `"edit"`, `"canny"`, `"depth"` or `"segmentation"`: puts the published
                prefix before the prompt, and before the negative prompt.
            height, width (`int`, *optional*): Pixels the model works at; default the model's.
            resize_mode (`str`, *optional*): How the source is brought there: `"crop"` (shortest side, then the centre;
                warns when more than 2 % is cut away) or `"stretch"`; default the model's.
            restore_size (`bool`): Return images of the source's size: after a crop, the edited part in its place in the
                full source; after a stretch, the inverse resize. Needs `image` and `output_type="pil"`.
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
                earlier output, in place of `image`; beside it with `restore_size=True`.
            callback_on_step_end (`Callable`, *optional*): Called after every token as
                `callback(pipe, step, step, tensors)`; a step is the index of a token. What it returns is not looked at.
            callback_on_step_end_tensor_inputs (sequence of `str`): What `tensors` holds: `"image_tokens"` (those so
                far), `"source_image_tokens"`, `"prompt_embeds"`.
            output_type (`str`): `"pil"`, `"np"` (batch, height, width, 3) in [0, 1], `"pt"` (batch, 3, height, width)
                in [0, 1], or `"tokens"`.
            return_dict (`bool`): Return an `EditARPipelineOutput`, or its values as a tuple.

        Raises:
            ValueError: If an argument is out of range, or inputs do not fit the model or each other; before any network
                runs.
        """
        # 1. Check inputs
        height, width = self.resolve_size(height, width)
        sampling = {
            "guidance_scale": guidance_scale,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
        resolve_generation_config(self.transformer.generation_config, None, sampling)
        config, grid = self.transformer.config, self.compute_grid(height, width)
        check_prompts(config, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, task)
        check_source(config, image, source_image_tokens, image_guidance_scale, restore_size, grid)
        check_output_options(output_type, restore_size, num_images_per_prompt)
        check_callback_tensors(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        self._interrupt = False

        # 2. Prepare prompts and pictures, and see how many images they ask for
        prompts, negative_prompts = add_task_prefixes(prompt, task), add_task_prefixes(negative_prompt, task)
        pictures, pixel_values = self.prepare_pictures(image, height, width, resize_mode)
        batch_size = compute_batch_size(
            prompt=prompts or prompt_embeds,
            negative_prompt=negative_prompts or negative_prompt_embeds,
            image=pictures,
            source_image_tokens=source_image_tokens,
        )
        check_generator(generator, batch_size * num_images_per_prompt)

        # 3. Encode them, and give every image its row
        if source_image_tokens is None and image is not None:
            source_image_tokens = self.encode_pixel_values(pixel_values)
        rows = {
            "source_image_tokens": source_image_tokens,
            "prompt_embeds": self.encode_prompt(prompts) if prompts else prompt_embeds,
            "negative_prompt_embeds": self.encode_prompt(negative_prompts)
            if negative_prompts
            else negative_prompt_embeds,
        }
        rows = {name: self.repeat_rows(entries, batch_size, num_images_per_prompt) for name, entries in rows.items()}

        # 4. Decode the tokens of the edited images
        sampling |= {"image_guidance_scale": image_guidance_scale, "generator": generator}
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        image_tokens, num_passes = self.generate_image_tokens(rows, sampling, height, width, *callback)

        # 5. Draw them
        images = image_tokens
        if output_type != "tokens":
            images = self.decode_image_tokens(image_tokens, height, width, output_type)
        if restore_size:
            images = self.restore_images(images, pictures, height, width, resize_mode)
        self.maybe_free_model_hooks()
        output = EditARPipelineOutput(images=images, image_tokens=image_tokens, num_passes=num_passes)
        return output if return_dict else output.to_tuple()
