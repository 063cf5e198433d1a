"""Metrics of edges, depth and classes: against torchmetrics and arrays of numpy, and on maps one can reckon."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torchmetrics.functional.classification import (
    binary_f1_score,
    multiclass_confusion_matrix,
    multiclass_jaccard_index,
)

from editar_hf.condition_maps import make_canny_map
from editar_hf.evaluation.map_metrics import (
    apply_canny,
    compute_class_iou,
    compute_confusion_matrix,
    compute_depth_rmse,
    compute_edge_f1,
    compute_mean_iou,
)


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


def test_edge_f1_is_that_of_torchmetrics():
    edges, references = ((draw(4, 1, 20, 30, seed=k) < 0.3).float() for k in (0, 1))
    expected = [binary_f1_score(a, b.long()).item() for a, b in zip(edges, references, strict=True)]
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


def test_confusion_matrix_is_that_of_torchmetrics(predicted_and_true):
    expected = multiclass_confusion_matrix(*predicted_and_true, num_classes=6, ignore_index=255)
    assert torch.equal(compute_confusion_matrix(*predicted_and_true, num_labels=6), expected)


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
