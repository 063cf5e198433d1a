"""Runs: the same figures however often they were stopped and by however many processes they were made."""

import json
import math
import signal

import numpy as np
import pytest
import torch
from evaluation_data import (
    evaluate,
    make_magicbrush_folder,
    make_picture_folder,
    make_pie_folder,
    make_translation_data,
)
from PIL import Image
from processes import run_python, run_ranks
from tiny import draw_image
from tiny_metrics import save_models

from editar_hf.evaluation import features, metrics
from editar_hf.evaluation.benchmarks import BENCHMARKS, Benchmark
from editar_hf.evaluation.features import load_network
from editar_hf.evaluation.run import derive_seed, generate, score
from editar_hf.evaluation.systems import System
from editar_hf.evaluation.table import METRICS


pytestmark = pytest.mark.filterwarnings("ignore:A prompt is longer", "ignore:The center crop cuts")
NUM_SAMPLES = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tiny editor and of the tiny models that score."""
    return save_models(tmp_path_factory.mktemp("models"))


def list_run_words(models, source, output_dir):
    """List the words of a run on pairs, two samples at a time."""
    words = ["--benchmark", "folder", "--source", source, "--model", models / "editar", "--batch-size", 2]
    return ["run", *words, "--output-dir", output_dir]


@pytest.fixture(scope="module")
def pair_source(tmp_path_factory):
    return make_picture_folder(tmp_path_factory.mktemp("source") / "pairs", NUM_SAMPLES, side=32)


@pytest.fixture(scope="module")
def straight_run(models, pair_source, tmp_path_factory):
    """A run on pairs that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert evaluate(*list_run_words(models, pair_source, folder)) == 0
    return folder


def read_results(folder):
    """Read all that must not depend on how a run came about."""
    images = {path.name: path.read_bytes() for path in (folder / "images").iterdir()}
    return (
        images,
        (folder / "samples.jsonl").read_bytes(),
        (folder / "metrics.json").read_bytes(),
        (folder / "report.md").read_text().replace(folder.name, ""),
    )


def start_process(words, code):
    """Run `editar-hf evaluate` in a process of its own, after `code`."""
    code = f"{code}\nimport sys\nfrom editar_hf.commands import main\nsys.exit(main(sys.argv[1:]))"
    return run_python("-c", code, "evaluate", *words)


def test_a_run_goes_from_the_source_to_the_report(straight_run):
    metrics = json.loads((straight_run / "metrics.json").read_text())
    assert metrics["num_expected"] == metrics["num_scored"] == NUM_SAMPLES
    assert metrics["problems"] == {"missing": [], "unreadable": [], "wrong size": [], "extra": []}
    assert {"config.json", "images", "samples.jsonl", "metrics.json", "report.md", "run-sheet.png"} <= {
        path.name for path in straight_run.iterdir()
    }


def test_a_run_killed_while_it_generates_ends_as_if_it_had_not_been(models, pair_source, straight_run, tmp_path):
    folder = tmp_path / "run"
    words = list_run_words(models, pair_source, folder)
    # The fifth picture is on the disk under its temporary name when the process dies.
    code = (
        "import os, signal, pathlib; replace, count = pathlib.Path.replace, [0]\n"
        "def die(path, target):\n"
        "    count[0] += path.suffix == '.png'\n"
        "    return os.kill(os.getpid(), signal.SIGKILL) if count[0] == 5 else replace(path, target)\n"
        "pathlib.Path.replace = die"
    )
    assert start_process(words, code).returncode == -signal.SIGKILL
    done = [path for path in (folder / "images").iterdir() if not path.name.startswith(".")]
    assert len(done) == 4
    kept = done[0].stat().st_mtime_ns
    assert evaluate(*words) == 0
    assert done[0].stat().st_mtime_ns == kept
    results, expected = read_results(folder), read_results(straight_run)
    assert {name: image for name, image in results[0].items() if not name.startswith(".")} == expected[0]
    assert results[1:] == expected[1:]


