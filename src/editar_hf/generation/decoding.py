"""Decoding: one loop for exact, masked and speculative decoding, the passes that it runs, and their compilation.

A pass feeds the last accepted token and the tokens proposed after it: tokens outside the edit mask, which are known
(forced), and drafts in speculative decoding. The logits of the pass show which drafts are right: those that equal the
token that the logits before them choose. The first wrong draft is replaced by that token, and the next pass starts
there. Noise is fixed for each position, so the result is that of one token at a time. Forced tokens are always right.

Rows of a batch advance together, by the smallest number of tokens that any row accepts. What a row chose beyond that
stays proposed. So does what it chose after a wrong draft: it is the next draft there.

Sources: drafts under fixed noise, predictive sampling (arXiv 2002.09928); own predictions as next drafts, speculative
Jacobi decoding (arXiv 2410.01699).
"""

from collections.abc import Callable, Sequence
from types import FunctionType

import torch
import torch.nn.functional as F
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ..configuration_editar import EditARConfig
from .cache import DecodingCache, SharedSource, SourceCache, compute_source_cache
from .sampling import GuidanceBranch, TokenSelector, as_index


# Lengths of compiled passes: one token, and one token with the drafts of a speculative pass or a short forced run.
COMPILED_LENGTHS = (1, 17)


# The loop


def propose_tokens(
    source_image_tokens: torch.LongTensor | None,
    edit_mask: torch.BoolTensor | None,
    shape: tuple[int, int],
    device: torch.device,
) -> tuple[torch.LongTensor, list[int]]:
    """Propose target tokens before any is decoded: those of the source.

    Returns:
        The tokens `(batch, N)`, forced outside the edit mask and first drafts inside it; and the free positions: those
        at which the mask of any row allows a change, ascending.
    """
    tokens = source_image_tokens
    if tokens is None:
        tokens = torch.zeros(shape, dtype=torch.long, device=device)
    if edit_mask is None:
        return tokens, list(range(shape[1]))
    return tokens, edit_mask.any(dim=0).nonzero()[:, 0].tolist()


class Reporter:
    """Report accepted tokens one after the other, however many a pass brings.

    Args:
        streamer (`BaseStreamer`, *optional*): Gets each token.
        stopping_criteria (`list[StoppingCriteria]`): Called after each token.
    """

    def __init__(self, streamer: BaseStreamer | None, stopping_criteria: list[StoppingCriteria]):
        self.streamer = streamer
        self.stopping_criteria = stopping_criteria
        self.num_reported = 0

    def report(self, tokens: torch.LongTensor, num_accepted: int) -> bool:
        """Report the tokens accepted since the last call; return True if a criterion ends decoding."""
        while self.num_reported < num_accepted:
            self.num_reported += 1
            known = tokens[:, : self.num_reported]
            if self.streamer is not None:
                self.streamer.put(known[:, -1:].cpu())
            if self.ask_to_stop(known):
                return True
        return False

    def ask_to_stop(self, tokens: torch.LongTensor) -> bool:
        """Call all criteria; return True if each row is stopped by one of them.

        `StoppingCriteriaList` is not used: it waits for the device after every token, even where no criterion does.
        """
        answers = [torch.as_tensor(criterion(tokens, None)).cpu() for criterion in self.stopping_criteria]
        return bool(answers) and bool(torch.stack([answer.expand(len(tokens)) for answer in answers]).any(0).all())


def decode_target_tokens(
    run_pass: Callable[[torch.LongTensor, int | None, Sequence[int]], torch.Tensor],
    select_tokens: TokenSelector,
    reporter: Reporter,
    tokens: torch.LongTensor,
    free_positions: list[int],
    num_draft_tokens: int,
) -> tuple[torch.LongTensor, int]:
    """Decode the free positions.

    Args:
        run_pass (`Callable`): `run_pass(tokens, start, positions)` feeds the target tokens from `start` up to the last
            of the positions; if `start` is None it feeds the text and all tokens before that position. It returns the
            logits that choose the tokens at the positions, `(branches, batch, positions, vocab_size)` in float32.
        select_tokens (`TokenSelector`): Chooses tokens from logits.
        reporter (`Reporter`): Gets each accepted token, and may end decoding.
        tokens (`torch.LongTensor` of shape `(batch, N)`): The proposed tokens.
        free_positions (`list[int]`): Positions to decode, ascending.
        num_draft_tokens (`int`): The most drafts of a pass; 0 in exact decoding.

    Returns:
        The target tokens `(batch, N)`, fewer if the reporter ended decoding, and the number of passes.
    """
    tokens, num_tokens = tokens.clone(), tokens.shape[1]
    start, num_decided, num_passes = None, 0, 0
    while num_decided < len(free_positions):
        # Nothing after the last free token is fed: the logits that choose it are the last ones needed.
        window = free_positions[num_decided : num_decided + 1 + num_draft_tokens]
        chosen = select_tokens(run_pass(tokens, start, window), tokens, window)
        num_passes += 1
        num_accepted = count_accepted(chosen, tokens, window)
        tokens[:, as_index(window[: chosen.shape[1]])] = chosen
        start = window[num_accepted - 1]
        num_decided += num_accepted
        # Forced tokens are accepted with the free token before them.
        num_known = free_positions[num_decided] if num_decided < len(free_positions) else num_tokens
        if reporter.report(tokens, num_known):
            break
    else:
        reporter.report(tokens, num_tokens)
    return tokens[:, : reporter.num_reported], num_passes


