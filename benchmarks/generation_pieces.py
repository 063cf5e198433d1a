"""Pieces of the decoding engine with and without, each by itself; run by `bench_generation.py --pieces`."""

import statistics
from functools import partial

import torch
from generation_systems import GUIDANCE_SCALE, build_edit_mask, build_inputs, build_model
from report import describe_machine, format_table, time_call

from editar_hf import EditARVQConfig, EditARVQModel
from editar_hf.generation import passes


NUM_TIMED, ROUNDS = 12, 5
WINDOWS = (1, 2, 4, 8, 16)
NEVER = 10**9


def time_tokens(model, source, prompt_embeds, first: int | None = None, num_after: int = 0, **how) -> float:
    """Time a token from position `first` on, by default in the middle, with so many more to decode after those timed.

    Returns:
        Milliseconds of processor time.
    """
    first = source.shape[1] // 2 if first is None else first

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


def compare_sharing(model, batch_size: int, name: str) -> list[str]:
    """Read one source where it is, or copy it to every row; at the first tokens, so that little else is read."""
    source, prompt_embeds = build_inputs(model, batch_size, "cpu")
    source = source[:1].expand(batch_size, -1).contiguous()
    cache = model.prepare_source_cache(source[:1])
    usual = dict(passes.MIN_SHARING_ROWS)

    def run(min_rows: int) -> float:
        passes.MIN_SHARING_ROWS[("cpu", model.dtype)] = min_rows
        return time_tokens(model, source, prompt_embeds, first=0, source_cache=cache)

    row = alternate(lambda: run(NEVER), lambda: run(1))
    passes.MIN_SHARING_ROWS.clear()
    passes.MIN_SHARING_ROWS.update(usual)
    return [f"{name}: source shared by {2 * batch_size} rows, {str(model.dtype)[6:]}", *row]


def compare_text_slots(model) -> list[str]:
    """Keep the text in one slot, or in 120; the tokens of the second are another model's, its work is the same."""
    source, prompt_embeds = build_inputs(model, 1, "cpu")

    def run(text_rotary: str) -> float:
        model.config.text_rotary = text_rotary
        return time_tokens(model, source, prompt_embeds)

    row = alternate(lambda: run("identity"), lambda: run("zero"))
    model.config.text_rotary = "zero"
    return [f"text in one slot, {str(model.dtype)[6:]}", *row]


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
        model.compiled_passes = compiled
        return time_tokens(model, source, prompt_embeds)

    model.compile_passes()
    compiled = model.compiled_passes
    spent, _ = time_call(lambda: run(compiled), "cpu")
    row = alternate(lambda: run(None), lambda: run(compiled))
    model.compiled_passes = None
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
    """Measure every piece on GPT-B at 256×256, and sharing on GPT-XL at 512×512 too; return the report."""
    torch.set_num_threads(1)
    machine, rows = describe_machine(), []
    for dtype in args.dtypes:
        model = build_model("GPT-B", 16, getattr(torch, dtype), "cpu")
        rows += [compare_sharing(model, batch_size, "GPT-B") for batch_size in (1, 4)]
        rows += [compare_text_slots(model), compare_compilation(model), *compare_windows(model)]
    rows += compare_vq()
    for dtype in args.dtypes:
        model = build_model("GPT-XL", 32, getattr(torch, dtype), "cpu")
        rows.append(compare_sharing(model, 1, "GPT-XL"))
        del model
    return "\n\n".join(
        [
            "# Decoding: pieces of the engine",
            f"{machine} GPT-B at 256×256, and GPT-XL at 512×512 where named; one thread, milliseconds of processor "
            "time for a token in the middle of the target (at its start for a shared source; a pass with drafts; a "
            f"picture for the VQ tokenizer); medians, and the gain as median (least – most) of {ROUNDS} pairs in "
            "alternating order. Made by `python benchmarks/bench_generation.py --pieces`.",
            format_table(["piece", "without, ms", "with, ms", "gain"], rows),
        ]
    )
