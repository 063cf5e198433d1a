"""The VQ model: it encodes pixels as tokens, and decodes tokens to pixels.

A convolutional encoder computes one latent vector for each `stride` × `stride` pixels. The token of a latent vector is
the index of the codebook row with the highest cosine similarity. A decoder, which mirrors the encoder, reconstructs the
image from the normalized codebook rows. Modules have the names of the keys in the published checkpoint.

Source: LlamaGen (arXiv 2406.06525), section 2.1; VQGAN (arXiv 2012.09841) for the convolutional networks.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import maybe_autocast

from .checks import check_integer, check_tensor
from .configuration_editar import EditARVQConfig


# Number of positions that are compared with the codebook at once. For 16384 codes, 2048 positions need 128 MiB in fp32.
POSITIONS_PER_CHUNK = 2048


@dataclass
class EditARVQEncoderOutput(ModelOutput):
    """Output of [`EditARVQModel.encode`].

    Args:
        image_tokens (`torch.LongTensor` of shape `(batch_size, num_image_tokens)`): Codebook indices in raster order.
        latents (`torch.FloatTensor` of shape `(batch_size, num_image_tokens, embedding_dim)`): The fp32 unit vectors
            before quantization.
    """

    image_tokens: torch.Tensor | None = None
    latents: torch.Tensor | None = None


@dataclass
class EditARVQOutput(ModelOutput):
    """Output of [`EditARVQModel.forward`].

    Args:
        loss (`torch.FloatTensor`): Reconstruction loss + codebook loss + `commitment_loss_weight` · commitment loss.
        reconstruction (`torch.FloatTensor` of shape `(batch_size, 3, height, width)`): Decoded pixels, not clamped.
        reconstruction_loss (`torch.FloatTensor`): Mean absolute error plus mean squared error of the pixels.
        codebook_loss (`torch.FloatTensor`): Mean squared distance between codes and latents, with gradients for the
            codes only.
        commitment_loss (`torch.FloatTensor`): The same distance, with gradients for the encoder only.
        image_tokens (`torch.LongTensor` of shape `(batch_size, num_image_tokens)`): Codebook indices in raster order.
        latents (`torch.FloatTensor` of shape `(batch_size, num_image_tokens, embedding_dim)`): Unit vectors.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    codebook_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    image_tokens: torch.Tensor | None = None
    latents: torch.Tensor | None = None


def compute_nearest_codes(
    latents: torch.Tensor, codebook: torch.Tensor, chunk_size: int = POSITIONS_PER_CHUNK
) -> torch.Tensor:
    """Compute for each latent (positions, dim) the index of the codebook row (codes, dim) of highest cosine similarity.

    Only the codebook rows must have unit length: the length of a latent does not change which row is nearest. The
    positions are processed in chunks, which limits the memory for similarities.
    """
    return torch.cat([(chunk @ codebook.T).argmax(dim=-1) for chunk in latents.split(chunk_size)])


def prepare_layout(hidden_states: torch.Tensor) -> torch.Tensor:
    """Store (batch_size, channels, height, width) on a CPU in the layout in which its convolutions are faster.

    Channels-last saves copies of activations but copies weights, so it pays if activations are larger than weights.
    """
    if hidden_states.device.type != "cpu":
        return hidden_states
    is_large = hidden_states[0, 0].numel() > 9 * hidden_states.shape[1]
    return hidden_states.contiguous(memory_format=torch.channels_last if is_large else torch.contiguous_format)


class EditARVQNorm(nn.GroupNorm):
    """Group normalization with the settings of the VQ model."""

    def __init__(self, config: EditARVQConfig, channels: int):
        super().__init__(config.norm_num_groups, channels, eps=1e-6)


class EditARVQResBlock(nn.Module):
    """Residual block: two 3×3 convolutions, each after group normalization and SiLU."""

    def __init__(self, config: EditARVQConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = EditARVQNorm(config, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = EditARVQNorm(config, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.nin_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states if self.nin_shortcut is None else self.nin_shortcut(hidden_states)
        # In place: on a CPU, the first use of new memory for a large activation takes longer than SiLU itself.
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states), inplace=True))
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states), inplace=True))
        return hidden_states.add_(residual)


