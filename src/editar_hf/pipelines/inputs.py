"""Pair the inputs of a pipeline call, and check them for errors that the networks would not notice.

Every error names the argument, its value and the remedy. The networks check the shapes and values of tensors.
"""

from collections.abc import Callable, Sequence, Sized

import torch
from transformers.image_utils import ImageInput

from ..checks import check_choice, check_integer, check_texts, warn_caller
from ..generation import SourceCache
from ..generation.sampling import DecodingSettings
from ..image_processing_editar import DETAILS, OUTPUT_TYPES
from ..processing_editar import TEXT_TO_IMAGE, apply_task_prefix


def list_texts(text: str | Sequence[str]) -> list[str]:
    return [text] if isinstance(text, str) else list(text)


def add_task_prefixes(prompt: str | Sequence[str] | None, task: str | Sequence[str]) -> list[str] | None:
    """Put the prefix of each task before its prompt. Without prompts, return None."""
    return None if prompt is None else list_texts(apply_task_prefix(prompt, task))


def compute_batch_size(**inputs: Sized | None) -> int:
    """Compute the batch size: the number of entries of the longest input.

    Raises:
        ValueError: If the number of entries of another input is neither 1 nor the batch size.
    """
    sizes = {name: len(entries) for name, entries in inputs.items() if entries is not None}
    batch_size = max(sizes.values())
    if any(size not in (1, batch_size) for size in sizes.values()):
        counts = ", ".join(f"`{name}` has {size}" for name, size in sizes.items())
        raise ValueError(f"The numbers of inputs differ: {counts}. Pass one entry for all images, or one for each.")
    return batch_size


def check_prompts(
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    prompt_embeds: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    task: str | Sequence[str],
) -> None:
    """Check that each text is given exactly once, as text or as states, and that a task has a text for its prefix."""
    if prompt is None and prompt_embeds is None:
        raise ValueError("`prompt` and `prompt_embeds` are both None; pass one of them.")
    if prompt is None and task != "edit":
        raise ValueError(
            f"`task` is {task!r}, but its prefix cannot be added to `prompt_embeds`; pass `task` to `encode_prompt` "
            "instead."
        )
    texts = (("prompt", prompt, prompt_embeds), ("negative_prompt", negative_prompt, negative_prompt_embeds))
    for name, text, embeds in texts:
        if text is not None:
            check_texts(name, text)
        if text is not None and embeds is not None:
            raise ValueError(f"`{name}` is {text!r}, and `{name}_embeds` is also given; pass one of them.")


def check_source(
    image: ImageInput | None,
    source_image_tokens: torch.LongTensor | None,
    source_cache: SourceCache | None,
    mask_image: ImageInput | None,
    crop_to_mask: bool,
    resize_mode: str | None,
    restore_size: bool | None,
    is_composed: bool,
    task: str | Sequence[str],
) -> None:
    """Check that the source is given once, and that it is given if another argument needs it. Warn if there is none.

    An image may be given together with its tokens or its cache if the result is put back into the image, as
    `restore_size` and `is_composed` say.
    """
    tokens_or_cache = {"source_image_tokens": source_image_tokens, "source_cache": source_cache}
    given = [name for name, value in tokens_or_cache.items() if value is not None]
    if len(given) == 2:
        raise ValueError(
            "`source_image_tokens` and `source_cache` are both given, but the cache holds its own tokens; pass one of "
            "them."
        )
    if image is not None and given and not restore_size and not is_composed:
        raise ValueError(
            f"`image` and `{given[0]}` are both given; pass one of them, or `restore_size=True` to put the result back "
            "into the image."
        )
    if image is None and restore_size:
        raise ValueError("`restore_size` is True without an `image`; pass the image that has the size to restore.")
    if crop_to_mask and (image is None or mask_image is None or given):
        raise ValueError(
            "`crop_to_mask` is True; pass `image` and `mask_image` with it, and leave `source_image_tokens` and "
            "`source_cache` out, because they are of the whole image."
        )
    if crop_to_mask and resize_mode is not None:
        raise ValueError(
            f"`resize_mode` is {resize_mode!r} and `crop_to_mask` is True, but its window always has the proportions "
            "of the model's size; pass one of them."
        )
    if image is not None or given:
        if TEXT_TO_IMAGE in list_texts(task):
            raise ValueError(f"`task` is {TEXT_TO_IMAGE!r}, but a source image is given; leave one of them out.")
        return
    if mask_image is not None:
        raise ValueError("`mask_image` is given without a source image; pass `image` too.")
    if set(list_texts(task)) != {TEXT_TO_IMAGE}:
        warn_caller(
            "`image` is missing, so the result is generated from the text alone. Pass `image`, or, to generate images "
            f"from text, `task={TEXT_TO_IMAGE!r}`."
        )


