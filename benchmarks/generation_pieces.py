"""Pieces of the decoding engine with and without, each by itself; run by `bench_generation.py --pieces`."""

import statistics
from functools import partial

import torch
from generation_systems import GUIDANCE_SCALE, build_edit_mask, build_inputs, build_model
from report import describe_machine, format_table, time_call

from editar_hf import EditARVQConfig, EditARVQModel


NUM_TIMED, ROUNDS = 12, 5
WINDOWS = (1, 2, 4, 8, 16)


def time_tokens(model, source, prompt_embeds, num_after: int = 0, **how) -> float:
    """Time a token in the middle of the target, with `num_after` more to decode after those timed.

    Returns:
        Milliseconds of processor time.
    """
    first = source.shape[1] // 2

    def run(count: int) -> float:
        edit_mask = build_edit_mask(source, range(first, first + count))
        edit = partial(model.generate, source, prompt_embeds, do_sample=False, guidance_scale=GUIDANCE_SCALE, **how)
        return time_call(lambda: edit(edit_mask=edit_mask), "cpu")[0]

    return 1000 * (run(1 + num_after + NUM_TIMED) - run(1 + num_after)) / NUM_TIMED


def alternate(without, with_piece) -> list[str]:
    """Time both in the order A B B A …; return the medians, and the gain as median (least – most)."""
    pairs = []
    for turn in range(ROUNDS):
        if turn % 2 == 0:
            first, second = without(), with_piece()
        else:
            second, first = with_piece(), without()
        pairs.append((first, second))
    gains = [first / second for first, second in pairs]
    medians = [f"{statistics.median(times):.1f}" for times in zip(*pairs, strict=True)]
    return [*medians, f"{statistics.median(gains):.2f} ({min(gains):.2f} – {max(gains):.2f})"]


def compare_windows(model) -> list[list[str]]:
    """Feed drafts along, of which none holds with random weights: what a pass of so many tokens costs."""
    source, prompt_embeds = build_inputs(model, 1, "cpu")

    def run(window: int) -> float:
        how = {"decoding": "speculative", "num_draft_tokens": window} if window else {}
        return time_tokens(model, source, prompt_embeds, num_after=WINDOWS[-1], **how)

    return [
        [
            f"{window} drafts, {str(model.dtype)[6:]}: pays if a pass decides more tokens than 1 / gain",
            *alternate(lambda: run(0), lambda window=window: run(window)),
        ]
        for window in WINDOWS
    ]


def compare_compilation(model) -> list[str]:
    """Compile the pass of one token."""
    source, prompt_embeds = build_inputs(model, 1, "cpu")

    def run(compiled) -> float:
        model.compiled_decoding = compiled
        return time_tokens(model, source, prompt_embeds)

    model.compile_decoding()
    compiled = model.compiled_decoding
    spent, _ = time_call(lambda: run(compiled), "cpu")
    row = alternate(lambda: run(None), lambda: run(compiled))
    model.compiled_decoding = None
    return [f"`compile()`, {str(model.dtype)[6:]} (the first call took {spent:.0f} s)", *row]


def compare_vq() -> list[list[str]]:
    """Run the tokenizer's two halves in bf16 and channels-last, against fp32 as loaded."""
    torch.manual_seed(0)
    fine, coarse = EditARVQModel(EditARVQConfig()).eval(), EditARVQModel(EditARVQConfig()).eval()
    coarse = coarse.to(torch.bfloat16, memory_format=torch.channels_last)
    tokens, pixels = torch.randint(16384, (1, 256)), torch.rand(1, 3, 256, 256) * 2 - 1

    @torch.no_grad()
    def run(call) -> float:
        return 1000 * time_call(call, "cpu")[0]

    halves = {"decoder": lambda model: model.decode(tokens), "encoder": lambda model: model.encode(pixels)}
    rows = []
    for name, half in halves.items():
        run(lambda half=half: half(fine)), run(lambda half=half: half(coarse))
        row = alternate(lambda half=half: run(lambda: half(fine)), lambda half=half: run(lambda: half(coarse)))
        rows.append([f"VQ {name} at 256×256 in bf16, channels-last", *row])
    return rows


def benchmark_pieces(args) -> str:
    """Measure every piece on GPT-B at 256×256; return the report."""
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
