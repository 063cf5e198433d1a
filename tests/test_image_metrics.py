"""Metrics of pictures: against torchmetrics, scikit-image and sums written out, and on pictures one can reckon."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from skimage import data
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from editar_hf.evaluation.image_metrics import (
    compute_clip_similarity,
    compute_cosine_similarity,
    compute_l1,
    compute_ms_ssim,
    compute_mse,
    compute_psnr,
    compute_ssim,
    compute_structure_distance,
    quantize_pixels,
)
from editar_hf.evaluation.protocols import PROTOCOLS, get_protocol


PAIR_METRICS = [compute_l1, compute_mse, compute_psnr, compute_ssim]
MASKED_METRICS = [compute_mse, compute_psnr, compute_ssim]


@pytest.fixture(scope="module")
def references():
    """Three pieces of a photograph, of 60×44 pixels."""
    photograph = torch.from_numpy(data.astronaut()).permute(2, 0, 1) / 255
    return torch.stack([photograph[:, top : top + 60, 200:244] for top in (50, 150, 250)])


@pytest.fixture(scope="module")
def images(references):
    """The same, with noise that grows from picture to picture."""
    noise = torch.randn(references.shape, generator=torch.Generator().manual_seed(0))
    return (references + torch.tensor([0.01, 0.05, 0.2]).reshape(3, 1, 1, 1) * noise).clamp(0, 1)


@pytest.fixture(scope="module")
def mask():
    """Masks of a rectangle, of everything but a corner, and of scattered pixels."""
    mask = torch.zeros(3, 1, 60, 44)
    mask[0, :, 10:40, 5:30] = 1
    mask[1, :, :, 6:] = 1
    mask[2] = (torch.rand(1, 60, 44, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    return mask


# Every metric


@pytest.mark.parametrize("metric", PAIR_METRICS)
def test_picture_has_the_value_it_has_alone(metric, images, references):
    together = metric(images, references)
    alone = torch.cat([metric(images[k : k + 1], references[k : k + 1]) for k in range(3)])
    assert (together.shape, together.dtype) == ((3,), torch.float64)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("metric", PAIR_METRICS)
def test_swapping_pictures_and_references_changes_nothing(metric, images, references):
    torch.testing.assert_close(metric(images, references), metric(references, images))


@pytest.mark.parametrize("metric", MASKED_METRICS)
@pytest.mark.parametrize("masked_mean", [False, True])
def test_edited_pixels_do_not_count(metric, masked_mean, images, references, mask):
    expected = metric(images, references, mask, masked_mean)
    repainted = torch.where(mask.bool(), torch.rand_like(images), images)
    assert torch.equal(metric(repainted, references, mask, masked_mean), expected)
    assert not torch.equal(metric(repainted, references), metric(images, references))


@pytest.mark.parametrize("metric", MASKED_METRICS)
@pytest.mark.parametrize("masked_mean", [False, True])
def test_picture_edited_everywhere_has_no_value_and_the_others_keep_theirs(metric, masked_mean, images, references):
    mask = torch.zeros(3, 1, 60, 44)
    mask[1] = 1
    values = metric(images, references, mask, masked_mean)
    assert values.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(values[[0, 2]], metric(images, references)[[0, 2]])


@pytest.mark.parametrize("metric", PAIR_METRICS)
def test_pictures_of_another_size_are_refused(metric, images):
    with pytest.raises(ValueError, match=r"`references` has shape \(3, 3, 60, 43\), `images` \(3, 3, 60, 44\)"):
        metric(images, images[..., 1:])
    with pytest.raises(ValueError, match=r"`images` has shape \(3, 60, 44\)"):
        metric(images[0], images[0])


@pytest.mark.parametrize("metric", MASKED_METRICS)
def test_masks_that_do_not_fit_are_refused(metric, images, references, mask):
    with pytest.raises(ValueError, match=r"`mask` has shape \(3, 60, 44\); one channel"):
        metric(images, references, mask[:, 0])
    with pytest.raises(ValueError, match="`mask` holds other values than 0 and 1"):
        metric(images, references, mask * 255)


# Each of them


def test_l1_mse_and_psnr_are_those_of_a_picture_one_can_reckon():
    images, references = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    images[:, :, 0, 0] = 0.5  # One pixel of sixteen.
    assert compute_l1(images, references).item() == 0.5 / 16
    assert compute_mse(images, references).item() == 0.25 / 16
    assert compute_psnr(images, references).item() == pytest.approx(10 * math.log10(64))


def test_psnr_of_equal_pictures_is_infinite(images):
    assert compute_psnr(images, images).tolist() == [math.inf] * 3


def test_masked_psnr_is_that_of_torchmetrics_on_blackened_pictures(images, references, mask):
    pairs = zip(images * (1 - mask), references * (1 - mask), strict=True)
    expected = torch.stack([peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in pairs]).double()
    torch.testing.assert_close(compute_psnr(images, references, mask), expected, rtol=1e-6, atol=0)


def test_masked_mean_counts_unedited_pixels_alone(images, references, mask):
    squares = (images - references).double().square()
    expected = torch.stack([square[:, one[0] == 0].mean() for square, one in zip(squares, mask, strict=True)])
    torch.testing.assert_close(compute_mse(images, references, mask, masked_mean=True), expected)


def test_masked_ssim_is_that_of_torchmetrics_on_blackened_pictures(images, references, mask):
    blackened = (images * (1 - mask)).double(), (references * (1 - mask)).double()
    expected = structural_similarity_index_measure(*blackened, data_range=1.0, reduction="none")
    torch.testing.assert_close(compute_ssim(images, references, mask), expected, rtol=1e-9, atol=0)


def test_ssim_without_its_border_is_that_of_scikit_image(images, references):
    expected = [
        structural_similarity(
            *(one.permute(1, 2, 0).double().numpy() for one in pair),
            channel_axis=2,
            data_range=1.0,
            gaussian_weights=True,
            use_sample_covariance=False,
        )
        for pair in zip(images, references, strict=True)
    ]
    assert compute_ssim(images, references, border=5).tolist() == pytest.approx(expected, rel=1e-9)
    assert compute_ssim(images, references).tolist() != pytest.approx(expected, rel=1e-6)


def test_masked_mean_of_ssim_forgives_nothing_that_was_spared():
    images, references = torch.zeros(1, 3, 40, 40), torch.zeros(1, 3, 40, 40)
    images[..., :10] = 0.8
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., 15:] = 1
    everywhere = compute_ssim(images, references, mask).item()
    spared = compute_ssim(images, references, mask, masked_mean=True).item()
    # Similarity is 1 at the 25 of 40 columns that are edited, but for the five that see a spared one.
    assert 0 < spared < 0.35 < 0.62 < everywhere < 0.76


def test_ms_ssim_is_that_of_torchmetrics():
    references = torch.rand(2, 3, 176, 181, generator=torch.Generator().manual_seed(0)).double()
    images = references.flip(0) * 0.4 + references * 0.6
    expected = [
        multiscale_structural_similarity_index_measure(a[None], b[None], data_range=1.0).item()
        for a, b in zip(images, references, strict=True)
    ]
    # torchmetrics keeps its exponents in fp32.
    assert compute_ms_ssim(images, references).tolist() == pytest.approx(expected, rel=1e-7)
    assert max(expected) < 0.95


def test_ms_ssim_of_a_negative_is_zero_and_of_the_same_is_one():
    reference = torch.rand(1, 3, 176, 176, generator=torch.Generator().manual_seed(0))
    assert compute_ms_ssim(1 - reference, reference).item() == 0
    assert compute_ms_ssim(reference, reference).item() == pytest.approx(1)


def test_pictures_smaller_than_the_window_are_refused():
    small = torch.zeros(1, 3, 175, 200)
    with pytest.raises(ValueError, match="`images` are 200×175 pixels; a side needs at least 176"):
        compute_ms_ssim(small, small)
    with pytest.raises(ValueError, match="at least 21"):
        compute_ssim(small[..., :20], small[..., :20], border=5)


def test_similarities_of_embeddings_are_cosines():
    embeds, others = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([[30.0, 40], [0, 2], [-5, 0]])
    assert compute_cosine_similarity(embeds, others).tolist() == pytest.approx([1, 0, -1])
    assert compute_clip_similarity(embeds, others).tolist() == pytest.approx([100, 0, 0])


def test_structure_distance_is_the_sum_written_out():
    first, second = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(0)).double().numpy()

    def cosine(a, b):
        return (a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))

    expected = [
        np.mean([(cosine(x[i], x[j]) - cosine(y[i], y[j])) ** 2 for i in range(5) for j in range(5)])
        for x, y in zip(first, second, strict=True)
    ]
    assert compute_structure_distance(torch.tensor(first), torch.tensor(second)).tolist() == pytest.approx(expected)


def test_structure_distance_sees_neither_scale_nor_rotation_of_keys():
    keys = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double()).Q
    assert compute_structure_distance(3 * keys @ rotation, keys).item() == pytest.approx(0, abs=1e-20)


def test_steps_of_a_file_are_the_nearest_or_the_one_below():
    pixels = torch.tensor([0.0, 1.9, 2.0, 2.5001, 254.9]) / 255
    assert (quantize_pixels(pixels, "truncate") * 255).round().tolist() == [0, 1, 2, 2, 254]
    assert (quantize_pixels(pixels, "round") * 255).round().tolist() == [0, 2, 2, 3, 255]
    steps = torch.arange(256) / 255
    assert all(torch.equal(quantize_pixels(steps, mode), steps) for mode in ("round", "truncate"))
    with pytest.raises(ValueError, match="`mode` is 'up'"):
        quantize_pixels(pixels, "up")


# Protocols


def test_protocols_have_the_switches_of_the_published_evaluations():
    switches = {
        name: [value for field, value in asdict(protocol).items() if field not in ("name", "description")]
        for name, protocol in PROTOCOLS.items()
    }
    assert switches == {
        "editar": [True, 0, False, 255, True, "editar"],
        "pnp-2023": [True, 5, False, 255, False, "editar"],
        "controlnet++": [True, 0, False, 255, True, "controlnet++"],
        "controlar": [True, 0, False, 255, True, "controlar"],
        "corrected": [False, 0, True, 1, True, "editar"],
    }
    assert get_protocol("editar") is PROTOCOLS["editar"]


def test_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match=r"`protocol` is 'pnp'; choose one of editar, pnp-2023, controlnet\+\+, "):
        get_protocol("pnp")
