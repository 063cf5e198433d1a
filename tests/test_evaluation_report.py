"""Reports: tables that say what they are, plots, and contact sheets."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from evaluation_data import evaluate, make_magicbrush_folder, make_picture_folder
from pages import ROOT
from PIL import Image
from tiny import draw_image
from tiny_metrics import build_dino

from editar_hf.evaluation import report
from editar_hf.evaluation.benchmarks import BENCHMARKS, Benchmark
from editar_hf.evaluation.run import decode_number, encode_number, generate, score
from editar_hf.evaluation.systems import System
from editar_hf.evaluation.table import METRICS, PROTOCOLS


def brighten(guidance_scale):
    """A system that makes images brighter by its guidance scale."""

    def edit(samples, seeds):
        return [sample.source_image.point(lambda value: value + 8 * guidance_scale) for sample in samples]

    return System("brightener", lambda: edit, {"guidance_scale": guidance_scale})


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    return Benchmark("folder", make_picture_folder(tmp_path_factory.mktemp("data") / "pictures", 12))


@pytest.fixture(scope="module")
def folders(benchmark, tmp_path_factory):
    """Three scored runs that differ in their guidance."""
    folder = tmp_path_factory.mktemp("runs")
    for scale in (1, 3, 6):
        generate(benchmark, brighten(scale), folder / f"guidance-{scale}")
        images = folder / f"guidance-{scale}" / "images"
        score(benchmark, images, images.parent, metrics=["l1", "psnr_unedited", "ssim_unedited"])
    return [folder / f"guidance-{scale}" for scale in (1, 3, 6)]


def open_run(folder):
    return report.read_run(folder, folder.name)


def read_table(text):
    """Read the first table of a page: heading, and row by name."""
    lines = text.split("\n\n")[3].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return cells[0], {row[0]: row[1:] for row in cells[2:]}


def test_a_table_has_a_row_for_each_run_with_scaled_means(folders, tmp_path):
    assert evaluate("report", *folders, "--output-dir", tmp_path / "report") == 0
    page = (tmp_path / "report" / "report.md").read_text()
    heading, rows = read_table(page)
    assert heading == ["", "L1 ↓", "PSNR unedited ↑", "SSIM unedited ×10² ↑"]
    assert list(rows) == ["guidance-1", "guidance-3", "guidance-6"]
    for folder in folders:
        overall = json.loads((folder / "metrics.json").read_text())["overall"]
        means = [overall[name]["mean"] for name in overall]
        assert rows[folder.name] == [f"{means[0]:.4f}", f"{means[1]:.2f}", f"{100 * means[2]:.2f}"]
    # The last sample has neither truth nor mask.
    made = "brightener (guidance_scale 6, seed 0, batch_size 1)"
    assert f"{made}; 12 samples of 16×16, L1 of 11, PSNR unedited of 11, SSIM unedited ×10² of 11" in page
    named = set(re.findall(r"\]\(([^)]+)\)", page))
    assert named == {path.name for path in (tmp_path / "report").iterdir()} - {"report.md"}
    assert "guidance.png" in named


def test_categories_have_their_own_means(folders):
    run = open_run(folders[0])
    lines = map(json.loads, (folders[0] / "samples.jsonl").read_text().splitlines())
    values = {line["id"]: decode_number(line["values"]["l1"]) for line in lines}
    kind = values.pop("first")
    assert run.get_scaled("l1", "kind") == pytest.approx(kind)
    # The last sample has no truth to be compared with.
    assert run.get_scaled("l1", "all") == pytest.approx(np.nanmean(list(values.values())))
    page = report.compose_report([run], [])
    assert f"| kind | {kind:.4f} |" in page


def test_a_figure_that_is_undefined_is_a_dash_and_infinity_its_sign():
    metric = METRICS["l1"]
    assert [metric.format(value) for value in (math.nan, math.inf, 0.12345)] == ["–", "∞", "0.1235"]
    assert [encode_number(value) for value in (math.nan, math.inf, 1.5)] == [None, "inf", 1.5]


def test_a_page_says_what_is_quoted_and_what_keeps_its_own_figures_apart(folders, tmp_path):
    folder = make_magicbrush_folder(tmp_path / "magicbrush")
    benchmark = Benchmark("magicbrush", folder, allow_partial=True)
    pages = {}
    for protocol in ("editar", "corrected"):
        run = tmp_path / protocol
        generate(benchmark, brighten(1), run)
        score(benchmark, run / "images", run, protocol, metrics=["l1", "l2"])
        pages[protocol] = report.write_report([run], tmp_path / f"report-{protocol}").read_text()
    assert "| EditAR (quoted: NEP, arXiv 2508.06044) | 0.1028 | 0.0285 |" in pages["editar"]
    assert "docs/benchmarks.md" in pages["editar"]
    assert "3 samples, a part of the benchmark; not comparable" in pages["editar"]
    assert "quoted" not in pages["corrected"]
    assert "quoted" not in report.compose_report([open_run(folders[0])], [])


@pytest.mark.parametrize("row", report.PUBLISHED["rows"], ids=lambda row: f"{row['benchmark']}, {row['name']}")
def test_quoted_figures_are_those_of_the_page_and_stand_beside_the_protocols_of_their_source_alone(row):
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith(f"| {row['name']}")]
    figures = {METRICS[name].format(value) for name, value in row["values"].items()}
    assert re.search(r"arXiv \d{4}\.\d{5}", row["source"])[0] in " ".join(page.split())
    assert any(figures <= set(line.split()) for line in lines)
    for protocol in PROTOCOLS:
        names = [
            name for name, _ in report.list_published(row["benchmark"], protocol, BENCHMARKS[row["benchmark"]].metrics)
        ]
        is_quoted = f"{row['name']} (quoted: {row['source']})" in names
        assert is_quoted == (protocol in report.PUBLISHED["protocols"][row["source"]])


def test_what_is_wrong_with_a_run_and_the_networks_that_judge_it_stand_beside_its_name(benchmark, folders, tmp_path):
    run = open_run(folders[0])
    run.generation["use_masks"] = True
    run.metrics |= {"num_scored": 2, "problems": {"missing": ["a"] * 7, "extra": []}}
    remarks = run.list_remarks()
    assert remarks[0].startswith("mask-assisted")
    assert remarks[1:] == ["2 of 12 predictions scored", "7 missing"]
    run.generation = {**run.generation, "use_masks": None, "preserve": "auto"}
    assert run.list_remarks()[0].startswith("preserve auto")
    build_dino().save_pretrained(tmp_path / "dino")
    arguments = {"metrics": ["dino"], "models": {"dino": str(tmp_path / "dino")}}
    score(benchmark, folders[0] / "images", tmp_path / "run", **arguments)
    page = report.write_report([folders[0], tmp_path / "run"], tmp_path / "report").read_text()
    assert re.search(rf"^\* .*run: predictions of an unnamed system; .*; dino by {tmp_path}/dino$", page, re.MULTILINE)
    assert re.search(r"^Scored on device cpu, editar-hf .*\d\.$", page, flags=re.MULTILINE)


def test_runs_whose_folders_are_called_alike_are_told_apart(folders, tmp_path, capsys):
    for name, folder in zip(("a", "b"), folders, strict=False):
        shutil.copytree(folder, tmp_path / name / "run")
    page = report.write_report([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "report").read_text()
    assert list(read_table(page)[1]) == ["a-run", "b-run"]
    sheets = [tmp_path / "report" / f"{name}-run-sheet.png" for name in ("a", "b")]
    assert sheets[0].read_bytes() != sheets[1].read_bytes()
    assert evaluate("report", folders[0], folders[0], "--output-dir", tmp_path / "report") == 2
    assert "`runs` contains a folder twice" in capsys.readouterr().err


def test_runs_that_cannot_be_compared_are_refused(folders, benchmark, tmp_path, capsys):
    other = Benchmark("folder", make_picture_folder(tmp_path / "pictures", 2))
    scored = {"other data": (other, "editar"), "other protocol": (benchmark, "corrected")}
    for name, (samples, protocol) in scored.items():
        generate(samples, brighten(1), tmp_path / name)
        score(samples, tmp_path / name / "images", tmp_path / name, protocol, metrics=["l1"])
        assert evaluate("report", folders[0], tmp_path / name, "--output-dir", tmp_path / "report") == 2
        assert "give only runs that agree in it" in capsys.readouterr().err
    assert evaluate("report", tmp_path, "--output-dir", tmp_path / "report") == 2
    assert "which has no config.json; score its predictions first" in capsys.readouterr().err


# Pictures


def test_a_line_of_the_guidance_plot_joins_runs_that_differ_in_guidance_alone(folders):
    found = [open_run(folder) for folder in reversed(folders)]
    found[1].generation["top_k"] = 5
    lines = report.group_by_guidance(found)
    assert [[run.name for run in line] for line in lines] == [["guidance-1", "guidance-6"], ["guidance-3"]]
    for name in ("seed", "batch_size"):
        found = [open_run(folder) for folder in folders]
        found[2].generation[name] = 9
        lines = report.group_by_guidance(found)
        assert [[run.name for run in line] for line in lines] == [["guidance-1", "guidance-3"], ["guidance-6"]]
    found[0].generation["guidance_scale"] = None
    assert sum(map(len, report.group_by_guidance(found))) == 2


def test_a_sheet_shows_the_best_and_the_worst_predictions_and_none_twice():
    values = {"a": 1.0, "b": 3.0, "c": 2.0, "d": math.nan, "e": 5.0, "f": 4.0, "g": 6.0, "h": 7.0, "i": 8.0, "j": 9.0}
    # L1: lower is better.
    chosen = report.choose_samples(values, "l1")
    assert [name for name, which in chosen.items() if which == "best:"] == ["a", "c", "b", "f"]
    assert [name for name, which in chosen.items() if which == "worst:"] == ["j", "i", "h", "g"]
    few = report.choose_samples({name: values[name] for name in "abcef"}, "psnr")
    assert list(few) == ["e", "f", "b", "c", "a"]
    assert report.choose_samples(dict.fromkeys("xy", math.nan), None) == {"x": "", "y": ""}


def test_a_row_of_a_sheet_shows_source_mask_output_and_target(benchmark):
    sample = next(benchmark.read())
    prediction = draw_image(77)
    sheet = np.asarray(report.draw_sheet([("best: 1", sample, prediction)]))
    for place, picture in enumerate((sample.source_image, sample.mask.convert("RGB"), prediction, sample.target_image)):
        left = place * (report.SIDE + report.GAP)
        shown = sheet[: report.SIDE, left : left + report.SIDE]
        assert np.array_equal(shown, np.asarray(picture.resize((160, 160), Image.Resampling.NEAREST)))


def test_a_report_of_a_run_whose_predictions_are_gone_has_no_sheet(folders, tmp_path):
    config, metrics = (json.loads((folders[0] / name).read_text()) for name in ("config.json", "metrics.json"))
    config["scoring"]["images"] = str(tmp_path / "nowhere")
    shutil.copy(folders[0] / "samples.jsonl", tmp_path)
    for name, content in (("config.json", config), ("metrics.json", metrics)):
        (tmp_path / name).write_text(json.dumps(content))
    report.write_report([tmp_path], tmp_path / "report")
    assert not list((tmp_path / "report").glob("*-sheet.png"))


def test_a_report_is_the_same_each_time(folders, tmp_path):
    for name in ("one", "two"):
        report.write_report(folders, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
