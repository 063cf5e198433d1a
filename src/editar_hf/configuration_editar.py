"""Configurations of the two networks: the EditAR decoder and its VQ model.

Both check their fields on construction: a field of the wrong type, or sizes that do not fit together, raise an error.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


# Source: LlamaGen (arXiv 2406.06525), table 1. EditAR starts from GPT-XL.
PRESETS = {
    "GPT-B": {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768},
    "GPT-L": {"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024},
    "GPT-XL": {"num_hidden_layers": 36, "num_attention_heads": 20, "hidden_size": 1280},
    "GPT-XXL": {"num_hidden_layers": 48, "num_attention_heads": 24, "hidden_size": 1536},
    "GPT-3B": {"num_hidden_layers": 24, "num_attention_heads": 32, "hidden_size": 3200},
}


def check_sizes(config: PreTrainedConfig, names: str) -> None:
    """Check that sizes are positive. `names` holds the names of the fields, separated by spaces."""
    for name in names.split():
        if getattr(config, name) < 1:
            raise ValueError(f"`{name}` is {getattr(config, name)}; pass at least 1.")


def compute_intermediate_size(hidden_size: int) -> int:
    """Compute the SwiGLU width of the published decoders: 8/3 · hidden_size, rounded up to a multiple of 256."""
    return -(-int(2 * 4 * hidden_size / 3) // 256) * 256


@strict
class EditARConfig(PreTrainedConfig):
    """Configuration of the EditAR decoder; the defaults are those of the published model (GPT-XL at 512×512 pixels).

    Args:
        vocab_size (`int`): Number of codes of the VQ model.
        hidden_size (`int`): Width of the decoder.
        intermediate_size (`int`, *optional*): Width of the SwiGLU layer; *defaults to* 8/3 · `hidden_size`, rounded up
            to a multiple of 256.
        num_hidden_layers (`int`): Number of decoder layers.
        num_attention_heads (`int`): Number of attention heads.
        grid_size (`int`): Largest number of image tokens per side. Images may be smaller, and rectangular.
        num_text_tokens (`int`): Number of text positions between the source and the target image.
        text_hidden_size (`int`): Width of the text encoder's states.
        text_rotary (`str`): `"zero"` multiplies text queries and keys by zero, as in the training of the published
            weights; `"identity"` leaves them unrotated, which suits models trained from scratch.
        distillation_hidden_size (`int`, *optional*): Width of the features that the distillation head predicts
            (768: DINOv2-base); `None` means no distillation head.
        text_dropout, residual_dropout, mlp_dropout, attention_dropout (`float`): Dropout probabilities in training: of
            the projected text states, of the output of the attention layer, of the output of the feed-forward layer,
            and of the attention weights.

    Raises:
        ValueError: If a size is not positive, `hidden_size` / `num_attention_heads` is not a multiple of 4, or a
            probability is outside [0, 1).
        StrictDataclassError: If a field has the wrong type.

    Source: EditAR (arXiv 2501.04699) and LlamaGen (arXiv 2406.06525).

    Example:

    ```python
    >>> from editar_hf import EditARConfig
    >>> EditARConfig.from_preset("GPT-B", grid_size=16).intermediate_size
    2048

    ```
    """

    model_type = "editar"
    keys_to_ignore_at_inference = ("cache",)

    vocab_size: int = 16384
    hidden_size: int = 1280
    intermediate_size: int | None = None
    num_hidden_layers: int = 36
    num_attention_heads: int = 20
    grid_size: int = 32
    num_text_tokens: int = 120
    text_hidden_size: int = 2048
    text_rotary: Literal["zero", "identity"] = "zero"
    rope_theta: float | int = 10000.0
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    text_dropout: float | int = 0.1
    residual_dropout: float | int = 0.1
    mlp_dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    distillation_hidden_size: int | None = 768
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = compute_intermediate_size(self.hidden_size)
        super().__post_init__(**kwargs)
        check_sizes(self, "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads grid_size")
        check_sizes(self, "num_text_tokens text_hidden_size")
        if self.hidden_size % self.num_attention_heads or self.head_dim % 4:
            raise ValueError(
                f"`hidden_size` is {self.hidden_size} and `num_attention_heads` is {self.num_attention_heads}; their "
                "quotient must be a multiple of 4, because half of a head's rotation pairs encode the row and half "
                "encode the column."
            )
        for name in ("text_dropout", "residual_dropout", "mlp_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; pass a probability in [0, 1).")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "EditARConfig":
        """Build the configuration of a published size: GPT-B, GPT-L, GPT-XL, GPT-XXL or GPT-3B.

        Raises:
            ValueError: If `name` is not one of these.
        """
        if name not in PRESETS:
            raise ValueError(f"`name` is {name!r}; choose one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_image_tokens(self) -> int:
        """Number of tokens of the largest image, `grid_size` squared."""
        return self.grid_size**2


@strict
class EditARVQConfig(PreTrainedConfig):
    """Configuration of the VQ model; the defaults are those of LlamaGen's VQ-16 (stride 16, 16384 codes of width 8).

    Args:
        num_embeddings (`int`): Number of codes.
        embedding_dim (`int`): Width of a code.
        latent_channels (`int`): Channels between the convolutions and the codes.
        base_channels (`int`): Channels at full resolution.
        channel_multipliers (`tuple[int, ...]`): Channels of each level, in units of `base_channels`. Every level except
            the last halves the resolution. `(1, 1, 2, 2, 4)` is VQ-16, and `(1, 2, 2, 4)` is VQ-8.
        num_res_blocks (`int`): Residual blocks per level of the encoder (the decoder has one more).
        norm_num_groups (`int`): Groups of every group normalization.
        commitment_loss_weight (`float`): Weight of the commitment loss in training.

    Raises:
        ValueError: If a size is not positive, or `norm_num_groups` does not divide `base_channels`.
        StrictDataclassError: If a field has the wrong type.

    Source: LlamaGen (arXiv 2406.06525), section 2.1, after VQGAN (arXiv 2012.09841).

    Example:

    ```python
    >>> from editar_hf import EditARVQConfig
    >>> EditARVQConfig(channel_multipliers=(1, 2, 2, 4)).stride
    8

    ```
    """

    model_type = "editar_vq"

    num_embeddings: int = 16384
    embedding_dim: int = 8
    latent_channels: int = 256
    base_channels: int = 128
    channel_multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    norm_num_groups: int = 32
    commitment_loss_weight: float | int = 0.25

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_sizes(self, "num_embeddings embedding_dim latent_channels base_channels num_res_blocks norm_num_groups")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(
                f"`channel_multipliers` is {self.channel_multipliers}; pass one positive integer for each level."
            )
        if self.base_channels % self.norm_num_groups:
            raise ValueError(
                f"`norm_num_groups` is {self.norm_num_groups}; pass a divisor of `base_channels`, {self.base_channels}."
            )

    @property
    def stride(self) -> int:
        """Pixels per side of a token."""
        return 2 ** (len(self.channel_multipliers) - 1)
