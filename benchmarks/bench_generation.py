"""Compare time and memory of decoding with two baselines (see `baselines.py`), after a check of parity.

    python benchmarks/bench_generation.py                  # GPT-B at 256×256 pixels, one CPU thread
    python benchmarks/bench_generation.py --batch-size 8
    python benchmarks/bench_generation.py --pieces         # with and without each part of the decoding engine
    python benchmarks/bench_generation.py --full           # GPT-XL at 512×512; only some tokens are timed
    python benchmarks/bench_generation.py --avx2           # as on a processor without AVX-512

Each measurement runs in a separate process with one CPU thread. Processor time is measured, in the order A B C D,
D C B A, A B C D. Weights are random. Results are written to `benchmarks/results/`. `bench_gpu.py` measures on a GPU.
"""

import argparse
import json
import os
import statistics
import sys
import time
from itertools import chain

import torch
from generation_pieces import benchmark_pieces
from generation_systems import (
    DECODERS,
    GUIDANCE_SCALE,
    PLACES,
    build_empty_model,
    build_inputs,
    build_model,
    check_parity,
    check_paths,
    compute_decode_floor,
)
from report import (
    describe_machine,
    format_ratios,
    format_table,
    measure_peak_memory,
    run_sample,
    take_turns,
    time_call,
    write_result,
)

from editar_hf.packing import explain_missing_kernel


SYSTEMS, PACKED = tuple(DECODERS), "editar_hf, packed"
# Each library has its own setting. Compiled code has a folder of its own, because code for AVX-512 crashes here.
ONLY_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor-avx2",
}


def list_systems(dtype: str) -> list[str]:
    """List the systems to measure. Packed weights compute in float32, and need a kernel for this processor."""
    can_pack = dtype == "float32" and explain_missing_kernel() is None
    return [system for system in SYSTEMS if can_pack or system != PACKED]


def measure_sample(args: argparse.Namespace) -> dict:
    """Time one system in this process: the prefill, and tokens at some positions of the target."""
    torch.set_num_threads(1)
    model = build_model(args.preset, args.grid_size, getattr(torch, args.dtypes[0]), "cpu")
    source, prompt_embeds = build_inputs(model, args.batch_size, "cpu")
    decode, inputs = DECODERS[args.system], (model, source, prompt_embeds, GUIDANCE_SCALE, args.grid_size)
    if args.system == PACKED:
        model.pack_weights()
    with torch.no_grad():  # warm-up: libraries initialize in the first forward pass
        model(source_image_tokens=source[:, :4], grid_height=2, grid_width=2)
    if args.system.endswith("compiled"):
        model.compile_decoding()
        decode(*inputs, range(2))
    num_tokens, length = source.shape[1], 1 + args.num_timed
    starts = [min(round(place * num_tokens), num_tokens - length) for place in PLACES]
    times = [time.process_time()]
    positions = list(chain(*(range(start, start + length) for start in starts)))
    tokens = decode(*inputs, positions, on_token=lambda: times.append(time.process_time()))
    # The time of the first token of a run includes the forced tokens before it, so this token is not counted.
    runs = [times[1 + length * index :][:length] for index in range(len(PLACES))]
    prefill, token = times[1] - times[0], statistics.mean((run[-1] - run[0]) / args.num_timed for run in runs)
    edit = prefill + (num_tokens - 1) * token
    memory = measure_peak_memory()
    return {"prefill": prefill, "token": token, "edit": edit, "memory": memory, "tokens": tokens.tolist()}


def check_all_parity(args: argparse.Namespace, dtype: str) -> str:
    """Check parity of all systems of ours. Return the findings.

    In fp32 at the small size, all other decoding modes are checked too. At the large size, that would take 8 minutes.
    """
    size = (args.preset, args.grid_size)
    ways = [{}, {"is_compiled": True}, {"is_packed": True}][: 3 if PACKED in list_systems(dtype) else 2]
    findings = [check_parity(*size, getattr(torch, dtype), args.parity_tokens, args.batch_size, **way) for way in ways]
    if dtype == "float32" and not args.full:
        findings.append(check_paths(*size, args.parity_tokens))
    return "; ".join(findings)


