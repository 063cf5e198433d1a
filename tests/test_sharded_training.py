"""Sharded training (`fully_shard`, PyTorch's FSDP2) of our modules, in two processes: the steps of one process."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import NUM_CODES, build_pipeline
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from editar_hf.training.step import TrainingStep


NUM_PROCESSES, BATCH_SIZE = 2, 4


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
    torch.multiprocessing.spawn(train_sharded, arguments, nprocs=NUM_PROCESSES)
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
