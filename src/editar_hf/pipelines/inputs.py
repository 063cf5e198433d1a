"""The inputs of a call: how they pair up, and the mistakes that no network would notice.

Every error names the argument, its value, and what to do. The networks check the shapes and values of tensors.
"""

import warnings
from collections.abc import Callable, Sequence, Sized

import torch
from transformers.image_utils import ImageInput

from ..checks import check_choice, check_integer, check_texts
from ..generation import SourceCache
from ..generation.sampling import DecodingSettings
from ..image_processing_editar import OUTPUT_TYPES
from ..processing_editar import TEXT_TO_IMAGE, apply_task_prefix


# torch's no_grad and a function of this file are between `__call__`'s caller and the warning.
CALLER = 4


def list_texts(text: str | Sequence[str]) -> list[str]:
    return [text] if isinstance(text, str) else list(text)


def add_task_prefixes(prompt: str | Sequence[str] | None, task: str | Sequence[str]) -> list[str] | None:
    """Put the prefix of each task before its prompt, if there are prompts."""
    return None if prompt is None else list_texts(apply_task_prefix(prompt, task))


def compute_batch_size(**inputs: Sized | None) -> int:
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


def check_prompts(
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    prompt_embeds: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    task: str | Sequence[str],
) -> None:
    """Refuse a call without text or with text twice, and a task whose prefix no text can take."""
    if prompt is None and prompt_embeds is None:
        raise ValueError("`prompt` is None and so is `prompt_embeds`; pass one of them.")
    if prompt is None and task != "edit":
        raise ValueError(
            f"`task` is {task!r} with `prompt_embeds`, which no prefix can join; give it to `encode_prompt` instead."
        )
    texts = (("prompt", prompt, prompt_embeds), ("negative_prompt", negative_prompt, negative_prompt_embeds))
    for name, text, embeds in texts:
        if text is not None:
            check_texts(name, text)
        if text is not None and embeds is not None:
            raise ValueError(f"`{name}` is {text!r} beside `{name}_embeds`; pass one of them.")


def check_source(
    image: ImageInput | None,
    source_image_tokens: torch.LongTensor | None,
    source_cache: SourceCache | None,
    mask_image: ImageInput | None,
    crop_to_mask: bool,
    resize_mode: str | None,
    restore_size: bool | None,
    task: str | Sequence[str],
) -> None:
    """Refuse a source that is given twice, or is missing where another argument needs it; warn of an edit of nothing.

    An image may stand beside its tokens or its cache if the result is put back into it.
    """
    tokens_or_cache = {"source_image_tokens": source_image_tokens, "source_cache": source_cache}
    given = [name for name, value in tokens_or_cache.items() if value is not None]
    if len(given) == 2:
        raise ValueError("`source_image_tokens` is given beside `source_cache`, which holds its own; pass one of them.")
    if image is not None and given and not restore_size and mask_image is None:
        raise ValueError(
            f"`image` is given beside `{given[0]}`; pass one of them, or `restore_size=True` to put the result back "
            "into the image."
        )
    if image is None and restore_size:
        raise ValueError("`restore_size` is True without an `image`; pass the image whose size is to be restored.")
    if crop_to_mask and (image is None or mask_image is None or given):
        raise ValueError(
            "`crop_to_mask` is True; it needs `image` and `mask_image`, and neither `source_image_tokens` nor "
            "`source_cache`, which stand for the whole image."
        )
    if crop_to_mask and resize_mode is not None:
        raise ValueError(
            f"`resize_mode` is {resize_mode!r} beside `crop_to_mask`, whose window has the model's proportions; "
            "pass one of them."
        )
    if image is not None or given:
        if TEXT_TO_IMAGE in list_texts(task):
            raise ValueError(f"`task` is {TEXT_TO_IMAGE!r} beside a source image; leave out one of them.")
        return
    if mask_image is not None:
        raise ValueError("`mask_image` is given without an `image`, of which it keeps a part; pass the image too.")
    if set(list_texts(task)) != {TEXT_TO_IMAGE}:
        warnings.warn(
            "`image` is missing, so the image is made from the text alone. Pass `image`, or "
            f"`task={TEXT_TO_IMAGE!r}` if this is what you want.",
            stacklevel=CALLER,
        )


def check_cached_images(source_cache: SourceCache, pixel_values: torch.Tensor | None) -> None:
    """Refuse a cache of other images than those given beside it; one may stand for many."""
    if source_cache.pixel_values is None or pixel_values is None:
        return
    compute_batch_size(source_cache=source_cache.pixel_values, image=pixel_values)
    if not (source_cache.pixel_values == pixel_values).all():
        raise ValueError(
            "`source_cache` is of another image than `image`, or of the same in another `resize_mode`; prepare it of "
            "this one."
        )


def check_output(
    output_type: str,
    restore_size: bool,
    crop_to_mask: bool,
    callback: Callable | None,
    tensor_names: Sequence[str],
    known_names: Sequence[str],
    preview_every: int | None,
) -> None:
    """Refuse an output that does not exist or cannot have the source's size, and what no callback can get."""
    check_choice("output_type", output_type, (*OUTPUT_TYPES, "tokens"))
    if output_type != "pil" and (restore_size or crop_to_mask):
        name = "restore_size" if restore_size else "crop_to_mask"
        raise ValueError(f"`output_type` is {output_type!r} with `{name}`, which returns images; pass 'pil'.")
    if unknown := sorted(set(tensor_names) - set(known_names)):
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` holds {', '.join(unknown)}; choose among {', '.join(known_names)}."
        )
    if preview_every is not None:
        check_integer("preview_every", preview_every)
        if callback is None:
            raise ValueError(
                f"`preview_every` is {preview_every} without `callback_on_step_end`, which gets the previews."
            )


def warn_of_greedy_decoding(settings: DecodingSettings, num_images_per_prompt: int, **sampling: float | None) -> None:
    """Warn of arguments of sampling that greedy decoding does not use."""
    idle = [f"`{name}`" for name, value in sampling.items() if value is not None]
    idle += ["`num_images_per_prompt`"] * (num_images_per_prompt > 1)
    if idle and not settings.do_sample:
        warnings.warn(
            f"{', '.join(idle)} had no effect: `do_sample` is False, so the likeliest tokens are taken, and images of "
            "one prompt and source are identical. Pass `do_sample=True` to sample.",
            stacklevel=CALLER,
        )
