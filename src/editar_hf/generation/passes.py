"""The forwards of decoding: the source prefix, the text, and the passes of the loop."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .attention import SharedPrefix
from .cache import DecodingCache, SourceCache
from .compilation import CompiledPasses
from .sampling import GuidanceBranch


# Rows of a source from which on sharing its keys and values pays. On a CPU in bf16 the attention kernel of PyTorch is
# faster than plain matrix products of few rows: a layer of GPT-B took 0.16 ms for 2 rows, and 0.43 with products; from
# 4 rows on they were even (torch 2.13, one thread; `benchmarks/bench_generation.py --pieces`).
MIN_SHARING_ROWS = {("cpu", torch.bfloat16): 4}
# PEFT's names of an adapter's own parameters.
ADAPTER_PARAMETER = re.compile(r"\.(?:lora_\w+|modules_to_save)\.([^.]+)")


class SourceStates(NamedTuple):
    """Keys and values of images before any text: a tensor `(images, heads, N, head_dim)` for each layer."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def select(self, images: slice) -> "SourceStates":
        return SourceStates([keys[images] for keys in self.keys], [values[images] for values in self.values])


def compute_source_states(
    model, source_image_tokens: torch.LongTensor, is_null: torch.BoolTensor, grid: dict[str, int]
) -> SourceStates:
    """Run images through the decoder; those that `is_null` marks are the null image, whatever their tokens."""
    cache = model(source_image_tokens=source_image_tokens, drop_source=is_null, use_cache=True, **grid).cache
    return SourceStates([layer.keys for layer in cache.layers], [layer.values for layer in cache.layers])


