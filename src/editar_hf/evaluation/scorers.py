"""Metrics that ask a network: CLIP, DINO, LPIPS, depth, segmentation, and the features of FID.

A scorer holds a network, given as a Hub id, a folder or an instance, and is called with pictures
(batch, 3, height, width) in [0, 1]. It prepares them as the published evaluation does and hands what the network says
to the pure functions of `image_metrics`, `map_metrics` and `distribution_metrics`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForDepthEstimation,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedModel,
    ViTModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from ..pipelines.hub import check_folder_or_hub_id
from .image_metrics import (
    check_mask,
    check_pair,
    compute_clip_similarity,
    compute_cosine_similarity,
    compute_structure_distance,
)
from .map_metrics import DepthVariant, compute_confusion_matrix, compute_depth_rmse
from .metric_models import FIDInceptionModel, LPIPSModel


# A Hub id, a folder, or the network itself.
Source = str | Path | PreTrainedModel

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Source: PnPInversion's evaluation: the shorter side, and the most that the longer may have.
STRUCTURE_SIDE, STRUCTURE_LONGEST_SIDE = 224, 480
# Source: MagicBrush's evaluation: DINO's shorter side before, and both after, the crop of the centre.
DINO_SIDE, DINO_CROP = 256, 224
# Source: the code of DINO (arXiv 2104.14294), whose layer norms have 1e-6; copies of its weights on the Hub say 1e-12.
DINO_KWARGS = {"add_pooling_layer": False, "layer_norm_eps": 1e-6}
# Source: Parmar et al., "On aliased resizing and surprising subtleties in GAN evaluation" (arXiv 2104.11222).
INCEPTION_SIDE = 299


def load_network(model: Source, model_class: type, device: str | torch.device | None, **kwargs) -> PreTrainedModel:
    """Load a network in fp32 onto a device; an instance stays where it is if no device is given.

    Args:
        model (`str`, `Path` or `PreTrainedModel`): A Hub id, a folder, or an instance.
        model_class (`type`): What loads an id or folder.
        device (`str`, *optional*): Default for an id or folder: a GPU if there is one.
        kwargs: For `from_pretrained`.

    Raises:
        ValueError: If `model` is a folder that is missing, or an instance and its weights are not fp32.
    """
    if not isinstance(model, PreTrainedModel):
        check_folder_or_hub_id(model, "model")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = model_class.from_pretrained(model, dtype=torch.float32, **kwargs)
    if model.dtype != torch.float32:
        raise ValueError(f"`model` is in {model.dtype}; figures are computed in float32: give `model.float()`.")
    return model.to(device).eval() if device is not None else model.eval()


def make_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Make 8-bit pictures of pixels (batch, 3, height, width) in [0, 1]."""
    steps = (images.cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(picture) for picture in steps.numpy()]


