"""Sharded training (`fully_shard`, PyTorch's FSDP2), of our modules and by the script: the steps of one process."""

import copy
import json
import os
import runpy
import sys
from pathlib import Path

import datasets
import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from PIL import Image
from processes import CONTEXT, read_launch_environment, run_python, run_ranks
from safetensors.torch import load_file
from scripts import reset_accelerate
from tiny import NUM_CODES, build_pipeline, draw_image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from editar_hf.modeling_editar import EditARDecoderLayer
from editar_hf.training.step import TrainingStep


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


def build_step(recomputes: bool) -> TrainingStep:
    pipe = build_pipeline()
    for name in ("text_dropout", "residual_dropout", "mlp_dropout"):
        setattr(pipe.transformer.config, name, 0.0)
    transformer = type(pipe.transformer)(pipe.transformer.config)
    transformer.load_state_dict(pipe.transformer.state_dict())
    if recomputes:
        transformer.gradient_checkpointing_enable()
    pipe.text_encoder.requires_grad_(False)
    return TrainingStep(transformer, pipe.text_encoder, (4, 4)).train()


def build_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randint(NUM_CODES, (2, BATCH_SIZE, 16), generator=generator)
    text = torch.randint(100, (BATCH_SIZE, 10), generator=generator)
    tokens = {"source_image_tokens": source, "target_image_tokens": target}
    return {**tokens, "input_ids": text, "attention_mask": torch.ones_like(text)}


def take_steps(step: TrainingStep, batch: dict[str, torch.Tensor]) -> list[float]:
    """Take two optimiser steps and return their losses."""
    optimizer = torch.optim.SGD([p for p in step.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(2):
        loss = step(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_sharded(process: int, folder: Path, recomputes: bool):
    """Train on this process's part of the batch with every layer sharded; save the gathered weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=NUM_PROCESSES)
    step, mesh = build_step(recomputes), init_device_mesh("cpu", (NUM_PROCESSES,))
    for layer in step.transformer.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(step, mesh=mesh)
    part = {name: tensor.chunk(NUM_PROCESSES)[process] for name, tensor in build_batch().items()}
    losses = take_steps(step, part)
    weights = {name: parameter.full_tensor().detach() for name, parameter in step.named_parameters()}
    is_sharded = [parameter.to_local().numel() < parameter.numel() for parameter in step.transformer.parameters()]
    torch.save({"losses": losses, "weights": weights, "sharded": is_sharded}, folder / f"{process}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("recomputes", [False, True])
def test_sharded_steps_are_those_of_one_process(recomputes, tmp_path):
    arguments = (tmp_path, recomputes)
    processes = [CONTEXT.Process(target=train_sharded, args=(rank, *arguments)) for rank in range(NUM_PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    results = [torch.load(tmp_path / f"{process}.pt", weights_only=True) for process in range(NUM_PROCESSES)]
    step = build_step(recomputes)
    before = copy.deepcopy(dict(step.named_parameters()))
    losses = take_steps(step, build_batch())
    assert torch.tensor([result["losses"] for result in results]).mean(dim=0).tolist() == pytest.approx(
        losses, rel=1e-5
    )
    assert all(any(result["sharded"]) for result in results)
    for name, parameter in step.named_parameters():
        for result in results:
            difference = (result["weights"][name] - parameter.detach()).norm()
            assert difference <= 1e-3 * (parameter.detach() - before[name]).norm() + 1e-7, name


# The configurations for `accelerate launch`


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
    build_pipeline().save_pretrained(folder / "editor")
    for name, dropouts in {
        "transformer": ("text_dropout", "residual_dropout", "mlp_dropout"),
        "text_encoder": ("dropout_rate",),
    }.items():
        file = folder / "editor" / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict.fromkeys(dropouts, 0.0)))
    names = ("source_image", "target_image")
    rows = {name: [draw_image((k, *name.encode())) for k in range(8)] for name in names}
    features = datasets.Features({**dict.fromkeys(names, datasets.Image()), "prompt": datasets.Value("string")})
    rows["prompt"] = ["make it blue"] * 8
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
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
    """By the configuration for FSDP2; the second step is taken by another launch than the first."""
    (calm_pairs / "on_gloo.py").write_text(ON_GLOO)
    launch = read_launch_environment(CONFIGS / "fsdp2.yaml", dict(os.environ), calm_pairs)
    sizes = ("--batch_size", BATCH_SIZE // NUM_PROCESSES)
    train_by_script(calm_pairs, "sharded", launch, *sizes, "--max_train_steps", 1)
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
        (("--ema_decay", "0.9"), "`ema_decay`: a checkpoint of FSDP2 would hold one part .* use DDP"),
        (("--optimizer", "muon"), "`optimizer` is 'muon', .*FSDP holds one. Use adamw, or DDP"),
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
