"""Hugging Face Inference Endpoints make an `EndpointHandler` of this folder, and call it for every request."""

from editar_hf.serving.endpoint import EndpointHandler


__all__ = ["EndpointHandler"]
