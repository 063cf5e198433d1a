"""The model card that a pipeline folder gets when it has none.

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

pipe = EditARPipeline.from_pretrained("{name}")

image = Image.new("RGB", (512, 512), "lightgrey")  # or your own: Image.open("photo.png")
ImageDraw.Draw(image).ellipse((150, 150, 350, 350), fill="red")
edited = pipe("make the red circle blue", image=image, generator=torch.Generator().manual_seed(0)).images[0]
edited.save("edited.png")
```"""
PIPELINE_CARD = """\
---
library_name: editar-hf
pipeline_tag: image-to-image
tags: [editar, image-editing]
---

# {title}

Edits images by instruction, one token after the other: an EditAR model
([arXiv 2501.04699](https://arxiv.org/abs/2501.04699)) with its VQ tokenizer and text encoder, for the Python package
`editar-hf`.

{snippet}

Guidance and sampling default to the settings in `transformer/generation_config.json`.

{closing}"""
OPEN_CLOSING = """\
## Data, figures, licence

Not stated yet. Whoever trained these weights can say here what they were trained on, how well they do and under which
terms they may be used.
"""


def compose_pipeline_card(name: str, closing: str = OPEN_CLOSING) -> str:
    """Compose the card of a pipeline that loads under `name`, a Hub id or a folder; `closing` is its last part."""
    return PIPELINE_CARD.format(title=name.rpartition("/")[2], snippet=SNIPPET.format(name=name), closing=closing)


def write_pipeline_card(folder: str | Path, name: str):
    """Write the card into a pipeline folder; one that is there already is somebody's work and stays."""
    path = Path(folder) / CARD_FILE
    if not path.exists():
        path.write_text(compose_pipeline_card(name), encoding="utf-8")
