"""The pipeline that users call: `EditARPipeline`."""

from .pipeline_editar import EditARPipeline, EditARPipelineOutput


__all__ = ["EditARPipeline", "EditARPipelineOutput"]
