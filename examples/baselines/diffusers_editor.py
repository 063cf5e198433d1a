"""Make predictions with any image editor of diffusers. `editar-hf evaluate score` scores them.

    python examples/baselines/diffusers_editor.py --model black-forest-labs/FLUX.2-klein-4B --dtype bfloat16 \
        --benchmark pie-bench --source PIE-Bench_v1 --output-dir runs/flux

The pipeline must take `prompt`, `image` and `generator`. All other arguments keep their defaults.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from editar_hf.commands.evaluate import BENCHMARK, open_benchmark
from editar_hf.evaluation.run import generate
from editar_hf.evaluation.systems import System, fit, make_generators


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], parents=[BENCHMARK])
parser.add_argument("--model", required=True, help="folder or Hub id")
parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16; default: float32")
args = parser.parse_args()


def load():
    pipe = DiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype))

    def edit(samples, seeds):
        edited = []
        for sample, generator in zip(samples, make_generators(seeds), strict=True):
            (image,) = pipe(prompt=sample.prompt, image=sample.source_image, generator=generator).images
            edited.append(fit(image, sample.source_image.size))
        return edited

    return edit


system = System("diffusers", load, {"model": args.model, "dtype": args.dtype})
generate(open_benchmark(args), system, args.output_dir)
