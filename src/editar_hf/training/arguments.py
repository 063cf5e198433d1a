"""Command-line arguments of the training scripts."""

import sys
import warnings
from dataclasses import fields
from typing import TypeVar

from transformers import HfArgumentParser


Arguments = TypeVar("Arguments")


def parse_arguments(dataclass_type: type[Arguments]) -> Arguments:
    """Parse the command line into a dataclass. Flags are spelled `--with-hyphens` or `--with_underscores`.

    Old names of a flag are the `aliases` in its field's metadata; a `FutureWarning` names the new one.
    """
    (arguments,) = HfArgumentParser(dataclass_type).parse_args_into_dataclasses()
    typed = {word.partition("=")[0] for word in sys.argv[1:]}
    for field in fields(dataclass_type):
        for old in typed.intersection(field.metadata.get("aliases", ())):
            new = f"--{field.name.replace('_', '-')}"
            warnings.warn(f"{old} is now called {new}; the next version removes {old}.", FutureWarning, stacklevel=2)
    return arguments
