"""What the pipeline is called with: checks that need no network, and how inputs pair up.

Every check comes before the first network runs, and says which argument is wrong, what it is, and what to do.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers.image_utils import ImageInput

from ..checks import check_choice, check_flag, check_integer, check_number, check_tensor, check_texts
from ..configuration_editar import EditARConfig
from ..generation import SourceCache
from ..generation.configuration import EditARGenerationConfig
from ..generation.inputs import (
    check_decoding,
    check_prompt_embeds,
    check_source_cache,
    check_source_image_tokens,
)
from ..image_processing_editar import OUTPUT_TYPES
from ..processing_editar import TEXT_TO_IMAGE, apply_task_prefix, check_task


# More images than this in one call are a slip of the pen: their caches fit no memory.
MAX_NUM_IMAGES = 4096
# What users of other pipelines pass, and what they mean by it here.
ARGUMENTS_ELSEWHERE = {
    "seed": "pass `generator=torch.Generator().manual_seed(seed)`",
    "strength": "the prompt says how much changes; `guidance_scale` makes it count more, `mask_image` limits where",
    "num_inference_steps": "decoding takes one step per token; `decoding='speculative'` needs fewer passes",
    "images": "pass `image`",
    "mask": "pass `mask_image`",
    "num_images": "pass `num_images_per_prompt`",
}


def check_tokenizer(transformer, text_encoder, processor):
    """Refuse a tokenizer of more entries than the text encoder reads, or prompts of another length than the decoder's.

    Raises:
        ValueError: If both are there, and do not fit.
    """
    if processor is None:
        return
    if processor.tokenizer.pad_token is None:
        raise ValueError("`processor` has a tokenizer without a padding token; save or download its files again.")
    if text_encoder is not None and len(processor.tokenizer) > text_encoder.config.vocab_size:
        raise ValueError(
            f"`processor` has a tokenizer of {len(processor.tokenizer)} entries and `text_encoder` reads "
            f"{text_encoder.config.vocab_size}; pass the tokenizer that it was trained with."
        )
    if transformer is not None and processor.num_text_tokens != transformer.config.num_text_tokens:
        raise ValueError(
            f"`processor` makes prompts of {processor.num_text_tokens} tokens and `transformer` reads "
            f"{transformer.config.num_text_tokens}; pass the processor that it was trained with."
        )


def add_task_prefixes(prompt: str | Sequence[str] | None, task: str | Sequence[str]) -> list[str] | None:
    """Put the prefix of each task before its prompt; one prompt serves many tasks."""
    if prompt is None:
        return None
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if len(prompts) == 1 and not isinstance(task, str):
        prompts *= len(task)
    return apply_task_prefix(prompts, task)


def collect_tasks(task: str | Sequence[str]) -> set[str]:
    """Collect the different tasks of a call, which names one or a list."""
    return {task} if isinstance(task, str) else set(task)


def compute_batch_size(**inputs: Sequence | torch.Tensor | None) -> int:
    """Compute how many different images are asked for: as many as the longest input has entries.

    Raises:
        ValueError: If another input has neither one entry nor as many.
    """
    sizes = {name: len(entries) for name, entries in inputs.items() if entries is not None}
    batch_size = max(sizes.values())
    if any(size not in (1, batch_size) for size in sizes.values()):
        counts = ", ".join(f"`{name}` has {size}" for name, size in sizes.items())
        raise ValueError(f"The inputs do not pair up: {counts}. Pass one entry for all images, or one for each.")
    return batch_size


def check_known_arguments(unknown: dict):
    """Refuse arguments that a call does not have, as Python does, and say what to use instead.

    Raises:
        TypeError: If there is one.
    """
    for name in unknown:
        remedy = ARGUMENTS_ELSEWHERE.get(name, "see `help(EditARPipeline.__call__)` for those it has")
        raise TypeError(f"EditARPipeline.__call__() got an unexpected keyword argument '{name}': {remedy}.")


def check_prompts(
    config: EditARConfig,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    prompt_embeds: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    task: str | Sequence[str],
):
    """Refuse a call without text or with text twice, and text states that do not fit the decoder."""
    check_task(task)
    if prompt is None and prompt_embeds is None:
        raise ValueError("`prompt` is None and so is `prompt_embeds`; pass one of them.")
    texts = (("prompt", prompt, prompt_embeds), ("negative_prompt", negative_prompt, negative_prompt_embeds))
    for name, text, embeds in texts:
        if text is not None:
            check_texts(name, text)
        if text is not None and embeds is not None:
            raise ValueError(f"`{name}` is {text!r} beside `{name}_embeds`; pass one of them.")
        if embeds is not None:
            check_prompt_embeds(config, f"{name}_embeds", embeds)
    if task != "edit" and prompt is None:
        raise ValueError(
            f"`task` is {task!r} with `prompt_embeds`, which no prefix can join; give it to `encode_prompt` instead."
        )


class SourceArguments(NamedTuple):
    """The arguments of a call that say what is edited, and where."""

    image: ImageInput | None
    resize_mode: str | None
    mask_image: ImageInput | None
    crop_to_mask: bool
    source_image_tokens: torch.LongTensor | None
    source_cache: SourceCache | None


def check_source(
    transformer,
    device: torch.device,
    given: SourceArguments,
    image_guidance_scale: float | None,
    restore_size: bool | None,
    decoding: str,
    grid: tuple[int, int],
    task: str | Sequence[str],
):
    """Refuse a source given twice, one that does not fit the grid or the decoder, and what needs one without one."""
    for name, value in (("restore_size", restore_size), ("crop_to_mask", given.crop_to_mask)):
        if value is not None:
            check_flag(name, value)
    tokens, cache = given.source_image_tokens, given.source_cache
    if tokens is not None:
        check_tensor("source_image_tokens", tokens)
        num_image_tokens = grid[0] * grid[1]
        if tokens.ndim != 2 or tokens.shape[1] != num_image_tokens:
            raise ValueError(
                f"`source_image_tokens` has shape {tuple(tokens.shape)}; a grid of {grid[0]} × {grid[1]} needs (batch, "
                f"{num_image_tokens}). Pass the `height` and `width` of the picture they stand for."
            )
        check_source_image_tokens(transformer.config, tokens, *grid)
    check_source_cache(cache, transformer.dtype, device, *grid)
    if tokens is not None and cache is not None:
        raise ValueError("`source_image_tokens` is given beside `source_cache`, which holds its own; pass one of them.")
    known = "source_cache" if tokens is None else "source_image_tokens"
    has_known = tokens is not None or cache is not None
    if given.image is not None and has_known and not restore_size and given.mask_image is None:
        raise ValueError(
            f"`image` is {type(given.image).__name__} beside `{known}`; pass one of them, or `restore_size=True` to "
            "put the result back into the image."
        )
    if restore_size and given.image is None:
        raise ValueError("`restore_size` is True without an `image`; pass the picture whose size is to be restored.")
    has_source = given.image is not None or has_known
    if has_source and TEXT_TO_IMAGE in collect_tasks(task):
        raise ValueError(f"`task` is {TEXT_TO_IMAGE!r} beside a source image; leave out one of them.")
    if image_guidance_scale is not None:
        check_number("image_guidance_scale", image_guidance_scale)
    if not has_source and image_guidance_scale not in (None, 1):
        raise ValueError(f"`image_guidance_scale` is {image_guidance_scale} without an `image`; leave it out.")
    if not has_source and given.mask_image is not None:
        raise ValueError("`mask_image` is given without an `image`, of which it keeps a part; pass the image too.")
    if given.crop_to_mask and (given.image is None or given.mask_image is None or has_known):
        raise ValueError(
            "`crop_to_mask` is True; it needs `image` and `mask_image`, and neither `source_image_tokens` nor "
            "`source_cache`, which stand for the whole image."
        )
    if given.crop_to_mask and given.resize_mode is not None:
        raise ValueError(
            f"`resize_mode` is {given.resize_mode!r} beside `crop_to_mask`, whose window has the model's proportions; "
            "leave it out."
        )
    check_decoding(decoding, None, (), has_source)


def check_cached_pictures(source_cache: SourceCache | None, pixel_values: torch.Tensor | None):
    """Refuse a cache of other pictures than those given beside it; one may stand for many."""
    if source_cache is None or source_cache.pixel_values is None or pixel_values is None:
        return
    compute_batch_size(source_cache=source_cache.pixel_values, image=pixel_values)
    if not (source_cache.pixel_values == pixel_values).all():
        raise ValueError(
            "`source_cache` is of another picture than `image`, or of the same in another `resize_mode`; prepare it of "
            "this one."
        )


def resolve_restore_size(
    restore_size: bool | None,
    given: SourceArguments,
    task: str | Sequence[str],
    sides: tuple[int | None, int | None],
    output_type: str,
) -> bool:
    """Decide whether results get the size of their source, where the call leaves it open: see `__call__`."""
    if restore_size is not None:
        return restore_size
    is_image_alone = given.image is not None and given.source_image_tokens is None and given.source_cache is None
    return is_image_alone and collect_tasks(task) == {"edit"} and sides == (None, None) and output_type == "pil"


def check_output_options(output_type: str, restore_size: bool, crop_to_mask: bool, mask_blend: bool, return_dict: bool):
    """Refuse an output that does not exist, or cannot be had at the source's size."""
    check_flag("mask_blend", mask_blend)
    check_flag("return_dict", return_dict)
    check_choice("output_type", output_type, (*OUTPUT_TYPES, "tokens"))
    for name, value in (("restore_size", restore_size), ("crop_to_mask", crop_to_mask)):
        if value and output_type != "pil":
            raise ValueError(f"`output_type` is {output_type!r} with `{name}`, which returns pictures; pass 'pil'.")