def test_two_processes_make_what_one_makes(models, pair_source, straight_run, tmp_path):
    folder = tmp_path / "run"
    words = list_run_words(models, pair_source, folder)
    run_ranks(2, "-m", "editar_hf.commands", "evaluate", *words)
    assert read_results(folder) == read_results(straight_run)
    # One process goes on with what two have made, and finds no image left to make.
    times = {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}
    assert evaluate(*words) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()} == times
    assert read_results(folder) == read_results(straight_run)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", 1], "was created with seed 0, but this run uses 1"),
        (["--guidance-scale", 2], "was created with guidance_scale None, but this run uses 2.0"),
        (["--batch-size", 3], "was created with batch_size 2, but this run uses 3"),
        (["--system", "copy-source"], "was created with system 'editar', but this run uses 'copy-source'"),
    ],
)
def test_runs_of_two_configurations_are_not_mixed(more, message, models, pair_source, straight_run, capsys):
    results, words = read_results(straight_run), list_run_words(models, pair_source, straight_run)
    if "--system" in more:
        words = [word for word in words if word not in ("--model", models / "editar")]
    assert evaluate(*words, *more) == 2
    assert message in capsys.readouterr().err
    assert read_results(straight_run) == results
    # All that is compared, beside the options of the system.
    recorded = json.loads((straight_run / "config.json").read_text())["generation"]
    assert {"benchmark", "source", "num_samples", "torch", "device"} <= recorded.keys()


def test_a_run_goes_on_under_another_spelling_of_its_paths(models, pair_source, straight_run):
    results = read_results(straight_run)
    assert evaluate(*list_run_words(models / ".." / models.name, pair_source / ".." / "pairs", straight_run)) == 0
    assert read_results(straight_run) == results


def test_scoring_in_another_way_replaces_all_figures(benchmark, tmp_path):
    before = score(*benchmark, tmp_path / "run", metrics=["l1"])
    other = score(*benchmark, tmp_path / "run", "corrected", metrics=["ssim"])
    assert (other["protocol"], list(other["overall"])) == ("corrected", ["ssim"])
    assert score(*benchmark, tmp_path / "run", metrics=["l1"]) == before


def test_images_from_elsewhere_are_not_taken_for_a_runs_own(
    models, pair_source, straight_run, folder_words, benchmark, tmp_path, capsys
):
    results, (_, images) = read_results(straight_run), benchmark
    words = ["--benchmark", "folder", "--source", pair_source, "--images", images, "--output-dir", straight_run]
    assert evaluate("score", *words) == 2
    assert f"`images` is '{images}', but `output_dir` already holds other predictions" in capsys.readouterr().err
    assert read_results(straight_run) == results
    # Nor does a system make predictions where others have been scored, or lie about.
    words = [*folder_words, "--output-dir", tmp_path / "scored"]
    assert evaluate("score", *words, "--images", images, "--metrics", "l1") == 0
    assert evaluate("generate", *words, "--system", "copy-source") == 2
    assert "holds images or metrics that this command did not make" in capsys.readouterr().err
    (tmp_path / "lying" / "images").mkdir(parents=True)
    assert evaluate("generate", *words[:-1], tmp_path / "lying", "--system", "copy-source") == 2


@pytest.mark.parametrize(
    ("words", "name"),
    [(["--use-masks"], "mask"), (["--system", "vq-reconstruction", "--reconstruct", "target"], "target_image")],
)
def test_a_system_that_needs_what_samples_lack_is_refused_before_it_begins(
    words, name, models, folder_words, tmp_path, capsys
):
    words = [*folder_words, "--model", models / "editar", "--output-dir", tmp_path / "run", *words]
    assert evaluate("generate", *words) == 2
    assert f"needs the {name} of every sample, but sample 00004 has none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Seeds and batches


def test_a_samples_seed_depends_on_the_runs_seed_and_its_id_alone():
    seeds = {derive_seed(seed, name) for seed in (0, 1) for name in ("a", "b")}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Written down, so that a run of today can be gone on with tomorrow.
    assert derive_seed(0, "00000") == 6435419086474144373


class Recorder(System):
    """A system that writes down what it was asked for, and turns images over."""

    def __init__(self):
        super().__init__("recorder", lambda: self.edit)
        self.calls, self.seeds = [], {}

    def edit(self, samples, seeds):
        self.calls.append([sample.id for sample in samples])
        self.seeds |= dict(zip(self.calls[-1], seeds, strict=True))
        return [sample.source_image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for sample in samples]


