"""Feature distillation: the decoder predicts the features of a frozen DINOv2 for the target image.

Source: EditAR (arXiv 2501.04699), section 3.3.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel


# DINOv2's own preprocessing: shortest side 256, center crop 224, ImageNet statistics.
RESIZED_SIDE, CROPPED_SIDE = 256, 224
MODEL_TYPES = ("dinov2", "dinov2_with_registers")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DistillationTeacher(nn.Module):
    """Compute the patch features of target images with a frozen DINOv2 model.

    Args:
        model (`str`): Hub id or folder of a DINOv2 model of any size, with or without register tokens.

    Raises:
        ValueError: If `model` is not a DINOv2 model.
    """

    def __init__(self, model: str):
        super().__init__()
        model_type = AutoConfig.from_pretrained(model).model_type
        if model_type not in MODEL_TYPES:
            raise ValueError(f"`model` {model!r} has type {model_type!r}; give a model of {' or '.join(MODEL_TYPES)}.")
        self.backbone = AutoModel.from_pretrained(model).eval().requires_grad_(False)
        self.num_patches = (CROPPED_SIDE // self.backbone.config.patch_size) ** 2

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Turn pixels (batch, 3, height, width) in [−1, 1] into features (batch, cells, width) in raster order."""
        pixels = prepare_teacher_pixels(pixel_values).to(self.backbone.dtype)
        states = self.backbone(pixel_values=pixels).last_hidden_state
        # The class token and any register tokens come first.
        return states[:, -self.num_patches :]


def prepare_teacher_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
    """Resize, crop and normalize pixels in [−1, 1] for a DINOv2: (batch, 3, height, width) → (batch, 3, 224, 224)."""
    scale = RESIZED_SIDE / min(pixel_values.shape[-2:])
    size = [round(side * scale) for side in pixel_values.shape[-2:]]
    pixels = F.interpolate(pixel_values.float() / 2 + 0.5, size, mode="bicubic", antialias=True, align_corners=False)
    # Parity: the teacher sees only the center, 87.5 % of each side, while the decoder's grid covers the whole image.
    top, left = ((side - CROPPED_SIDE) // 2 for side in size)
    pixels = pixels[:, :, top : top + CROPPED_SIDE, left : left + CROPPED_SIDE].clamp(0, 1)
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def compute_distillation_loss(
    features: torch.Tensor, teacher_features: torch.Tensor, grid_height: int, grid_width: int
) -> torch.Tensor:
    """Compute the mean squared error. If the two grids differ, the teacher's grid is resized bilinearly.

    Args:
        features (`torch.Tensor` of shape `(batch, grid_height · grid_width, width)`): Predictions of the decoder.
        teacher_features (`torch.Tensor` of shape `(batch, cells, width)`): Features of the teacher.
        grid_height, grid_width (`int`): Rows and columns of the decoder's feature grid.

    Source: EditAR (arXiv 2501.04699), section 3.3.
    """
    side = round(teacher_features.shape[1] ** 0.5)
    if (side, side) != (grid_height, grid_width):
        grid = teacher_features.transpose(1, 2).unflatten(2, (side, side)).float()
        grid = F.interpolate(grid, (grid_height, grid_width), mode="bilinear", align_corners=False)
        teacher_features = grid.flatten(2).transpose(1, 2)
    return F.mse_loss(features.float(), teacher_features.float())