class EditARVQAttnBlock(nn.Module):
    """Residual block: single-head self-attention over all positions."""

    def __init__(self, config: EditARVQConfig, channels: int):
        super().__init__()
        self.norm = EditARVQNorm(config, channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        grid_size = hidden_states.shape[-2:]
        normed = self.norm(hidden_states)
        # (batch_size, channels, height, width) -> (batch_size, 1, height · width, channels)
        query, key, value = (
            projection(normed).flatten(2).transpose(1, 2).unsqueeze(1) for projection in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return hidden_states + self.proj_out(attended.squeeze(1).transpose(1, 2).unflatten(2, grid_size))


def build_downsample(channels: int) -> nn.Sequential:
    """Build a convolution that halves height and width."""
    # Parity: the published VQ model pads on the right and at the bottom only.
    pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, kernel_size=3, stride=2)
    return nn.Sequential(OrderedDict(pad=pad, conv=conv))


def build_upsample(channels: int) -> nn.Sequential:
    """Build an upsampling that doubles height and width (nearest neighbor), followed by a convolution."""
    conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=conv))


class EditARVQLevel(nn.Module):
    """The blocks of one resolution. With `attention`, an attention block follows each residual block."""

    def __init__(
        self, config: EditARVQConfig, in_channels: int, out_channels: int, num_res_blocks: int, attention: bool
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_res_blocks
        self.res = nn.ModuleList(EditARVQResBlock(config, width, next_width) for width, next_width in pairwise(widths))
        self.attn = nn.ModuleList(EditARVQAttnBlock(config, out_channels) for _ in self.res if attention)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = prepare_layout(hidden_states)
        for index, res in enumerate(self.res):
            hidden_states = res(hidden_states)
            if self.attn:
                hidden_states = self.attn[index](hidden_states)
        return hidden_states


class EditARVQEncoderLevel(EditARVQLevel):
    """A level of the encoder: its blocks, followed by a downsampling except in the last level."""

    def __init__(self, config: EditARVQConfig, in_channels: int, out_channels: int, is_last: bool):
        super().__init__(config, in_channels, out_channels, config.num_res_blocks, attention=is_last)
        self.downsample = nn.Identity() if is_last else build_downsample(out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.downsample(super().forward(hidden_states))


class EditARVQDecoderLevel(EditARVQLevel):
    """A level of the decoder: one block more than in the encoder, then an upsampling except in the last level."""

    def __init__(self, config: EditARVQConfig, in_channels: int, out_channels: int, is_first: bool, is_last: bool):
        super().__init__(config, in_channels, out_channels, config.num_res_blocks + 1, attention=is_first)
        self.upsample = nn.Identity() if is_last else build_upsample(out_channels)

    def forward(self, hidden_states: torch.Tensor, upsample: bool = True) -> torch.Tensor:
        hidden_states = super().forward(hidden_states)
        return self.upsample(hidden_states) if upsample else self.upsample.get_submodule("conv")(hidden_states)


def build_middle(config: EditARVQConfig, channels: int) -> nn.Sequential:
    """Build the blocks at the lowest resolution, which are the same in the encoder and the decoder."""
    return nn.Sequential(
        EditARVQResBlock(config, channels, channels),
        EditARVQAttnBlock(config, channels),
        EditARVQResBlock(config, channels, channels),
    )


class EditARVQEncoder(nn.Module):
    """Map pixels (batch_size, 3, height, width) to latents (batch_size, latent_channels, grid_height, grid_width)."""

    def __init__(self, config: EditARVQConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in (1, *config.channel_multipliers)]
        num_levels = len(config.channel_multipliers)
        self.conv_in = nn.Conv2d(3, widths[0], kernel_size=3, padding=1)
        self.conv_blocks = nn.ModuleList(
            EditARVQEncoderLevel(config, widths[level], widths[level + 1], is_last=level == num_levels - 1)
            for level in range(num_levels)
        )
        self.mid = build_middle(config, widths[-1])
        self.norm_out = EditARVQNorm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, kernel_size=3, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(prepare_layout(pixel_values))
        for level in self.conv_blocks:
            hidden_states = level(hidden_states)
        hidden_states = self.mid(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states), inplace=True))


class EditARVQDecoder(nn.Module):
    """Map latents (batch_size, latent_channels, grid_height, grid_width) to pixels.

    Level 0 has the lowest resolution. Each skipped upsampling, counted from the last, halves the size of the image.
    """

    def __init__(self, config: EditARVQConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in reversed(config.channel_multipliers)]
        widths = [widths[0], *widths]
        num_levels = len(config.channel_multipliers)
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], kernel_size=3, padding=1)
        self.mid = build_middle(config, widths[0])
        self.conv_blocks = nn.ModuleList(
            EditARVQDecoderLevel(
                config, widths[level], widths[level + 1], is_first=level == 0, is_last=level == num_levels - 1
            )
            for level in range(num_levels)
        )
        self.norm_out = EditARVQNorm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, kernel_size=3, padding=1)

    def forward(self, latents: torch.Tensor, num_skipped_upsamples: int = 0) -> torch.Tensor:
        hidden_states = self.mid(self.conv_in(prepare_layout(latents)))
        num_upsamples = len(self.conv_blocks) - 1
        skipped = range(num_upsamples - num_skipped_upsamples, num_upsamples)
        for index, level in enumerate(self.conv_blocks):
            hidden_states = level(hidden_states, upsample=index not in skipped)
        return self.conv_out(F.silu(self.norm_out(hidden_states), inplace=True))


