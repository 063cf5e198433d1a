"""Edit held-out pairs with the pipeline that users call, and draw the results as one image."""

import textwrap
from typing import Any, cast

import torch
from PIL import Image, ImageDraw, ImageFont

from ..pipelines.pipeline_editar import EditARPipeline


def build_contact_sheet(rows: list[list[Image.Image]], gap: int = 4) -> Image.Image:
    """Arrange images of the same size on a white sheet, one row for each list."""
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (len(rows[0]) * (width + gap) + gap, len(rows) * (height + gap) + gap), "white")
    for row_index, row in enumerate(rows):
        for column_index, image in enumerate(row):
            sheet.paste(image, (gap + column_index * (width + gap), gap + row_index * (height + gap)))
    return sheet


def add_caption(image: Image.Image, text: str, num_lines: int = 1) -> Image.Image:
    """Put a caption of `num_lines` lines above an image. A longer text is cut off."""
    lines = textwrap.wrap(text, image.width // 6, max_lines=num_lines, placeholder=" …")
    height = 18 * num_lines
    captioned = Image.new("RGB", (image.width, image.height + height), "white")
    ImageDraw.Draw(captioned).text((0, 0), "\n".join(lines), "black", ImageFont.load_default(size=12))
    captioned.paste(image, (0, height))
    return captioned


@torch.no_grad()
def draw_validation_images(
    pipeline: EditARPipeline,
    batch: dict[str, Any],
    num_images: int,
    seed: int = 0,
) -> Image.Image:
    """Draw the first pairs of a batch of tokens as rows source | edited | target.

    The seeds are the same at every step, so images of different steps can be compared.

    Args:
        pipeline (`EditARPipeline`): The pipeline with the current weights.
        batch (`dict`): `source_image_tokens`, `target_image_tokens`, `input_ids`, `attention_mask`, and `grid`.
        num_images (`int`): Number of rows; a smaller batch gives fewer.
        seed (`int`): Row k is sampled with `seed` + k.
    """
    height, width = (side * pipeline.vq_model.config.stride for side in batch["grid"])
    batch = {name: value[:num_images] for name, value in batch.items() if name != "grid"}
    source, target = (cast(torch.LongTensor, batch[f"{name}_image_tokens"]) for name in ("source", "target"))
    states = pipeline.text_encoder(batch["input_ids"], batch["attention_mask"])
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(source))]
    edited = pipeline(
        prompt_embeds=states.last_hidden_state,
        source_image_tokens=source,
        generator=generators,
        height=height,
        width=width,
        return_dict=False,
    )[0]
    sides = [pipeline.decode_image_tokens(tokens, height=height, width=width) for tokens in (source, target)]
    return build_contact_sheet([list(row) for row in zip(sides[0], edited, sides[1], strict=True)])
