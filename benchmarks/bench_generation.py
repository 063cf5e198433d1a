"""Time and memory of decoding against two baselines, parity first; see `baselines.py` for what these do.

    python benchmarks/bench_generation.py                  # GPT-B at 256×256 pixels, one CPU thread
    python benchmarks/bench_generation.py --batch-size 8
    python benchmarks/bench_generation.py --pieces         # each piece of the engine with and without
    python benchmarks/bench_generation.py --full           # GPT-XL at 512×512, some tokens along the way
    python benchmarks/bench_generation.py --device cuda    # on a GPU: batch 1, 4, 16, compiled and not, and the floor

On a CPU every sample is a process of its own with one thread, timed by the processor time it takes, in the order
A B C, C B A, A B C. Weights are random. Results go to `benchmarks/results/`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import torch
from baselines import decode_like_published, decode_with_library
from report import describe_machine, format_table, write_result
from transformers import LogitsProcessor, StoppingCriteria

from editar_hf import EditARConfig, EditARForConditionalGeneration


GUIDANCE_SCALE = 3.0
SYSTEMS = ("published style", "library", "editar_hf")
# A first token that differs must have been this close to its rival in the plain loop; in fp32 logits of random weights.
MAX_MARGIN = 1e-3


class StopAfter(StoppingCriteria):
    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.num_tokens, device=input_ids.device)


def decode_with_package(model, source, prompt_embeds, guidance_scale, grid_size, forced, num_tokens):
    """Decode with `generate`; the forced tokens are those of a source outside the edit mask."""
    num_forced = forced.shape[1]
    assert torch.equal(forced, source[:, :num_forced]), "a mask forces tokens of the source"
    edit_mask = torch.arange(source.shape[1], device=source.device).expand_as(source) >= num_forced
    stop = num_forced + num_tokens
    target = model.generate(
        source,
        prompt_embeds,
        do_sample=False,
        guidance_scale=guidance_scale,
        edit_mask=edit_mask if num_forced else None,
        stopping_criteria=None if stop == source.shape[1] else [StopAfter(stop)],
        grid_height=grid_size,
        grid_width=grid_size,
    )
    return target[:, num_forced:]


DECODERS = {
    "published style": decode_like_published,
    "library": decode_with_library,
    "editar_hf": decode_with_package,
}


def build_model(preset: str, grid_size: int, dtype: torch.dtype, device: str) -> EditARForConditionalGeneration:
    """Build a decoder with random weights; its head too, which a fresh one has zero."""
    torch.manual_seed(0)
    config = EditARConfig.from_preset(preset, grid_size=grid_size, distillation_hidden_size=None)
    with torch.device("meta"):
        model = EditARForConditionalGeneration(config)
    model = model.to_empty(device=device).to(dtype).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.ndim == 1:
                tensor.fill_(1)
            else:
                tensor.normal_(std=0.04, generator=generator)
    return model


def build_inputs(model, batch_size: int, device: str) -> tuple[torch.LongTensor, torch.Tensor]:
    """Draw one source per image and text states."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    source = torch.randint(config.vocab_size, (batch_size, config.num_image_tokens), generator=generator)
    text = torch.randn(batch_size, config.num_text_tokens, config.text_hidden_size, generator=generator)
    return source.to(device), text.to(device, model.dtype)


def measure_sample(args: argparse.Namespace) -> dict:
    """Time one system in this process: the prefill, and tokens at some places of the target."""
    torch.set_num_threads(1)
    model = build_model(args.preset, args.grid_size, getattr(torch, args.dtype), "cpu")
    source, prompt_embeds = build_inputs(model, args.batch_size, "cpu")
    decode, num_tokens = DECODERS[args.system], source.shape[1]

    def run(num_forced: int, count: int) -> tuple[float, torch.Tensor]:
        start = time.process_time()
        tokens = decode(
            model, source, prompt_embeds, GUIDANCE_SCALE, args.grid_size, source[:, :num_forced], count
        )
        return time.process_time() - start, tokens

    run(0, 2)  # the first forward sets libraries up
    prefill, _ = run(0, 1)
    seconds_per_token, tokens = [], []
    for place in args.places:
        num_forced = min(round(place * num_tokens), num_tokens - args.num_timed - 1)
        before, _ = run(num_forced, 1)
        after, decoded = run(num_forced, 1 + args.num_timed)
        seconds_per_token.append((after - before) / args.num_timed)
        tokens.append(decoded.tolist())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    token = statistics.mean(seconds_per_token)
    return {
        "prefill": prefill,
        "token": token,
        "edit": prefill + (num_tokens - 1) * token,
        "memory": memory,
        "tokens": tokens,
    }


def run_sample(system: str, dtype: str, args: argparse.Namespace) -> dict:
    """Run `measure_sample` in a process of its own."""
    words = ["--sample", "--system", system, "--dtype", dtype, "--preset", args.preset]
    words += ["--grid-size", str(args.grid_size), "--batch-size", str(args.batch_size)]
    words += ["--num-timed", str(args.num_timed), "--places", *map(str, args.places)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, __file__, *words], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


# Parity


class RecordLogits(LogitsProcessor):
    """Note the guided logits of every token."""

    def __init__(self):
        self.logits = []

    def __call__(self, input_ids, scores):
        self.logits.append(scores.clone())
        return scores


