"""Metrics: against torchmetrics, scikit-image, SciPy and sums written out, and on images whose values are known."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import sqrtm
from skimage import data
from skimage.metrics import structural_similarity
from tiny_metrics import build_inception
from torch import nn
from torchmetrics.functional.classification import multiclass_jaccard_index
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from editar_hf.condition_maps import make_canny_map
from editar_hf.evaluation.features import Network, encode_inception
from editar_hf.evaluation.metrics import (
    apply_canny,
    compute_class_iou,
    compute_clip_similarity,
    compute_confusion_matrix,
    compute_cosine_similarity,
    compute_depth_rmse,
    compute_edge_f1,
    compute_frechet_distance,
    compute_l1,
    compute_mean_iou,
    compute_ms_ssim,
    compute_mse,
    compute_psnr,
    compute_ssim,
    compute_structure_distance,
)
from editar_hf.evaluation.table import METRICS


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


def compute_plain_ms_ssim(image, reference):
    """The five scales of one pair of (3, height, width), written out from the maps of scikit-image's definition."""
    turn = torch.exp(-0.5 * (torch.arange(-5, 6).double() / 1.5).square())
    window = (turn[:, None] * turn / turn.sum() ** 2).expand(3, 1, 11, 11)
    blur = lambda maps: F.conv2d(maps[None], window, groups=3)[0]  # noqa: E731
    product = 1
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        if scale == 4:  # torchmetrics mirrors the last scale at its edges, and crops the others.
            image, reference = (F.pad(one[None], (5, 5, 5, 5), mode="reflect")[0] for one in (image, reference))
        mean, reference_mean = blur(image), blur(reference)
        variance, reference_variance = blur(image**2) - mean**2, blur(reference**2) - reference_mean**2
        covariance = blur(image * reference) - mean * reference_mean
        value = (2 * covariance + 0.03**2) / (variance + reference_variance + 0.03**2)
        if scale == 4:
            value = value * (2 * mean * reference_mean + 0.01**2) / (mean**2 + reference_mean**2 + 0.01**2)
        product *= max(value.mean().item(), 0) ** weight
        image, reference = F.avg_pool2d(image, 2), F.avg_pool2d(reference, 2)
    return product


def test_ms_ssim_is_that_of_five_scales_written_out():
    references = torch.rand(2, 3, 176, 181, generator=torch.Generator().manual_seed(0)).double()
    images = references.flip(0) * 0.4 + references * 0.6
    expected = [compute_plain_ms_ssim(*pair) for pair in zip(images, references, strict=True)]
    # torchmetrics keeps its exponents in fp32.
    assert compute_ms_ssim(images, references).tolist() == pytest.approx(expected, rel=1e-6)
    assert max(expected) < 0.95


def test_ms_ssim_of_a_negative_is_zero_and_of_the_same_is_one():
    reference = torch.rand(1, 3, 176, 176, generator=torch.Generator().manual_seed(0))
    assert compute_ms_ssim(1 - reference, reference).item() == 0
    assert compute_ms_ssim(reference, reference).item() == pytest.approx(1)


def test_pictures_smaller_than_the_window_are_refused():
    small = torch.zeros(1, 3, 175, 200)
    with pytest.raises(ValueError, match="height must be larger than 160"):
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


# Edges, depth and classes

VARIANTS = ["editar", "controlnet++", "controlar"]


