"""The pages that users read, and how tests take the code out of them."""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# A code block, and before it where needed the reason why it cannot run in a test.
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)```", re.DOTALL)
PROGRAMS = (
    *("accelerate", "curl", "diffusers-cli", "editar-hf", "hf", "make", "pip", "python", "sglang", "torchrun", "vllm"),
)
# A program that appends its name and words to a file: a byte between words, another after the last.
STUB = """#!/bin/sh
{ printf '%s' "${0##*/}"; printf '\\037%s' "$@"; printf '\\036'; } >> "$CALLS"
"""


class Block(NamedTuple):
    """A code block of a page; `reason` says why it cannot run in a test, if it cannot."""

    code: str
    reason: str | None


def read_blocks(page: str, language: str) -> list[Block]:
    """Read the code blocks of a page, which is named by its path from the root of the repository."""
    found = BLOCK.finditer((ROOT / page).read_text())
    return [Block(block["code"], block["reason"]) for block in found if block["language"] == language]


def list_calls(page: str, folder: Path) -> list[list[str]]:
    """List what the shell blocks of a page call, in order: name and words of each program.

    A shell runs the blocks in `folder`, with programs that only write down what they are called with. So loops, line
    breaks and scripts are what they are for a user.
    """
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name in PROGRAMS:
        (programs / name).write_text(STUB)
        (programs / name).chmod(0o755)
    calls = folder / "calls"
    calls.write_text("")
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls)}
    script = "\n".join(block.code for block in read_blocks(page, "bash"))
    subprocess.run(["bash", "-euc", script], cwd=folder, env=environment, check=True)
    return [call.split("\037") for call in calls.read_text().split("\036")[:-1]]
