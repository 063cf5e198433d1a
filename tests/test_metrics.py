"""Metrics: against torchmetrics, scikit-image, SciPy and sums written out, and on images whose values are known."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from skimage import data
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from tiny_metrics import build_inception
from torch import nn
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance

from editar_hf.condition_maps import make_canny_map
from editar_hf.evaluation import metrics
from editar_hf.evaluation.features import Network, encode_inception
from editar_hf.evaluation.table import METRICS


MASKED_METRICS = [metrics.compute_mse, metrics.compute_psnr, metrics.compute_ssim]


def draw(*shape, seed=0):
    """Draw numbers in [0, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def references():
    """Three pieces of a photograph, of 60×44 pixels."""
    photograph = torch.from_numpy(data.astronaut()).permute(2, 0, 1) / 255
    return torch.stack([photograph[:, top : top + 60, 200:244] for top in (50, 150, 250)])


@pytest.fixture(scope="module")
def images(references):
    """The same, with noise that grows from image to image."""
    noise = torch.randn(references.shape, generator=torch.Generator().manual_seed(0))
    return (references + torch.tensor([0.01, 0.05, 0.2]).reshape(3, 1, 1, 1) * noise).clamp(0, 1)


@pytest.fixture(scope="module")
def mask():
    """Masks of a rectangle, of everything but a corner, and of scattered pixels."""
    mask = torch.zeros(3, 1, 60, 44)
    mask[0, :, 10:40, 5:30] = 1
    mask[1, :, :, 6:] = 1
    mask[2] = (draw(1, 60, 44, seed=1) < 0.3).float()
    return mask


# Pixels


def compute_torchmetrics_ssim(*arrays):
    return structural_similarity_index_measure(*(torch.tensor(array)[None] for array in arrays), data_range=1.0)


GAUSSIAN = {"channel_axis": 0, "gaussian_weights": True, "use_sample_covariance": False}


@pytest.mark.parametrize(
    ("metric", "oracle"),
    [
        (metrics.compute_mse, mean_squared_error),
        (metrics.compute_psnr, partial(peak_signal_noise_ratio, data_range=1.0)),
        (metrics.compute_ssim, compute_torchmetrics_ssim),
        (partial(metrics.compute_ssim, border=5), partial(structural_similarity, data_range=1.0, **GAUSSIAN)),
    ],
)
def test_each_image_has_the_value_of_another_library_with_edited_pixels_black(metric, oracle, images, references, mask):
    whole = metric(images, references), torch.ones_like(mask)
    for values, unedited in (whole, (metric(images, references, mask), 1 - mask)):
        pairs = zip(*((pixels * unedited).double().numpy() for pixels in (images, references)), strict=True)
        assert values.tolist() == pytest.approx([float(oracle(*pair)) for pair in pairs], rel=1e-7)
        assert values.dtype == torch.float64


@pytest.mark.parametrize("metric", MASKED_METRICS)
@pytest.mark.parametrize("masked_mean", [False, True])
def test_edited_pixels_do_not_count_and_an_image_edited_everywhere_has_no_value(
    metric, masked_mean, images, references, mask
):
    mask = torch.cat([mask[:2], torch.ones_like(mask[2:])])
    values = metric(images, references, mask, masked_mean)
    assert values.isnan().tolist() == [False, False, True]
    repainted = torch.where(mask.bool(), draw(*images.shape), images)
    assert torch.equal(metric(repainted, references, mask, masked_mean)[:2], values[:2])
    assert not torch.equal(metric(repainted, references)[:2], metric(images, references)[:2])


def test_masked_mean_counts_unedited_pixels_alone(images, references, mask):
    expected = {"mse": [], "ssim": []}
    arrays = ((pixels * (1 - mask)).double().numpy() for pixels in (images, references))
    for image, reference, edited in zip(*arrays, mask[:, 0].numpy() == 1, strict=True):
        expected["mse"].append(np.square(image - reference)[:, ~edited].mean())
        _, similarity = structural_similarity(image, reference, data_range=1.0, full=True, **GAUSSIAN)
        expected["ssim"].append(similarity[:, 5:-5, 5:-5][:, ~edited[5:-5, 5:-5]].mean())
    values = metrics.compute_ssim(images, references, mask, masked_mean=True, border=5)
    assert values.tolist() == pytest.approx(expected["ssim"], rel=1e-7)
    assert metrics.compute_mse(images, references, mask, True).tolist() == pytest.approx(expected["mse"], rel=1e-7)


def test_l1_mse_and_psnr_of_an_image_one_can_reckon():
    images, references = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    images[:, :, 0, 0] = 0.5  # One pixel of sixteen.
    assert metrics.compute_l1(images, references).item() == 0.5 / 16
    assert metrics.compute_mse(images, references).item() == 0.25 / 16
    assert metrics.compute_psnr(images, references).item() == pytest.approx(10 * math.log10(64))
    assert metrics.compute_psnr(images, images).item() == math.inf


@pytest.mark.parametrize("metric", MASKED_METRICS)
def test_images_and_masks_that_do_not_fit_are_refused(metric, images, references, mask):
    with pytest.raises(ValueError, match=r"`references` \(3, 3, 60, 43\)"):
        metric(images, images[..., 1:])
    with pytest.raises(ValueError, match=r"`images` has shape \(3, 60, 44\)"):
        metric(images[0], images[0])
    with pytest.raises(ValueError, match=r"`mask` has shape \(3, 60, 44\).* needs shape \(3, 1, 60, 44\)"):
        metric(images, references, mask[:, 0])
    with pytest.raises(ValueError, match=r"`mask` .* values in \[0.0, 255.0\]"):
        metric(images, references, mask * 255)


def test_ms_ssim_is_that_of_torchmetrics_for_each_image():
    references = draw(2, 3, 176, 181).double()
    images = references.flip(0) * 0.4 + references * 0.6
    metric = MultiScaleStructuralSimilarityIndexMeasure(data_range=1.0)
    expected = [
        metric(image[None], reference[None]).item() for image, reference in zip(images, references, strict=True)
    ]
    assert metrics.compute_ms_ssim(images, references).tolist() == pytest.approx(expected, rel=1e-6)
    assert max(expected) < 0.95
    assert metrics.compute_ms_ssim(1 - references, references).tolist() == [0, 0]


# Embeddings


def test_similarities_of_embeddings_are_cosines():
    embeds, others = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([[30.0, 40], [0, 2], [-5, 0]])
    assert metrics.compute_cosine_similarity(embeds, others).tolist() == pytest.approx([1, 0, -1])


def test_structure_distance_is_the_sum_written_out():
    first, second = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(0)).double().numpy()

    def cosine(a, b):
        return (a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))

    expected = [
        np.mean([(cosine(x[i], x[j]) - cosine(y[i], y[j])) ** 2 for i in range(5) for j in range(5)])
        for x, y in zip(first, second, strict=True)
    ]
    assert metrics.compute_structure_distance(torch.tensor(first), torch.tensor(second)).tolist() == pytest.approx(
        expected
    )


