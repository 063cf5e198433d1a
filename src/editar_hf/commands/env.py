"""`editar-hf env`: print versions, devices, the default dtype and weight formats for a bug report."""

import argparse
import os
import platform
import re
from importlib import metadata

from .. import __version__


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `editar-hf env` to the command's parser."""
    summary = "print versions, devices, the default dtype and weight formats, for bug reports"
    parser = subparsers.add_parser("env", help=summary, description=f"{summary.capitalize()}.")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print one line for each version and each device, one for the dtype, and one for packed weights."""
    rows = [
        ("editar-hf", __version__),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        *((package, describe_version(package)) for package in list_requirements()),
        *describe_devices(),
        ("dtype", describe_dtype()),
        ("16-bit-weights", describe_packing()),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


def list_requirements() -> list[str]:
    """List the packages that this package requires, each once: first the core ones, then those of the extras."""
    names = [re.split(r"[^\w.-]", requirement)[0] for requirement in metadata.requires("editar-hf") or []]
    return [name for name in dict.fromkeys(names) if name != "editar-hf"]


def describe_version(package: str) -> str:
    """Return the version of a package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def describe_devices() -> list[tuple[str, str]]:
    """List the CPU and every accelerator that torch can use, with its memory in GiB."""
    import torch

    cores, threads = os.cpu_count(), torch.get_num_threads()
    rows = [
        ("cpu", f"{platform.machine()}, {cores} cores, {threads} torch threads"),
        ("cuda", torch.version.cuda or "not in this build of torch"),
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    if torch.backends.mps.is_available():
        rows.append(("mps", "available"))
    return rows


def describe_dtype() -> str:
    """Describe in which dtype this machine loads a pipeline whose weights are stored in bfloat16, and why."""
    import torch

    from ..pipelines.dtypes import choose_dtype

    dtype, reason = choose_dtype([torch.bfloat16])
    return f"{str(dtype or torch.bfloat16).removeprefix('torch.')} for weights stored in bfloat16; {reason}"


def describe_packing() -> str:
    """Say whether this machine can decode with packed 16-bit weights (`pack_weights`), and if not, why."""
    from ..packing import explain_missing_kernel

    reason = explain_missing_kernel()
    return "available" if reason is None else f"not available: {reason}"
