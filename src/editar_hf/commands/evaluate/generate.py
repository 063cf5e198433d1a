"""`editar-hf evaluate generate`: the predictions of one system for a prepared benchmark; resumable."""

import argparse


# Options of systems, by the name of the field; which system has which, `evaluation/systems.py` says.
SYSTEM_OPTIONS = {
    "model": {"metavar": "M", "help": "pipeline of the system, a folder or Hub id"},
    "lora": {"metavar": "L", "help": "editar: an adapter, a folder or Hub id"},
    "use_masks": {
        "action": "store_true",
        "default": None,
        "help": "editar: give it the benchmark's masks; mask-assisted, not comparable",
    },
    "guidance_scale": {"metavar": "X", "type": float, "help": "weight of the prompt"},
    "image_guidance_scale": {"metavar": "X", "type": float, "help": "weight of the source image"},
    "do_sample": {"action": argparse.BooleanOptionalAction, "help": "editar: sample, or decode greedily"},
    "temperature": {"metavar": "X", "type": float, "help": "editar: of the sampling"},
    "top_k": {"metavar": "N", "type": int, "help": "editar: sample among so many codes"},
    "top_p": {"metavar": "X", "type": float, "help": "editar: sample among codes of so much probability"},
    "dtype": {"metavar": "D", "help": "float32, bfloat16 or float16; default: float32"},
    "quantize": {"metavar": "Q", "help": "editar: round, or truncate as the reference's arrays; default: round"},
    "num_inference_steps": {"metavar": "N", "type": int, "help": "of diffusers' pipelines"},
    "controlnet": {"metavar": "M", "help": "controlnet: the ControlNet, a folder or Hub id"},
    "reconstruct": {"metavar": "R", "help": "vq-reconstruction: source or target; default: source"},
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the step to the parser of `editar-hf evaluate`."""
    summary = "make the predictions of a system that are not there yet"
    parser = subparsers.add_parser("generate", help=summary, description=f"{summary.capitalize()}.")
    parser.add_argument("--data", metavar="DIR", required=True, help="what `prepare` wrote")
    add_system_arguments(parser)
    parser.add_argument("--output-dir", metavar="DIR", required=True, help="the run's folder")
    parser.set_defaults(run=run)


def add_system_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how predictions are made."""
    systems = "editar, instruct-pix2pix, controlnet, copy-source or vq-reconstruction"
    parser.add_argument("--system", metavar="S", default="editar", help=f"{systems}; default: editar")
    for name, settings in SYSTEM_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=1, help="samples at a time; default, as published: 1"
    )


def run(args: argparse.Namespace) -> int:
    """Make the predictions that are missing."""
    from ...evaluation.runs import generate
    from ...evaluation.samples import Benchmark
    from ...evaluation.systems import build_system

    system = build_system(args.system, **{name: getattr(args, name) for name in SYSTEM_OPTIONS})
    generate(Benchmark(args.data), system, args.output_dir, args.seed, args.batch_size)
    return 0