class EditARVQQuantizer(nn.Module):
    """The codebook. Its rows are stored without normalization, but only their directions are used."""

    def __init__(self, config: EditARVQConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.num_embeddings, config.embedding_dim)

    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the index of the nearest code of each latent; (..., embedding_dim) to (...)."""
        # Read the codebook through the module's forward: under sequential offload, its weight is on the meta device.
        rows = self.embedding(torch.arange(self.embedding.num_embeddings, device=latents.device))
        with maybe_autocast(latents.device.type, enabled=False):
            codebook = F.normalize(rows.float(), dim=-1)
            return compute_nearest_codes(latents.float().flatten(0, -2), codebook).view(latents.shape[:-1])

    def decode(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """Return the fp32 unit vector of each code; (...) to (..., embedding_dim)."""
        return F.normalize(self.embedding(image_tokens).float(), dim=-1)


class EditARVQModel(PreTrainedModel):
    """Encode images as tokens with `encode`, and decode tokens to pixels with `decode`. Tokens are codebook indices.

    Height and width of an image must be multiples of the stride. Pixels are in [−1, 1].

    Source: LlamaGen (arXiv 2406.06525), section 2.1.

    Example:

    ```python
    >>> import torch
    >>> from editar_hf import EditARVQConfig, EditARVQModel
    >>> config = EditARVQConfig(num_embeddings=64, base_channels=8, channel_multipliers=(1, 2), norm_num_groups=4)
    >>> model = EditARVQModel(config).eval()
    >>> image_tokens = model.encode(torch.zeros(1, 3, 16, 8)).image_tokens
    >>> image_tokens.shape
    torch.Size([1, 32])
    >>> model.decode(image_tokens, grid_height=8, grid_width=4).shape
    torch.Size([1, 3, 16, 8])

    ```
    """

    config: EditARVQConfig
    config_class = EditARVQConfig
    base_model_prefix = "vq_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ("EditARVQResBlock", "EditARVQAttnBlock", "EditARVQQuantizer")

    def __init__(self, config: EditARVQConfig):
        super().__init__(config)
        self.encoder = EditARVQEncoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embedding_dim, kernel_size=1)
        self.quantize = EditARVQQuantizer(config)
        self.post_quant_conv = nn.Conv2d(config.embedding_dim, config.latent_channels, kernel_size=1)
        self.decoder = EditARVQDecoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize convolutions as PyTorch does by default, and codes as random directions."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1 / math.sqrt(module.embedding_dim))
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @apply_forward_hook
    def encode(self, pixel_values: torch.Tensor) -> EditARVQEncoderOutput:
        """Encode images as codebook indices in raster order.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Pixels in [−1, 1].

        Raises:
            ValueError: If `pixel_values` has another shape, or height or width is not a multiple of the stride.
        """
        image_tokens, latents = self._encode(pixel_values)
        return EditARVQEncoderOutput(image_tokens=image_tokens, latents=latents)

    @apply_forward_hook
    def decode(
        self,
        image_tokens: torch.Tensor,
        grid_height: int | None = None,
        grid_width: int | None = None,
        num_skipped_upsamples: int = 0,
    ) -> torch.Tensor:
        """Decode codebook indices to pixels (batch_size, 3, height, width), nominally in [−1, 1] but not clamped.

        Args:
            image_tokens (`torch.LongTensor` of shape `(batch_size, num_image_tokens)`): Indices in raster order.
            grid_height, grid_width (`int`, *optional*): Tokens per column and per row. If one is None, it is computed
                from the other. If both are None, the grid is square.
            num_skipped_upsamples (`int`): How many upsamplings, counted from the last, the decoder leaves out;
                *defaults to* 0. Each one halves height and width. This is faster, but the pixels are approximate.

        Raises:
            ValueError: If the tokens do not fill the grid, or are not codebook indices, or the decoder has fewer
                upsamplings than `num_skipped_upsamples`.
        """
        num_upsamples = len(self.config.channel_multipliers) - 1
        check_integer("num_skipped_upsamples", num_skipped_upsamples, 0, num_upsamples)
        grid_height, grid_width = self._resolve_grid(image_tokens, grid_height, grid_width)
        return self._decode(self.quantize.decode(image_tokens), grid_height, grid_width, num_skipped_upsamples)

    def forward(self, pixel_values: torch.Tensor) -> EditARVQOutput:
        """Reconstruct images and compute the training losses of the VQ model.

        A straight-through estimator copies gradients from the decoder's input to the encoder's output.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Pixels in [−1, 1].

        Raises:
            ValueError: If `pixel_values` has another shape, or height or width is not a multiple of the stride.

        Source: VQ-VAE (arXiv 1711.00937), equation 3, on unit vectors as in LlamaGen (arXiv 2406.06525), section 2.1.
        """
        image_tokens, latents = self._encode(pixel_values)
        codes = self.quantize.decode(image_tokens)
        codebook_loss = F.mse_loss(codes, latents.detach())
        commitment_loss = F.mse_loss(latents, codes.detach())
        straight_through = latents + (codes - latents).detach()
        grid_height, grid_width = (side // self.config.stride for side in pixel_values.shape[-2:])
        reconstruction = self._decode(straight_through, grid_height, grid_width)
        error = reconstruction.float() - pixel_values.float()
        reconstruction_loss = error.abs().mean() + error.square().mean()
        return EditARVQOutput(
            loss=reconstruction_loss + codebook_loss + self.config.commitment_loss_weight * commitment_loss,
            reconstruction=reconstruction,
            reconstruction_loss=reconstruction_loss,
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
            image_tokens=image_tokens,
            latents=latents,
        )

    def _encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        check_tensor("pixel_values", pixel_values)
        shape, stride = tuple(pixel_values.shape), self.config.stride
        if len(shape) != 4 or shape[1] != 3:
            raise ValueError(f"`pixel_values` has shape {shape}; pass shape (batch_size, 3, height, width).")
        if not shape[2] or not shape[3] or shape[2] % stride or shape[3] % stride:
            raise ValueError(
                f"`pixel_values` is {shape[2]} pixels high and {shape[3]} pixels wide; resize or crop the images to "
                f"multiples of the VQ model's stride, {stride}."
            )
        latents = self.quant_conv(self.encoder(pixel_values.to(self.dtype)))
        # Normalization and the choice of codes always run in fp32, because near-ties between codes are common.
        latents = F.normalize(latents.float().flatten(2).transpose(1, 2), dim=-1)
        return self.quantize.encode(latents.detach()), latents

    def _decode(
        self, codes: torch.Tensor, grid_height: int, grid_width: int, num_skipped_upsamples: int = 0
    ) -> torch.Tensor:
        latents = codes.to(self.dtype).transpose(1, 2).unflatten(2, (grid_height, grid_width))
        return self.decoder(self.post_quant_conv(latents), num_skipped_upsamples).contiguous()

    def _resolve_grid(
        self, image_tokens: torch.Tensor, grid_height: int | None, grid_width: int | None
    ) -> tuple[int, int]:
        check_tensor("image_tokens", image_tokens)
        if image_tokens.ndim != 2 or image_tokens.dtype not in (torch.int, torch.long):
            raise ValueError(
                f"`image_tokens` is {image_tokens.dtype} of shape {tuple(image_tokens.shape)}; pass torch.long of "
                "shape (batch_size, num_image_tokens)."
            )
        num_image_tokens = image_tokens.shape[1]
        if grid_height is None:
            grid_height = math.isqrt(num_image_tokens) if grid_width is None else num_image_tokens // max(grid_width, 1)
            grid_width = grid_height if grid_width is None else grid_width
        elif grid_width is None:
            grid_width = num_image_tokens // max(grid_height, 1)
        if not num_image_tokens or grid_height * grid_width != num_image_tokens:
            raise ValueError(
                f"`image_tokens` holds {num_image_tokens} tokens per image, which do not fill a grid of "
                f"{grid_height}×{grid_width}; pass `grid_height` and `grid_width` whose product is the number of "
                "tokens."
            )
        lowest, highest = image_tokens.min().item(), image_tokens.max().item()
        if lowest < 0 or highest >= self.config.num_embeddings:
            raise ValueError(
                f"`image_tokens` holds values from {lowest} to {highest}; pass codebook indices from 0 to "
                f"{self.config.num_embeddings - 1}."
            )
        return grid_height, grid_width


def decode_one_by_one(
    vq_model: EditARVQModel, image_tokens: torch.Tensor, grid: tuple[int, int], num_skipped_upsamples: int = 0
) -> torch.Tensor:
    """Decode tokens `(batch, N)` to float32 pixels, so that the pixels of an image do not depend on its batch.

    In a batch, convolutions may round differently. One by one, they take the same time and less memory.
    """
    vq_model._resolve_grid(image_tokens, *grid)  # Errors then describe the whole batch.
    images = image_tokens.split(1)
    return torch.cat([vq_model.decode(image, *grid, num_skipped_upsamples).float() for image in images])
