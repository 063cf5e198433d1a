"""Measure the time that masks, source caches, drafts and previews save or cost.

    python benchmarks/bench_control.py                # GPT-B at 256×256 with random weights, and the sticker editor
    python benchmarks/bench_control.py --samples 16   # fewer test samples of the sticker editor
    python benchmarks/bench_control.py --device cuda  # on a GPU; the random weights are in bf16 there

Masks, source caches and previews are timed with random weights. Drafts are measured with the sticker editor, on test
samples that this script draws. These results do not carry over to the published weights. On a CPU, one
thread is used and processor time is measured. The order of the calls alternates. Results are written to
`benchmarks/results/control.md`, or `control-gpu.md` on a GPU.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from generation_systems import build_inputs, build_model
from report import describe_machine, format_ratios, format_table, time_call, time_in_turn, write_result

from editar_hf import EditARPipeline, EditARVQConfig, EditARVQModel
from editar_hf.packing import explain_missing_kernel
from editar_hf.pipelines.callbacks import RowPreview


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "projects" / "stickers"))
from make_sticker_edits import OPERATIONS, TRANSLATIONS, make_sample  # noqa: E402


GRID_SIZE, STRIDE = 16, 16
MASK_SHARES = (0.05, 0.15, 0.3, 0.5, 1.0)
WINDOWS = (1, 2, 4, 8, 16)
SETTINGS = [(how, scale) for how in ("greedy", "sampled") for scale in (1.0, 3.0)]


def time_rows(calls: dict[str, Callable], num_rounds: int, device: str) -> tuple[list[list[str]], dict]:
    """Time calls in turn. Return table rows and the results of the calls.

    A row has the name, the median, and the ratio to the first call as median (least – most).
    """
    seconds, results = time_in_turn(calls, num_rounds, device)
    base = next(iter(seconds.values()))
    rows = [[name, f"{statistics.median(times):.2f}", format_ratios(times, base)] for name, times in seconds.items()]
    return rows, results


# Random weights


def draw_square_mask(share: float) -> torch.BoolTensor:
    """Draw a mask with a square in the middle of the grid that covers about `share` of all tokens."""
    side = round(GRID_SIZE * share**0.5)
    first = (GRID_SIZE - side) // 2
    mask = torch.zeros(1, GRID_SIZE, GRID_SIZE, dtype=torch.bool)
    mask[:, first : first + side, first : first + side] = True
    return mask.flatten(1)


def benchmark_masks(model, source, prompt_embeds, num_rounds: int) -> str:
    """Time an edit without a mask, and an edit with each mask."""
    edit = partial(model.generate, source, prompt_embeds, do_sample=False, return_dict_in_generate=True)
    calls = {"no mask": edit}
    for share in MASK_SHARES:
        mask = draw_square_mask(share).to(source.device)
        calls[f"{mask.sum()} ({mask.float().mean():.0%})"] = partial(edit, edit_mask=mask)
    rows, outputs = time_rows(calls, num_rounds, source.device.type)
    rows = [[name, str(outputs[name].num_decode_steps), *cells] for name, *cells in rows]
    return format_table(["tokens that may change", "passes", "s", "of an edit without mask"], rows)


def benchmark_second_edit(model, vq_model, source, prompt_embeds, num_rounds: int) -> str:
    """Time all work before the first token (VQ encoder, source and text), with and without a source cache."""
    pixels = torch.zeros(1, 3, GRID_SIZE * STRIDE, GRID_SIZE * STRIDE, device=source.device)
    cache = model.prepare_source_cache(source)
    first_token = torch.zeros_like(source, dtype=torch.bool)
    first_token[:, 0] = True
    edit = partial(model.generate, prompt_embeds=prompt_embeds, do_sample=False, edit_mask=first_token)
    calls = {
        "first edit of an image": lambda: (vq_model.encode(pixels), edit(source_image_tokens=source)),
        "second, with `source_cache`": lambda: edit(source_cache=cache),
    }
    rows, _ = time_rows(calls, num_rounds, source.device.type)
    if source.device.type == "cpu" and model.dtype == torch.float32 and explain_missing_kernel() is None:
        model.pack_weights()
        rows += time_rows({f"{name}, packed": call for name, call in calls.items()}, num_rounds, "cpu")[0]
        model.unpack_weights()
    return format_table(["VQ encoder and prefill", "s", "of the first"], rows)


def benchmark_previews(model, vq_model, source, prompt_embeds, processor, num_rounds: int) -> str:
    """Time an edit with its image, the previews of its rows alone, and the previews of a larger edit.

    The last preview is left out: it is the result, which the pipeline then does not decode again.
    """

    def draw_previews(grid_size: int, num_rows: int):
        pixels = torch.zeros(1, 3, grid_size * STRIDE, grid_size * STRIDE, device=source.device)
        preview = RowPreview(vq_model, pixels, None, (grid_size, grid_size), 1, processor.postprocess)
        tokens = torch.zeros(1, grid_size**2, dtype=torch.long, device=source.device)
        for row in range(1, num_rows + 1):
            preview.draw(tokens[:, : row * grid_size])

    def edit():
        model.generate(source, prompt_embeds, do_sample=False)
        vq_model.decode(source)

    large = 2 * GRID_SIZE
    name = f"{large - 1} previews at {large * STRIDE}×{large * STRIDE}; the edit is at half of that"
    calls = {
        "an edit": edit,
        "the first preview": partial(draw_previews, GRID_SIZE, 1),
        f"{GRID_SIZE - 1} previews, of every row but the last": partial(draw_previews, GRID_SIZE, GRID_SIZE - 1),
        name: partial(draw_previews, large, large - 1),
    }
    draw_previews(GRID_SIZE, 2)  # warm-up: libraries initialize in the first convolutions of a shape
    return format_table(["", "s", "of an edit"], time_rows(calls, num_rounds, source.device.type)[0])


# The sticker editor


def make_samples(num_samples: int, resolution: int) -> dict[str, list[dict]]:
    """Make test samples of each task."""
    tasks = (*OPERATIONS, *TRANSLATIONS)
    per_task = max(num_samples // len(tasks), 1)
    return {
        task: [
            make_sample(0, "test", place + turn * len(tasks), resolution, (task, "seen", None))
            for turn in range(per_task)
        ]
        for place, task in enumerate(tasks)
    }


def benchmark_drafts(pipe, samples: dict[str, list[dict]]) -> tuple[str, str]:
    """Count passes for each sampling mode, guidance scale, kind of edit and window, and time the windows."""
    num_tokens = pipe.transformer.config.num_image_tokens
    ways = {0: {}} | {window: {"decoding": "speculative", "num_draft_tokens": window} for window in WINDOWS}
    rows, seconds, num_different = [], {window: [] for window in ways}, 0
    for choice, scale in SETTINGS:
        settings = {"do_sample": choice == "sampled", "guidance_scale": scale, "return_dict_in_generate": True}
        for task, of_task in samples.items():
            passes, kept = {window: [] for window in WINDOWS}, []
            for index, sample in enumerate(of_task):
                tokens = pipe.encode_image(sample["source_image"])
                embeds = pipe.encode_prompt(sample["prompt"], sample["task"])
                exact = None
                for window in (0, *WINDOWS) if index % 2 == 0 else (0, *WINDOWS[::-1]):
                    how = {"generator": torch.Generator().manual_seed(0), **settings, **ways[window]}
                    edit = partial(pipe.transformer.generate, tokens, embeds, **how)
                    spent, output = time_call(edit, tokens.device.type)
                    seconds[window].append(spent)
                    if window:
                        passes[window].append(output.num_decode_steps)
                    else:
                        exact = output.sequences
                    num_different += (output.sequences != exact).any().item()
                kept.append((exact == tokens).float().mean().item())
            means = [statistics.mean(counts) for counts in passes.values()]
            cells = [f"{mean:.1f} ({(num_tokens - 1) / mean:.2f})" for mean in means]
            rows.append([choice, f"{scale:g}", task, f"{statistics.mean(kept):.0%}", *cells])
    header = ["tokens are", "guidance", "kind of edit", "source tokens kept", *(f"window {w}" for w in WINDOWS)]
    medians = {window: statistics.median(times) for window, times in seconds.items()}
    times = [[str(window), f"{median:.3f}", f"{median / medians[0]:.2f}"] for window, median in medians.items()]
    note = f"{num_different} speculative results differ from the exact result in at least one token."
    return f"{format_table(header, rows)}\n\n{note}", format_table(["window", "s", "of exact"], times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=80, help="test samples of the sticker editor, for drafts")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the timings with random weights")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--model", default=str(ROOT / "projects/stickers/sticker-editor"), help="the sticker editor")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    model = build_model("GPT-B", GRID_SIZE, dtype, args.device)
    source, prompt_embeds = build_inputs(model, 1, args.device)
    torch.manual_seed(0)
    vq_model = EditARVQModel(EditARVQConfig()).to(args.device).eval()
    # float32, because in bf16 passes of different lengths may choose different tokens where two logits almost agree.
    pipe = EditARPipeline.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    resolution = pipe.processor.image_processor.size.height
    samples = make_samples(args.samples, resolution)
    with torch.no_grad():
        parts = (
            benchmark_masks(model, source, prompt_embeds, args.rounds),
            benchmark_second_edit(model, vq_model, source, prompt_embeds, args.rounds),
            benchmark_previews(model, vq_model, source, prompt_embeds, pipe.processor, args.rounds),
        )
        drafts, draft_times = benchmark_drafts(pipe, samples)
    words = "".join(f" {word}" for word in sys.argv[1:])
    how = "One thread; seconds are processor time" if args.device == "cpu" else "Seconds until the GPU is done"
    report = f"""# Control: masks, kept sources, previews, drafts

{machine} {how}; ratios are medians (least – most) of rounds
({args.rounds}) in alternating order. Made by `python benchmarks/bench_control.py{words}`.

## GPT-B at 256×256, {str(dtype)[6:]}, VQ-16, float32, random weights

{parts[0]}

{parts[1]}

{parts[2]}

## The sticker editor, fp32: drafts

Number of passes after the prefill, for an edit of {pipe.transformer.config.num_image_tokens} tokens, and in brackets
the number of tokens per pass; {len(samples["add"])} test samples of each kind. Drafts are the source tokens at first,
then the tokens that earlier passes chose. The share of accepted drafts does not carry over to the published weights,
which have another vocabulary and grid.

{drafts}

Processor time of an edit, median over all edits of the table above:

{draft_times}
"""
    write_result("control" if args.device == "cpu" else "control-gpu", report)


if __name__ == "__main__":
    main()
