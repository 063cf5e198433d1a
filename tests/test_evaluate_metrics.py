"""The metrics for `evaluate`, loaded from their files as a user would, without a network."""

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from tiny_metrics import (
    build_clip,
    build_depth_model,
    build_dino,
    build_inception,
    build_lpips,
    build_segmentation_model,
)

from editar_hf.evaluation import image_metrics, map_metrics, scorers
from editar_hf.evaluation.distribution_metrics import compute_frechet_distance
from editar_hf.evaluation.metrics import find_metric


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two pictures, two references, two masks and two label maps, 64×64, and the tensors they hold."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    photograph = data.astronaut()
    paths, tensors = {}, {}
    for name in ("images", "references", "masks", "labels"):
        arrays = []
        for k in range(2):
            if name == "masks":
                array = np.zeros((64, 64), np.uint8)
                array[10:40, 10 : 30 + 10 * k] = 255
            elif name == "labels":
                array = generator.integers(7, size=(64, 64), dtype=np.uint8)
            else:
                left = {"images": 200, "references": 203}[name]
                array = photograph[20 + 90 * k :][:64, left : left + 64]
            Image.fromarray(array).save(folder / f"{name}-{k}.png")
            arrays.append(array)
        paths[name] = [str(folder / f"{name}-{k}.png") for k in range(2)]
        stacked = torch.from_numpy(np.stack(arrays))
        tensors[name] = stacked if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2) / 255
    tensors["masks"] = tensors["masks"][:, None] / 255
    return paths, tensors


def compute(name, predictions, references, **kwargs):
    return evaluate.load(find_metric(name)).compute(predictions=predictions, references=references, **kwargs)


def test_image_fidelity_is_the_mean_of_the_plain_functions(files):
    paths, tensors = files
    pair = tensors["images"], tensors["references"]
    results = compute("image_fidelity", paths["images"], paths["references"])
    for name in ("l1", "mse", "psnr", "ssim"):
        assert results.pop(name) == pytest.approx(getattr(image_metrics, f"compute_{name}")(*pair).mean().item())
    assert results == {"num_samples": 2}


def test_image_fidelity_follows_masks_and_protocol(files):
    paths, tensors = files
    inputs = tensors["images"], tensors["references"], tensors["masks"]
    kwargs = {"masks": paths["masks"]}
    results = compute("image_fidelity", paths["images"], paths["references"], protocol="pnp-2023", **kwargs)
    assert results["ssim"] == pytest.approx(image_metrics.compute_ssim(*inputs, border=5).mean().item())
    assert results["mse"] == pytest.approx(image_metrics.compute_mse(*inputs).mean().item())
    results = compute("image_fidelity", paths["images"], paths["references"], protocol="corrected", **kwargs)
    assert results["psnr"] == pytest.approx(image_metrics.compute_psnr(*inputs, masked_mean=True).mean().item())


def test_edge_f1_is_the_mean_of_the_plain_function(files):
    paths, tensors = files
    # One picture at a time, as the metric looks at them: in a batch, rounding may move an edge.
    edges = [torch.cat([*map(map_metrics.apply_canny, tensors[name].split(1))]) for name in ("images", "references")]
    expected = {"edge_f1": pytest.approx(map_metrics.compute_edge_f1(*edges).mean().item()), "num_samples": 2}
    assert compute("edge_f1", paths["images"], paths["references"]) == expected


@pytest.mark.parametrize(
    ("name", "scorer", "build"),
    [
        ("lpips", scorers.LPIPSScorer, build_lpips),
        ("structure_distance", scorers.StructureScorer, build_dino),
    ],
)
def test_metric_of_pairs_is_the_mean_of_its_scorer(name, scorer, build, files):
    paths, tensors = files
    expected = scorer(build())(tensors["images"], tensors["references"]).mean().item()
    results = compute(name, paths["images"], paths["references"], model=build())
    assert results == {name: pytest.approx(expected, rel=1e-5), "num_samples": 2}


def test_clip_score_is_the_mean_of_its_scorer(files):
    paths, tensors = files
    model, processor = build_clip()
    prompts = ["a red barn", "two cats"]
    expected = scorers.CLIPScorer(model, processor=processor)(tensors["images"], prompts).mean().item()
    results = compute("clip_score", paths["images"], prompts, model=model, processor=processor)
    assert results == {"clip_score": pytest.approx(expected, rel=1e-5), "num_samples": 2}


def test_depth_rmse_is_the_mean_of_its_scorer(files):
    paths, tensors = files
    model, processor = build_depth_model()
    labels = tensors["labels"][:, None] / 255
    for variant in ("editar", "controlnet++"):
        kwargs = {"processor": processor, "variant": variant}
        expected = scorers.DepthScorer(model, **kwargs)(tensors["images"], labels).mean().item()
        results = compute("depth_rmse", paths["images"], paths["labels"], model=model, **kwargs)
        assert results == {"depth_rmse": pytest.approx(expected, rel=1e-4), "num_samples": 2}


def test_mean_iou_is_over_the_pixels_of_all_pictures(files):
    paths, tensors = files
    model, processor = build_segmentation_model()
    scorer = scorers.SegmentationScorer(model, processor=processor)
    matrix = sum(map(scorer, tensors["images"].split(1), tensors["labels"].split(1)))
    results = compute("mean_iou", paths["images"], paths["labels"], model=model, processor=processor)
    assert results == {"mean_iou": map_metrics.compute_mean_iou(matrix), "num_samples": 2}


def test_fid_is_the_distance_of_the_features(files):
    paths, tensors = files
    scorer = scorers.InceptionScorer(build_inception())
    features = [torch.cat([*map(scorer, tensors[name].split(1))]) for name in ("images", "references")]
    expected = compute_frechet_distance(*features)
    results = compute("fid", paths["images"], paths["references"], model=build_inception())
    assert results == {"fid": pytest.approx(expected, rel=1e-4), "num_samples": 2}


def test_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="`name` is 'bleu'; choose one of clip_score, depth_rmse, edge_f1, fid"):
        find_metric("bleu")