def test_a_turn_is_made_from_the_picture_of_the_turn_before(tmp_path):
    folder = make_magicbrush_folder(tmp_path / "magicbrush")
    benchmark = Benchmark("magicbrush-multi-turn", folder, allow_partial=True)
    system = Recorder()
    generate(benchmark, system, tmp_path / "run", batch_size=2)
    # Both sessions go together, first their first turns, then the second turn of the one that has it.
    assert system.calls == [["30-1", "139-1"], ["30-2"]]
    assert system.seeds == {name: derive_seed(0, name) for name in benchmark.categories}
    source = np.asarray(draw_image(30, 24, 24))
    with Image.open(tmp_path / "run" / "images" / "30-2.png") as twice:
        assert np.array_equal(np.asarray(twice), source)
    summary = score(benchmark, tmp_path / "run" / "images", tmp_path / "run", metrics=["l1"])
    # The first of two turns is a step on the way.
    assert (summary["num_expected"], summary["problems"]["extra"]) == (2, [])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_system_gets_each_samples_own_seed_in_any_batch(batch_size, pair_source, tmp_path):
    benchmark, system = Benchmark("folder", pair_source), Recorder()
    generate(benchmark, system, tmp_path / "run", seed=7, batch_size=batch_size)
    assert max(map(len, system.calls)) == batch_size
    assert system.seeds == {name: derive_seed(7, name) for name in benchmark.categories}
    assert len(set(system.seeds.values())) == NUM_SAMPLES


# Predictions from anywhere


@pytest.fixture
def folder_words(tmp_path):
    """What names a benchmark of four images at 16×16."""
    return ["--benchmark", "folder", "--source", make_picture_folder(tmp_path / "pictures", 4)]


@pytest.fixture
def benchmark(folder_words, tmp_path):
    """It, with predictions that are all sound."""
    benchmark, folder = Benchmark("folder", folder_words[-1]), tmp_path / "predictions"
    folder.mkdir()
    for index, sample_id in enumerate(benchmark.categories):
        draw_image(50 + index).save(folder / f"{sample_id}.png")
    return benchmark, folder


def test_missing_broken_small_and_foreign_predictions_are_named_and_counted(folder_words, benchmark, tmp_path, capsys):
    _, folder = benchmark
    (folder / "first.png").unlink()
    (folder / "00002.png").write_bytes((folder / "00002.png").read_bytes()[:-300])
    draw_image(0, 8, 16).save(folder / "00003.png")
    draw_image(0).save(folder / "00009.png")
    words = [*folder_words, "--images", folder, "--output-dir", tmp_path / "run"]
    assert evaluate("score", *words, "--metrics", "psnr_unedited") == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["num_expected"], metrics["num_scored"]) == (4, 1)
    problems = metrics["problems"]
    assert (problems["missing"], problems["extra"]) == (["first"], ["00009.png"])
    assert problems["wrong size"] == ["00003: 8×16, not 16×16"]
    assert [entry.partition(":")[0] for entry in problems["unreadable"]] == ["00002"]
    printed = capsys.readouterr().out
    for words in ("missing: 1\n  first", "wrong size: 1\n  00003", "unreadable: 1\n  00002", "extra: 1\n  00009.png"):
        assert words in printed


