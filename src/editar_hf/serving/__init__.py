"""The HTTP server: requests and their checks, the worker that runs the pipeline, and the application."""
