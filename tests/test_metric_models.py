"""LPIPS and FID's Inception: published files in, the figures of independent implementations out."""

from pathlib import Path

import plain_metric_models as plain
import pytest
import torch
import torchmetrics
from tiny_metrics import build_inception, build_lpips, draw_weights, save_lpips

from editar_hf.evaluation.features import load_network


# The one published file that a package brings along: the heads of LPIPS 0.1.
PUBLISHED_HEADS = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "squeeze.pth"


def draw_pair(seed=0, height=70, width=53):
    """Draw two batches of images in [−1, 1] that are alike."""
    pixels = torch.rand(3, 2, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return pixels[0], 0.7 * pixels[0] + 0.3 * pixels[1]


@torch.no_grad()
@pytest.mark.parametrize("heads", [{}, torch.load(PUBLISHED_HEADS, map_location="cpu", weights_only=True)])
def test_lpips_agrees_with_a_plain_implementation(heads, tmp_path):
    """At the published width, with drawn heads and with the published ones."""
    weights = plain.Weights()
    weights.update(heads)
    first, second = draw_pair()
    expected = plain.compute_lpips(weights, first, second)
    # The published file holds a classifier too.
    save_lpips({**weights, "classifier.1.weight": torch.zeros(10, 512, 1, 1)}, tmp_path / "lpips")
    torch.testing.assert_close(load_network("lpips", tmp_path / "lpips", "cpu").model(first, second), expected)
    assert (expected > 0.01).all()


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


@torch.no_grad()
def test_inception_agrees_with_a_plain_implementation_and_that_of_torchvision_is_refused(tmp_path):
    weights = plain.Weights()
    pixels = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = plain.compute_inception_features(weights, pixels)
    weights["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(0)
    weights["fc.weight"] = torch.zeros(1008, 2048)
    torch.save(dict(weights), tmp_path / "inception.pth")
    features = load_network("inception", tmp_path / "inception.pth", "cpu").model(pixels)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    assert expected.std() > 0.1
    torch.save({**weights, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.pth")
    with pytest.raises(ValueError, match="an Inception network of 1000 classes"):
        load_network("inception", tmp_path / "torchvision.pth")


@torch.no_grad()
def test_narrow_networks_of_seeded_weights_have_their_golden_values():
    """The values are those of an earlier implementation, which was built of modules."""
    first, second = torch.rand(2, 2, 3, 80, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert build_lpips()(first, second).tolist() == pytest.approx([0.591601074, 0.598304570], rel=1e-5)
    pixels = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = build_inception()(pixels)[0]
    assert features[:6].tolist() == pytest.approx([0, 8.396622e-4, 0, 0.46580353, 0, 1.60970891], rel=1e-4, abs=1e-6)
    assert [features.mean().item(), features.std().item()] == pytest.approx([0.25673151, 0.35100707], rel=1e-5)


def test_missing_weights_are_named(tmp_path):
    weights = draw_weights(plain.compute_lpips, 2)
    del weights["features.3.squeeze.bias"]
    save_lpips(weights, tmp_path / "lpips")
    with pytest.raises(ValueError, match=r"`lpips_model` is .*/lpips', which holds other weights: .*3/squeeze/bias"):
        load_network("lpips", tmp_path / "lpips")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}])
def test_a_file_that_holds_no_weights_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth` holds more than named tensors"):
        load_network("inception", tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"weights.pth` does not open safely"):
        load_network("inception", tmp_path / "weights.pth")
