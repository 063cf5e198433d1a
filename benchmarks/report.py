"""What every benchmark writes: where it ran, tables, a file in `results/`."""

import os
import platform
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


RESULTS = Path(__file__).parent / "results"


def describe_machine() -> str:
    """Name the device, the load beside the benchmark, the versions and the day that the figures stand for."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    device = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, beside {device}"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "diffusers"))
    load = os.getloadavg()[0]
    beside = f"Other work ran on the machine (load {load:.1f} at the start)." if load > 0.5 else "Nothing else ran."
    return f"Device: {device}. Python {platform.python_version()}, {versions}. {date.today()}. {beside}"


def time_call(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Time a call and return its result too: processor time on a CPU; on a GPU, the clock until its work is done."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    synchronise = torch.cuda.synchronize if device != "cpu" else lambda: None
    synchronise()
    start = clock()
    result = call()
    synchronise()
    return clock() - start, result


def measure_peak_memory() -> float:
    """Measure the most memory this process has held, in GiB, on Linux; `getrusage` would begin with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(peak) / 2**20


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_result(name: str, text: str):
    """Write `results/<name>.md` and print it."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    print(text)
