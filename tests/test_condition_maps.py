"""Condition maps from photographs: against kornia, against the models' own outputs, and on pictures one can reckon."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kornia.filters import canny
from PIL import Image, ImageDraw
from skimage import data
from tiny import redraw_weights
from tiny_metrics import build_depth_model
from transformers import (
    BeitConfig,
    BeitImageProcessorPil,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ZoeDepthConfig,
    ZoeDepthForDepthEstimation,
    ZoeDepthImageProcessorPil,
)

from editar_hf.condition_maps import compute_palette, make_canny_map, make_depth_map, make_segmentation_map


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(data.astronaut()).resize((96, 64))


@pytest.fixture(scope="module")
def depth_model():
    return build_depth_model(patch_size=8)


@pytest.fixture(scope="module")
def segmentation_model():
    config = SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=8
    )
    config.num_labels = 7
    model = redraw_weights(SegformerForSemanticSegmentation(config), scale=0.5)
    # Older versions of transformers need torchvision for Segformer's own image processor.
    return model, BeitImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)


def build_zoedepth():
    stages = [f"stage{stage}" for stage in range(1, 5)]
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    config = ZoeDepthConfig(
        backbone_config=BeitConfig(image_size=64, out_features=stages, reshape_hidden_states=False, **sizes),
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        bottleneck_features=8,
        num_relative_features=4,
        num_attractors=[2, 2, 2, 1],
        bin_embedding_dim=8,
        bin_configurations=[{"name": "nyu", "n_bins": 4, "min_depth": 0.001, "max_depth": 10.0}],
    )
    return ZoeDepthForDepthEstimation(config), ZoeDepthImageProcessorPil(size={"height": 64, "width": 64})


def test_edges_are_kornias_at_the_published_thresholds(photograph):
    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None] / 255
    expected = canny(pixels, 0.1, 0.2)[1][0, 0].numpy() * 255
    edges = np.asarray(make_canny_map(photograph))
    assert edges.shape == (64, 96, 3)
    assert all(np.array_equal(edges[..., channel], expected) for channel in range(3))
    assert 0.02 < (expected == 255).mean() < 0.5


def test_edges_of_a_square_are_its_outline_alone():
    image = Image.new("RGB", (40, 40), "black")
    ImageDraw.Draw(image).rectangle((10, 10, 29, 29), fill="white")
    rows, columns = np.nonzero(np.asarray(make_canny_map(image))[..., 0])
    distances = np.maximum(np.abs(rows - 19.5), np.abs(columns - 19.5))
    assert ((distances > 8) & (distances < 12)).all()
    assert len(rows) > 60


def test_transparency_is_white_for_the_detector_too():
    assert not np.asarray(make_canny_map(Image.new("RGBA", (16, 16), (0, 0, 0, 0)))).any()


@torch.no_grad()
def test_depth_runs_from_the_farthest_black_to_the_nearest_white(photograph, depth_model):
    model, processor = depth_model
    depth = model(**processor(images=photograph, return_tensors="pt")).predicted_depth
    # transformers resizes depth by bicubic interpolation.
    depth = F.interpolate(depth[None], (64, 96), mode="bicubic", align_corners=False)[0, 0]
    expected = ((depth - depth.min()) / (depth.max() - depth.min()) * 255).numpy()
    gray = np.asarray(make_depth_map(photograph, model, processor)).astype(float)
    assert gray.shape == (64, 96, 3)
    assert np.abs(gray - expected[..., None]).max() <= 0.51
    assert (gray.min(), gray.max()) == (0, 255)
    distance = np.asarray(make_depth_map(photograph, model, processor, is_distance=True)).astype(float)
    assert np.abs(gray + distance - 255).max() <= 1


@torch.no_grad()
def test_the_padding_that_zoedepth_adds_is_cut_off_again(photograph):
    torch.manual_seed(0)
    model, processor = build_zoedepth()
    depth = model.eval()(**processor(images=photograph, return_tensors="pt")).predicted_depth
    # What the processor pads, before it resizes, is what there is to cut.
    padded = processor(images=photograph, do_resize=False, return_tensors="pt").pixel_values.shape[2:]
    top, left = (padded[0] - 64) // 2, (padded[1] - 96) // 2
    assert min(top, left) > 10
    depth = F.interpolate(depth[None], padded, mode="bicubic", align_corners=False)[0, 0, top:-top, left:-left]
    expected = ((depth.max() - depth) / (depth.max() - depth.min()) * 255).numpy()
    gray = np.asarray(make_depth_map(photograph, model, processor, is_distance=True)).astype(float)
    assert np.abs(gray - expected[..., None]).max() <= 0.51


@torch.no_grad()
def test_every_pixel_has_the_color_of_its_likeliest_class(photograph, segmentation_model):
    model, processor = segmentation_model
    logits = model(**processor(images=photograph, return_tensors="pt")).logits
    labels = F.interpolate(logits, (64, 96), mode="bilinear", align_corners=False)[0].argmax(0).numpy()
    assert len(np.unique(labels)) > 1
    palette = np.arange(21).reshape(7, 3) * 10
    colored = np.asarray(make_segmentation_map(photograph, model, processor, palette))
    assert np.array_equal(colored, palette[labels])
    default = np.asarray(make_segmentation_map(photograph, model, processor))
    assert np.array_equal(default, compute_palette(7)[labels])


def test_palette_is_that_of_pascal_voc():
    expected = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)]
    assert compute_palette(7).tolist() == list(map(list, expected))
    assert compute_palette(256)[[8, 20, 255]].tolist() == [[64, 0, 0], [0, 64, 128], [224, 224, 192]]
    assert len({tuple(color) for color in compute_palette(256).tolist()}) == 256


def test_edges_without_kornia_name_the_extra(photograph, monkeypatch):
    for name in ("kornia", "kornia.filters"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[maps\]'"):
        make_canny_map(photograph)


def test_thresholds_out_of_order_and_a_palette_of_another_shape_are_refused(photograph, segmentation_model):
    with pytest.raises(ValueError, match=r"`low_threshold` is 0\.3 and `high_threshold` is 0\.2"):
        make_canny_map(photograph, 0.3, 0.2)
    with pytest.raises(ValueError, match=r"`palette` has shape \(6, 3\); the model has 7 classes"):
        make_segmentation_map(photograph, *segmentation_model, palette=np.zeros((6, 3)))
