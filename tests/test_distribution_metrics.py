"""The Fréchet distance: against SciPy's matrix root and torchmetrics, and on sets whose distance is known."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from tiny_metrics import build_inception
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from editar_hf.evaluation.distribution_metrics import compute_frechet_distance
from editar_hf.evaluation.measures import METRICS
from editar_hf.evaluation.scorers import InceptionScorer


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
    scorer = InceptionScorer(build_inception())

    class Features(nn.Module):
        """The package's scorer as torchmetrics calls one."""

        num_features = 128

        def forward(self, pixels):
            return scorer(pixels)

    metric = FrechetInceptionDistance(feature=Features(), input_img_size=(3, 32, 32)).set_dtype(torch.float64)
    images, references = torch.rand(2, 6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    references = references / 2
    metric.update(images, real=False)
    metric.update(references, real=True)
    names = {"features": images, "reference_features": references}
    collected = {name: [scorer(picture[None]).numpy() for picture in pixels] for name, pixels in names.items()}
    assert METRICS["fid"].reduce(**collected) == pytest.approx(metric.compute().item(), rel=1e-5)
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
    with pytest.raises(ValueError, match=r"`features` has shape \(1, 8\); give two pictures or more"):
        compute_frechet_distance(features[:1], features)
    with pytest.raises(ValueError, match=r"`reference_features` has shape \(5, 7\)"):
        compute_frechet_distance(features, features[:, 1:])
