"""The actions after every token of a call: progress bar, previews, the user's callback, interruption."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import StoppingCriteria

from ..modeling_editar_vq import EditARVQModel, decode_one_by_one


class RowPreview:
    """Draw previews of the results during decoding: decoded rows of tokens replace the rows of the source.

    A preview decodes the new rows and one row above them, and blends that row with the earlier preview. The rows are
    decoded at 4 × 4 pixels per token and enlarged, so a preview is softer than the result. New rows outside the mask
    are not decoded. The last preview decodes the whole image and is equal to the result.

    Args:
        vq_model (`EditARVQModel`): Decodes the tokens.
        pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Initial pixels, in [−1, 1].
        edit_mask (`torch.BoolTensor` of shape `(batch, N)`, *optional*): True for tokens that may change.
        grid (`tuple[int, int]`): Tokens per column and per row.
        rows_per_preview (`int`): Rows between two previews. There is always a preview after the last row.
        compose (`Callable`): Makes the preview images from pixels, in the same way as the results.
    """

    def __init__(
        self,
        vq_model: EditARVQModel,
        pixel_values: torch.Tensor,
        edit_mask: torch.Tensor | None,
        grid: tuple[int, int],
        rows_per_preview: int,
        compose: Callable[[torch.Tensor], Any],
    ):
        self.vq_model = vq_model
        self.canvas = pixel_values.clone()
        self.edit_mask = edit_mask
        self.grid_height, self.grid_width = grid
        self.rows_per_preview = rows_per_preview
        self.compose = compose
        self.num_drawn_rows = 0

    @property
    def is_complete(self) -> bool:
        """True if `canvas` is the complete result."""
        return self.num_drawn_rows == self.grid_height

    def draw(self, image_tokens: torch.LongTensor) -> list[Image.Image] | None:
        """Draw the new rows of tokens `(batch, T)` and return the preview; return `None` between two previews."""
        num_rows, rest = divmod(image_tokens.shape[1], self.grid_width)
        if rest or (num_rows % self.rows_per_preview and num_rows < self.grid_height):
            return None
        new = slice(self.num_drawn_rows * self.grid_width, num_rows * self.grid_width)
        if num_rows == self.grid_height:
            self.canvas = decode_one_by_one(self.vq_model, image_tokens, (self.grid_height, self.grid_width))
        elif self.edit_mask is None or self.edit_mask[:, new].any():
            self.draw_rows(image_tokens, num_rows)
        self.num_drawn_rows = num_rows
        return self.compose(self.canvas)

    def draw_rows(self, image_tokens: torch.LongTensor, num_rows: int) -> None:
        """Decode the new rows and one row above them, and blend them into the canvas."""
        first = max(self.num_drawn_rows - 1, 0)
        strip = image_tokens[:, first * self.grid_width :]
        num_skipped = max(len(self.vq_model.config.channel_multipliers) - 3, 0)  # a token then has 4 × 4 pixels
        pixels = decode_one_by_one(self.vq_model, strip, (num_rows - first, self.grid_width), num_skipped)
        pixels = F.interpolate(pixels, scale_factor=2**num_skipped, mode="bilinear")
        # The row above the new rows blends linearly from the earlier preview to the new pixels.
        stride = self.vq_model.config.stride
        weights = torch.ones(pixels.shape[2], 1, device=pixels.device)
        num_faded = (self.num_drawn_rows - first) * stride
        weights[:num_faded, 0] = torch.arange(1, num_faded + 1, device=pixels.device) / (num_faded + 1)
        rows = slice(first * stride, num_rows * stride)
        self.canvas[:, :, rows] = torch.lerp(self.canvas[:, :, rows].float(), pixels, weights)


class StepReporter(StoppingCriteria):
    """Report every token, and stop if the pipeline is interrupted.

    Args:
        pipeline (`EditARPipeline`): The pipeline that is called.
        progress_bar (`tqdm`): Counts tokens.
        callback (`Callable`, *optional*): The user's callback.
        names (sequence of `str`): Names of the tensors that the callback gets.
        tensors (`dict[str, torch.Tensor | None]`): The tensors by name, except `image_tokens`.
        preview (`RowPreview`, *optional*): Draws previews for the callback.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        progress_bar: Any,
        callback: Callable | None,
        names: Sequence[str],
        tensors: dict[str, torch.Tensor | None],
        preview: RowPreview | None,
    ) -> None:
        self.pipeline = pipeline
        self.progress_bar = progress_bar
        self.callback = callback
        self.tensors = tensors
        self.names = names
        self.preview = preview

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.progress_bar.update()
        if self.callback is not None:
            step = input_ids.shape[1] - 1
            # A copy, because a callback that changes the tokens in place would change decoding.
            tensors = {**self.tensors, "image_tokens": input_ids.clone()}
            shown: dict[str, Any] = {name: tensors[name] for name in self.names}
            if self.preview is not None and (preview := self.preview.draw(input_ids)) is not None:
                shown["preview"] = preview
            self.callback(self.pipeline, step, step, shown)
        # On the CPU, so that decoding on another device does not wait for it.
        return torch.full((len(input_ids),), self.pipeline._interrupt)