def benchmark_dtype(args: argparse.Namespace, dtype: str, bandwidth: float) -> list[str]:
    """Check parity and measure all systems. Return the parts of the report."""
    systems = list_systems(dtype)
    parity, samples = check_all_parity(args, dtype), {system: [] for system in systems}
    words = ["--sample", "--dtypes", dtype, "--batch-size", str(args.batch_size), *(["--full"] if args.full else [])]
    for system in take_turns(systems, args.rounds):
        samples[system].append(run_sample(__file__, *words, "--system", system))
        print(dtype, system, {k: v for k, v in samples[system][-1].items() if k != "tokens"}, flush=True)
    figures = {
        name: {system: [run[name] for run in runs] for system, runs in samples.items()}
        for name in ("edit", "prefill", "token", "memory")
    }
    tokens = {system: torch.tensor(runs[0]["tokens"]) for system, runs in samples.items()}
    ours = tokens.pop("editar_hf")
    counts = ", ".join(f"{(others != ours).sum().item()} from {system}" for system, others in tokens.items())
    model = build_empty_model(args.preset, args.grid_size)
    sizes = (model, args.batch_size, args.batch_size, getattr(torch, dtype), bandwidth)
    floors = {system: compute_decode_floor(*sizes, torch.float16 if system == PACKED else None) for system in systems}
    shares = (f"{name} {floor / statistics.median(figures['token'][name]):.0%}" for name, floor in floors.items())
    packed = f" ({floors[PACKED]:.3f} s with packed weights)" if PACKED in floors else ""
    parts = [
        f"## {dtype}",
        f"Parity: {parity}; of {ours.numel()} greedy tokens, the number in which `editar_hf` differs: {counts}.",
        f"One thread reads {bandwidth / 1e9:.1f} GB/s here, so reading the weights, sources, keys and values for a "
        f"token takes at least {floors['editar_hf']:.3f} s, the floor{packed}. Floor divided by the time of a token: "
        f"{', '.join(shares)}.",
    ]
    for name, title in (("edit", "whole edit, s"), ("prefill", "prefill, s"), ("token", "token, s")):
        rows = [
            [system, f"{statistics.median(values):.3f}", format_ratios(values, figures[name]["editar_hf"])]
            for system, values in figures[name].items()
        ]
        parts.append(format_table([title, "median", "ratio to `editar_hf`"], rows))
    memory = [[system, f"{statistics.median(values):.2f}"] for system, values in figures["memory"].items()]
    return [*parts, format_table(["peak memory of the process, weights included", "GiB"], memory)]


def benchmark_cpu(args: argparse.Namespace) -> str:
    """Measure all systems in all dtypes. Return the report."""
    size = 16 * args.grid_size
    parts = [
        f"# Decoding: {args.preset} at {size}×{size}, batch {args.batch_size}, CPU{' with AVX2' if args.avx2 else ''}",
        describe_machine(),
        f"Seconds of processor time, one thread, one process per measurement, rounds: {args.rounds}, in the order "
        "A B C D, D C B A, …; medians, and ratios to `editar_hf` round by round as median (least – most). The time of "
        f"an edit is extrapolated: {args.num_timed} tokens are timed at {len(PLACES)} places, and their mean, for each "
        f"token after the first, is added to the prefill. Random weights, greedy, guidance {GUIDANCE_SCALE}. Made by "
        f"`python benchmarks/bench_generation.py{''.join(f' {word}' for word in sys.argv[1:])}`.",
    ]
    torch.set_num_threads(1)
    block = torch.ones(100_000_000)
    bandwidth = block.nbytes / min(time_call(block.sum, "cpu")[0] for _ in range(5))
    return "\n\n".join(chain(parts, *(benchmark_dtype(args, dtype, bandwidth) for dtype in args.dtypes)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="GPT-XL at 512×512")
    parser.add_argument("--pieces", action="store_true", help="time decoding with and without each part")
    parser.add_argument("--avx2", action="store_true", help="use no instructions beyond AVX2")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sample", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.preset, args.grid_size = ("GPT-XL", 32) if args.full else ("GPT-B", 16)
    args.num_timed, args.parity_tokens = (8, 16) if args.full else (16, 32)
    if args.avx2 and not ONLY_AVX2.items() <= os.environ.items():  # They must be set before torch is imported.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONLY_AVX2})
    if args.sample:
        print(json.dumps(measure_sample(args)))
    elif args.pieces:
        write_result("generation-pieces", benchmark_pieces(args))
    else:
        suffix = ("-xl" if args.full else "") + (f"-batch-{args.batch_size}" if args.batch_size > 1 else "")
        suffix += "-avx2" if args.avx2 else ""
        write_result(f"generation{suffix}", benchmark_cpu(args))


if __name__ == "__main__":
    main()
