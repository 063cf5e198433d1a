"""Make predictions for depth, canny or segmentation with a ControlNet. `editar-hf evaluate score` scores them.

    python examples/baselines/controlnet.py --benchmark depth --controlnet lllyasviel/control_v11f1p_sd15_depth \
        --output-dir runs/controlnet

Models of ControlNet++ load too: pass a folder such as `reward_controlnet/checkpoints/depth/controlnet`.
"""

import argparse
from functools import partial

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

from editar_hf.commands.evaluate import BENCHMARK, open_benchmark
from editar_hf.evaluation.run import generate
from editar_hf.evaluation.systems import System, edit_batch


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], parents=[BENCHMARK])
parser.add_argument("--controlnet", required=True, help="folder or Hub id")
parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="folder or Hub id")
parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16; default: float32")
# The evaluation of ControlNet++ uses 20 steps.
parser.add_argument("--num-inference-steps", type=int, default=20, help="default: 20")
parser.add_argument("--guidance-scale", type=float, default=7.5, help="default: 7.5")
args = parser.parse_args()
knobs = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale")}


def load():
    dtype = getattr(torch, args.dtype)
    controlnet = ControlNetModel.from_pretrained(args.controlnet)
    # The safety checker would replace some images by black ones.
    options = {"controlnet": controlnet, "safety_checker": None, "requires_safety_checker": False}
    pipe = StableDiffusionControlNetPipeline.from_pretrained(args.model, **options)
    pipe.set_progress_bar_config(disable=True)
    return partial(edit_batch, pipe.to("cuda" if torch.cuda.is_available() else "cpu", dtype), **knobs)


options = {"model": args.model, "controlnet": args.controlnet, "dtype": args.dtype, **knobs}
generate(open_benchmark(args), System("controlnet", load, options), args.output_dir)
