"""The `editar-hf` command, run in this process through `main` and once as the installed program."""

import gc
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from tiny import build_pipeline

import editar_hf
from editar_hf import EditARPipeline, commands
from editar_hf.commands import env, main
from editar_hf.evaluation.benchmarks import BENCHMARKS
from editar_hf.evaluation.systems import SYSTEMS
from editar_hf.evaluation.table import PROTOCOLS


def read_rows(output: str) -> dict[str, str]:
    """Split the lines `name  value` that `editar-hf env` prints."""
    return dict(line.split(maxsplit=1) for line in output.splitlines())


def test_env_prints_versions_and_devices(capsys):
    assert main(["env"]) == 0
    rows = read_rows(capsys.readouterr().out)
    assert rows["editar-hf"] == editar_hf.__version__
    core = ["torch", "transformers", "diffusers", "huggingface-hub", "safetensors", "accelerate", "pillow", "numpy"]
    assert {name: rows[name] for name in core} == {name: metadata.version(name) for name in core}
    assert rows["python"] == ".".join(map(str, sys.version_info[:3]))
    assert rows["cpu"].endswith(f"{torch.get_num_threads()} torch threads")
    num_devices = torch.cuda.device_count()
    assert [name for name in rows if name.startswith("cuda:")] == [f"cuda:{index}" for index in range(num_devices)]


def test_env_prints_the_dtype_that_a_pipeline_is_loaded_in(capsys, tmp_path):
    build_pipeline().to(torch.bfloat16).save_pretrained(tmp_path)
    main(["env"])
    chosen = read_rows(capsys.readouterr().out)["dtype"]
    loaded = str(EditARPipeline.from_pretrained(tmp_path).transformer.dtype)
    assert chosen.startswith(f"{loaded.removeprefix('torch.')} for weights stored in bfloat16; ")
    assert "bfloat16" in chosen.partition("; ")[2]


def test_env_says_whether_weights_can_be_packed_here(capsys, monkeypatch):
    for machine, start in (("x86_64", "available"), ("aarch64", "not available: this processor is aarch64")):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["fbgemm"])
        main(["env"])
        assert read_rows(capsys.readouterr().out)["16-bit-weights"].startswith(start)


def test_env_lists_extras_and_says_which_are_missing(capsys, monkeypatch):
    requires = ["torch>=2", 'editar-hf[lora]; extra == "dev"', 'no-such-package>=1; extra == "lora"', "torch<3"]
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    assert env.list_requirements() == ["torch", "no-such-package"]
    main(["env"])
    assert read_rows(capsys.readouterr().out)["no-such-package"] == "not installed"


def test_installed_program_says_its_version():
    program = Path(sys.executable).with_name("editar-hf")
    result = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"editar-hf {editar_hf.__version__}\n"


def test_env_and_refused_edits_import_no_pipeline(tmp_path):
    code = (
        "import sys, editar_hf.commands as c\n"
        "assert c.main(['edit', '--model', 'm', '--image', 'absent.png', '--prompt', 'p', '--output', 'o.png']) == 2\n"
        "assert 'torch' not in sys.modules\n"
        "assert c.main(['env']) == 0\n"
        "assert not {'transformers', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_garbage_collector_runs_after_the_imports_but_skips_their_objects():
    commands.import_pipeline()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 100_000


def test_help_names_every_command_without_importing_torch():
    code = (
        "import sys, editar_hf.commands as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules), 'heavy import'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in commands.COMMANDS:
        assert command.__name__.rpartition(".")[2].replace("_", "-") in result.stdout.split()


def test_help_of_the_evaluation_names_every_protocol_benchmark_and_system(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit):
        main(["evaluate", "run", "--help"])
    words = set(re.split(r"[\s,;]+", capsys.readouterr().out))
    assert not [name for name in (*PROTOCOLS, *BENCHMARKS, *SYSTEMS) if name not in words]


@pytest.mark.parametrize("error", [ValueError("`model` is 3"), TypeError("`a` is b"), FileNotFoundError("no a.png")])
def test_bad_input_is_one_line_and_exit_status_two(error, capsys, monkeypatch):
    def refuse(args):
        raise error

    monkeypatch.setattr(env, "run", refuse)
    assert main(["env"]) == 2
    assert capsys.readouterr().err == f"editar-hf: error: {error}\n"


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["env", "--no-such-option"]])
def test_arguments_that_do_not_fit_exit_with_status_two(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: editar-hf" in capsys.readouterr().err
