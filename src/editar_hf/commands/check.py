"""`editar-hf check`: run the self-check of a pipeline."""

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `editar-hf check` to the command's parser."""
    summary = "check that a pipeline behaves like a trained one"
    description = (
        f"{summary.capitalize()}. The check encodes and decodes a photograph, and compares the likelihood of its "
        "tokens with and without the source image. It needs no reference results. The exit status is 1 if the check "
        "fails."
    )
    parser = subparsers.add_parser("check", help=summary, description=description)
    parser.add_argument("model", metavar="M", help="pipeline folder or Hub id")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the measurements, and return 1 if one of them is not that of a trained pipeline."""
    from . import import_pipeline

    import_pipeline()
    from ..pipelines.hub import check_folder_or_hub_id
    from ..pipelines.pipeline_editar import EditARPipeline
    from ..self_check import check_pipeline

    check_folder_or_hub_id(args.model, "model")
    report = check_pipeline(EditARPipeline.from_pretrained(args.model))
    print(report.to_markdown())
    return 0 if report.passed else 1
