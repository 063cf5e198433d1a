"""Decoding on a GPU: floors first, then both baselines and ours, eager and compiled: 1, 4 and 16 edits at once.

Run by `bench_generation.py --device cuda`. bf16, 2 warm-up edits and 5 timed; with `--full` GPT-XL at 512×512.
"""

import statistics

import torch
from generation_systems import (
    DECODERS,
    GUIDANCE_SCALE,
    build_inputs,
    build_model,
    check_parity,
    check_paths,
    compute_decode_floor,
)
from report import describe_machine, format_table, time_call


# Edits at once, and the pictures that they are of.
BATCHES = ((1, 1), (4, 4), (16, 16), (16, 1))
NUM_WARM_UP, NUM_TIMED = 2, 5


def measure_floors(device: str) -> tuple[float, float]:
    """Measure copy bandwidth in bytes per second, read and write, and FLOP per second of an 8192³ product."""
    size = 8192 if device != "cpu" else 512
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    block = torch.empty(size * size * 8, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    copies = [time_call(lambda: target.copy_(block), device)[0] for _ in range(10)]
    products = [time_call(lambda: left @ right, device)[0] for _ in range(10)]
    return 2 * block.numel() / min(copies), 2 * size**3 / min(products)


def time_edits(decode, model, source, prompt_embeds, device: str) -> tuple[float, float, float]:
    """Time whole edits: the first one, the median of those timed, and the peak memory in GiB."""
    grid_size, num_tokens = model.config.grid_size, source.shape[1]

    def edit():
        decode(model, source, prompt_embeds, GUIDANCE_SCALE, grid_size, range(num_tokens))

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    first, _ = time_call(edit, device)
    for _ in range(NUM_WARM_UP - 1):
        edit()
    seconds = statistics.median(time_call(edit, device)[0] for _ in range(NUM_TIMED))
    memory = torch.cuda.max_memory_allocated() / 2**30 if device != "cpu" else float("nan")
    return first, seconds, memory


def benchmark_gpu(args) -> str:
    """Measure; return the report."""
    device = args.device
    bandwidth, rate = measure_floors(device)
    size = (args.preset, args.grid_size)
    parity = [
        check_parity(*size, torch.bfloat16, args.parity_tokens, batch_size, device, is_compiled)
        for batch_size in (1, 4)
        for is_compiled in (False, True)
    ]
    parity.append(check_paths(*size, args.parity_tokens, device))
    model = build_model(*size, torch.bfloat16, device)
    rows, eager = [], model.forward

    def compile_library():
        # Its cache grows with every token: compiled for any length.
        model.forward = torch.compile(eager, dynamic=True)

    for batch_size, num_sources in BATCHES:
        source, prompt_embeds = build_inputs(model, batch_size, device)
        source = source[:num_sources].repeat_interleave(batch_size // num_sources, dim=0)
        floor = (source.shape[1] - 1) * compute_decode_floor(model, batch_size, num_sources, model.dtype, bandwidth)
        systems = {
            "published style": ("published style", None),
            "library": ("library", None),
            "library, compiled": ("library", compile_library),
            "editar_hf": ("editar_hf", None),
            "editar_hf, compiled": ("editar_hf, compiled", model.compile_passes),
        }
        for name, (decoder, prepare) in systems.items():
            if prepare is not None:
                prepare()
            first, seconds, memory = time_edits(DECODERS[decoder], model, source, prompt_embeds, device)
            model.forward, model.compiled_passes = eager, None
            cells = [f"{seconds:.3f}", f"{batch_size / seconds:.2f}", f"{floor / seconds:.0%}"]
            rows.append([str(batch_size), str(num_sources), name, *cells, f"{first - seconds:.1f}", f"{memory:.2f}"])
            print(rows[-1], flush=True)
    header = ["edits", "pictures", "system", "s", "images/s", "of the decode floor", "first call, s more", "peak, GiB"]
    return "\n\n".join(
        [
            f"# Decoding on a GPU: {args.preset} at {16 * args.grid_size}×{16 * args.grid_size}, bf16",
            f"{describe_machine()} Copies run at {bandwidth / 1e12:.2f} TB/s, products of 8192³ at {rate / 1e12:.0f} "
            f"TFLOP/s. Random weights, greedy, guidance {GUIDANCE_SCALE}; {NUM_WARM_UP} edits to warm up, the median "
            f"of {NUM_TIMED}. The floor is the time of reading weights, sources and own keys and values. Made by "
            f"`python benchmarks/bench_generation.py{args.words}`.",
            f"Parity: {'; '.join(parity)}.",
            format_table(header, rows),
        ]
    )
