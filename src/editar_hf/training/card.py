"""The cards of what the scripts in `examples/` train, pipelines, LoRA adapters and VQ tokenizers: how each was made."""

import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from ..configuration_editar import EditARVQConfig
from ..pipelines.hub import make_card


PACKAGES = ("editar-hf", "torch", "transformers", "diffusers", "accelerate", "datasets")
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
    figures = None
    if validation_loss is not None:
        figures = f"{FIGURES.format(validation_loss=validation_loss)}\n\n![source, edited, target]({PICTURE_FILE})"
    sections = {"training": training + describe_command(command), "figures": figures}
    return make_card("adapter" if is_adapter else "base", name, dataset, base_model, license, **sections)


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
    sizes = {"stride": config.stride, "num_codes": config.num_embeddings, "resolution": resolution}
    sections = {"training": training + describe_command(command), "figures": figures, **sizes}
    return make_card("tokenizer", name, dataset, base_model, license, **sections)


def describe_command(command: Sequence[str]) -> str:
    """Quote a command, and name the versions of the packages that ran it."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f" The command:\n\n```\n{shlex.join(command)}\n```\n\nWith Python {platform.python_version()}, {versions}."
