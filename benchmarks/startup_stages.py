"""Import, load and edit in this process, and print the processor seconds of each stage as JSON, for `bench_startup.py`.

With `--pause-gc`, Python collects no garbage during the imports, as in `editar-hf edit`:

    python benchmarks/startup_stages.py float32 --pause-gc
"""

import gc
import json
import statistics
import sys
import time
from pathlib import Path


STICKERS = Path(__file__).parents[1] / "projects" / "stickers"
seconds: dict[str, float] = {}
last = time.process_time()


def end_stage(name: str):
    global last
    now = time.process_time()
    seconds[name], last = now - last, now


# ruff: noqa: E402, F401, I001
if "--pause-gc" in sys.argv:
    gc.disable()
import editar_hf

end_stage("`import editar_hf`")
import torch

end_stage("`import torch`")
from transformers import GenerationMixin, PreTrainedModel, ProcessorMixin, T5EncoderModel

end_stage("import of what the pipeline uses of transformers")
from diffusers import DiffusionPipeline

end_stage("import of what it uses of diffusers")
from editar_hf import EditARPipeline

if "--pause-gc" in sys.argv:
    gc.enable()
    gc.freeze()
end_stage("`from editar_hf import EditARPipeline` after these")
pipe = EditARPipeline.from_pretrained(STICKERS / "sticker-editor", dtype=getattr(torch, sys.argv[1]))
end_stage("`EditARPipeline.from_pretrained`")
from PIL import Image

pipe.set_progress_bar_config(disable=True)
image, tokens = Image.open(STICKERS / "photo.png"), []


def edit():
    generator = torch.Generator().manual_seed(0)
    edited = pipe("make the red circle blue", image=image, generator=generator)
    tokens.append(edited.image_tokens.tolist())


def measure_median_of_edits(name: str):
    for number in range(5):
        edit()
        end_stage(f"{name} {number}")
    seconds[name] = statistics.median(seconds.pop(f"{name} {number}") for number in range(5))


edit()
end_stage("first edit")
measure_median_of_edits("a later edit")
if sys.argv[1] == "float32":
    pipe.pack_weights()
    end_stage("`pipe.pack_weights()`")
    measure_median_of_edits("a later edit with packed weights")
print(json.dumps({"seconds": seconds, "tokens": tokens, "total": time.process_time()}))