def check_callback(callback: Callable | None, names: Sequence[str], known: Sequence[str], preview_every: int | None):
    """Refuse a callback that cannot be called, names of tensors that it cannot be given, and previews for none."""
    if callback is not None and not callable(callback):
        raise ValueError(f"`callback_on_step_end` is {callback!r}; pass a function of (pipe, step, timestep, tensors).")
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`callback_on_step_end_tensor_inputs` is {names!r}; pass a list of names.")
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` holds {', '.join(unknown)}; choose among {', '.join(known)}."
        )
    if preview_every is None:
        return
    check_integer("preview_every", preview_every)
    if callback is None:
        raise ValueError(f"`preview_every` is {preview_every} without `callback_on_step_end`, which gets the previews.")


# How far a warning's caller is from the pipeline's: torch's no_grad stands between `__call__` and it.
CALLER = 4


def warn_of_no_effect(
    settings: EditARGenerationConfig,
    arguments: dict,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    num_images_per_prompt: int,
    prompt: str | Sequence[str] | None,
    given: SourceArguments,
    task: str | Sequence[str],
):
    """Warn of arguments of sampling where the likeliest tokens are taken, and of an edit of no image.

    Args:
        settings (`EditARGenerationConfig`): Of the call.
        arguments (`dict`): Those of them that are arguments of the call; None where left out.
        generator, num_images_per_prompt, prompt, given, task: Arguments of the call.
    """
    idle = [name for name in ("temperature", "top_k", "top_p") if arguments[name] is not None]
    has_one_image = not isinstance(given.image, list | tuple) or len(given.image) == 1
    is_repeated = has_one_image and isinstance(prompt, list | tuple) and len(set(prompt)) < len(prompt)
    if num_images_per_prompt > 1 or is_repeated:
        idle += ["generator"] * isinstance(generator, list | tuple)
        idle += ["num_images_per_prompt"] * (num_images_per_prompt > 1)
    if idle and not settings.do_sample:
        warnings.warn(
            f"{', '.join(f'`{name}`' for name in idle)} had no effect: `do_sample` is False, so the likeliest tokens "
            "are taken, and images of one prompt and source are identical. Pass `do_sample=True` to sample.",
            stacklevel=CALLER,
        )
    has_source = any(source is not None for source in (given.image, given.source_image_tokens, given.source_cache))
    if not has_source and collect_tasks(task) != {TEXT_TO_IMAGE}:
        warnings.warn(
            "`image` is missing, so the image is made from the text alone. Pass `image`, or "
            f"`task={TEXT_TO_IMAGE!r}` if this is what you want.",
            stacklevel=CALLER,
        )
