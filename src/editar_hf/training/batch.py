"""Prepare a collated batch for the decoder: tokens, dropped conditions and weighted losses."""

import torch
import torch.nn.functional as F

from ..modeling_editar_vq import EditARVQModel


def draw_conditioning_dropout(
    batch_size: int,
    generator: torch.Generator,
    prompt_prob: float = 0.05,
    source_prob: float = 0.05,
    both_prob: float = 0.05,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw `(drop_source, drop_prompt)`, each bool `(batch_size,)`, from one uniform draw per sample.

    The published probabilities are 5 % both, 5 % source image only, 5 % text only. The result is on the generator's
    device.

    Source: EditAR (arXiv 2501.04699), section 4.1, and its published training script.
    """
    draw = torch.rand(batch_size, generator=generator, device=generator.device)
    drop_source = draw < both_prob + source_prob
    drop_prompt = (draw < both_prob) | (draw >= 1 - prompt_prob)
    return drop_source, drop_prompt


@torch.no_grad()
def encode_image_tokens(batch: dict[str, torch.Tensor], vq_model: EditARVQModel) -> dict[str, torch.Tensor]:
    """Replace the images of a batch by their tokens; a batch of tokens stays as it is."""
    if "source_image_tokens" in batch:
        return batch
    batch = dict(batch)
    pixel_values = torch.cat([batch.pop("source_pixel_values"), batch.pop("target_pixel_values")])
    image_tokens = vq_model.encode(pixel_values.to(vq_model.dtype)).image_tokens
    batch["source_image_tokens"], batch["target_image_tokens"] = image_tokens.chunk(2)
    return batch


def drop_target_tokens(
    target_image_tokens: torch.Tensor,
    source_image_tokens: torch.Tensor,
    probability: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Replace some input target tokens by source tokens; returns the decoder's input, `(batch_size, N)`.

    Once an edit has begun, its tokens predict their continuation and the prompt is hardly needed. In a fraction
    `probability` of the samples, each token is therefore replaced with a probability drawn uniformly from [0, 1].

    Source: word dropout (arXiv 1511.06349, section 3.1), with the source's token in place of an unknown word.
    """
    draw, rate = torch.rand(2, len(target_image_tokens), 1, generator=generator, device=generator.device)
    places = torch.rand(target_image_tokens.shape, generator=generator, device=generator.device)
    is_dropped = (draw < probability) & (places < rate)
    return torch.where(is_dropped.to(target_image_tokens.device), source_image_tokens, target_image_tokens)


def compute_token_losses(
    logits: torch.Tensor,
    target_image_tokens: torch.Tensor,
    edit_mask: torch.Tensor | None = None,
    edit_region_weight: float = 1.0,
) -> torch.Tensor:
    """Compute each sample's mean cross-entropy over its target tokens, in nats, `(batch_size,)`.

    Tokens in `edit_mask` count `edit_region_weight` times, because most tokens of an edit are merely copied.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), target_image_tokens.flatten(), reduction="none")
    losses = losses.view(target_image_tokens.shape)
    if edit_mask is None:
        return losses.mean(dim=1)
    weights = torch.where(edit_mask, edit_region_weight, 1.0)
    return (losses * weights).sum(dim=1) / weights.sum(dim=1)
