"""LPIPS and FID's Inception: published files in, the figures of independent implementations out."""

import shutil
from pathlib import Path

import plain_metric_models as plain
import pytest
import torch
import torchmetrics
from tiny import redraw_weights
from tiny_metrics import build_inception, build_lpips

from editar_hf.evaluation.features import load_network


# The one published file that a package brings along: the heads of LPIPS 0.1.
PUBLISHED_HEADS = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "squeeze.pth"


def draw_pair(seed=0, height=70, width=53):
    """Draw two batches of pictures in [−1, 1] that are alike."""
    pixels = torch.rand(3, 2, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return pixels[0], 0.7 * pixels[0] + 0.3 * pixels[1]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The published file of SqueezeNet 1.1, with drawn weights, and those weights."""
    weights = plain.Weights()
    plain.compute_squeezenet_features(weights, torch.zeros(1, 3, 64, 64))
    classifier = {"classifier.1.weight": torch.zeros(10, 512, 1, 1), "classifier.1.bias": torch.zeros(10)}
    path = tmp_path_factory.mktemp("published") / "squeezenet.pth"
    torch.save({**weights, **classifier}, path)
    return path, weights


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """The published file of FID's Inception, with drawn weights, and those weights."""
    weights = plain.Weights()
    plain.compute_inception_features(weights, torch.zeros(1, 3, 80, 80))
    others = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    others["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(0)
    path = tmp_path_factory.mktemp("published") / "inception.pth"
    torch.save({**weights, **others}, path)
    return path, weights


# LPIPS


@torch.no_grad()
def test_lpips_agrees_with_a_plain_implementation(backbone, tmp_path):
    path, weights = backbone
    first, second = draw_pair()
    heads = plain.Weights(seed=1)
    expected = plain.compute_lpips(weights, heads, first, second)
    shutil.copy(path, tmp_path)
    torch.save(dict(heads), tmp_path / "squeeze.pth")
    torch.testing.assert_close(load_network("lpips", tmp_path, "cpu").model(first, second), expected)
    assert (expected > 0.1).all()


@torch.no_grad()
def test_published_heads_load(backbone, tmp_path):
    path, weights = backbone
    heads = torch.load(PUBLISHED_HEADS, map_location="cpu", weights_only=True)
    published = plain.Weights()
    published.update(heads)
    first, second = draw_pair(1)
    expected = plain.compute_lpips(weights, published, first, second)
    for file in (path, PUBLISHED_HEADS):
        shutil.copy(file, tmp_path)
    torch.testing.assert_close(load_network("lpips", tmp_path, "cpu").model(first, second), expected)


@torch.no_grad()
def test_lpips_weighs_every_place_alike_by_default_and_none_of_weight_zero():
    model = build_lpips()
    first, second = draw_pair(2, 32, 192)
    torch.testing.assert_close(model(first, second, torch.full((2, 1, 32, 192), 0.3)), model(first, second))
    changed = torch.where(torch.arange(192) < 160, first, second)
    left, right = torch.zeros(2, 2, 1, 32, 192)
    left[..., :32], right[..., 160:] = 1, 1
    assert (model(changed, first, left) < 1e-3 * model(changed, first)).all()
    assert (model(changed, first, right) > 3 * model(changed, first)).all()


# Inception


@torch.no_grad()
def test_inception_agrees_with_a_plain_implementation(inception):
    path, weights = inception
    pixels = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = plain.compute_inception_features(weights, pixels)
    features = load_network("inception", path, "cpu").model(pixels)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    assert expected.std() > 0.1


def test_inception_of_torchvision_is_refused(inception, tmp_path):
    path, _ = inception
    weights = torch.load(path, weights_only=True)
    weights["fc.weight"] = weights["fc.weight"][:1000]
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="an Inception of 1000 classes, but FID's has 1008"):
        load_network("inception", tmp_path / "other.pth")


# Both


@torch.no_grad()
def test_narrow_networks_of_seeded_weights_have_their_golden_values():
    """The values are also those of the plain implementations, at these widths and with these weights."""
    lpips, inception = redraw_weights(build_lpips(), 0.3), build_inception()
    for head in lpips.heads:
        head.weight.data.abs_()
    first, second = torch.rand(2, 2, 3, 80, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert lpips(first, second).tolist() == pytest.approx([0.118382618, 0.122984491], rel=1e-5)
    features = inception(torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1)[0]
    expected = [0.3009647, 0.6527016, 0.6432624, 0.0176184, 0.1511664, 0]
    assert features[:6].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert [features.mean().item(), features.std().item()] == pytest.approx([0.45990199, 0.59126973], rel=1e-5)


def test_missing_and_unknown_weights_are_named(backbone, tmp_path):
    _, weights = backbone
    others = {name: tensor for name, tensor in weights.items() if name != "features.3.squeeze.bias"}
    torch.save({**others, "features.13.weight": torch.zeros(1)}, tmp_path / "other.pth")
    shutil.copy(PUBLISHED_HEADS, tmp_path)
    with pytest.raises(ValueError, match=r'(?s)"features.3.squeeze.bias".*"features.13.weight"'):
        load_network("lpips", tmp_path)


class Code:
    """What no file of weights may hold."""

    def __reduce__(self):
        return exit, (1,)


@pytest.mark.parametrize("content", [Code(), b"no checkpoint", None, [1, 2], {"a": 1}])
def test_file_that_holds_code_or_no_weights_is_refused(content, tmp_path):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(
        ValueError,
        match=r"weights\.pth` (is not a file|does not open safely|holds something else)|no such folder or file",
    ):
        load_network("inception", path)
