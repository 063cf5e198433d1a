"""`editar-hf evaluate run`: prepare, generate, score and report in one go; resumable."""

import argparse

from .generate import SYSTEM_OPTIONS, add_system_arguments
from .prepare import TASK_HELP, add_source_arguments, print_contents
from .score import add_scoring_arguments, get_models, score


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the step to the parser of `editar-hf evaluate`."""
    summary = "prepare, generate, score and report in one go"
    parser = subparsers.add_parser("run", help=summary, description=f"{summary.capitalize()}.")
    benchmark = parser.add_mutually_exclusive_group(required=True)
    benchmark.add_argument("--task", metavar="T", help=TASK_HELP)
    benchmark.add_argument("--data", metavar="DIR", help="what `prepare` wrote, in place of a task")
    add_source_arguments(parser)
    add_system_arguments(parser)
    add_scoring_arguments(parser)
    parser.add_argument("--output-dir", metavar="DIR", required=True, help="the run's folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Take all the steps that were not taken before; exit status 1 where a prediction cannot be scored."""
    from ...evaluation.processes import get_process
    from ...evaluation.report import write_report
    from ...evaluation.runs import IMAGES, generate
    from ...evaluation.scoring import resolve_scoring
    from ...evaluation.systems import build_system

    system = build_system(args.system, **{name: getattr(args, name) for name in SYSTEM_OPTIONS})
    process = get_process()
    with process.main_process_first():
        benchmark = open_benchmark(args, process.is_main_process)
    # What cannot be scored is told before hours of generation.
    resolve_scoring(benchmark, args.protocol, args.metrics, get_models(args))
    generate(benchmark, system, args.output_dir, args.seed, args.batch_size)
    status = score(args, benchmark, f"{args.output_dir}/{IMAGES}")
    if process.is_main_process:
        print(f"Wrote {write_report([args.output_dir], args.output_dir)}")
    return status


def open_benchmark(args: argparse.Namespace, is_main_process: bool):
    """Open the benchmark named, or the one prepared in the run's folder, which is prepared first if it is not there."""
    from pathlib import Path

    from ...evaluation.runs import read_configuration, record_configuration
    from ...evaluation.samples import Benchmark
    from ...evaluation.tasks import get_task, prepare_benchmark

    options = {"resolution": args.resolution, "tokenizer": args.tokenizer}
    if args.data is not None:
        check_no_source(options | {"source": args.source, "allow_partial": args.allow_partial or None})
        return Benchmark(args.data)
    output_dir, task = Path(args.output_dir), get_task(args.task)
    folder, source = output_dir / "data", args.source or task.default_source
    if "tokenizer" in task.options:
        options["tokenizer"] = args.tokenizer or args.model
    config = {"task": args.task, "source": source, "allow_partial": args.allow_partial, **options}
    if not folder.exists():
        prepare_benchmark(args.task, folder, source, args.allow_partial, **options)
    elif "preparation" not in read_configuration(output_dir):
        raise ValueError(
            f"`output_dir` {args.output_dir!r} holds samples in data/ that this command did not prepare; give them as "
            "`data`, or delete them."
        )
    record_configuration(output_dir, "preparation", config)
    benchmark = Benchmark(folder)
    if is_main_process:
        print_contents(benchmark)
    return benchmark


def check_no_source(options: dict) -> None:
    """Refuse options of the preparation beside samples that are prepared."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"`{name}` is {value!r}; it goes with `--task`: `--data` names samples that are prepared.")