def check_preserve(preserve: str, mask_image: ImageInput | None, has_source: bool, task: str | Sequence[str]) -> None:
    """Check that the rest of an image can be kept without a mask: there is a source to edit, and no mask."""
    check_choice("preserve", preserve, ("off", "auto"))
    if preserve == "off":
        return
    if mask_image is not None:
        raise ValueError(
            "`preserve` is 'auto' and `mask_image` is given, which already says what may change; leave one of them out."
        )
    if not has_source or set(list_texts(task)) != {"edit"}:
        found = f"`task` is {task!r}" if has_source else "there is no source image"
        raise ValueError(
            f"`preserve` is 'auto', but {found}; pass a source image and the task 'edit', or leave `preserve` out."
        )


def check_num_tokens(name: str, image_tokens: torch.Tensor, size: tuple[int, int], grid: tuple[int, int]) -> None:
    """Check that images of `size`, height and width in pixels, have as many tokens as given, `(batch, N)`."""
    if image_tokens.ndim != 2 or image_tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"`{name}` has shape {tuple(image_tokens.shape)}, but an image of {size[1]}×{size[0]} pixels has "
            f"{grid[0] * grid[1]} tokens; pass the `height` and `width` at which the tokens were made."
        )


def check_cached_images(source_cache: SourceCache, pixel_values: torch.Tensor | None) -> None:
    """Check that a cache is of the given images. A single image on one side must equal all on the other."""
    if source_cache.pixel_values is None or pixel_values is None:
        return
    compute_batch_size(source_cache=source_cache.pixel_values, image=pixel_values)
    if not (source_cache.pixel_values == pixel_values).all():
        raise ValueError(
            "`source_cache` is of another image than `image`, or was prepared with another `resize_mode`; prepare a "
            "cache of this image."
        )


def check_detail(detail: str, restore_size: bool, crop_to_mask: bool, task: str | Sequence[str]) -> None:
    """Check that the source's detail is asked for edits that are put back into the source."""
    check_choice("detail", detail, DETAILS)
    if detail == "model":
        return
    if others := sorted(set(list_texts(task)) - {"edit"}):
        raise ValueError(
            f"`detail` is 'source', but `task` is {others[0]!r}; only edits have the detail of the source."
        )
    if not (restore_size or crop_to_mask):
        raise ValueError(
            "`detail` is 'source', but the result is not put back into the source; pass `image`, and "
            "`restore_size=True` or `crop_to_mask=True`."
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
    """Check the output type, its combination with other arguments, and the arguments of the callback."""
    check_choice("output_type", output_type, (*OUTPUT_TYPES, "tokens"))
    if output_type != "pil" and (restore_size or crop_to_mask):
        name = "restore_size" if restore_size else "crop_to_mask"
        raise ValueError(f"`output_type` is {output_type!r}, but `{name}` returns PIL images; pass 'pil'.")
    if unknown := sorted(set(tensor_names) - set(known_names)):
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` holds {', '.join(unknown)}; choose among {', '.join(known_names)}."
        )
    if preview_every is not None:
        check_integer("preview_every", preview_every)
        if callback is None:
            raise ValueError(
                f"`preview_every` is {preview_every} without `callback_on_step_end`; pass a callback, which gets the "
                "previews."
            )


def warn_of_greedy_decoding(settings: DecodingSettings, num_images_per_prompt: int, **sampling: float | None) -> None:
    """Warn about arguments that have no effect in greedy decoding."""
    idle = [f"`{name}`" for name, value in sampling.items() if value is not None]
    idle += ["`num_images_per_prompt`"] * (num_images_per_prompt > 1)
    if idle and not settings.do_sample:
        warn_caller(
            f"{', '.join(idle)} had no effect: `do_sample` is False, so decoding takes the most likely tokens, and all "
            "images of one prompt and source are identical. Pass `do_sample=True` to sample."
        )
