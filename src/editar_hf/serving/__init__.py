"""Serve a pipeline: the HTTP server (requests, the worker, the application), and the handler of endpoints."""
