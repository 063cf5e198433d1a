"""Let diffusers load this folder: `DiffusionPipeline.from_pretrained(F, custom_pipeline=F, trust_remote_code=True)`."""

from editar_hf.pipelines.engine import EditARPipeline


__all__ = ["EditARPipeline"]
