"""Evaluation: metrics, the networks they ask, benchmarks, runs and reports."""

from pathlib import Path


# The module that `evaluate.load` loads.
METRIC_PATH = str(Path(__file__).with_name("metric.py"))
