"""The commands of `docs/evaluate.md`, in their order, on tiny data with tiny models.

Each command of `editar-hf` runs in this process, in a folder that holds what the page says one has: what it names must
be there by then.
"""

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from evaluation_data import evaluate_stickers, make_pie_folder, make_sticker_data, make_translation_data
from pages import ROOT, list_calls
from tiny_metrics import save_models

from editar_hf.commands import build_parser
from editar_hf.evaluation.benchmarks import BENCHMARKS
from editar_hf.evaluation.table import METRICS


pytestmark = pytest.mark.filterwarnings("ignore:A prompt is longer", "ignore:The center crop cuts")
# Where the ControlNets lie: ids of their own, and folders of the repository of ControlNet++.
CONTROLNETS = [f"lllyasviel/control_{name}" for name in ("v11f1p_sd15_depth", "v11p_sd15_canny", "v11p_sd15_seg")]
CONTROLNETS_PP = ("checkpoints/depth/controlnet", "checkpoints/canny/controlnet", "checkpoints/cocostuff/reward_5k")


def shrink(args, folder, models):
    """Put tiny data and models in place of what a command of `editar-hf evaluate` would download."""
    args.allow_partial = True
    if args.benchmark in ("depth", "canny", "segmentation"):
        args.source, args.resolution = str(folder / "translation"), 192
    for name in {METRICS[metric].model for metric in BENCHMARKS[args.benchmark].metrics} - {None}:
        if getattr(args, f"{name}_model", "given") is None:
            setattr(args, f"{name}_model", str(models / name))


def make_folder(folder, models):
    """Make what the page says one has: the repository's examples, a converted EditAR, and the benchmarks."""
    (folder / "examples").mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "run_paper_tables.sh", folder / "examples")
    (folder / "my_editor.py").write_text("import shutil, sys\nshutil.copy(sys.argv[1], sys.argv[3])\n")
    shutil.copytree(models / "lpips", folder / "lpips")
    shutil.copy(models / "inception", folder / "pt_inception-2015-12-05-6726825d.pth")
    for name in ("projects/stickers/sticker-editor", "editar", "my-editor"):
        shutil.copytree(models / "editar", folder / name)
    make_pie_folder(folder / "PIE-Bench_v1", 2)
    make_translation_data(folder / "translation", 2, side=200, classes=(0, 3, 6, 255))


def download(words):
    """Make the folders that `hf download` would."""
    target = Path(words[words.index("--local-dir") + 1])
    patterns = [word for word, option in zip(words[1:], words, strict=False) if option == "--include"]
    for name in CONTROLNETS_PP:
        if any(fnmatch(f"{name}/config.json", pattern) for pattern in patterns):
            (target / name).mkdir(parents=True)


def run_command(words, folder, models):
    """Run a command of `editar-hf` on tiny data with tiny models."""
    args = build_parser().parse_args(words)
    if words[1] != "report":
        shrink(args, folder, models)
    assert args.run(args) == 0, words


def run_baseline(script, words, folder, models):
    """Put the floor in place of a system of diffusers, whose flags must be those of its script."""
    flags = {word for word in words if word.startswith("--")}
    known = {*("--benchmark", "--source", "--output-dir"), *re.findall(r'"(--[a-z-]+)"', (ROOT / script).read_text())}
    assert flags <= known, (script, flags - known)
    options = dict(zip(words[::2], words[1::2], strict=True))
    if "--controlnet" in options:
        assert options["--controlnet"] in CONTROLNETS or Path(options["--controlnet"]).is_dir(), words
    shared = [word for name in ("--benchmark", "--source", "--output-dir") for word in (name, options.get(name))]
    shared = shared if options.get("--source") else [*shared[:2], *shared[4:]]
    run_command(["evaluate", "generate", "--system", "copy-source", *shared], folder, models)


def test_the_commands_of_the_evaluation_page_run_in_their_order(tmp_path, monkeypatch):
    models, folder = save_models(tmp_path / "models"), tmp_path / "user"
    make_folder(folder, models)
    calls = list_calls("docs/evaluate.md", folder)
    monkeypatch.chdir(folder)
    # One of the systems is a command that begins with `python`.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for program, *words in calls:
        if program == "python" and words[0] == "projects/stickers/make_sticker_edits.py":
            make_sticker_data(Path(words[words.index("--output-dir") + 1]), 3)
        elif program == "python" and words[0] == "projects/stickers/evaluate_stickers.py":
            assert evaluate_stickers(*words[1:]) == 0, words
        elif program == "python":
            run_baseline(*words[:1], words[1:], folder, models)
        elif program == "hf":
            download(words)
        elif program == "editar-hf":
            run_command(words, folder, models)
    rivals = dict.fromkeys(("depth", "canny", "segmentation"), ("controlnet", "controlnet++"))
    for task, names in (rivals | {"pie-bench": ("instruct-pix2pix",)}).items():
        page = Path("runs", task, "report.md").read_text()
        assert all(f"\n| {name} | " in page for name in ("editar", *names)), task
        assert "\n| EditAR (quoted: EditAR, arXiv 2501.04699) | " in page, task


# The paper's studies

REPORTER = """#!/bin/sh
[ "$2" = report ] || exit 0
for folder; do :; done
mkdir -p "$folder"
printf '| table |\\n\\nScored on cpu.\\n\\n![guidance](guidance.png)\\n' > "$folder/report.md"
touch "$folder/guidance.png"
"""


def test_the_table_of_distillation_has_the_command_for_the_papers_teacher_under_it(tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "python").write_text(REPORTER)
    (programs / "python").chmod(0o755)
    folders = {"RUNS": f"{tmp_path}/runs", "RESULTS": f"{tmp_path}/results"}
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", **folders}
    script = ROOT / "projects" / "stickers" / "run_ablations.sh"
    subprocess.run(["bash", script, "distillation"], env=environment, check=True)
    page = (tmp_path / "results" / "distillation" / "report.md").read_text()
    under, rest = page.partition("Scored on cpu.\n\nMade by ")[2].split("\n\n")
    assert "The stand-in teacher is no DINOv2" in under
    assert "`TEACHER=facebook/dinov2-base bash projects/stickers/run_ablations.sh distillation`" in under
    assert rest == "![guidance](guidance.png)\n"
