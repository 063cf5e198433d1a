"""The cards of what the scripts in `examples/` train, pipelines, LoRA adapters and VQ tokenizers: how each was made."""

import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard

from ..configuration_editar import EditARVQConfig
from ..model_card import compose_adapter_card, compose_pipeline_card, compose_tokenizer_card


PACKAGES = ("editar-hf", "torch", "transformers", "diffusers", "accelerate", "datasets")
TRAINING_SECTION = """\
## Training

{training} The command:

```
{command}
```

With {versions}.

## Figures

{figures}

## Licence

{license}
"""
TRAINING = """\
Trained from `{base_model}` on `{dataset}`{num_pairs}, for {num_steps:,} steps of {num_samples_per_step:,} \
pairs. The VQ tokenizer stayed as it was{frozen}."""
TOKENIZER_TRAINING = """\
Trained{start} on {num_pictures:,} pictures of `{dataset}`, for {num_steps:,} steps of {num_samples_per_step:,}, at \
{resolution} × {resolution} pixels."""
PICTURE_FILE = "validation.png"
FIGURES = "Loss on pairs held out: {validation_loss:.4f} nats a token. Some of them, as source, edited and target:"
TOKENIZER_FIGURES = """\
On {num_pictures:,} pictures held out: PSNR {psnr:.2f} dB; {code_usage:.1%} of the codes used, with a perplexity of \
{perplexity:,.0f}. Some of them, and below each what comes back from its tokens:

![pictures, and what comes back](validation.png)"""
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
    training = TRAINING.format(
        base_model=base_model,
        dataset=dataset,
        num_pairs="" if num_pairs is None else f", {num_pairs:,} pairs",
        num_steps=num_steps,
        num_samples_per_step=num_samples_per_step,
        frozen="; the text encoder was trained along" if trained_text_encoder else ", and so did the text encoder",
    )
    figures = NO_FIGURES if validation_loss is None else compose_figures(validation_loss)
    section = compose_training_section(training, command, figures, license)
    card = compose_adapter_card(name, base_model, section) if is_adapter else compose_pipeline_card(name, section)
    return fill_header(card, dataset, base_model, license)


def compose_tokenizer_training_card(
    name: str,
    config: EditARVQConfig,
    base_model: str | None,
    dataset: str,
    num_pictures: int,
    resolution: int,
    num_steps: int,
    num_samples_per_step: int,
    command: Sequence[str],
    figures: Mapping[str, float],
    num_held_out: int,
    license: str | None = None,
) -> str:
    """Compose the card of a trained VQ tokenizer; beside it lies `validation.png`.

    Args:
        name (`str`): Folder or Hub id it loads under.
        config (`EditARVQConfig`): Its sizes.
        base_model (`str`, *optional*): Folder or Hub id of the tokenizer the training started from.
        dataset (`str`): What it was trained on: Hub id, folder or file.
        num_pictures (`int`): Pictures trained on.
        resolution (`int`): Their sides, in pixels.
        num_steps (`int`): Optimiser steps, those of earlier launches included.
        num_samples_per_step (`int`): Pictures per step, of all processes.
        command (`Sequence[str]`): The words of the command, as in `sys.argv`.
        figures (`Mapping[str, float]`): What `evaluate_tokenizer` measured: `psnr`, `code_usage`, `perplexity`.
        num_held_out (`int`): Pictures they were measured on.
        license (`str`, *optional*): Identifier of the licence that whoever trained the weights gives them.
    """
    training = TOKENIZER_TRAINING.format(
        start="" if base_model is None else f" from `{base_model}`",
        num_pictures=num_pictures,
        dataset=dataset,
        num_steps=num_steps,
        num_samples_per_step=num_samples_per_step,
        resolution=resolution,
    )
    figures = TOKENIZER_FIGURES.format(num_pictures=num_held_out, **figures)
    section = compose_training_section(training, command, figures, license)
    card = compose_tokenizer_card(name, config.stride, config.num_embeddings, resolution, section)
    return fill_header(card, dataset, base_model, license)


def compose_training_section(training: str, command: Sequence[str], figures: str, license: str | None) -> str:
    versions = [f"{package} {version(package)}" for package in PACKAGES]
    return TRAINING_SECTION.format(
        training=training,
        command=shlex.join(command),
        versions=f"Python {platform.python_version()}, {', '.join(versions)}",
        figures=figures,
        license=NO_LICENSE if license is None else f"`{license}`.",
    )


def fill_header(card: str, dataset: str, base_model: str | None, license: str | None) -> str:
    """Name data, base model and licence in a card's header; the Hub refuses ids that are folders of some machine."""
    card = ModelCard(card)
    if is_hub_id(dataset):
        card.data.datasets = [dataset]
    if base_model is not None and is_hub_id(base_model):
        card.data.base_model = base_model
    if license is not None:
        card.data.license = license
    return str(card)


def compose_figures(validation_loss: float) -> str:
    return f"{FIGURES.format(validation_loss=validation_loss)}\n\n![source, edited, target]({PICTURE_FILE})"


def is_hub_id(path: str) -> bool:
    """Tell an id such as `user/name` from a folder or a pattern of files."""
    return not Path(path).exists() and not any(sign in path for sign in "*?[") and path.count("/") <= 1
