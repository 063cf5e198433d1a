"""Held-out pairs as pictures: what the model makes of them, through the pipeline that users call."""

import torch
from PIL import Image

from ..pipelines.pipeline_editar import EditARPipeline


def build_contact_sheet(rows: list[list[Image.Image]], gap: int = 4) -> Image.Image:
    """Lay pictures of one size out on white, a row a list."""
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (len(rows[0]) * (width + gap) + gap, len(rows) * (height + gap) + gap), "white")
    for row_index, row in enumerate(rows):
        for column_index, picture in enumerate(row):
            sheet.paste(picture, (gap + column_index * (width + gap), gap + row_index * (height + gap)))
    return sheet


@torch.no_grad()
def draw_validation_pictures(
    pipeline: EditARPipeline,
    batch: dict[str, torch.Tensor],
    num_pictures: int,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
) -> Image.Image:
    """Draw the first pairs of a batch of tokens as rows source | edited | target.

    The same seed at every step, so that pictures of different steps compare.

    Args:
        pipeline (`EditARPipeline`): The model as it is now.
        batch (`dict[str, torch.Tensor]`): `source_image_tokens`, `target_image_tokens`, `input_ids`, `attention_mask`.
        num_pictures (`int`): Rows of the sheet; a smaller batch gives fewer.
        height, width (`int`, *optional*): Pixels the tokens stand for; default the model's.
        seed (`int`): Row k is sampled with `seed` + k.
    """
    source, target = (batch[name][:num_pictures] for name in ("source_image_tokens", "target_image_tokens"))
    states = pipeline.text_encoder(batch["input_ids"][:num_pictures], batch["attention_mask"][:num_pictures])
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(source))]
    size = {"height": height, "width": width}
    edited = pipeline(
        prompt_embeds=states.last_hidden_state, source_image_tokens=source, generator=generators, **size
    ).images
    columns = [pipeline.decode_image_tokens(source, **size), edited, pipeline.decode_image_tokens(target, **size)]
    return build_contact_sheet([list(row) for row in zip(*columns, strict=True)])