def apply_imagenet_statistics(pixels: torch.Tensor) -> torch.Tensor:
    """Normalise pixels (batch, 3, height, width) as DINO was trained."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


class LPIPSScorer:
    """Compute the perceptual distance of pictures and references.

    Args:
        model (`str` or `LPIPSModel`): A folder that `editar-hf convert-metric-model lpips` wrote, a Hub id, or an
            instance.
        device (`str`, *optional*): Where to compute; default: a GPU if there is one.

    Example:

    ```python
    >>> import torch
    >>> from editar_hf.evaluation.metric_models import LPIPSConfig, LPIPSModel
    >>> from editar_hf.evaluation.scorers import LPIPSScorer
    >>> scorer = LPIPSScorer(LPIPSModel(LPIPSConfig(width_divisor=16)))
    >>> scorer(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)).item()
    0.0

    ```
    """

    def __init__(self, model: Source, device: str | torch.device | None = None):
        self.model = load_network(model, LPIPSModel, device)

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor,
        references: torch.Tensor,
        mask: torch.Tensor | None = None,
        masked_mean: bool = False,
    ) -> torch.Tensor:
        """Compute LPIPS (batch,), 0 or more; the arguments are those of `compute_mse`."""
        check_pair(images, references, mask)
        device = self.model.device
        unedited = torch.ones_like(images[:, :1]) if mask is None else 1 - mask.float()
        images, references, unedited = (tensor.to(device).float() for tensor in (images, references, unedited))
        weights = unedited if masked_mean else None
        distance = self.model(images * unedited * 2 - 1, references * unedited * 2 - 1, weights).double()
        return distance.where(unedited.flatten(1).any(1), torch.nan).cpu()


class StructureScorer:
    """Compute the structure distance: how differently a DINO relates the places of two pictures to each other.

    Args:
        model (`str` or `ViTModel`): A DINO as a Hub id or a folder, whose layer norms get its authors' ε, 1e-6; or an
            instance, which stays as it is.
        device (`str`, *optional*): Where to compute; default: a GPU if there is one.
        pixel_scale (`int`): The value of white where pixels are normalised. 255 is what the published figures were
            computed with, 1 what the network was trained with.
        antialias (`bool`): Whether pictures are filtered as they are made smaller.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ViTConfig, ViTModel
    >>> from editar_hf.evaluation.scorers import StructureScorer
    >>> dino = ViTModel(ViTConfig(hidden_size=12, num_hidden_layers=1, intermediate_size=12), add_pooling_layer=False)
    >>> images = torch.rand(2, 3, 64, 64)
    >>> StructureScorer(dino)(images, images).tolist()
    [0.0, 0.0]

    ```
    """

    def __init__(
        self,
        model: Source = "facebook/dino-vitb8",
        device: str | torch.device | None = None,
        pixel_scale: int = 255,
        antialias: bool = True,
    ):
        self.model = load_network(model, ViTModel, device, **DINO_KWARGS)
        self.pixel_scale, self.antialias = pixel_scale, antialias

    def __call__(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Compute the structure distance (batch,), 0 or more."""
        check_pair(images, references)
        return compute_structure_distance(self.encode_keys(images), self.encode_keys(references))

    @torch.no_grad()
    def encode_keys(self, images: torch.Tensor) -> torch.Tensor:
        """Encode the keys (batch, tokens, dim) of the last layer, heads side by side, the class token's first."""
        size = compute_size(*images.shape[2:], STRUCTURE_SIDE, STRUCTURE_LONGEST_SIDE)
        pixels = images.to(self.model.device).float() * self.pixel_scale
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=self.antialias)
        outputs = []
        last_projection = self.model.layers[-1].attention.k_proj
        handle = last_projection.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            self.model(apply_imagenet_statistics(pixels), interpolate_pos_encoding=True)
        finally:
            handle.remove()
        return outputs[0]


def compute_size(height: int, width: int, side: int, longest_side: int | None = None) -> tuple[int, int]:
    """Compute the size at which the shorter side has `side` pixels, or fewer where the longer would have too many."""
    shorter, longer = side, int(side * max(height, width) / min(height, width))
    if longest_side is not None and longer > longest_side:
        shorter, longer = int(longest_side * shorter / longer), longest_side
    return (shorter, longer) if height <= width else (longer, shorter)


class CLIPScorer:
    """Compute how well pictures fit prompts, and how alike pictures are, in the eyes of CLIP.

    Args:
        model (`str` or `CLIPModel`): A CLIP as a Hub id, a folder or an instance.
        device (`str`, *optional*): Where to compute; default: a GPU if there is one.
        processor (`CLIPProcessor`, *optional*): With an instance, its processor; an id or folder brings its own.

    Raises:
        ValueError: If `model` is an instance and there is no processor.

    Example:

    ```python
    scorer = CLIPScorer("openai/clip-vit-base-patch32")
    scorer(images, ["a red barn"] * len(images))
    compute_cosine_similarity(scorer.encode_images(images), scorer.encode_images(references))  # CLIP-I
    ```
    """

    def __init__(
        self,
        model: Source = "openai/clip-vit-large-patch14",
        device: str | torch.device | None = None,
        processor: CLIPProcessor | None = None,
    ):
        if processor is None:
            check_has_processor(model)
            processor = CLIPProcessor(
                CLIPImageProcessorPil.from_pretrained(model), AutoTokenizer.from_pretrained(model)
            )
        self.processor = processor
        self.model = load_network(model, CLIPModel, device)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str], mask: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the CLIP score (batch,), in [0, 100], of pictures and prompts.

        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): In [0, 1].
            prompts (`Sequence[str]`): One for each picture; words beyond the model's length are cut off.
            mask (`torch.Tensor` of shape `(batch, 1, height, width)`, *optional*): 1 where edited; the rest becomes
                black. NaN for a mask that is empty.

        Raises:
            ValueError: If there are more or fewer prompts than pictures, or the mask does not fit.
        """
        if isinstance(prompts, str) or len(prompts) != len(images):
            raise ValueError(f"`prompts` is {prompts!r}; give a list of {len(images)}, one for each picture.")
        if mask is None:
            return compute_clip_similarity(self.encode_images(images), self.encode_prompts(prompts))
        check_mask(images, mask)
        similarity = compute_clip_similarity(self.encode_images(images * mask), self.encode_prompts(prompts))
        return similarity.where(mask.flatten(1).any(1).cpu(), torch.nan)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Encode pictures (batch, 3, height, width) in [0, 1] as (batch, dim)."""
        inputs = self.processor.image_processor(make_pictures(images), return_tensors="pt").to(self.model.device)
        return self.model.get_image_features(**inputs).pooler_output

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Encode prompts as (batch, dim)."""
        max_length = self.model.config.text_config.max_position_embeddings
        inputs = self.processor.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        return self.model.get_text_features(**inputs.to(self.model.device)).pooler_output


def check_has_processor(model: Source) -> None:
    """Refuse an instance without its processor, and a folder that is missing."""
    if isinstance(model, PreTrainedModel):
        raise ValueError(f"`processor` is missing; give that of the {type(model).__name__}, or the model as a folder.")
    check_folder_or_hub_id(model, "model")


class DINOScorer:
    """Compute how alike pictures are in the eyes of a DINO.

    Args:
        model (`str` or `ViTModel`): A DINO as a Hub id or a folder, whose layer norms get its authors' ε, 1e-6; or an
            instance, which stays as it is.
        device (`str`, *optional*): Where to compute; default: a GPU if there is one.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ViTConfig, ViTModel
    >>> from editar_hf.evaluation.scorers import DINOScorer
    >>> dino = ViTModel(ViTConfig(hidden_size=12, num_hidden_layers=1, intermediate_size=12), add_pooling_layer=False)
    >>> images = torch.rand(2, 3, 64, 64)
    >>> DINOScorer(dino)(images, images).round(decimals=4).tolist()
    [1.0, 1.0]

    ```
    """

    def __init__(self, model: Source = "facebook/dino-vits16", device: str | torch.device | None = None):
        self.model = load_network(model, ViTModel, device, **DINO_KWARGS)

    def __call__(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Compute the cosine (batch,), in [−1, 1], of the class tokens of pictures and references."""
        return compute_cosine_similarity(self.encode_images(images), self.encode_images(references))

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Encode pictures (batch, 3, height, width) in [0, 1] as class tokens (batch, dim)."""
        height, width = compute_size(*images.shape[2:], DINO_SIDE)
        left, top = round((width - DINO_CROP) / 2), round((height - DINO_CROP) / 2)
        box = (left, top, left + DINO_CROP, top + DINO_CROP)
        pictures = [picture.resize((width, height), Image.BICUBIC).crop(box) for picture in make_pictures(images)]
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255
        outputs = self.model(apply_imagenet_statistics(pixels.to(self.model.device)), interpolate_pos_encoding=True)
        return outputs.last_hidden_state[:, 0]


class DepthScorer:
    """Compute how far the depth of pictures is from the condition maps they were made from.

    Args:
        model (`str` or `PreTrainedModel`): A depth model as a Hub id, a folder or an instance.
        device (`str`, *optional*): Where to compute; default: a GPU if there is one.
        processor (`BaseImageProcessor`, *optional*): With an instance, its image processor.
        variant (`str`): A variant of `compute_depth_rmse`.

    Raises:
        ValueError: If `model` is an instance and there is no processor.

    Example:

    ```python
    scorer = DepthScorer(variant="controlnet++")
    scorer(images, depth_maps).mean()
    ```
    """

    def __init__(
        self,
        model: Source = "Intel/dpt-large",
        device: str | torch.device | None = None,
        processor: BaseImageProcessor | None = None,
        variant: DepthVariant = "editar",
    ):
        self.processor = processor or load_image_processor(model)
        self.model = load_network(model, AutoModelForDepthEstimation, device)
        self.variant = variant

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the depth RMSE (batch,), in [0, 255].

        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): In [0, 1].
            labels (`torch.Tensor` of shape `(batch, 1, label_height, label_width)`): The condition maps, in [0, 1].
        """
        height, width = size = tuple(images.shape[2:])
        # Parity: ControlAR's evaluation shows the network the whole picture, and not one of the size it was trained at.
        kwargs = {"size": {"height": height, "width": width}} if self.variant == "controlar" else {}
        inputs = self.processor(make_pictures(images), return_tensors="pt", **kwargs).to(self.model.device)
        return compute_depth_rmse(self.model(**inputs).predicted_depth, labels, self.variant, size)


