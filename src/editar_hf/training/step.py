"""Compute the losses of a collated batch: encode the images, draw the dropout, run text encoder and decoder."""

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..modeling_editar import EditARForConditionalGeneration
from ..modeling_editar_vq import EditARVQModel
from .distillation import compute_distillation_loss


@torch.no_grad()
def encode_image_tokens(batch: dict[str, torch.Tensor], vq_model: EditARVQModel) -> dict[str, torch.Tensor]:
    """Replace the images of a batch by their tokens. A batch that already holds tokens is returned unchanged."""
    if "source_image_tokens" in batch:
        return batch
    batch = dict(batch)
    pixel_values = torch.cat([batch.pop("source_pixel_values"), batch.pop("target_pixel_values")])
    image_tokens = vq_model.encode(pixel_values.to(vq_model.dtype)).image_tokens
    batch["source_image_tokens"], batch["target_image_tokens"] = image_tokens.chunk(2)
    return batch


# Dropout


def draw_conditioning_dropout(batch_size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw `(drop_source, drop_prompt)`, each bool `(batch_size,)`, from one uniform number per sample.

    The probabilities are the published ones: 5 % of samples lose both conditions, 5 % only the source image, and 5 %
    only the prompt. The result is on the generator's device.

    Source: EditAR (arXiv 2501.04699), section 4.1, and its published training script.
    """
    draw = torch.rand(batch_size, generator=generator, device=generator.device)
    return draw < 0.10, (draw < 0.05) | (draw >= 0.95)


def drop_target_tokens(
    target_image_tokens: torch.Tensor,
    source_image_tokens: torch.Tensor,
    probability: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Replace some target tokens in the decoder's input by source tokens. Returns the input, `(batch_size, N)`.

    After the first tokens of an edit, the decoder can predict the rest from the earlier target tokens and ignore the
    prompt. To prevent this, a fraction `probability` of the samples is chosen. In each of them, tokens are replaced
    with a probability that is drawn uniformly from [0, 1].

    Source: word dropout (arXiv 1511.06349, section 3.1), with the source token in place of an unknown word.
    """
    draw, rate = torch.rand(2, len(target_image_tokens), 1, generator=generator, device=generator.device)
    places = torch.rand(target_image_tokens.shape, generator=generator, device=generator.device)
    is_dropped = (draw < probability) & (places < rate)
    return torch.where(is_dropped.to(target_image_tokens.device), source_image_tokens, target_image_tokens)


def draw_dropout(
    batch: Mapping[str, torch.Tensor],
    seed: int,
    place: int,
    drops_conditioning: bool = True,
    target_token_dropout: float = 0.0,
) -> dict:
    """Draw the dropout of a batch of tokens. Returns the keyword arguments of `TrainingStep`, including the batch.

    The draws depend only on the seed and on `place`, the index of the batch among the batches of all processes. A
    resumed run therefore draws the same dropout as an uninterrupted run.
    """
    # The generator uses only the low 32 bits of its seed. The prime gives two runs with different `seed` different
    # generator seeds for a million batches.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + place)
    device = batch["input_ids"].device
    inputs: dict[str, Any] = {"batch": batch}
    if drops_conditioning:
        drops = draw_conditioning_dropout(len(batch["input_ids"]), generator)
        inputs["drop_source"], inputs["drop_prompt"] = (drop.to(device) for drop in drops)
    if target_token_dropout:
        tokens = batch["target_image_tokens"], batch["source_image_tokens"]
        shown = drop_target_tokens(*tokens, target_token_dropout, generator)
        inputs["batch"] = {**batch, "shown_image_tokens": shown}
    return inputs


# Losses


def compute_token_losses(
    logits: torch.Tensor,
    target_image_tokens: torch.Tensor,
    edit_mask: torch.Tensor | None = None,
    edit_region_weight: float = 1.0,
) -> torch.Tensor:
    """Compute the mean cross-entropy over the target tokens of each sample, in nats, `(batch_size,)`.

    Tokens inside `edit_mask` have the weight `edit_region_weight`, because most tokens of an edit are mere copies of
    source tokens.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), target_image_tokens.flatten(), reduction="none")
    losses = losses.view(target_image_tokens.shape)
    if edit_mask is None:
        return losses.mean(dim=1)
    weights = torch.where(edit_mask, edit_region_weight, 1.0)
    return (losses * weights).sum(dim=1) / weights.sum(dim=1)


class TrainingStep(nn.Module):
    """Compute the losses of a batch. One module holds text encoder and decoder, so that one wrapper distributes both.

    Args:
        transformer (`EditARForConditionalGeneration`): The decoder.
        text_encoder (`PreTrainedModel`): A T5 encoder, trained if any of its parameters requires gradients.
        grid (`tuple[int, int]`): Rows and columns of image tokens of a batch that does not hold its own `grid`.
        edit_region_weight (`float`): Weight of tokens inside the mask.
        distillation_loss_weight (`float`): Weight of the distance to the teacher's features.
    """

    def __init__(
        self,
        transformer: EditARForConditionalGeneration,
        text_encoder: PreTrainedModel,
        grid: tuple[int, int],
        edit_region_weight: float = 1.0,
        distillation_loss_weight: float = 0.5,
    ):
        super().__init__()
        self.transformer, self.text_encoder, self.grid = transformer, text_encoder, grid
        self.edit_region_weight, self.distillation_loss_weight = edit_region_weight, distillation_loss_weight
        self.trains_text_encoder = any(parameter.requires_grad for parameter in text_encoder.parameters())

    def train(self, mode: bool = True) -> Self:
        """Set the training mode. A frozen text encoder stays in evaluation mode, without dropout."""
        super().train(mode)
        self.text_encoder.train(mode and self.trains_text_encoder)
        return self

    def forward(
        self,
        batch: Mapping[str, torch.Tensor],
        drop_source: torch.Tensor | None = None,
        drop_prompt: torch.Tensor | None = None,
        teacher_features: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return `loss`, `token_loss`, `distillation_loss` if there is a teacher, and `token_losses` `(batch,)`.

        Args:
            batch (`Mapping`): `source_image_tokens`, `target_image_tokens`, `input_ids` and `attention_mask`. Optional:
                `shown_image_tokens`, which replace the target tokens in the decoder's input; `edit_mask`;
                `prompt_embeds`, precomputed text states; and `grid`.
            drop_source, drop_prompt (`torch.BoolTensor` of shape `(batch,)`, *optional*): Conditions to drop.
            teacher_features (`torch.Tensor` of shape `(batch, cells, width)`, *optional*): Features of the teacher.
        """
        grid_height, grid_width = batch.get("grid", self.grid)
        output = self.transformer(
            source_image_tokens=batch["source_image_tokens"],
            prompt_embeds=self.encode_prompts(batch),
            target_image_tokens=batch.get("shown_image_tokens", batch["target_image_tokens"]),
            drop_source=drop_source,
            drop_prompt=drop_prompt,
            grid_height=grid_height,
            grid_width=grid_width,
            output_distillation_features=teacher_features is not None,
        )
        token_losses = compute_token_losses(
            output.logits, batch["target_image_tokens"], batch.get("edit_mask"), self.edit_region_weight
        )
        losses = {"token_losses": token_losses.detach(), "token_loss": token_losses.mean()}
        losses["loss"] = losses["token_loss"]
        if teacher_features is not None:
            cells = grid_height // 2, grid_width // 2
            losses["distillation_loss"] = compute_distillation_loss(
                output.distillation_features, teacher_features, *cells
            )
            losses["loss"] = losses["loss"] + self.distillation_loss_weight * losses["distillation_loss"]
        return losses

    def encode_prompts(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the text states of a batch: precomputed, or else from the text encoder."""
        if "prompt_embeds" in batch:
            return batch["prompt_embeds"].to(self.transformer.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_text_encoder):
            return self.text_encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
