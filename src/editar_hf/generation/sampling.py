"""Pure tensor functions from the logits of the guidance branches to one token per image.

Sampling is arg-max of logits plus Gumbel noise, and the noise is stateless: a function of (seed, position, code) and
nothing else. Batches, masks, drafts and devices therefore all see the same noise for an image, in any order.

Sources: Gumbel-max, E. J. Gumbel (1954); noise fixed ahead of the sample, predictive sampling (arXiv 2002.09928);
counters in place of a generator's state, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


LOW_32_BITS = 0xFFFFFFFF

# Any two different words start the two halves of a key; these are the fractional parts of the golden ratio and of
# the square root of two, times 2³².
KEY_STARTS = (0x9E3779B9, 0x6A09E667)


class DecodingSettings(NamedTuple):
    """Settings of `generate`; the defaults are the published ones.

    Attributes:
        do_sample (`bool`): Sample, or take the likeliest token at every position.
        temperature (`float`): Divides the logits; positive.
        top_k (`int`): Sample among so many of the likeliest tokens; 0, or more than the vocabulary has, means all.
        top_p (`float`): Sample among the likeliest tokens that together reach this probability, in (0, 1].
        guidance_scale (`float`): Weight of the prompt; 1 decodes without guidance.

    Source: the defaults of the published sampling script; the scale of EditAR (arXiv 2501.04699), section 4.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 1000
    top_p: float = 1.0
    guidance_scale: float = 3.0


class GuidanceBranch(NamedTuple):
    """The conditions that one branch of guidance drops."""

    drop_source: bool
    drop_prompt: bool


def select_branches(
    guidance_scale: float, image_guidance_scale: float, has_source: bool = True
) -> list[GuidanceBranch]:
    """List the branches that `apply_guidance` combines. Those without the source come last."""
    branches = [GuidanceBranch(not has_source, False)]
    if guidance_scale != 1 or image_guidance_scale != 1:
        branches.append(GuidanceBranch(not has_source, True))
    if image_guidance_scale != 1:
        branches.append(GuidanceBranch(True, True))
    return branches


def apply_guidance(
    branch_logits: Sequence[torch.Tensor] | torch.Tensor, guidance_scale: float, image_guidance_scale: float
) -> torch.Tensor:
    """Combine the logits of one to three branches, in the order of `select_branches`, into guided logits.

    Source: two branches, EditAR (arXiv 2501.04699), section 3; three, InstructPix2Pix (arXiv 2211.09800), equation 3.
    """
    if len(branch_logits) == 1:
        return branch_logits[0]
    conditional, image_only = branch_logits[0], branch_logits[1]
    prompt_part = guidance_scale * (conditional - image_only)
    if len(branch_logits) == 2:
        return image_only + prompt_part
    unconditional = branch_logits[2]
    return unconditional + image_guidance_scale * (image_only - unconditional) + prompt_part


def build_logits_warpers(settings: DecodingSettings) -> list[LogitsProcessor]:
    """Build temperature, top-k and top-p, in this order, leaving out those that change nothing."""
    warpers: list[LogitsProcessor] = []
    if settings.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k > 0:
        warpers.append(TopKLogitsWarper(int(settings.top_k)))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(float(settings.top_p)))
    return warpers


def draw_seeds(generator: torch.Generator | Sequence[torch.Generator] | None, batch_size: int) -> torch.Tensor:
    """Draw one 63-bit seed per image, shape `(batch,)`, on the CPU; without a generator, from torch's own."""
    generators = generator if isinstance(generator, Sequence) else [generator] * batch_size
    # One draw per image: a generator then gives an image the same seed whatever comes after it in the batch.
    seeds = [torch.randint(2**63 - 1, (), generator=one, device=one.device if one else "cpu") for one in generators]
    return torch.tensor([seed.item() for seed in seeds])


