"""What the pipeline is called with: checks that need no network, and how inputs pair up.

Every check comes before the first network runs, and says which argument is wrong, what it is, and what to do.
"""

from collections.abc import Sequence

import torch
from transformers.image_utils import ImageInput

from .configuration_editar import EditARConfig
from .generation.inputs import check_prompt_embeds, check_source_image_tokens
from .processing_editar import OUTPUT_TYPES, apply_task_prefix


def add_task_prefixes(prompt: str | Sequence[str] | None, task: str | Sequence[str]) -> list[str] | None:
    """Put the prefix of each task before its prompt; one prompt serves many tasks."""
    if prompt is None:
        return None
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if len(prompts) == 1 and not isinstance(task, str):
        prompts *= len(task)
    return apply_task_prefix(prompts, task)


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


def check_texts(name: str, texts: str | Sequence[str] | None):
    """Refuse what is neither a string nor a list of strings."""
    listed = [texts] if isinstance(texts, str) else texts
    if texts is not None and not (
        isinstance(listed, list | tuple) and listed and all(isinstance(text, str) for text in listed)
    ):
        raise ValueError(f"`{name}` is {texts!r}; pass a string or a list of strings.")


def check_prompts(
    config: EditARConfig,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    prompt_embeds: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    task: str | Sequence[str],
):
    """Refuse a call without text or with text twice, and text states that do not fit the decoder."""
    if prompt is None and prompt_embeds is None:
        raise ValueError("`prompt` is None and so is `prompt_embeds`; pass one of them.")
    texts = (("prompt", prompt, prompt_embeds), ("negative_prompt", negative_prompt, negative_prompt_embeds))
    for name, text, embeds in texts:
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
    config: EditARConfig,
    image: ImageInput | None,
    source_image_tokens: torch.LongTensor | None,
    image_guidance_scale: float | None,
    restore_size: bool,
    grid: tuple[int, int],
):
    """Refuse a source given twice, tokens that do not fit the grid, and options that need a source without one."""
    if source_image_tokens is not None:
        num_image_tokens = grid[0] * grid[1]
        if source_image_tokens.ndim != 2 or source_image_tokens.shape[1] != num_image_tokens:
            raise ValueError(
                f"`source_image_tokens` has shape {tuple(source_image_tokens.shape)}; a grid of {grid[0]} × {grid[1]} "
                f"needs (batch, {num_image_tokens}). Pass the `height` and `width` of the picture they stand for."
            )
        check_source_image_tokens(config, source_image_tokens, *grid)
        if image is not None and not restore_size:
            raise ValueError(
                f"`image` is {type(image).__name__} beside `source_image_tokens`; pass one of them, or "
                "`restore_size=True` to put the result back into the image."
            )
    if restore_size and image is None:
        raise ValueError("`restore_size` is True without an `image`; pass the picture whose size is to be restored.")
    if image is None and source_image_tokens is None and image_guidance_scale not in (None, 1):
        raise ValueError(f"`image_guidance_scale` is {image_guidance_scale} without an `image`; leave it out.")


def check_output_options(output_type: str, restore_size: bool, num_images_per_prompt: int):
    """Refuse an output that does not exist, or cannot be had at the source's size."""
    known = (*OUTPUT_TYPES, "tokens")
    if output_type not in known:
        raise ValueError(f"`output_type` is {output_type!r}; choose one of {', '.join(map(repr, known))}.")
    if restore_size and output_type != "pil":
        raise ValueError(f"`output_type` is {output_type!r} with `restore_size`, which returns pictures; pass 'pil'.")
    if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
        raise ValueError(f"`num_images_per_prompt` is {num_images_per_prompt!r}; pass a positive whole number.")


def check_callback_tensors(names: Sequence[str], known: Sequence[str]):
    """Refuse names of tensors that a callback cannot be given."""
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` holds {', '.join(unknown)}; choose among {', '.join(known)}."
        )


def check_generator(generator: torch.Generator | Sequence[torch.Generator] | None, num_images: int):
    """Refuse a list of generators that is not one per image."""
    if isinstance(generator, Sequence) and len(generator) != num_images:
        raise ValueError(
            f"`generator` is a list of {len(generator)} for {num_images} images; pass one, or one per image."
        )
