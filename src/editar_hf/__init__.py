"""EditAR as a Hugging Face model and pipeline: edit images by instruction with one autoregressive model.

`import editar_hf` costs next to nothing: torch, transformers and diffusers are imported when a public name is first
used. That is also when our classes join transformers' Auto classes, so write `from editar_hf import ...` before
`AutoModel.from_pretrained(...)`; a bare `import editar_hf` does not register anything.
"""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .configuration_editar import EditARConfig, EditARVQConfig
    from .image_processing_editar import EditARImageProcessor
    from .modeling_editar import EditARForConditionalGeneration, EditARModel
    from .modeling_editar_vq import EditARVQModel
    from .pipelines.pipeline_editar import EditARPipeline, EditARPipelineOutput
    from .processing_editar import EditARProcessor

__version__ = "0.1.0"

__all__ = [
    "EditARConfig",
    "EditARForConditionalGeneration",
    "EditARImageProcessor",
    "EditARModel",
    "EditARPipeline",
    "EditARPipelineOutput",
    "EditARProcessor",
    "EditARVQConfig",
    "EditARVQModel",
]

_MODULE_OF = {
    "EditARConfig": ".configuration_editar",
    "EditARVQConfig": ".configuration_editar",
    "EditARModel": ".modeling_editar",
    "EditARForConditionalGeneration": ".modeling_editar",
    "EditARVQModel": ".modeling_editar_vq",
    "EditARImageProcessor": ".image_processing_editar",
    "EditARProcessor": ".processing_editar",
    "EditARPipeline": ".pipelines.pipeline_editar",
    "EditARPipelineOutput": ".pipelines.pipeline_editar",
}

# `model_index.json` records our components under "editar_hf". To load one, diffusers asks that module for the base
# class that says how (`LOADABLE_CLASSES` in diffusers/pipelines/pipeline_loading_utils.py), so it must find it here.
_LOADABLE_BASE_CLASSES = ("ImageProcessingMixin", "PreTrainedModel", "ProcessorMixin")


@cache
def _register_auto_classes() -> None:
    """Make `AutoConfig`, `AutoModel`, `AutoImageProcessor` and `AutoProcessor` know the classes of this package.

    `AutoModel` maps a configuration to the network without its head, as everywhere in transformers: `EditARModel`.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

    from .configuration_editar import EditARConfig, EditARVQConfig
    from .image_processing_editar import EditARImageProcessor
    from .modeling_editar import EditARModel
    from .modeling_editar_vq import EditARVQModel
    from .processing_editar import EditARProcessor

    # exist_ok: reloading the package registers again, and an attempt that failed half-way may be repeated.
    for config_class, model_class in ((EditARConfig, EditARModel), (EditARVQConfig, EditARVQModel)):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
    image_processor_classes = {"pil": EditARImageProcessor}
    AutoImageProcessor.register(EditARConfig, image_processor_classes=image_processor_classes, exist_ok=True)
    AutoProcessor.register(EditARConfig, EditARProcessor, exist_ok=True)


def __getattr__(name: str) -> type:
    """Import a public name on its first use, and with the first of them register the Auto classes."""
    if name in _LOADABLE_BASE_CLASSES:
        return getattr(import_module("transformers"), name)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register_auto_classes()
    # Kept as a plain attribute, so that this function is not called for the name again.
    globals()[name] = getattr(import_module(_MODULE_OF[name], __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
