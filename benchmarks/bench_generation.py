"""Time and memory of decoding against two baselines, parity first; see `baselines.py` for what these do.

    python benchmarks/bench_generation.py                  # GPT-B at 256×256 pixels, one CPU thread
    python benchmarks/bench_generation.py --batch-size 8
    python benchmarks/bench_generation.py --pieces         # each piece of the engine with and without
    python benchmarks/bench_generation.py --full           # GPT-XL at 512×512, some tokens along the way

Every sample is a process of its own with one CPU thread, timed by the processor time it takes, in the order A B C D,
D C B A, A B C D. Weights are random. Results go to `benchmarks/results/`. `bench_gpu.py` measures on a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
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
from report import describe_machine, format_table, measure_peak_memory, write_result


SYSTEMS = tuple(DECODERS)


def place_runs(num_tokens: int, length: int) -> list[range]:
    """Choose the runs of free positions, one at each of `PLACES`."""
    starts = (min(round(place * num_tokens), num_tokens - length) for place in PLACES)
    return [range(start, start + length) for start in starts]


def measure_sample(args: argparse.Namespace) -> dict:
    """Time one system in this process: the prefill, and tokens at some places of the target."""
    torch.set_num_threads(1)
    model = build_model(args.preset, args.grid_size, getattr(torch, args.dtype), "cpu")
    source, prompt_embeds = build_inputs(model, args.batch_size, "cpu")
    decode, inputs = DECODERS[args.system], (model, source, prompt_embeds, GUIDANCE_SCALE, args.grid_size)
    with torch.no_grad():  # the first forward sets libraries up
        model(source_image_tokens=source[:, :4], grid_height=2, grid_width=2)
    if args.system.endswith("compiled"):
        model.compile_decoding()
        decode(*inputs, range(2))
    runs = place_runs(source.shape[1], 1 + args.num_timed)
    times = [time.process_time()]
    tokens = decode(*inputs, list(chain(*runs)), on_token=lambda: times.append(time.process_time()))
    prefill, times = times[1] - times[0], iter(times[1:])
    seconds = [[next(times) for _ in run] for run in runs]
    token = statistics.mean((run[-1] - run[0]) / args.num_timed for run in seconds)
    return {
        "prefill": prefill,
        "token": token,
        "edit": prefill + (source.shape[1] - 1) * token,
        "memory": measure_peak_memory(),
        "tokens": tokens.tolist(),
    }


def run_sample(system: str, dtype: str, args: argparse.Namespace) -> dict:
    """Run `measure_sample` in a process of its own."""
    words = ["--sample", "--system", system, "--dtypes", dtype, "--batch-size", str(args.batch_size)]
    words += ["--full"] if args.full else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, __file__, *words], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def measure_read_bandwidth() -> float:
    """Measure how many bytes one thread reads from memory in a second of processor time."""
    block, seconds = torch.ones(100_000_000), []
    for _ in range(5):
        start = time.process_time()
        block.sum()
        seconds.append(time.process_time() - start)
    return block.nbytes / min(seconds)


# Reports


def compare_tokens(samples: dict[str, list[dict]]) -> str:
    """Count the tokens in which the systems differ."""
    tokens = {system: torch.tensor(runs[0]["tokens"]) for system, runs in samples.items()}
    ours = tokens["editar_hf"]
    others = [name for name in SYSTEMS if name != "editar_hf"]
    counts = ", ".join(f"{(tokens[name] != ours).sum().item()} from {name}" for name in others)
    return f"of {ours.numel()} greedy tokens, those of `editar_hf` that differ: {counts}"


def summarise(samples: dict[str, list[dict]], name: str) -> list[list[str]]:
    """Make a row for each system: median, and the ratio to ours round by round, as median (least – most)."""
    rows = []
    for system in SYSTEMS:
        values = [run[name] for run in samples[system]]
        ratios = [value / run[name] for value, run in zip(values, samples["editar_hf"], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})"
        rows.append([system, f"{statistics.median(values):.3f}", ratio])
    return rows


def describe_floor(samples: dict[str, list[dict]], dtype: str, bandwidth: float, args: argparse.Namespace) -> str:
    """Say how near to reading all it must from memory each system decodes."""
    model = build_empty_model(args.preset, args.grid_size)
    floor = compute_decode_floor(model, args.batch_size, args.batch_size, getattr(torch, dtype), bandwidth)
    shares = (
        f"{system} {floor / statistics.median(run['token'] for run in samples[system]):.0%}" for system in SYSTEMS
    )
    return (
        f"One thread reads {bandwidth / 1e9:.1f} GB/s here, so weights, sources, keys and values of a token take "
        f"{floor:.3f} s to read at the least. Share of that floor: {', '.join(shares)}."
    )


def check_all_parity(args: argparse.Namespace, dtype: str) -> str:
    """Check what is timed, eager and compiled, and in fp32 all other ways to decode; return what was found."""
    size = (args.preset, args.grid_size)
    findings = [
        check_parity(*size, getattr(torch, dtype), args.parity_tokens, args.batch_size, is_compiled=is_compiled)
        for is_compiled in (False, True)
    ]
    if dtype == "float32":
        findings.append(check_paths(*size, args.parity_tokens))
    return "; ".join(findings)


def benchmark_cpu(args: argparse.Namespace) -> str:
    """Measure all systems in both dtypes; return the report."""
    size = 16 * args.grid_size
    parts = [
        f"# Decoding: {args.preset} at {size}×{size}, batch {args.batch_size}, CPU",
        describe_machine(),
        f"Seconds of processor time, one thread, a process per sample, {args.rounds} rounds, in the order A B C D, "
        "D C B A, …; medians, and ratios to `editar_hf` round by round as median (least – most). An edit is its "
        f"prefill and the mean time of {args.num_timed} tokens at {len(PLACES)} places, for all tokens. Random "
        f"weights, greedy, guidance {GUIDANCE_SCALE}. Made by `python benchmarks/bench_generation.py{args.words}`.",
    ]
    torch.set_num_threads(1)
    bandwidth = measure_read_bandwidth()
    for dtype in args.dtypes:
        parity = check_all_parity(args, dtype)
        samples = {system: [] for system in SYSTEMS}
        for order in (SYSTEMS[:: -1 if turn % 2 else 1] for turn in range(args.rounds)):
            for system in order:
                samples[system].append(run_sample(system, dtype, args))
                print(dtype, system, {k: v for k, v in samples[system][-1].items() if k != "tokens"}, flush=True)
        parts.append(f"## {dtype}\n\nParity: {parity}; {compare_tokens(samples)}.")
        parts.append(describe_floor(samples, dtype, bandwidth, args))
        for name, title in (("edit", "whole edit, s"), ("prefill", "prefill, s"), ("token", "token, s")):
            parts.append(format_table([title, "median", "ratio to `editar_hf`"], summarise(samples, name)))
        memory = [[system, f"{statistics.median(run['memory'] for run in samples[system]):.2f}"] for system in SYSTEMS]
        parts.append(format_table(["peak memory of the process, weights included", "GiB"], memory))
    return "\n\n".join(parts)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="GPT-XL at 512×512")
    parser.add_argument("--pieces", action="store_true", help="each piece of the engine with and without")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sample", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.words = "".join(f" {word}" for word in sys.argv[1:])
    args.dtype = args.dtypes[0]
    args.preset, args.grid_size = ("GPT-XL", 32) if args.full else ("GPT-B", 16)
    args.num_timed, args.parity_tokens = (8, 16) if args.full else (16, 32)
    return args


def main():
    args = parse_arguments()
    if args.sample:
        print(json.dumps(measure_sample(args)))
    elif args.pieces:
        write_result("generation-pieces", benchmark_pieces(args))
    else:
        suffix = ("-xl" if args.full else "") + (f"-batch-{args.batch_size}" if args.batch_size > 1 else "")
        write_result(f"generation{suffix}", benchmark_cpu(args))


if __name__ == "__main__":
    main()
