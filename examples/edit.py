"""Edit an image by instruction: python examples/edit.py"""

import torch
from PIL import Image

from editar_hf import EditARPipeline


device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = EditARPipeline.from_pretrained("examples/scene-editor").to(device)

image = Image.open("examples/photo.png")
# The same seed gives the same result. A higher guidance scale follows the prompt more closely.
edited = pipe(
    "remove the dog",
    image=image,
    guidance_scale=1.5,
    generator=torch.Generator().manual_seed(0),
).images[0]
edited.save("edited.png")
