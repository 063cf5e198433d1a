"""The EditAR decoder: it reads source tokens and text states, and computes the logits of the target tokens.

Each sample is one causal sequence, `[source image][text][target image]`. The decoder is Llama-style, with a rotary
embedding in two dimensions for image tokens. This file contains only `forward`; guidance and sampling are in
`generation/`, and pixels are handled by the VQ model. Read it from top to bottom: rotary → attention → MLP → layer →
model → head.

A call may pass any of the three segments. Without a cache, the segments are the whole sequence. With a cache, they
continue the cached sequence, so a source can be computed once and shared. A slot is a position in the sequence: with N
image tokens and L text tokens, slots 0 … N−1 are the source, N … N+L−1 the text, and the slots from N+L the target.

Source: EditAR (arXiv 2501.04699), LlamaGen (arXiv 2406.06525).
"""

import numbers
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward, rotate_half
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import capture_outputs

from .configuration_editar import EditARConfig
from .generation import EditARGenerationMixin
from .packing import PackedWeightsMixin


class OutputWithCache(ModelOutput):
    """Outputs with a cache under both of its names in transformers: `cache` (since 5.24) and `past_key_values`."""

    @property
    def past_key_values(self) -> Cache | None:
        return self.cache


@dataclass
class EditARModelOutput(OutputWithCache):
    """Output of `EditARModel.forward`.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, positions, hidden_size)`): States after the final norm.
        cache (`Cache`, *optional*): Keys and values of all slots so far; `past_key_values` is the same object.
        hidden_states, attentions (`tuple[torch.Tensor]`, *optional*): One tensor for each layer, on request.
    """

    last_hidden_state: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class EditAROutput(OutputWithCache):
    """Output of `EditARForConditionalGeneration.forward`.

    Args:
        loss (`torch.Tensor`, *optional*): Mean cross-entropy of the target tokens, in nats; `None` without `labels`.
        logits (`torch.Tensor` of shape `(batch, positions, vocab_size)`, *optional*): Logits of the target tokens;
            `None` if the call passes only a source image.
        cache (`Cache`, *optional*): Keys and values of all slots so far; `past_key_values` is the same object.
        hidden_states, attentions (`tuple[torch.Tensor]`, *optional*): One tensor for each layer, on request.
        distillation_features (`torch.Tensor` of shape `(batch, cells, distillation_hidden_size)`, *optional*): Output
            of the distillation head in raster order, on request.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    distillation_features: torch.Tensor | None = None


class EditARRotaryEmbedding(nn.Module):
    """Compute the cosines and sines of slots: from row and column for image tokens, constant for text.

    The source token at row r and column c has position (r, c); the target token there has position (r + grid_size,
    c + grid_size). The first half of a head's rotation pairs encodes the row, the second half encodes the column.
    """

    def __init__(self, config: EditARConfig):
        super().__init__()
        self.config = config

    def forward(self, slots: torch.Tensor, grid_height: int, grid_width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute (cos, sin), each float32 of shape `(..., head_dim)`, for integer `slots` of any shape."""
        num_image_tokens = grid_height * grid_width
        target_start = num_image_tokens + self.config.num_text_tokens
        is_target = slots >= target_start
        is_text = (slots >= num_image_tokens) & ~is_target
        cell = torch.where(is_target, slots - target_start, slots)
        offset = is_target * self.config.grid_size
        row, column = cell // grid_width + offset, cell % grid_width + offset

        # Computed in each call: a non-persistent buffer would be lost when weights are loaded on the meta device.
        pairs_per_axis = self.config.head_dim // 4
        exponents = torch.arange(pairs_per_axis, device=slots.device, dtype=torch.float32) / pairs_per_axis
        frequencies = self.config.rope_theta**-exponents
        angles = torch.cat([row[..., None] * frequencies, column[..., None] * frequencies], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)

        # Parity: the published weights were trained with cos = sin = 0 for text. This makes text queries and keys zero
        # vectors, which is not the same as unrotated ones: every query gives the same score to all text keys.
        text_cos = 0.0 if self.config.text_rotary == "zero" else 1.0
        cos = torch.where(is_text[..., None], text_cos, angles.cos())
        sin = torch.where(is_text[..., None], 0.0, angles.sin())
        return cos, sin


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `(batch, heads, seq_len, head_dim)` states in float32, as the published code does."""
    return (states * cos + rotate_half(states) * sin).to(states.dtype)


class EditARAttention(nn.Module):
    """Multi-head causal attention without biases."""

    def __init__(self, config: EditARConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None = None,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        heads_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads_shape).transpose(1, 2)
        query, key = apply_rotary(query, *position_embeddings), apply_rotary(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(
            attn_implementation or self.config._attn_implementation, eager_attention_forward
        )
        output, attention_weights = attention_function(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = self.o_proj(output.reshape(*input_shape, -1))
        return self.residual_dropout(output), attention_weights


class EditARMLP(nn.Module):
    """SwiGLU feed-forward layer without biases."""

    def __init__(self, config: EditARConfig):
        super().__init__()
        assert config.intermediate_size is not None  # `EditARConfig` always sets it.
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.mlp_dropout = nn.Dropout(config.mlp_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.mlp_dropout(self.down_proj(hidden_states))


class EditARDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward layer, each with a residual connection."""

    def __init__(self, config: EditARConfig, layer_idx: int):
        super().__init__()
        self.self_attn = EditARAttention(config, layer_idx)
        self.mlp = EditARMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        attention_output, _ = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask, position_embeddings, past_key_values, **kwargs
        )
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class EditARTextProjection(nn.Module):
    """Project text states to the decoder's width."""

    def __init__(self, config: EditARConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.text_hidden_size, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(prompt_embeds), approximate="tanh"))


