"""`editar-hf evaluate`: evaluate editors on published benchmarks.

`generate`, `score` and `report` are the steps; `run` runs them all.
"""

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..evaluation.benchmarks import Benchmark
    from ..evaluation.systems import System


# Options that several steps and the scripts in `examples/baselines/` share.
BENCHMARK = argparse.ArgumentParser(add_help=False)
BENCHMARK.add_argument(
    "--benchmark",
    "--task",
    metavar="B",
    required=True,
    help="pie-bench, depth, canny, segmentation, magicbrush, magicbrush-multi-turn or folder; --task is the old name",
)
BENCHMARK.add_argument(
    "--source", metavar="PATH", help="folder or Hub id; depth, canny and segmentation are downloaded by default"
)
BENCHMARK.add_argument("--allow-partial", action="store_true", help="accept a part of the benchmark; noted in reports")
BENCHMARK.add_argument(
    "--resolution", metavar="N", type=int, help="depth, canny, segmentation: pixels per side; default: 512"
)
BENCHMARK.add_argument("--output-dir", metavar="DIR", required=True, help="folder to write")

SYSTEM = argparse.ArgumentParser(add_help=False)
SYSTEM.add_argument(
    "--system",
    metavar="S",
    help="editar, copy-source, vq-reconstruction or command; default: editar, or command with --command",
)
# Each option has the name of a parameter in `evaluation/systems.py`.
OPTIONS = SYSTEM.add_argument_group("options of systems")
OPTIONS.add_argument("--model", metavar="M", help="editar, vq-reconstruction: the pipeline, a folder or Hub id")
OPTIONS.add_argument("--lora", metavar="L", help="editar: an adapter, a folder or Hub id")
OPTIONS.add_argument(
    "--use-masks",
    action="store_true",
    default=None,
    help="editar: use the benchmark's masks; results are mask-assisted and not comparable",
)
OPTIONS.add_argument(
    "--preserve", metavar="P", help="editar: auto keeps what the instruction does not change; default: off"
)
OPTIONS.add_argument("--guidance-scale", metavar="X", type=float, help="editar: weight of the prompt")
OPTIONS.add_argument("--image-guidance-scale", metavar="X", type=float, help="editar: weight of the source image")
OPTIONS.add_argument("--do-sample", action=argparse.BooleanOptionalAction, help="editar: sample, or decode greedily")
OPTIONS.add_argument("--temperature", metavar="X", type=float, help="editar: temperature of the sampling")
OPTIONS.add_argument("--top-k", metavar="N", type=int, help="editar: sample from the N most probable codes")
OPTIONS.add_argument(
    "--top-p", metavar="X", type=float, help="editar: sample from the most probable codes with total probability X"
)
OPTIONS.add_argument("--dtype", metavar="D", help="editar: float32, bfloat16 or float16; default: float32")
OPTIONS.add_argument("--quantize", metavar="Q", help="editar: round, or truncate as in the reference; default: round")
OPTIONS.add_argument("--reconstruct", metavar="R", help="vq-reconstruction: source or target; default: source")
OPTIONS.add_argument("--command", metavar="C", help='command: for example "python edit.py {image} {prompt} {output}"')
SYSTEM.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the sampling; default: 0")
SYSTEM.add_argument("--batch-size", metavar="N", type=int, default=1, help="samples per batch; default: 1")

