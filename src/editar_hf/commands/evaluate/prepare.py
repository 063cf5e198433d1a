"""`editar-hf evaluate prepare`: a benchmark as its authors share it → one folder of samples, checked."""

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the step to the parser of `editar-hf evaluate`."""
    summary = "turn a benchmark into a folder of samples, and check that it is all there"
    parser = subparsers.add_parser("prepare", help=summary, description=f"{summary.capitalize()}.")
    parser.add_argument("--task", metavar="T", required=True, help=TASK_HELP)
    add_source_arguments(parser)
    parser.add_argument("--output-dir", metavar="DIR", required=True, help="new folder to write")
    parser.set_defaults(run=run)


TASK_HELP = "pie-bench, depth, canny, segmentation, magicbrush, magicbrush-multi-turn, folder or sticker-edits"


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says where a benchmark comes from."""
    parser.add_argument("--source", metavar="PATH", help="folder or Hub id; default: the Hub id it is shared under")
    parser.add_argument("--allow-partial", action="store_true", help="do with a part of the benchmark; reports say so")
    parser.add_argument("--resolution", metavar="N", type=int, help="depth, canny, segmentation: pixels; default: 512")
    parser.add_argument("--tokenizer", metavar="M", help="sticker-edits: pipeline whose tokenizer sets the standard")


def run(args: argparse.Namespace) -> int:
    """Prepare the benchmark, and say what is in it."""
    from ...evaluation.tasks import prepare_benchmark

    benchmark = prepare_benchmark(
        args.task,
        args.output_dir,
        args.source,
        args.allow_partial,
        resolution=args.resolution,
        tokenizer=args.tokenizer,
    )
    print_contents(benchmark)
    return 0


def print_contents(benchmark) -> None:
    """Print how many samples there are, by category and size."""
    info = benchmark.info
    part = "" if info["is_complete"] else ", a part of the benchmark"
    print(f"{benchmark.folder}: {info['num_samples']} samples of {info['task']}{part}")
    for name in ("categories", "sizes"):
        print(f"{name}: {', '.join(f'{kind} {count}' for kind, count in info[name].items())}")
