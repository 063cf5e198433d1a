"""The key-value caches of decoding, and the attention function that reads them.

The source image comes first in the sequence and attention is causal. Therefore the keys and values of a source do not
depend on the instruction, the seed or the guidance branch. `SourceCache` holds them once, with those of the null text
after the source. `DecodingCache` holds, for each row of a batch, the keys and values of its text and of its target
tokens. The attention function reads both caches without copying the source to every row.

Source: Hydragen (arXiv 2402.05099), attention over a shared prefix and a part of each row.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from ..configuration_editar import EditARConfig
from ..packing import NUM_SAMPLES, list_weight_samples


# The name under which `attend_to_sources` is registered in transformers.
SHARED_SOURCE_ATTENTION = "editar_shared_source"
# Number of queries whose attention scores are computed at once. For two rows of the published size, 128 need 22 MB.
QUERIES_PER_CHUNK = 128
# The names of an adapter's parameters in PEFT.
ADAPTER_PARAMETER = re.compile(r"\.(?:lora_\w+|modules_to_save)\.([^.]+)")


@dataclass
class TextCache:
    """Hold the keys and values of texts after their sources, and the logits of the first target token.

    Args:
        keys, values (`list[torch.Tensor]`): One tensor `(texts, heads, num_text_tokens, head_dim)` for each layer.
        logits (`torch.Tensor` of shape `(texts, vocab_size)`): Logits of the first target token, in float32.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    logits: torch.Tensor

    def expand(self, num_texts: int) -> "TextCache":
        """Repeat each text, so that there are `num_texts`; all repetitions of a text follow each other."""
        repeats = num_texts // len(self.logits)
        keys, values = (
            [states.repeat_interleave(repeats, dim=0) for states in layers] for layers in (self.keys, self.values)
        )
        return TextCache(keys, values, self.logits.repeat_interleave(repeats, dim=0))


