"""The inputs of a call: checks that come before any network runs, and how inputs pair up.

Every error names the argument, its value, and what to do.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from transformers.image_utils import ImageInput

from ..checks import check_choice, check_flag, check_integer, check_texts
from ..configuration_editar import EditARConfig
from ..generation import SourceCache
from ..generation.inputs import (
    check_decoding,
    check_prompt_embeds,
    check_source_cache,
    check_source_image_tokens,
)
from ..generation.sampling import DecodingSettings
from ..image_processing_editar import OUTPUT_TYPES, list_images, prepare_rgb_image
from ..processing_editar import TEXT_TO_IMAGE, apply_task_prefix, check_task


# More images in one call are a mistake: their caches fit no memory.
MAX_NUM_IMAGES = 4096
# Arguments of other pipelines, and what to pass here instead.
ARGUMENTS_ELSEWHERE = {
    "seed": "pass `generator=torch.Generator().manual_seed(seed)`",
    "strength": "`guidance_scale` weighs the prompt, and `mask_image` limits where the image changes",
    "num_inference_steps": "decoding takes one step per token; `decoding='speculative'` needs fewer passes",
    "images": "pass `image`",
    "mask": "pass `mask_image`",
    "num_images": "pass `num_images_per_prompt`",
}


def check_tokenizer(transformer, text_encoder, processor):
    """Refuse a tokenizer that does not fit the text encoder, or prompts of another length than the decoder's."""
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


def list_texts(text: str | Sequence[str]) -> list[str]:
    return [text] if isinstance(text, str) else list(text)


def add_task_prefixes(prompt: str | Sequence[str] | None, task: str | Sequence[str]) -> list[str] | None:
    """Put the prefix of each task before its prompt; one prompt serves many tasks."""
    if prompt is None:
        return None
    prompts = list_texts(prompt)
    if len(prompts) == 1 and not isinstance(task, str):
        prompts *= len(task)
    return apply_task_prefix(prompts, task)


def prepare_images(image: ImageInput) -> list[Image.Image]:
    """Make upright RGB images of an `image` argument."""
    images = [prepare_rgb_image(one, name="image") for one in list_images(image)]
    if not images:
        raise ValueError("`image` is an empty list; pass at least one image.")
    return images


def compute_batch_size(**inputs: Sequence | torch.Tensor | None) -> int:
    """Compute how many different results are asked for: as many as the longest input has entries.

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
    """Refuse unknown arguments, as Python does, and name the argument to use instead.

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


def check_source(
    transformer,
    device: torch.device,
    grid: tuple[int, int],
    image: ImageInput | None,
    mask_image: ImageInput | None,
    crop_to_mask: bool,
    resize_mode: str | None,
    restore_size: bool | None,
    source_image_tokens: torch.LongTensor | None,
    source_cache: SourceCache | None,
    image_guidance_scale: float | None,
    decoding: str,
    task: str | Sequence[str],
):
    """Refuse a source that is given twice, does not fit the decoder, or is missing where another argument needs it."""
    for name, value in (("restore_size", restore_size), ("crop_to_mask", crop_to_mask)):
        if value is not None:
            check_flag(name, value)
    if source_image_tokens is not None:
        check_source_image_tokens(transformer.config, source_image_tokens, *grid)
    check_source_cache(source_cache, transformer.dtype, device, *grid)
    if source_image_tokens is not None and source_cache is not None:
        raise ValueError("`source_image_tokens` is given beside `source_cache`, which holds its own; pass one of them.")
    known = "source_cache" if source_image_tokens is None else "source_image_tokens"
    has_known = source_image_tokens is not None or source_cache is not None
    has_source = image is not None or has_known
    if image is not None and has_known and not restore_size and mask_image is None:
        raise ValueError(
            f"`image` is {type(image).__name__} beside `{known}`; pass one of them, or `restore_size=True` to put the "
            "result back into the image."
        )
    if restore_size and image is None:
        raise ValueError("`restore_size` is True without an `image`; pass the image whose size is to be restored.")
    if has_source and TEXT_TO_IMAGE in list_texts(task):
        raise ValueError(f"`task` is {TEXT_TO_IMAGE!r} beside a source image; leave out one of them.")
    if not has_source and mask_image is not None:
        raise ValueError("`mask_image` is given without an `image`, of which it keeps a part; pass the image too.")
    if crop_to_mask and (image is None or mask_image is None or has_known):
        raise ValueError(
            "`crop_to_mask` is True; it needs `image` and `mask_image`, and neither `source_image_tokens` nor "
            "`source_cache`, which stand for the whole image."
        )
    if crop_to_mask and resize_mode is not None:
        raise ValueError(
            f"`resize_mode` is {resize_mode!r} beside `crop_to_mask`, whose window has the model's proportions; leave "
            "it out."
        )
    check_decoding(decoding, None, 1 if image_guidance_scale is None else image_guidance_scale, has_source)


