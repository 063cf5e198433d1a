"""The feature network of the scenes: EfficientNet-Lite0 and the distance of its maps."""

import features
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file


def draw_pixels(batch=2, height=64, width=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 8, 8, generator=generator) * 2 - 1
    return F.interpolate(coarse, (height, width), mode="bilinear")


def redraw_norms(model):
    """Give every batch norm statistics of its own: fresh ones would hide a mistake in folding them."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    return model.eval()


@torch.no_grad()
def test_the_features_are_those_of_the_package(tmp_path):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(0)
    reference = redraw_norms(package.EfficientNet.from_name("efficientnet-lite0"))
    save_file(features.convert_weights(reference.state_dict()), tmp_path / "features.safetensors")
    network = features.load_features(tmp_path / "features.safetensors", strides=(2, 4, 8, 16, 32))
    pixels = draw_pixels()
    expected = reference._swish(reference._bn0(reference._conv_stem((127.5 * (pixels + 1) - 127) / 128)))
    last_blocks = {0: 0, 2: 1, 4: 2, 10: 3, 15: 4}
    maps = network(pixels)
    for index, block in enumerate(reference._blocks):
        expected = block(expected)
        if index in last_blocks:
            got = maps[last_blocks[index]]
            assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_maps_have_their_strides_and_channels():
    network = features.load_features(None, strides=(2, 4, 8, 16, 32))
    for stride, channels, feature_map in zip(network.strides, network.channels, network(draw_pixels()), strict=True):
        assert feature_map.shape == (2, channels, 64 // stride, 96 // stride)
    shallow = features.load_features(None, strides=(4,))
    assert [tuple(feature_map.shape) for feature_map in shallow(draw_pixels())] == [(2, 24, 16, 24)]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        features.load_features(tmp_path / "nothing.safetensors")


def test_the_network_is_frozen_and_gradients_reach_the_pixels():
    network = features.load_features(None)
    first, second = draw_pixels(seed=0).requires_grad_(), draw_pixels(seed=1)
    features.compute_feature_distance(network(first), network(second)).sum().backward()
    assert first.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


@torch.no_grad()
def test_a_distance_is_zero_for_equal_images_and_grows_with_noise():
    network = features.load_features(None)
    pixels = draw_pixels()
    noise = torch.randn_like(pixels)
    distances = [
        features.compute_feature_distance(network(pixels), network(pixels + scale * noise)) for scale in (0, 0.1, 0.4)
    ]
    assert torch.equal(distances[0], torch.zeros(2))
    assert (distances[1] > 0).all()
    assert (distances[2] > distances[1]).all()


def test_a_mask_limits_the_distance_to_its_positions():
    torch.manual_seed(0)
    first = [torch.randn(2, 5, 8, 8), torch.randn(2, 7, 4, 4)]
    second = [feature_map.clone() for feature_map in first]
    for feature_map in second:
        half = feature_map.shape[-1] // 2
        feature_map[..., half:] *= -1
    left = torch.zeros(1, 1, 16, 16)
    left[..., :8] = 1
    mask = torch.cat([left, 1 - left])
    # Opposite features of length 1 have the squared distance 4.
    assert torch.allclose(features.compute_feature_distance(first, second), torch.tensor([2.0, 2.0]))
    assert torch.allclose(features.compute_feature_distance(first, second, mask), torch.tensor([0.0, 4.0]))
    assert not features.compute_feature_distance(first, second, torch.zeros(2, 1, 16, 16)).any()
