"""Measure what a user of the sticker editor waits for: imports, loading, edits, and `editar-hf edit` as a whole.

Every sample is a fresh process with one thread (`startup_stages.py`): with all instructions of this CPU, and limited to
AVX2, in the dtype that a pipeline is loaded in on such a CPU. The tokens of all edits are compared. The results are
written to `results/startup.md`. The first round is not counted, so that all files are in memory:

    python benchmarks/bench_startup.py
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from report import describe_machine, format_range, format_table, run_sample, take_turns, write_result


ROOT = Path(__file__).parents[1]
# torch, MKL, oneDNN and FBGEMM each have a variable that limits their instructions.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
}
MODES = {"all instructions, bfloat16": {}, "AVX2, float32": AVX2}
# These stages are not part of a script with one edit.
EXTRAS = ("a later edit", "`pipe.pack_weights()`", "a later edit with packed weights")
EDIT = ("--image", ROOT / "projects/stickers/photo.png", "--prompt", "make the red circle blue", "--output")


def measure_children() -> float:
    """Measure the processor seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_command(*arguments: str | Path) -> tuple[float, float]:
    """Run `editar-hf`. Return its processor seconds and its wall-clock seconds."""
    before, start = measure_children(), time.perf_counter()
    program = Path(sys.executable).with_name("editar-hf")
    subprocess.run([program, *arguments], check=True, capture_output=True)
    return measure_children() - before, time.perf_counter() - start


def measure_script(*arguments: str) -> tuple[dict[str, float], list]:
    """Run `startup_stages.py`. Return the processor seconds of its stages, and the tokens of each edit."""
    before = measure_children()
    sample = run_sample(str(Path(__file__).with_name("startup_stages.py")), *arguments)
    seconds = sample["seconds"]
    seconds["start and end of the interpreter"] = measure_children() - before - sample["total"]
    seconds["**a script with one edit**"] = sum(spent for name, spent in seconds.items() if name not in EXTRAS)
    return seconds, sample["tokens"]


def measure_all(dtype: str, output: Path) -> tuple[dict[str, float], list]:
    """Measure the script and the commands once. Return their seconds, and the tokens of each edit."""
    seconds, tokens = measure_script(dtype)
    paused, _ = measure_script(dtype, "--pause-gc")
    seconds["the same, no garbage collection during imports"] = paused["**a script with one edit**"]
    edit = run_command("edit", "--model", ROOT / "projects/stickers/sticker-editor", "--dtype", dtype, *EDIT, output)
    seconds["**`editar-hf edit`**"], seconds["`editar-hf edit`, wall-clock time"] = edit
    seconds["`editar-hf env`"], _ = run_command("env")
    seconds["`editar-hf edit --help`"], _ = run_command("edit", "--help")
    return seconds, tokens


def measure(num_rounds: int) -> str:
    """Measure all modes in turn. Return the report as Markdown."""
    machine = describe_machine()
    samples, tokens = {mode: [] for mode in MODES}, {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        for mode in take_turns(MODES, num_rounds + 1):
            with patch.dict(os.environ, OMP_NUM_THREADS="1", **MODES[mode]):
                seconds, edits = measure_all(mode.split()[-1], Path(folder) / "edited.png")
            samples[mode].append(seconds)
            tokens[mode] += edits
    rows = []
    for stage in samples["AVX2, float32"][0]:  # It has all stages; packed weights compute in float32 only.
        columns = [[seconds[stage] for seconds in samples[mode][1:] if stage in seconds] for mode in MODES]
        rows.append([stage, *(format_range(column) if column else "" for column in columns)])
    if any(edit != edits[0] for edits in tokens.values() for edit in edits):
        raise SystemExit("The tokens of two edits with the same seed differ.")
    parts = [
        "# Time until the first picture",
        f"{machine} One thread; processor time in seconds, but for one row. Median (least – most) of {num_rounds} "
        "fresh processes, all files in memory. The pipeline is called as in the README, without the progress bar. In "
        "each column, all edits have the same tokens. Made by `python benchmarks/bench_startup.py`.",
        format_table(["stage", *MODES], rows),
    ]
    return "\n\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", metavar="N", type=int, default=3, help="processes per column (default: 3)")
    write_result("startup", measure(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
