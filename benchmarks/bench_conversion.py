"""Time and peak memory of `editar-hf convert` at the true size, in both directions.

Makes published-format files of random bf16 weights (GPT-XL, VQ-16, the encoder of FLAN-T5-XL's configuration), converts
them in a process of their own, self-check included, converts back, compares every tensor bit for bit, and writes
`results/conversion.md`. Needs about 10 GB of disk and no network:

    python benchmarks/bench_conversion.py
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
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


RESULT = Path(__file__).parent / "results" / "conversion.md"
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
    """Write the three sources, with weights as wide as a fresh network's."""
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
    """Run `editar-hf convert`; return its seconds and its peak resident memory in GiB."""
    start = time.perf_counter()
    program = Path(sys.executable).with_name("editar-hf")
    process = subprocess.Popen([program, "convert", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"`editar-hf convert` failed with status {process.returncode}.")
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, usage.ru_maxrss * unit / 2**30


def count_equal_tensors(before: Path, after: Path) -> tuple[int, int]:
    """Count the tensors that came back bit for bit, and those that should have."""
    old, new = (torch.load(path, mmap=True, weights_only=True)["model"] for path in (before, after))
    names = old.keys() - {CODEBOOK_USAGE_KEY}
    return sum(torch.equal(old[name], new[name]) for name in names), len(names)


def describe_machine() -> str:
    """Name the processor, the memory and the versions that the figures stand for."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, "
        f"{torch.get_num_threads()} torch threads, Python {platform.python_version()}, torch {torch.__version__}"
    )


def measure(folder: Path) -> str:
    """Convert there and back in `folder`; return the report as Markdown."""
    write_random_files(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30
    sources = ("--transformer", folder / REVERTED_TRANSFORMER, "--vq-model", folder / REVERTED_VQ_MODEL)
    forward = run_command(*sources, "--text-encoder", folder / "text_encoder", "--output-dir", folder / "pipeline")
    backward = run_command("--reverse", "--model", folder / "pipeline", "--output-dir", folder / "back")
    names = (REVERTED_TRANSFORMER, REVERTED_VQ_MODEL)
    counts = [count_equal_tensors(folder / name, folder / "back" / name) for name in names]
    return "\n".join(
        [
            "# Conversion at the true size",
            "",
            "GPT-XL, VQ-16 and the encoder of FLAN-T5-XL's configuration, random bf16 weights; the files hold "
            f"{size:.1f} GiB.",
            f"Device: {describe_machine()}.",
            "Peak memory is resident memory, the pages of memory-mapped files included. Made by",
            "`python benchmarks/bench_conversion.py`.",
            "",
            "| direction | time | peak memory |",
            "|---|---|---|",
            f"| published files → pipeline folder, self-check included | {forward[0]:.0f} s | {forward[1]:.1f} GiB |",
            f"| pipeline folder → published files | {backward[0]:.0f} s | {backward[1]:.1f} GiB |",
            "",
            f"Tensors that came back bit for bit: decoder {counts[0][0]} of {counts[0][1]}, "
            f"tokenizer {counts[1][0]} of {counts[1][1]}.",
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, help="where the files are made and removed; default: the system's")
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        report = measure(Path(folder))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
