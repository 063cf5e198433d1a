"""The pure functions behind `generate`: stateless noise, seeds, warping and guidance."""

import math

import numpy as np
import pytest
import torch
from plain_decoding import filter_naively, hash_noise

from editar_hf.generation import sampling
from editar_hf.generation.sampling import (
    DecodingSettings,
    TokenSelector,
    apply_guidance,
    compute_gumbel_noise,
    compute_noise_keys,
    draw_seeds,
    mix_bits,
)


SEEDS = torch.arange(64)  # consecutive seeds are the hard case: they differ in few bits
NUM_POSITIONS, VOCAB_SIZE = 32, 1024

# Two-sided bound on |z| for a statistic that should be standard normal: p ≈ 6e-5. All inputs are fixed, so a pass is
# a pass for ever.
MAX_Z = 4.0


def compute_noise(seeds, num_positions, vocab_size):
    return compute_gumbel_noise(compute_noise_keys(torch.as_tensor(seeds), num_positions), vocab_size)


def recover_uniform(noise):
    return torch.exp(-torch.exp(-noise.double()))


@pytest.fixture(scope="module")
def uniform():
    """The uniforms of consecutive seeds: (seeds, positions, codes)."""
    return recover_uniform(compute_noise(SEEDS, NUM_POSITIONS, VOCAB_SIZE))


def compute_chi_square_z(counts, expected):
    """Chi-square over the last axis, as a standard normal by Wilson and Hilferty's cube root."""
    statistic = ((counts - expected) ** 2 / expected).sum(-1)
    degrees = counts.shape[-1] - 1
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


def test_noise_is_the_documented_hash():
    for seed in (0, 1, 2**32 - 1, 2**32, 0x123456789ABCDEF0, 2**63 - 1):
        expected = [[hash_noise(seed, position, code) for code in range(40)] for position in range(3)]
        np.testing.assert_allclose(compute_noise([seed], 3, 40)[0].numpy(), expected, rtol=2e-5, atol=2e-6)


def test_hash_keeps_its_golden_values():
    """Recorded once: a change here changes every picture that users have a seed for."""
    words = mix_bits(torch.tensor([0, 1, 2, 0x9E3779B9, 0xFFFFFFFF]))
    assert words.tolist() == [0, 114555507, 229111015, 3294826546, 3652544131]
    keys = compute_noise_keys(torch.tensor([0, 2**63 - 1]), 2)
    assert keys.tolist() == [
        [[1577500788, 1320050280], [1134908132, 2073276227]],
        [[1853233772, 867788449], [475361295, 1567949955]],
    ]
    expected = torch.tensor([[[-0.96856, 0.64593], [-1.49919, -0.13323]], [[1.66013, 3.26054], [0.00031, 0.57718]]])
    torch.testing.assert_close(compute_gumbel_noise(keys, 2), expected, rtol=0, atol=2e-5)


def test_mixing_is_a_bijection_that_stays_in_32_bits():
    words = mix_bits(torch.arange(2**32 - 2**16, 2**32))
    assert words.min() >= 0
    assert words.max() < 2**32
    assert len(words.unique()) == 2**16


def test_extreme_bits_give_finite_noise(monkeypatch):
    """The ends of the range: a hash of all zeros, and one of all ones."""
    monkeypatch.setattr(sampling, "mix_bits", lambda words: words)
    noise = compute_gumbel_noise(torch.tensor([[0, 2**32 - 1], [0, 0]]), 1)[:, 0].tolist()
    expected = [-math.log(-math.log((bits + 0.5) * 2.0**-23)) for bits in (0, 2**23 - 1)]
    assert noise == pytest.approx(expected, rel=1e-5)


def test_every_bit_is_fair_for_every_seed_position_and_code(uniform):
    bits = (uniform * 2**23).long()[..., None] >> torch.arange(23) & 1
    for kept in (0, 1, 2):
        others = [axis for axis in (0, 1, 2) if axis != kept]
        count = math.prod(bits.shape[axis] for axis in others)
        z = (bits.double().mean(others) - 0.5) * 2 * math.sqrt(count)
        # The largest of many: a union bound widens the limit for up to 1024 × 23 statistics.
        assert z.abs().max() < MAX_Z + 1.5
        assert abs(z.pow(2).mean() - 1) < 6 * math.sqrt(2 / z.numel())


