"""Run the benchmarks, then train the scene editor, on a GPU that is available for some minutes.

    bash benchmarks/gpu_slot.sh --stages benchmarks
    bash benchmarks/gpu_slot.sh --stages training --bank bank --editor examples/scene-editor --vq-minutes 0 \
        --editor-minutes 8.5 --slots 300 --compile editor
    bash benchmarks/gpu_slot.sh --rehearse --stages benchmarks    # tiny sizes on the CPU

`gpu_slot.sh` unpacks the files that `make wheels` packed, and starts this script. Options that this script does not
know are passed to `projects/scenes/train.py`. Each stage is a separate process, so the next stage runs even if one
fails.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]
# The benchmarks are killed if they exceed `--seconds` by this number of seconds. They need some time to start and stop.
GRACE = 20


def run_stage(name: str, words: list[str], seconds: float | None = None) -> bool:
    """Run a stage as `python *words`, for at most `seconds`. Return whether it succeeded."""
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
    seconds_help = f"time for all benchmarks together; they are killed {GRACE} s after it"
    parser.add_argument("--seconds", type=float, default=130, help=seconds_help)
    parser.add_argument("--output-dir", "--output_dir", type=Path, required=True, help="folder for results")
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
