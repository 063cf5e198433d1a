"""Edit with a LoRA adapter that teaches the model a new instruction: python examples/edit_with_lora.py"""

import torch
from PIL import Image

from editar_hf import EditARPipeline


device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = EditARPipeline.from_pretrained("projects/stickers/sticker-editor").to(device)
# The sticker editor cannot copy stickers. This adapter was trained to copy them. It needs `pip install peft`.
pipe.load_lora_weights("projects/stickers/sticker-copy-lora", adapter_name="copy")
pipe.set_adapters("copy", 1.0)

edited = pipe(
    "copy the red circle to the top right",
    image=Image.open("projects/stickers/photo.png"),
    do_sample=False,
).images[0]
edited.save("copied.png")
