"""Measure the time and the peak memory of `editar-hf convert` at the published size, in both directions.

The script writes files in the published format with random bf16 weights: GPT-XL, VQ-16, and an encoder with the
configuration of FLAN-T5-XL. Separate processes convert them, self-check included, and convert them back. All tensors
are then compared bit for bit, and the results are written to `results/conversion.md`. The script needs about 10 GB of
disk and no network:

    python benchmarks/bench_conversion.py
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from report import describe_machine, format_table, write_result
from transformers import T5Config, T5EncoderModel

from editar_hf import EditARConfig, EditARForConditionalGeneration, EditARVQConfig, EditARVQModel
from editar_hf.conversion import (
    CODEBOOK_USAGE_KEY,
    REVERTED_TRANSFORMER,
    REVERTED_VQ_MODEL,
    revert_transformer_weights,
    revert_vq_weights,
)
from editar_hf.training.tokenizer import train_tokenizer


TRANSFORMER = EditARConfig.from_preset("GPT-XL")
VQ_MODEL = EditARVQConfig()
# Source: the configuration of google/flan-t5-xl.
TEXT_ENCODER = {
    "vocab_size": 32128,
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_layers": 24,
    "num_heads": 32,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


def write_random_files(folder: Path):
    """Write the files of the three networks. Random weights have the standard deviation of freshly built networks."""
    with torch.device("meta"):
        networks = {
            REVERTED_TRANSFORMER: revert_transformer_weights(EditARForConditionalGeneration(TRANSFORMER)),
            REVERTED_VQ_MODEL: revert_vq_weights(EditARVQModel(VQ_MODEL)),
        }
    for name, shapes in networks.items():
        weights = {key: torch.randn(tensor.shape, dtype=torch.bfloat16) * 0.02 for key, tensor in shapes.items()}
        torch.save({"model": weights}, folder / name)
    text_encoder = T5EncoderModel._from_config(T5Config(**TEXT_ENCODER), dtype=torch.bfloat16)
    text_encoder.save_pretrained(folder / "text_encoder")
    train_tokenizer(["add a large red circle in the middle"], vocab_size=120).save_pretrained(folder / "text_encoder")


def run_command(*arguments: str) -> tuple[float, float]:
    """Run `editar-hf convert`. Return the seconds that it takes and its peak resident memory in GiB."""
    start = time.perf_counter()
    program = Path(sys.executable).with_name("editar-hf")
    process = subprocess.Popen([program, "convert", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"`editar-hf convert` failed with status {process.returncode}.")
    # `ru_maxrss` is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, usage.ru_maxrss * unit / 2**30


def count_equal_tensors(before: Path, after: Path) -> tuple[int, int]:
    """Count the tensors that are bit-identical after both conversions, and all tensors."""
    old, new = (torch.load(path, mmap=True, weights_only=True)["model"] for path in (before, after))
    names = old.keys() - {CODEBOOK_USAGE_KEY}
    return sum(torch.equal(old[name], new[name]) for name in names), len(names)


def measure(folder: Path) -> str:
    """Convert in both directions in `folder`. Return the report as Markdown."""
    write_random_files(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30
    sources = ("--transformer", folder / REVERTED_TRANSFORMER, "--vq-model", folder / REVERTED_VQ_MODEL)
    forward = run_command(*sources, "--text-encoder", folder / "text_encoder", "--output-dir", folder / "pipeline")
    backward = run_command("--reverse", "--model", folder / "pipeline", "--output-dir", folder / "back")
    names = (REVERTED_TRANSFORMER, REVERTED_VQ_MODEL)
    counts = [count_equal_tensors(folder / name, folder / "back" / name) for name in names]
    rows = [
        [direction, f"{seconds:.0f} s", f"{memory:.1f} GiB"]
        for direction, (seconds, memory) in (
            ("published files → pipeline folder, self-check included", forward),
            ("pipeline folder → published files", backward),
        )
    ]
    parts = [
        "# Conversion at the true size",
        f"{describe_machine()} GPT-XL, VQ-16 and the encoder of FLAN-T5-XL's configuration, random bf16 weights; the "
        f"files hold {size:.1f} GiB. Peak memory is resident memory, the pages of memory-mapped files included. Made "
        "by `python benchmarks/bench_conversion.py`.",
        format_table(["direction", "time", "peak memory"], rows),
        "Tensors that came back bit for bit: decoder {} of {}, VQ model {} of {}.".format(*counts[0], *counts[1]),
    ]
    return "\n\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, help="folder for temporary files; default: the system's")
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        write_result("conversion", measure(Path(folder)))


if __name__ == "__main__":
    main()