# Edges


def test_edges_are_those_of_the_condition_map():
    photograph = data.astronaut()[:96, 200:296]
    edges = metrics.apply_canny(torch.from_numpy(photograph).permute(2, 0, 1)[None] / 255)
    assert (edges.shape, edges.unique().tolist()) == ((1, 1, 96, 96), [0, 1])
    assert np.array_equal(edges[0, 0].numpy() * 255, np.asarray(make_canny_map(Image.fromarray(photograph)))[..., 0])


def test_edge_f1_is_the_harmonic_mean_of_precision_and_recall():
    edges, references = ((draw(4, 1, 20, 30, seed=k) < 0.3).float() for k in (0, 1))
    precision, recall = ((edges * references).flatten(1).sum(1) / one.flatten(1).sum(1) for one in (edges, references))
    expected = (2 * precision * recall / (precision + recall)).tolist()
    assert metrics.compute_edge_f1(edges, references).tolist() == pytest.approx(expected, rel=1e-6)
    nothing = torch.zeros_like(edges)
    for pair in ((edges, nothing), (nothing, nothing)):
        assert metrics.compute_edge_f1(*pair).tolist() == [0] * 4
    soft = 0.1 + 0.8 * edges
    assert metrics.compute_edge_f1(soft, references).tolist() == pytest.approx(expected, rel=1e-6)


