"""`editar-hf app`: edit images in a browser."""

import argparse

from .loading import (
    add_loading_options,
    add_lora_option,
    add_packing_option,
    check_device,
    choose_packing,
    load_pipeline,
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `editar-hf app` to the command's parser."""
    summary = "edit images in a browser"
    description = (
        f"{summary.capitalize()}: upload an image, brush over the part that may change, and say what to change. "
        "--image and --prompt are the example that the app shows at the start. Needs the extra `app`."
    )
    parser = subparsers.add_parser("app", help=summary, description=description)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add_loading_options(parser)
    add_lora_option(parser)
    add("--image", metavar="FILE", help="image of the example")
    add("--prompt", metavar="P", default="", help="instruction of the example")
    host = "address to listen on (default: 127.0.0.1, which only this machine can reach)"
    add("--host", metavar="H", default="127.0.0.1", help=host)
    add("--port", metavar="P", type=int, default=7860, help="port to listen on (default: 7860)")
    add_packing_option(parser)


def run(args: argparse.Namespace) -> int:
    """Run the app until the process is interrupted."""
    try:
        from ..serving.gradio_app import Example, create_demo, launch_demo
    except ImportError as error:
        raise ValueError(f"{error}; install the extra `app`: run `pip install 'editar-hf[app]'`.") from error
    from ..image_processing_editar import open_image
    from ..pipelines.hub import check_folder_or_hub_id

    check_folder_or_hub_id(args.model, "model")
    check_device(args)
    if args.image is None and args.prompt:
        raise ValueError(f"`--prompt` is {args.prompt!r} without `--image`; pass the image of the example too.")
    choose_packing(args)
    examples = [] if args.image is None else [Example(open_image(args.image, "image"), args.prompt)]
    demo = create_demo(load_pipeline(args), examples)
    print(f"The app starts at http://{args.host}:{args.port}. Press Ctrl-C to stop it.", flush=True)
    launch_demo(demo, server_name=args.host, server_port=args.port, quiet=True)
    return 0
