"""Measure decoding and training on a GPU within a time budget, the most important figures first.

    python benchmarks/bench_gpu.py                # GPT-XL at 512×512 in bf16, in 130 s
    python benchmarks/bench_gpu.py --rehearse     # tiny sizes on the CPU, in seconds

Whole edits with every system would take ten minutes. Therefore only the prefill and some tokens are timed, and whole
edits only where they are quick. Each stage has a time limit. If a stage fails or runs out of time, the next stage still
runs. After each stage, the results so far are written to `generation-gpu.md` and `generation-gpu.json`. Weights are
random.
"""

import argparse
import gc
import json
import signal
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from bench_training import NO_DROPOUT, count_operations
from generation_gpu import (
    NUM_WATCHED,
    Device,
    compare_attention,
    measure_floors,
    time_decoding,
    watch_tokens,
)
from generation_systems import (
    DECODERS,
    GUIDANCE_SCALE,
    PLACES,
    build_inputs,
    build_model,
    check_parity,
    check_paths,
    compute_decode_floor,
)
from report import RESULTS, describe_machine, format_table, time_call
from torch._dynamo.utils import counters

from editar_hf import EditARVQConfig, EditARVQModel
from editar_hf.pipelines.callbacks import RowPreview
from editar_hf.training.optimization import build_optimizer


FULL = {
    "large": ("GPT-XL", 32),
    "small": ("GPT-B", 16),
    "vq_model": {},
    "parity_tokens": 32,
    "timed": 32,
    # (edits in a batch, different sources among them)
    "batches": ((4, 4), (16, 16), (16, 1)),
    "training_batch_size": 8,
    "training_seconds": 6.0,
    "compile_options": {},
}
TINY = {
    "large": ("tiny", 6),
    "small": ("tiny", 6),
    "vq_model": {"base_channels": 8, "norm_num_groups": 4},
    "parity_tokens": 4,
    "timed": 2,
    "batches": ((2, 1),),
    "training_batch_size": 2,
    "training_seconds": 0.1,
    "compile_options": {"backend": "eager"},
}
# Options of `compile_decoding`. A captured step is one CUDA graph.
CAPTURED = {"editar_hf, captured": {"disable": True}}
COMPILED = {
    "editar_hf, compiled and captured": {},
    "editar_hf, compiled": {},
    "editar_hf, reduce-overhead": {"mode": "reduce-overhead"},
}
NUM_KERNELS = 15


class TimeIsUp(BaseException):
    """The time limit of a stage. It is not an `Exception`, so that the measured code does not catch it."""


