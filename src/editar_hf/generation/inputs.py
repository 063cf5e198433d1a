"""Checks of what `generate` is given, all done before the first forward."""

import inspect
from collections.abc import Sequence

import torch
from transformers import GenerationConfig, LogitsProcessor

from ..checks import check_choice, check_flag, check_integer, check_number, check_tensor
from ..configuration_editar import EditARConfig
from .cache import SourceCache
from .sampling import DecodingSettings


DECODINGS = ("exact", "speculative")


def resolve_settings(
    own: GenerationConfig, given: GenerationConfig | None, arguments: dict[str, object]
) -> DecodingSettings:
    """Merge the settings of the model, those of a call's `generation_config` and its arguments; later ones win.

    None leaves a setting open, so `GenerationConfig(top_k=5)` changes one. What all leave open has its published value.

    Raises:
        ValueError: If a value is out of range, `given` is no configuration, or one has a setting of transformers'
            `generate` that this decoding does not have.
    """
    if given is not None and not isinstance(given, GenerationConfig):
        raise ValueError(f"`generation_config` is {given!r:.80}; pass a `GenerationConfig`.")
    values, fields = {}, DecodingSettings._fields
    for layer in (own.to_dict(), {} if given is None else given.to_dict(), arguments):
        values |= {name: value for name, value in layer.items() if value is not None}
    for name, value in values.items():
        is_note = name.startswith("_") or name == "transformers_version"
        if name not in fields and value is not False and not is_note:
            raise ValueError(
                f"`{name}` is {value!r}, a setting that EditAR's decoding does not have; remove it. There are "
                f"{', '.join(fields)}."
            )
    settings = DecodingSettings(**{name: value for name, value in values.items() if name in fields})
    check_flag("do_sample", settings.do_sample)
    temperature, top_p, guidance_scale = (
        check_number(name, getattr(settings, name)) for name in ("temperature", "top_p", "guidance_scale")
    )
    top_k = check_integer("top_k", settings.top_k, minimum=0)
    if not temperature >= 0 or (settings.do_sample and temperature == 0):
        raise ValueError(
            f"`temperature` is {temperature}; sampling needs a positive one. For the likeliest tokens pass "
            "`do_sample=False`."
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` is {top_p}; it is a probability in (0, 1], and 1 keeps all tokens.")
    return DecodingSettings(settings.do_sample, temperature, top_k, top_p, guidance_scale)


def check_prompt_embeds(config: EditARConfig, name: str, prompt_embeds: torch.Tensor):
    """Refuse text states that are not finite floats of shape `(batch, num_text_tokens, text_hidden_size)`."""
    check_tensor(name, prompt_embeds)
    expected = (config.num_text_tokens, config.text_hidden_size)
    if prompt_embeds.ndim != 3 or prompt_embeds.shape[1:] != expected:
        raise ValueError(
            f"`{name}` has shape {tuple(prompt_embeds.shape)}; expected (batch, {expected[0]}, {expected[1]}), the "
            "states of the text encoder that belongs to this model, padded to its text length."
        )
    if not prompt_embeds.is_floating_point():
        raise ValueError(f"`{name}` holds {prompt_embeds.dtype}; pass the floating-point states of `encode_prompt`.")
    if not prompt_embeds.isfinite().all():
        raise ValueError(
            f"`{name}` holds NaN or infinity. The text encoder may have overflowed in float16: encode the prompt in "
            "bfloat16 or float32."
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
    check_tensor("source_image_tokens", source_image_tokens)
    if source_image_tokens.dtype != torch.long:
        raise ValueError(f"`source_image_tokens` holds {source_image_tokens.dtype}; pass tokens as torch.long.")
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
    check_generator(generator, batch_size)


def check_generator(generator: torch.Generator | Sequence[torch.Generator] | None, num_images: int):
    """Refuse what is no generator, and a list of generators that is not one per image."""
    generators = generator if isinstance(generator, list | tuple) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in generators):
        raise ValueError(f"`generator` is {generator!r}; pass `torch.Generator().manual_seed(0)`, or a list of them.")
    if generators is generator and len(generators) != num_images:
        raise ValueError(
            f"`generator` is a list of {len(generators)} for {num_images} images; pass one, or one per image."
        )


def check_own_states(model, prompt_embeds: torch.Tensor | None):
    """Refuse text states that are missing, do not fit the decoder, or are of another dtype."""
    if prompt_embeds is None:
        raise ValueError("`prompt_embeds` is None; pass the text encoder's states of the prompt.")
    check_prompt_embeds(model.config, "prompt_embeds", prompt_embeds)
    if prompt_embeds.dtype != model.dtype and not torch.is_autocast_enabled(prompt_embeds.device.type):
        raise ValueError(f"`prompt_embeds` holds {prompt_embeds.dtype}; convert it to the model's {model.dtype}.")


def check_listeners(logits_processor, stopping_criteria, streamer, return_dict_in_generate: bool):
    """Refuse what cannot be called with tokens, or cannot be given them."""
    check_flag("return_dict_in_generate", return_dict_in_generate)
    for name, listed in (("logits_processor", logits_processor), ("stopping_criteria", stopping_criteria)):
        if listed is not None and not (isinstance(listed, list | tuple) and all(map(callable, listed))):
            raise ValueError(f"`{name}` is {listed!r:.80}; pass a list of transformers' objects of that name.")
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise ValueError(f"`streamer` is {streamer!r:.80}; pass a `BaseStreamer` of transformers.")


def check_edit_mask(edit_mask: torch.BoolTensor | None, source_image_tokens: torch.LongTensor | None):
    """Refuse a mask without a source, of another shape or of another type."""
    if edit_mask is None:
        return
    if source_image_tokens is None:
        raise ValueError("`edit_mask` is given without `source_image_tokens`, of which it keeps some; pass them too.")
    check_tensor("edit_mask", edit_mask)
    if edit_mask.dtype != torch.bool or edit_mask.shape != source_image_tokens.shape:
        raise ValueError(
            f"`edit_mask` is {edit_mask.dtype} of shape {tuple(edit_mask.shape)}; give torch.bool of shape "
            f"{tuple(source_image_tokens.shape)}, a value for each source token, True where it may change."
        )


def check_decoding(
    decoding: str,
    num_draft_tokens: int | None,
    logits_processor: Sequence[LogitsProcessor],
    has_source: bool,
):
    """Refuse a way of decoding that does not exist, drafts where there are none, and processors of beam search."""
    check_choice("decoding", decoding, DECODINGS)
    if decoding == "speculative" and not has_source:
        raise ValueError("`decoding` is 'speculative', which drafts from the source; pass one, or decode 'exact'.")
    if num_draft_tokens is not None and decoding == "exact":
        raise ValueError(f"`num_draft_tokens` is {num_draft_tokens} in exact decoding; pass `decoding='speculative'`.")
    if num_draft_tokens is not None:
        check_integer("num_draft_tokens", num_draft_tokens)
    for processor in logits_processor:
        extra = list(inspect.signature(processor.__call__).parameters)[2:]
        if extra:
            raise ValueError(
                f"`logits_processor` holds {type(processor).__name__}, which asks for {', '.join(extra)}. There are no "
                "beams here and no tokens after the one to be chosen; leave it out."
            )


def check_source_cache(
    source_cache: SourceCache | None, dtype: torch.dtype, device: torch.device, grid_height: int, grid_width: int
):
    """Refuse what is no cache, and one of another grid, dtype or device."""
    if source_cache is None:
        return
    if not isinstance(source_cache, SourceCache):
        raise ValueError(
            f"`source_cache` is {type(source_cache).__name__}; pass what `prepare_source_cache` returns, or leave "
            "it out and pass the source itself."
        )
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


def check_weight_samples(source_cache: SourceCache, weight_samples: dict[str, list[float]], config: EditARConfig):
    """Refuse a cache of another decoder, or of this one before its weights or adapters changed."""
    own, given = weight_samples, source_cache.weight_samples
    has_changed = own.keys() != given.keys() or any(own[name] and given[name] not in ([], own[name]) for name in own)
    if has_changed or source_cache.keys[0].shape[1] != config.num_attention_heads:
        raise ValueError(
            "`source_cache` is of another decoder, or of this one with other weights or adapters; prepare it again "
            "with `prepare_source_cache`."
        )
