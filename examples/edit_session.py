"""Edit an image several times without loss between the edits: python examples/edit_session.py"""

import torch
from PIL import Image

from editar_hf import EditARPipeline


device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = EditARPipeline.from_pretrained("examples/scene-editor").to(device)

image = Image.open("examples/photo.png")
mask_image = Image.open("examples/photo-mask.png")
generator = torch.Generator().manual_seed(0)

tokens = pipe.encode_image(image)
for prompt in ("make the car red", "remove the car"):
    # Each edit starts from the tokens of the previous result, so no image is encoded twice.
    source = {"image": image, "source_image_tokens": tokens, "mask_image": mask_image}
    output = pipe(prompt, **source, restore_size=True, generator=generator)
    image, tokens = output.images[0], output.image_tokens
image.save("edited_twice.png")
