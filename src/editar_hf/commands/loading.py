"""Options that say which pipeline a command loads, and how."""

import argparse
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..pipelines.pipeline_editar import EditARPipeline


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--dtype` and `--device`."""
    add = parser.add_argument
    add("--model", metavar="M", required=True, help="pipeline folder or Hub id")
    dtype = "dtype of the weights; auto: that of the files; default: that of the files if this machine supports it"
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help=f"{dtype}, else float32")
    add("--device", metavar="D", help="device, such as cpu or cuda:1; default: the GPU if there is one")


def add_lora_option(parser: argparse.ArgumentParser) -> None:
    """Add `--lora`, for commands that use one adapter for all images."""
    parser.add_argument("--lora", metavar="L", help="folder or Hub id of a LoRA adapter")


def add_packing_option(parser: argparse.ArgumentParser) -> None:
    """Add `--no-pack-weights`, for commands that keep the pipeline for many images."""
    pack_weights = "on a CPU, do not pack the weights in 16 bits; packed weights are faster, and not used with --dtype"
    parser.add_argument("--no-pack-weights", dest="pack_weights", action="store_false", help=pack_weights)


def choose_packing(args: argparse.Namespace) -> None:
    """Unset `pack_weights` where weights cannot be packed, or where `--dtype` asks for other weights."""
    from ..packing import explain_missing_kernel

    is_cpu = choose_device(args).startswith("cpu")
    args.pack_weights &= is_cpu and args.dtype is None and explain_missing_kernel() is None


def check_device(args: argparse.Namespace) -> None:
    """Check that torch can use the device of `--device`."""
    if args.device is None:
        return
    import torch

    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises an `AssertionError`.
        raise ValueError(f"`--device` is {args.device!r}, which torch cannot use here: {error}") from error


def load_pipeline(args: argparse.Namespace) -> "EditARPipeline":
    """Load the pipeline, and the adapter of `--lora`. The arguments need `pack_weights` too."""
    from . import import_pipeline

    import_pipeline()
    import torch

    from ..pipelines.pipeline_editar import EditARPipeline

    dtype = args.dtype
    if args.pack_weights and dtype is None:
        # Packing does not need float32 weights, except to fuse an adapter without rounding to bfloat16.
        dtype = "auto" if args.lora is None else "float32"
    dtype = dtype if dtype in (None, "auto") else getattr(torch, dtype)
    pipeline = EditARPipeline.from_pretrained(args.model, dtype=dtype)
    if args.lora is not None:
        pipeline.load_lora_weights(args.lora)
    if args.pack_weights:
        if args.lora is not None:
            pipeline.fuse_lora()
        pipeline.pack_weights()
        pipeline.to(torch.float32)  # The VQ model, which is not packed.
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(choose_device(args))


def choose_device(args: argparse.Namespace) -> str:
    """Return the device of `--device`; by default, the GPU if there is one."""
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")
