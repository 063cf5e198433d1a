"""Turn prompts and images into tensors: task prefixes, token ids and pixels.

Training, the pipeline and `AutoProcessor` all use `EditARProcessor`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .checks import check_choice, check_integer, check_texts, warn_caller
from .image_processing_editar import EditARImageProcessor


# The task of a prompt that has no source image.
TEXT_TO_IMAGE = "text-to-image"
# Source: EditAR (arXiv 2501.04699), the prompts of its training data.
TASK_PREFIXES = {
    "edit": "",
    "canny": "Given the canny edge image, generate an image following the description: ",
    "depth": "Given the depth image, generate an image following the description: ",
    "segmentation": "Given the segmentation mask, generate an image following the description: ",
    TEXT_TO_IMAGE: "",
}


def apply_task_prefix(text: str | Sequence[str], task: str | Sequence[str] = "edit") -> str | list[str]:
    """Put the published prefix of each task before its text. One text or one task is repeated to match the other.

    Args:
        text (`str` or sequence of `str`): The prompts.
        task (`str` or sequence of `str`): `"edit"` (no prefix), `"canny"`, `"depth"`, `"segmentation"` or
            `"text-to-image"` (no prefix).

    Returns:
        A string if `text` and `task` are strings, otherwise a list.

    Raises:
        ValueError: If a text is not a string, a task is unknown, or the numbers of tasks and texts differ.
    """
    check_texts("text", text)
    texts, tasks = ([entry] if isinstance(entry, str) else list(entry) for entry in (text, task))
    for one_task in tasks:
        check_choice("task", one_task, TASK_PREFIXES)
    count = max(len(texts), len(tasks))
    if any(len(entries) not in (1, count) for entries in (texts, tasks)):
        raise ValueError(
            f"`task` has {len(tasks)} entries for {len(texts)} texts; pass one task, or one for each text."
        )
    prompts = [TASK_PREFIXES[tasks[i % len(tasks)]] + texts[i % len(texts)] for i in range(count)]
    return prompts[0] if isinstance(text, str) and isinstance(task, str) else prompts


class EditARProcessor(ProcessorMixin):
    """Prepare images and prompts for EditAR, and turn pixels back into images.

    Args:
        image_processor (`EditARImageProcessor`): Converts images to pixels in [−1, 1].
        tokenizer (`T5Tokenizer`): Splits prompts into tokens.
        num_text_tokens (`int`): Every prompt is padded on the right, or cut, to this length, including its end token.

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

    def __init__(
        self, image_processor: EditARImageProcessor, tokenizer: PreTrainedTokenizerBase, num_text_tokens: int = 120
    ):
        num_text_tokens = check_integer("num_text_tokens", num_text_tokens)
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
        """Prepare source images, prompts and target images. At least one of the three must be given.

        Args:
            images (*optional*): Source images or condition maps; see `EditARImageProcessor.preprocess`.
            text (`str` or sequence of `str`, *optional*): The prompts.
            task (`str` or sequence of `str`): The tasks whose prefixes go before the prompts; see `apply_task_prefix`.
            height, width (`int`, *optional*): Size of the result in pixels; *defaults to* that of the image processor.
            resize_mode (`str`, *optional*): `"crop"` or `"stretch"`; *defaults to* that of the image processor.
            target_images (*optional*): Edited images, for training.
            return_tensors (`str`): `"pt"` or `"np"`.

        Returns:
            `BatchFeature` with `source_pixel_values` and `target_pixel_values` (batch, 3, height, width) in [−1, 1],
            and with `input_ids` and `attention_mask` (batch, num_text_tokens). Entries of inputs that are not given
            are absent. A prompt that is too long is cut, and a warning quotes the part that was cut.

        Raises:
            ValueError: If nothing is given, or a size, a mode, a task, an image or a text cannot be used.
        """
        if images is None and text is None and target_images is None:
            raise ValueError("`images`, `text` and `target_images` are all None; pass at least one of them.")
        features = {} if text is None else self._tokenize(apply_task_prefix(text, task))
        default = self.image_processor.size
        size = {
            "height": default.height if height is None else height,
            "width": default.width if width is None else width,
        }
        for name, given in (("source_pixel_values", images), ("target_pixel_values", target_images)):
            if given is not None:
                features[name] = self.image_processor(given, size=size, resize_mode=resize_mode).pixel_values
        return BatchFeature(features, tensor_type=return_tensors)

    def _tokenize(self, prompts: str | list[str]) -> dict[str, torch.Tensor]:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.num_text_tokens,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        # The end token and the padding tokens have offset 0, so the largest offset is the end of the kept text.
        ends = tokens.pop("offset_mapping")[..., 1].amax(dim=1).tolist()
        for prompt, end in zip(prompts, ends, strict=True):
            if cut := prompt[end:].strip():
                warn_caller(f"A prompt is longer than {self.num_text_tokens} tokens; this part was cut off: {cut!r}")
        return dict(tokens)

    def postprocess(
        self, pixel_values: torch.Tensor, output_type: str = "pil"
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Turn pixels back into images; see `EditARImageProcessor.postprocess`."""
        return self.image_processor.postprocess(pixel_values, output_type)
