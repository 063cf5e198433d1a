"""Decoding: what `EditARForConditionalGeneration.generate` is made of.

`configuration` holds the settings, `inputs` refuses bad arguments, `sampling` has the pure tensor functions (guidance,
warping, stateless noise) and `mixin` the one loop. Nothing here imports the model: the mixin knows it through `self`.
"""

from .configuration import EditARGenerationConfig
from .mixin import EditARGenerateOutput, EditARGenerationMixin


__all__ = ["EditARGenerateOutput", "EditARGenerationConfig", "EditARGenerationMixin"]