def mix_bits(words: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit words, kept in int64, in place: a bijection in which every input bit moves every output bit.

    Source: shifts and multipliers of github.com/skeeto/hash-prospector (public domain), the pair of lowest bias among
    its two-round functions, "[16 21f0aaad 15 d35a2d97 15]".
    """
    words ^= words >> 16
    words *= 0x21F0AAAD
    words &= LOW_32_BITS
    words ^= words >> 15
    # Minus 2³² is the same multiplier modulo 2³², and keeps the product inside a signed 64-bit integer.
    words *= 0xD35A2D97 - 2**32
    words &= LOW_32_BITS
    words ^= words >> 15
    return words


def compute_noise_keys(seeds: torch.Tensor, num_positions: int) -> torch.Tensor:
    """Hash seeds `(batch,)` and positions 0 … num_positions − 1 to 64-bit keys, as words `(2, batch, num_positions)`.

    Two words, because equal keys mean equal noise at two positions: among 32-bit keys that would happen.
    """
    positions = torch.arange(num_positions, device=seeds.device)
    low, high = seeds & LOW_32_BITS, seeds >> 32
    keys = []
    for start, words in zip(KEY_STARTS, ((low, high), (high, low)), strict=True):
        state = mix_bits(words[0] ^ start)
        state = mix_bits(state ^ words[1])
        keys.append(mix_bits(state[:, None] ^ positions))
    return torch.stack(keys)


def compute_gumbel_noise(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Hash keys `(2, ...)` with every code to standard Gumbel noise, float32 of shape `(..., vocab_size)`.

    The upper 23 bits k of a hash give u = (k + ½)·2⁻²³, exact in float32 and never 0 or 1, and −log(−log u).
    """
    codes = torch.arange(vocab_size, device=keys.device)
    words = mix_bits(codes ^ keys[0, ..., None])
    words = mix_bits(words ^ keys[1, ..., None])
    uniform = (words >> 9).float().add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def as_index(positions: Sequence[int]) -> slice | list[int]:
    """Index with a slice where positions follow one another: a list would travel to the device first."""
    is_run = positions[-1] - positions[0] == len(positions) - 1
    return slice(positions[0], positions[-1] + 1) if is_run else list(positions)


@dataclass
class TokenSelector:
    """Choose tokens: guidance, logits processors, warpers and noise (when sampling), arg-max.

    `noise_keys` are from `compute_noise_keys`; None takes the likeliest tokens. A token stands as it is where
    `edit_mask`, `(batch, N)`, is False.
    """

    settings: DecodingSettings
    image_guidance_scale: float
    logits_processor: Sequence[LogitsProcessor]
    noise_keys: torch.Tensor | None
    edit_mask: torch.Tensor | None = None

    def __post_init__(self) -> None:
        warpers = [] if self.noise_keys is None else build_logits_warpers(self.settings)
        self.processors = LogitsProcessorList([*self.logits_processor, *warpers])
        # Stays finite as long as all guided logits are; read once, at the end, so that no token waits for the device.
        self.sum_of_highest: torch.Tensor | float = 0.0

    def __call__(self, branch_logits: torch.Tensor, tokens: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """Choose tokens for ascending positions, each as if the tokens before it held.

        The float32 logits are `(branches, batch, positions, vocab_size)`. `tokens`, `(batch, N)`, holds the tokens so
        far, and what is proposed after them. Logits processors see what they would see one token at a time: with them,
        the choices end at the first position where a row's choice is not what was proposed.
        """
        logits = apply_guidance(branch_logits, self.settings.guidance_scale, self.image_guidance_scale)
        self.sum_of_highest = self.sum_of_highest + logits.amax(dim=-1).sum()
        if not self.logits_processor:
            logits = self.processors(tokens, logits.flatten(0, 1)).view_as(logits)
            return self.choose(logits, tokens, positions)
        chosen: list[torch.Tensor] = []
        for index, position in enumerate(positions):
            # An earlier choice that differs from what was proposed ends the pass. Exact decoding compares nothing.
            if chosen and not torch.equal(chosen[-1][:, 0], tokens[:, positions[index - 1]]):
                break
            processed = self.processors(tokens[:, :position], logits[:, index])
            chosen.append(self.choose(processed[:, None], tokens, [position]))
        return torch.cat(chosen, dim=1)

    def choose(self, logits: torch.Tensor, tokens: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """Choose from processed logits `(batch, positions, vocab_size)`; tokens outside the edit mask stay."""
        index = as_index(positions)
        if self.noise_keys is not None:
            logits = logits + compute_gumbel_noise(self.noise_keys[:, :, index], logits.shape[-1])
        chosen = logits.argmax(dim=-1)
        if self.edit_mask is None:
            return chosen
        return torch.where(self.edit_mask[:, index], chosen, tokens[:, index])

    def check_logits(self) -> None:
        """Raise a `RuntimeError` if the guided logits of any pass so far were NaN or infinite."""
        if not math.isfinite(self.sum_of_highest):
            raise RuntimeError(
                "The decoder's logits were NaN or infinite, so its tokens mean nothing. The likely cause is an "
                "overflow in float16: load the pipeline with `dtype=torch.bfloat16` or `torch.float32`. In float32, "
                "look for damaged weights or adapters, and for a very large `guidance_scale`."
            )
