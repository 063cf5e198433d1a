"""Sticker edits, the demo checkpoint's test set: the pixels tell whether an edit was carried out, without a model.

The source is a folder that `projects/stickers/make_sticker_edits.py` wrote. How near to the truth what is outside the
mask must come is measured here, once for all systems: as near as the truth that went through a tokenizer, less 1 dB.
"""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from ..samples import Sample
from ..stickers import TRANSLATIONS, compute_outside_psnr
from .sources import check_entry, parse_json
from .translation import read_rows


COLUMNS = {
    "source_image": Image.Image,
    "target_image": Image.Image,
    "prompt": str,
    "mask": Image.Image,
    "task": str,
    "details": str,
}


def read_samples(source: str, tokenizer: str | None = None) -> Iterator[Sample]:
    """Read the test split.

    Args:
        source (`str`): The data set's folder.
        tokenizer (`str`): Folder or Hub id of the pipeline whose tokenizer says how near is near enough.

    Raises:
        ValueError: If there is no tokenizer, or it works at another size.
    """
    if tokenizer is None:
        raise ValueError(
            "`tokenizer` is missing; name the pipeline whose tokenizer says how near to the truth a picture must be "
            "outside the mask, such as examples/sticker-editor."
        )
    reconstruct, stride = load_tokenizer(tokenizer)
    for index, row in read_rows(source, "test", COLUMNS):
        details = parse_json(row["details"], f"`details` of row {index}")
        check_entry(details, {"operation": str, "part": str}, f"`details` of row {index}")
        target, mask = row["target_image"], row["mask"].convert("L")
        is_edit = details["operation"] not in TRANSLATIONS
        ceiling = measure_ceiling(reconstruct(target), target, mask, stride) if is_edit else None
        part = "" if details["part"] == "seen" else f" ({details['part'].replace('_', ' ')})"
        yield Sample(
            id=f"{index:05}",
            prompt=row["prompt"],
            source_image=row["source_image"],
            task=row["task"],
            category=details["operation"] + part,
            target_image=target,
            mask=mask,
            details=details | {"token_size": stride, "outside_psnr_ceiling": ceiling},
        )


def load_tokenizer(name: str):
    """Load a pipeline's tokenizer: a function from picture to picture, and the pixels per token."""
    from ...pipelines.pipeline_editar import EditARPipeline

    try:
        pipeline = EditARPipeline.from_pretrained(name, dtype=torch.float32, text_encoder=None)
    except (OSError, ValueError) as error:
        raise ValueError(f"`tokenizer` {name!r} does not load; name a pipeline's folder or Hub id. {error}") from error
    size = pipeline.processor.image_processor.size

    def reconstruct(picture: Image.Image) -> Image.Image:
        if picture.size != (size.width, size.height):
            raise ValueError(
                f"`tokenizer` works at {size.width}×{size.height} pixels; the pictures have {picture.size}."
            )
        return pipeline.decode_image_tokens(pipeline.encode_image(picture))[0]

    return reconstruct, pipeline.vq_model.config.stride


def measure_ceiling(reconstructed: Image.Image, target: Image.Image, mask: Image.Image, stride: int) -> float:
    """Measure, outside the mask, how near the tokenizer brings the truth to itself, in dB."""
    return compute_outside_psnr(*(np.asarray(picture) for picture in (reconstructed, target, mask)), stride)
