"""Benchmarks, then the training of the scene editor, on a GPU that is at hand for some minutes.

    bash benchmarks/gpu_slot.sh --stages benchmarks
    bash benchmarks/gpu_slot.sh --stages benchmarks training --seconds 120 --bank bank --text-encoder FOLDER \
        --features FILE --vq-minutes 2.5 --editor-minutes 4
    bash benchmarks/gpu_slot.sh --rehearse --stages benchmarks    # tiny sizes on the CPU

`gpu_slot.sh` unpacks what `make wheels` packed and starts this. Options that are unknown here go to
`projects/scenes/train.py`. Each stage is a process of its own: one that fails does not end the next.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]
# How much longer than asked for the benchmarks may take before they are killed, in seconds: to start, and to stop.
GRACE = 45


def run_stage(name: str, words: list[str], seconds: float | None = None) -> bool:
    """Run a stage as `python *words`, for so many seconds at most; tell how it ended."""
    print(f"==== {name}: python {' '.join(words)}", flush=True)
    start = time.monotonic()
    try:
        code = subprocess.run([sys.executable, *words], cwd=ROOT, timeout=seconds, check=False).returncode
        outcome = f"exit code {code}"
    except subprocess.TimeoutExpired:
        code, outcome = 1, "killed, out of time"
    print(f"==== {name}: {outcome}, {time.monotonic() - start:.0f} s", flush=True)
    return code == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--stages", nargs="+", choices=("benchmarks", "training"), default=["benchmarks", "training"])
    parser.add_argument("--seconds", type=float, default=130, help="for all benchmarks together")
    parser.add_argument("--output-dir", "--output_dir", type=Path, required=True, help="for the results of all stages")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    args, training_words = parser.parse_known_args()
    output_dir, rehearse = args.output_dir.absolute(), ["--rehearse"] if args.rehearse else []
    if training_words and "training" not in args.stages:
        parser.error(f"`{' '.join(training_words)}` is for the stage `training`; add it to `--stages`.")
    is_good = True
    if "benchmarks" in args.stages:
        words = ["benchmarks/bench_gpu.py", "--output_dir", str(output_dir), "--seconds", f"{args.seconds:g}"]
        words += rehearse
        is_good &= run_stage("benchmarks", words, args.seconds + GRACE)
    if "training" in args.stages:
        words = ["projects/scenes/train.py", *training_words, "--output_dir", str(output_dir / "training"), *rehearse]
        is_good &= run_stage("training", words)
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
