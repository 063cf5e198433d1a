"""Two plain ways to decode with the weights of this package, to measure its own against.

`decode_like_published` does what the published code does: both guidance branches from the first position on, a cache
of the full length allocated anew on every call, attention over all of its slots under a boolean mask, a
`repeat_interleave` by a factor of 1 in each layer, logits in float32 of every position that is fed.
`decode_with_library` is what a careful user would write in an afternoon: a doubled batch, transformers' `DynamicCache`,
sdpa, one token a step.

Both are greedy, eager, and give the tokens of `generate`; a benchmark checks that in the same run. Neither is code of
the package or of the published repository.
"""

from collections.abc import Callable

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


def embed_prefix(model, source: torch.Tensor, prompt_embeds: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    """Embed [source][text][forced tokens] for both branches, conditional rows first."""
    rows = []
    for drop_prompt in (False, True):
        drop = torch.full((len(source),), drop_prompt, device=source.device)
        text = model.model.embed_prompt(prompt_embeds, drop)
        rows.append(torch.cat([model.model.embed_tokens(source), text, model.model.embed_tokens(forced)], dim=1))
    return torch.cat(rows)


@torch.no_grad()
def decode_like_published(
    model,
    source: torch.LongTensor,
    prompt_embeds: torch.Tensor,
    guidance_scale: float,
    grid_size: int,
    forced: torch.LongTensor,
    num_tokens: int,
    on_token: Callable[[], None] | None = None,
) -> torch.LongTensor:
    """Decode `num_tokens` target tokens after the forced ones `(batch, T)`; `on_token` hears of each."""
    decoder = PublishedStyleDecoder(model, len(source), grid_size)
    prefix = embed_prefix(model, source, prompt_embeds, forced)
    num_filled = prefix.shape[1]

    def step(fed: torch.LongTensor, num_decoded: int) -> torch.Tensor:
        slot = torch.tensor([num_filled + num_decoded - 1], device=source.device)
        return decoder.run(model.model.embed_tokens(fed), slot)[:, -1]

    logits = decoder.run(prefix, torch.arange(num_filled, device=source.device))[:, -1]
    return decode_greedily(logits, step, guidance_scale, num_tokens, on_token)


@torch.no_grad()
def decode_with_library(
    model,
    source: torch.LongTensor,
    prompt_embeds: torch.Tensor,
    guidance_scale: float,
    grid_size: int,
    forced: torch.LongTensor,
    num_tokens: int,
    on_token: Callable[[], None] | None = None,
) -> torch.LongTensor:
    """Decode `num_tokens` target tokens after the forced ones `(batch, T)`; `on_token` hears of each."""
    cache, grid = DynamicCache(config=model.config), {"grid_height": grid_size, "grid_width": grid_size}
    drop_prompt = torch.arange(2 * len(source), device=source.device) >= len(source)
    start = {"target_image_tokens": forced.repeat(2, 1)} if forced.shape[1] else {}
    logits = model(
        source_image_tokens=source.repeat(2, 1),
        prompt_embeds=prompt_embeds.repeat(2, 1, 1),
        drop_prompt=drop_prompt,
        past_key_values=cache,
        **start,
        **grid,
    ).logits[:, -1]

    def step(fed: torch.LongTensor, num_decoded: int) -> torch.Tensor:
        return model(target_image_tokens=fed, past_key_values=cache, **grid).logits[:, -1]

    return decode_greedily(logits, step, guidance_scale, num_tokens, on_token)


def decode_greedily(
    logits: torch.Tensor,
    step: Callable[[torch.LongTensor, int], torch.Tensor],
    guidance_scale: float,
    num_tokens: int,
    on_token: Callable[[], None] | None,
) -> torch.LongTensor:
    """Choose a token of each image; feed it to both of its rows for the next logits; and so on."""
    tokens = []
    while True:
        tokens.append(select_greedily(logits.float(), guidance_scale))
        if on_token is not None:
            on_token()
        if len(tokens) == num_tokens:
            return torch.stack(tokens, dim=1)
        logits = step(tokens[-1].repeat(2)[:, None], len(tokens))


def select_greedily(logits: torch.Tensor, guidance_scale: float) -> torch.LongTensor:
    """Choose the likeliest token of guided logits; rows are conditional, then unconditional."""
    conditional, unconditional = logits.chunk(2)
    return (unconditional + guidance_scale * (conditional - unconditional)).argmax(dim=-1)