def load_image_processor(model: Source) -> BaseImageProcessor:
    """Load the image processor of a checkpoint, of the kind that needs no torchvision."""
    check_has_processor(model)
    return AutoImageProcessor.from_pretrained(model, backend="pil")


class SegmentationScorer:
    """Compute which classes a segmentation model sees in pictures, and count them against the true ones.

    Args:
        model (`str` or `PreTrainedModel`): A model for semantic or universal segmentation with the classes of the
            labels, as a Hub id, a folder or an instance.
        device (`str`, *optional*): Where to compute; default: a GPU if there is one.
        processor (`BaseImageProcessor`, *optional*): With an instance, its image processor.

    Raises:
        ValueError: If `model` is an instance and there is no processor.

    Example:

    ```python
    scorer = SegmentationScorer("facebook/maskformer-resnet101-coco-stuff")
    confusion_matrix = sum(scorer(images, labels) for images, labels in batches)
    compute_mean_iou(confusion_matrix)
    ```
    """

    def __init__(
        self,
        model: Source = "facebook/maskformer-resnet101-coco-stuff",
        device: str | torch.device | None = None,
        processor: BaseImageProcessor | None = None,
    ):
        self.processor = processor or load_image_processor(model)
        self.model = load_network(model, find_segmentation_class(model), device)

    @property
    def num_labels(self) -> int:
        return self.model.config.num_labels

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the confusion matrix (num_labels, num_labels), int64, of all pictures of a batch.

        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): In [0, 1].
            labels (`torch.Tensor` of shape `(batch, height, width)`): True classes; 255 does not count.
        """
        return compute_confusion_matrix(self.segment(images, labels.shape[1:]), labels, self.num_labels)

    @torch.no_grad()
    def segment(self, images: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Compute classes (batch, height, width), in the size of the pictures if no other is given."""
        inputs = self.processor(make_pictures(images), return_tensors="pt").to(self.model.device)
        sizes = [tuple(size or images.shape[2:])] * len(images)
        maps = self.processor.post_process_semantic_segmentation(self.model(**inputs), target_sizes=sizes)
        return torch.stack(list(maps)).cpu()


