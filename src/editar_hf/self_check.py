"""The self-check: test whether a pipeline behaves like a trained one. It needs no reference results.

The check encodes and decodes a bundled photograph. It then runs one teacher-forced pass in which both the source and
the target are the photograph's tokens. A trained decoder gives these tokens a far higher likelihood than chance, and a
higher one than without the source. Untrained weights, and weights with wrong names, orders or scales, fail at least
one measurement.

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


# A uniformly gray image has 10 dB; the published VQ model reaches more than 20 dB on photographs.
MIN_VQ_PSNR = 15.0
# In nats per token: with a gain of 1, a token is on average e times as likely as under the uniform distribution.
MIN_GAIN_OVER_CHANCE = 1.0
# In nats per token: larger than the difference between two passes with unrelated conditions.
MIN_GAIN_FROM_SOURCE = 0.1
# An instruction that changes a large part of any image, worded as in the published training data.
PROMPT = "add a large red circle in the middle"
# Source: EditAR (arXiv 2501.04699), section 4.
GUIDANCE_SCALE = 3.0


@dataclass(frozen=True)
class SelfCheckReport:
    """The measurements of the self-check, and whether they are those of a trained pipeline.

    Args:
        vq_psnr (`float`): PSNR of the photograph after encoding and decoding, in dB.
        nll_with_source (`float`): Negative log-likelihood of the photograph's tokens when the source is the photograph,
            in nats per token.
        nll_without_source (`float`): The same when the source is the null image.
        chance_nll (`float`): The same under the uniform distribution over the vocabulary.
        changed_by_guidance (`float`): Fraction of positions whose most likely token changes when guidance towards a
            prompt is added.
        non_finite (`tuple[str, ...]`): Names of weights and outputs that hold NaN or infinity.
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
        """One sentence for each measurement that is not that of a trained pipeline. NaN fails every comparison."""
        checks = {
            f"Not finite: {', '.join(self.non_finite)}.": not self.non_finite,
            "The VQ model does not reconstruct the photograph.": self.vq_psnr >= MIN_VQ_PSNR,
            "The decoder predicts tokens hardly better than chance.": self.nll_with_source <= self.max_nll_with_source,
            "The source image does not improve the prediction.": self.nll_without_source >= self.min_nll_without_source,
            "Guidance changes no token: the prompt has no effect.": self.changed_by_guidance > 0,
        }
        return [problem for problem, holds in checks.items() if not holds]

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_markdown(self) -> str:
        """Format the measurements as a table, followed by the failures."""
        rows = [
            "| measurement | value | expected |",
            "|---|---|---|",
            f"| PSNR of the photograph after the VQ model | {self.vq_psnr:.2f} dB | ≥ {MIN_VQ_PSNR:.2f} |",
            f"| NLL per token with the source image | {self.nll_with_source:.3f} nats | "
            f"≤ {self.max_nll_with_source:.3f} (chance: {self.chance_nll:.3f}) |",
            f"| NLL per token without the source image | {self.nll_without_source:.3f} nats | "
            f"≥ {self.min_nll_without_source:.3f} |",
            f"| tokens changed by guidance {GUIDANCE_SCALE:g} | {self.changed_by_guidance:.1%} | > 0 |",
            f"| weights and outputs with NaN or infinity | {len(self.non_finite)} | 0 |",
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
        # Guided logits are compared with those without a prompt, not with those with a prompt: if the decoder is
        # certain, guidance changes no token that the prompt alone does not change.
        changed_by_guidance=(guided.argmax(-1) != unprompted.argmax(-1)).float().mean().item(),
        non_finite=tuple(name for name, tensor in tensors.items() if not tensor.isfinite().all()),
    )


def compute_branch_logits(pipeline: EditARPipeline, image_tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Compute logits (3, N, vocab_size) of the source tokens: with prompt and source, with the source, with neither."""
    transformer, text_encoder = pipeline.transformer, pipeline.text_encoder
    inputs = pipeline.processor(text=PROMPT).to(text_encoder.device)
    # `encode_prompt` would raise an error for states that are not finite. The report must list them instead.
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
