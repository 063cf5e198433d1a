"""Time and profile decoding on a GPU, for `bench_gpu.py`.

Tokens are timed without a wait for the device between them: the time of a call that decodes few tokens is subtracted
from the time of a call that decodes more. In a rehearsal, the device is "cpu", and functions skip what needs a GPU.
"""

import gc
import math
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from generation_systems import GUIDANCE_SCALE, PLACES, build_edit_mask
from report import measure_matrix_rate, measure_peak_memory, time_call
from torch.autograd import DeviceType
from torch.nn.attention.flex_attention import flex_attention
from torch.profiler import ProfilerActivity
from transformers import StoppingCriteria

from editar_hf.generation.cache import SourceCache, attend_in_one_softmax
from editar_hf.generation.decoding import capture_graph


# Passes before a call is timed. With "reduce-overhead", the second pass records CUDA graphs; later ones replay them.
NUM_WARM_UP = 4
NUM_WATCHED = 8


class Device:
    """The GPU of a benchmark, or the CPU in a rehearsal.

    Args:
        name (`str`): "cuda", or "cpu" in a rehearsal.
    """

    def __init__(self, name: str):
        self.name = name
        self.is_gpu = name != "cpu"

    def free_memory(self):
        """Release unused memory, and reset the peak."""
        if self.is_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def measure_peak_memory(self) -> float:
        """Return the peak memory since `free_memory`, in GiB."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.is_gpu else measure_peak_memory()

    @contextmanager
    def count_waits(self, waits: Counter):
        """Count how often Python waits for the device, for each "file:line"."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if self.is_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                if self.is_gpu:
                    torch.cuda.set_sync_debug_mode("default")
        places = [(Path(one.filename), one.lineno) for one in caught if "a synchronizing" in str(one.message)]
        waits.update(f"{file.parent.name}/{file.name}:{line}" for file, line in places)

    @contextmanager
    def profile(self, kernels: list[dict], host_calls: list[dict]):
        """Add kernels to `kernels` and calls to the driver to `host_calls`. On a CPU, add operations to `kernels` only.

        Each entry has a name, and calls and microseconds per token. The longest comes first.
        """
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.is_gpu else [])]
        with torch.profiler.profile(activities=activities) as profiler:
            yield
            if self.is_gpu:
                torch.cuda.synchronize()
        for event in profiler.key_averages():
            is_kernel = event.device_type == DeviceType.CUDA
            spent = event.self_device_time_total if is_kernel else event.self_cpu_time_total
            found = {"name": event.key, "calls": event.count / NUM_WATCHED, "us": spent / NUM_WATCHED}
            if not self.is_gpu or (is_kernel and not event.is_user_annotation):
                kernels.append(found)
            elif not is_kernel and event.key.startswith("cu"):
                host_calls.append(found)
        for listed in (kernels, host_calls):
            listed.sort(key=lambda one: -one["us"])


def measure_floors(device: Device) -> tuple[float, float]:
    """Measure the copy bandwidth (reads and writes) in bytes per second, and the FLOP per second of bf16 products.

    The matrices of the products are 8192×8192.
    """
    size, num_bytes = (8192, 2**32) if device.is_gpu else (256, 2**20)
    block = torch.randint(256, (num_bytes,), device=device.name, dtype=torch.uint8)
    target = torch.empty_like(block)
    copies = lambda: [target.copy_(block) for _ in range(10)]  # noqa: E731
    seconds = min(time_call(copies, device.name)[0] for _ in range(4)) / 10
    return 2 * num_bytes / seconds, measure_matrix_rate(device.name, torch.bfloat16, size)


def time_decoding(decode, model, source, prompt_embeds, device: Device, num_timed: int, rounds: int = 2) -> dict:
    """Time one of the `DECODERS`.

    Returns:
        `dict`: Seconds of the first call, of the prefill (up to the first token), and of a token at each of `PLACES`,
        and the peak memory in GiB, weights included.
    """
    num_tokens, grid_size = source.shape[1], model.config.grid_size

    def run(first: int, count: int) -> float:
        positions = range(first, first + count)
        call = lambda: decode(model, source, prompt_embeds, GUIDANCE_SCALE, grid_size, positions)  # noqa: E731
        return time_call(call, device.name)[0]

    device.free_memory()
    first_call = run(0, 1 + NUM_WARM_UP)
    prefill, tokens = min(run(0, 1) for _ in range(rounds)), []
    for place in PLACES:
        first = min(round(place * num_tokens), num_tokens - 1 - num_timed)
        spent = [run(first, 1 + num_timed) - run(first, 1) for _ in range(rounds)]
        tokens.append(min(spent) / num_timed)
    memory = device.measure_peak_memory()
    return {"first_call": first_call, "prefill": prefill, "tokens": tokens, "memory": memory}


