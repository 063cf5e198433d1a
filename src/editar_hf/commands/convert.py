"""`editar-hf convert`: convert published EditAR files to a pipeline folder, and back."""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `editar-hf convert` to the command's parser."""
    summary = "convert published EditAR files to a pipeline folder, or back"
    description = (
        "Convert published EditAR files to a pipeline folder, or back. Files that you do not pass are downloaded from "
        "the Hub. At the end, the command runs the self-check of `editar-hf check`, and warns if it fails."
    )
    parser = subparsers.add_parser("convert", help=summary, description=description)
    add = parser.add_argument
    add("--transformer", metavar="FILE", help="file of the decoder; default: EditAR's published decoder")
    add("--vq-model", metavar="FILE", help="file of the VQ model; default: LlamaGen's published VQ-16")
    add("--text-encoder", metavar="ID", help="folder or Hub id of a T5 text encoder; default: google/flan-t5-xl")
    add("--output-dir", metavar="DIR", required=True, help="folder to write; it must be new or empty")
    add("--license", metavar="ID", help="license of the weights for the model card, such as apache-2.0; default: none")
    heads = "attention heads of the decoder; default: width / 64, or width / 100 if the width is 3200"
    add("--num-attention-heads", metavar="N", type=int, help=heads)
    grid_size = "tokens per side of an image; only if --transformer is a text-to-image decoder of LlamaGen"
    add("--grid-size", metavar="N", type=int, help=grid_size)
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, help="dtype of the weights; default: that of the files")
    add("--push-to-hub", metavar="ID", help="also upload the folder to this repository; needs --license")
    private: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": True}
    add("--hub-private-repo", **private, help="make a new repository private (default), or public")
    add("--reverse", action="store_true", help="convert back: write editar.pt and vq.pt from the pipeline --model")
    add("--model", metavar="M", help="pipeline folder or Hub id to convert back; only with --reverse")
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
    """Check that the options belong to the direction of the conversion, and that an upload has a license."""
    forward_only = ("transformer", "vq_model", "text_encoder", "license")
    forward_only += ("num_attention_heads", "grid_size", "dtype", "push_to_hub")
    for name in forward_only if args.reverse else ("model",):
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            advice = "leave it out with" if args.reverse else "pass it only with"
            raise ValueError(f"`{option}` is {getattr(args, name)}; {advice} `--reverse`.")
    if args.reverse and args.model is None:
        raise ValueError("`--model` is missing; pass the pipeline that `--reverse` converts back.")
    if args.grid_size is not None and args.transformer is None:
        raise ValueError(
            f"`--grid-size` is {args.grid_size} without `--transformer`; pass the file of a LlamaGen text-to-image "
            "decoder as `--transformer`, or leave `--grid-size` out."
        )
    if args.push_to_hub is not None and args.license is None:
        raise ValueError("`--license` is missing; pass the license under which the weights may be shared on the Hub.")
    if args.push_to_hub is not None and args.push_to_hub.count("/") != 1:
        raise ValueError(f"`--push-to-hub` is {args.push_to_hub}; pass a full id, `owner/name`, for the model card.")


def convert(args: argparse.Namespace) -> int:
    """Convert, run the self-check, write the folder with its model card, and upload it with `--push-to-hub`."""
    import torch

    from ..conversion import PUBLISHED_TEXT_ENCODER, PUBLISHED_TRANSFORMER, PUBLISHED_VQ_MODEL, convert_pipeline
    from ..io import atomic_path
    from ..pipelines.hub import CARD_FILE, create_repository, make_card, upload_folder
    from ..self_check import check_pipeline

    output_dir = Path(args.output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"`output_dir` is {output_dir}, which already exists and is not empty; pass a new folder.")
    if args.push_to_hub is not None:
        create_repository(args.push_to_hub, args.hub_private_repo)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    files = args.transformer, args.vq_model, args.text_encoder
    pipeline = convert_pipeline(*files, args.num_attention_heads, dtype, args.grid_size)
    report, is_start = check_pipeline(pipeline), args.grid_size is not None
    sources = {
        "decoder": args.transformer or "{repo_id}, {filename}".format(**PUBLISHED_TRANSFORMER),
        "VQ model": args.vq_model or "{repo_id}, {filename}".format(**PUBLISHED_VQ_MODEL),
        "text encoder": args.text_encoder or PUBLISHED_TEXT_ENCODER,
    }
    # For local files and folders, the card gives only the name, not the path.
    sources = {part: Path(source).name if Path(source).exists() else source for part, source in sources.items()}
    facts: dict[str, Any] = {"sources": sources, "self_check": report.to_markdown(), "is_start": is_start}
    card = make_card("converted", args.push_to_hub or output_dir.name, license=args.license, **facts)
    with atomic_path(output_dir) as unfinished:
        pipeline.save_pretrained(unfinished)
        (unfinished / CARD_FILE).write_text(card, encoding="utf-8")
    print(f"{report.to_markdown()}\n\nWrote {output_dir}")
    if args.license is None:
        print("The model card names no license, because --license was not given.")
    if is_start:
        print(
            "This pipeline cannot edit yet: it is the start for training. The null image embedding and the "
            "distillation head are new, with random weights."
        )
    elif not report.passed:
        print(
            "\nWARNING: THE SELF-CHECK FAILED. The files were converted, but they do not behave like trained weights.\n"
            "Training may be incomplete, the files may not belong together, or --num-attention-heads may be wrong.",
            file=sys.stderr,
        )
    if args.push_to_hub is not None:
        print(f"Uploaded {upload_folder(output_dir, args.push_to_hub, private=args.hub_private_repo)}")
    return 0
