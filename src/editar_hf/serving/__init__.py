"""Serve a pipeline: the HTTP server (requests, the worker, the application), and the handler of endpoints."""

# The most pixels of an image that a client sends or asks for: 4096×4096.
MAX_PIXELS = 2**24