@torch.no_grad()
def compare_attention(device: Device, config, num_edits: int, num_sources: int, dtype: torch.dtype) -> list[dict]:
    """Time the attention of all layers for one token in the middle of the target, in several ways.

    Each way is captured in one CUDA graph. The keys and values are those of a static cache, with one text slot.

    Returns:
        `list[dict]`: For each way, its name, microseconds, and the largest difference from float64, or its error.
    """
    num_rows, num_tokens, heads = 2 * num_edits, config.num_image_tokens, config.num_attention_heads
    generator = torch.Generator(device.name).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, config.head_dim, generator=generator, device=device.name, dtype=dtype)

    layers = range(config.num_hidden_layers)
    sources = {name: [draw(num_sources, heads, num_tokens) for _ in layers] for name in ("keys", "values")}
    own = {name: [draw(num_rows, heads, num_tokens) for _ in layers] for name in ("keys", "values")}
    query, scale = draw(num_rows, heads, 1), config.head_dim**-0.5
    last = torch.tensor(num_tokens // 2, device=device.name)
    is_read = torch.arange(num_tokens, device=device.name) <= last
    bias = torch.where(is_read, 0.0, -math.inf)[None, None, None]
    source = SourceCache(
        torch.zeros(num_sources, 1), **sources, grid_height=1, grid_width=1, num_rows=num_rows, num_images=num_edits
    )
    # As in `DecodingCache`, the values have the slots innermost.
    source.values, own_values = ([one.mT.contiguous().mT for one in of] for of in (source.values, own["values"]))

    def attend_in_two_parts(layer: int) -> torch.Tensor:
        return attend_in_one_softmax(query * scale, source, layer, own["keys"][layer], own_values[layer], bias)

    repeats = num_edits // num_sources
    joined = {
        name: [
            torch.cat([shared.repeat_interleave(repeats, dim=0).repeat(2, 1, 1, 1), rows], dim=2)
            for shared, rows in zip(sources[name], own[name], strict=True)
        ]
        for name in own
    }
    mask = torch.cat([torch.ones_like(is_read), is_read])[None, None, None]

    def attend_with_sdpa(layer: int) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, joined["keys"][layer], joined["values"][layer], mask)

    def mask_later_slots(score, row, head, position, slot):
        return torch.where(slot <= num_tokens + last, score, -math.inf)

    compiled_flex = torch.compile(flex_attention) if device.is_gpu else flex_attention

    def attend_with_flex(layer: int) -> torch.Tensor:
        return compiled_flex(query, joined["keys"][layer], joined["values"][layer], mask_later_slots)

    compiled_parts = torch.compile(attend_in_two_parts) if device.is_gpu else attend_in_two_parts
    ways = {
        "two parts": attend_in_two_parts,
        "two parts, compiled": compiled_parts,
        "SDPA, sources copied to all rows": attend_with_sdpa,
        "FlexAttention, sources copied to all rows": attend_with_flex,
    }
    exact = F.scaled_dot_product_attention(query.double(), *(joined[name][0].double() for name in own), mask)
    found = []
    for name, attend in ways.items():
        try:
            replay = capture_graph(lambda attend=attend: [attend(layer) for layer in layers], last.device)
            seconds = min(
                time_call(lambda replay=replay: [replay() for _ in range(20)], device.name)[0] for _ in range(3)
            )
            error = (attend(0).double() - exact).abs().max().item()
            found.append({"way": name, "us": 1e6 * seconds / 20, "error": error})
        except Exception as error:
            found.append({"way": name, "failure": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
        torch.compiler.reset()
    return found


class BetweenTokens(StoppingCriteria):
    """Enter a context after some tokens, and leave it after `NUM_WATCHED` more. This criterion never ends decoding."""

    def __init__(self, context, first: int):
        self.context, self.first = context, first

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == self.first:
            self.context.__enter__()
        elif input_ids.shape[1] == self.first + NUM_WATCHED:
            self.context.__exit__(None, None, None)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def watch_tokens(model, source, prompt_embeds, context) -> None:
    """Run `generate` with a context around some of its tokens in the middle of the target."""
    first = source.shape[1] // 2
    edit_mask = build_edit_mask(source, range(first, first + NUM_WARM_UP + NUM_WATCHED + 1))
    criteria = [BetweenTokens(context, first + NUM_WARM_UP)]
    how = {"do_sample": False, "guidance_scale": GUIDANCE_SCALE, "edit_mask": edit_mask}
    model.generate(source, prompt_embeds, stopping_criteria=criteria, **how)
