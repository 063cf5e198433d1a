"""Checks of what `generate` is given, all done before the first forward."""

from collections.abc import Sequence

import torch

from ..configuration_editar import EditARConfig


def check_prompt_embeds(config: EditARConfig, name: str, prompt_embeds: torch.Tensor):
    """Refuse text states that are not `(batch, num_text_tokens, text_hidden_size)`."""
    expected = (config.num_text_tokens, config.text_hidden_size)
    if prompt_embeds.ndim != 3 or prompt_embeds.shape[1:] != expected:
        raise ValueError(
            f"`{name}` has shape {tuple(prompt_embeds.shape)}; expected (batch, {expected[0]}, {expected[1]}), the "
            "states of the text encoder that belongs to this model, padded to its text length."
        )


def check_batch_size(name: str, tensor: torch.Tensor, batch_size: int):
    """Refuse a tensor of another batch size than `prompt_embeds`."""
    if len(tensor) != batch_size:
        raise ValueError(
            f"`{name}` has batch size {len(tensor)} and `prompt_embeds` {batch_size}; repeat one of them so that every "
            "row has its partner."
        )


def check_source_image_tokens(
    config: EditARConfig, source_image_tokens: torch.LongTensor, grid_height: int, grid_width: int
):
    """Refuse source tokens that are not `(batch, grid_height · grid_width)` codes of the vocabulary."""
    if source_image_tokens.ndim != 2 or source_image_tokens.shape[1] != grid_height * grid_width:
        raise ValueError(
            f"`source_image_tokens` has shape {tuple(source_image_tokens.shape)}; a grid of {grid_height} × "
            f"{grid_width} needs (batch, {grid_height * grid_width}). Pass `grid_height` and `grid_width` for other "
            "sizes."
        )
    lowest, highest = source_image_tokens.min().item(), source_image_tokens.max().item()
    if lowest < 0 or highest >= config.vocab_size:
        raise ValueError(
            f"`source_image_tokens` holds ids from {lowest} to {highest}; this model's vocabulary has 0 to "
            f"{config.vocab_size - 1}. Encode the image with the tokenizer that belongs to the model."
        )


def check_generate_inputs(
    config: EditARConfig,
    source_image_tokens: torch.LongTensor | None,
    prompt_embeds: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    image_guidance_scale: float,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    grid_height: int,
    grid_width: int,
):
    """Refuse tensors and generators that do not fit the model or each other.

    Raises:
        ValueError: With the argument, what it is and what to do.
    """
    if prompt_embeds is None:
        raise ValueError("`prompt_embeds` is None; pass the text encoder's states of the prompt.")
    check_prompt_embeds(config, "prompt_embeds", prompt_embeds)
    batch_size = len(prompt_embeds)
    if negative_prompt_embeds is not None:
        check_prompt_embeds(config, "negative_prompt_embeds", negative_prompt_embeds)
        check_batch_size("negative_prompt_embeds", negative_prompt_embeds, batch_size)
    if source_image_tokens is not None:
        check_source_image_tokens(config, source_image_tokens, grid_height, grid_width)
        check_batch_size("source_image_tokens", source_image_tokens, batch_size)
    elif image_guidance_scale != 1:
        raise ValueError(
            f"`image_guidance_scale` is {image_guidance_scale} without `source_image_tokens`; pass a source image, or "
            "leave the scale out."
        )
    if isinstance(generator, Sequence) and len(generator) != batch_size:
        raise ValueError(
            f"`generator` is a list of {len(generator)} for {batch_size} images; pass one, or one per image."
        )