@contextmanager
def limit_time(seconds: float):
    """Raise `TimeIsUp` after `seconds`."""

    def stop(*_):
        raise TimeIsUp

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class Benchmark:
    """The stages and their `results`, a dict that JSON can hold. If a stage fails, the results so far are kept."""

    def __init__(self, is_rehearsal: bool):
        self.device = Device("cpu" if is_rehearsal else "cuda")
        self.sizes = TINY if is_rehearsal else FULL
        self.results = {
            "title": "rehearsal on a CPU, worth nothing" if is_rehearsal else "GPT-XL at 512×512, bf16",
            "machine": describe_machine(),
            "stages": {},
            "parity": {},
            "edits": [],
            "failures": [],
        }
        self.large_model = None

    @contextmanager
    def use(self, model, system: str):
        """Compile the decoding of a model as a system does, and undo that at the end."""
        options = {**CAPTURED, **COMPILED}.get(system)
        if options is None:
            yield
            return
        if system in COMPILED and not self.device.is_gpu:
            options = {"backend": "eager"}
        model.compile_decoding(**options)
        if system == "editar_hf, compiled":
            model.compiled_decoding.captures_steps = False
        try:
            yield
        finally:
            model.compiled_decoding = None
            torch.compiler.reset()  # frees the graphs and their memory
            gc.collect()

    def get_large_model(self):
        """Build the large decoder once."""
        if self.large_model is None:
            self.large_model = build_model(*self.sizes["large"], torch.bfloat16, self.device.name)
        return self.large_model

    def measure_floors(self):
        bandwidth, rate = measure_floors(self.device)
        self.results |= {"bandwidth": bandwidth, "matrix_rate": rate}
        print(f"copies {bandwidth / 1e12:.2f} TB/s, products {rate / 1e12:.0f} TFLOP/s", flush=True)

    # Parity, at the small size

    def check_eager(self):
        self.check("fp32", check_parity, torch.float32)
        self.check("bf16", check_parity, torch.bfloat16)
        self.check("bf16, 4 edits", check_parity, torch.bfloat16, batch_size=4)
        self.check("fp32, paths", check_paths, num_tokens=2 * self.sizes["parity_tokens"], is_compiled=False)
        self.check("fp32, captured paths", check_paths, num_tokens=2 * self.sizes["parity_tokens"], disable=True)

    def check_compiled(self):
        num_tokens, options = 2 * self.sizes["parity_tokens"], self.sizes["compile_options"]
        self.check("fp32, compiled paths", check_paths, num_tokens=num_tokens, **options)

    def check(self, name: str, compare: Callable[..., str], *dtype: torch.dtype, **how):
        """Record the finding of a comparison, or its error."""
        start = time.monotonic()
        how = {"num_tokens": self.sizes["parity_tokens"], "device": self.device.name, **how}
        try:
            finding = compare(*self.sizes["small"], *dtype, **how)
        except Exception as error:
            traceback.print_exc()
            finding = f"FAILED, {describe_error(error)}"
        self.results["parity"][name] = finding
        print(f"{name}: {finding} ({time.monotonic() - start:.1f} s)", flush=True)

    # Time, at the large size

    def time_one_edit(self):
        for system in (*CAPTURED, "editar_hf", "published style", "library"):
            self.time_system(system, 1, 1, rounds=1)
        self.time_whole_edits("editar_hf, captured")

    def time_compiled(self):
        self.time_system("editar_hf, compiled and captured", 1, 1)
        self.time_whole_edits("editar_hf, compiled and captured")

    def time_other_compilations(self):
        for system in ("editar_hf, compiled", "editar_hf, reduce-overhead"):
            self.time_system(system, 1, 1)

    def time_batches(self):
        for num_edits, num_sources in self.sizes["batches"]:
            for system in (*CAPTURED, "published style"):
                self.time_system(system, num_edits, num_sources, rounds=1)

    def time_compiled_batches(self):
        for num_edits, num_sources in reversed(self.sizes["batches"]):
            self.time_system("editar_hf, compiled and captured", num_edits, num_sources, rounds=1)

    def time_system(self, system: str, num_edits: int, num_sources: int, rounds: int = 2):
        """Time a system on a batch, and add the row to the results. If it fails, record the error."""
        model, device, num_timed = self.get_large_model(), self.device, self.sizes["timed"]
        source, prompt_embeds = build_inputs(model, num_edits, device.name)
        source = source[:num_sources].repeat_interleave(num_edits // num_sources, dim=0)
        row = {"edits": num_edits, "sources": num_sources, "system": system}
        decode = DECODERS.get(system, DECODERS["editar_hf"])
        try:
            with self.use(model, system):
                row |= time_decoding(decode, model, source, prompt_embeds, device, num_timed, rounds)
        except Exception as error:
            traceback.print_exc()
            self.results["failures"].append(f"{system}, {num_edits} edits: {describe_error(error)}")
            return
        num_others = source.shape[1] - 1
        floor = compute_decode_floor(model, num_edits, num_sources, model.dtype, self.results["bandwidth"])
        row |= {"edit": row["prefill"] + num_others * statistics.mean(row["tokens"]), "floor": num_others * floor}
        self.results["edits"].append(row)
        print(" | ".join(format_row(row)), flush=True)

    def time_whole_edits(self, system: str):
        """Time whole edits: sampled twice with another prompt and seed, and a second edit of the same image."""
        model = self.get_large_model()
        source, prompt_embeds = build_inputs(model, 2, self.device.name)
        source, how = source[:1], {"guidance_scale": GUIDANCE_SCALE, "top_k": 1000}
        with self.use(model, system):
            edit = lambda row: model.generate(source, prompt_embeds[row : row + 1], **how)  # noqa: E731
            times = [time_call(partial(edit, row), self.device.name)[0] for row in (0, 1, 0)]
            cache = model.prepare_source_cache(source)
            again = lambda: model.generate(prompt_embeds=prompt_embeds[1:], source_cache=cache, **how)  # noqa: E731
            times.append(time_call(again, self.device.name)[0])
            self.results.setdefault("whole_edits", {})[system] = times
            print("whole edits:", system, times, flush=True)
            self.watch(system)

    def watch(self, name: str = "eager"):
        """Record where `generate` waits for the device, and which kernels run on it, per token."""
        model, waits, kernels, host_calls = self.get_large_model(), Counter(), [], []
        inputs = build_inputs(model, 1, self.device.name)
        watch_tokens(model, *inputs, self.device.count_waits(waits))
        watch_tokens(model, *inputs, self.device.profile(kernels, host_calls))
        found = {
            "waits": {place: count / NUM_WATCHED for place, count in waits.items()},
            **{unit: sum(kernel[unit] for kernel in kernels) for unit in ("calls", "us")},
            "host": {call["name"]: call["calls"] for call in host_calls[:5]},
            "kernels": kernels[:NUM_KERNELS],
            "cuda_graphs_skipped": counters["inductor"]["cudagraph_skips"],
        }
        self.results.setdefault("watched", {})[name] = found
        print(f"{name}, a token:", {key: value for key, value in found.items() if key != "kernels"}, flush=True)

    def compare_attention(self):
        """Compare ways to compute the attention of a token, for one edit and for batches."""
        model = self.get_large_model()
        for num_edits, num_sources in ((1, 1), *self.sizes["batches"]):
            rows = compare_attention(self.device, model.config, num_edits, num_sources, model.dtype)
            found = [{"edits": num_edits, "sources": num_sources, **row} for row in rows]
            self.results.setdefault("attention", []).extend(found)
            print(*found, sep="\n", flush=True)

    @torch.no_grad()
    def time_vq(self):
        """Time the VQ encoder, the VQ decoder and all previews before the last, for one image."""
        device, sizes = self.device, self.sizes
        torch.manual_seed(0)
        vq_model = EditARVQModel(EditARVQConfig(**sizes["vq_model"])).eval().to(device.name, torch.bfloat16)
        grid_size = sizes["large"][1]
        side = vq_model.config.stride * grid_size
        pixels = torch.zeros(1, 3, side, side, device=device.name)
        tokens = torch.zeros(1, grid_size**2, dtype=torch.long, device=device.name)

        def draw_previews():
            preview = RowPreview(vq_model, pixels, None, (grid_size, grid_size), 1, torch.Tensor.cpu)
            for row in range(1, grid_size):
                preview.draw(tokens[:, : row * grid_size])

        calls = {
            "encode": lambda: vq_model.encode(pixels),
            "decode": lambda: vq_model.decode(tokens),
            f"{grid_size - 1} previews": draw_previews,
        }
        for call in calls.values():
            call()
        self.results["vq"] = {
            name: 1000 * min(time_call(call, device.name)[0] for _ in range(3)) for name, call in calls.items()
        }
        print("VQ model, ms:", self.results["vq"], flush=True)

    # Training

    def train(self):
        """Time training steps from tokens, with weights in fp32, computation in bf16, and each layer compiled."""
        device, batch_size, self.large_model = self.device, self.sizes["training_batch_size"], None
        device.free_memory()
        model = build_model(*self.sizes["large"], torch.float32, device.name, **NO_DROPOUT).train()
        source, prompt_embeds = build_inputs(model, batch_size, device.name)
        for layer in model.model.layers:
            layer.compile(**self.sizes["compile_options"])
        optimizer = build_optimizer(model.parameters())

        def step():
            with torch.autocast(device.name, torch.bfloat16):
                loss = model(source, prompt_embeds, labels=source.flip(1)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        first_step = time_call(step, device.name)[0]
        one_step = min(time_call(step, device.name)[0] for _ in range(2))
        num_steps = max(2, int(self.sizes["training_seconds"] / one_step))
        seconds = time_call(lambda: [step() for _ in range(num_steps)], device.name)[0]
        self.results["training"] = {
            "batch_size": batch_size,
            "first_step": first_step,
            "steps": num_steps,
            "samples_per_second": num_steps * batch_size / seconds,
            "operations_per_second": num_steps * batch_size * count_operations(model.config) / seconds,
            "memory": device.measure_peak_memory(),
        }
        print(f"training: {self.results['training']}", flush=True)

    # Running

    def run(self, names: list[str], seconds: float, output_dir: Path):
        """Run stages within `seconds`. Write the results after each stage."""
        end = time.monotonic() + seconds
        for name in names:
            method, least, most = STAGES[name]
            start, outcome = time.monotonic(), "done"
            if end - start < least and self.device.is_gpu:
                outcome = "skipped, no time left"
            else:
                try:
                    with limit_time(min(most, end - start) if self.device.is_gpu else most):
                        method(self)
                except TimeIsUp:
                    outcome = "stopped, out of time"
                except Exception as error:
                    traceback.print_exc()
                    outcome = f"failed, {describe_error(error)}"
            self.results["stages"][name] = {"outcome": outcome, "seconds": time.monotonic() - start}
            print(f"== {name}: {outcome} ({time.monotonic() - start:.1f} s)", flush=True)
            (output_dir / "generation-gpu.json").write_text(json.dumps(self.results, indent=1), encoding="utf-8")
            (output_dir / "generation-gpu.md").write_text(compose_page(self.results), encoding="utf-8")


# In order of importance: name → method, seconds that must be left to start the stage, seconds until it is stopped.
STAGES = {
    "floors": (Benchmark.measure_floors, 3, 20),
    "parity": (Benchmark.check_eager, 5, 30),
    "one edit": (Benchmark.time_one_edit, 8, 70),
    "watch": (Benchmark.watch, 3, 15),
    "one edit, compiled": (Benchmark.time_compiled, 25, 100),
    "batches": (Benchmark.time_batches, 5, 60),
    "training": (Benchmark.train, 12, 35),
    "VQ model": (Benchmark.time_vq, 5, 20),
    "attention": (Benchmark.compare_attention, 10, 60),
    "batches, compiled": (Benchmark.time_compiled_batches, 25, 150),
    "parity, compiled": (Benchmark.check_compiled, 20, 60),
    "one edit, other compilations": (Benchmark.time_other_compilations, 25, 150),
}


def describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def compose_page(results: dict) -> str:
    """Compose the results so far as Markdown."""
    parts = [f"# Decoding on a GPU: {results['title']}", results["machine"], describe_method(results)]
    parity = [f"* {name}: {finding}" for name, finding in results["parity"].items()]
    parts += ["## Parity, GPT-B at 256×256", "\n".join(parity)] if parity else []
    if results["edits"]:
        header = ["edits", "sources", "system", "prefill, ms", "token, ms, at the places"]
        header += ["edit, s", "images/s", "of the floor", "first call, s", "peak, GiB"]
        rows = [format_row(row) for row in results["edits"]]
        parts += ["## Time", format_table(header, rows), *(f"Failed: {failure}" for failure in results["failures"])]
    if "whole_edits" in results:
        header = ["whole edits, sampled", "first, s", "second, s", "third, s", "with `source_cache`, s"]
        rows = [[name, *(f"{one:.3f}" for one in times)] for name, times in results["whole_edits"].items()]
        parts.append(format_table(header, rows))
    for name, found in results.get("watched", {}).items():
        waits, host = (
            ", ".join(f"{name} {count:g}" for name, count in found[key].items()) or "none" for key in ("waits", "host")
        )
        rows = [[k["name"][:80].replace("|", "/"), f"{k['calls']:.1f}", f"{k['us']:.1f}"] for k in found["kernels"]]
        parts += [
            f"## A token, {name}, one edit",
            f"Where Python waits for the device: {waits}. Calls to the driver: {host}. CUDA graphs skipped by the "
            f"compiler: {found['cuda_graphs_skipped']}. {found['calls']:.0f} kernels, {found['us']:.0f} µs in all:",
            format_table(["kernel", "calls", "µs"], rows),
        ]
    if "vq" in results:
        rows = [[name, f"{spent:.1f}"] for name, spent in results["vq"].items()]
        parts += ["## VQ model, one image, bf16", format_table(["", "ms"], rows)]
    if "attention" in results:
        rows = [
            [str(row["edits"]), str(row["sources"]), row["way"]]
            + ([f"{row['us']:.0f}", f"{row['error']:.1e}"] if "us" in row else [row["failure"], ""])
            for row in results["attention"]
        ]
        parts += [
            "## Attention of a token, all layers",
            "Each way is one CUDA graph. The error is the largest difference from float64, of outputs of about 0.05.",
            format_table(["edits", "sources", "way", "µs", "error"], rows),
        ]
    if "training" in results:
        parts += ["## Training from tokens", describe_training(results)]
    stages = ", ".join(f"{name}: {s['outcome']} ({s['seconds']:.1f} s)" for name, s in results["stages"].items())
    return "\n\n".join([*parts, f"Stages: {stages}."]) + "\n"


def describe_method(results: dict) -> str:
    rates = ""
    if "bandwidth" in results:
        rates = f"Copies run at {results['bandwidth'] / 1e12:.2f} TB/s, products of 8192³ in bf16 at "
        rates += f"{results['matrix_rate'] / 1e12:.0f} TFLOP/s. "
    return (
        f"{rates}Random weights, greedy, guidance {GUIDANCE_SCALE}. {FULL['timed']} tokens are timed at each of "
        f"{len(PLACES)} places: 0, 1/3, 2/3 and the end of the target. The time of an edit is extrapolated: the mean "
        "time of a token, for each token after the first, is added to the prefill. The floor is the time to read "
        "weights, sources, and the keys and values of the target. `captured`: each step is one CUDA graph. The first "
        "call compiles or captures. Made by `python benchmarks/bench_gpu.py`."
    )


def format_row(row: dict) -> list[str]:
    tokens = " / ".join(f"{1000 * seconds:.2f}" for seconds in row["tokens"])
    cells = [f"{1000 * row['prefill']:.1f}", tokens, f"{row['edit']:.3f}", f"{row['edits'] / row['edit']:.2f}"]
    cells += [f"{row['floor'] / row['edit']:.0%}", f"{row['first_call']:.1f}", f"{row['memory']:.2f}"]
    return [str(row["edits"]), str(row["sources"]), row["system"], *cells]


def describe_training(results: dict) -> str:
    training = results["training"]
    share = ""
    if "matrix_rate" in results:
        share = f", {training['operations_per_second'] / results['matrix_rate']:.0%} of the rate of the 8192³ product"
    return (
        f"Batches of {training['batch_size']}, weights and AdamW in fp32, computed in bf16, each layer compiled: "
        f"{training['samples_per_second']:.2f} samples/s{share}; {training['steps']} steps, peak "
        f"{training['memory']:.1f} GiB, first step {training['first_step']:.1f} s."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=130, help="time for all stages together")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run; default: all")
    parser.add_argument("--output-dir", "--output_dir", type=Path, default=RESULTS, help="folder for results")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    args = parser.parse_args()
    if not (args.rehearse or torch.cuda.is_available()):
        raise SystemExit("No GPU was found. Pass `--rehearse` to try the stages at tiny sizes on the CPU.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    Benchmark(args.rehearse).run(args.stages, args.seconds, args.output_dir)


if __name__ == "__main__":
    main()