def find_segmentation_class(model: Source) -> type:
    """Find the Auto class that knows a checkpoint: per-pixel models have one, mask classifiers another."""
    config = model.config if isinstance(model, PreTrainedModel) else AutoConfig.from_pretrained(model)
    is_semantic = type(config) in AutoModelForSemanticSegmentation._model_mapping
    return AutoModelForSemanticSegmentation if is_semantic else AutoModelForUniversalSegmentation


class InceptionScorer:
    """Compute the features of pictures whose Fréchet distance is FID, as clean-fid does.

    Args:
        model (`str` or `FIDInceptionModel`): A folder that `editar-hf convert-metric-model fid-inception` wrote, a Hub
            id, or an instance.
        device (`str`, *optional*): Where to compute; default: a GPU if there is one.

    Example:

    ```python
    >>> import torch
    >>> from editar_hf.evaluation.metric_models import FIDInceptionConfig, FIDInceptionModel
    >>> from editar_hf.evaluation.scorers import InceptionScorer
    >>> scorer = InceptionScorer(FIDInceptionModel(FIDInceptionConfig(width_divisor=16)))
    >>> tuple(scorer(torch.rand(2, 3, 64, 64)).shape)
    (2, 128)

    ```
    """

    def __init__(self, model: Source, device: str | torch.device | None = None):
        self.model = load_network(model, FIDInceptionModel, device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Compute features (batch, num_features) of pictures (batch, 3, height, width) in [0, 1]."""
        pixels = torch.stack([resize_for_inception(picture) for picture in make_pictures(images)])
        return self.model((pixels.to(self.model.device) - 128) / 128).cpu()


def resize_for_inception(picture: Image.Image) -> torch.Tensor:
    """Resize a picture to (3, 299, 299), in [0, 255]: each channel in floating point, bicubic, filtered.

    Source: Parmar et al. (arXiv 2104.11222), section 4, and their clean-fid, which cuts off what overshoots.
    """
    size = (INCEPTION_SIDE, INCEPTION_SIDE)
    channels = [channel.convert("F").resize(size, Image.BICUBIC) for channel in picture.split()]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 255)
