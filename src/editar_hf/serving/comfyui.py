"""Edit ComfyUI's tensors: IMAGE is float (batch, height, width, channels) and MASK float (batch, height, width).

Both are in [0, 1]. `examples/comfyui/editar_nodes.py` has the nodes.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image

from ..pipelines.pipeline_editar import EditARPipeline


def edit_tensor(
    pipeline: EditARPipeline, image: torch.Tensor, prompt: str, seed: int, mask: torch.Tensor | None = None, **call: Any
) -> torch.Tensor:
    """Edit a batch of images, and return it as IMAGE.

    Args:
        pipeline (`EditARPipeline`): The pipeline.
        image (`torch.Tensor` of shape `(batch, height, width, channels)`): IMAGE with 1, 3 or 4 channels.
        prompt (`str`): The instruction.
        seed (`int`): Image k of the batch gets the seed `seed + k`, modulo 2⁶⁴.
        mask (`torch.Tensor` of shape `(batch, height, width)`, *optional*): MASK, 1 where the image may change; one
            for all images, or one for each. A mask of zeros counts as no mask, because ComfyUI loads images without
            transparency with such a mask.
        call: Further arguments of `EditARPipeline.__call__`.

    Raises:
        ValueError: If a tensor has another shape, or the pipeline refuses an argument.
    """
    if image.ndim != 4:
        raise ValueError(f"`image` has shape {tuple(image.shape)}; pass IMAGE, (batch, height, width, channels).")
    if mask is not None and mask.ndim != 3:
        raise ValueError(f"`mask` has shape {tuple(mask.shape)}; pass MASK, (batch, height, width).")
    # Some nodes return values slightly outside [0, 1].
    images = list(image.clamp(0, 1).float().cpu().numpy())
    masks = None if mask is None or not mask.any() else list(mask.clamp(0, 1).float().cpu().numpy())
    generators = [torch.Generator().manual_seed((seed + index) % 2**64) for index in range(len(images))]
    output = pipeline(prompt, image=images, mask_image=masks, generator=generators, return_dict=False, **call)
    return stack_images(output[0])


def stack_images(images: list[Image.Image]) -> torch.Tensor:
    """Convert images of one size to IMAGE, float32 (batch, height, width, 3) in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255)
