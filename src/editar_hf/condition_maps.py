"""Photographs to condition maps: canny edges, depth and segmentation, each a picture that goes straight into `task=`.

```python
pipe("a red barn", image=make_canny_map(photo), task="canny")
```

Edges need kornia, the extra `maps`.
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
    """Find edges: white on black, in the size of the image.

    Args:
        image (`PIL.Image.Image`): The photograph.
        low_threshold, high_threshold (`float`): Gradients, of a grey image in [0, 1], above which a pixel continues an
            edge or begins one.

    Raises:
        ImportError: If kornia is not installed.
        ValueError: If the thresholds are not positive and in order.

    Source: the detector of the published training, kornia's with its thresholds on RGB in [0, 1].
    """
    try:
        from kornia.filters import canny
    except ImportError as error:
        raise ImportError(
            "`make_canny_map` needs kornia, which is not installed; it comes with the extra `maps`: "
            "`pip install -e '.[maps]'` in a clone of the repository."
        ) from error
    if not 0 < low_threshold <= high_threshold:
        raise ValueError(
            f"`low_threshold` is {low_threshold} and `high_threshold` {high_threshold}; both are positive, and the low "
            "one is not above the high one."
        )
    pixels = torch.from_numpy(np.array(prepare_rgb_image(image))).permute(2, 0, 1)[None] / 255
    edges = canny(pixels, low_threshold, high_threshold)[1][0, 0]
    return Image.fromarray((edges * 255).byte().numpy()).convert("RGB")


@torch.no_grad()
def make_depth_map(
    image: Image.Image, model: PreTrainedModel, image_processor: BaseImageProcessor, is_distance: bool = False
) -> Image.Image:
    """Estimate depth: the nearest point white, the farthest black, in the size of the image.

    Args:
        image (`PIL.Image.Image`): The photograph.
        model (`PreTrainedModel`): Any depth model of transformers (`AutoModelForDepthEstimation`).
        image_processor (`BaseImageProcessor`): Its own.
        is_distance (`bool`): Whether the model's values grow with the distance (metric models, such as ZoeDepth, GLPN
            and Depth Pro) and not with the nearness (MiDaS, DPT, Depth Anything).
    """
    outputs, size = run_model(image, model, image_processor)
    if model.config.model_type == "zoedepth":  # whose processor does this with torchvision
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
    # A wall that is everywhere as far away has no range to spread.
    spread = (depth - depth.min()) / (depth.max() - depth.min()).clamp(min=torch.finfo(torch.float32).tiny)
    return Image.fromarray((spread * 255).round().byte().numpy()).convert("RGB")


@torch.no_grad()
def make_segmentation_map(
    image: Image.Image,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    palette: np.ndarray | None = None,
) -> Image.Image:
    """Colour every pixel by its class, in the size of the image.

    Args:
        image (`PIL.Image.Image`): The photograph.
        model (`PreTrainedModel`): Any semantic segmentation model of transformers
            (`AutoModelForSemanticSegmentation`).
        image_processor (`BaseImageProcessor`): Its own.
        palette (`np.ndarray` of shape `(num_labels, 3)`, *optional*): A colour, 0 to 255, for each class; default that
            of `compute_palette`. An editor understands the palette it was trained with.

    Raises:
        ValueError: If the palette has another shape.
    """
    num_labels = model.config.num_labels
    palette = compute_palette(num_labels) if palette is None else np.asarray(palette)
    if palette.shape != (num_labels, 3):
        raise ValueError(f"`palette` has shape {palette.shape}; the model has {num_labels} classes: ({num_labels}, 3).")
    outputs, size = run_model(image, model, image_processor)
    (labels,) = image_processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
    return Image.fromarray(palette.astype(np.uint8)[labels.cpu().numpy()])


def compute_palette(num_labels: int) -> np.ndarray:
    """Compute distinct colours (num_labels, 3), uint8, the first black: the bits of a label, dealt to the channels.

    Source: the colour map of the PASCAL VOC development kit.
    """
    labels = np.arange(num_labels)[:, None]
    bits = [((labels >> (3 * place + np.arange(3))) & 1) << (7 - place) for place in range(8)]
    return np.sum(bits, axis=0).astype(np.uint8)


def run_model(
    image: Image.Image, model: PreTrainedModel, image_processor: BaseImageProcessor
) -> tuple[ModelOutput, tuple[int, int]]:
    """Run a vision model on an image; its outputs, and the image's height and width."""
    picture = prepare_rgb_image(image)
    inputs = image_processor(images=picture, return_tensors="pt").to(model.device, model.dtype)
    return model(**inputs), (picture.height, picture.width)
