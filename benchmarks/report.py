"""Functions that the benchmarks share: describe the machine, time calls in turn, and write results."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


RESULTS = Path(__file__).parent / "results"


def describe_machine() -> str:
    """Describe the device, the library versions, the date, and whether other work ran on the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    device = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}; host: {device}"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "diffusers"))
    load = os.getloadavg()[0]
    other_work = f"Other work ran on the machine (load {load:.1f} at the start)." if load > 0.5 else "Nothing else ran."
    return f"Device: {device}. Python {platform.python_version()}, {versions}. {date.today()}. {other_work}"


# Measuring


def time_call(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Time a call. Return the seconds and its result.

    On a CPU, processor time is measured; on a GPU, wall-clock time until the GPU has finished.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    synchronize = torch.cuda.synchronize if device != "cpu" else lambda: None
    synchronize()
    start = clock()
    result = call()
    synchronize()
    return clock() - start, result


def take_turns(names: Iterable[str], num_rounds: int) -> Iterator[str]:
    """Yield all names in order, then all names in reverse order, and so on, for `num_rounds` rounds."""
    for turn in range(num_rounds):
        yield from list(names)[:: -1 if turn % 2 else 1]


def time_in_turn(calls: dict[str, Callable], num_rounds: int, device: str) -> tuple[dict[str, list[float]], dict]:
    """Time several calls in turn. Return the seconds of each call in each round, and the last result of each call."""
    seconds, results = {name: [] for name in calls}, {}
    for name in take_turns(calls, num_rounds):
        spent, results[name] = time_call(calls[name], device)
        seconds[name].append(spent)
    return seconds, results


def run_sample(script: str, *words: str, is_one_thread: bool = True) -> dict:
    """Run `python script *words` in a separate process, and parse the JSON in its last line of output."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if is_one_thread else {}
    command = [sys.executable, "-W", "ignore", script, *words]
    result = subprocess.run(command, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def measure_peak_memory() -> float:
    """Measure the peak memory of this process in GiB, on Linux. `getrusage` would include the peak of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(peak) / 2**20


def measure_matrix_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Measure the FLOP per second of a product of square matrices. On a CPU, processor time is measured."""
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = min(time_call(lambda: [left @ right for _ in range(3)], device)[0] for _ in range(4))
    return 3 * 2 * size**3 / seconds


# Writing


def format_range(values: list[float], digits: str = ".2f") -> str:
    """Format values as median (least – most)."""
    return f"{statistics.median(values):{digits}} ({min(values):{digits}} – {max(values):{digits}})"


def format_ratios(values: list[float], bases: list[float]) -> str:
    """Format the ratios of two lists, round by round, as median (least – most)."""
    return format_range([value / base for value, base in zip(values, bases, strict=True)])


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Format a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_result(name: str, text: str):
    """Write `results/<name>.md` and print it."""
    (RESULTS / f"{name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    print(text)
