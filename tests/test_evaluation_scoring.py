"""Scoring: what becomes of bad predictions, and what presets and tables promise."""

import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from evaluation_data import (
    evaluate,
    make_magicbrush_folder,
    make_picture_folder,
    make_translation_data,
)
from PIL import Image
from processes import run_ranks
from skimage import data
from tiny import draw_image
from tiny_metrics import save_models

from editar_hf.evaluation import features, metrics
from editar_hf.evaluation.benchmarks import Benchmark, Sample
from editar_hf.evaluation.features import load_network
from editar_hf.evaluation.run import generate, resolve_scoring, score
from editar_hf.evaluation.systems import build_system
from editar_hf.evaluation.table import METRICS, PROTOCOLS, Pair, make_pixels


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of the tiny models that score."""
    folder = save_models(tmp_path_factory.mktemp("models"))
    return {path.name: str(path) for path in folder.iterdir() if path.name != "editar"}


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory):
    """Four segmentation maps of 64 pixels, and the floor's predictions."""
    folder = tmp_path_factory.mktemp("segmentation")
    source = make_translation_data(folder / "source", num_samples=4, classes=(0, 3, 6, 255))
    return predict(Benchmark("segmentation", source, allow_partial=True, resolution=64), folder)


def predict(benchmark, folder):
    """Make the floor's predictions."""
    generate(benchmark, build_system("copy-source"), folder)
    return benchmark, folder / "images"


@pytest.fixture(scope="module")
def segmentation_run(segmentation, models, tmp_path_factory):
    """The folder of a run on the segmentation maps, scored by tiny models."""
    folder = tmp_path_factory.mktemp("scored")
    chosen = {name: models[name] for name in ("segmentation", "inception")}
    score(*segmentation, folder, models=chosen)
    return folder


# Bad predictions


