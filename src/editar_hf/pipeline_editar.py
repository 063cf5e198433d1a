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
from .generation.inputs import check_prompt_embeds, check_source_image_tokens
from .model_card import CARD_FILE, compose_pipeline_card, write_pipeline_card
from .modeling_editar import EditARForConditionalGeneration
from .modeling_editar_vq import EditARVQModel
from .pipeline_loading import INDEX_FILE, check_pipeline_folder, select_pipeline_files
from .processing_editar import OUTPUT_TYPES, EditARProcessor, _list_pictures


@dataclass
class EditARPipelineOutput(BaseOutput):
    """What `EditARPipeline` returns.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): The pictures, as `output_type` asks; with
            `"tokens"`, the tokens.
        image_tokens (`torch.LongTensor` of shape `(batch, N)`): Their tokens, in raster order. They can go straight back
            in as the next call's `source_image_tokens`.
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


class EditARPipeline(DiffusionPipeline):
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
        """
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
            return self._upload_folder(
                folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr
            )

    # Parts of a call

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str], task: str | Sequence[str] = "edit") -> torch.Tensor:
        """Encode prompts as text states, `(batch, num_text_tokens, text_hidden_size)`.

        Args:
            prompt (`str` or sequence of `str`): The prompts.
            task (`str` or sequence of `str`): Whose prefix goes before them; see `apply_task_prefix`.

        Raises:
            ValueError: If a prompt is not a string, or a task is unknown or their number is not that of the prompts.
        """
        inputs = self.processor(text=prompt, task=task).to(self._execution_device)
        # Parity: the text encoder masks padding, the decoder attends to its states.
        states = self.text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
        return states.to(self.transformer.dtype)

    @torch.no_grad()
    def encode_image(
        self, image: ImageInput, height: int | None = None, width: int | None = None, resize_mode: str | None = None
    ) -> torch.LongTensor:
        """Encode pictures as tokens, `(batch, N)` in raster order, good for any number of calls as `source_image_tokens`.

        Args:
            image: A picture, a batch, or a list of either; see `__call__`.
            height, width (`int`, *optional*): Pixels the model works at; default the model's.
            resize_mode (`str`, *optional*): `"crop"` or `"stretch"`; default the model's.

        Raises:
            ValueError: If an image is not an image, or the size or the mode does not fit.
        """
        pixel_values = self.processor(
            images=image, height=height, width=width, resize_mode=resize_mode
        ).source_pixel_values
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