SCORING = argparse.ArgumentParser(add_help=False)
SCORING.add_argument(
    "--protocol",
    metavar="P",
    default="editar",
    help="editar, pnp-2023, controlnet++, controlar or corrected; default: editar",
)
SCORING.add_argument(
    "--metrics", metavar="M", nargs="+", help="metrics of docs/evaluate.md; default: the metrics of the benchmark"
)
# The networks that metrics need. The defaults are the networks of published results, where a Hub id exists.
MODELS = SCORING.add_argument_group("networks of metrics")
MODELS.add_argument("--structure-model", metavar="M", help="DINO model of the structure distance")
MODELS.add_argument("--clip-model", metavar="M", help="CLIP model")
MODELS.add_argument("--dino-model", metavar="M", help="DINO model of MagicBrush")
MODELS.add_argument("--depth-model", metavar="M", help="depth model")
MODELS.add_argument("--segmentation-model", metavar="M", help="segmentation model")
MODELS.add_argument("--lpips-model", metavar="M", help="folder with squeezenet1_1-b8a52dc0.pth and squeeze.pth")
MODELS.add_argument("--inception-model", metavar="M", help="file pt_inception-2015-12-05-6726825d.pth, for FID")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `editar-hf evaluate` and its steps to the command's parser."""
    summary = "score EditAR and other editors on benchmarks"
    parser = subparsers.add_parser("evaluate", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    steps = parser.add_subparsers(metavar="step", required=True)

    def add_step(
        name: str, run_step: Callable, parents: list[argparse.ArgumentParser], summary: str
    ) -> argparse.ArgumentParser:
        step = steps.add_parser(name, help=summary, parents=parents, description=f"{summary.capitalize()}.")
        step.set_defaults(run=run_step)
        return step

    add_step("generate", run_generate, [BENCHMARK, SYSTEM], "make the missing predictions of a system")
    summary = "score predictions; exit status 1 if a prediction is missing, unreadable, extra or has the wrong size"
    step = add_step("score", run_score, [BENCHMARK, SCORING], summary)
    step.add_argument("--images", metavar="DIR", help="folder with <id>.png from any system; default: the run's images")
    step = add_step("report", run_report, [], "compare runs: tables, a plot and contact sheets")
    step.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run that was scored")
    step.add_argument("--output-dir", metavar="DIR", required=True, help="folder to write")
    summary = "generate, score and report; continues where an earlier run stopped"
    add_step("run", run_all, [BENCHMARK, SYSTEM, SCORING], summary)


def open_benchmark(args: argparse.Namespace) -> "Benchmark":
    from ..evaluation.benchmarks import Benchmark

    return Benchmark(args.benchmark, args.source, args.allow_partial, args.resolution)


def build_system(args: argparse.Namespace) -> "System":
    from ..evaluation.systems import SYSTEMS, build_system

    name = args.system or ("editar" if args.command is None else "command")
    options = dict.fromkeys(option for build in SYSTEMS.values() for option in inspect.signature(build).parameters)
    return build_system(name, **{option: getattr(args, option) for option in options})


def get_models(args: argparse.Namespace) -> dict[str, str]:
    """Return the networks that the user gave: name → folder, file or Hub id."""
    models = {name: value for name, value in vars(args).items() if name.endswith("_model") and value is not None}
    return {name.removesuffix("_model"): value for name, value in models.items()}


def run_generate(args: argparse.Namespace) -> int:
    from ..evaluation.run import generate

    system = build_system(args)
    generate(open_benchmark(args), system, args.output_dir, args.seed, args.batch_size)
    return 0


def run_score(args: argparse.Namespace, benchmark: "Benchmark | None" = None) -> int:
    """Score predictions, and print the metrics and the problems. Return 1 if there are problems."""
    from ..evaluation.run import IMAGES, decode_number, score
    from ..evaluation.table import METRICS

    images = getattr(args, "images", None) or Path(args.output_dir) / IMAGES
    benchmark = benchmark or open_benchmark(args)
    summary = score(benchmark, images, args.output_dir, args.protocol, args.metrics, get_models(args))
    for name, figure in summary.get("overall", {}).items():
        value = METRICS[name].format(decode_number(figure["scaled"]))
        print(f"{METRICS[name].heading}: {value} (n = {figure['n']})")
    problems = {kind: names for kind, names in summary.get("problems", {}).items() if names}
    for kind, names in problems.items():
        print(f"{kind}: {len(names)}", *names, sep="\n  ")
    return 1 if problems else 0


def run_report(args: argparse.Namespace) -> int:
    from ..evaluation.report import write_report

    print(f"Wrote {write_report(args.runs, args.output_dir)}")
    return 0


def run_all(args: argparse.Namespace) -> int:
    """Run all steps. Return 1 if a prediction cannot be scored."""
    from ..evaluation.processes import get_process
    from ..evaluation.report import write_report
    from ..evaluation.run import generate, rehearse_scoring

    system, benchmark = build_system(args), open_benchmark(args)
    rehearse_scoring(benchmark, args.protocol, args.metrics, get_models(args))
    generate(benchmark, system, args.output_dir, args.seed, args.batch_size)
    status = run_score(args, benchmark)
    if get_process().is_main_process:
        print(f"Wrote {write_report([args.output_dir], args.output_dir)}")
    return status
