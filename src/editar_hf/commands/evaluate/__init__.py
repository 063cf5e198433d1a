"""`editar-hf evaluate`: benchmarks, from their published form to a report.

`prepare`, `generate`, `score` and `report` are its steps, each a module of this package; `run` takes them all.
"""

import argparse

from . import generate, prepare, report, run, score


STEPS = (prepare, generate, score, report, run)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `editar-hf evaluate` and its steps to the command's parser."""
    summary = "score EditAR and other editors on benchmarks"
    parser = subparsers.add_parser("evaluate", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    steps = parser.add_subparsers(metavar="step", required=True)
    for step in STEPS:
        step.add_parser(steps)
