"""The `editar-hf` command: one module of this package per sub-command.

A sub-command's module imports only the standard library at its top, so that `editar-hf --help` answers at once, and
has two functions:

* `add_parser(subparsers)` adds its parser and its arguments, and ends with `parser.set_defaults(run=run)`;
* `run(args)` does the work, with its heavy imports inside, and returns the exit status: 0 when it is done, 1 when it is
  done and the answer is no (a self-check that failed).

Input that cannot be used raises `ValueError`, `TypeError` or `OSError`. The user sees it as one line,
`editar-hf: error: ...`, and gets exit status 2, as for arguments argparse refuses.
"""

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from . import check, convert, edit, env, evaluate


# In the order of `editar-hf --help`.
COMMANDS = (edit, convert, check, evaluate, env)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `editar-hf` with all its sub-commands."""
    parser = argparse.ArgumentParser(prog="editar-hf", description="Edit images by instruction with EditAR.")
    parser.add_argument("--version", action="version", version=f"editar-hf {__version__}")
    subparsers = parser.add_subparsers(metavar="command", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command named in `argv` (default: the process's arguments) and return the exit status.

    Raises:
        SystemExit: With status 2 if the arguments do not fit, with 0 after `--help` or `--version`.
    """
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (OSError, TypeError, ValueError) as error:
        message = " ".join(str(error).split("\n"))  # one line, whoever wrote it
        print(f"editar-hf: error: {message}", file=sys.stderr)
        return 2
