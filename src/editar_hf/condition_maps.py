"""Make condition maps from images: Canny edges, depth and segmentation. Pass a map as `image`, with its `task`.

```python
pipe("a red barn", image=make_canny_map(photo), task="canny")
```

Canny edges need kornia: install the extra `maps`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import ModelOutput

from .image_processing_editar import prepare_rgb_image


def make_canny_map(image: Image.Image, low_threshold: float = 0.1, high_threshold: float = 0.2) -> Image.Image:
    """Draw the Canny edges of an image, white on black, at the size of the image.

    Args:
        image (`PIL.Image.Image`): The image.
        low_threshold, high_threshold (`float`): Gradient magnitudes of the gray image in [0, 1]. An edge starts at
            pixels above `high_threshold` and continues through pixels above `low_threshold`.

    Raises:
        ImportError: If kornia is not installed.
        ValueError: If a threshold is not positive, or `low_threshold` is above `high_threshold`.

    Source: the published training, which uses kornia's detector and its thresholds on RGB in [0, 1].
    """
    try:
        from kornia.filters import canny
    except ImportError as error:
        raise ImportError(
            "`make_canny_map` needs kornia, which is not installed. Install the extra `maps`: run "
            "`pip install -e '.[maps]'` in a clone of the repository."
        ) from error
    if not 0 < low_threshold <= high_threshold:
        raise ValueError(
            f"`low_threshold` is {low_threshold} and `high_threshold` is {high_threshold}; pass positive numbers, "
            "`low_threshold` not above `high_threshold`."
        )
    pixels = torch.from_numpy(np.array(prepare_rgb_image(image))).permute(2, 0, 1)[None] / 255
    edges = canny(pixels, low_threshold, high_threshold)[1][0, 0]
    return Image.fromarray((edges * 255).byte().numpy()).convert("RGB")


@torch.no_grad()
def make_depth_map(
    image: Image.Image, model: PreTrainedModel, image_processor: BaseImageProcessor, is_distance: bool = False
) -> Image.Image:
    """Draw the depth of an image at its size: the nearest point is white, the farthest point is black.

    Args:
        image (`PIL.Image.Image`): The image.
        model (`PreTrainedModel`): Any depth model of transformers (`AutoModelForDepthEstimation`).
        image_processor (`BaseImageProcessor`): The image processor of the model.
        is_distance (`bool`): True if larger values of the model mean farther points (metric models, such as ZoeDepth,
            GLPN and Depth Pro); False if they mean nearer points (MiDaS, DPT, Depth Anything).
    """
    outputs, size = run_model(image, model, image_processor)
    if model.config.model_type == "zoedepth":  # Its image processor needs torchvision for this step.
        # Source: the padding of ZoeDepth (arXiv 2302.12288): 3 √(side / 2) pixels before and behind each side.
        height, width = size
        top, left = (int(3 * (side / 2) ** 0.5) * image_processor.do_pad for side in size)
        padded_size = (height + 2 * top, width + 2 * left)
        padded = F.interpolate(outputs.predicted_depth[None].float(), padded_size, mode="bicubic")[0, 0]
        depth = padded[top : top + height, left : left + width]
    else:
        (result,) = image_processor.post_process_depth_estimation(outputs, target_sizes=[size])
        depth = result["predicted_depth"].float()
    depth = depth.cpu()
    depth = -depth if is_distance else depth
    # If all pixels have the same depth, the range is 0; the clamp avoids a division by zero.
    spread = (depth - depth.min()) / (depth.max() - depth.min()).clamp(min=torch.finfo(torch.float32).tiny)
    return Image.fromarray((spread * 255).round().byte().numpy()).convert("RGB")


@torch.no_grad()
def make_segmentation_map(
    image: Image.Image,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    palette: np.ndarray | None = None,
) -> Image.Image:
    """Draw the semantic segmentation of an image at its size: one color for each class.

    Args:
        image (`PIL.Image.Image`): The image.
        model (`PreTrainedModel`): Any semantic segmentation model of transformers
            (`AutoModelForSemanticSegmentation`).
        image_processor (`BaseImageProcessor`): The image processor of the model.
        palette (`np.ndarray` of shape `(num_labels, 3)`, *optional*): The RGB color of each class, 0 to 255;
            *defaults to* the result of `compute_palette`. Use the palette that the EditAR model was trained with.

    Raises:
        ValueError: If the palette does not have the shape `(num_labels, 3)`.
    """
    num_labels = model.config.num_labels
    palette = compute_palette(num_labels) if palette is None else np.asarray(palette)
    if palette.shape != (num_labels, 3):
        raise ValueError(
            f"`palette` has shape {palette.shape}; the model has {num_labels} classes, so pass shape ({num_labels}, 3)."
        )
    outputs, size = run_model(image, model, image_processor)
    (labels,) = image_processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
    return Image.fromarray(palette.astype(np.uint8)[labels.cpu().numpy()])


def compute_palette(num_labels: int) -> np.ndarray:
    """Compute distinct colors, uint8 of shape (num_labels, 3). The first color is black.

    The bits of a label go in turn to red, green and blue, beginning with the highest bit of each channel.

    Source: the color map of the PASCAL VOC development kit.
    """
    labels = np.arange(num_labels)[:, None]
    bits = [((labels >> (3 * place + np.arange(3))) & 1) << (7 - place) for place in range(8)]
    return np.sum(bits, axis=0).astype(np.uint8)


def run_model(
    image: Image.Image, model: PreTrainedModel, image_processor: BaseImageProcessor
) -> tuple[ModelOutput, tuple[int, int]]:
    """Run a vision model on an image; return its outputs, and the height and width of the image."""
    image = prepare_rgb_image(image)
    inputs = image_processor(images=image, return_tensors="pt").to(model.device, model.dtype)
    return model(**inputs), (image.height, image.width)