# Depth


def compute_plain_rmse(depth, label, variant):
    """The three published evaluations of one image, on arrays: depth of any range, label of 0 to 255."""
    spread = ((label - label.min()) / (label.max() - label.min()) * 255).astype(np.uint8)
    if variant == "controlar":
        estimate, spread = depth * 255 / depth.max(), label
    else:
        least = depth.min() if variant == "editar" else 0
        estimate = ((depth - least) / (depth.max() - least) * 255).astype(np.uint8)
        estimate = np.asarray(Image.fromarray(estimate).resize(label.shape[::-1], Image.BILINEAR))
    return np.sqrt(np.mean((estimate.astype(np.float64) - spread.astype(np.float64)) ** 2))


@pytest.mark.parametrize(
    ("variant", "size"),
    [("editar", (12, 14)), ("controlnet++", (12, 14)), ("controlnet++", (40, 30)), ("controlar", (24, 20))],
)
def test_depth_rmse_is_that_of_the_published_evaluation(variant, size):
    depth, steps = 3 + 20 * draw(3, *size, seed=2), (30 + 200 * draw(3, 1, 24, 20, seed=3)).byte()
    pairs = zip(depth.numpy(), steps[:, 0].double().numpy(), strict=True)
    expected = [compute_plain_rmse(*pair, variant) for pair in pairs]
    assert metrics.compute_depth_rmse(depth, steps / 255, variant).tolist() == pytest.approx(expected, rel=1e-6)


def test_variants_of_depth_rmse_differ_but_none_sees_a_distance_where_depth_agrees():
    depth, labels = 3 + 20 * draw(1, 24, 20), draw(1, 1, 24, 20, seed=1)
    assert (
        len({round(metrics.compute_depth_rmse(depth, labels, variant).item(), 3) for variant in metrics.DEPTH_VARIANTS})
        == 3
    )
    steps = torch.arange(256.0).reshape(1, 1, 16, 16)
    for variant in metrics.DEPTH_VARIANTS:
        assert metrics.compute_depth_rmse(7 * steps[0], steps / 255, variant).item() == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="`variant` is 'dpt'"):
        metrics.compute_depth_rmse(depth, labels, "dpt")


def test_depth_of_a_flat_wall_has_no_value_where_it_must_be_spread():
    flat, labels = torch.full((2, 4, 4), 3.0), draw(2, 1, 4, 4)
    flat[1] = labels[1, 0]
    assert metrics.compute_depth_rmse(flat, labels).isnan().tolist() == [True, False]
    assert not metrics.compute_depth_rmse(flat, labels, "controlnet++").isnan().any()
    assert metrics.compute_depth_rmse(torch.zeros(1, 4, 4), labels[:1], "controlar").isnan().all()
    labels[0] = 0.5
    assert metrics.compute_depth_rmse(draw(2, 4, 4), labels).isnan().tolist() == [True, False]


# Classes


