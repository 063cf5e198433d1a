"""What happens after every token of a pipeline's call: progress, previews, the user's callback, the interrupt."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from transformers import StoppingCriteria


class RowPreview:
    """Draw results while they are decoded: row after row of tokens takes the place of the source.

    Only the new rows are drawn, together with the row above them, into which they fade: the tokenizer's decoder looks
    at the whole picture, so a strip by itself comes out near to what the result will show, not equal. After the last
    row the whole picture is drawn, as the result will be.

    Args:
        pipeline (`EditARPipeline`): Whose tokenizer draws.
        pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): What there is before the first row, in
            [−1, 1].
        grid (`tuple[int, int]`): Tokens in a column and in a row.
        rows_per_preview (`int`): Rows between two previews; the last comes with the last row in any case.
        compose (`Callable`): Makes pictures of such pixels, as those of the results are made.
    """

    def __init__(
        self,
        pipeline,
        pixel_values: torch.Tensor,
        grid: tuple[int, int],
        rows_per_preview: int,
        compose: Callable[[torch.Tensor], list[Image.Image]],
    ):
        self.pipeline = pipeline
        self.canvas = pixel_values.clone()
        self.grid_height, self.grid_width = grid
        self.rows_per_preview = rows_per_preview
        self.compose = compose
        self.num_drawn_rows = 0

    def is_due(self, num_tokens: int) -> bool:
        num_rows, rest = divmod(num_tokens, self.grid_width)
        return rest == 0 and (num_rows % self.rows_per_preview == 0 or num_rows == self.grid_height)

    @property
    def is_complete(self) -> bool:
        """Whether `canvas` shows the whole result."""
        return self.num_drawn_rows == self.grid_height

    def draw(self, image_tokens: torch.LongTensor) -> list[Image.Image]:
        """Draw the rows that are new in tokens `(batch, T)`, and return the pictures as they stand."""
        num_rows = image_tokens.shape[1] // self.grid_width
        first = 0 if num_rows == self.grid_height else max(self.num_drawn_rows - 1, 0)
        strip = image_tokens[:, first * self.grid_width : num_rows * self.grid_width]
        pixels = self.pipeline.vq_model.decode(strip, num_rows - first, self.grid_width).float()
        stride = self.pipeline.vq_model.config.stride
        # Over the row above, from what stands to what is new.
        weights = torch.ones(pixels.shape[2], 1, device=pixels.device)
        if num_rows < self.grid_height:
            num_faded = (self.num_drawn_rows - first) * stride
            weights[:num_faded, 0] = torch.arange(1, num_faded + 1, device=pixels.device) / (num_faded + 1)
        rows = slice(first * stride, num_rows * stride)
        self.canvas[:, :, rows] = torch.lerp(self.canvas[:, :, rows].float(), pixels, weights)
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
