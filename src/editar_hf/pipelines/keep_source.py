"""Put the source's pixels back where another editor did not mean to change them."""

import numpy as np
import torch
from PIL import Image

from ..checks import check_number, warn_caller
from ..image_processing_editar import EditARImageProcessor, prepare_rgb_image
from ..modeling_editar_vq import EditARVQModel
from .edit_region import average_neighbors, compute_feather


# The longest side at which images are compared, in pixels.
MAX_COMPARED_SIDE = 1024
# Editors change proportions by a few percent when they resize an image to a size that they support.
MAX_PROPORTION_CHANGE = 1.1
# If more than this fraction of the tokens count as edited, the edit is taken to change the whole image.
MAX_EDITED_FRACTION = 2 / 3


@torch.no_grad()
def keep_source(
    source: Image.Image | np.ndarray | torch.Tensor | str,
    edited: Image.Image | np.ndarray | torch.Tensor | str,
    vq_model: EditARVQModel,
    threshold: float = 0.1,
) -> Image.Image:
    """Keep the source's pixels outside the edit that any editor made.

    Editors often change the whole image a little: they compress it, blur it or shift its colors. This function compares
    both images through the encoder of a VQ model. It takes the edited pixels where the difference is large, with a soft
    edge of one token, and the source's pixels elsewhere. If more than two thirds of the image differ, the whole edited
    image is the result, with a warning. The result has no transparency: transparent pixels become white.

    Args:
        source (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str` or `Path`): The image before the edit; see
            `EditARImageProcessor`.
        edited: The result of the editor, in any size of about the same proportions. It must not be shifted or zoomed.
        vq_model (`EditARVQModel`): For example `pipe.vq_model`.
        threshold (`float`): Cosine distance of the latents above which a token counts as edited, as the mean over its
            3 × 3 neighborhood, in (0, 2); *defaults to* 0.1, which was measured with the VQ model of the scene editor
            only.

    Returns:
        `PIL.Image.Image`: RGB, of the size of `source`.

    Raises:
        TypeError: If `vq_model` is not an `EditARVQModel`.
        ValueError: If an image does not open, the proportions differ by more than a tenth, or the threshold is out of
            range.

    Example:

    ```python
    >>> from PIL import Image, ImageDraw
    >>> from editar_hf import EditARVQModel, keep_source
    >>> vq_model = EditARVQModel.from_pretrained("examples/scene-editor", subfolder="vq_model")
    >>> source = Image.linear_gradient("L").convert("RGB")
    >>> edited = source.point(lambda value: value + 1)  # an editor that changes all pixels a little …
    >>> ImageDraw.Draw(edited).rectangle((20, 20, 80, 80), fill="red")  # … and some on purpose
    >>> kept = keep_source(source, edited, vq_model)
    >>> kept.getpixel((50, 50)), kept.getpixel((200, 200)) == source.getpixel((200, 200))
    ((255, 0, 0), True)

    ```
    """
    if not isinstance(vq_model, EditARVQModel):
        raise TypeError(f"`vq_model` is a {type(vq_model).__name__}; pass an `EditARVQModel`, such as `pipe.vq_model`.")
    threshold = check_number("threshold", threshold)
    if not 0 < threshold < 2:
        raise ValueError(f"`threshold` is {threshold}; pass a cosine distance between 0 and 2.")
    source, edited = prepare_rgb_image(source, name="source"), prepare_rgb_image(edited, name="edited")
    width, height = source.size
    change = width * edited.height / (height * edited.width)
    if not 1 / MAX_PROPORTION_CHANGE <= change <= MAX_PROPORTION_CHANGE:
        raise ValueError(
            f"`edited` is {edited.width}×{edited.height} pixels and `source` is {width}×{height}, so their proportions "
            "differ; pass the part of the source that was edited."
        )
    edited = edited.resize(source.size, Image.Resampling.LANCZOS)
    stride = vq_model.config.stride
    scale = min(1, MAX_COMPARED_SIDE / max(source.size)) / stride
    rows, columns = (max(round(side * scale), 1) for side in (height, width))
    processor = EditARImageProcessor(stride=stride, size={"height": rows * stride, "width": columns * stride})
    pixels = processor([source, edited], resize_mode="stretch").pixel_values.to(vq_model.device)
    before, after = (vq_model.encode(image).latents for image in pixels.split(1))
    distances = average_neighbors((1 - (before * after).sum(dim=-1)).unflatten(1, (rows, columns)))
    is_edited = distances > threshold
    if is_edited.float().mean() > MAX_EDITED_FRACTION:
        is_edited = torch.ones_like(is_edited)
        warn_caller("`edited` differs from `source` nearly everywhere, so it is returned as it is.")
    weights = compute_feather(is_edited, stride)[0, 0]
    # Floored, so that a pixel between two weights of 0 stays exactly that of the source.
    shares = Image.fromarray((255 * weights).byte().cpu().numpy()).resize(source.size, Image.Resampling.BILINEAR)
    source.paste(edited, mask=shares)
    return source
