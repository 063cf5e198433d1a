"""What runs on a GPU that is at hand for some minutes, rehearsed at tiny sizes on the CPU."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_repository import read_requirements
from transformers import HfArgumentParser


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "projects" / "scenes")]

import bench_gpu  # noqa: E402
import gpu_slot  # noqa: E402
import train  # noqa: E402


def test_every_benchmark_runs_in_the_rehearsal(tmp_path):
    # None of the packed libraries: they are for another Python.
    environment = {**os.environ, "PYTHON": sys.executable, "LIBRARIES": "none", "OUT": str(tmp_path)}
    command = ["bash", BENCHMARKS / "gpu_slot.sh", "--rehearse", "--stages", "benchmarks"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    results = json.loads((tmp_path / "generation-gpu.json").read_text())
    assert {name: stage["outcome"] for name, stage in results["stages"].items()} == dict.fromkeys(
        bench_gpu.STAGES, "done"
    )
    assert results["failures"] == []
    assert not [finding for finding in results["parity"].values() if finding.startswith("FAILED")]
    page = (tmp_path / "generation-gpu.md").read_text()
    assert page.startswith("# Decoding on a GPU: rehearsal")
    for system in (
        "published style",
        "library",
        "editar_hf",
        "editar_hf, captured",
        "editar_hf, compiled and captured",
    ):
        assert f"| 1 | 1 | {system} |" in page


def test_a_stage_that_fails_or_takes_too_long_does_not_end_the_next(tmp_path, monkeypatch):
    def fail(benchmark):
        raise ValueError("no such thing")

    def wait(benchmark):
        benchmark.results["before"] = 1
        while True:
            time.sleep(0.01)

    def note(benchmark):
        benchmark.results["after"] = 2

    stages = {"fails": (fail, 0, 5), "waits": (wait, 0, 0.2), "goes on": (note, 0, 5)}
    monkeypatch.setattr(bench_gpu, "STAGES", stages)
    bench_gpu.Benchmark(is_rehearsal=True).run(list(stages), 5, tmp_path)
    results = json.loads((tmp_path / "generation-gpu.json").read_text())
    outcomes = [stage["outcome"] for stage in results["stages"].values()]
    assert outcomes == ["failed, ValueError: no such thing", "stopped, out of time", "done"]
    assert (results["before"], results["after"]) == (1, 2)
    assert "no such thing" in (tmp_path / "generation-gpu.md").read_text()


def test_training_gets_its_own_options_and_its_failure_is_told(tmp_path, monkeypatch):
    script = tmp_path / "projects" / "scenes" / "train.py"
    script.parent.mkdir(parents=True)
    script.write_text("import pathlib, sys\npathlib.Path('words').write_text(' '.join(sys.argv[1:]))\nsys.exit(3)\n")
    monkeypatch.setattr(gpu_slot, "ROOT", tmp_path)
    words = ["--stages", "training", "--output_dir", str(tmp_path / "out"), "--bank", "bank", "--minutes", "5"]
    monkeypatch.setattr(sys, "argv", ["gpu_slot.py", *words])
    with pytest.raises(SystemExit) as stopped:
        gpu_slot.main()
    assert stopped.value.code == 1
    assert (tmp_path / "words").read_text() == f"--bank bank --minutes 5 --output_dir {tmp_path / 'out' / 'training'}"


def test_the_training_command_is_the_same_everywhere_and_its_options_exist():
    pages = [gpu_slot.__doc__, train.__doc__, (BENCHMARKS / "README.md").read_text()]
    commands = {
        " ".join(command.replace("\\\n", " ").split())
        for page in pages
        for command in re.findall(r"bash \S*gpu_slot\.sh --stages training (?:.*\\\n)*.*", page)
    }
    (command,) = commands
    words = [*command.split()[4:], "--output-dir", "out"]
    (args,) = HfArgumentParser(train.Arguments).parse_args_into_dataclasses(words)
    assert (args.editor_minutes, args.slots, args.compile) == (8.5, 300, ["editor"])


def test_a_misspelt_option_is_refused_where_nothing_is_trained(tmp_path, monkeypatch, capsys):
    words = ["--stages", "benchmarks", "--output_dir", str(tmp_path), "--second", "5"]
    monkeypatch.setattr(sys, "argv", ["gpu_slot.py", *words])
    with pytest.raises(SystemExit):
        gpu_slot.main()
    assert "--second" in capsys.readouterr().err


def test_wheels_are_of_the_versions_that_the_package_requires():
    lines = (BENCHMARKS / "gpu_slot_wheels.txt").read_text().splitlines()
    wheels = {wheel.name: wheel.specifier for wheel in map(Requirement, (ln for ln in lines if ln[:1] != "#"))}
    required = {one.name: one.specifier for listed in read_requirements().values() for one in listed}
    shared = wheels.keys() & required.keys()
    assert {"transformers", "diffusers", "huggingface-hub"} <= shared
    assert {name: wheels[name] for name in shared} == {name: required[name] for name in shared}
