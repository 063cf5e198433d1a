"""The `editar-hf` command. Each sub-command has one module in this package.

At its top, the module of a sub-command imports only the standard library, so that `editar-hf --help` is fast. The
module has two functions:

* `add_parser(subparsers)` adds the parser and its arguments, and calls `parser.set_defaults(run=run)`;
* `run(args)` imports torch and transformers, does the work, and returns the exit status: 0 for success, 1 for a
  negative result, such as a self-check that failed.

Input that cannot be used raises `ValueError`, `TypeError` or `OSError`. The command prints the error as one line,
`editar-hf: error: ...`, and returns exit status 2. argparse returns the same status for invalid arguments.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from functools import cache

from .. import __version__
from . import app, check, convert, edit, env, evaluate, serve


# In the order of `editar-hf --help`.
COMMANDS = (edit, app, serve, convert, check, evaluate, env)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `editar-hf` with all its sub-commands."""
    parser = argparse.ArgumentParser(prog="editar-hf", description="Edit images by instruction with EditAR.")
    parser.add_argument("--version", action="version", version=f"editar-hf {__version__}")
    subparsers = parser.add_subparsers(metavar="command", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


@cache
def import_pipeline() -> None:
    """Import `EditARPipeline` without garbage collection, for commands that often take only some seconds.

    torch, transformers and diffusers create about a million objects that live as long as the process. The collector
    would visit these objects several times during the imports and again at the end of the process, in vain.
    """
    gc.disable()
    try:
        from ..pipelines import pipeline_editar  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command in `argv` (*defaults to* the arguments of the process) and return the exit status.

    Raises:
        SystemExit: With status 2 if the arguments are invalid, with status 0 after `--help` or `--version`.
    """
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (OSError, TypeError, ValueError) as error:
        message = " ".join(str(error).split("\n"))  # Errors of other libraries can have several lines.
        print(f"editar-hf: error: {message}", file=sys.stderr)
        return 2
