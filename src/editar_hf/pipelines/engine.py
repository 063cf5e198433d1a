"""The pipeline that serving engines load, such as SGLang and vLLM-Omni with their diffusers backends.

The file `pipeline.py` of a pipeline folder imports this class. Engines pass the same few arguments to every pipeline of
diffusers, and they have their own defaults for them.
"""

from functools import wraps
from typing import Any

from . import pipeline_editar


class EditARPipeline(pipeline_editar.EditARPipeline):
    """`editar_hf.EditARPipeline` for serving engines.

    It differs in two defaults. `size_policy` is `"fit"`, because engines ask for the size of the source, or for
    1024×1024 pixels. A `guidance_scale` of 0 means the pipeline's own value, because vLLM-Omni sends 0 if its client
    has not chosen a value.
    """

    size_policy = "fit"

    @wraps(pipeline_editar.EditARPipeline.__call__)
    def __call__(  # type: ignore[override]
        self, *args: Any, guidance_scale: float | None = None, **kwargs: Any
    ) -> pipeline_editar.EditARPipelineOutput | tuple:
        return super().__call__(*args, guidance_scale=guidance_scale or None, **kwargs)  # type: ignore[misc]
