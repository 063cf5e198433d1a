"""Measure memory, time and tokens of edits with 8-bit weights, on one CPU thread.

    pip install torchao bitsandbytes
    python benchmarks/bench_quantization.py

The sticker editor shows how many tokens stay the same as in float32, with greedy decoding on test samples that this
script draws. GPT-B at 256×256 with random weights shows the memory and the processor time of one edit. Results are
written to `benchmarks/results/quantization.md`.
"""

import argparse
import tempfile
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import torch
from bench_control import make_samples
from diffusers import PipelineQuantizationConfig
from generation_systems import build_inputs, build_model
from report import describe_machine, format_table, time_call, write_result
from torchao.quantization import Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig, TorchAoConfig

from editar_hf import EditARForConditionalGeneration, EditARPipeline


STICKER_EDITOR = Path(__file__).parents[1] / "projects" / "stickers" / "sticker-editor"
QUANTIZED = ("transformer", "text_encoder")
# Ways to load, each with its dtype, whether weights are then packed, and the maker of a quantization configuration.
WAYS = {
    "float32": (torch.float32, False, None),
    "packed": (torch.float32, True, None),
    "bfloat16": (torch.bfloat16, False, None),
    "torchao, float32": (torch.float32, False, lambda: TorchAoConfig(Int8WeightOnlyConfig())),
    "torchao, bfloat16": (torch.bfloat16, False, lambda: TorchAoConfig(Int8WeightOnlyConfig())),
    "bitsandbytes, float16": (torch.float16, False, lambda: BitsAndBytesConfig(load_in_8bit=True)),
}


def load_editor(way: str) -> EditARPipeline:
    """Load the sticker editor in one of the ways."""
    dtype, is_packed, make_config = WAYS[way]
    options = {}
    if make_config is not None:
        mapping = {name: make_config() for name in QUANTIZED}
        options["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)
    pipe = EditARPipeline.from_pretrained(STICKER_EDITOR, dtype=dtype, **options)
    pipe.set_progress_bar_config(disable=True)
    if is_packed:
        pipe.pack_weights()
    return pipe


def measure_weights(way: str, *models: torch.nn.Module) -> str:
    """Measure the bytes of the weights in MiB. Packed weights cannot be written; they have 16 bits."""
    if WAYS[way][1]:
        return "as bfloat16"
    file = BytesIO()
    torch.save([model.state_dict() for model in models], file)
    return f"{file.tell() / 2**20:.1f}"


def measure_editor(samples: list[dict]) -> list[list[str]]:
    """Edit the samples in each way, and compare the tokens with those of float32."""
    rows, expected = [], None
    for way in WAYS:
        pipe = load_editor(way)

        def edit(pipe=pipe) -> torch.Tensor:
            calls = ({"prompt": sample["prompt"], "image": sample["source_image"]} for sample in samples)
            return torch.cat([pipe(**call, do_sample=False).image_tokens for call in calls])

        edit()  # The first calls are slower.
        seconds, tokens = time_call(edit, "cpu")
        expected = tokens if expected is None else expected
        same = f"{(tokens == expected).float().mean():.1%}"
        weights = measure_weights(way, pipe.transformer, pipe.text_encoder)
        rows.append([way, weights, f"{seconds / len(samples):.2f}", same])
    return rows


def measure_decoder() -> list[list[str]]:
    """Decode one edit with GPT-B in each way."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        build_model("GPT-B", 16, torch.bfloat16, "cpu").save_pretrained(folder)
        for way, (dtype, is_packed, make_config) in WAYS.items():
            options = {} if make_config is None else {"quantization_config": make_config()}
            model = EditARForConditionalGeneration.from_pretrained(folder, dtype=dtype, **options)
            source, prompt_embeds = build_inputs(model, 1, "cpu")
            weights = measure_weights(way, model)
            if is_packed:
                model.pack_weights()
            seconds, _ = time_call(lambda: model.generate(source, prompt_embeds.to(dtype), do_sample=False), "cpu")  # noqa: B023
            rows.append([way, weights, f"{seconds:.1f}"])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=16, help="test samples of the sticker editor")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torchao", "bitsandbytes"))
    samples = [sample for task in make_samples(args.samples, 64).values() for sample in task]
    editor = format_table(["weights", "MiB", "s per edit", "tokens of float32"], measure_editor(samples))
    decoder = format_table(["weights", "MiB", "s per edit"], measure_decoder())
    report = f"""# 8-bit weights

{machine} {versions}. One thread; seconds are processor time. Each time is measured once, so it is good to a fifth. Made
by `python benchmarks/bench_quantization.py`.

"torchao" is `Int8WeightOnlyConfig`, and "bitsandbytes" is `load_in_8bit`, each with the dtype of everything else.
"MiB" counts the weights of the decoder, and for the sticker editor also the text encoder.

## The sticker editor, {len(samples)} edits, greedy

Once a token differs, the tokens after it may differ too, so other tokens do not mean a worse edit.

{editor}

## GPT-B at 256×256, one edit, random weights

{decoder}
"""
    write_result("quantization", report)


if __name__ == "__main__":
    main()
