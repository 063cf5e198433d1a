"""What happens after every token of a pipeline's call: progress, previews, the user's callback, the interrupt."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from transformers import StoppingCriteria


class RowPreview:
    """Draw results while they are decoded: row after row of tokens takes the place of the source.

    Only the new rows are drawn, with one more above them so that the seam is smooth. The tokenizer's decoder looks at
    the whole picture, so a strip by itself comes out near to what the result will show, not equal.

    Args:
        pipeline (`EditARPipeline`): Whose tokenizer draws.
        pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): What there is before the first row, in
            [−1, 1].
        grid_width (`int`): Tokens in a row.
        rows_per_preview (`int`): Rows between two previews.
        compose (`Callable`): Makes pictures of such pixels, as those of the results are made.
    """

    def __init__(
        self,
        pipeline,
        pixel_values: torch.Tensor,
        grid_width: int,
        rows_per_preview: int,
        compose: Callable[[torch.Tensor], list[Image.Image]],
    ):
        self.pipeline = pipeline
        self.canvas = pixel_values.clone()
        self.grid_width = grid_width
        self.rows_per_preview = rows_per_preview
        self.compose = compose
        self.num_drawn_rows = 0

    def is_due(self, num_tokens: int) -> bool:
        return num_tokens % (self.rows_per_preview * self.grid_width) == 0

    def draw(self, image_tokens: torch.LongTensor) -> list[Image.Image]:
        """Draw the rows that are new in tokens `(batch, T)`, and return the pictures as they stand."""
        stride, first = self.pipeline.vq_model.config.stride, max(self.num_drawn_rows - 1, 0)
        num_rows = image_tokens.shape[1] // self.grid_width
        strip = image_tokens[:, first * self.grid_width : num_rows * self.grid_width]
        pixels = self.pipeline.vq_model.decode(strip, num_rows - first, self.grid_width)
        rows = slice(self.num_drawn_rows * stride, num_rows * stride)
        self.canvas[:, :, rows] = pixels[:, :, (self.num_drawn_rows - first) * stride :]
        self.num_drawn_rows = num_rows
        return self.compose(self.canvas)


class StepReporter(StoppingCriteria):
    """After every token: move the progress bar, call the user's callback, and stop a pipeline that is interrupted.

    Args:
        pipeline (`EditARPipeline`): Whose call it is.
        progress_bar (`tqdm`): Counts tokens.
        callback (`Callable`, *optional*): The user's.
        tensors (`dict[str, torch.Tensor]`): What the callback may ask for, beside the tokens so far.
        names (sequence of `str`): What it does ask for.
        preview (`RowPreview`, *optional*): Draws for it.
    """

    def __init__(
        self,
        pipeline,
        progress_bar,
        callback: Callable | None,
        tensors: dict[str, torch.Tensor],
        names: Sequence[str],
        preview: RowPreview | None,
    ):
        self.pipeline = pipeline
        self.progress_bar = progress_bar
        self.callback = callback
        self.tensors = tensors
        self.names = names
        self.preview = preview

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        self.progress_bar.update()
        if self.callback is not None:
            step = input_ids.shape[1] - 1
            # A copy: what is decoded next depends on these tokens.
            tensors = {**self.tensors, "image_tokens": input_ids.clone()}
            shown = {name: tensors[name] for name in self.names}
            if self.preview is not None and self.preview.is_due(step + 1):
                shown["preview"] = self.preview.draw(input_ids)
            self.callback(self.pipeline, step, step, shown)
        # On the CPU, so that decoding on another device need not wait for the answer.
        return torch.full((len(input_ids),), self.pipeline._interrupt)
