"""Evaluation: metrics and protocols of the published benchmarks; tasks, systems, runs and reports."""