def write_bomb(path):
    """Write a picture whose header promises 60000×60000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header)))


UNREADABLE = {
    "a folder": Path.mkdir,
    "a bomb": write_bomb,
    "a text": lambda path: path.write_text("no picture"),
}


@pytest.fixture
def pictures(tmp_path):
    """A benchmark of five pictures at 16×16 with predictions, all sound."""
    return predict(Benchmark("folder", make_picture_folder(tmp_path / "pictures", 5)), tmp_path / "made")


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_named_and_keeps_nothing_away(kind, pictures, tmp_path):
    path = pictures[1] / "00002.png"
    path.unlink()
    UNREADABLE[kind](path)
    score_again = lambda: score(*pictures, tmp_path / "run", metrics=["l1"])  # noqa: E731
    summary = score_again()
    assert [entry.partition(": ")[0] for entry in summary["problems"]["unreadable"]] == ["00002"]
    assert summary["problems"]["unreadable"][0].partition(": ")[2]
    assert summary["num_scored"] == 4
    path.rmdir() if path.is_dir() else path.unlink()
    draw_image(0).save(path)
    assert score_again()["num_scored"] == 5


def test_predictions_for_magicbrush_may_have_any_size_and_are_resized_for_differences_alone(models, tmp_path):
    folder = make_magicbrush_folder(tmp_path / "magicbrush")
    benchmark, images = predict(Benchmark("magicbrush", folder, allow_partial=True), tmp_path)
    sample = next(benchmark.read())
    chosen = {"clip": models["clip"], "dino": models["structure"]}
    small = draw_image(7, 30, 20)
    small.save(images / f"{sample.id}.png")
    summary = score(benchmark, images, tmp_path / "run", models=chosen)
    assert not any(summary["problems"].values())
    values = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])["values"]
    target = sample.target_image
    difference = (np.asarray(small.resize(target.size), float) - np.asarray(target, float)) / 255
    assert values["l1"] == pytest.approx(np.abs(difference).mean(), rel=1e-5)
    assert values["l2"] == pytest.approx(np.square(difference).mean(), rel=1e-5)
    pixels = make_pixels(small), make_pixels(target)
    dino, clip = load_network("dino", models["structure"]), load_network("clip", models["clip"])
    similarity = metrics.compute_cosine_similarity(*(features.encode_class_tokens(dino, one) for one in pixels))
    assert values["dino"] == pytest.approx(similarity.item(), rel=1e-5)
    image, truth = (features.encode_images(clip, one) for one in pixels)
    assert values["clip_i"] == pytest.approx(metrics.compute_cosine_similarity(image, truth).item(), rel=1e-5)
    prompt = features.encode_prompts(clip, [sample.target_prompt])
    assert values["clip_t"] == pytest.approx(metrics.compute_cosine_similarity(image, prompt).item(), rel=1e-4)


# Presets and tables


@pytest.fixture(scope="module")
def networks(models):
    return {name: load_network(name, models[name]) for name in ("structure", "lpips", "depth", "clip")}


# The metrics whose values differ from those of the preset `editar`.
DIFFERENT = {
    "pnp-2023": {"structure_distance", "ssim_unedited", "ssim"},
    "controlnet++": {"depth_rmse"},
    "controlar": {"depth_rmse"},
    "corrected": {"structure_distance", "psnr_unedited", "mse_unedited", "ssim_unedited", "lpips_unedited"},
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_each_preset_scores_with_the_functions_and_switches_it_names(name, networks):
    """The table of `evaluation.md` written out once more, with the functions themselves."""
    border = 5 if name == "pnp-2023" else 0
    scale, is_masked = (1, True) if name == "corrected" else (255, False)
    variant = name if name in ("controlnet++", "controlar") else "editar"
    pair = build_pair(256, PROTOCOLS[name])
    image, source, mask = pair.pixels, pair.source, pair.mask
    compared = {"mask": mask, "masked_mean": is_masked}
    switches = {"pixel_scale": scale, "antialias": name != "pnp-2023"}
    keys = (features.encode_keys(networks["structure"], one, **switches) for one in (image, source))
    depth = features.estimate_depth(networks["depth"], image, keep_size=variant == "controlar")
    expected = {
        "structure_distance": metrics.compute_structure_distance(*keys),
        "psnr_unedited": metrics.compute_psnr(image, source, **compared),
        "mse_unedited": metrics.compute_mse(image, source, **compared),
        "ssim_unedited": metrics.compute_ssim(image, source, **compared, border=border),
        "lpips_unedited": features.compute_lpips(networks["lpips"], image, source, **compared),
        "ssim": metrics.compute_ssim(image, pair.target, border=border),
        "clip_whole": features.compute_clip_score(networks["clip"], image, ["a cat"]),
        "clip_edited": features.compute_clip_score(networks["clip"], image, ["a cat"], mask),
        "depth_rmse": metrics.compute_depth_rmse(depth, source[:, :1], variant),
    }
    published, different = build_pair(256, PROTOCOLS["editar"]), set()
    for metric, value in expected.items():
        found = METRICS[metric].measure(pair, networks)
        assert found == pytest.approx(value.item(), rel=1e-6), metric
        if not math.isclose(found, METRICS[metric].measure(published, networks), rel_tol=1e-4):
            different.add(metric)
    assert different == DIFFERENT.get(name, set())


def test_headings_say_by_what_tables_multiply_and_which_way_is_better():
    for name, metric in METRICS.items():
        scale = {1: "", 1e2: "×10²", 1e3: "×10³", 1e4: "×10⁴"}[metric.factor] if name != "mean_iou" else "%"
        assert metric.heading.split()[-2 if scale else -1 :] == [scale, metric.heading[-1]][not scale :]
        is_distance = name.startswith(("structure", "lpips", "mse", "depth", "l1", "l2", "fid"))
        assert metric.heading.endswith("↓" if is_distance else "↑")


def test_magicbrush_is_judged_by_the_networks_of_its_own_evaluation(tmp_path):
    folder = make_magicbrush_folder(tmp_path / "magicbrush")
    for name in ("magicbrush", "magicbrush-multi-turn"):
        _, resolved = resolve_scoring(Benchmark(name, folder, allow_partial=True))
        assert resolved == {"clip": "openai/clip-vit-base-patch32", "dino": "facebook/dino-vits16"}


# Before any work


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrics", "edge_ms_ssim"], "must be larger than 160"),
        (["--metrics", "fid", "--inception-model", "./nowhere"], "`inception_model` is './nowhere'"),
        ([], "`inception_model` is missing; pass the file pt_inception-2015-12-05"),
        (["--metrics", "beauty"], "`metrics` is 'beauty'; choose one of"),
        (["--protocol", "mine"], "`protocol` is 'mine'; choose one of"),
        (["--metrics", "l1", "--clip-model", "c"], "`clip_model` is 'c', but none of the `metrics` needs it"),
    ],
)
def test_a_run_that_cannot_be_scored_makes_no_picture(words, message, tmp_path, capsys):
    source = make_translation_data(tmp_path / "source")
    words = ["--benchmark", "canny", "--source", source, "--allow-partial", "--resolution", 40, *words]
    assert evaluate("run", "--system", "copy-source", *words, "--output-dir", tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def build_pair(side, protocol):
    """Build a prediction that is like the truth of its sample, a photograph's, and a mask of its middle."""
    photograph = Image.fromarray(data.astronaut()).crop((0, 0, side, side))
    truth, other = photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT), draw_image(1, side, side)
    mask = Image.new("L", (side, side))
    mask.paste(255, (side // 4, side // 4, side // 2, 3 * side // 4))
    sample = Sample("0", "edit it", photograph, target_image=truth, mask=mask, target_prompt="a cat")
    return Pair(Image.blend(truth, other, 0.3), sample, protocol)


# Metrics over all predictions


def test_fid_and_mean_iou_are_the_same_to_a_byte_by_two_processes(segmentation, segmentation_run, models, tmp_path):
    (benchmark, images), folder = segmentation, tmp_path / "run"
    words = ["score", "--benchmark", "segmentation", "--source", benchmark.source, "--resolution", 64]
    words += ["--allow-partial", "--images", images, "--output-dir", folder]
    words += [word for name in ("segmentation", "inception") for word in (f"--{name}-model", models[name])]
    run_ranks(2, "-m", "editar_hf.commands", "evaluate", *words)
    assert (folder / "metrics.json").read_bytes() == (segmentation_run / "metrics.json").read_bytes()
    overall = json.loads((folder / "metrics.json").read_text())["overall"]
    assert all(overall[name]["mean"] > 0 and overall[name]["n"] == 4 for name in ("mean_iou", "fid"))