class EditARPreTrainedModel(PreTrainedModel):
    """Initialize the weights, and declare to transformers which features the decoder supports."""

    config_class = EditARConfig
    config: EditARConfig
    base_model_prefix = "model"
    main_input_name = "source_image_tokens"
    supports_gradient_checkpointing = True
    _no_split_modules = ("EditARDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": EditARDecoderLayer, "attentions": EditARAttention}  # noqa: RUF012

    def set_attention_backend(self, backend: str) -> None:
        """Choose the attention of torch under diffusers' name for it, `"native"`.

        vLLM-Omni calls this method of every diffusers pipeline's transformer with several names, the last of which is
        `"native"`. In your own code, call `set_attn_implementation`.

        Raises:
            ValueError: If `backend` is not `"native"`.
        """
        if backend != "native":
            raise ValueError(f"`backend` is {backend!r}; pass 'native', or call `set_attn_implementation`.")
        self.set_attn_implementation("sdpa")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights from N(0, initializer_range²), null embeddings at the published scale, and zero the LM head."""
        super()._init_weights(module)
        if isinstance(module, EditARModel):
            init.normal_(module.null_prompt_embeds, std=self.config.text_hidden_size**-0.5)
            init.normal_(module.null_image_embeds, std=self.config.hidden_size**-0.5)
        elif isinstance(self, EditARForConditionalGeneration) and module is self.lm_head:
            init.zeros_(module.weight)


class EditARModel(EditARPreTrainedModel):
    """Run the decoder without its LM head, and return the hidden states of all positions of the call.

    Example:

    ```python
    >>> import torch
    >>> from editar_hf import EditARConfig, EditARModel
    >>> config = EditARConfig(
    ...     vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, grid_size=4, num_text_tokens=5,
    ...     text_hidden_size=16,
    ... )
    >>> model = EditARModel(config)
    >>> model(torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 5, 16)).last_hidden_state.shape
    torch.Size([1, 21, 32])

    ```
    """

    def __init__(self, config: EditARConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.text_projection = EditARTextProjection(config)
        self.text_dropout = nn.Dropout(config.text_dropout)
        self.null_prompt_embeds = nn.Buffer(torch.empty(config.num_text_tokens, config.text_hidden_size))
        self.null_image_embeds = nn.Buffer(torch.empty(config.num_image_tokens, config.hidden_size))
        self.rotary_emb = EditARRotaryEmbedding(config)
        self.layers = nn.ModuleList(
            EditARDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        source_image_tokens: torch.LongTensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        target_image_tokens: torch.LongTensor | None = None,
        drop_source: torch.BoolTensor | None = None,
        drop_prompt: torch.BoolTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        grid_height: int | None = None,
        grid_width: int | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> EditARModelOutput:
        """Compute the hidden states of the given segments after the final norm.

        The arguments are those of `EditARForConditionalGeneration.forward`. `position_embeddings` are the cosines and
        sines of the given positions; by default, they are computed from `position_ids`.
        """
        grid_height, grid_width = self.resolve_grid(grid_height, grid_width)
        self.check_shapes(source_image_tokens, prompt_embeds, grid_height, grid_width)
        segments = []
        if source_image_tokens is not None:
            segments.append(self.embed_source(source_image_tokens, drop_source, grid_height, grid_width))
        if prompt_embeds is not None:
            segments.append(self.embed_prompt(prompt_embeds, drop_prompt))
        if target_image_tokens is not None:
            segments.append(self.embed_tokens(target_image_tokens))
        hidden_states = torch.cat(segments, dim=1)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = past_length + torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]

        # The mask is built from slots, not from grid coordinates. Grid coordinates start again with the target image,
        # which transformers would treat as a second packed sequence.
        causal_mask = create_causal_mask(
            self.config, hidden_states, attention_mask, past_key_values, position_ids=position_ids
        )
        if position_embeddings is None:
            position_embeddings = self.rotary_emb(position_ids, grid_height, grid_width)
        cos, sin = position_embeddings
        position_embeddings = cos[:, None], sin[:, None]
        for layer in self.layers:
            hidden_states = layer(hidden_states, causal_mask, position_embeddings, past_key_values, **kwargs)
        return EditARModelOutput(last_hidden_state=self.norm(hidden_states), cache=past_key_values)

    def resolve_grid(self, grid_height: int | None, grid_width: int | None) -> tuple[int, int]:
        """Use `config.grid_size` for a side that is None, and check that no side is larger than it."""
        grid_size = self.config.grid_size
        grid_height = grid_size if grid_height is None else grid_height
        grid_width = grid_size if grid_width is None else grid_width
        if not all(isinstance(side, numbers.Integral) and 1 <= side <= grid_size for side in (grid_height, grid_width)):
            raise ValueError(
                f"`grid_height` × `grid_width` is {grid_height} × {grid_width}; pass 1 to {grid_size} tokens per side, "
                "which is what this model supports."
            )
        return int(grid_height), int(grid_width)

    def check_shapes(
        self,
        source_image_tokens: torch.Tensor | None,
        prompt_embeds: torch.Tensor | None,
        grid_height: int,
        grid_width: int,
    ) -> None:
        """Check that the source tokens fill the grid, and that the text states have the right length and width."""
        num_image_tokens = grid_height * grid_width
        if source_image_tokens is not None and source_image_tokens.shape[1:] != (num_image_tokens,):
            raise ValueError(
                f"`source_image_tokens` has shape {tuple(source_image_tokens.shape)}; a grid of {grid_height} × "
                f"{grid_width} needs (batch, {num_image_tokens}). For another grid, pass `grid_height` and "
                "`grid_width`."
            )
        expected = (self.config.num_text_tokens, self.config.text_hidden_size)
        if prompt_embeds is not None and prompt_embeds.shape[1:] != expected:
            raise ValueError(
                f"`prompt_embeds` has shape {tuple(prompt_embeds.shape)}; pass (batch, {expected[0]}, {expected[1]}): "
                f"the states of this model's text encoder, padded to {expected[0]} positions."
            )

    def embed_source(
        self, source_image_tokens: torch.Tensor, drop_source: torch.Tensor | None, grid_height: int, grid_width: int
    ) -> torch.Tensor:
        """Embed source tokens. Samples whose `drop_source` is True get the null image instead."""
        source_embeds = self.embed_tokens(source_image_tokens)
        if drop_source is None:
            return source_embeds
        null_grid = self.null_image_embeds.unflatten(0, (self.config.grid_size, self.config.grid_size))
        null_embeds = null_grid[:grid_height, :grid_width].flatten(0, 1).to(source_embeds.dtype)
        return torch.where(drop_source[:, None, None], null_embeds, source_embeds)

    def embed_prompt(self, prompt_embeds: torch.Tensor, drop_prompt: torch.Tensor | None) -> torch.Tensor:
        """Project text states. Samples whose `drop_prompt` is True get the null text instead."""
        # Null texts are projected too, so that all ranks of a distributed run use the same parameters.
        if drop_prompt is not None:
            null_embeds = self.null_prompt_embeds.to(prompt_embeds.dtype)
            prompt_embeds = torch.where(drop_prompt[:, None, None], null_embeds, prompt_embeds)
        return self.text_dropout(self.text_projection(prompt_embeds))


class EditARForConditionalGeneration(EditARGenerationMixin, PackedWeightsMixin, EditARPreTrainedModel):
    """Predict the tokens of an edited image from the tokens of its source and the text states of an instruction.

    Example:

    ```python
    >>> import torch
    >>> from editar_hf import EditARConfig, EditARForConditionalGeneration
    >>> config = EditARConfig(
    ...     vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, grid_size=4, num_text_tokens=5,
    ...     text_hidden_size=16,
    ... )
    >>> model = EditARForConditionalGeneration(config).eval()
    >>> source, target = torch.randint(64, (2, 1, 16))
    >>> output = model(source, torch.randn(1, 5, 16), labels=target)
    >>> output.logits.shape, round(output.loss.item(), 3)  # an untrained head is zero: ln(64) nats
    (torch.Size([1, 16, 64]), 4.159)

    ```
    """

    def __init__(self, config: EditARConfig):
        super().__init__(config)
        self.model = EditARModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.distillation_head = None
        if config.distillation_hidden_size is not None:
            self.distillation_head = nn.Conv2d(config.hidden_size, config.distillation_hidden_size, 2, stride=2)
        self.post_init()

    def forward(
        self,
        source_image_tokens: torch.LongTensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        target_image_tokens: torch.LongTensor | None = None,
        drop_source: torch.BoolTensor | None = None,
        drop_prompt: torch.BoolTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        grid_height: int | None = None,
        grid_width: int | None = None,
        output_distillation_features: bool = False,
        logits_to_keep: int | torch.LongTensor = 0,
        **kwargs: Any,
    ) -> EditAROutput:
        """Compute logits of the target tokens, and the loss if `labels` are given.

        A call with text and T target tokens gives min(T + 1, N) logits: those of the target tokens 0 … min(T, N − 1).
        A call that only continues a cache with T target tokens gives T logits.

        Args:
            source_image_tokens (`torch.LongTensor` of shape `(batch, N)`, *optional*): Codes of the source image in
                raster order.
            prompt_embeds (`torch.Tensor` of shape `(batch, num_text_tokens, text_hidden_size)`, *optional*): States of
                the text encoder, padded positions included.
            labels (`torch.LongTensor` of shape `(batch, N)`, *optional*): Codes of the target image, not shifted. In
                training, they are also used as `target_image_tokens` if those are not given. Label −100 excludes a
                position from the loss; then pass `target_image_tokens` too.
            target_image_tokens (`torch.LongTensor` of shape `(batch, T)`, *optional*): The first T target codes.
            drop_source, drop_prompt (`torch.BoolTensor` of shape `(batch,)`, *optional*): True for samples whose source
                image or text is replaced by its null embedding, for condition dropout in training and for guidance.
            past_key_values (`Cache`, *optional*): The cache that this call continues.
            use_cache (`bool`): Create and return a cache if none is given.
            attention_mask (`torch.Tensor` of shape `(batch, slots)`, *optional*): 1 for slots that may be attended to.
                A static cache needs it, with 0 for slots that are not written yet. A mask of four dimensions is passed
                to the attention function unchanged.
            position_ids (`torch.LongTensor` of shape `(batch, positions)`, *optional*): Slots of the given positions;
                *defaults to* the slots that follow the cache.
            grid_height, grid_width (`int`, *optional*): Tokens per column and per row; *defaults to*
                `config.grid_size`.
            output_distillation_features (`bool`): Also run the distillation head, over all N target positions.
            logits_to_keep (`int` or `torch.LongTensor`): Compute only the last `logits_to_keep` logits, or those at the
                given indices; 0 means all.
            kwargs: Arguments of the attention function. `attn_implementation` selects an attention function for this
                call.

        Raises:
            ValueError: If a shape does not fit the configuration or the grid, or distillation features are requested
                but the model has no distillation head or the call does not pass all target positions.
        """
        grid_height, grid_width = self.model.resolve_grid(grid_height, grid_width)
        num_image_tokens = grid_height * grid_width
        if target_image_tokens is None:
            target_image_tokens = labels
        if target_image_tokens is not None:
            # The last target token is not needed: no token follows it.
            target_image_tokens = target_image_tokens[:, : num_image_tokens - 1]
        outputs = self.model(
            source_image_tokens,
            prompt_embeds,
            target_image_tokens,
            drop_source,
            drop_prompt,
            past_key_values,
            use_cache,
            attention_mask,
            position_ids,
            grid_height,
            grid_width,
            **kwargs,
        )
        # The last text position predicts target token 0, and each target position the next token.
        num_predicting = 0 if prompt_embeds is None else 1
        num_predicting += 0 if target_image_tokens is None else target_image_tokens.shape[1]
        predicting_states = outputs.last_hidden_state[:, outputs.last_hidden_state.shape[1] - num_predicting :]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(predicting_states[:, kept]) if num_predicting else None
        loss = features = None
        if labels is not None:
            if logits is None or labels.shape[1] != num_predicting:
                raise ValueError(
                    f"`labels` holds {labels.shape[1]} tokens for {num_predicting} predictions; pass one label per "
                    "token of the grid, together with `source_image_tokens` and `prompt_embeds`."
                )
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        if output_distillation_features:
            features = self.compute_distillation_features(predicting_states, grid_height, grid_width)
        return EditAROutput(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            distillation_features=features,
        )

    def compute_distillation_features(self, states: torch.Tensor, grid_height: int, grid_width: int) -> torch.Tensor:
        """Arrange the states that predict target tokens as a grid, and convolve them to (batch, cells, width).

        The grid of cells has half as many rows and columns as the grid of tokens.

        Source: EditAR (arXiv 2501.04699), section 3.3.
        """
        if self.distillation_head is None:
            raise ValueError(
                "`output_distillation_features` is True, but `config.distillation_hidden_size` is None, so the model "
                "has no distillation head; leave it out."
            )
        if states.shape[1] != grid_height * grid_width:
            raise ValueError(
                f"`output_distillation_features` is True, but this call has {states.shape[1]} target positions; pass "
                f"all {grid_height * grid_width}."
            )
        grid = states.transpose(1, 2).unflatten(2, (grid_height, grid_width))
        return self.distillation_head(grid).flatten(2).transpose(1, 2)


__all__ = ["EditARForConditionalGeneration", "EditARModel", "EditAROutput"]
