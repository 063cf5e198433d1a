"""The decoding loop for exact, masked and speculative decoding, its decoder passes, and their compilation.

A pass feeds the last accepted token and the proposed tokens after it. Proposed tokens are of two kinds: tokens outside
the edit mask, which are known (forced), and drafts of speculative decoding. A draft is right if it equals the token
that the logits before it choose. The first wrong draft is replaced by the chosen token, and the next pass starts there.
Forced tokens are always right. The sampling noise of each position is fixed, so the result is the same as with one
token per pass.

All rows of a batch advance by the same number of tokens: the smallest number that any row accepts. The tokens that a
row chose after these become the drafts of the next pass.

Sources: predictive sampling (arXiv 2002.09928) for drafts under fixed noise; speculative Jacobi decoding
(arXiv 2410.01699) for a model's own predictions as the next drafts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..configuration_editar import EditARConfig
from .cache import DecodingCache, SourceCache, compute_source_cache
from .sampling import GuidanceBranch, TokenSelector, as_index


# Largest number of drafts in a speculative pass. On a GPU, a pass is limited by memory bandwidth, so drafts are almost
# free. On a CPU, every draft costs arithmetic: a pass of GPT-B with 8 drafts takes about 1.9 times as long as a pass
# without drafts in fp32, and 2.3 times in bf16 (`benchmarks/results/generation-pieces.md`).
NUM_DRAFT_TOKENS_CPU, NUM_DRAFT_TOKENS = 8, 16
# Lengths of compiled passes: one token, or one token with drafts or forced tokens.
COMPILED_LENGTHS = (1, 1 + NUM_DRAFT_TOKENS)


def decode_target_tokens(
    run_pass: Callable[[torch.Tensor, int | None, Sequence[int]], torch.Tensor],
    select_tokens: TokenSelector,
    tokens: torch.Tensor,
    free_positions: Sequence[int],
    num_draft_tokens: int,
) -> Iterator[torch.Tensor]:
    """Decode the free positions of `tokens`, `(batch, N)`, in place. Yield the first T tokens, for T = 1 … N.

    Args:
        run_pass (`Callable`): `run_pass(tokens, start, positions)` feeds the target tokens from `start` to the last
            position, which is not included. If `start` is None, it feeds the text and then all tokens before that
            position. It returns the logits of the tokens at `positions`, `(branches, batch, positions, vocab_size)` in
            float32.
        select_tokens (`TokenSelector`): Chooses tokens from logits.
        tokens (`torch.LongTensor`): The forced tokens, and the first drafts at the free positions.
        free_positions (sequence of `int`): Positions to decode, in ascending order.
        num_draft_tokens (`int`): Largest number of drafts in a pass; 0 in exact decoding.
    """
    start, num_decided, num_known, num_tokens = None, 0, 0, tokens.shape[1]
    while True:
        # All tokens before the next free position are now known.
        next_free = free_positions[num_decided] if num_decided < len(free_positions) else num_tokens
        yield from (tokens[:, :count] for count in range(num_known + 1, next_free + 1))
        num_known = next_free
        if num_known == num_tokens:
            return
        # Forced tokens after the last free token are never fed, because no logits after it are needed.
        window = free_positions[num_decided : num_decided + 1 + num_draft_tokens]
        chosen = select_tokens(run_pass(tokens, start, window), tokens, window)
        num_accepted = count_accepted(chosen, tokens, window)
        tokens[:, as_index(window[: chosen.shape[1]])] = chosen
        start = window[num_accepted - 1]
        num_decided += num_accepted


def count_accepted(chosen: torch.Tensor, tokens: torch.Tensor, window: Sequence[int]) -> int:
    """Count the tokens that every row accepts: the first drafts that are right in every row, and one chosen token."""
    num_drafts = chosen.shape[1] - 1
    if num_drafts == 0:  # So exact decoding never waits for the device.
        return 1
    is_right = chosen[:, :num_drafts] == tokens[:, as_index(window[:num_drafts])]
    return int(is_right.cumprod(dim=1).sum(dim=1).min()) + 1


@dataclass
class PassRunner:
    """Run the passes of the decoding loop for all guidance branches. The first pass also feeds the source and the text.

    `source` holds the tokens of the source images, or their cache, or None for the null image.
    """

    model: PreTrainedModel
    source: torch.Tensor | SourceCache | None
    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None
    branches: list[GuidanceBranch]
    grid: dict[str, int]

    def __post_init__(self) -> None:
        self.compiled: CompiledDecoding | None = self.model.compiled_decoding
        self.num_image_tokens = self.grid["grid_height"] * self.grid["grid_width"]
        self.cache: DecodingCache | None = None
        self.num_passes = 0

    def __call__(self, tokens: torch.Tensor, start: int | None, positions: Sequence[int]) -> torch.Tensor:
        """Run one pass, see `decode_target_tokens`; return logits `(branches, batch, positions, vocab_size)`."""
        stop, num_text_tokens = positions[-1], self.model.config.num_text_tokens
        first_slot, first_predicted = (0, 0) if start is None else (num_text_tokens + start, start + 1)
        num_new = num_text_tokens + stop - first_slot
        fed = tokens[:, start:stop].repeat(len(self.branches), 1)
        kept = [position - first_predicted for position in positions]
        self.num_passes += 1
        if self.cache is None:
            self.cache = self.build_cache()
        lengths = [length for length in COMPILED_LENGTHS if num_new <= length < self.num_image_tokens]
        compiled = self.compiled if start is not None and lengths else None
        length = num_new if compiled is None else lengths[0]
        inputs = self.cache.start_pass(first_slot, length) | self.grid
        if compiled is not None:
            logits = compiled.run(target_image_tokens=F.pad(fed, (0, length - num_new)), **inputs)
            # A copy is needed, because the next pass overwrites these logits.
            logits = logits[:, as_index(kept)].to(torch.float32, copy=True)
        else:
            inputs |= self.prepare_text_rows() if start is None else {}
            inputs |= {"target_image_tokens": fed} if stop > 0 else {}
            inputs["logits_to_keep"] = 1 if len(kept) == 1 else torch.tensor(kept, device=tokens.device)
            logits = self.model(**inputs).logits.float()
        return logits.unflatten(0, (len(self.branches), -1))

    def close(self) -> None:
        """Keep a static cache for the next call with the same shapes."""
        if self.cache is not None and self.compiled is not None:
            self.compiled.caches[describe_sources(self.cache.sources)] = self.cache

    def build_cache(self) -> DecodingCache:
        """Compute the keys and values of the sources, and allocate a cache for the text and the target tokens.

        Each different source runs through the decoder once, and so does the null image if a branch needs it. All rows
        can share the result, because attention is causal and the text comes after the source.
        """
        num_images, sources = len(self.prompt_embeds), []
        # Branches without the source come last.
        num_null_rows = num_images * sum(branch.drop_source for branch in self.branches)
        num_source_rows = num_images * len(self.branches) - num_null_rows
        if self.source is not None:
            cache = self.source
            if not isinstance(cache, SourceCache):
                cache = compute_source_cache(self.model, find_sources(cache), self.grid)
            sources.append(replace(cache, num_rows=num_source_rows, num_images=num_images))
        if num_null_rows:
            tokens = torch.zeros(1, self.num_image_tokens, dtype=torch.long, device=self.prompt_embeds.device)
            null = compute_source_cache(self.model, tokens, self.grid, drop_source=torch.ones_like(tokens[:, 0]).bool())
            sources.append(replace(null, num_rows=num_null_rows, num_images=num_images))
        arguments = self.model.config, sources, self.num_image_tokens - 1  # The last token is never fed.
        return DecodingCache(*arguments) if self.compiled is None else self.compiled.take_cache(*arguments)

    def prepare_text_rows(self) -> dict[str, torch.Tensor]:
        """Prepare the text of each branch. Branches without the prompt get the negative prompt or the null text."""
        drops = [branch.drop_prompt for branch in self.branches]
        if self.negative_prompt_embeds is not None:
            texts = [self.negative_prompt_embeds if drop else self.prompt_embeds for drop in drops]
            return {"prompt_embeds": torch.cat(texts)}
        rows = self.prompt_embeds.repeat(len(drops), 1, 1)
        drop_prompt = torch.tensor(drops, device=rows.device).repeat_interleave(len(self.prompt_embeds))
        return {"prompt_embeds": rows, "drop_prompt": drop_prompt}


def find_sources(source_image_tokens: torch.Tensor) -> torch.Tensor:
    """Find the different sources of a batch. They are found only if each is repeated equally often in a row."""
    sources, counts = torch.unique_consecutive(source_image_tokens, dim=0, return_counts=True)
    return sources if (counts == counts[0]).all() else source_image_tokens


class CompiledDecoding:
    """Hold the compiled passes of a decoder and their static caches, one for each shape.

    Two kinds of passes are rare and therefore not compiled: the first pass, with the text, and passes with many forced
    tokens. Every other pass is padded to one of `COMPILED_LENGTHS`. The next pass overwrites the slots of the padding.

    A call takes the cache of its shape and returns it at its end. If a second thread decodes the same shape at the
    same time, it gets a new cache; the cache that is returned last is kept. A copy of a decoder has no compiled
    passes, because they use the weights of the original.
    """

    def __init__(self, forward: Callable, **options: Any) -> None:
        self.forward = forward
        self.options = options
        self.compiled: dict[tuple, Callable] = {}
        self.caches: dict[tuple, DecodingCache] = {}

    def __reduce__(self) -> tuple:
        """Copy and pickle this object as None."""
        return type(None), ()

    def run(self, **inputs: Any) -> torch.Tensor:
        """Run `forward`, compiled for the shapes of these inputs, and return its logits."""
        key = describe_sources(inputs["sources"]), inputs["target_image_tokens"].shape
        key += inputs["grid_height"], inputs["grid_width"]
        if key not in self.compiled:
            self.compiled[key] = compile_apart(self.forward, **self.options)
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled[key](**inputs).logits

    def take_cache(self, config: EditARConfig, sources: list[SourceCache], num_target_slots: int) -> DecodingCache:
        """Take the cache of this shape and copy the sources into it. If there is none, make a new cache."""
        cache = self.caches.pop(describe_sources(sources), None)
        if cache is None:
            return DecodingCache(config, sources, num_target_slots + COMPILED_LENGTHS[-1], is_static=True)
        cache.reuse(sources)
        return cache


def compile_apart(forward: Callable, **options: Any) -> Callable:
    """Compile a function separately from its other compilations.

    torch allows eight compilations of one code object, so each compilation gets a new code object.
    `torch.compile(isolate_recompiles=True)` does the same in torch 2.13, but 2.11 is still supported.
    """

    def run(**inputs: Any) -> Any:
        return forward(**inputs)

    apart = FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    return torch.compile(apart, fullgraph=True, dynamic=False, **options)


def describe_sources(sources: list[SourceCache]) -> tuple:
    """Return a key for the shapes of a cache, which has as many target tokens as source tokens."""
    parts = [(source.keys[0], source.num_rows, source.num_images) for source in sources]
    return tuple((keys.shape, keys.dtype, keys.device, *numbers) for keys, *numbers in parts)
