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
import torch.nn.functional as F
from PIL import Image

from .image_processing_editar import compute_psnr
from .pipelines.pipeline_editar import EditARPipeline


# A uniformly grey image has 10 dB; the published VQ model reaches more than 20 dB on photographs.
MIN_VQ_PSNR = 15.0
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
        vq_psnr (`float`): PSNR of the photograph after encoding and decoding, in dB.
        nll_with_source (`float`): Negative log-likelihood of the photograph's tokens with themselves as the source, in
            nats per token.
        nll_without_source (`float`): The same with the null image as the source.
        chance_nll (`float`): The same under a uniform draw from the vocabulary.
        changed_by_guidance (`float`): Fraction of positions whose likeliest token changes when guidance towards a
            prompt is added.
        non_finite (`tuple[str, ...]`): Weights and outputs that hold NaN or infinity.
    """

    vq_psnr: float
    nll_with_source: float
    nll_without_source: float
    chance_nll: float
    changed_by_guidance: float
    non_finite: tuple[str, ...] = ()

    @property
    def max_nll_with_source(self) -> float:
        return self.chance_nll - MIN_GAIN_OVER_CHANCE

    @property
    def min_nll_without_source(self) -> float:
        return self.nll_with_source + MIN_GAIN_FROM_SOURCE

    @property
    def failures(self) -> list[str]:
        """One sentence for each measurement that a trained pipeline would not show; NaN fails every comparison."""
        checks = {
            f"Not finite: {', '.join(self.non_finite)}.": not self.non_finite,
            "The VQ model loses the photograph.": self.vq_psnr >= MIN_VQ_PSNR,
            "Tokens are hardly likelier than chance.": self.nll_with_source <= self.max_nll_with_source,
            "The source image does not help.": self.nll_without_source >= self.min_nll_without_source,
            "Guidance changes no token: the prompt has no effect.": self.changed_by_guidance > 0,
        }
        return [problem for problem, holds in checks.items() if not holds]

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_markdown(self) -> str:
        """Format the measurements as a table, followed by what failed."""
        rows = [
            "| self-check | figure | expected |",
            "|---|---|---|",
            f"| photograph through the VQ model, PSNR | {self.vq_psnr:.2f} dB | ≥ {MIN_VQ_PSNR:.2f} |",
            f"| NLL of its tokens with the source | {self.nll_with_source:.3f} nats | ≤ {self.max_nll_with_source:.3f} "
            f"(chance: {self.chance_nll:.3f}) |",
            f"| NLL of its tokens without the source | {self.nll_without_source:.3f} nats | "
            f"≥ {self.min_nll_without_source:.3f} |",
            f"| likeliest tokens changed by guidance {GUIDANCE_SCALE:g} | {self.changed_by_guidance:.1%} | > 0 |",
            f"| weights and outputs that are not finite | {len(self.non_finite)} | 0 |",
        ]
        return "\n".join([*rows, "", *(self.failures or ["Passed."])])


@torch.no_grad()
def check_pipeline(pipeline: EditARPipeline) -> SelfCheckReport:
    """Measure a pipeline on the bundled photograph, with one pass of the VQ model and one of the decoder.

    Args:
        pipeline (`EditARPipeline`): On any device, in any dtype.
    """
    with Image.open(str(files("editar_hf") / "self_check.jpg")) as photograph:
        pixel_values = pipeline.prepare_pixel_values(photograph, None, None, "stretch")
    grid = pipeline.compute_grid(*pixel_values.shape[2:])
    image_tokens = pipeline.encode_pixel_values(pixel_values)
    decoded = pipeline.decode_pixel_values(image_tokens, grid).cpu()
    logits = compute_branch_logits(pipeline, image_tokens, grid)
    prompted, unprompted, without_source = logits
    guided = unprompted + GUIDANCE_SCALE * (prompted - unprompted)
    tensors = {"pixels": decoded, "logits": logits}
    for part in ("transformer", "vq_model", "text_encoder"):
        tensors |= {f"{part}.{name}": tensor for name, tensor in getattr(pipeline, part).state_dict().items()}
    return SelfCheckReport(
        vq_psnr=compute_psnr(decoded, pixel_values.cpu()).item(),
        nll_with_source=F.cross_entropy(unprompted, image_tokens[0].cpu()).item(),
        nll_without_source=F.cross_entropy(without_source, image_tokens[0].cpu()).item(),
        chance_nll=math.log(pipeline.transformer.config.vocab_size),
        # The comparison is with no prompt: a decoder that is sure of an edit predicts the same tokens with a prompt and
        # with guidance.
        changed_by_guidance=(guided.argmax(-1) != unprompted.argmax(-1)).float().mean().item(),
        non_finite=tuple(name for name, tensor in tensors.items() if not tensor.isfinite().all()),
    )


def compute_branch_logits(pipeline: EditARPipeline, image_tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Compute logits (3, N, vocab_size) of the source's tokens: with prompt and source, source alone, and neither."""
    transformer, text_encoder = pipeline.transformer, pipeline.text_encoder
    inputs = pipeline.processor(text=PROMPT).to(text_encoder.device)
    # `encode_prompt` would refuse states that are not finite, which the report shall say.
    prompt_embeds = text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
    tokens = image_tokens.to(transformer.device).expand(3, -1)
    output = transformer(
        source_image_tokens=tokens,
        prompt_embeds=prompt_embeds.to(transformer.device, transformer.dtype).expand(3, -1, -1),
        target_image_tokens=tokens,
        drop_source=torch.tensor([False, False, True], device=transformer.device),
        drop_prompt=torch.tensor([False, True, True], device=transformer.device),
        grid_height=grid[0],
        grid_width=grid[1],
    )
    return output.logits.float().cpu()
