"""`editar-hf convert`: convert published EditAR files to a pipeline folder, and back."""

import argparse
import sys
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from pathlib import Path

    from ..self_check import SelfCheckReport


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `editar-hf convert` to the command's parser."""
    summary = "convert published EditAR files to a pipeline folder, or back"
    description = (
        "Convert published EditAR files to a pipeline folder, or back. Files that you do not name are downloaded from "
        "the Hub. The command ends with the self-check of `editar-hf check`, and warns if it fails."
    )
    parser = subparsers.add_parser("convert", help=summary, description=description)
    parser.add_argument(
        "--transformer", metavar="FILE", help="file of the decoder; default: EditAR's published decoder"
    )
    parser.add_argument("--vq-model", metavar="FILE", help="file of the VQ model; default: LlamaGen's published VQ-16")
    parser.add_argument(
        "--text-encoder", metavar="ID", help="folder or Hub id of a T5 text encoder; default: google/flan-t5-xl"
    )
    parser.add_argument("--output-dir", metavar="DIR", required=True, help="folder to write; it must be new or empty")
    parser.add_argument(
        "--license",
        metavar="ID",
        help="licence of the weights for the model card, such as apache-2.0; default: the card states no licence",
    )
    parser.add_argument(
        "--num-attention-heads",
        metavar="N",
        type=int,
        help="attention heads of the decoder; default: width / 64, or width / 100 if the width is 3200",
    )
    parser.add_argument(
        "--grid-size",
        metavar="N",
        type=int,
        help="tokens per side of an image; only if --transformer is a text-to-image decoder of LlamaGen",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the weights; default: that of the files"
    )
    parser.add_argument(
        "--push-to-hub", metavar="ID", help="also upload the folder to this repository; needs --license"
    )
    parser.add_argument(
        "--hub-private-repo",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="make a new repository private (default), or public",
    )
    parser.add_argument(
        "--reverse", action="store_true", help="convert back: write editar.pt and vq.pt from the pipeline --model"
    )
    parser.add_argument("--model", metavar="M", help="pipeline folder or Hub id to convert back; only with --reverse")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert to a pipeline folder, or back with `--reverse`."""
    check_arguments(args)
    if args.reverse:
        from ..conversion import revert_pipeline

        revert_pipeline(args.model, args.output_dir)
        print(f"Wrote {args.output_dir}")
        return 0
    return convert(args)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse options of the other direction, and an upload without a licence."""
    forward_only = ("transformer", "vq_model", "text_encoder", "license")
    forward_only += ("num_attention_heads", "grid_size", "dtype", "push_to_hub")
    for name in forward_only if args.reverse else ("model",):
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            advice = "leave it out with" if args.reverse else "it goes with"
            raise ValueError(f"`{option}` is {getattr(args, name)}; {advice} `--reverse`.")
    for name in ("transformer", "vq_model", "text_encoder", "model"):
        if getattr(args, name) == "":
            raise ValueError(f"`--{name.replace('_', '-')}` is empty; give a name, or leave it out.")
    if args.reverse and args.model is None:
        raise ValueError("`--model` is missing; name the pipeline that `--reverse` is to convert.")
    if args.grid_size is not None and args.transformer is None:
        raise ValueError("`--grid-size` goes with `--transformer`, the file of a LlamaGen text-to-image decoder.")
    if args.push_to_hub is not None and args.license is None:
        raise ValueError("`--license` is missing; say under which licence the weights may be shared on the Hub.")
    if args.push_to_hub is not None and args.push_to_hub.count("/") != 1:
        raise ValueError(f"`--push-to-hub` is {args.push_to_hub}; give a full id, owner and name, for the card to say.")


def convert(args: argparse.Namespace) -> int:
    """Convert, check, write the folder with its card, and upload it where asked to."""
    from pathlib import Path

    import torch

    from .. import conversion
    from ..pipelines.hub import upload_folder
    from ..self_check import check_pipeline

    output_dir = Path(args.output_dir)
    conversion.check_output_dir(output_dir)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    sources = {part: getattr(args, part) for part in ("transformer", "vq_model", "text_encoder")}
    pipeline = conversion.convert_pipeline(
        **sources, num_attention_heads=args.num_attention_heads, dtype=dtype, grid_size=args.grid_size
    )
    report = check_pipeline(pipeline)
    name, is_start = args.push_to_hub or output_dir.name, args.grid_size is not None
    described = conversion.describe_sources(**sources)
    card = conversion.compose_card(name, described, report.to_markdown(), args.license, is_start)
    conversion.save_pipeline(pipeline, output_dir, card)
    print_outcome(output_dir, report, args.license, is_start)
    if args.push_to_hub is not None:
        print(f"Uploaded {upload_folder(output_dir, args.push_to_hub, private=args.hub_private_repo)}")
    return 0


def print_outcome(output_dir: "Path", report: "SelfCheckReport", license: str | None, is_start: bool) -> None:
    """Say what was written, what the self-check found and what the card leaves open."""
    print(f"{report.to_markdown()}\n\nWrote {output_dir}")
    if license is None:
        print("The card names no licence: none was given with --license.")
    if is_start:
        from ..conversion import describe_new_parts

        print(f"A start for training, which cannot edit yet. New, and drawn at random: {describe_new_parts()}.")
    elif not report.passed:
        print(
            "\nWARNING: THE SELF-CHECK FAILED. The files were converted, but do not behave like trained weights:\n"
            "training may be unfinished, the parts may not belong together, or --num-attention-heads may be wrong.",
            file=sys.stderr,
        )