def draw(*shape, seed=0):
    """Draw numbers in [0, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# Edges


def test_edges_are_those_of_the_condition_map():
    photograph = data.astronaut()[:96, 200:296]
    edges = apply_canny(torch.from_numpy(photograph).permute(2, 0, 1)[None] / 255)
    assert (edges.shape, edges.unique().tolist()) == ((1, 1, 96, 96), [0, 1])
    assert np.array_equal(edges[0, 0].numpy() * 255, np.asarray(make_canny_map(Image.fromarray(photograph)))[..., 0])


def test_edge_f1_is_the_harmonic_mean_of_precision_and_recall():
    edges, references = ((draw(4, 1, 20, 30, seed=k) < 0.3).float() for k in (0, 1))
    precision, recall = ((edges * references).flatten(1).sum(1) / one.flatten(1).sum(1) for one in (edges, references))
    expected = (2 * precision * recall / (precision + recall)).tolist()
    assert compute_edge_f1(edges, references).tolist() == pytest.approx(expected, rel=1e-6)


def test_edge_f1_is_one_for_the_same_map_and_zero_where_either_is_empty():
    edges = torch.eye(4)[None, None]
    assert compute_edge_f1(edges, edges).item() == 1
    nothing = torch.zeros_like(edges)
    assert [compute_edge_f1(*pair).item() for pair in [(edges, nothing), (nothing, nothing)]] == [0, 0]


def test_maps_that_are_not_binary_or_of_another_shape_are_refused():
    edges = torch.eye(4)[None, None]
    with pytest.raises(ValueError, match="`edges` holds other values than 0 and 1"):
        compute_edge_f1(edges * 255, edges)
    with pytest.raises(ValueError, match="`reference_edges`"):
        compute_edge_f1(edges, edges[..., 1:])


# Depth


def compute_plain_rmse(depth, label, variant, size):
    """The three published evaluations of one picture, on arrays: depth of any range, label of 0 to 255."""
    spread = ((label - label.min()) / (label.max() - label.min()) * 255).astype(np.uint8)
    spread = np.asarray(Image.fromarray(spread).resize(size[::-1], Image.NEAREST))
    if variant == "controlar":
        estimate, spread = depth * 255 / depth.max(), label
    else:
        least = depth.min() if variant == "editar" else 0
        estimate = ((depth - least) / (depth.max() - least) * 255).astype(np.uint8)
        estimate = np.asarray(Image.fromarray(estimate).resize(size[::-1], Image.BILINEAR))
    return np.sqrt(np.mean((estimate.astype(np.float64) - spread.astype(np.float64)) ** 2))


@pytest.mark.parametrize(
    ("variant", "size"),
    [("editar", (24, 20)), ("controlnet++", (24, 20)), ("controlnet++", (40, 30)), ("controlar", (24, 20))],
)
def test_depth_rmse_is_that_of_the_published_evaluation(variant, size):
    depth = 3 + 20 * draw(3, *((24, 20) if variant == "controlar" else (12, 14)), seed=2)
    steps = (30 + 200 * draw(3, 1, 24, 20, seed=3)).byte()
    expected = [
        compute_plain_rmse(one.numpy(), step[0].numpy().astype(np.float64), variant, size)
        for one, step in zip(depth, steps, strict=True)
    ]
    assert compute_depth_rmse(depth, steps / 255, variant, size).tolist() == pytest.approx(expected, rel=1e-6)


def test_variants_of_depth_rmse_differ():
    depth, labels = 3 + 20 * draw(1, 24, 20), draw(1, 1, 24, 20, seed=1)
    assert len({round(compute_depth_rmse(depth, labels, variant).item(), 3) for variant in VARIANTS}) == 3


def test_depth_that_agrees_is_no_distance_away():
    steps = torch.arange(256.0).reshape(1, 1, 16, 16)
    distances = [compute_depth_rmse(7 * steps[0], steps / 255, variant).item() for variant in VARIANTS]
    assert distances == pytest.approx([0, 0, 0], abs=1e-4)


def test_depth_of_a_flat_wall_has_no_value_where_it_must_be_spread():
    flat, labels = torch.full((2, 4, 4), 3.0), draw(2, 1, 4, 4)
    flat[1] = labels[1, 0]
    assert compute_depth_rmse(flat, labels).isnan().tolist() == [True, False]
    assert not compute_depth_rmse(flat, labels, "controlnet++").isnan().any()
    assert compute_depth_rmse(torch.zeros(1, 4, 4), labels[:1], "controlar").isnan().all()
    labels[0] = 0.5
    assert compute_depth_rmse(draw(2, 4, 4), labels).isnan().tolist() == [True, False]


def test_depth_that_cannot_be_compared_is_refused():
    depth, labels = torch.zeros(1, 4, 4), torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"`variant` is 'dpt'; choose one of editar, controlnet\+\+, controlar"):
        compute_depth_rmse(depth, labels, "dpt")
    with pytest.raises(ValueError, match=r"`depth` is \(4, 4\) and `labels` \(8, 8\) in size; .* \(8, 8\)"):
        compute_depth_rmse(depth, labels, "controlar")
    with pytest.raises(ValueError, match=r"`labels` \(1, 8, 8\)"):
        compute_depth_rmse(depth, labels[:, 0])


# Classes


@pytest.fixture(scope="module")
def predicted_and_true():
    """Two maps of six classes, of which the last is in neither; some pixels are to be left out."""
    predicted, labels = (torch.randint(5, (2, 30, 40), generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    labels[:, :10] = predicted[:, :10]
    labels[:, -5:] = 255
    return predicted, labels


def test_confusion_matrix_counts_every_pixel_that_is_not_left_out(predicted_and_true):
    expected = np.zeros((6, 6), int)
    for predicted, label in zip(*(maps.flatten().tolist() for maps in predicted_and_true), strict=True):
        if label != 255:
            expected[label, predicted] += 1
    assert np.array_equal(compute_confusion_matrix(*predicted_and_true, num_labels=6).numpy(), expected)


def test_confusion_matrices_of_pictures_add_up_to_that_of_all(predicted_and_true):
    predicted, labels = predicted_and_true
    alone = sum(compute_confusion_matrix(predicted[k : k + 1], labels[k : k + 1], 6) for k in range(2))
    assert torch.equal(alone, compute_confusion_matrix(predicted, labels, 6))


def test_iou_is_that_of_torchmetrics_and_an_absent_class_has_none(predicted_and_true):
    iou = compute_class_iou(compute_confusion_matrix(*predicted_and_true, num_labels=6))
    expected = multiclass_jaccard_index(*predicted_and_true, num_classes=6, average=None, ignore_index=255)
    assert iou[:5].tolist() == pytest.approx(expected[:5].tolist(), rel=1e-6)
    assert math.isnan(iou[5])


def test_mean_iou_is_over_the_classes_that_occur(predicted_and_true):
    matrix = compute_confusion_matrix(*predicted_and_true, num_labels=6)
    assert compute_mean_iou(matrix) == pytest.approx(compute_class_iou(matrix)[:5].mean().item())
    # 1 of 3 pixels of the first class and 2 of 4 of the second are shared.
    predicted, labels = torch.tensor([[[0, 0, 1, 1, 1]]]), torch.tensor([[[0, 1, 1, 1, 0]]])
    assert compute_mean_iou(compute_confusion_matrix(predicted, labels, 9)) == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_classes_beyond_the_last_are_refused():
    labels = torch.tensor([[[0, 6, 255]]])
    with pytest.raises(ValueError, match="`labels` go from 0 to 6; with 6 classes they go from 0 to 5"):
        compute_confusion_matrix(torch.zeros_like(labels), labels, 6)
    with pytest.raises(ValueError, match="`predicted_labels` go from 0 to 6"):
        compute_confusion_matrix(labels, torch.zeros_like(labels).masked_fill(labels == 255, 255), 6)
    with pytest.raises(ValueError, match=r"`labels` \(1, 1, 2\)"):
        compute_confusion_matrix(labels, labels[..., 1:], 6)


# Sets of images


def draw_features(num_samples, dim, seed):
    """Draw correlated features (num_samples, dim)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator).double()
    return torch.randn(num_samples, dim, generator=generator).double() @ mixing + seed


