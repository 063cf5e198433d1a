"""Pure tensor functions that choose one token per image from the logits of the guidance branches.

Sampling takes the arg-max of logits plus Gumbel noise. The noise is stateless: it is a function of seed, position and
code only. Therefore the noise of an image does not depend on the batch, the mask, the drafts or the device.

Sources: E. J. Gumbel (1954) for the Gumbel-max method; predictive sampling (arXiv 2002.09928) for noise that is fixed
before sampling; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), for counter-based random
numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


LOW_32_BITS = 0xFFFFFFFF

# Start values of the two words of a key. Any two different numbers work; these are the fractional parts of the golden
# ratio and of the square root of two, times 2³².
KEY_STARTS = (0x9E3779B9, 0x6A09E667)


class DecodingSettings(NamedTuple):
    """Settings of `generate`; the defaults are the published ones.

    Attributes:
        do_sample (`bool`): Sample tokens. If False, decoding is greedy: it takes the most likely token at every
            position.
        temperature (`float`): Divides the logits; positive.
        top_k (`int`): Sample among the `top_k` most likely tokens; 0, or more than `vocab_size`, means all tokens.
        top_p (`float`): Sample among the smallest set of most likely tokens whose probabilities add up to at least
            `top_p`, in (0, 1].
        guidance_scale (`float`): Weight of the prompt; 1 means no guidance.

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
    """List the branches that `apply_guidance` combines. Branches without the source come last."""
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

    Source: EditAR (arXiv 2501.04699), section 3, for two branches; InstructPix2Pix (arXiv 2211.09800), equation 3, for
    three.
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
    """Build the warpers for temperature, top-k and top-p, in this order. Warpers that change nothing are left out."""
    warpers: list[LogitsProcessor] = []
    if settings.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k > 0:
        warpers.append(TopKLogitsWarper(int(settings.top_k)))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(float(settings.top_p)))
    return warpers


def draw_seeds(generator: torch.Generator | Sequence[torch.Generator] | None, batch_size: int) -> torch.Tensor:
    """Draw one 63-bit seed per image, shape `(batch,)`, on the CPU; without a generator, from torch's global one."""
    generators = generator if isinstance(generator, Sequence) else [generator] * batch_size
    # Each seed is drawn separately, so that the seed of an image does not depend on the batch size.
    seeds = [torch.randint(2**63 - 1, (), generator=one, device=one.device if one else "cpu") for one in generators]
    return torch.tensor([seed.item() for seed in seeds])


def mix_bits(words: torch.Tensor) -> torch.Tensor:
    """Hash 32-bit words, stored as int64, in place. The hash is a bijection; every input bit affects every output bit.

    Source: github.com/skeeto/hash-prospector (public domain), its two-round function of lowest bias,
    "[16 21f0aaad 15 d35a2d97 15]".
    """
    words ^= words >> 16
    words *= 0x21F0AAAD
    words &= LOW_32_BITS
    words ^= words >> 15
    # Subtracting 2³² does not change the product modulo 2³², and keeps it inside a signed 64-bit integer.
    words *= 0xD35A2D97 - 2**32
    words &= LOW_32_BITS
    words ^= words >> 15
    return words


def compute_noise_keys(seeds: torch.Tensor, num_positions: int) -> torch.Tensor:
    """Hash seeds `(batch,)` and positions 0 … num_positions − 1 to 64-bit keys, as words `(2, batch, num_positions)`.

    Two positions with the same key would get the same noise. With 32-bit keys, this would happen in practice.
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
    """Compute standard Gumbel noise, float32 of shape `(..., vocab_size)`, by hashing keys `(2, ...)` with every code.

    The upper 23 bits k of a hash give u = (k + ½)·2⁻²³, which is exact in float32 and never 0 or 1. The noise is
    −log(−log u).
    """
    codes = torch.arange(vocab_size, device=keys.device)
    words = mix_bits(codes ^ keys[0, ..., None])
    words = mix_bits(words ^ keys[1, ..., None])
    uniform = (words >> 9).float().add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def as_index(positions: Sequence[int] | torch.Tensor) -> slice | list[int] | torch.Tensor:
    """Return a tensor unchanged, consecutive positions as a slice, and other positions as a list.

    A list must be copied to the device, and a slice must be known on the host.
    """
    if isinstance(positions, torch.Tensor):
        return positions
    is_run = positions[-1] - positions[0] == len(positions) - 1
    return slice(positions[0], positions[-1] + 1) if is_run else list(positions)


@dataclass
class TokenSelector:
    """Choose tokens by guidance, logits processors, warpers and noise (if sampling), and arg-max.

    `noise_keys` come from `compute_noise_keys`; None means greedy decoding. Tokens stay unchanged where `edit_mask`,
    `(batch, N)`, is False. All tensors are on `device`.
    """

    settings: DecodingSettings
    image_guidance_scale: float
    logits_processor: Sequence[LogitsProcessor]
    device: torch.device
    noise_keys: torch.Tensor | None
    edit_mask: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.warpers = [] if self.noise_keys is None else build_logits_warpers(self.settings)
        # The sum is finite as long as all guided logits are. It is read only at the end, so that decoding never waits
        # for the device.
        self.sum_of_highest = torch.zeros((), device=self.device)

    def describe(self) -> tuple:
        """Describe all that compiled code depends on, apart from the shapes of `tokens` and the logits."""
        return self.settings, self.image_guidance_scale, self.noise_keys is None, self.edit_mask is None

    def __call__(
        self, branch_logits: torch.Tensor, tokens: torch.Tensor, positions: Sequence[int] | torch.Tensor
    ) -> torch.Tensor:
        """Choose a token for each of the positions, which are in ascending order, on the condition of `tokens`.

        The float32 logits are `(branches, batch, positions, vocab_size)`. `tokens`, `(batch, N)`, holds the accepted
        tokens, and the proposed tokens after them. Logits processors must see the same inputs as with one token per
        pass. With them, the choices end at the first position where a row chooses another token than the proposed one,
        and `positions` must not be a tensor.
        """
        logits = apply_guidance(branch_logits, self.settings.guidance_scale, self.image_guidance_scale)
        self.sum_of_highest += logits.amax(dim=-1).sum()
        if not self.logits_processor:
            return self.choose(logits, tokens, positions)
        chosen: list[torch.Tensor] = []
        for index, position in enumerate(positions):
            # A choice that differs from the proposed token ends the pass. In exact decoding, nothing is compared.
            if chosen and not torch.equal(chosen[-1][:, 0], tokens[:, positions[index - 1]]):
                break
            processed = logits[:, index]
            for processor in self.logits_processor:
                processed = processor(tokens[:, :position], processed)
            chosen.append(self.choose(processed[:, None], tokens, [position]))
        return torch.cat(chosen, dim=1)

    def choose(
        self, logits: torch.Tensor, tokens: torch.Tensor, positions: Sequence[int] | torch.Tensor
    ) -> torch.Tensor:
        """Choose from processed logits `(batch, positions, vocab_size)`; tokens outside the edit mask do not change."""
        index = as_index(positions)
        for warper in self.warpers:
            logits = warper(tokens, logits.flatten(0, 1)).view_as(logits)
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
                "The decoder's logits were NaN or infinite, so its tokens are useless. The likely cause is an overflow "
                "in float16: load the pipeline with `dtype=torch.bfloat16` or `torch.float32`. In float32, check for "
                "damaged weights or adapters, and for a very large `guidance_scale`."
            )
