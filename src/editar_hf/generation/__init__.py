"""Decoding: what `EditARForConditionalGeneration.generate` is made of.

`mixin` has `generate`. `inputs` resolves its settings and refuses bad arguments. `decoding` has the loop, its passes
and their compilation. `cache` has the keys, the values and the attention that reads them. `sampling` has the pure
tensor functions that choose tokens. Nothing here imports the model.
"""

import warnings

from transformers import GenerationConfig

from .cache import DecodingCache, SourceCache
from .mixin import EditARGenerateOutput, EditARGenerationMixin


__all__ = ["DecodingCache", "EditARGenerateOutput", "EditARGenerationMixin", "SourceCache"]


def __getattr__(name: str) -> type:
    if name == "EditARGenerationConfig":
        warnings.warn("`EditARGenerationConfig` is now `transformers.GenerationConfig`.", FutureWarning, stacklevel=2)
        return GenerationConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