def test_a_metric_counts_the_samples_that_it_is_defined_for(benchmark, tmp_path):
    benchmark, folder = benchmark
    samples = list(benchmark.read())
    samples[0].target_image.save(folder / "first.png")
    names = ["l1", "psnr", "psnr_unedited"]
    summary = score(benchmark, folder, tmp_path / "run", metrics=names)
    # The last sample has neither truth nor mask.
    assert [summary["overall"][name]["n"] for name in names] == [3, 3, 3]
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert summary == written
    assert written["overall"]["psnr"] == {"mean": "inf", "std": None, "n": 3, "factor": 1, "scaled": "inf"}
    expected = []
    for sample in samples[:3]:
        with Image.open(folder / f"{sample.id}.png") as prediction:
            error = np.abs(np.asarray(prediction, float) - np.asarray(sample.target_image, float)).mean() / 255
        expected.append(error)
    assert summary["overall"]["l1"]["mean"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert summary["overall"]["l1"]["std"] == pytest.approx(np.std(expected, ddof=1), rel=1e-5)


def test_a_folder_without_predictions_is_refused_before_anything_is_recorded(folder_words, tmp_path, capsys):
    draw_image(0).save(tmp_path / "mine.png")
    for folder, message in (
        ("nowhere", "which is not a folder"),
        (tmp_path, "holds no prediction; name each prediction <id of sample>.png"),
    ):
        assert evaluate("score", *folder_words, "--images", folder, "--output-dir", tmp_path / "run") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


# The other benchmarks, with tiny models


def test_a_pie_bench_folder_runs_from_the_source_to_the_report(models, tmp_path, capsys):
    source = make_pie_folder(tmp_path / "pie")
    words = ["--benchmark", "pie-bench", "--source", source, "--allow-partial"]
    words += ["--model", models / "editar", "--output-dir", tmp_path / "run"]
    for name in ("structure", "lpips", "clip"):
        words += [f"--{name}-model", models / name]
    assert evaluate("run", *words) == 0
    summary = json.loads((tmp_path / "run" / "metrics.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert list(summary["overall"]) == list(BENCHMARKS["pie-bench"].metrics)
    for name, figure in summary["overall"].items():
        mean = np.mean([line["values"][name] for line in lines])
        assert figure["mean"] == pytest.approx(mean), name
        assert figure["n"] == 4
    assert [summary["categories"][name]["psnr_unedited"]["n"] for name in ("random", "change object")] == [1, 1]
    page = (tmp_path / "run" / "report.md").read_text()
    assert "structure distance ×10³ ↓" in page
    assert "**4 samples, a part of the benchmark; not comparable**" in page
    assert f"clip by {models / 'clip'}" in page
    assert "| EditAR (quoted: EditAR, arXiv 2501.04699) | 39.43 | 21.32 | 117.15 | – | – | 24.87 | 21.87 |" in page
    assert "PnPInversion" not in page


def test_depth_rmse_and_fid_are_those_of_all_samples(models, tmp_path):
    source = make_translation_data(tmp_path / "depth", num_samples=4)
    benchmark = Benchmark("depth", source, allow_partial=True, resolution=32)
    generate(benchmark, Recorder(), tmp_path / "run")
    samples = list(benchmark.read())
    names = {name: str(models / name) for name in ("depth", "inception")}
    summary = score(benchmark, tmp_path / "run" / "images", tmp_path / "run", models=names)
    targets = [torch.from_numpy(np.array(sample.target_image)).permute(2, 0, 1) / 255 for sample in samples]
    maps = [torch.from_numpy(np.array(sample.source_image)).permute(2, 0, 1) / 255 for sample in samples]
    targets, maps = torch.stack(targets), torch.stack(maps)
    images = maps.flip(-1)
    inception, depth = (load_network(name, models / name) for name in ("inception", "depth"))
    fid = metrics.compute_frechet_distance(*(features.encode_inception(inception, one) for one in (images, targets)))
    assert summary["overall"]["fid"]["mean"] == pytest.approx(fid, rel=1e-3)
    assert summary["overall"]["fid"]["n"] == 4
    assert math.isnan(METRICS["fid"].reduce(["features of one sample"]))
    distances = metrics.compute_depth_rmse(features.estimate_depth(depth, images), maps[:, :1])
    assert summary["overall"]["depth_rmse"]["mean"] == pytest.approx(distances.mean().item(), rel=1e-4)


def test_mean_iou_is_that_of_all_pixels_together(models, tmp_path):
    source = make_translation_data(tmp_path / "segmentation", num_samples=2, classes=(0, 3, 6, 255))
    benchmark = Benchmark("segmentation", source, allow_partial=True, resolution=32)
    generate(benchmark, Recorder(), tmp_path / "run")
    network = load_network("segmentation", models / "segmentation")
    samples = list(benchmark.read())
    flipped = torch.stack([torch.from_numpy(np.array(one.source_image)).permute(2, 0, 1).flip(-1) for one in samples])
    labels = torch.stack([torch.from_numpy(np.array(sample.labels)).long() for sample in samples])
    matrix = metrics.compute_confusion_matrix(features.segment(network, flipped / 255), labels, 7)
    arguments = {"metrics": ["mean_iou"], "models": {"segmentation": str(models / "segmentation")}}
    summary = score(benchmark, tmp_path / "run" / "images", tmp_path / "run", **arguments)
    assert 0 < summary["overall"]["mean_iou"]["mean"] < 1
    assert summary["overall"]["mean_iou"]["mean"] == pytest.approx(metrics.compute_mean_iou(matrix))


def test_the_truth_has_exactly_the_edges_that_were_asked_for(tmp_path):
    source = make_translation_data(tmp_path / "depth")
    benchmark = Benchmark("canny", source, allow_partial=True, resolution=32)
    truth = tmp_path / "truth"
    truth.mkdir()
    for sample in benchmark.read():
        sample.target_image.save(truth / f"{sample.id}.png")
    summary = score(benchmark, truth, tmp_path / "edges", metrics=["edge_f1", "edge_psnr"])
    assert (summary["overall"]["edge_f1"]["mean"], summary["overall"]["edge_psnr"]["mean"]) == (1, "inf")
