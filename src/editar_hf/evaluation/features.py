"""The networks that metrics use, and the features that they compute: embeddings, keys, depth, classes.

`load_network(name, source)` loads a network from a folder, a Hub id or a weight file. To use a network of your own,
pass `Network(model, processor, tokenizer)`. Images are (batch, 3, height, width) in [0, 1]. Each function prepares them
as the published evaluation does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPImageProcessorPil, CLIPModel, ViTModel
from transformers.image_transforms import get_resize_output_image_size

from ..conversion import is_weights, open_checkpoint
from ..image_processing_editar import prepare_rgb_image
from ..pipelines.hub import check_folder_or_hub_id
from .inception import FIDInception
from .lpips import LPIPS
from .metrics import check_pair, compute_cosine_similarity


# Name of a network → Hub id that the published results used. Networks without a Hub id are in `MISSING`.
DEFAULT_MODELS = {
    "structure": "facebook/dino-vitb8",
    "clip": "openai/clip-vit-large-patch14",
    "dino": "facebook/dino-vits16",
    "depth": "Intel/dpt-large",
    "segmentation": "facebook/maskformer-resnet101-coco-stuff",
    "lpips": None,
    "inception": None,
}
# What a user has to pass for a network without a Hub id.
MISSING = {
    "lpips": "the folder that holds squeezenet1_1-b8a52dc0.pth and squeeze.pth",
    "inception": "the file pt_inception-2015-12-05-6726825d.pth",
}
# `layer_norm_eps` is the value in the code of DINO (arXiv 2104.14294). Its copies on the Hub have 1e-12.
DINO = (ViTModel, {"add_pooling_layer": False, "layer_norm_eps": 1e-6})
# Name of a network → its class in transformers and options. Other networks have the class in their configuration.
MODEL_CLASSES = {"structure": DINO, "dino": DINO, "clip": (CLIPModel, {})}
# Name of a network that is built from public weight files → its class, and the number of image batches it compares.
PUBLIC_NETWORKS = {"lpips": (LPIPS, 2), "inception": (FIDInception, 1)}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Network:
    """A network in float32 and evaluation mode, with its image processor and, for CLIP, its tokenizer."""

    model: Any
    processor: Any = None
    tokenizer: Any = None

    def __post_init__(self) -> None:
        self.model.eval()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_network(name: str, source: str | Path | None = None, device: str | torch.device | None = None) -> Network:
    """Load a network.

    Args:
        name (`str`): A key of `DEFAULT_MODELS`.
        source (`str` or `Path`, *optional*): A folder or Hub id; for LPIPS and Inception, a file, folder or Hub id with
            the public weight files. Defaults to the network of the published results.
        device (`str`, *optional*): Defaults to the GPU if there is one.

    Raises:
        ValueError: If `source` is missing or holds another network.
    """
    source = source or DEFAULT_MODELS[name]
    if source is None:
        raise ValueError(f"`{name}_model` is missing; pass {MISSING[name]}.")
    check_folder_or_hub_id(source, f"{name}_model")
    processor = tokenizer = None
    if name in PUBLIC_NETWORKS:
        network_class, num_images = PUBLIC_NETWORKS[name]
        try:
            model = network_class(read_weights(source))
            model(*torch.zeros(num_images, 1, 3, 96, 96))  # fails if a tensor is missing or has another shape
        except (AttributeError, RuntimeError) as error:
            raise ValueError(f"`{name}_model` is {str(source)!r}, which holds other weights: {error}") from error
    else:
        config = AutoConfig.from_pretrained(source)
        model_class, options = MODEL_CLASSES.get(name) or (getattr(transformers, config.architectures[0]), {})
        model = model_class.from_pretrained(source, dtype=torch.float32, **options)
        if name not in ("structure", "dino"):
            processor = AutoImageProcessor.from_pretrained(source, backend="pil")
        if name == "clip":
            tokenizer = AutoTokenizer.from_pretrained(source)
    return Network(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor, tokenizer)


def read_weights(source: str | Path) -> dict[str, torch.Tensor]:
    """Read named tensors from a weight file, or from all weight files of a folder or Hub id, without running code.

    Returns:
        The tensors in float32. Dots in their names become `/`, because PyTorch forbids dots in names of parameters.

    Raises:
        ValueError: If a file does not open safely or holds anything but named tensors.
    """
    path = Path(source) if Path(source).exists() else Path(snapshot_download(str(source)))
    weights: dict[str, torch.Tensor] = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.pth")) + sorted(path.glob("*.safetensors")):
        found = safetensors.torch.load_file(file) if file.suffix == ".safetensors" else open_checkpoint(file)
        if not is_weights(found):
            raise ValueError(f"`{file}` holds more than named tensors; pass the published weights.")
        weights |= {name.replace(".", "/"): tensor.float() for name, tensor in found.items()}
    return weights


# Features


def prepare_inputs(network: Network, images: torch.Tensor, processor: Any = None, **options: Any) -> Any:
    """Round images to 8 bits and preprocess them with `processor`, which defaults to the network's image processor."""
    processor = processor or network.processor
    images_8bit = [prepare_rgb_image(image) for image in images]
    return processor(images_8bit, return_tensors="pt", **options).to(network.device)