@pytest.fixture(scope="module")
def predicted_and_true():
    """Two maps of six classes, of which the last is in neither; some pixels are to be left out."""
    predicted, labels = (torch.randint(5, (2, 30, 40), generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    labels[:, :10] = predicted[:, :10]
    labels[:, -5:] = 255
    return predicted, labels


def test_confusion_matrix_and_iou_are_those_of_torchmetrics(predicted_and_true):
    matrix = metrics.compute_confusion_matrix(*predicted_and_true, num_labels=6)
    assert torch.equal(matrix, multiclass_confusion_matrix(*predicted_and_true, num_classes=6, ignore_index=255))
    assert torch.equal(matrix, metrics.compute_confusion_matrix(*(maps.byte() for maps in predicted_and_true), 6))
    iou = metrics.compute_class_iou(matrix)
    expected = multiclass_jaccard_index(*predicted_and_true, num_classes=6, average=None, ignore_index=255)
    assert iou[:5].tolist() == pytest.approx(expected[:5].tolist(), rel=1e-6)
    assert math.isnan(iou[5]), "a class that does not occur has none"
    assert metrics.compute_mean_iou(matrix) == pytest.approx(iou[:5].mean().item())


def test_mean_iou_of_maps_one_can_reckon():
    # 1 of 3 pixels of the first class and 2 of 4 of the second are shared.
    predicted, labels = torch.tensor([[[0, 0, 1, 1, 1]]]), torch.tensor([[[0, 1, 1, 1, 0]]])
    assert metrics.compute_mean_iou(metrics.compute_confusion_matrix(predicted, labels, 9)) == pytest.approx(
        (1 / 3 + 2 / 4) / 2
    )


def test_classes_beyond_the_last_are_refused():
    labels = torch.tensor([[[0, 6, 255]]])
    for maps in ((torch.zeros_like(labels), labels), (labels, labels.clamp(max=5))):
        with pytest.raises(ValueError, match=r"go from 0 to .*; with 6 classes they must be 0 to 5"):
            metrics.compute_confusion_matrix(*maps, num_labels=6)


# Sets of images


def draw_features(num_samples, dim, seed):
    """Draw correlated features (num_samples, dim)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator).double()
    return torch.randn(num_samples, dim, generator=generator).double() @ mixing + seed


def test_distance_is_the_formula_with_scipys_root():
    first, second = draw_features(60, 8, 0).numpy(), draw_features(50, 8, 1).numpy()
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert metrics.compute_frechet_distance(torch.tensor(first), torch.tensor(second)) == pytest.approx(
        expected, rel=1e-9
    )


def test_fid_is_that_of_torchmetrics_with_the_packages_inception():
    network = Network(build_inception())

    class Features(nn.Module):
        """The package's features as torchmetrics calls them."""

        num_features = 128

        def forward(self, pixels):
            return encode_inception(network, pixels)

    metric = FrechetInceptionDistance(feature=Features(), input_img_size=(3, 32, 32)).set_dtype(torch.float64)
    images, references = draw(2, 6, 3, 32, 32)
    references = references / 2
    metric.update(images, real=False)
    metric.update(references, real=True)
    features = [[encode_inception(network, image[None]) for image in pixels] for pixels in (images, references)]
    assert METRICS["fid"].reduce(list(zip(*features, strict=True))) == pytest.approx(metric.compute().item(), rel=1e-5)
    assert metric.compute() > 1e-3


def test_distances_of_sets_one_can_reckon():
    features = draw_features(30, 8, 0)
    features -= features.mean(0)
    assert metrics.compute_frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-9)
    assert metrics.compute_frechet_distance(features + 2, features) == pytest.approx(8 * 2**2)
    stretched = (3 - 1) ** 2 * features.var(0).sum().item()
    assert metrics.compute_frechet_distance(3 * features, features) == pytest.approx(stretched)
    with pytest.raises(ValueError, match="fewer than two images"):
        metrics.compute_frechet_distance(features[:1], features)


def test_sets_of_fewer_images_than_dimensions_are_no_less_exact():
    first, second = draw_features(40, 8, 0), draw_features(30, 8, 1)
    rotation = torch.linalg.qr(torch.randn(100, 100, generator=torch.Generator().manual_seed(9)).double()).Q
    padded = [torch.cat([x, torch.zeros(len(x), 92).double()], 1) @ rotation for x in (first, second)]
    expected = metrics.compute_frechet_distance(first, second)
    assert metrics.compute_frechet_distance(*padded) == pytest.approx(expected, rel=1e-10)
