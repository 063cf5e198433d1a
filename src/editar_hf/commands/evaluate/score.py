"""`editar-hf evaluate score`: the figures of a folder of predictions, from any system; resumable."""

import argparse


# The models that metrics need; their defaults are those of published figures, where there are any.
MODELS = {
    "structure": "DINO of the structure distance",
    "clip": "CLIP",
    "dino": "DINO of MagicBrush",
    "depth": "depth",
    "segmentation": "segmentation",
    "lpips": "LPIPS, a folder that `editar-hf convert-metric-model` made",
    "inception": "FID's Inception, a folder that `editar-hf convert-metric-model` made",
}

PROTOCOL_HELP = "editar, pnp-2023, controlnet++, controlar or corrected"
METRIC_HELP = (
    "structure_distance, psnr_unedited, lpips_unedited, mse_unedited, ssim_unedited, clip_whole, clip_edited, "
    "depth_rmse, edge_f1, edge_ms_ssim, edge_psnr, l1, l2, psnr, ssim, lpips, clip_i, clip_t, dino, fid, mean_iou, "
    "outside_psnr, done, inside, outside, colour, shape, gone, stickers, placed or background"
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the step to the parser of `editar-hf evaluate`."""
    summary = "score predictions"
    description = (
        f"{summary.capitalize()}. Those that are missing, unreadable, of another size or of no sample are named and "
        "counted, and the exit status is 1."
    )
    parser = subparsers.add_parser("score", help=summary, description=description)
    parser.add_argument("--data", metavar="DIR", required=True, help="what `prepare` wrote")
    parser.add_argument("--images", metavar="DIR", help="<id>.png, from any system; default: those of the run")
    add_scoring_arguments(parser)
    parser.add_argument("--output-dir", metavar="DIR", required=True, help="the run's folder")
    parser.set_defaults(run=run)


def add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how predictions are scored."""
    parser.add_argument("--protocol", metavar="P", default="editar", help=f"{PROTOCOL_HELP}; default: editar")
    metrics = f"{METRIC_HELP}; default: those of the task's table"
    parser.add_argument("--metrics", metavar="M", nargs="+", help=metrics)
    for name, help in MODELS.items():
        parser.add_argument(f"--{name}-model", metavar="M", help=help)


def get_models(args: argparse.Namespace) -> dict[str, str]:
    """Get the models that were named."""
    models = {name: getattr(args, f"{name}_model") for name in MODELS}
    return {name: model for name, model in models.items() if model is not None}


def run(args: argparse.Namespace) -> int:
    """Score the predictions; exit status 1 where one cannot be."""
    from pathlib import Path

    from ...evaluation.runs import IMAGES
    from ...evaluation.samples import Benchmark

    images = args.images or Path(args.output_dir) / IMAGES
    return score(args, Benchmark(args.data), images)


def score(args: argparse.Namespace, benchmark, images) -> int:
    """Score predictions and print the figures and what is the matter with any; 1 where something is."""
    from ...evaluation.measures import METRICS
    from ...evaluation.scoring import score_predictions

    summary = score_predictions(benchmark, images, args.output_dir, args.protocol, args.metrics, get_models(args))
    if not summary:
        return 0
    for name, figure in summary["overall"].items():
        print(f"{METRICS[name].heading}: {METRICS[name].format(figure['scaled'])} (n = {figure['n']})")
    problems = {kind: names for kind, names in summary["problems"].items() if names}
    for kind, names in problems.items():
        print(f"{kind}: {len(names)}", *names, sep="\n  ")
    return 1 if problems else 0