def draw_rotation(dim):
    return torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(9)).double()).Q


def test_distance_is_the_formula_with_scipys_root():
    first, second = draw_features(60, 8, 0).numpy(), draw_features(50, 8, 1).numpy()
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert compute_frechet_distance(torch.tensor(first), torch.tensor(second)) == pytest.approx(expected, rel=1e-9)


def test_distance_is_that_of_torchmetrics():
    class Flatten(nn.Module):
        """Features that are the pixels themselves."""

        num_features = 12

        def forward(self, pixels):
            return pixels.flatten(1)

    metric = FrechetInceptionDistance(feature=Flatten(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    sets = [torch.rand(40, 3, 2, 2, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    metric.update(sets[0], real=False)
    metric.update(sets[1], real=True)
    distance = compute_frechet_distance(*(pixels.flatten(1) for pixels in sets))
    assert distance == pytest.approx(metric.compute().item(), rel=1e-6)


def test_fid_is_that_of_torchmetrics_with_the_packages_inception():
    network = Network(build_inception())

    class Features(nn.Module):
        """The package's features as torchmetrics calls them."""

        num_features = 128

        def forward(self, pixels):
            return encode_inception(network, pixels)

    metric = FrechetInceptionDistance(feature=Features(), input_img_size=(3, 32, 32)).set_dtype(torch.float64)
    images, references = torch.rand(2, 6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    references = references / 2
    metric.update(images, real=False)
    metric.update(references, real=True)
    features = [[encode_inception(network, image[None]) for image in pixels] for pixels in (images, references)]
    assert METRICS["fid"].reduce(list(zip(*features, strict=True))) == pytest.approx(metric.compute().item(), rel=1e-5)
    assert metric.compute() > 1e-3


def test_distance_of_a_set_to_itself_in_any_order_is_zero():
    features = draw_features(30, 8, 0)
    assert compute_frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-9)


def test_distance_of_a_moved_set_is_the_square_of_the_way():
    features = draw_features(30, 8, 0)
    assert compute_frechet_distance(features + 2, features) == pytest.approx(8 * 2**2)


def test_distance_of_a_stretched_set_is_that_of_its_deviations():
    features = draw_features(30, 8, 0) - draw_features(30, 8, 0).mean(0)
    expected = (3 - 1) ** 2 * features.var(0).sum().item()
    assert compute_frechet_distance(3 * features, features) == pytest.approx(expected)


def test_sets_of_fewer_pictures_than_dimensions_are_no_less_exact():
    first, second = draw_features(40, 8, 0), draw_features(30, 8, 1)
    rotation = draw_rotation(100)
    padded = [torch.cat([x, torch.zeros(len(x), 92).double()], 1) @ rotation for x in (first, second)]
    expected = compute_frechet_distance(first, second)
    assert compute_frechet_distance(*padded) == pytest.approx(expected, rel=1e-10)


def test_sets_without_a_covariance_or_of_other_dimensions_are_refused():
    features = draw_features(5, 8, 0)
    with pytest.raises(ValueError, match=r"`features` has shape \(1, 8\); pass two images or more"):
        compute_frechet_distance(features[:1], features)
    with pytest.raises(ValueError, match=r"`reference_features` has shape \(5, 7\)"):
        compute_frechet_distance(features, features[:, 1:])
