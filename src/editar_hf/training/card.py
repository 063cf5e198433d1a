"""The card of what `examples/train_editar.py` trained, a pipeline or a LoRA adapter: how to run it, how it was made."""

import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard

from ..model_card import compose_adapter_card, compose_pipeline_card


PACKAGES = ("editar-hf", "torch", "transformers", "diffusers", "accelerate", "datasets")
TRAINING_SECTION = """\
## Training

Trained from `{base_model}` on `{dataset}`{num_pairs}, for {num_steps:,} steps of {num_samples_per_step:,} \
pairs. The VQ tokenizer stayed as it was{frozen}. The command:

```
{command}
```

With {versions}.

## Figures

{figures}

## Licence

{license}
"""
PICTURE_FILE = "validation.png"
FIGURES = "Loss on pairs held out: {validation_loss:.4f} nats a token. Some of them, as source, edited and target:"
NO_FIGURES = "Not stated yet: no pairs were held out. Whoever trained these weights can say here how well they do."
NO_LICENSE = (
    "Not stated yet. Whoever trained these weights can say here under which terms they, and the data, may be used."
)


def compose_training_card(
    name: str,
    base_model: str,
    dataset: str,
    num_pairs: int | None,
    num_steps: int,
    num_samples_per_step: int,
    trained_text_encoder: bool,
    command: Sequence[str],
    is_adapter: bool = False,
    validation_loss: float | None = None,
    license: str | None = None,
) -> str:
    """Compose the card of a trained pipeline or adapter: that of any such, and what its training is known by.

    Args:
        name (`str`): Folder or Hub id it loads under.
        base_model (`str`): Folder or Hub id of the pipeline the training started from.
        dataset (`str`): What it was trained on: Hub id, folder, pattern of files, or recipe.
        num_pairs (`int`, *optional*): Rows of the data set, where they are known.
        num_steps (`int`): Optimiser steps since `base_model`, those of earlier launches included.
        num_samples_per_step (`int`): Pairs per step, of all processes and accumulated batches.
        trained_text_encoder (`bool`): Whether the text encoder was trained along.
        command (`Sequence[str]`): The words of the command, as in `sys.argv`.
        is_adapter (`bool`): Whether a LoRA adapter for `base_model` was trained.
        validation_loss (`float`, *optional*): The last one; beside the card lies then `validation.png`.
        license (`str`, *optional*): Identifier of the licence that whoever trained the weights gives them.
    """
    versions = [f"{package} {version(package)}" for package in PACKAGES]
    section = TRAINING_SECTION.format(
        base_model=base_model,
        dataset=dataset,
        num_pairs="" if num_pairs is None else f", {num_pairs:,} pairs",
        num_steps=num_steps,
        num_samples_per_step=num_samples_per_step,
        frozen="; the text encoder was trained along" if trained_text_encoder else ", and so did the text encoder",
        command=shlex.join(command),
        figures=NO_FIGURES if validation_loss is None else compose_figures(validation_loss),
        license=NO_LICENSE if license is None else f"`{license}`.",
        versions=f"Python {platform.python_version()}, {', '.join(versions)}",
    )
    card = compose_adapter_card(name, base_model, section) if is_adapter else compose_pipeline_card(name, section)
    card = ModelCard(card)
    # The Hub refuses a card whose ids are folders of somebody's machine.
    if is_hub_id(dataset):
        card.data.datasets = [dataset]
    if is_hub_id(base_model):
        card.data.base_model = base_model
    if license is not None:
        card.data.license = license
    return str(card)


def compose_figures(validation_loss: float) -> str:
    return f"{FIGURES.format(validation_loss=validation_loss)}\n\n![source, edited, target]({PICTURE_FILE})"


def is_hub_id(path: str) -> bool:
    """Tell an id such as `user/name` from a folder or a pattern of files."""
    return not Path(path).exists() and not any(sign in path for sign in "*?[") and path.count("/") <= 1
