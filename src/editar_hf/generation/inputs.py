"""Settings of `generate`, and checks of its tensors. All are done before the first forward."""

from collections.abc import Mapping, Sequence

import torch
from transformers import GenerationConfig

from ..checks import check_choice, check_flag, check_integer, check_number, check_tensor
from .cache import SourceCache, sample_weights
from .sampling import DecodingSettings


def resolve_settings(
    own: GenerationConfig, given: GenerationConfig | None, arguments: Mapping[str, object]
) -> DecodingSettings:
    """Merge the settings of the model, those of a call's `generation_config` and its arguments; later ones win.

    None leaves a setting open, so `GenerationConfig(top_k=5)` changes one. What all leave open has its published value.

    Raises:
        ValueError: If a value is out of range, or a configuration has a setting of transformers' `generate` that this
            decoding does not have.
    """
    values: dict = {}
    for layer in (own.to_dict(), given.to_dict() if given else {}, arguments):
        values |= {name: value for name, value in layer.items() if value is not None}
    for name, value in values.items():
        is_note = name.startswith("_") or name == "transformers_version"
        if name not in DecodingSettings._fields and value is not False and not is_note:
            raise ValueError(
                f"`{name}` is {value!r}, a setting that EditAR's decoding does not have; remove it. There are "
                f"{', '.join(DecodingSettings._fields)}."
            )
    settings = DecodingSettings(**{name: values[name] for name in DecodingSettings._fields if name in values})
    check_flag("do_sample", settings.do_sample)
    check_integer("top_k", settings.top_k, minimum=0)
    for name in ("temperature", "top_p", "guidance_scale"):
        check_number(name, getattr(settings, name))
    if settings.temperature < 0 or (settings.do_sample and settings.temperature == 0):
        raise ValueError(
            f"`temperature` is {settings.temperature}; sampling needs a positive one. For the likeliest tokens pass "
            "`do_sample=False`."
        )
    if not 0 < settings.top_p <= 1:
        raise ValueError(f"`top_p` is {settings.top_p}; it is a probability in (0, 1], and 1 keeps all tokens.")
    return settings


def check_source_image_tokens(source_image_tokens: torch.Tensor, vocab_size: int) -> None:
    """Refuse source tokens that are no codes of the vocabulary."""
    check_tensor("source_image_tokens", source_image_tokens)
    if source_image_tokens.dtype != torch.long:
        raise ValueError(f"`source_image_tokens` holds {source_image_tokens.dtype}; pass tokens as torch.long.")
    lowest, highest = source_image_tokens.min().item(), source_image_tokens.max().item()
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"`source_image_tokens` holds ids from {lowest} to {highest}; this model's vocabulary has 0 to "
            f"{vocab_size - 1}. Encode the image with the tokenizer that belongs to the model."
        )


def check_tensors(
    source_image_tokens: torch.Tensor | None,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None,
    edit_mask: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Refuse text states that are not finite or not of the model's `dtype`, and tensors that do not fit each other."""
    if source_image_tokens is not None and len(source_image_tokens) != len(prompt_embeds):
        raise ValueError(
            f"`source_image_tokens` has batch size {len(source_image_tokens)} and `prompt_embeds` "
            f"{len(prompt_embeds)}; repeat one of them so that every row has its partner."
        )
    if negative_prompt_embeds is not None and negative_prompt_embeds.shape != prompt_embeds.shape:
        raise ValueError(
            f"`negative_prompt_embeds` has shape {tuple(negative_prompt_embeds.shape)}; pass one of the shape of "
            f"`prompt_embeds`, {tuple(prompt_embeds.shape)}."
        )
    for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
        if embeds is None:
            continue
        if embeds.dtype != dtype and not torch.is_autocast_enabled(embeds.device.type):
            raise ValueError(f"`{name}` holds {embeds.dtype}; convert it to the model's {dtype}.")
        if not embeds.isfinite().all():
            raise ValueError(
                f"`{name}` holds NaN or infinity. The text encoder may have overflowed in float16: encode the prompt "
                "in bfloat16 or float32."
            )
    if edit_mask is None:
        return
    if source_image_tokens is None:
        raise ValueError("`edit_mask` is given without `source_image_tokens`, of which it keeps some; pass them too.")
    if edit_mask.dtype != torch.bool or edit_mask.shape != source_image_tokens.shape:
        raise ValueError(
            f"`edit_mask` is {edit_mask.dtype} of shape {tuple(edit_mask.shape)}; give torch.bool of shape "
            f"{tuple(source_image_tokens.shape)}, a value for each source token, True where it may change."
        )


def check_generator(generator: torch.Generator | Sequence[torch.Generator] | None, num_images: int) -> None:
    """Refuse what is no generator, and a list of generators that is not one per image."""
    generators = generator if isinstance(generator, list | tuple) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in generators):
        raise ValueError(f"`generator` is {generator!r}; pass `torch.Generator().manual_seed(0)`, or a list of them.")
    if generators is generator and len(generators) != num_images:
        raise ValueError(
            f"`generator` is a list of {len(generators)} for {num_images} images; pass one, or one per image."
        )


def check_decoding(decoding: str, num_draft_tokens: int | None, image_guidance_scale: float, has_source: bool) -> None:
    """Refuse a way of decoding that does not exist, and what needs a source where there is none."""
    check_choice("decoding", decoding, ("exact", "speculative"))
    if decoding == "speculative" and not has_source:
        raise ValueError("`decoding` is 'speculative', which drafts from the source; pass one, or decode 'exact'.")
    if num_draft_tokens is not None:
        check_integer("num_draft_tokens", num_draft_tokens)
        if decoding == "exact":
            raise ValueError(f"`num_draft_tokens` is {num_draft_tokens}; pass `decoding='speculative'` for drafts.")
    check_number("image_guidance_scale", image_guidance_scale)
    if image_guidance_scale != 1 and not has_source:
        raise ValueError(
            f"`image_guidance_scale` is {image_guidance_scale} without a source image; pass one, or leave it out."
        )


def check_source_cache(
    source_cache: SourceCache, dtype: torch.dtype, device: torch.device, grid_height: int, grid_width: int
) -> None:
    """Refuse a cache of another grid, dtype or device."""
    own, given = source_cache.keys[0], (source_cache.grid_height, source_cache.grid_width)
    if given != (grid_height, grid_width):
        raise ValueError(
            f"`source_cache` is of a grid of {given[0]} × {given[1]} tokens, this call of {grid_height} × "
            f"{grid_width}; prepare one of that size."
        )
    if own.dtype != dtype or own.device != device:
        raise ValueError(
            f"`source_cache` is {own.dtype} on {own.device} and the decoder {dtype} on {device}; prepare it again with "
            "the decoder as it is now."
        )


def check_weights(source_cache: SourceCache, decoder: torch.nn.Module) -> None:
    """Refuse a cache of another decoder, or of this one before its weights or adapters changed."""
    own, given = sample_weights(decoder), source_cache.weight_samples
    if own.keys() != given.keys() or any(own[name] and given[name] not in ([], own[name]) for name in own):
        raise ValueError(
            "`source_cache` is of another decoder, or of this one with other weights or adapters; prepare it again "
            "with `prepare_source_cache`."
        )