@torch.no_grad()
def compute_lpips(
    network: Network,
    images: torch.Tensor,
    references: torch.Tensor,
    mask: torch.Tensor | None = None,
    masked_mean: bool = False,
) -> torch.Tensor:
    """Compute LPIPS (batch,), 0 or more. The arguments are the same as in `metrics.compute_mse`."""
    check_pair(images, references, mask)
    unedited = torch.ones_like(images[:, :1]) if mask is None else 1 - mask.float()
    images, references, unedited = (tensor.to(network.device).float() for tensor in (images, references, unedited))
    blackened = (2 * pixels * unedited - 1 for pixels in (images, references))
    distance = network.model(*blackened, unedited if masked_mean else None).double()
    return distance.where(unedited.flatten(1).any(1), torch.nan).cpu()


@torch.no_grad()
def encode_keys(network: Network, images: torch.Tensor, pixel_scale: int = 255, antialias: bool = True) -> torch.Tensor:
    """Compute the keys (batch, tokens, dim) of the last layer of a DINO model. All heads are concatenated.

    The first key belongs to the class token. `pixel_scale` is the value of white before normalization. The published
    results were computed with 255, but the network was trained with 1. `antialias` filters images that are downscaled.

    Source: the evaluation of PnPInversion (arXiv 2310.01506): the shorter side is 224, the longer side at most 480.
    """
    size = get_resize_output_image_size(images[0], 224, False, 480, "channels_first")
    pixels = images.to(network.device).float() * pixel_scale
    pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=antialias)
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    outputs: list[torch.Tensor] = []
    last_projection = network.model.layers[-1].attention.k_proj
    with last_projection.register_forward_hook(lambda module, args, output: outputs.append(output)):
        network.model((pixels - mean) / std, interpolate_pos_encoding=True)
    return outputs[0]


@torch.no_grad()
def encode_class_tokens(network: Network, images: torch.Tensor) -> torch.Tensor:
    """Encode images as class tokens (batch, dim) of a DINO model.

    Source: the evaluation of MagicBrush (arXiv 2306.10012): the shorter side is 256, then the center is cropped to
    224×224.
    """
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 256}, do_center_crop=False, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
    )
    pixels = prepare_inputs(network, images, processor).pixel_values
    # Parity: the published code rounds the corner of the center crop to nearest. The image processor would round down.
    top, left = (round((side - 224) / 2) for side in pixels.shape[2:])
    outputs = network.model(pixels[:, :, top : top + 224, left : left + 224], interpolate_pos_encoding=True)
    return outputs.last_hidden_state[:, 0]


@torch.no_grad()
def encode_images(network: Network, images: torch.Tensor) -> torch.Tensor:
    """Encode images as CLIP embeddings (batch, dim)."""
    return network.model.get_image_features(**prepare_inputs(network, images)).pooler_output


@torch.no_grad()
def encode_prompts(network: Network, prompts: Sequence[str]) -> torch.Tensor:
    """Encode prompts as CLIP embeddings (batch, dim). A prompt that is longer than the model allows is cut off."""
    length = network.model.config.text_config.max_position_embeddings
    inputs = network.tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
    return network.model.get_text_features(**inputs.to(network.device)).pooler_output


def compute_clip_score(
    network: Network, images: torch.Tensor, prompts: Sequence[str], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the CLIP score (batch,), in [0, 100], of images and their prompts.

    With a `mask` (batch, 1, height, width), which is 1 inside the edit, all pixels outside it become black. With an
    empty mask, the CLIP score is NaN.

    Raises:
        ValueError: If the numbers of prompts and images differ, or if the mask does not fit the images.

    Source: CLIPScore (arXiv 2104.08718), section 3, with the weight 100 of torchmetrics.
    """
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise ValueError(f"`prompts` is {prompts!r}; pass a list of {len(images)} prompts, one for each image.")
    mask = torch.ones_like(images[:, :1]) if mask is None else mask
    check_pair(images, images, mask)
    similarity = compute_cosine_similarity(encode_images(network, images * mask), encode_prompts(network, prompts))
    return (100 * similarity).clamp(min=0).where(mask.flatten(1).any(1).cpu(), torch.nan)


@torch.no_grad()
def estimate_depth(network: Network, images: torch.Tensor, keep_size: bool = False) -> torch.Tensor:
    """Estimate depth (batch, depth_height, depth_width), 0 or more.

    With `keep_size`, the image keeps its size, as in the evaluation of ControlAR. Otherwise, it is resized to the size
    that the network was trained with.
    """
    height, width = images.shape[2:]
    options = {"size": {"height": height, "width": width}} if keep_size else {}
    return network.model(**prepare_inputs(network, images, **options)).predicted_depth


@torch.no_grad()
def segment(network: Network, images: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Predict the class of every pixel: (batch, height, width). `size` defaults to the size of the images."""
    outputs = network.model(**prepare_inputs(network, images))
    sizes = [tuple(size or images.shape[2:])] * len(images)
    maps = network.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
    return torch.stack(list(maps)).cpu()


@torch.no_grad()
def encode_inception(network: Network, images: torch.Tensor) -> torch.Tensor:
    """Compute the features (batch, 2048) of images whose Fréchet distance is FID.

    Source: Parmar et al. (arXiv 2104.11222), section 4, and their library clean-fid: each channel is resized in
    floating point with an antialiasing bicubic filter, and values are clipped to [0, 255].
    """

    def resize(image: Image.Image) -> torch.Tensor:
        channels = [channel.convert("F").resize((299, 299), Image.Resampling.BICUBIC) for channel in image.split()]
        return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 255)

    pixels = torch.stack([resize(prepare_rgb_image(image)) for image in images])
    return network.model((pixels.to(network.device) - 128) / 128).cpu()
