"""Resolve the settings of `generate` and check its arguments, before the decoder runs."""

import math
import numbers
from collections.abc import Mapping, Sequence

import torch
from transformers import GenerationConfig

from ..checks import check_choice, check_flag, check_integer, check_number, check_tensor
from .cache import SourceCache, sample_weights
from .sampling import DecodingSettings


# The `preserve_threshold` of models whose generation config has none, in nats.
PRESERVE_THRESHOLD = 1.0


def resolve_settings(
    own: GenerationConfig, given: GenerationConfig | None, arguments: Mapping[str, object]
) -> DecodingSettings:
    """Merge three levels of settings: the model's, those of a call's `generation_config`, and the call's arguments.

    Later levels take precedence. A setting that is None does not override, so `GenerationConfig(top_k=5)` changes only
    `top_k`. A setting that is None in all levels has its published value.

    Raises:
        ValueError: If a value is out of range, or a configuration has a setting of transformers' `generate` that this
            `generate` does not support.
    """
    values: dict = {}
    for layer in (own.to_dict(), given.to_dict() if given else {}, arguments):
        values |= {name: value for name, value in layer.items() if value is not None}
    for name, value in values.items():
        # Only the pipeline uses `preserve_threshold`; see `resolve_preserve_threshold`.
        is_note = name.startswith("_") or name in ("transformers_version", "preserve_threshold")
        if name not in DecodingSettings._fields and value is not False and not is_note:
            raise ValueError(
                f"`{name}` is {value!r}, but EditAR's `generate` does not support this setting; remove it. Supported "
                f"settings are {', '.join(DecodingSettings._fields)}."
            )
    settings = DecodingSettings(**{name: values[name] for name in DecodingSettings._fields if name in values})
    check_flag("do_sample", settings.do_sample)
    # As Python's own numbers, because those of numpy cannot be saved.
    settings = settings._replace(
        temperature=check_number("temperature", settings.temperature),
        top_k=check_integer("top_k", settings.top_k, minimum=0),
        top_p=check_number("top_p", settings.top_p),
        guidance_scale=check_number("guidance_scale", settings.guidance_scale),
    )
    if settings.temperature < 0 or (settings.do_sample and settings.temperature == 0):
        raise ValueError(
            f"`temperature` is {settings.temperature}; pass a positive number. For greedy decoding, pass "
            "`do_sample=False`."
        )
    if not 0 < settings.top_p <= 1:
        raise ValueError(f"`top_p` is {settings.top_p}; pass a probability in (0, 1]; 1 keeps all tokens.")
    return settings


def resolve_preserve_threshold(generation_config: GenerationConfig) -> float:
    """Return the `preserve_threshold` of a model in nats, or the default if it has none.

    Raises:
        ValueError: If it is not a finite number above 0.
    """
    threshold = getattr(generation_config, "preserve_threshold", None)
    if threshold is None:
        return PRESERVE_THRESHOLD
    is_number = isinstance(threshold, numbers.Real) and not isinstance(threshold, bool)
    if not is_number or not 0 < threshold < math.inf:  # This form also refuses NaN.
        raise ValueError(
            f"`preserve_threshold` is {threshold!r} in the generation config; set a finite number above 0, or None."
        )
    return float(threshold)


def check_source_image_tokens(source_image_tokens: torch.Tensor, vocab_size: int) -> None:
    """Check that source tokens are codes of the vocabulary."""
    check_tensor("source_image_tokens", source_image_tokens)
    if source_image_tokens.dtype != torch.long:
        raise ValueError(f"`source_image_tokens` holds {source_image_tokens.dtype}; pass tokens as torch.long.")
    lowest, highest = source_image_tokens.min().item(), source_image_tokens.max().item()
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"`source_image_tokens` holds tokens from {lowest} to {highest}; this model's vocabulary has 0 to "
            f"{vocab_size - 1}. Encode the image with the VQ model that belongs to the decoder."
        )