def count_accepted(chosen: torch.LongTensor, tokens: torch.LongTensor, window: Sequence[int]) -> int:
    """Count the choices that every row accepts: one more than the drafts that are right in every row."""
    num_drafts = chosen.shape[1] - 1
    if num_drafts == 0:  # exact decoding never waits for the device
        return 1
    is_right = chosen[:, :num_drafts] == tokens[:, as_index(window[:num_drafts])]
    return is_right.cumprod(dim=1).sum(dim=1).min().item() + 1


# The passes


class PassRunner:
    """Run the passes of the loop for all guidance branches; the first pass starts with the source and the text.

    Args:
        model (`EditARForConditionalGeneration`): The decoder.
        source_image_tokens (`torch.LongTensor` of shape `(batch, N)`, *optional*): None decodes from the null image.
        source_cache (`SourceCache`, *optional*): Keys and values of the sources.
        prompt_embeds, negative_prompt_embeds (`torch.Tensor`): As in `generate`.
        branches (`list[GuidanceBranch]`): Which conditions each branch drops.
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
        self.compiled: CompiledDecoding | None = model.compiled_decoding
        self.source_image_tokens = source_image_tokens
        self.source_cache = source_cache
        self.prompt_embeds = prompt_embeds
        self.negative_prompt_embeds = negative_prompt_embeds
        self.branches = branches
        self.grid = grid
        self.num_image_tokens = grid["grid_height"] * grid["grid_width"]
        self.cache: DecodingCache | None = None

    def __call__(self, tokens: torch.LongTensor, start: int | None, positions: Sequence[int]) -> torch.Tensor:
        """Feed what `decode_target_tokens` asks for; return logits `(branches, batch, positions, vocab_size)`."""
        is_first, stop, num_text_tokens = start is None, positions[-1], self.model.config.num_text_tokens
        first_slot, first_predicted = (0, 0) if is_first else (num_text_tokens + start, start + 1)
        num_new = num_text_tokens + stop - first_slot
        fed = tokens[:, start:stop].repeat(len(self.branches), 1)
        kept = [position - first_predicted for position in positions]
        if is_first:
            self.cache = self.build_cache()
        if not is_first and self.compiled and (length := self.compiled.select_length(num_new, self.num_image_tokens)):
            inputs = self.cache.start_pass(first_slot, length) | self.grid
            logits = self.compiled.run(target_image_tokens=F.pad(fed, (0, length - num_new)), **inputs)
            # A copy: the next pass writes its logits over these.
            logits = logits[:, as_index(kept)].to(torch.float32, copy=True)
        else:
            inputs = self.cache.start_pass(first_slot, num_new) | self.grid
            inputs |= self.prepare_text_rows() if is_first else {}
            inputs |= {"target_image_tokens": fed} if stop > 0 else {}
            inputs["logits_to_keep"] = 1 if len(kept) == 1 else torch.tensor(kept, device=tokens.device)
            logits = self.model(**inputs).logits.float()
        return logits.unflatten(0, (len(self.branches), -1))

    def close(self):
        """Give a static cache back."""
        if self.cache is not None and self.compiled is not None:
            self.compiled.give_back(self.cache)

    def build_cache(self) -> DecodingCache:
        """Prepare the sources and the room for what the passes bring."""
        arguments = self.model.config, self.prepare_sources(), self.num_image_tokens - 1  # the last token is never fed
        return DecodingCache(*arguments) if self.compiled is None else self.compiled.take_cache(*arguments)

    def prepare_sources(self) -> list[SharedSource]:
        """Run every different source, and at most one null image, in one forward.

        Sharing is exact: attention is causal and the text comes after the source.
        """
        num_images, device = len(self.prompt_embeds), self.prompt_embeds.device
        # Branches without the source come last.
        num_null_branches = sum(branch.drop_source for branch in self.branches)
        if self.source_image_tokens is None:
            num_null_branches = len(self.branches)
        num_image_branches = len(self.branches) - num_null_branches
        tokens = torch.empty(0, self.num_image_tokens, dtype=torch.long, device=device)
        if num_image_branches and self.source_cache is None:
            tokens = find_sources(self.source_image_tokens)
        num_sources, num_null_images = len(tokens), min(num_null_branches, 1)
        computed = self.source_cache
        if num_sources + num_null_images:
            tokens = F.pad(tokens, (0, 0, 0, num_null_images))
            drop_source = torch.arange(len(tokens), device=device) >= num_sources
            computed = compute_source_cache(self.model, tokens, drop_source, self.grid)
        images = self.source_cache or computed.select(slice(num_sources))
        nulls = computed.select(slice(num_sources, None))
        parts = (images, num_image_branches), (nulls, num_null_branches)
        return [SharedSource(cache, branches * num_images, num_images) for cache, branches in parts if branches]

    def prepare_text_rows(self) -> dict[str, torch.Tensor]:
        """Give each branch its text: one without the prompt gets the negative prompt, or else the null text."""
        drop_prompt = torch.tensor([branch.drop_prompt for branch in self.branches], device=self.prompt_embeds.device)
        drop_prompt = drop_prompt.repeat_interleave(len(self.prompt_embeds))
        rows = self.prompt_embeds.repeat(len(self.branches), 1, 1)
        if self.negative_prompt_embeds is not None:
            negative_rows = self.negative_prompt_embeds.repeat(len(self.branches), 1, 1)
            rows = torch.where(drop_prompt[:, None, None], negative_rows, rows)
            drop_prompt = torch.zeros_like(drop_prompt)
        return {"prompt_embeds": rows, "drop_prompt": drop_prompt}


def find_sources(source_image_tokens: torch.LongTensor) -> torch.LongTensor:
    """Find the different sources of a batch, if it holds equally many images of each, one after the other."""
    sources, counts = torch.unique_consecutive(source_image_tokens, dim=0, return_counts=True)
    return sources if (counts == counts[0]).all() else source_image_tokens


# Compilation


class CompiledDecoding:
    """Hold the compiled passes of a decoder and their static caches, one for each shape.

    The first pass, with the text, is not compiled, and neither is a long run of forced tokens: both are rare. Every
    other pass is padded to one of `COMPILED_LENGTHS`. What is fed beyond the tokens asked for lands in slots that the
    next pass writes over.

    A call takes the cache of its shape out and puts it back at its end. A second thread that decodes the same shape
    meanwhile gets a cache of its own; the last one put back stays. A copy of a decoder has no compiled passes, because
    they belong to the weights of the first.

    Args:
        forward (`Callable`): The forward of the decoder.
        options: Options of `torch.compile`.
    """

    def __init__(self, forward: Callable, **options):
        self.forward = forward
        self.options = options
        self.compiled: dict[tuple, Callable] = {}
        self.caches: dict[tuple, DecodingCache] = {}

    def __reduce__(self):
        """Copy and pickle as None."""
        return type(None), ()

    def run(self, **inputs) -> torch.Tensor:
        """Run the forward, compiled for the shapes of these inputs; return its logits."""
        key = describe_sources(inputs["sources"]), inputs["target_image_tokens"].shape
        key += inputs["grid_height"], inputs["grid_width"]
        if key not in self.compiled:
            self.compiled[key] = compile_apart(self.forward, **self.options)
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled[key](**inputs).logits

    def select_length(self, num_new: int, num_image_tokens: int) -> int | None:
        """Select the compiled length of a pass of `num_new` tokens; None if it is longer than all."""
        return next((length for length in COMPILED_LENGTHS if num_new <= length < num_image_tokens), None)

    def take_cache(self, config: EditARConfig, sources: list[SharedSource], num_target_slots: int) -> DecodingCache:
        """Take the cache of this shape, or make one, and copy the sources into it."""
        cache = self.caches.pop(describe_sources(sources), None)
        if cache is None:
            return DecodingCache(config, sources, num_target_slots + COMPILED_LENGTHS[-1], is_static=True)
        cache.reuse(sources)
        return cache

    def give_back(self, cache: DecodingCache):
        """Keep a cache for the next call of its shape."""
        self.caches[describe_sources(cache.sources)] = cache

    def free_caches(self):
        """Free all caches that no call uses."""
        self.caches.clear()


def compile_apart(forward: Callable, **options) -> Callable:
    """Compile a function apart from its other compilations.

    torch counts compilations by code object and refuses the ninth, so each one gets a code object of its own.
    `torch.compile(isolate_recompiles=True)` does the same in torch 2.13, but 2.11 is still supported.
    """

    def run(**inputs):
        return forward(**inputs)

    apart = FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    return torch.compile(apart, fullgraph=True, dynamic=False, **options)


def describe_sources(sources: list[SharedSource]) -> tuple:
    """Describe what the shapes of a cache depend on; a cache has as many target tokens as source tokens."""
    described = []
    for source in sources:
        keys = source.cache.keys[0]
        described.append((keys.shape, keys.dtype, keys.device, source.num_rows, source.num_images))
    return tuple(described)
