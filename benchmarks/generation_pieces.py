"""Time decoding with and without each part of the engine; `bench_generation.py --pieces` runs this."""

import statistics
from collections.abc import Callable

import torch
from generation_systems import GUIDANCE_SCALE, build_edit_mask, build_inputs, build_model
from report import describe_machine, format_ratios, format_table, take_turns, time_call

from editar_hf import EditARVQConfig, EditARVQModel


NUM_TIMED, ROUNDS = 12, 5
WINDOWS = (1, 2, 4, 8, 16)


def time_tokens(model, num_after: int = 0, **how) -> float:
    """Time a token in the middle of the target, where `num_after` more tokens follow the timed ones.

    Returns:
        Milliseconds of processor time.
    """
    source, prompt_embeds = build_inputs(model, 1, "cpu")
    first, how = source.shape[1] // 2, {"do_sample": False, "guidance_scale": GUIDANCE_SCALE, **how}

    def run(count: int) -> float:
        edit_mask = build_edit_mask(source, range(first, first + count))
        return time_call(lambda: model.generate(source, prompt_embeds, edit_mask=edit_mask, **how), "cpu")[0]

    return 1000 * (run(1 + num_after + NUM_TIMED) - run(1 + num_after)) / NUM_TIMED


def compare(name: str, without: Callable[[], float], with_piece: Callable[[], float]) -> list[str]:
    """Measure both in turn. Return the name, the medians in ms, and the gain as median (least – most)."""
    measured = {without: [], with_piece: []}
    for measure in take_turns(measured, ROUNDS):
        measured[measure].append(measure())
    return [
        name,
        *(f"{statistics.median(times):.1f}" for times in measured.values()),
        format_ratios(*measured.values()),
    ]


def compare_windows(model) -> list[list[str]]:
    """Time passes with drafts. With random weights no draft is accepted, so this gives the cost of longer passes."""
    dtype, after = str(model.dtype)[6:], WINDOWS[-1]
    return [
        compare(
            f"{window} drafts, {dtype}: pays if a pass decides more tokens than 1 / gain",
            lambda: time_tokens(model, after),
            lambda window=window: time_tokens(model, after, decoding="speculative", num_draft_tokens=window),
        )
        for window in WINDOWS
    ]


def compare_compilation(model) -> list[str]:
    """Time decoding with and without the compiled pass of one token."""

    def run(compiled) -> float:
        model.compiled_decoding = compiled
        return time_tokens(model)

    model.compile_decoding()
    compiled = model.compiled_decoding
    spent, _ = time_call(lambda: run(compiled), "cpu")
    name = f"`compile()`, {str(model.dtype)[6:]} (the first call took {spent:.0f} s)"
    row = compare(name, lambda: run(None), lambda: run(compiled))
    model.compiled_decoding = None
    return row


@torch.no_grad()
def compare_vq() -> list[list[str]]:
    """Time VQ decoder and VQ encoder in fp32 as loaded, and in bf16 with channels-last memory format."""
    torch.manual_seed(0)
    fine, coarse = EditARVQModel(EditARVQConfig()).eval(), EditARVQModel(EditARVQConfig()).eval()
    coarse = coarse.to(torch.bfloat16, memory_format=torch.channels_last)
    tokens, pixels = torch.randint(16384, (1, 256)), torch.rand(1, 3, 256, 256) * 2 - 1
    halves = {"decoder": lambda model: model.decode(tokens), "encoder": lambda model: model.encode(pixels)}
    rows = []
    for name, half in halves.items():
        # Both are called once before they are timed, because libraries initialize in the first call.
        runs = [
            lambda model=model, half=half: 1000 * time_call(lambda: half(model), "cpu")[0] for model in (fine, coarse)
        ]
        for run in runs:
            run()
        rows.append(compare(f"VQ {name} at 256×256 in bf16, channels-last", *runs))
    return rows


def benchmark_pieces(args) -> str:
    """Measure every part with GPT-B at 256×256. Return the report."""
    torch.set_num_threads(1)
    machine, rows = describe_machine(), []
    for dtype in args.dtypes:
        model = build_model("GPT-B", 16, getattr(torch, dtype), "cpu")
        rows += [compare_compilation(model), *compare_windows(model)]
    rows += compare_vq()
    return "\n\n".join(
        [
            "# Decoding: pieces of the engine",
            f"{machine} GPT-B at 256×256; one thread, milliseconds of processor time for a token in the middle of the "
            "target (a pass with drafts; an image for the VQ model); medians, and the gain as median (least – most) of "
            f"{ROUNDS} pairs in alternating order. Made by `python benchmarks/bench_generation.py --pieces`.",
            format_table(["piece", "without, ms", "with, ms", "gain"], rows),
        ]
    )