def check_tensors(
    source_image_tokens: torch.Tensor | None,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None,
    edit_mask: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Check that text states are finite and have the model's `dtype`, and that the tensors fit each other."""
    if source_image_tokens is not None and len(source_image_tokens) != len(prompt_embeds):
        raise ValueError(
            f"`source_image_tokens` has batch size {len(source_image_tokens)} and `prompt_embeds` has "
            f"{len(prompt_embeds)}; pass the same batch size for both."
        )
    if negative_prompt_embeds is not None and negative_prompt_embeds.shape != prompt_embeds.shape:
        raise ValueError(
            f"`negative_prompt_embeds` has shape {tuple(negative_prompt_embeds.shape)}; pass the same shape as "
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
        raise ValueError(
            "`edit_mask` is given without `source_image_tokens`; pass them too, because tokens outside the mask are "
            "copied from them."
        )
    if edit_mask.dtype != torch.bool or edit_mask.shape != source_image_tokens.shape:
        raise ValueError(
            f"`edit_mask` is {edit_mask.dtype} of shape {tuple(edit_mask.shape)}; pass torch.bool of shape "
            f"{tuple(source_image_tokens.shape)}: True for each token that may change."
        )


def check_generator(generator: torch.Generator | Sequence[torch.Generator] | None, num_images: int) -> None:
    """Check that `generator` is None, a generator, or a list with one generator for each image."""
    generators = generator if isinstance(generator, list | tuple) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in generators):
        raise ValueError(f"`generator` is {generator!r}; pass `torch.Generator().manual_seed(0)`, or a list of them.")
    if generators is generator and len(generators) != num_images:
        raise ValueError(
            f"`generator` is a list of {len(generators)} generators for {num_images} images; pass one generator, or "
            "one for each image."
        )


def check_decoding(decoding: str, num_draft_tokens: int | None, image_guidance_scale: float, has_source: bool) -> None:
    """Check the decoding mode, and that a source is given if an argument needs one."""
    check_choice("decoding", decoding, ("exact", "speculative"))
    if decoding == "speculative" and not has_source:
        raise ValueError(
            "`decoding` is 'speculative', which takes its drafts from a source image, but there is none; pass a source "
            "image, or `decoding='exact'`."
        )
    if num_draft_tokens is not None:
        check_integer("num_draft_tokens", num_draft_tokens)
        if decoding == "exact":
            raise ValueError(
                f"`num_draft_tokens` is {num_draft_tokens}, but `decoding` is 'exact', which has no drafts; pass "
                "`decoding='speculative'`, or leave `num_draft_tokens` out."
            )
    check_number("image_guidance_scale", image_guidance_scale)
    if image_guidance_scale != 1 and not has_source:
        raise ValueError(
            f"`image_guidance_scale` is {image_guidance_scale}, but there is no source image; pass a source image, or "
            "leave `image_guidance_scale` out."
        )


def check_source_cache(
    source_cache: SourceCache, dtype: torch.dtype, device: torch.device, grid_height: int, grid_width: int
) -> None:
    """Check that a cache has the grid of the call, and the dtype and device of the decoder."""
    own, given = source_cache.keys[0], (source_cache.grid_height, source_cache.grid_width)
    if given != (grid_height, grid_width):
        raise ValueError(
            f"`source_cache` has a grid of {given[0]} × {given[1]} tokens, and this call has a grid of {grid_height} × "
            f"{grid_width}; prepare a cache of that size."
        )
    if own.dtype != dtype or own.device != device:
        raise ValueError(
            f"`source_cache` is {own.dtype} on {own.device} and the decoder is {dtype} on {device}; prepare the cache "
            "again."
        )


def check_weights(source_cache: SourceCache, decoder: torch.nn.Module) -> None:
    """Check that a cache was prepared with this decoder, and that its weights and adapters have not changed since."""
    own, given = sample_weights(decoder), source_cache.weight_samples
    if own.keys() != given.keys() or any(own[name] and given[name] not in ([], own[name]) for name in own):
        raise ValueError(
            "`source_cache` was prepared with another decoder, or before the weights or adapters of this decoder "
            "changed; prepare it again with `prepare_source_cache`."
        )