def check_cached_images(source_cache: SourceCache | None, pixel_values: torch.Tensor | None):
    """Refuse a cache of other images than those given beside it; one may stand for many."""
    if source_cache is None or source_cache.pixel_values is None or pixel_values is None:
        return
    compute_batch_size(source_cache=source_cache.pixel_values, image=pixel_values)
    if not (source_cache.pixel_values == pixel_values).all():
        raise ValueError(
            "`source_cache` is of another image than `image`, or of the same in another `resize_mode`; prepare it of "
            "this one."
        )


def check_output(output_type: str, restore_size: bool, crop_to_mask: bool, mask_blend: bool, return_dict: bool):
    """Refuse an output that does not exist, or cannot have the source's size."""
    check_flag("mask_blend", mask_blend)
    check_flag("return_dict", return_dict)
    check_choice("output_type", output_type, (*OUTPUT_TYPES, "tokens"))
    for name, value in (("restore_size", restore_size), ("crop_to_mask", crop_to_mask)):
        if value and output_type != "pil":
            raise ValueError(f"`output_type` is {output_type!r} with `{name}`, which returns images; pass 'pil'.")


def check_callback(callback: Callable | None, names: Sequence[str], known: Sequence[str], preview_every: int | None):
    """Refuse a callback that cannot be called, unknown names of tensors, and previews without a callback."""
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


# torch's no_grad is between `__call__` and its caller.
CALLER = 4


def warn_of_no_effect(
    settings: DecodingSettings,
    arguments: dict,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    num_images_per_prompt: int,
    prompt: str | Sequence[str] | None,
    num_images: int,
):
    """Warn of arguments of sampling that greedy decoding does not use.

    Args:
        settings (`DecodingSettings`): The settings of the call.
        arguments (`dict`): Those that the call was given; None if left out.
        generator, num_images_per_prompt, prompt: Arguments of the call.
        num_images (`int`): Number of its source images.
    """
    if settings.do_sample:
        return
    idle = [name for name in ("temperature", "top_k", "top_p") if arguments[name] is not None]
    is_repeated = num_images <= 1 and isinstance(prompt, list | tuple) and len(set(prompt)) < len(prompt)
    if num_images_per_prompt > 1 or is_repeated:
        idle += ["generator"] * isinstance(generator, list | tuple)
        idle += ["num_images_per_prompt"] * (num_images_per_prompt > 1)
    if idle:
        warnings.warn(
            f"{', '.join(f'`{name}`' for name in idle)} had no effect: `do_sample` is False, so the likeliest tokens "
            "are taken, and images of one prompt and source are identical. Pass `do_sample=True` to sample.",
            stacklevel=CALLER,
        )


def warn_of_no_source(is_missing: bool, task: str | Sequence[str]):
    """Warn of an edit without an image to edit."""
    if is_missing and set(list_texts(task)) != {TEXT_TO_IMAGE}:
        warnings.warn(
            "`image` is missing, so the image is made from the text alone. Pass `image`, or "
            f"`task={TEXT_TO_IMAGE!r}` if this is what you want.",
            stacklevel=CALLER,
        )
