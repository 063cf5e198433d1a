"""The decoding loop for exact, masked and speculative decoding, its decoder passes, and their compilation.

The first passes feed the source images and the texts, and give the logits of the first target token. Every later pass
feeds the last accepted token and the proposed tokens after it. Proposed tokens are of two kinds: tokens outside the
edit mask, which are known (forced), and drafts of speculative decoding. A draft is right if it equals the token that
the logits before it choose. The first wrong draft is replaced by the chosen token, and the next pass starts there.
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
from .cache import DecodingCache, SourceCache, compute_source_cache, compute_text_cache, describe_adapters
from .sampling import GuidanceBranch, TokenSelector, as_index


# Largest number of drafts in a speculative pass. On a GPU, a pass is limited by memory bandwidth, so drafts are almost
# free. On a CPU, every draft costs arithmetic: a pass of GPT-B with 8 drafts takes about 1.9 times as long as a pass
# without drafts in fp32, and 2.3 times in bf16 (`benchmarks/results/generation-pieces.md`).
NUM_DRAFT_TOKENS_CPU, NUM_DRAFT_TOKENS = 8, 16
# Lengths of compiled passes: one token, or one token with drafts or forced tokens.
COMPILED_LENGTHS = (1, 1 + NUM_DRAFT_TOKENS)


def decode_target_tokens(
    decoder: "TokenDecoder", free_positions: Sequence[int], num_draft_tokens: int
) -> Iterator[torch.Tensor]:
    """Decode the free positions of `decoder.tokens`, `(batch, N)`. Yield the first T tokens, for T = 1 … N.

    Args:
        decoder (`TokenDecoder`): Chooses tokens. Its `tokens` hold the forced tokens, and first drafts at the free
            positions.
        free_positions (sequence of `int`): Positions to decode, in ascending order.
        num_draft_tokens (`int`): Largest number of drafts in a pass; 0 in exact decoding.
    """
    start, num_decided, num_known, num_tokens = 0, 0, 0, decoder.tokens.shape[1]
    while True:
        # All tokens before the next free position are now known.
        next_free = free_positions[num_decided] if num_decided < len(free_positions) else num_tokens
        yield from (decoder.tokens[:, :count] for count in range(num_known + 1, next_free + 1))
        num_known = next_free
        if num_known == num_tokens:
            return
        # Forced tokens after the last free token are never fed, because no logits after it are needed.
        window = free_positions[num_decided : num_decided + 1 + num_draft_tokens]
        if window[0] == 0:  # The text chooses the first token, without a pass.
            window = window[:1]
        chosen = decoder.choose(start, window)
        num_accepted = count_accepted(chosen, decoder.tokens, window)
        decoder.tokens[:, as_index(window[: chosen.shape[1]])] = chosen
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
class TokenDecoder:
    """Choose target tokens: run the passes of all guidance branches, and select tokens by their logits.

    `source` holds the tokens of the source images, or their cache, or None for the null image. `tokens`, `(batch, N)`,
    holds the accepted tokens and the proposed tokens after them.
    """

    model: PreTrainedModel
    source: torch.Tensor | SourceCache | None
    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None
    branches: list[GuidanceBranch]
    grid: dict[str, int]
    tokens: torch.Tensor
    select_tokens: TokenSelector

    def __post_init__(self) -> None:
        self.compiled: CompiledDecoding | None = self.model.compiled_decoding
        self.cache: DecodingCache | None = None
        self.first_logits: torch.Tensor | None = None
        self.step: CompiledStep | None = None
        self.num_passes = 0

    def choose(self, start: int, window: Sequence[int]) -> torch.Tensor:
        """Choose the tokens at the positions of `window`, after a pass over the target tokens from `start` on.

        Returns:
            `torch.LongTensor` of shape `(batch, positions)`. With logits processors, the choices may end early.
        """
        if self.first_logits is None:
            self.cache, self.first_logits = self.prefill()
        num_new = window[-1] - start
        if num_new == 0:
            return self.select_tokens(self.first_logits[:, :, None], self.tokens, window)
        self.num_passes += 1
        if self.compiled is not None and num_new == len(window) == 1 and not self.select_tokens.logits_processor:
            if self.step is None:
                self.step = self.compiled.take_step(self)
            return self.step(start)
        return self.select_tokens(self.run_pass(start, window), self.tokens, window)

    def run_pass(self, start: int, window: Sequence[int]) -> torch.Tensor:
        """Feed the tokens from `start` to the last position of the window, which is not included.

        Returns:
            `torch.Tensor` of shape `(branches, batch, positions, vocab_size)`: The float32 logits of the tokens at the
            positions of the window.
        """
        assert self.cache is not None
        fed = self.tokens[:, start : window[-1]].repeat(len(self.branches), 1)
        num_new, first_slot = fed.shape[1], self.cache.num_text_slots + start
        kept = [position - start - 1 for position in window]
        # `forward` leaves out the last token of the grid.
        lengths = [length for length in COMPILED_LENGTHS if num_new <= length < self.tokens.shape[1]]
        if self.compiled is not None and lengths:
            inputs = self.cache.start_pass(first_slot, lengths[0]) | self.grid
            logits = self.compiled.run(target_image_tokens=F.pad(fed, (0, lengths[0] - num_new)), **inputs)
            # A copy is needed, because the next pass overwrites these logits.
            logits = logits[:, as_index(kept)].to(torch.float32, copy=True)
        else:
            inputs = self.cache.start_pass(first_slot, num_new) | self.grid
            to_keep = 1 if len(kept) == 1 else torch.tensor(kept, device=fed.device)
            logits = self.model(target_image_tokens=fed, logits_to_keep=to_keep, **inputs).logits.float()
        return logits.unflatten(0, (len(self.branches), -1))

    def prefill(self) -> tuple[DecodingCache, torch.Tensor]:
        """Compute the keys and values of the sources and the texts, and the logits of the first target token.

        Each different source runs through the decoder once, and so does the null image if a branch needs it. All rows
        can share the result, because attention is causal and the text comes after the source. The null text is part of
        these passes. Another pass runs the prompts and, if there are any, the negative prompts.

        Returns:
            `tuple`: A cache for the target tokens, and the logits, `(branches, batch, vocab_size)`.
        """
        num_images, num_image_tokens = self.tokens.shape
        prompts = [self.prompt_embeds]
        if self.negative_prompt_embeds is not None:
            prompts += [self.negative_prompt_embeds] * (len(self.branches) - 1)
        run_branches, null_branches = self.branches[: len(prompts)], self.branches[len(prompts) :]
        needs_null_text = len(null_branches) > 0
        sources: dict[bool, SourceCache] = {}  # by `drop_source` of the branches that read them
        if isinstance(self.source, SourceCache):
            sources[False] = self.source
        elif self.source is not None:
            different = find_sources(self.source)
            sources[False] = compute_source_cache(self.model, different, self.grid, with_null_text=needs_null_text)
        if self.branches[-1].drop_source:
            null = torch.zeros_like(self.tokens[:1])
            sources[True] = compute_source_cache(self.model, null, self.grid, True, needs_null_text)

        def assign_rows(branches: list[GuidanceBranch]) -> list[SourceCache]:
            """List the sources that some branches read, with the numbers of their rows."""
            counts = {drop: num_images * sum(branch.drop_source == drop for branch in branches) for drop in sources}
            return [replace(sources[drop], num_rows=n, num_images=num_images) for drop, n in counts.items() if n]

        texts = [compute_text_cache(self.model, assign_rows(run_branches), torch.cat(prompts), self.grid)]
        for branch in null_branches:
            null_text = sources[branch.drop_source].null_text
            assert null_text is not None
            texts.append(null_text.expand(num_images))
        config = self.model.config
        # With the published rotary, all keys of a text are zero vectors, so one slot can stand for all text tokens.
        num_text_slots = 1 if config.text_rotary == "zero" else config.num_text_tokens
        arguments = config, assign_rows(self.branches), num_text_slots, num_image_tokens - 1  # The last is never fed.
        cache = DecodingCache(*arguments) if self.compiled is None else self.compiled.take_cache(*arguments)
        cache.write_rotations(self.model.model.rotary_emb, self.grid)
        cache.write_texts(texts)
        logits = torch.cat([text.logits for text in texts])
        return cache, logits.unflatten(0, (len(self.branches), -1))

    def close(self) -> None:
        """Keep what is compiled for this shape for the next call."""
        if self.cache is not None and self.compiled is not None:
            self.compiled.keep(self.cache, self.step)


def find_sources(source_image_tokens: torch.Tensor) -> torch.Tensor:
    """Find the different sources of a batch. They are found only if each is repeated equally often in a row."""
    sources, counts = torch.unique_consecutive(source_image_tokens, dim=0, return_counts=True)
    return sources if (counts == counts[0]).all() else source_image_tokens


class CompiledDecoding:
    """Hold what is compiled for a decoder, and its static caches, one for each shape.

    A step decodes one token, see `CompiledStep`. Speculative decoding, logits processors and short runs of forced
    tokens use compiled passes, which are padded to one of `COMPILED_LENGTHS`. The next pass overwrites the slots of the
    padding. The first passes, and passes with many forced tokens, are rare and therefore not compiled.

    A call takes the cache of its shape and returns it at its end. If a second thread decodes the same shape at the
    same time, it gets a new cache; the cache that is returned last is kept. A copy of a decoder has nothing compiled,
    because compiled code uses the weights of the original.

    Args:
        forward (`Callable`): The forward of the decoder.
        options: Options of `torch.compile`.
    """

    def __init__(self, forward: Callable, **options: Any) -> None:
        self.forward = forward
        self.options = options
        self.compiled: dict[tuple, Callable] = {}
        self.caches: dict[tuple, DecodingCache] = {}
        self.steps: dict[tuple, CompiledStep] = {}
        # These modes of torch.compile make CUDA graphs of their own.
        self.captures_steps = options.get("mode") not in ("reduce-overhead", "max-autotune")

    def __reduce__(self) -> tuple:
        """Copy and pickle this object as None."""
        return type(None), ()

    def call(self, function: Callable, key: tuple, **inputs: Any) -> Any:
        """Call a function, compiled for this key. The key describes all inputs that compiled code depends on."""
        if (function, key) not in self.compiled:
            self.compiled[function, key] = compile_apart(function, **self.options)
        return self.compiled[function, key](**inputs)

    def run(self, **inputs: Any) -> torch.Tensor:
        """Run the decoder, compiled for the shapes of these inputs, and return its logits."""
        torch.compiler.cudagraph_mark_step_begin()
        key = describe_sources(inputs["sources"]), inputs["target_image_tokens"].shape
        return self.call(self.forward, (*key, inputs["grid_height"], inputs["grid_width"]), **inputs).logits

    def take_cache(
        self, config: EditARConfig, sources: list[SourceCache], num_text_slots: int, num_target_slots: int
    ) -> DecodingCache:
        """Take the cache of this shape and copy the sources into it. If there is none, make a new cache."""
        cache = self.caches.pop(describe_sources(sources), None)
        if cache is None:
            num_target_slots += COMPILED_LENGTHS[-1]
            return DecodingCache(config, sources, num_text_slots, num_target_slots, is_static=True)
        cache.reuse(sources)
        return cache

    def take_step(self, decoder: TokenDecoder) -> "CompiledStep":
        """Take the step of this shape and prepare it for this call. If there is none, make a new step."""
        assert decoder.cache is not None
        step = self.steps.pop(describe_sources(decoder.cache.sources), None)
        if step is None or not step.reuse(decoder):
            return CompiledStep(self, decoder)
        return step

    def keep(self, cache: DecodingCache, step: "CompiledStep | None") -> None:
        """Keep a cache and a step for the next call with the same shapes."""
        key = describe_sources(cache.sources)
        self.caches[key] = cache
        if step is not None:
            self.steps[key] = step


class CompiledStep:
    """Decode one token: feed the token before it, select it, and write it. On a GPU, a step is one CUDA graph.

    A CUDA graph reads and writes fixed addresses, and repeats what Python decided when it was captured. Therefore the
    step owns the tokens, the noise keys and the mask of a call, and those of the next call are copied to it. After a
    change of the weights' addresses or of the adapters, the step is not used again.
    """

    def __init__(self, compiled: CompiledDecoding, decoder: TokenDecoder) -> None:
        assert decoder.cache is not None
        self.compiled, self.cache = compiled, decoder.cache
        self.tokens, self.select_tokens = decoder.tokens, decoder.select_tokens
        self.num_branches, self.grid = len(decoder.branches), decoder.grid
        self.key = describe_sources(self.cache.sources), self.num_branches, *self.grid.values()
        self.weights = describe_weights(decoder.model)
        self.start = torch.zeros(1, dtype=torch.long, device=self.tokens.device)
        self.replay: Callable[[], Any] | None = None
        selector = self.select_tokens
        for buffer in (self.start, self.tokens, selector.noise_keys, selector.edit_mask, selector.sum_of_highest):
            if buffer is not None:
                torch._dynamo.mark_static_address(buffer)

    def __call__(self, start: int) -> torch.Tensor:
        """Decode the token after position `start`; return it as `(batch, 1)`."""
        self.start.fill_(start)
        if self.replay is None:
            self.replay = capture_graph(self.run, self.start.device) if self.compiled.captures_steps else self.run
        self.replay()
        return self.tokens[:, start + 1 : start + 2]

    def run(self) -> None:
        """Run the step once. Running it again chooses the same token."""
        torch.compiler.cudagraph_mark_step_begin()
        inputs = {"cache": self.cache, "tokens": self.tokens, "start": self.start, "grid": self.grid}
        inputs |= {"forward": self.compiled.forward, "num_branches": self.num_branches}
        logits = self.compiled.call(compute_step_logits, self.key, **inputs)
        selection = {"select_tokens": self.select_tokens, "tokens": self.tokens, "start": self.start}
        self.compiled.call(select_step_token, self.key + self.select_tokens.describe(), logits=logits, **selection)

    def reuse(self, decoder: TokenDecoder) -> bool:
        """Prepare this step for another call. Return False if it does not fit the call."""
        own, given = self.select_tokens, decoder.select_tokens
        has_same_inputs = self.cache is decoder.cache and self.grid == decoder.grid
        if not has_same_inputs or own.describe() != given.describe() or self.weights != describe_weights(decoder.model):
            return False
        self.tokens.copy_(decoder.tokens)
        own.sum_of_highest.copy_(given.sum_of_highest)
        for buffer, values in ((own.noise_keys, given.noise_keys), (own.edit_mask, given.edit_mask)):
            if buffer is not None and values is not None:
                buffer.copy_(values)
        decoder.tokens, decoder.select_tokens = self.tokens, own
        return True


def compute_step_logits(
    forward: Callable,
    cache: DecodingCache,
    tokens: torch.Tensor,
    start: torch.Tensor,
    num_branches: int,
    grid: dict[str, int],
) -> torch.Tensor:
    """Feed the tokens at position `start`, a tensor; return float32 logits `(branches, batch, 1, vocab_size)`."""
    fed = tokens.index_select(1, start).repeat(num_branches, 1)
    inputs = cache.start_pass(cache.num_text_slots + start, 1) | grid
    return forward(target_image_tokens=fed, **inputs).logits.float().unflatten(0, (num_branches, -1))


def select_step_token(
    select_tokens: TokenSelector, logits: torch.Tensor, tokens: torch.Tensor, start: torch.Tensor
) -> None:
    """Select the tokens after position `start`, and write them."""
    tokens.index_copy_(1, start + 1, select_tokens(logits, tokens, start + 1))


def capture_graph(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return a function that replays a step as a CUDA graph. On other devices, return the step itself."""
    if device.type != "cuda":
        return step
    # The step is compiled in the first of these runs.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


def compile_apart(function: Callable, **options: Any) -> Callable:
    """Compile a function separately from its other compilations.

    torch allows eight compilations of one code object, so each compilation gets a new code object.
    `torch.compile(isolate_recompiles=True)` does the same in torch 2.13, but 2.11 is still supported.
    """

    def run(**inputs: Any) -> Any:
        return function(**inputs)

    apart = FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    return torch.compile(apart, fullgraph=True, dynamic=False, **options)


def describe_weights(decoder: PreTrainedModel) -> tuple:
    """Describe the addresses of all weights, and the adapters that are active."""
    return tuple(parameter.data_ptr() for parameter in decoder.parameters()), describe_adapters(decoder)


def describe_sources(sources: list[SourceCache]) -> tuple:
    """Return a key for the shapes of a cache, which has as many target tokens as source tokens."""
    parts = [(source.keys[0], source.num_rows, source.num_images) for source in sources]
    return tuple((keys.shape, keys.dtype, keys.device, *numbers) for keys, *numbers in parts)
