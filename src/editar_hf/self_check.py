"""The self-check: measure whether a pipeline behaves like a trained one, without a reference to compare with.

The check encodes and decodes a bundled photograph, and runs one teacher-forced pass whose source and target are both
the photograph's tokens. A decoder that learned to edit finds these tokens far likelier than chance, and likelier than
without the source. Weights with wrong names, orders or scales, and untrained weights, fail at least one measurement.

The photograph, `self_check.jpg`, is NASA's portrait of the astronaut Eileen Collins, in the public domain.
"""

import math
from dataclasses import dataclass
from importlib.resources import files

import torch
from PIL import Image

from .image_processing_editar import compute_psnr


# A uniformly grey image has 10 dB; the published VQ model reaches more than 20 dB on photographs.
MIN_TOKENIZER_PSNR = 15.0
# In nats per token: every token is on average e times likelier than under a uniform draw.
MIN_GAIN_OVER_CHANCE = 1.0
# In nats per token: more than two passes with unrelated conditions differ by.
MIN_GAIN_FROM_SOURCE = 0.1
# An instruction that changes much of any image, worded as in the published training data.
PROMPT = "add a large red circle in the middle"
# Source: EditAR (arXiv 2501.04699), section 4.
GUIDANCE_SCALE = 3.0


@dataclass(frozen=True)
class SelfCheckReport:
    """The measurements of the self-check, and whether a trained pipeline would show them.

    Args:
        tokenizer_psnr (`float`): PSNR of the photograph after encoding and decoding, in dB.
        nll_with_source (`float`): Negative log-likelihood of the photograph's tokens with themselves as the source, in
            nats per token.
        nll_without_source (`float`): The same with the null image as the source.
        chance_nll (`float`): The same under a uniform draw from the vocabulary.
        changed_by_guidance (`float`): Fraction of positions whose likeliest token changes when guidance towards a
            prompt is added.
        non_finite (`tuple[str, ...]`): Weights and outputs that hold NaN or infinity.
    """

    tokenizer_psnr: float
    nll_with_source: float
    nll_without_source: float
    chance_nll: float
    changed_by_guidance: float
    non_finite: tuple[str, ...] = ()

    @property
    def failures(self) -> list[str]:
        """One sentence for each measurement that a trained pipeline would not show; NaN fails every comparison."""
        gain_over_chance = self.chance_nll - self.nll_with_source
        gain_from_source = self.nll_without_source - self.nll_with_source
        return [
            sentence
            for holds, sentence in (
                (not self.non_finite, f"Not finite: {', '.join(self.non_finite)}."),
                (
                    self.tokenizer_psnr >= MIN_TOKENIZER_PSNR,
                    f"The tokenizer loses the photograph: {self.tokenizer_psnr:.2f} dB, at least "
                    f"{MIN_TOKENIZER_PSNR:.2f} expected.",
                ),
                (
                    gain_over_chance >= MIN_GAIN_OVER_CHANCE,
                    f"Tokens are hardly likelier than chance: by {gain_over_chance:.2f} nats, at least "
                    f"{MIN_GAIN_OVER_CHANCE:.2f} expected.",
                ),
                (
                    gain_from_source >= MIN_GAIN_FROM_SOURCE,
                    f"The source image does not help: by {gain_from_source:.2f} nats, at least "
                    f"{MIN_GAIN_FROM_SOURCE:.2f} expected.",
                ),
                (self.changed_by_guidance > 0, "Guidance changes no token: the prompt has no effect."),
            )
            if not holds
        ]

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_markdown(self) -> str:
        """Format the measurements as a table, followed by what failed."""
        rows = [
            "| self-check | figure | expected |",
            "|---|---|---|",
            f"| photograph through the tokenizer, PSNR | {self.tokenizer_psnr:.2f} dB | ≥ {MIN_TOKENIZER_PSNR:.2f} |",
            f"| NLL of its tokens with the source | {self.nll_with_source:.3f} nats | "
            f"≤ {self.chance_nll - MIN_GAIN_OVER_CHANCE:.3f} (chance: {self.chance_nll:.3f}) |",
            f"| NLL of its tokens without the source | {self.nll_without_source:.3f} nats | "
            f"≥ {self.nll_with_source + MIN_GAIN_FROM_SOURCE:.3f} |",
            f"| likeliest tokens changed by guidance {GUIDANCE_SCALE:g} | {self.changed_by_guidance:.1%} | > 0 |",
            f"| weights and outputs that are not finite | {len(self.non_finite)} | 0 |",
        ]
        verdict = self.failures or ["Passed."]
        return "\n".join([*rows, "", *verdict])


