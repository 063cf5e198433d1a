"""Two baseline decoders. They use the weights of this package, and its own decoding is compared with them.

`decode_like_published` decodes like the published code. It runs both guidance branches from the first position on. It
allocates a cache of the full length in every call, and attends to all slots of the cache with a boolean mask. Each
layer calls `repeat_interleave` with a factor of 1, and float32 logits are computed for all positions of the input.
`decode_with_library` is what a careful user would write in an afternoon: a doubled batch, the `DynamicCache` of
transformers, sdpa attention, and one token per step.

Both are greedy and eager, and give the same tokens as `generate`, which the benchmarks check in the same run. Neither
is code of this package or of the published repository.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from editar_hf.modeling_editar import apply_rotary


class PublishedStyleDecoder:
    """Decode one batch like the published code.

    Args:
        model (`EditARForConditionalGeneration`): The decoder with the weights.
        num_images (`int`): Images in the batch. There are twice as many rows, for the two guidance branches.
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
        """Run positions through all layers. Return the float32 logits of each position."""
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


# A feed takes target tokens and the position of the first of them, and runs the decoder on them. If the position is
# None, the feed also runs the source tokens and the text before them. It returns the logits after the last token,
# conditional rows first.
Feed = Callable[[torch.LongTensor, int | None], torch.Tensor]


def build_published_feed(model, source: torch.LongTensor, prompt_embeds: torch.Tensor, grid_size: int) -> Feed:
    decoder = PublishedStyleDecoder(model, len(source), grid_size)
    num_prefix = source.shape[1] + model.config.num_text_tokens

    def feed(tokens: torch.LongTensor, start: int | None) -> torch.Tensor:
        embed, first_slot = model.model.embed_tokens, 0
        if start is None:
            drops = [torch.full((len(source),), drop, device=source.device) for drop in (False, True)]
            texts = [model.model.embed_prompt(prompt_embeds, drop) for drop in drops]
            hidden_states = torch.cat([torch.cat([embed(source), text, embed(tokens)], dim=1) for text in texts])
        else:
            hidden_states, first_slot = embed(tokens.repeat(2, 1)), num_prefix + start
        slots = torch.arange(first_slot, first_slot + hidden_states.shape[1], device=source.device)
        return decoder.run(hidden_states, slots)[:, -1]

    return feed


def build_library_feed(model, source: torch.LongTensor, prompt_embeds: torch.Tensor, grid_size: int) -> Feed:
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

    return feed


@torch.no_grad()
def decode_greedily(
    build_feed: Callable[..., Feed],
    model,
    source: torch.LongTensor,
    prompt_embeds: torch.Tensor,
    guidance_scale: float,
    grid_size: int,
    free_positions: Sequence[int],
    on_token: Callable[[], None] | None = None,
) -> torch.LongTensor:
    """Decode the target tokens at `free_positions`; all others are source tokens. Call `on_token` for each token."""
    feed = build_feed(model, source, prompt_embeds, grid_size)
    tokens, start = source.clone(), None
    for position in free_positions:
        logits = feed(tokens[:, start or 0 : position], start)
        tokens[:, position] = select_greedily(logits.float(), guidance_scale)
        start = position
        if on_token is not None:
            on_token()
    return tokens[:, list(free_positions)]


decode_like_published = partial(decode_greedily, build_published_feed)
decode_with_library = partial(decode_greedily, build_library_feed)


def select_greedily(logits: torch.Tensor, guidance_scale: float) -> torch.LongTensor:
    """Choose the most probable token under guided logits. The conditional rows come first."""
    conditional, unconditional = logits.chunk(2)
    return (unconditional + guidance_scale * (conditional - unconditional)).argmax(dim=-1)
