"""`editar-hf evaluate`: benchmarks, from their published form to a report.

`generate`, `score` and `report` are its steps; `run` takes them all.
"""

import argparse
from pathlib import Path


BENCHMARK_HELP = "pie-bench, depth, canny, segmentation, magicbrush, magicbrush-multi-turn or folder"
# Options of systems, by the name of their parameter in `evaluation/systems.py`.
SYSTEM_OPTIONS = {
    "model": {"metavar": "M", "help": "editar, vq-reconstruction: the pipeline, a folder or Hub id"},
    "lora": {"metavar": "L", "help": "editar: an adapter, a folder or Hub id"},
    "use_masks": {
        "action": "store_true",
        "default": None,
        "help": "editar: give it the benchmark's masks; mask-assisted, not comparable",
    },
    "guidance_scale": {"metavar": "X", "type": float, "help": "editar: weight of the prompt"},
    "image_guidance_scale": {"metavar": "X", "type": float, "help": "editar: weight of the source image"},
    "do_sample": {"action": argparse.BooleanOptionalAction, "help": "editar: sample, or decode greedily"},
    "temperature": {"metavar": "X", "type": float, "help": "editar: of the sampling"},
    "top_k": {"metavar": "N", "type": int, "help": "editar: sample among so many codes"},
    "top_p": {"metavar": "X", "type": float, "help": "editar: sample among codes of so much probability"},
    "dtype": {"metavar": "D", "help": "editar: float32, bfloat16 or float16; default: float32"},
    "quantize": {"metavar": "Q", "help": "editar: round, or truncate as the reference's arrays; default: round"},
    "reconstruct": {"metavar": "R", "help": "vq-reconstruction: source or target; default: source"},
    "command": {"metavar": "C", "help": 'command: such as "python edit.py {image} {prompt} {output}"'},
}
# The networks that metrics need; their defaults are those of published figures, where there are any.
MODELS = {
    "structure": "DINO of the structure distance",
    "clip": "CLIP",
    "dino": "DINO of MagicBrush",
    "depth": "depth",
    "segmentation": "segmentation",
    "lpips": "the folder that holds squeezenet1_1-b8a52dc0.pth and squeeze.pth",
    "inception": "FID's pt_inception-2015-12-05-6726825d.pth",
}
METRIC_HELP = (
    "structure_distance, psnr_unedited, lpips_unedited, mse_unedited, ssim_unedited, clip_whole, clip_edited, "
    "depth_rmse, edge_f1, edge_ms_ssim, edge_psnr, l1, l2, psnr, ssim, lpips, clip_i, clip_t, dino, fid or mean_iou; "
    "default: those of the benchmark's table"
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `editar-hf evaluate` and its steps to the command's parser."""
    summary = "score EditAR and other editors on benchmarks"
    parser = subparsers.add_parser("evaluate", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    steps = parser.add_subparsers(metavar="step", required=True)
    for name, (summary, run_step, arguments) in STEPS.items():
        step = steps.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        for add_arguments in arguments:
            add_arguments(step)
        step.set_defaults(run=run_step)


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--benchmark", "--task", metavar="B", required=True, help=BENCHMARK_HELP)
    parser.add_argument("--source", metavar="PATH", help="folder or Hub id; default: the Hub id it is published under")
    parser.add_argument("--allow-partial", action="store_true", help="accept a part of the benchmark; reports say so")
    parser.add_argument("--resolution", metavar="N", type=int, help="depth, canny, segmentation: pixels; default: 512")


def add_system_arguments(parser: argparse.ArgumentParser) -> None:
    systems = "editar, copy-source, vq-reconstruction or command"
    parser.add_argument("--system", metavar="S", help=f"{systems}; default: editar, or command with --command")
    for name, settings in SYSTEM_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="default: 0")
    parser.add_argument("--batch-size", metavar="N", type=int, default=1, help="samples at a time; default: 1")


def add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    protocols = "editar, pnp-2023, controlnet++, controlar or corrected; default: editar"
    parser.add_argument("--protocol", metavar="P", default="editar", help=protocols)
    parser.add_argument("--metrics", metavar="M", nargs="+", help=METRIC_HELP)
    for name, text in MODELS.items():
        parser.add_argument(f"--{name}-model", metavar="M", help=text)


def add_images_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", metavar="DIR", help="<id>.png, from any system; default: those of the run")


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", metavar="DIR", required=True, help="folder to write")


def add_runs_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run that was scored")


def open_benchmark(args: argparse.Namespace):
    from ..evaluation.benchmarks import Benchmark

    return Benchmark(args.benchmark, args.source, args.allow_partial, args.resolution)


def build_system(args: argparse.Namespace):
    from ..evaluation.systems import build_system

    name = args.system or ("editar" if args.command is None else "command")
    return build_system(name, **{option: getattr(args, option) for option in SYSTEM_OPTIONS})


def get_models(args: argparse.Namespace) -> dict[str, str]:
    """Return the networks that were named."""
    models = {name: getattr(args, f"{name}_model") for name in MODELS}
    return {name: model for name, model in models.items() if model is not None}


def run_generate(args: argparse.Namespace) -> int:
    from ..evaluation.run import generate

    system = build_system(args)
    generate(open_benchmark(args), system, args.output_dir, args.seed, args.batch_size)
    return 0


def run_score(args: argparse.Namespace, benchmark=None) -> int:
    """Score predictions; print the figures and what is wrong with any; return 1 if something is."""
    from ..evaluation.run import IMAGES, score
    from ..evaluation.table import METRICS

    images = getattr(args, "images", None) or Path(args.output_dir) / IMAGES
    benchmark = benchmark or open_benchmark(args)
    summary = score(benchmark, images, args.output_dir, args.protocol, args.metrics, get_models(args))
    if not summary:
        return 0
    for name, figure in summary["overall"].items():
        print(f"{METRICS[name].heading}: {METRICS[name].format(figure['scaled'])} (n = {figure['n']})")
    problems = {kind: names for kind, names in summary["problems"].items() if names}
    for kind, names in problems.items():
        print(f"{kind}: {len(names)}", *names, sep="\n  ")
    return 1 if problems else 0


def run_report(args: argparse.Namespace) -> int:
    from ..evaluation.report import write_report

    print(f"Wrote {write_report(args.runs, args.output_dir)}")
    return 0


def run_all(args: argparse.Namespace) -> int:
    """Take all steps; return 1 if a prediction cannot be scored."""
    from ..evaluation.processes import get_process
    from ..evaluation.report import write_report
    from ..evaluation.run import generate, resolve_scoring

    system, benchmark = build_system(args), open_benchmark(args)
    # What cannot be scored is told before hours of generation.
    resolve_scoring(benchmark, args.protocol, args.metrics, get_models(args))
    generate(benchmark, system, args.output_dir, args.seed, args.batch_size)
    status = run_score(args, benchmark)
    if get_process().is_main_process:
        print(f"Wrote {write_report([args.output_dir], args.output_dir)}")
    return status


STEPS = {
    "generate": (
        "make the predictions of a system that are not there yet",
        run_generate,
        (add_benchmark_arguments, add_system_arguments, add_output_argument),
    ),
    "score": (
        "score predictions; exit status 1 if any is missing, unreadable, of another size or of no sample",
        run_score,
        (add_benchmark_arguments, add_images_argument, add_scoring_arguments, add_output_argument),
    ),
    "report": (
        "compare runs: tables, plots and contact sheets",
        run_report,
        (add_runs_argument, add_output_argument),
    ),
    "run": (
        "generate, score and report in one go; goes on where it was stopped",
        run_all,
        (add_benchmark_arguments, add_system_arguments, add_scoring_arguments, add_output_argument),
    ),
}