@torch.no_grad()
def check_pipeline(pipeline) -> SelfCheckReport:
    """Measure a pipeline on the bundled photograph, with one pass of the VQ model and one of the decoder.

    Args:
        pipeline (`EditARPipeline`): On any device, in any dtype.
    """
    image_tokens, reconstruction, tokenizer_psnr = compute_tokenizer_psnr(pipeline)
    grid = {"grid_height": reconstruction.shape[2], "grid_width": reconstruction.shape[3]}
    grid = {name: pixels // pipeline.vq_model.config.stride for name, pixels in grid.items()}
    prompted, unprompted, without_source = compute_branch_logits(pipeline, image_tokens, grid)
    guided = unprompted + GUIDANCE_SCALE * (prompted - unprompted)
    outputs = {"pixels": reconstruction, "logits": torch.stack([prompted, unprompted, without_source])}
    return SelfCheckReport(
        tokenizer_psnr=tokenizer_psnr,
        nll_with_source=compute_nll(unprompted, image_tokens),
        nll_without_source=compute_nll(without_source, image_tokens),
        chance_nll=math.log(pipeline.transformer.config.vocab_size),
        # The comparison is with no prompt: a decoder that is sure of an edit predicts the same tokens with a prompt and
        # with guidance.
        changed_by_guidance=(guided.argmax(-1) != unprompted.argmax(-1)).float().mean().item(),
        non_finite=(
            *list_non_finite_weights(pipeline),
            *(name for name in outputs if not outputs[name].isfinite().all()),
        ),
    )


def compute_tokenizer_psnr(pipeline) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Encode and decode the photograph; return its tokens (1, N), the decoded pixels and the PSNR in dB."""
    with Image.open(str(files("editar_hf") / "self_check.jpg")) as photograph:
        inputs = pipeline.processor(images=photograph, resize_mode="stretch")
    vq_model = pipeline.vq_model
    pixels = inputs.source_pixel_values.to(vq_model.device, vq_model.dtype)
    image_tokens = vq_model.encode(pixels).image_tokens
    grid_height, grid_width = (side // vq_model.config.stride for side in pixels.shape[2:])
    reconstruction = vq_model.decode(image_tokens, grid_height, grid_width)
    return image_tokens, reconstruction, compute_psnr(reconstruction, pixels).item()


def compute_branch_logits(pipeline, image_tokens: torch.Tensor, grid: dict[str, int]) -> torch.Tensor:
    """Compute logits (3, N, vocab_size) of the source's tokens: with prompt and source, source alone, and neither."""
    transformer, text_encoder = pipeline.transformer, pipeline.text_encoder
    inputs = pipeline.processor(text=PROMPT).to(text_encoder.device)
    prompt_embeds = text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
    tokens = image_tokens.to(transformer.device).expand(3, -1)
    output = transformer(
        source_image_tokens=tokens,
        prompt_embeds=prompt_embeds.to(transformer.device, transformer.dtype).expand(3, -1, -1),
        target_image_tokens=tokens,
        drop_source=torch.tensor([False, False, True], device=transformer.device),
        drop_prompt=torch.tensor([False, True, True], device=transformer.device),
        **grid,
    )
    return output.logits.float().cpu()


def compute_nll(logits: torch.Tensor, image_tokens: torch.Tensor) -> float:
    """Compute the mean negative log-likelihood, in nats, of tokens (1, N) under logits (N, vocab_size)."""
    return torch.nn.functional.cross_entropy(logits, image_tokens[0].cpu()).item()


def list_non_finite_weights(pipeline) -> list[str]:
    """List the parameters and buffers that hold NaN or infinity."""
    return [
        f"{part}.{name}"
        for part in ("transformer", "vq_model", "text_encoder")
        for name, tensor in getattr(pipeline, part).state_dict().items()
        if not tensor.isfinite().all()
    ]
