"""Compute the losses of a batch, with both trained networks in one module."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling_editar import EditARForConditionalGeneration
from .batch import compute_token_losses, draw_conditioning_dropout, drop_target_tokens
from .distillation import compute_distillation_loss


class TrainingStep(nn.Module):
    """Compute the losses of a batch. One module holds both trained networks, so that it is distributed by one wrapper.

    Args:
        transformer (`EditARForConditionalGeneration`): The decoder.
        text_encoder (`PreTrainedModel`): A T5 encoder, trained if any of its parameters requires gradients.
        grid (`tuple[int, int]`): Rows and columns of image tokens.
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
        """Switch to training. A frozen text encoder stays without dropout."""
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
        """Return `loss` and `token_loss`, scalars; `token_losses` `(batch,)`; and `distillation_loss` with a teacher.

        Args:
            batch (`Mapping`): `source_image_tokens`, `target_image_tokens`, `input_ids`, `attention_mask`; optional are
                `shown_image_tokens`, the decoder's input in place of the target; `edit_mask`; and `prompt_embeds`,
                precomputed text states.
            drop_source, drop_prompt (`torch.BoolTensor` of shape `(batch,)`, *optional*): Conditions to drop.
            teacher_features (`torch.Tensor` of shape `(batch, cells, width)`, *optional*): Features of the teacher.
        """
        output = self.transformer(
            source_image_tokens=batch["source_image_tokens"],
            prompt_embeds=self.encode_prompts(batch),
            target_image_tokens=batch.get("shown_image_tokens", batch["target_image_tokens"]),
            drop_source=drop_source,
            drop_prompt=drop_prompt,
            grid_height=self.grid[0],
            grid_width=self.grid[1],
            output_distillation_features=teacher_features is not None,
        )
        token_losses = compute_token_losses(
            output.logits, batch["target_image_tokens"], batch.get("edit_mask"), self.edit_region_weight
        )
        losses = {"token_losses": token_losses.detach(), "token_loss": token_losses.mean()}
        losses["loss"] = losses["token_loss"]
        if teacher_features is not None:
            cells = (self.grid[0] // 2, self.grid[1] // 2)
            losses["distillation_loss"] = compute_distillation_loss(
                output.distillation_features, teacher_features, *cells
            )
            losses["loss"] = losses["loss"] + self.distillation_loss_weight * losses["distillation_loss"]
        return losses

    def encode_prompts(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Encode the prompts of a batch, unless their states were precomputed."""
        if "prompt_embeds" in batch:
            return batch["prompt_embeds"].to(self.transformer.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_text_encoder):
            return self.text_encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state


def draw_dropout(
    batch: Mapping[str, torch.Tensor],
    seed: int,
    place: int,
    drops_conditioning: bool = True,
    target_token_dropout: float = 0.0,
) -> dict:
    """Draw the dropout of a batch of tokens; returns the keyword arguments of `TrainingStep`, with the batch.

    The draws depend only on the seed and on the batch's place in the run, so that a resumed run draws the same as an
    uninterrupted one.

    Args:
        batch (`Mapping`): Tokens and prompts.
        seed (`int`): Seed of the run.
        place (`int`): Index of the batch in the run, batches of other processes counted.
        drops_conditioning (`bool`): Whether to drop source images and prompts, as published.
        target_token_dropout (`float`): See `drop_target_tokens`.
    """
    # The generator uses only the low 32 bits of its seed. The prime keeps two seeds apart for a million batches.
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
