"""`editar-hf evaluate report`: runs of one benchmark beside one another and beside published figures."""

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the step to the parser of `editar-hf evaluate`."""
    summary = "compare runs: tables, plots and contact sheets"
    parser = subparsers.add_parser("report", help=summary, description=f"{summary.capitalize()}.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run that was scored")
    parser.add_argument("--output-dir", metavar="DIR", required=True, help="where to")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report."""
    from ...evaluation.report import write_report

    print(f"Wrote {write_report(args.runs, args.output_dir)}")
    return 0
