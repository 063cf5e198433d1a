"""Keys and values of decoding: `SourceCache`, kept between calls, and `DecodingCache`, which lives for one call.

Two facts make both small. The source comes first and attention is causal, so its keys and values are those of every
instruction, seed and guidance branch: they are stored once. And where `text_rotary="zero"` makes text keys zero
vectors, all text positions of a row weigh the same, so one slot stands for them: key 0, the mean of their values, and a
bias of the logarithm of their number.
"""

import math
from dataclasses import dataclass

import torch

from ..configuration_editar import EditARConfig
from .attention import SharedPrefix, apply_attention, build_causal_bias


@dataclass
class SourceCache:
    """What the decoder knows of source images before any instruction; from `prepare_source_cache`.

    Args:
        source_image_tokens (`torch.LongTensor` of shape `(sources, N)`): Their tokens.
        keys, values (`list[torch.Tensor]`): A tensor `(sources, heads, N, head_dim)` for each layer.
        grid_height, grid_width (`int`): Tokens per column and row.
        weight_samples (`dict[str, list[float]]`): A few numbers of each of the decoder's parameters. A call whose
            decoder has others is refused: another decoder, trained or fused weights, other adapters or scales; and
            after `unfuse_lora`, which leaves rounding. A change of single numbers, such as one embedding, may go
            unnoticed.
        pixel_values (`torch.Tensor` of shape `(sources, 3, height, width)`, *optional*): The pictures, in [−1, 1].
    """

    source_image_tokens: torch.LongTensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    grid_height: int
    grid_width: int
    weight_samples: dict[str, list[float]]
    pixel_values: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.source_image_tokens)

    def expand_tokens(
        self, source_image_tokens: torch.LongTensor | None, prompt_embeds: torch.Tensor
    ) -> torch.LongTensor:
        """Give every image of a batch the tokens of its source; refuse another number, or given tokens that differ."""
        if len(prompt_embeds) % len(self):
            raise ValueError(
                f"`source_cache` holds {len(self)} images and `prompt_embeds` {len(prompt_embeds)}; pass equally many "
                "prompts for each image, one after the other."
            )
        tokens = self.source_image_tokens.repeat_interleave(len(prompt_embeds) // len(self), dim=0)
        if source_image_tokens is not None and not torch.equal(tokens, source_image_tokens.to(tokens.device)):
            raise ValueError(
                "`source_cache` is of other images than `source_image_tokens`; prepare one of these tokens, or leave "
                "them out."
            )
        return tokens


class DecodingCache:
    """Hold one call's keys and values, and attend to them.

    Every pass begins with `start_text_pass` or `start_pass`, which say what it brings; each layer then calls `attend`.
    Slots of a pass are written over by the next one that brings them, so drafts that fail need no clean-up.

    Args:
        config (`EditARConfig`): Sizes of the decoder.
        prefixes (`list[list[SharedPrefix]]`): For each layer, the sources and their rows.
        num_target_slots (`int`): Most target tokens that are fed.
        is_shared (`bool`): Read the prefixes where they are; or copy them to every row, which costs memory and is
            faster where few rows share a source and the device's attention kernel beats plain matrix products.
        is_static (`bool`): Hold the prefixes in tensors of its own, for `fill_prefixes`, and everything at addresses
            that stay.
    """

    def __init__(
        self,
        config: EditARConfig,
        prefixes: list[list[SharedPrefix]],
        num_target_slots: int,
        is_shared: bool = True,
        is_static: bool = False,
    ):
        first = prefixes[0][0].keys
        self.num_text_tokens = config.num_text_tokens
        self.has_one_text_slot = config.text_rotary == "zero"
        self.prefixes = prefixes if is_shared else [[] for _ in prefixes]
        self.num_prefix_slots = 0 if is_shared else first.shape[2]
        self.num_text_slots = 1 if self.has_one_text_slot else config.num_text_tokens
        self.num_rows = sum(prefix.num_rows for prefix in prefixes[0])
        self.num_slots = self.num_prefix_slots + self.num_text_slots + num_target_slots
        self.device = first.device
        # A tensor for each layer: what compiled code writes to a view it may write back to all of the tensor.
        shape = (self.num_rows, config.num_attention_heads, self.num_slots, config.head_dim)
        allocate = first.new_zeros if is_static else first.new_empty
        self.keys = [allocate(shape) for _ in prefixes]
        self.values = [allocate(shape) for _ in prefixes]
        if not is_shared:
            self.copy_prefixes(prefixes)
        if is_static:
            self.prefixes = [[copy_static(prefix) for prefix in blocks] for blocks in prefixes]
            for states in (*self.keys, *self.values):
                torch._dynamo.mark_static_address(states)
        self.is_text_pass = False
        self.slots: slice | torch.LongTensor = slice(0, 0)
        self.bias: torch.Tensor | None = None

    def copy_prefixes(self, prefixes: list[list[SharedPrefix]]):
        """Give every row its own copy of its source."""
        for keys, values, layer_prefixes in zip(self.keys, self.values, prefixes, strict=True):
            rows = 0
            for prefix in layer_prefixes:
                group = prefix.num_images // len(prefix.keys)
                for own, states in ((keys, prefix.keys), (values, prefix.values)):
                    own = own[rows : rows + prefix.num_rows, :, : self.num_prefix_slots]
                    own.unflatten(0, (-1, len(states), group)).copy_(states[None, :, None])
                rows += prefix.num_rows

    def fill_prefixes(self, prefixes: list[list[SharedPrefix]]):
        """Copy other sources of the same shapes in."""
        for own_blocks, blocks in zip(self.prefixes, prefixes, strict=True):
            for own, block in zip(own_blocks, blocks, strict=True):
                own.keys.copy_(block.keys)
                own.values.copy_(block.values)

    def start_text_pass(self, num_forced: int):
        """Announce the text, and the first target tokens where they are known already."""
        num_new = self.num_text_tokens + num_forced
        self.is_text_pass = True
        slots = self.num_prefix_slots + torch.arange(num_new, device=self.device)
        self.bias = build_causal_bias(slots, self.num_prefix_slots + num_new)

    def start_pass(self, first_position: int, num_new: int):
        """Announce the target tokens from `first_position` on."""
        self.is_text_pass = False
        start = self.num_prefix_slots + self.num_text_slots + first_position
        self.slots = slice(start, start + num_new)
        self.bias = None
        if num_new > 1 or self.has_one_text_slot:
            slots = torch.arange(start, start + num_new, device=self.device)
            self.bias = self.add_text_weight(build_causal_bias(slots, self.slots.stop))

    def start_static_pass(self, first_position: int, num_new: int):
        """Announce them for a compiled pass: slots and bias are tensors, whose shapes depend on `num_new` alone."""
        self.is_text_pass = False
        start = self.num_prefix_slots + self.num_text_slots + first_position
        self.slots = torch.arange(start, start + num_new, device=self.device)
        self.bias = self.add_text_weight(build_causal_bias(self.slots, self.num_slots))

    def add_text_weight(self, bias: torch.Tensor) -> torch.Tensor:
        """Let the one slot of the text weigh as much as all of its positions: exp(log L) = L equal scores."""
        if self.has_one_text_slot:
            bias[:, self.num_prefix_slots] += math.log(self.num_text_tokens)
        return bias

    def attend(
        self, layer_idx: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Store a layer's new keys and values, and attend to all it has; each `(rows, heads, positions, head_dim)`."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self.is_text_pass:
            own_keys = torch.cat([keys[:, :, : self.num_prefix_slots], key], dim=2)
            own_values = torch.cat([values[:, :, : self.num_prefix_slots], value], dim=2)
            self.store_text(keys, values, key, value)
        elif isinstance(self.slots, torch.Tensor):
            own_keys = keys.index_copy_(2, self.slots, key)
            own_values = values.index_copy_(2, self.slots, value)
        else:
            keys[:, :, self.slots], values[:, :, self.slots] = key, value
            own_keys, own_values = keys[:, :, : self.slots.stop], values[:, :, : self.slots.stop]
        return apply_attention(query, self.prefixes[layer_idx], own_keys, own_values, self.bias, scaling)

    def store_text(self, keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        """Store the text, in one slot where it can, and the target tokens that came with it."""
        start = self.num_prefix_slots
        if self.has_one_text_slot:
            keys[:, :, start] = 0
            values[:, :, start] = value[:, :, : self.num_text_tokens].float().mean(dim=2).to(value.dtype)
            start, key, value = start + 1, key[:, :, self.num_text_tokens :], value[:, :, self.num_text_tokens :]
        keys[:, :, start : start + key.shape[2]], values[:, :, start : start + key.shape[2]] = key, value


def copy_static(prefix: SharedPrefix) -> SharedPrefix:
    """Copy a prefix to tensors whose addresses compiled code may rely on."""
    keys, values = prefix.keys.clone(), prefix.values.clone()
    for states in (keys, values):
        torch._dynamo.mark_static_address(states)
    return prefix._replace(keys=keys, values=values)
