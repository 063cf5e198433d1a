"""Evaluation: metrics, the networks that they use, benchmarks, runs and reports."""

from pathlib import Path


# Path of the module that `evaluate.load` loads.
METRIC_PATH = str(Path(__file__).with_name("evaluate_module.py"))
