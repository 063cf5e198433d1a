"""Compiled passes: fixed lengths, and caches that stay between calls, so that one compilation serves every edit.

The first pass, with the text, stays as it is, and so does a pass of forced tokens longer than the compiled lengths:
both are few. Every other pass is padded to a compiled length; what is fed beyond the tokens asked for lands in slots
that the next pass writes over.
"""

import threading
from collections import defaultdict
from collections.abc import Callable
from types import FunctionType

import torch

from ..configuration_editar import EditARConfig
from .attention import SharedPrefix
from .cache import DecodingCache


# A pass of one token, and one with the drafts of a speculative pass or a short forced run.
PASS_LENGTHS = (1, 17)


class CompiledPasses:
    """Hold the compiled passes of a decoder, one for each shape, and the caches they work on.

    A call takes a cache out and puts it back at its end; a second thread meanwhile gets another. A copy of a decoder
    has no compiled passes: these belong to the weights of the first.

    Args:
        forward (`Callable`): The decoder's.
        options: Of `torch.compile`.
    """

    def __init__(self, forward: Callable, **options):
        self.forward = forward
        self.options = options
        self.lock = threading.Lock()
        self.compiled: dict[tuple, Callable] = {}
        self.resting: dict[tuple, list[DecodingCache]] = defaultdict(list)

    def __reduce__(self):
        """Copy and pickle as None."""
        return type(None), ()

    def run(self, cache: DecodingCache, target_image_tokens: torch.LongTensor, **inputs):
        """Run the decoder's forward, compiled for these shapes."""
        shapes = (*describe_prefixes(cache.prefixes[0]), target_image_tokens.shape[1])
        grid = (inputs["grid_height"], inputs["grid_width"])
        with self.lock:
            if (shapes, grid) not in self.compiled:
                self.compiled[shapes, grid] = compile_apart(self.forward, **self.options)
        return self.compiled[shapes, grid](target_image_tokens=target_image_tokens, past_key_values=cache, **inputs)

    def select_length(self, num_new: int, num_image_tokens: int) -> int | None:
        """Select the compiled length of a pass of `num_new` tokens; None if it is longer than all."""
        fitting = [length for length in PASS_LENGTHS if num_new <= length < num_image_tokens]
        return fitting[0] if fitting else None

    def take_cache(
        self, config: EditARConfig, prefixes: list[list[SharedPrefix]], num_target_slots: int
    ) -> DecodingCache:
        """Take a cache that rests, or make one, and copy the sources into it."""
        key = describe_prefixes(prefixes[0])
        with self.lock:
            cache = self.resting[key].pop() if self.resting[key] else None
        if cache is None:
            # Zeros, since slots not yet written take part in products, with a weight of 0.
            cache = DecodingCache(config, prefixes, num_target_slots + PASS_LENGTHS[-1], is_static=True)
        cache.fill_prefixes(prefixes)
        return cache

    def give_back(self, cache: DecodingCache):
        """Put a cache back for the next call of its shape."""
        with self.lock:
            self.resting[describe_prefixes(cache.prefixes[0])].append(cache)

    def free_caches(self):
        """Forget all caches that rest."""
        with self.lock:
            self.resting.clear()


def compile_apart(forward: Callable, **options) -> Callable:
    """Compile a function apart from its other compilations.

    torch counts compilations by code object and refuses the ninth; here each has a code object of its own.
    """

    def run(**inputs):
        return forward(**inputs)

    apart = FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    return torch.compile(apart, fullgraph=True, dynamic=False, **options)


def describe_prefixes(prefixes: list[SharedPrefix]) -> tuple:
    """Describe a cache by the shapes that its compilations depend on; as many target tokens as source tokens follow."""
    return tuple((p.keys.shape, p.keys.dtype, p.keys.device, p.num_rows, p.num_images) for p in prefixes)