@dataclass
class SourceCache:
    """Hold the keys and values of source images. `prepare_source_cache` creates it.

    Args:
        source_image_tokens (`torch.LongTensor` of shape `(sources, N)`): Tokens of the source images.
        keys, values (`list[torch.Tensor]`): One tensor `(sources, heads, N, head_dim)` for each layer.
        grid_height, grid_width (`int`): Tokens per column and per row.
        null_text (`TextCache`, *optional*): The null text after each source, which guidance needs unless there is a
            negative prompt.
        weight_samples (`dict[str, list[float]]`): A few numbers of each parameter of the decoder. `generate` refuses a
            cache if the decoder's numbers differ, because the weights, the adapters or their scales have changed since
            the cache was created. It may not notice a change of few numbers, such as one embedding. After `unfuse_lora`
            the weights differ by rounding errors, so it refuses the cache.
        pixel_values (`torch.Tensor` of shape `(sources, 3, height, width)`, *optional*): The images, in [−1, 1].
        num_rows (`int`): Set by `generate`: number of batch rows that read these sources. Rows are ordered by branch,
            then by source.
        num_images (`int`): Set by `generate`: number of images in each branch, the same number for each source.
    """

    source_image_tokens: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    grid_height: int
    grid_width: int
    null_text: TextCache | None = None
    weight_samples: dict[str, list[float]] = field(default_factory=dict)
    pixel_values: torch.Tensor | None = None
    num_rows: int = 0
    num_images: int = 0

    def __len__(self) -> int:
        return len(self.source_image_tokens)

    def group_rows(self, states: torch.Tensor) -> torch.Tensor:
        """Group rows by source: `(rows, heads, queries, …)` to `(sources, heads, rows per source · queries, …)`."""
        # (branches, sources, images per source, heads, queries, …)
        states = states.unflatten(0, (-1, len(self), self.num_images // len(self)))
        return states.permute(1, 3, 0, 2, 4, 5).flatten(2, 4)

    def merge_rows(self, states: torch.Tensor) -> torch.Tensor:
        """Undo `group_rows`."""
        images_per_source, num_branches = self.num_images // len(self), self.num_rows // self.num_images
        states = states.unflatten(2, (num_branches, images_per_source, -1))
        return states.permute(2, 0, 3, 1, 4, 5).flatten(0, 2)

    def expand_tokens(self, source_image_tokens: torch.Tensor | None, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Repeat the tokens of each source for its images, and check that the prompts and given tokens match them."""
        if len(prompt_embeds) % len(self):
            raise ValueError(
                f"`source_cache` holds {len(self)} images and `prompt_embeds` holds {len(prompt_embeds)} prompts; pass "
                "the same number of prompts for each image: first those of the first image, then those of the next."
            )
        tokens = self.source_image_tokens.repeat_interleave(len(prompt_embeds) // len(self), dim=0)
        if source_image_tokens is not None and not torch.equal(tokens, source_image_tokens.to(tokens.device)):
            raise ValueError(
                "`source_cache` and `source_image_tokens` are of different images; prepare a cache of these tokens, or "
                "leave `source_image_tokens` out."
            )
        return tokens


def compute_source_cache(
    model: PreTrainedModel,
    source_image_tokens: torch.Tensor,
    grid: dict[str, int],
    is_null_image: bool = False,
    with_null_text: bool = True,
) -> SourceCache:
    """Compute the keys and values of source images, or of the null image, and of the null text after each of them."""
    num_sources, num_tokens = source_image_tokens.shape
    drop = torch.ones(num_sources, dtype=torch.bool, device=source_image_tokens.device)
    inputs: dict[str, Any] = {"drop_source": drop} if is_null_image else {}
    if with_null_text:
        any_text = drop.new_zeros(num_sources, model.config.num_text_tokens, model.config.text_hidden_size)
        inputs |= {"prompt_embeds": any_text.to(model.dtype), "drop_prompt": drop, "logits_to_keep": 1}
    outputs = model(source_image_tokens=source_image_tokens, use_cache=True, **inputs, **grid)
    keys = [layer.keys for layer in outputs.cache.layers]
    values = [layer.values for layer in outputs.cache.layers]
    null_text = None
    if with_null_text:
        text_keys, text_values = ([states[:, :, num_tokens:] for states in layers] for layers in (keys, values))
        # Values are copied, because views of them would keep the values of the whole sequence in memory.
        text_values = [states.clone() for states in text_values]
        null_text = TextCache(text_keys, text_values, outputs.logits[:, -1].float())
        keys, values = ([states[:, :, :num_tokens] for states in layers] for layers in (keys, values))
    values = [states.mT.contiguous().mT for states in values]  # for the reason that `DecodingCache` gives
    return SourceCache(source_image_tokens, keys, values, grid["grid_height"], grid["grid_width"], null_text)


def copy_to_one_block(cache: SourceCache) -> SourceCache:
    """Copy the keys and values of a cache into one block of memory.

    A process that keeps many caches for some time then gives their memory back. The memory of many small tensors would
    stay in gaps between other data.
    """
    parts = [part for part in (cache, cache.null_text) if part is not None]
    # Values may lie in memory as their transpose does; `DecodingCache` explains why.
    tensors = [states for part in parts for states in (*part.keys, *part.values)]
    rows = [states if states.stride(-1) == 1 else states.mT for states in tensors]
    pieces = torch.cat([states.flatten() for states in rows]).split([states.numel() for states in rows])
    copies = (
        piece.view(lying.shape) if lying is states else piece.view(lying.shape).mT
        for piece, lying, states in zip(pieces, rows, tensors, strict=True)
    )
    copied: list[Any] = [
        replace(part, keys=[next(copies) for _ in part.keys], values=[next(copies) for _ in part.values])
        for part in parts
    ]
    return replace(copied[0], null_text=copied[1] if len(copied) > 1 else None)


def join_caches(caches: Sequence[Any]) -> Any:
    """Join source caches of one decoder and one grid to one cache of all their sources, in order; text caches too."""
    joined: dict[str, Any] = {}
    for name, value in vars(caches[0]).items():
        values = [getattr(cache, name) for cache in caches]
        if isinstance(value, torch.Tensor):
            joined[name] = torch.cat(values)
        elif isinstance(value, TextCache):
            joined[name] = join_caches(values)
        elif name == "keys":
            joined[name] = [torch.cat(layers) for layers in zip(*values, strict=True)]
        elif name == "values":  # in the layout that `DecodingCache` explains
            joined[name] = [torch.cat([states.mT for states in layers]).mT for layers in zip(*values, strict=True)]
    return replace(caches[0], **joined)


def compute_text_cache(
    model: PreTrainedModel, sources: list[SourceCache], prompt_embeds: torch.Tensor, grid: dict[str, int]
) -> TextCache:
    """Compute the keys and values of texts, `(rows, num_text_tokens, text_hidden_size)`, after the rows' sources."""
    cache = DecodingCache(model.config, sources, num_text_slots=model.config.num_text_tokens, num_target_slots=0)
    cache.write_rotations(model.model.rotary_emb, grid)
    inputs = cache.start_pass(0, model.config.num_text_tokens)
    logits = model(prompt_embeds=prompt_embeds, logits_to_keep=1, **inputs, **grid).logits
    keys, values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
    return TextCache(keys, values, logits[:, -1].float())


def compute_target_logits(
    model: PreTrainedModel, source_cache: SourceCache, prompt_embeds: torch.Tensor, target_image_tokens: torch.Tensor
) -> torch.Tensor:
    """Compute the logits of all target tokens, `(rows, N, vocab_size)`, each after the given tokens before it.

    The prompts and the target run through the decoder in one pass, and the sources do not.

    Args:
        model (`PreTrainedModel`): The decoder.
        source_cache (`SourceCache`): The sources. Each has the same number of rows.
        prompt_embeds (`torch.Tensor` of shape `(rows, num_text_tokens, text_hidden_size)`): The prompts.
        target_image_tokens (`torch.LongTensor` of shape `(rows, N)`): The target.
    """
    num_rows, num_text_tokens = prompt_embeds.shape[:2]
    source = replace(source_cache, num_rows=num_rows, num_images=num_rows)
    grid = {"grid_height": source.grid_height, "grid_width": source.grid_width}
    num_target_slots = target_image_tokens.shape[1] - 1  # The last token is never fed.
    cache = DecodingCache(model.config, [source], num_text_tokens, num_target_slots)
    cache.write_rotations(model.model.rotary_emb, grid)
    inputs = cache.start_pass(0, num_text_tokens + num_target_slots)
    return model(prompt_embeds=prompt_embeds, target_image_tokens=target_image_tokens, **inputs, **grid).logits


def describe_adapters(decoder: torch.nn.Module) -> dict[tuple[str, str], float]:
    """Return the scale of each active adapter in each layer, by the layer's path and the adapter's name."""
    scales: dict[tuple[str, str], float] = {}
    for path, module in decoder.named_modules():
        if hasattr(module, "adapter_layer_names") and not (module.disable_adapters or getattr(module, "merged", False)):
            scaling = getattr(module, "scaling", {})
            scales |= {(path, name): scaling.get(name, 1.0) for name in module.active_adapters}
    return scales


def sample_weights(decoder: torch.nn.Module) -> dict[str, list[float]]:
    """Read about 32 numbers of every parameter and buffer, and the scales of active adapters.

    The numbers are the same on every device and in every process. Parameters on the meta device, as under sequential
    offload, give an empty list.
    """
    adapters = describe_adapters(decoder)
    active = {name for _, name in adapters}
    samples = {f"{path}: {name}": [scale] for (path, name), scale in adapters.items()}
    picked: dict[str, torch.Tensor] = {}
    packed = list_weight_samples(decoder)
    for name, weight in chain(decoder.named_parameters(), decoder.named_buffers(), packed):
        adapter = ADAPTER_PARAMETER.search(name)
        if adapter is None or adapter[1] in active:
            values = weight.detach().flatten()[:: max(1, weight.numel() // NUM_SAMPLES)]
            name = name.replace(".base_layer", "").replace(".original_module", "")
            samples[name] = []
            if not weight.is_meta:
                picked[name] = values.float()
    # One copy for each device, because every copy waits for the device.
    for device in {values.device for values in picked.values()}:
        on_device = {name: values for name, values in picked.items() if values.device == device}
        numbers = torch.cat(list(on_device.values())).cpu().split([len(values) for values in on_device.values()])
        samples |= {name: values.tolist() for name, values in zip(on_device, numbers, strict=True)}
    return samples


class DecodingCache(Cache):
    """Hold the keys and values of one call of `generate`: text slots, then target slots, for each row.

    A pass writes to the slots that `start_pass` sets. The next pass may overwrite them, so rejected drafts need no
    clean-up. The first `num_rows` rows read `sources[0]`, the next rows read `sources[1]`, and so on.

    With fewer text slots than text tokens, each slot stands for several tokens: it holds the mean of their keys and
    values, and its score is raised by the logarithm of their number. This is exact if their keys are equal.

    Values are stored with the slots innermost, because CPUs then multiply them with attention weights twice as fast.

    With `is_static`, every pass attends to all slots under a mask, and the sources are copied to buffers of the cache.
    The shapes of a pass then depend only on its length, so that passes can be compiled or captured as CUDA graphs.
    """

    def __init__(
        self,
        config: EditARConfig,
        sources: list[SourceCache],
        num_text_slots: int,
        num_target_slots: int,
        is_static: bool = False,
    ):
        self.num_text_slots, self.num_read = num_text_slots, num_text_slots + num_target_slots
        super().__init__(layers=[StaticLayer(self.num_read) for _ in range(config.num_hidden_layers)])
        keys, num_rows = sources[0].keys[0], sum(source.num_rows for source in sources)
        self.early_initialization(num_rows, config.num_attention_heads, config.head_dim, keys.dtype, keys.device)
        for layer in self.layers:
            layer.values = torch.zeros_like(layer.values.mT).mT
            torch._dynamo.mark_static_address(layer.values)
        self.is_static = is_static
        self.sources = [copy_source(source) for source in sources] if is_static else sources
        self.all_slots = torch.arange(self.num_read, device=keys.device)
        # Added to a slot, it gives the position in the sequence, which is right for target tokens.
        self.first_position = keys.shape[2] + config.num_text_tokens - num_text_slots
        log_tokens_per_slot = math.log(config.num_text_tokens / num_text_slots)
        self.written: slice | torch.Tensor = slice(0)  # the slots that the current pass writes
        self.bias = torch.where(self.all_slots < num_text_slots, log_tokens_per_slot, 0.0)
        rotations = torch.empty(2, 1, self.num_read, config.head_dim, device=keys.device)
        self.cos, self.sin = rotations.unbind()

    def reuse(self, sources: list[SourceCache]) -> None:
        """Copy other sources of the same shapes into the buffers, before a new call of `generate`."""
        for own, given in zip(self.sources, sources, strict=True):
            for buffer, states in zip(own.keys + own.values, given.keys + given.values, strict=True):
                buffer.copy_(states)

    def write_rotations(self, rotary_emb: Callable, grid: dict[str, int]) -> None:
        """Compute the cosines and sines of all slots once, before the first pass."""
        cos, sin = rotary_emb((self.first_position + self.all_slots)[None], **grid)
        self.cos.copy_(cos)
        self.sin.copy_(sin)

    def write_texts(self, texts: list[TextCache]) -> None:
        """Write the keys and values of the texts of all rows, before the first pass with target tokens."""
        for index, layer in enumerate(self.layers):
            for own, rows in (
                (layer.keys, [text.keys[index] for text in texts]),
                (layer.values, [text.values[index] for text in texts]),
            ):
                tokens_of_slots = torch.cat(rows).unflatten(2, (self.num_text_slots, -1))
                own[:, :, : self.num_text_slots] = tokens_of_slots.mean(dim=3, dtype=torch.float32)

    def start_pass(self, start: int | torch.Tensor, num_new: int) -> dict:
        """Prepare for a pass that writes `num_new` slots from `start` on; return its arguments for `forward`.

        In a static cache, `start` may be a tensor, for a CUDA graph.
        """
        slots = self.written = start + self.all_slots[:num_new]
        if not self.is_static:
            self.num_read = int(start) + num_new
            self.written = slice(int(start), self.num_read)
        is_later = self.all_slots[: self.num_read] > slots[:, None]
        bias = torch.where(is_later, -math.inf, self.bias[: self.num_read])
        return {
            "past_key_values": self,
            "position_ids": (self.first_position + slots)[None],
            "position_embeddings": (self.cos[:, self.written], self.sin[:, self.written]),
            "attention_mask": bias[None, None],
            "attn_implementation": SHARED_SOURCE_ATTENTION,
            "sources": self.sources,
        }

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values of a layer, and return the keys and values that the pass attends to."""
        keys, values = self.layers[layer_idx].keys, self.layers[layer_idx].values
        keys[:, :, self.written], values[:, :, self.written] = key_states, value_states
        return keys[:, :, : self.num_read], values[:, :, : self.num_read]


def copy_source(source: SourceCache) -> SourceCache:
    """Copy a source to tensors with fixed addresses, which compiled code needs."""
    keys, values = ([states.clone() for states in layers] for layers in (source.keys, source.values))
    for states in (*keys, *values):
        torch._dynamo.mark_static_address(states)
    # The null text would keep all keys and values of the original in memory.
    return replace(source, keys=keys, values=values, null_text=None)


def attend_to_sources(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    sources: list[SourceCache],
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from each query to the source of its row and to the keys of its row.

    The signature is that of the attention functions of transformers. `sources` holds the sources of all rows.
    `attention_mask`, `(1, 1, queries, slots)`, is added to the scores of the keys of the row.
    """
    outputs, rows = [], [source.num_rows for source in sources]
    blocks = zip(sources, *(states.split(rows) for states in (query * scaling, key, value)), strict=True)
    for source, queries, keys, values in blocks:
        chunks = zip(*(states.split(QUERIES_PER_CHUNK, dim=2) for states in (queries, attention_mask)), strict=True)
        attended = [
            attend_in_one_softmax(chunk, source, module.layer_idx, keys, values, bias) for chunk, bias in chunks
        ]
        outputs.append(attended[0] if len(attended) == 1 else torch.cat(attended, dim=2))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output.transpose(1, 2), None


def attend_in_one_softmax(
    query: torch.Tensor,
    source: SourceCache,
    layer_idx: int,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Compute one float32 softmax over the source keys and the row's own keys, and the weighted sum of their values.

    All products have the large matrix on the left, because CPUs multiply a matrix with few columns faster that way.
    """
    source_keys, source_values = source.keys[layer_idx], source.values[layer_idx]
    source_scores = source.merge_rows((source_keys @ source.group_rows(query).mT).mT)
    own_scores = (key @ query.mT).mT.float() + bias
    scores = torch.cat([source_scores.float(), own_scores], dim=-1)
    weights = scores.softmax(dim=-1).to(value.dtype)
    source_weights, own_weights = weights.split([source_scores.shape[-1], own_scores.shape[-1]], dim=-1)
    source_output = source.merge_rows((source_values.mT @ source.group_rows(source_weights).mT).mT)
    return source_output + (value.mT @ own_weights.mT).mT


AttentionInterface.register(SHARED_SOURCE_ATTENTION, attend_to_sources)