def sample_weights(decoder: torch.nn.Module) -> dict[str, list[float]]:
    """Read some 32 numbers of every parameter and the scales of adapters, as far as they act; no forward.

    They are the same on every device and in every process. Weights that are not in memory, as under sequential offload,
    give no numbers.
    """
    samples, acting = {}, set()
    for path, module in decoder.named_modules():
        if hasattr(module, "adapter_layer_names") and not (module.disable_adapters or getattr(module, "merged", False)):
            acting.update(module.active_adapters)
            scales = getattr(module, "scaling", {})
            samples |= {f"{path}: {name}": [scales[name]] for name in module.active_adapters if name in scales}
    for name, parameter in decoder.named_parameters():
        adapter = ADAPTER_PARAMETER.search(name)
        if adapter is None or adapter[1] in acting:
            values = parameter.detach().flatten()[:: max(1, parameter.numel() // 32)]
            name = name.replace(".base_layer", "").replace(".original_module", "")
            samples[name] = [] if parameter.is_meta else values.tolist()
    return samples


def find_sources(source_image_tokens: torch.LongTensor) -> torch.LongTensor:
    """Find the different sources of a batch, where it holds equally many images of each, one after the other."""
    sources, counts = torch.unique_consecutive(source_image_tokens, dim=0, return_counts=True)
    return sources if (counts == counts[0]).all() else source_image_tokens


class PassRunner:
    """Run the passes of the loop for all guidance branches; the first one begins with the source and the text.

    Args:
        model (`EditARForConditionalGeneration`): The decoder.
        source_image_tokens (`torch.LongTensor` of shape `(batch, N)`, *optional*): None decodes from the null image.
        source_cache (`SourceCache`, *optional*): What is known of them.
        prompt_embeds, negative_prompt_embeds (`torch.Tensor`): As of `generate`.
        branches (`list[GuidanceBranch]`): Which conditions each branch goes without.
        grid (`dict[str, int]`): `grid_height` and `grid_width`.
    """

    def __init__(
        self,
        model,
        source_image_tokens: torch.LongTensor | None,
        source_cache: SourceCache | None,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        branches: list[GuidanceBranch],
        grid: dict[str, int],
    ):
        self.model = model
        self.source_image_tokens = source_image_tokens
        self.source_cache = source_cache
        self.prompt_embeds = prompt_embeds
        self.negative_prompt_embeds = negative_prompt_embeds
        self.branches = branches
        self.drops_source = [source_image_tokens is None or branch.drop_source for branch in branches]
        self.grid = grid
        self.num_image_tokens = grid["grid_height"] * grid["grid_width"]
        self.cache: DecodingCache | None = None

    def __call__(self, tokens: torch.LongTensor, start: int | None, positions: Sequence[int]) -> torch.Tensor:
        """Feed what `decode_target_tokens` asks for; return logits `(branches, batch, positions, vocab_size)`."""
        stop, num_branches = positions[-1], len(self.branches)
        compiled = self.model.compiled_passes
        if start is None:
            self.cache = self.build_cache()
            self.cache.start_text_pass(stop)
            inputs = self.prepare_text_rows()
            if stop > 0:
                inputs["target_image_tokens"] = tokens[:, :stop].repeat(num_branches, 1)
            first_slot, first_predicted = self.num_image_tokens, 0
        elif compiled is not None and compiled.select_length(stop - start, self.num_image_tokens):
            return self.run_compiled(compiled, tokens, start, positions)
        else:
            self.cache.start_pass(start, stop - start)
            inputs = {"target_image_tokens": tokens[:, start:stop].repeat(num_branches, 1)}
            first_slot = self.num_image_tokens + self.model.config.num_text_tokens + start
            first_predicted = start + 1
        last_slot = self.num_image_tokens + self.model.config.num_text_tokens + stop
        logits_to_keep = 1
        if len(positions) > 1:
            logits_to_keep = torch.tensor(positions, device=tokens.device) - first_predicted
        logits = self.model(
            **inputs,
            **self.grid,
            past_key_values=self.cache,
            position_ids=torch.arange(first_slot, last_slot, device=tokens.device)[None],
            logits_to_keep=logits_to_keep,
        ).logits
        return logits.float().unflatten(0, (num_branches, -1))

    def run_compiled(
        self, compiled: CompiledPasses, tokens: torch.LongTensor, start: int, positions: Sequence[int]
    ) -> torch.Tensor:
        """Feed the tokens from `start` on in a compiled pass, padded to its length."""
        num_new = positions[-1] - start
        length = compiled.select_length(num_new, self.num_image_tokens)
        self.cache.start_static_pass(start, length)
        first_slot = self.num_image_tokens + self.model.config.num_text_tokens + start
        fed = F.pad(tokens[:, start : positions[-1]], (0, length - num_new)).repeat(len(self.branches), 1)
        torch.compiler.cudagraph_mark_step_begin()
        logits = compiled.run(
            self.cache,
            fed,
            **self.grid,
            position_ids=torch.arange(first_slot, first_slot + length, device=fed.device)[None],
        ).logits
        # A copy: the next pass writes its logits over these.
        logits = logits[:, [position - start - 1 for position in positions]].to(torch.float32, copy=True)
        return logits.unflatten(0, (len(self.branches), -1))

    def close(self):
        """Hand a static cache back."""
        if self.cache is not None and self.model.compiled_passes is not None:
            self.model.compiled_passes.give_back(self.cache)

    def build_cache(self) -> DecodingCache:
        """Make room for what the passes will bring, behind the sources that the rows read."""
        batch_size = len(self.prompt_embeds)
        num_null_rows = batch_size * sum(self.drops_source)
        num_image_rows = batch_size * len(self.branches) - num_null_rows
        image_states, null_states = self.compute_prefixes()
        # Branches without the source come last.
        parts = [(image_states, num_image_rows), (null_states, num_null_rows)]
        prefixes = [
            [
                SharedPrefix(states.keys[layer], states.values[layer], num_rows, batch_size)
                for states, num_rows in parts
                if num_rows
            ]
            for layer in range(self.model.config.num_hidden_layers)
        ]
        num_slots = self.num_image_tokens - 1  # the last target token is never fed
        if self.model.compiled_passes is not None:
            return self.model.compiled_passes.take_cache(self.model.config, prefixes, num_slots)
        is_shared = min(num_rows // len(states.keys[0]) for states, num_rows in parts if num_rows) >= (
            MIN_SHARING_ROWS.get((self.prompt_embeds.device.type, self.model.dtype), 1)
        )
        return DecodingCache(self.model.config, prefixes, num_slots, is_shared)

    def compute_prefixes(self) -> tuple[SourceStates, SourceStates]:
        """Run every different source, and at most one null image, once, in one forward; return both.

        Sharing is exact: attention is causal and the text comes after the source.
        """
        device = self.prompt_embeds.device
        sources = torch.empty(0, self.num_image_tokens, dtype=torch.long, device=device)
        if self.source_image_tokens is not None and self.source_cache is None:
            sources = find_sources(self.source_image_tokens)
        nulls = torch.zeros(int(any(self.drops_source)), self.num_image_tokens, dtype=torch.long, device=device)
        tokens = torch.cat([sources, nulls])
        if not len(tokens):
            return self.source_cache, None
        is_null = torch.arange(len(tokens), device=device) >= len(sources)
        states = compute_source_states(self.model, tokens, is_null, self.grid)
        null_states = states.select(slice(len(sources), None))
        return self.source_cache or states.select(slice(len(sources))), null_states

    def prepare_text_rows(self) -> dict[str, torch.Tensor]:
        """Give each branch its text: one without the prompt reads the negative prompt, or else the null text."""
        drops_prompt = torch.tensor([branch.drop_prompt for branch in self.branches], device=self.prompt_embeds.device)
        drops_prompt = drops_prompt.repeat_interleave(len(self.prompt_embeds))
        rows = self.prompt_embeds.repeat(len(self.branches), 1, 1)
        if self.negative_prompt_embeds is not None:
            negative_rows = self.negative_prompt_embeds.repeat(len(self.branches), 1, 1)
            rows = torch.where(drops_prompt[:, None, None], negative_rows, rows)
            drops_prompt = torch.zeros_like(drops_prompt)
        return {"prompt_embeds": rows, "drop_prompt": drops_prompt}
