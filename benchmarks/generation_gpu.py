"""Time, profile and capture decoding on a GPU, for `bench_gpu.py`.

Tokens are timed without a wait for the device between them: the time of a call that decodes few tokens is subtracted
from the time of a call that decodes more. In a rehearsal, the device is "cpu", and functions skip what needs a GPU.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from baselines import select_greedily
from generation_systems import GUIDANCE_SCALE, PLACES, build_edit_mask
from report import measure_matrix_rate, measure_peak_memory, time_call
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from transformers import StoppingCriteria

from editar_hf.generation.decoding import CompiledDecoding, PassRunner
from editar_hf.generation.sampling import select_branches


# Passes before a call is timed. CUDA graphs are recorded in the second pass and replayed from the third pass on.
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

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record a step in a CUDA graph, after some warm-up runs. Return a function that replays the graph."""
        if not self.is_gpu:
            step()
            return step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

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


class CapturedDecoding:
    """Greedy decoding by a step that keeps its position in a tensor, so that one CUDA graph serves all tokens.

    This is an experiment. It shows the cost of decoding if Python only starts the same graph again and again.

    Args:
        model (`EditARForConditionalGeneration`): The decoder.
        forward (`Callable`): The forward of the decoder, compiled or not.
        source, prompt_embeds (`torch.Tensor`): Source tokens and text states of the edits.
        device (`Device`): The device.
    """

    def __init__(self, model, forward: Callable, source: torch.LongTensor, prompt_embeds: torch.Tensor, device: Device):
        self.forward, self.tokens = forward, source.clone()
        self.grid = dict.fromkeys(("grid_height", "grid_width"), model.config.grid_size)
        model.compiled_decoding = CompiledDecoding(model.forward)  # compiles nothing, but keeps caches at one address
        branches = select_branches(GUIDANCE_SCALE, 1)
        runner = PassRunner(model, source, prompt_embeds, None, branches, self.grid)
        logits = runner(self.tokens, None, [0])
        model.compiled_decoding, self.cache = None, runner.cache
        self.tokens[:, 0] = select_greedily(logits[:, :, 0].flatten(0, 1), GUIDANCE_SCALE)
        self.num_text_tokens = model.config.num_text_tokens
        self.position = torch.zeros(1, dtype=torch.long, device=source.device)
        self.replay = device.capture(self.step)
        self.position.zero_()

    def step(self):
        """Feed the token at the position, choose the next token, and advance the position."""
        logits = self.forward(
            target_image_tokens=self.tokens.index_select(1, self.position).repeat(2, 1),
            **self.cache.start_pass(self.num_text_tokens + self.position, 1),
            **self.grid,
        ).logits
        chosen = select_greedily(logits[:, -1].float(), GUIDANCE_SCALE)
        self.position += 1
        self.tokens.index_copy_(1, self.position, chosen[:, None])

    def decode(self, num_tokens: int) -> torch.LongTensor:
        """Decode the first `num_tokens` tokens again."""
        self.position.zero_()
        for _ in range(num_tokens - 1):
            self.replay()
        return self.tokens[:, :num_tokens]


@torch.no_grad()
def time_captured(model, forward, source, prompt_embeds, device: Device, num_timed: int) -> dict:
    """Time `CapturedDecoding` like `time_decoding`, but without the prefill and at one place only."""
    device.free_memory()
    first_call, decoding = time_call(
        lambda: CapturedDecoding(model, forward, source, prompt_embeds, device), device.name
    )
    decoding.decode(1 + num_timed)
    # Every step reads all slots of the cache, so the time of a token is the same at all places.
    spent = min(time_call(lambda: decoding.decode(1 + num_timed), device.name)[0] for _ in range(3))
    memory = device.measure_peak_memory()
    return {"first_call": first_call, "tokens": [spent / num_timed], "memory": memory}


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