def check_parity(preset: str, grid_size: int, dtype: torch.dtype, num_tokens: int, device: str = "cpu") -> str:
    """Compare teacher-forced logits, and in fp32 the tokens, with those of one forward over the whole sequence.

    Raises:
        AssertionError: If logits differ by more than rounding, or a token whose rival was not close.
    """
    model = build_model(preset, grid_size, dtype, device)
    source, prompt_embeds = build_inputs(model, 1, device)
    record = RecordLogits()
    grid = {"grid_height": grid_size, "grid_width": grid_size}
    with torch.no_grad():
        tokens = model.generate(
            source,
            prompt_embeds,
            do_sample=False,
            guidance_scale=GUIDANCE_SCALE,
            logits_processor=[record],
            stopping_criteria=[StopAfter(num_tokens)],
            **grid,
        )
        plain = [
            model(
                source,
                prompt_embeds,
                target_image_tokens=tokens[:, :-1],
                drop_prompt=torch.tensor([is_dropped], device=device),
                **grid,
            ).logits.float()
            for is_dropped in (False, True)
        ]
    plain = (plain[1] + GUIDANCE_SCALE * (plain[0] - plain[1]))[0]
    ours = torch.cat(record.logits)
    difference = ((ours - plain).abs().max() / plain.std()).item()
    best = plain.topk(2, dim=-1)
    differing = (best.indices[:, 0] != tokens[0]).nonzero()[:, 0]
    margins = (best.values[:, 0] - best.values[:, 1])[differing]
    if dtype == torch.float32:
        assert difference < 1e-3, f"logits differ by {difference} of their spread"
        assert (margins < MAX_MARGIN).all(), f"tokens differ at margins {margins.tolist()}"
    else:
        assert difference < 0.3, f"logits differ by {difference} of their spread"
    return (
        f"over {num_tokens} tokens, guided logits differ from one whole forward by at most {difference:.1e} of their "
        f"spread; {len(differing)} tokens differ"
        + (f", at margins below {MAX_MARGIN}" if dtype == torch.float32 and len(differing) else "")
    )


def compare_tokens(samples: dict[str, list[dict]]) -> str:
    """Count the tokens in which the systems differ."""
    tokens = {system: torch.tensor(runs[0]["tokens"]) for system, runs in samples.items()}
    ours = tokens["editar_hf"]
    counts = ", ".join(f"{(tokens[name] != ours).sum().item()} from {name}" for name in SYSTEMS[:2])
    return f"of {ours.numel()} greedy tokens, those of `editar_hf` that differ: {counts}"


# Reports


def summarise(samples: dict[str, list[dict]], name: str) -> list[list[str]]:
    """Make a row for each system: median, and the ratio to ours round by round, as median (least – most)."""
    rows = []
    for system in SYSTEMS:
        values = [run[name] for run in samples[system]]
        ratios = [value / run[name] for value, run in zip(values, samples["editar_hf"], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})"
        rows.append([system, f"{statistics.median(values):.3f}", ratio])
    return rows


def benchmark_cpu(args: argparse.Namespace) -> str:
    """Measure all systems in both dtypes; return the report."""
    size = 16 * args.grid_size
    parts = [
        f"# Decoding: GPT-{args.preset.removeprefix('GPT-')} at {size}×{size}, batch {args.batch_size}, CPU",
        describe_machine(),
        f"Seconds of processor time, one thread, a process per sample, {args.rounds} rounds, in the order A B C, "
        "C B A, A B C; medians, and ratios to `editar_hf` round by round as median (least – most). An edit is its "
        f"prefill and the mean time of {args.num_timed} tokens at {len(args.places)} places, for all tokens. Random "
        f"weights, greedy, guidance {GUIDANCE_SCALE}. Made by `python benchmarks/bench_generation.py{args.words}`.",
    ]
    for dtype in args.dtypes:
        parity = check_parity(args.preset, args.grid_size, getattr(torch, dtype), args.parity_tokens)
        samples = {system: [] for system in SYSTEMS}
        for order in (SYSTEMS[:: -1 if turn % 2 else 1] for turn in range(args.rounds)):
            for system in order:
                samples[system].append(run_sample(system, dtype, args))
                print(dtype, system, {k: v for k, v in samples[system][-1].items() if k != "tokens"}, flush=True)
        parts.append(f"## {dtype}\n\nParity: {parity}; {compare_tokens(samples)}.")
        for name, title in (("edit", "whole edit, s"), ("prefill", "prefill, s"), ("token", "token, s")):
            parts.append(format_table([title, "median", "ratio to `editar_hf`"], summarise(samples, name)))
        memory = [[system, f"{statistics.median(run['memory'] for run in samples[system]):.2f}"] for system in SYSTEMS]
        parts.append(format_table(["peak memory of the process, weights included", "GiB"], memory))
    return "\n\n".join(parts) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="GPT-XL at 512×512")
    parser.add_argument("--pieces", action="store_true", help="each piece of the engine with and without")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sample", action="store_true", help=argparse.SUPPRESS)
    for name, kind in (("system", str), ("dtype", str), ("preset", str), ("grid-size", int), ("num-timed", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--places", nargs="+", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.words = "".join(f" {word}" for word in sys.argv[1:])
    if not args.sample:
        args.preset, args.grid_size = ("GPT-XL", 32) if args.full else ("GPT-B", 16)
        args.num_timed, args.places = (8, [0, 1 / 3, 2 / 3, 1]) if args.full else (16, [0.5])
        args.parity_tokens = 16 if args.full else 32
    return args


def main():
    args = parse_arguments()
    if args.sample:
        print(json.dumps(measure_sample(args)))
    elif args.pieces:
        from generation_pieces import benchmark_pieces

        write_result("generation-pieces", benchmark_pieces(args))
    elif args.device != "cpu":
        from generation_gpu import benchmark_gpu

        write_result("generation-gpu", benchmark_gpu(args))
    else:
        suffix = ("-xl" if args.full else "") + (f"-batch-{args.batch_size}" if args.batch_size > 1 else "")
        write_result(f"generation{suffix}", benchmark_cpu(args))


if __name__ == "__main__":
    main()
