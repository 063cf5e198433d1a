"""The model card that a folder with a pipeline, a LoRA adapter for one, or a VQ tokenizer gets when it has none.

It says what can be known without asking: how to run the model, under its own name. What only its maker knows (data,
figures, licence) is left to them; `model_cards/` in the repository has a template for that.
"""

from pathlib import Path


CARD_FILE = "README.md"
# The picture is drawn, so that the snippet runs as it stands, anywhere.
SNIPPET = """\
```python
import torch
from PIL import Image, ImageDraw
from editar_hf import EditARPipeline

{load}

image = Image.new("RGB", (512, 512), "lightgrey")  # or your own: Image.open("photo.png")
ImageDraw.Draw(image).ellipse((150, 150, 350, 350), fill="red")
edited = pipe("make the red circle blue", image=image, generator=torch.Generator().manual_seed(0)).images[0]
edited.save("edited.png")
```"""
TOKENIZER_SNIPPET = """\
```python
import torch
from PIL import Image, ImageDraw
from editar_hf import EditARImageProcessor, EditARVQModel

vq_model = EditARVQModel.from_pretrained("{name}").eval()
processor = EditARImageProcessor(size={resolution}, stride=vq_model.config.stride)

image = Image.new("RGB", (512, 512), "lightgrey")  # or your own: Image.open("photo.png")
ImageDraw.Draw(image).ellipse((150, 150, 350, 350), fill="red")
pixel_values = processor(image).pixel_values
with torch.no_grad():
    image_tokens = vq_model.encode(pixel_values).image_tokens
    decoded = vq_model.decode(image_tokens, *(side // vq_model.config.stride for side in pixel_values.shape[-2:]))
processor.postprocess(decoded)[0].save("decoded.png")
```"""
LOAD_PIPELINE = 'pipe = EditARPipeline.from_pretrained("{name}")'
LOAD_ADAPTER = 'pipe = EditARPipeline.from_pretrained("{base_model}")\npipe.load_lora_weights("{name}")'
CARD = """\
---
library_name: editar-hf
pipeline_tag: image-to-image
tags: [editar, {tag}]
---

# {title}

{description}

{snippet}

{closing}"""
PIPELINE_DESCRIPTION = """\
Edits images by instruction, one token after the other: an EditAR model
([arXiv 2501.04699](https://arxiv.org/abs/2501.04699)) with its VQ tokenizer and text encoder, for the Python package
`editar-hf`. Guidance and sampling default to the settings in `transformer/generation_config.json`. Without `dtype` the
weights load as they are stored where the device computes in that dtype, and in float32 elsewhere."""
ADAPTER_DESCRIPTION = """\
A LoRA adapter, in PEFT's format, for the decoder of `{base_model}`: an EditAR model
([arXiv 2501.04699](https://arxiv.org/abs/2501.04699)), which edits images by instruction. For the Python package
`editar-hf`."""
TOKENIZER_DESCRIPTION = """\
A VQ tokenizer for EditAR ([arXiv 2501.04699](https://arxiv.org/abs/2501.04699)) models, for the Python package
`editar-hf`: pictures to a grid of tokens, one for each {stride} × {stride} pixels, out of {num_codes:,}; and back."""
OPEN_CLOSING = """\
## Data, figures, licence

Not stated yet. Whoever trained these weights can say here what they were trained on, how well they do and under which
terms they may be used.
"""


def compose_snippet(name: str) -> str:
    """Compose the code that loads the pipeline `name` and edits a picture with it."""
    return SNIPPET.format(load=LOAD_PIPELINE.format(name=name))


def compose_pipeline_card(name: str, closing: str = OPEN_CLOSING) -> str:
    """Compose the card of a pipeline that loads under `name`, a Hub id or a folder; `closing` is its last part."""
    return compose_card(name, PIPELINE_DESCRIPTION, compose_snippet(name), closing)


def compose_adapter_card(name: str, base_model: str, closing: str = OPEN_CLOSING) -> str:
    """Compose the card of a LoRA adapter `name` for the pipeline `base_model`; `closing` is its last part."""
    snippet = SNIPPET.format(load=LOAD_ADAPTER.format(name=name, base_model=base_model))
    return compose_card(name, ADAPTER_DESCRIPTION.format(base_model=base_model), snippet, closing)


def compose_tokenizer_card(name: str, stride: int, num_codes: int, resolution: int, closing: str = OPEN_CLOSING) -> str:
    """Compose the card of a VQ tokenizer that loads under `name`; `closing` is its last part.

    Args:
        name (`str`): Hub id or folder.
        stride (`int`): Pixels per token and side.
        num_codes (`int`): Of its codebook.
        resolution (`int`): Pixels per side of the pictures it was trained on.
        closing (`str`): Data, figures and licence.
    """
    description = TOKENIZER_DESCRIPTION.format(stride=stride, num_codes=num_codes)
    snippet = TOKENIZER_SNIPPET.format(name=name, resolution=resolution)
    return compose_card(name, description, snippet, closing, tag="vq-tokenizer")


def compose_card(name: str, description: str, snippet: str, closing: str, tag: str = "image-editing") -> str:
    title = name.rpartition("/")[2]
    return CARD.format(title=title, description=description, snippet=snippet, closing=closing, tag=tag)


def write_pipeline_card(folder: str | Path, name: str):
    """Write the card into a pipeline folder; one that is there already is somebody's work and stays."""
    path = Path(folder) / CARD_FILE
    if not path.exists():
        path.write_text(compose_pipeline_card(name), encoding="utf-8")
