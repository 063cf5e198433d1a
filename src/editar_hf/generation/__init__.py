"""Decoding: what `EditARForConditionalGeneration.generate` is made of.

`configuration` holds the settings, `inputs` refuses bad arguments, `sampling` has the pure tensor functions that choose
tokens (guidance, warping, stateless noise), `attention` those that share a source; `cache` keeps keys and values,
`passes` runs the forwards, `compilation` compiles them, `loop` is the one loop and `mixin` puts it all together.
Nothing here imports the model.
"""

from .cache import DecodingCache, SourceCache
from .configuration import EditARGenerationConfig
from .mixin import EditARGenerateOutput, EditARGenerationMixin


__all__ = ["DecodingCache", "EditARGenerateOutput", "EditARGenerationConfig", "EditARGenerationMixin", "SourceCache"]
