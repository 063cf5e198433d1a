"""A Space of the Hugging Face Hub that edits images in the browser. README.md says how to create it."""

import os
from pathlib import Path


try:
    import spaces  # ZeroGPU has this package; it must be imported before torch.
except ImportError:
    spaces = None

import torch
from PIL import Image

from editar_hf import EditARPipeline
from editar_hf.serving.gradio_app import Example, create_demo, launch_demo


# A pipeline on the Hub, or its folder. Set the variable in the settings of the Space.
pipe = EditARPipeline.from_pretrained(os.environ["MODEL"])
pipe.set_progress_bar_config(disable=True)
if torch.cuda.is_available():
    pipe.to("cuda")

photo = Image.open(Path(__file__).with_name("photo.png"))
options = {"gpu": spaces.GPU} if spaces else {}
demo = create_demo(pipe, [Example(photo, "remove the dog")], **options)

if __name__ == "__main__":
    launch_demo(demo)
