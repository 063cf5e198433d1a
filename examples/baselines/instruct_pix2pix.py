"""Make predictions with InstructPix2Pix and its published settings. `editar-hf evaluate score` scores them.

python examples/baselines/instruct_pix2pix.py --benchmark pie-bench --source PIE-Bench_v1 --output-dir runs/ip2p
"""

import argparse
from functools import partial

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline

from editar_hf.commands.evaluate import BENCHMARK, open_benchmark
from editar_hf.evaluation.run import generate
from editar_hf.evaluation.systems import System, edit_batch


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], parents=[BENCHMARK])
parser.add_argument("--model", default="timbrooks/instruct-pix2pix", help="folder or Hub id")
parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16; default: float32")
# The settings of InstructPix2Pix (arXiv 2211.09800).
parser.add_argument("--num-inference-steps", type=int, default=100, help="default: 100")
parser.add_argument("--guidance-scale", type=float, default=7.5, help="default: 7.5")
parser.add_argument("--image-guidance-scale", type=float, default=1.5, help="default: 1.5")
args = parser.parse_args()
knobs = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale", "image_guidance_scale")}


def load():
    # The safety checker would replace some images by black ones.
    options = {"safety_checker": None, "requires_safety_checker": False}
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(args.model, **options)
    pipe.set_progress_bar_config(disable=True)
    return partial(
        edit_batch, pipe.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)), **knobs
    )


system = System("instruct-pix2pix", load, {"model": args.model, "dtype": args.dtype, **knobs})
generate(open_benchmark(args), system, args.output_dir)