@pytest.mark.parametrize("kept", [0, 1, 2], ids=["seed", "position", "code"])
def test_noise_is_uniform_along_every_axis(uniform, kept):
    bins = (uniform * 16).long().movedim(kept, 0).flatten(1)
    counts = torch.nn.functional.one_hot(bins, 16).sum(1).double()
    z = compute_chi_square_z(counts, bins.shape[1] / 16)
    assert z.abs().max() < MAX_Z + 1.0
    assert abs(compute_chi_square_z(counts.sum(0), bins.numel() / 16)) < MAX_Z


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["seed", "position", "code"])
@pytest.mark.parametrize("distance", [1, 2, 8, 16])
def test_neighbors_are_independent(uniform, axis, distance):
    cells = (uniform * 8).long()
    length = cells.shape[axis] - distance
    pairs = cells.narrow(axis, 0, length) * 8 + cells.narrow(axis, distance, length)
    counts = torch.bincount(pairs.flatten(), minlength=64).double()
    assert abs(compute_chi_square_z(counts, pairs.numel() / 64)) < MAX_Z


@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (1, 2)], ids=["seed-position", "seed-code", "position-code"])
def test_swapped_coordinates_are_independent(uniform, axes):
    """A hash that adds its inputs would give (a, b) and (b, a) the same noise."""
    size = 32
    cube = uniform[:size, :size, :size]
    cells, swapped = (cube * 8).long(), (cube.transpose(*axes) * 8).long()
    off_diagonal = (torch.ones(size, size).triu(1) > 0).nonzero().T
    first = cells.movedim(axes, (0, 1))[off_diagonal[0], off_diagonal[1]]
    second = swapped.movedim(axes, (0, 1))[off_diagonal[0], off_diagonal[1]]
    counts = torch.bincount((first * 8 + second).flatten(), minlength=64).double()
    assert abs(compute_chi_square_z(counts, first.numel() / 64)) < MAX_Z


def test_high_halves_of_seeds_matter():
    noise = compute_noise([7, 7 + 2**32, 7 + 2**62], 4, 256)
    correlation = torch.corrcoef(noise.flatten(1).double()).triu(1)
    assert correlation.abs().max() < MAX_Z / math.sqrt(4 * 256)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 8, 1.0), (1.3, 0, 0.8)])
def test_sampled_frequencies_are_the_probabilities(temperature, top_k, top_p):
    num_samples = 20_000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 1.5
    weights = np.exp(filter_naively(logits.double().numpy(), temperature, top_k, top_p))
    probabilities = torch.as_tensor(weights / weights.sum())
    settings = DecodingSettings(guidance_scale=1.0, temperature=temperature, top_k=top_k, top_p=top_p)
    selector = TokenSelector(settings, 1, [], torch.device("cpu"), compute_noise_keys(torch.arange(num_samples), 1))
    tokens = selector(logits.expand(1, num_samples, 1, -1), torch.empty(num_samples, 0, dtype=torch.long), [0])[:, 0]
    counts = torch.bincount(tokens, minlength=12).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    z = compute_chi_square_z(counts[possible], num_samples * probabilities[possible])
    assert abs(z) < MAX_Z


def test_seeds_fill_63_bits():
    seeds = draw_seeds(torch.Generator().manual_seed(0), 2000)
    set_share = (seeds[:, None] >> torch.arange(63) & 1).double().mean(0)
    assert (set_share - 0.5).abs().max() < 5 * 0.5 / math.sqrt(2000)


def test_three_branches_follow_equation_3_of_instruct_pix2pix():
    both, image, nothing = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(0))
    guided = apply_guidance([both, image, nothing], 7.5, 1.5)
    torch.testing.assert_close(guided, nothing + 1.5 * (image - nothing) + 7.5 * (both - image))
    torch.testing.assert_close(apply_guidance([both, image, nothing], 7.5, 1.0), apply_guidance([both, image], 7.5, 1))
