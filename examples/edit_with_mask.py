"""Edit only the masked part of an image: python examples/edit_with_mask.py"""

import torch
from PIL import Image

from editar_hf import EditARPipeline


device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = EditARPipeline.from_pretrained("examples/scene-editor").to(device)

image = Image.open("examples/photo.png")
# White marks where the image may change. The mask has the size of the image.
mask_image = Image.open("examples/photo-mask.png")
edited = pipe(
    "make the car red",
    image=image,
    mask_image=mask_image,
    generator=torch.Generator().manual_seed(0),
).images[0]
edited.save("edited_with_mask.png")
