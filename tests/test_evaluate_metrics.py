"""The module for `evaluate`, loaded from its file as a user would, without the Hub."""

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from tiny_metrics import NUM_LABELS, build_clip, build_inception, build_segmentation_model

from editar_hf.evaluation import METRIC_PATH, features, metrics
from editar_hf.evaluation.features import Network


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


def compute(name, predictions, references, **options):
    """Compute a metric as a user of `evaluate` does."""
    metric = evaluate.load(METRIC_PATH)
    return metric.compute(predictions=predictions, references=references, metric=name, **options)


def test_metrics_of_pixels_are_the_means_of_the_plain_functions(files):
    paths, tensors = files
    pair = tensors["images"], tensors["references"]
    for name, function in {"l1": "l1", "l2": "mse", "psnr": "psnr", "ssim": "ssim"}.items():
        expected = getattr(metrics, f"compute_{function}")(*pair).mean().item()
        results = compute(name, paths["images"], paths["references"])
        assert results == {name: pytest.approx(expected), "num_samples": 2}


def test_metrics_of_the_unedited_part_follow_masks_and_protocol(files):
    paths, tensors = files
    inputs = tensors["images"], tensors["references"], tensors["masks"]
    score = lambda name, protocol: compute(  # noqa: E731
        name, paths["images"], paths["references"], masks=paths["masks"], protocol=protocol
    )[name]
    assert score("ssim_unedited", "pnp-2023") == pytest.approx(metrics.compute_ssim(*inputs, border=5).mean().item())
    assert score("mse_unedited", "pnp-2023") == pytest.approx(metrics.compute_mse(*inputs).mean().item())
    expected = metrics.compute_psnr(*inputs, masked_mean=True).mean().item()
    assert score("psnr_unedited", "corrected") == pytest.approx(expected)


def test_clip_score_takes_prompts_as_references(files):
    paths, tensors = files
    model, processor = build_clip()
    network, prompts = Network(model, processor.image_processor, processor.tokenizer), ["a red barn", "two cats"]
    expected = features.compute_clip_score(network, tensors["images"], prompts).mean().item()
    results = compute("clip_whole", paths["images"], prompts, model=network)
    assert results == {"clip_whole": pytest.approx(expected, rel=1e-5), "num_samples": 2}


def test_mean_iou_is_over_the_pixels_of_all_images(files):
    paths, tensors = files
    network = Network(*build_segmentation_model())
    seen = torch.cat([features.segment(network, image) for image in tensors["images"].split(1)])
    expected = metrics.compute_mean_iou(metrics.compute_confusion_matrix(seen, tensors["labels"], NUM_LABELS))
    results = compute("mean_iou", paths["images"], paths["labels"], model=network)
    assert results == {"mean_iou": pytest.approx(expected), "num_samples": 2}


def test_fid_is_the_distance_of_the_features(files):
    paths, tensors = files
    network = Network(build_inception())
    found = [
        torch.cat([features.encode_inception(network, image) for image in tensors[name].split(1)])
        for name in ("images", "references")
    ]
    results = compute("fid", paths["images"], paths["references"], model=network)
    assert results == {"fid": pytest.approx(metrics.compute_frechet_distance(*found), rel=1e-4), "num_samples": 2}


def test_unknown_metric_is_refused(files):
    with pytest.raises(ValueError, match="`metric` is 'bleu'; choose one of 'structure_distance', "):
        compute("bleu", files[0]["images"], files[0]["references"])
