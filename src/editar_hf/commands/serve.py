"""`editar-hf serve`: serve a pipeline over HTTP, with OpenAI's image API."""

import argparse
import os
import re
from typing import TYPE_CHECKING

from .loading import add_loading_options, add_packing_option, check_device, choose_packing, load_pipeline


if TYPE_CHECKING:
    from ..pipelines.pipeline_editar import EditARPipeline

# The variable of the environment that holds the API key. Other users can see the arguments of a process.
API_KEY = "EDITAR_HF_API_KEY"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `editar-hf serve` to the command's parser."""
    summary = "serve a pipeline over HTTP, with OpenAI's image API"
    description = (
        f"{summary[0].upper()}{summary[1:]}: POST /v1/images/edits and /v1/images/generations, GET /v1/models, /health "
        "and /metrics. Requests that wait together and have the same size and settings run in one batch. Needs the "
        "extra `serve`."
    )
    parser = subparsers.add_parser("serve", help=summary, description=description)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add_loading_options(parser)
    lora = "folder or Hub id of a LoRA adapter: for all images, or with a NAME, for requests that choose it; repeatable"
    add("--lora", metavar="[NAME=]L", action="append", default=[], help=lora)
    host = "address to listen on (default: 127.0.0.1, which only this machine can reach)"
    add("--host", metavar="H", default="127.0.0.1", help=host)
    add("--port", metavar="P", type=int, default=8000, help="port to listen on (default: 8000)")
    add("--max-batch-size", metavar="N", type=int, default=8, help="images that are made together (default: 8)")
    max_queue = "images that may wait beside one batch; further requests get status 429 (default: 64)"
    add("--max-queue", metavar="N", type=int, default=64, help=max_queue)
    api_key = f"key that clients must send; better pass it in the environment variable {API_KEY}"
    add("--api-key", metavar="K", default=os.environ.get(API_KEY), help=api_key)
    add_packing_option(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until the process is interrupted. Then finish the requests that have begun."""
    try:
        import uvicorn

        from ..serving.app import create_app
    except ImportError as error:
        raise ValueError(f"{error}; install the extra `serve`: run `pip install 'editar-hf[serve]'`.") from error
    import logging
    from contextlib import suppress
    from pathlib import Path

    from ..pipelines.hub import check_folder_or_hub_id
    from ..serving.worker import Worker

    check_folder_or_hub_id(args.model, "model")
    args.lora, loras = read_loras(args.lora)
    for path in filter(None, (args.lora, *loras.values())):
        check_folder_or_hub_id(path, "--lora")
    check_device(args)
    logger = logging.getLogger("editar_hf.serving")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler())
    if args.api_key is None and args.host not in ("127.0.0.1", "localhost", "::1"):
        logger.warning("There is no API key, so everyone who can reach %s can use this server.", args.host)
    choose_packing(args)

    def stop() -> None:
        server.should_exit = True

    name = Path(args.model).resolve().name if Path(args.model).is_dir() else args.model
    worker = Worker(lambda: load_with_adapters(args, loras), args.max_batch_size, stop, tuple(loras))
    app = create_app(worker, name, args.api_key, args.max_queue)
    server = uvicorn.Server(uvicorn.Config(app, args.host, args.port, access_log=False))
    try:
        with suppress(KeyboardInterrupt):
            server.run()
    finally:
        worker.close()  # A second Ctrl-C has abandoned all jobs; Python cannot end while torch computes.
    if worker.error is not None:
        raise worker.error
    return 0


def read_loras(options: list[str]) -> tuple[str | None, dict[str, str]]:
    """Read the values of `--lora`: the adapter of all images, or the adapters that requests choose, by name."""
    matches = [re.fullmatch(r"(?:([\w-]+)=)?(.+)", option) for option in options]
    loras = {match[1]: match[2] for match in matches if match is not None}
    if len(loras) < len(options) or (None in loras and len(loras) > 1):
        raise ValueError(
            f"`--lora` is given as {', '.join(map(repr, options))}; pass one adapter for all images, or adapters with "
            "different names as NAME=ADAPTER."
        )
    return loras.pop(None, None), loras


def load_with_adapters(args: argparse.Namespace, loras: dict[str, str]) -> "EditARPipeline":
    """Load the pipeline with the adapters that requests choose."""
    if not loras:
        return load_pipeline(args)
    # Adapters must be loaded before the weights are packed, and into float32 weights to keep their own precision.
    how = {"pack_weights": False, "dtype": "float32" if args.pack_weights else args.dtype}
    pipeline = load_pipeline(argparse.Namespace(**{**vars(args), **how}))
    for name, adapter in loras.items():
        pipeline.load_lora_weights(adapter, adapter_name=name)
    if args.pack_weights:
        pipeline.pack_weights()
    return pipeline
