"""Decoding: the parts of `EditARForConditionalGeneration.generate`.

`mixin` defines `generate`. `inputs` resolves its settings and checks its arguments. `decoding` contains the decoding
loop, its decoder passes and their compilation. `cache` contains the key-value caches and the attention function that
reads them. `sampling` contains the pure tensor functions that choose tokens. No module here imports the model.
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
