"""Sharded training (`fully_shard`, PyTorch's FSDP2) takes the steps of one process."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from PIL import Image
from processes import read_launch_environment, run_python, run_ranks
from safetensors.torch import load_file
from scripts import reset_accelerate, save_calm
from tiny import build_pipeline, write_pairs

from editar_hf.modeling_editar import EditARDecoderLayer


EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = EXAMPLES / "accelerate_configs"
NUM_PROCESSES, BATCH_SIZE = 2, 4
# accelerate shards on accelerators alone. This lets it take the CPU for one, with gloo in place of NCCL.
ON_GLOO = """
import runpy, sys
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_configurations_load_and_say_what_their_names_do():
    configs = {path.stem: load_config_from_file(str(path)) for path in CONFIGS.glob("*.yaml")}
    types = {name: config.distributed_type for name, config in configs.items()}
    assert types == {
        "ddp": DistributedType.MULTI_GPU,
        "fsdp2": DistributedType.FSDP,
        "deepspeed": DistributedType.DEEPSPEED,
    }
    fsdp = configs["fsdp2"].fsdp_config
    assert fsdp["fsdp_version"] == 2
    assert fsdp["fsdp_transformer_layer_cls_to_wrap"] == EditARDecoderLayer.__name__
    assert configs["deepspeed"].deepspeed_config["zero_stage"] == 2


@pytest.fixture(scope="module")
def calm_pairs(tmp_path_factory) -> Path:
    """A folder with an editor without dropout and eight pairs."""
    folder = tmp_path_factory.mktemp("sharded")
    save_calm(build_pipeline(), folder / "editor")
    for split in ("train", "validation"):
        write_pairs(folder / f"{split}.parquet", num_rows=8, prompt=["make it blue"] * 8)
    return folder


def train_by_script(folder: Path, output: str, environment: dict[str, str] | None, *words) -> str:
    """Run the script on the pairs, all of them in two steps, and return what it printed.

    Given an environment of `accelerate launch`, run it in two processes.
    """
    options = ["--model", folder / "editor", "--dataset", folder, "--validation_dataset", folder]
    options += ["--output_dir", folder / output, "--learning_rate", 0.01, "--logging_steps", 1, "--validation_steps", 2]
    options += ["--num_validation_images", 2, "--no_conditioning_dropout"]
    command = [EXAMPLES / "train_editar.py", "--train_text_encoder", *options, *words]
    if environment is None:
        finished = run_python(*command, environment={**os.environ, "ACCELERATE_USE_CPU": "true"})
        assert finished.returncode == 0, finished.stderr
        return finished.stdout
    return run_ranks(NUM_PROCESSES, folder / "on_gloo.py", *command, environment=environment)


def test_script_on_shards_trains_checkpoints_resumes_and_saves_what_one_process_does(calm_pairs):
    """By the configuration for FSDP2. Another launch takes the second step, and does not recompute activations."""
    (calm_pairs / "on_gloo.py").write_text(ON_GLOO)
    launch = read_launch_environment(CONFIGS / "fsdp2.yaml", dict(os.environ), calm_pairs)
    sizes = ("--batch_size", BATCH_SIZE // NUM_PROCESSES)
    train_by_script(calm_pairs, "sharded", launch, *sizes, "--max_train_steps", 1, "--gradient_checkpointing")
    assert (calm_pairs / "sharded" / "checkpoint-1" / "pytorch_model_fsdp_0").is_dir()
    words = ("--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    printed = train_by_script(calm_pairs, "sharded", launch, *sizes, *words)
    straight = train_by_script(calm_pairs, "straight", None, "--batch_size", BATCH_SIZE, "--max_train_steps", 2)

    last, expected = (
        [float(line.split("loss ")[1].split(",")[0]) for line in text.splitlines() if line.startswith("step 2: ")]
        for text in (printed, straight)
    )
    assert len(expected) == 2
    assert last == pytest.approx(expected, rel=1e-3)
    for component in ("transformer", "text_encoder"):
        before, sharded, single = (
            load_file(calm_pairs / folder / component / "model.safetensors")
            for folder in ("editor", "sharded/pipeline", "straight/pipeline")
        )
        assert sharded.keys() == single.keys()
        for name, tensor in single.items():
            assert (sharded[name] - tensor).norm() <= 0.02 * (tensor - before[name]).norm() + 1e-6, name
    pictures = [Image.open(calm_pairs / run / "validation" / "step-0000002.png") for run in ("sharded", "straight")]
    assert pictures[0].size == pictures[1].size == (3 * 20 + 4, 2 * 20 + 4)


@pytest.fixture
def launched_on_shards(monkeypatch):
    """Be the only process of a launch for FSDP2, on gloo as in `ON_GLOO`."""
    reset_accelerate()
    launch = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name, value in {**launch, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": 2}.items():
        monkeypatch.setenv(name, str(value))
    gloo = ("gloo", DistributedType.MULTI_GPU)
    monkeypatch.setattr(PartialState, "_prepare_backend", lambda *args, **kwargs: gloo)
    monkeypatch.setattr(PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cpu")))
    yield
    reset_accelerate()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ema_decay", "0.9"), "`ema_decay`: an FSDP2 checkpoint would hold .* use DDP"),
        (("--optimizer", "muon"), "`optimizer` is 'muon', .*FSDP supports only one. Use adamw, or DDP"),
    ],
    ids=["averages", "muon"],
)
def test_script_on_shards_refuses_at_once_what_does_not_work_in_parts(
    words, message, launched_on_shards, tmp_path, monkeypatch
):
    script = str(EXAMPLES / "train_editar.py")
    monkeypatch.setattr(sys, "argv", [script, "--model", "unread", "--output_dir", str(tmp_path), *words])
    with pytest.raises(ValueError, match=message):
        runpy.run_path(script, run_name="__main__")
