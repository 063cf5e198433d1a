"""EditAR as a Hugging Face model and pipeline: edit images by instruction with one autoregressive model.

`import editar_hf` is fast, because it imports neither torch nor transformers nor diffusers. The first use of a public
name imports them and registers our classes with the Auto classes of transformers. Therefore write
`from editar_hf import ...` before `AutoModel.from_pretrained(...)`; `import editar_hf` alone registers nothing.
"""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .configuration_editar import EditARConfig, EditARVQConfig
    from .image_processing_editar import EditARImageProcessor
    from .modeling_editar import EditARForConditionalGeneration, EditARModel
    from .modeling_editar_vq import EditARVQModel
    from .pipelines.keep_source import keep_source
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
    "keep_source",
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
    "keep_source": ".pipelines.keep_source",
}

# `model_index.json` records our components under "editar_hf". To find out how to load a component, diffusers looks up
# its base class in this module (`LOADABLE_CLASSES` in diffusers/pipelines/pipeline_loading_utils.py).
_LOADABLE_BASE_CLASSES = ("ImageProcessingMixin", "PreTrainedModel", "ProcessorMixin")


@cache
def _register_auto_classes() -> None:
    """Register the classes of this package with `AutoConfig`, `AutoModel`, `AutoImageProcessor` and `AutoProcessor`.

    `AutoModel` loads `EditARModel`, the decoder without its LM head, as is usual in transformers.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

    from .configuration_editar import EditARConfig, EditARVQConfig
    from .image_processing_editar import EditARImageProcessor
    from .modeling_editar import EditARModel
    from .modeling_editar_vq import EditARVQModel
    from .processing_editar import EditARProcessor

    # exist_ok: a reload of the package registers again, and so does a second attempt after an error.
    for config_class, model_class in ((EditARConfig, EditARModel), (EditARVQConfig, EditARVQModel)):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
    image_processor_classes = {"pil": EditARImageProcessor}
    AutoImageProcessor.register(EditARConfig, image_processor_classes=image_processor_classes, exist_ok=True)
    AutoProcessor.register(EditARConfig, EditARProcessor, exist_ok=True)


def __getattr__(name: str) -> type:
    """Import a public name on its first use. The first import also registers the Auto classes."""
    if name in _LOADABLE_BASE_CLASSES:
        return getattr(import_module("transformers"), name)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register_auto_classes()
    # Python calls this function only for missing attributes, so the name is stored as one.
    globals()[name] = getattr(import_module(_MODULE_OF[name], __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    """List the public names, including those that are not imported yet."""
    return sorted({*globals(), *__all__})
