"""Two plain ways to decode with the weights of this package, to measure its own against.

`decode_like_published` does what the published code does: both guidance branches from the first position on, a cache
of the full length allocated anew on every call, attention over all of its slots under a boolean mask, a
`repeat_interleave` by a factor of 1 in each layer, logits in float32 of every position that is fed.
`decode_with_library` is what a careful user would write in an afternoon: a doubled batch, transformers' `DynamicCache`,
sdpa, one token a step.

Both are greedy, eager, and give the tokens of `generate`; a benchmark checks that in the same run. Neither is code of
the package or of the published repository.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from editar_hf.modeling_editar import apply_rotary


class PublishedStyleDecoder:
    """One call of the published kind of decoding.

    Args:
        model (`EditARForConditionalGeneration`): Whose weights are used.
        num_images (`int`): Images of the batch; the rows are twice as many.
        grid_size (`int`): Tokens per side.
    """

    def __init__(self, model, num_images: int, grid_size: int):
        config = model.config
        self.model, self.grid_size = model, grid_size
        self.num_slots = 2 * grid_size**2 + config.num_text_tokens
        num_rows, heads = 2 * num_images, (config.num_attention_heads, self.num_slots, config.head_dim)
        device = model.device
        self.cache = torch.zeros(config.num_hidden_layers, 2, num_rows, *heads, dtype=model.dtype, device=device)
        self.mask = torch.ones(self.num_slots, self.num_slots, dtype=torch.bool, device=device).tril()
        slots = torch.arange(self.num_slots, device=device)[None]
        self.rotations = model.model.rotary_emb(slots, grid_size, grid_size)

    def run(self, hidden_states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Run positions through all layers; return float32 logits of each."""
        cos, sin = (table[:, None, slots] for table in self.rotations)
        for index, layer in enumerate(self.model.model.layers):
            hidden_states = hidden_states + self.attend(index, layer, hidden_states, slots, cos, sin)
            hidden_states = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
        return self.model.lm_head(self.model.model.norm(hidden_states)).float()

    def attend(self, index, layer, hidden_states, slots, cos, sin) -> torch.Tensor:
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden_states)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        keys, values = self.cache[index]
        keys[:, :, slots], values[:, :, slots] = apply_rotary(key, cos, sin), value
        keys, values = keys.repeat_interleave(1, dim=1), values.repeat_interleave(1, dim=1)
        output = F.scaled_dot_product_attention(apply_rotary(query, cos, sin), keys, values, self.mask[slots])
        return attention.o_proj(output.transpose(1, 2).flatten(2))


def embed_prefix(model, source: torch.Tensor, prompt_embeds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Embed [source][text][first target tokens] for both branches, conditional rows first."""
    rows = []
    for drop_prompt in (False, True):
        drop = torch.full((len(source),), drop_prompt, device=source.device)
        text = model.model.embed_prompt(prompt_embeds, drop)
        rows.append(torch.cat([model.model.embed_tokens(source), text, model.model.embed_tokens(target)], dim=1))
    return torch.cat(rows)


@torch.no_grad()
def decode_like_published(
    model,
    source: torch.LongTensor,
    prompt_embeds: torch.Tensor,
    guidance_scale: float,
    grid_size: int,
    free_positions: Sequence[int],
    on_token: Callable[[], None] | None = None,
) -> torch.LongTensor:
    """Decode the target tokens at `free_positions`; all others are the source's. `on_token` hears of each."""
    decoder = PublishedStyleDecoder(model, len(source), grid_size)
    num_prefix = source.shape[1] + model.config.num_text_tokens

    def feed(tokens: torch.LongTensor, start: int | None) -> torch.Tensor:
        if start is None:
            hidden_states, first_slot = embed_prefix(model, source, prompt_embeds, tokens), 0
        else:
            hidden_states, first_slot = model.model.embed_tokens(tokens.repeat(2, 1)), num_prefix + start
        slots = torch.arange(first_slot, first_slot + hidden_states.shape[1], device=source.device)
        return decoder.run(hidden_states, slots)[:, -1]

    return decode_greedily(feed, source, guidance_scale, free_positions, on_token)


@torch.no_grad()
def decode_with_library(
    model,
    source: torch.LongTensor,
    prompt_embeds: torch.Tensor,
    guidance_scale: float,
    grid_size: int,
    free_positions: Sequence[int],
    on_token: Callable[[], None] | None = None,
) -> torch.LongTensor:
    """Decode the target tokens at `free_positions`; all others are the source's. `on_token` hears of each."""
    cache = DynamicCache(config=model.config)
    prefix = {
        "source_image_tokens": source.repeat(2, 1),
        "prompt_embeds": prompt_embeds.repeat(2, 1, 1),
        "drop_prompt": torch.arange(2 * len(source), device=source.device) >= len(source),
    }

    def feed(tokens: torch.LongTensor, start: int | None) -> torch.Tensor:
        inputs = dict(prefix) if start is None else {}
        if tokens.shape[1]:
            inputs["target_image_tokens"] = tokens.repeat(2, 1)
        return model(**inputs, past_key_values=cache, grid_height=grid_size, grid_width=grid_size).logits[:, -1]

    return decode_greedily(feed, source, guidance_scale, free_positions, on_token)


def decode_greedily(
    feed: Callable[[torch.LongTensor, int | None], torch.Tensor],
    source: torch.LongTensor,
    guidance_scale: float,
    free_positions: Sequence[int],
    on_token: Callable[[], None] | None,
) -> torch.LongTensor:
    """Choose the token at each free position.

    `feed` runs target tokens from a position on, or the source, the text and all target tokens so far if it is None,
    and returns the logits after the last of them.
    """
    tokens, start = source.clone(), None
    for position in free_positions:
        logits = feed(tokens[:, start or 0 : position], start)
        tokens[:, position] = select_greedily(logits.float(), guidance_scale)
        start = position
        if on_token is not None:
            on_token()
    return tokens[:, list(free_positions)]


def select_greedily(logits: torch.Tensor, guidance_scale: float) -> torch.LongTensor:
    """Choose the likeliest token of guided logits; rows are conditional, then unconditional."""
    conditional, unconditional = logits.chunk(2)
    return (unconditional + guidance_scale * (conditional - unconditional)).argmax(dim=-1)
