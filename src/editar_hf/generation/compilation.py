"""Compiled passes: fixed lengths, and caches that stay between calls, so that one compilation serves every edit.

The first pass, with the text, stays as it is, and so does a pass of forced tokens longer than the compiled lengths:
both are few. Every other pass is padded to a compiled length; what is fed beyond the tokens asked for lands in slots
that the next pass writes over.
"""

import threading
from collections import defaultdict

import torch

from ..configuration_editar import EditARConfig
from .attention import SharedPrefix
from .cache import DecodingCache


# A pass of one token, and one with the drafts of a speculative pass or a short forced run.
PASS_LENGTHS = (1, 17)


class CompiledPasses:
    """Hold the compiled forward of a decoder and the caches it works on.

    A call takes a cache out and puts it back at its end; a second thread meanwhile gets another.

    Args:
        forward (`Callable`): The decoder's.
        options: Of `torch.compile`.
    """

    def __init__(self, forward, **options):
        self.forward = torch.compile(forward, fullgraph=True, dynamic=False, **options)
        self.lock = threading.Lock()
        self.resting: dict[tuple, list[DecodingCache]] = defaultdict(list)

    def select_length(self, num_new: int, num_image_tokens: int) -> int | None:
        """Select the compiled length of a pass of `num_new` tokens; None if it is longer than all."""
        fitting = [length for length in PASS_LENGTHS if num_new <= length < num_image_tokens]
        return fitting[0] if fitting else None

    def take_cache(
        self, config: EditARConfig, prefixes: list[list[SharedPrefix]], num_target_slots: int
    ) -> DecodingCache:
        """Take a cache that rests, or make one, and copy the sources into it."""
        key = describe_prefixes(prefixes[0], num_target_slots)
        with self.lock:
            cache = self.resting[key].pop() if self.resting[key] else None
        if cache is None:
            # Zeros, since slots not yet written take part in products, with a weight of 0.
            cache = DecodingCache(config, prefixes, num_target_slots + PASS_LENGTHS[-1], is_static=True)
        cache.fill_prefixes(prefixes)
        return cache

    def give_back(self, cache: DecodingCache, num_target_slots: int):
        """Put a cache back for the next call of its shape."""
        with self.lock:
            self.resting[describe_prefixes(cache.prefixes[0], num_target_slots)].append(cache)

    def free_caches(self):
        """Forget all caches that rest."""
        with self.lock:
            self.resting.clear()


def describe_prefixes(prefixes: list[SharedPrefix], num_target_slots: int) -> tuple:
    """Describe a cache by all that a compilation depends on."""
    blocks = [(tuple(p.keys.shape), p.keys.dtype, p.keys.device, p.num_rows, p.num_images) for p in prefixes]
    return (*blocks, num_target_slots)
