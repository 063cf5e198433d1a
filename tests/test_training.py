"""What the training scripts share: dropped conditions, losses, steps, the teacher, checkpoints, logs, pictures."""

import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from tiny import NUM_CODES, STRIDE, build_pipeline, build_vq_model, draw_image, redraw_weights
from torch import nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from editar_hf import EditARForConditionalGeneration
from editar_hf.training.checkpoints import is_out_of_time, list_checkpoints, load_checkpoint, save_checkpoint
from editar_hf.training.distillation import DistillationTeacher, compute_distillation_loss
from editar_hf.training.logs import LossLog, print_banner
from editar_hf.training.optimization import NonFiniteGuard, build_muon, build_optimizer, split_hidden_matrices
from editar_hf.training.results import describe_command
from editar_hf.training.step import (
    TrainingStep,
    compute_token_losses,
    draw_conditioning_dropout,
    draw_dropout,
    drop_target_tokens,
    encode_image_tokens,
)
from editar_hf.training.validation import draw_validation_images


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


@pytest.fixture
def accelerator(on_cpu, tmp_path_factory):
    return Accelerator(project_dir=tmp_path_factory.mktemp("project"))


# Dropped conditions


def test_one_uniform_draw_decides_what_is_dropped_as_published():
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    drop_source, drop_prompt = draw_conditioning_dropout(100_000, generators[0])
    draw = torch.rand(100_000, generator=generators[1])
    assert torch.equal(drop_source, draw < 0.10)
    assert torch.equal(drop_prompt, (draw < 0.05) | (draw > 0.95))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_batches_seeded_by_their_place_drop_as_often_as_published():
    """As `train_editar.py` draws: batches of 64, each from a generator of its own with the next seed."""
    draws = [draw_conditioning_dropout(64, torch.Generator().manual_seed(place)) for place in range(2000)]
    drop_source, drop_prompt = (torch.cat(drops) for drops in zip(*draws, strict=True))
    expected = {(True, True): 0.05, (True, False): 0.05, (False, True): 0.05, (False, False): 0.85}
    for (source, prompt), probability in expected.items():
        count = ((drop_source == source) & (drop_prompt == prompt)).sum().item()
        deviation = math.sqrt(len(drop_source) * probability * (1 - probability))
        assert abs(count - len(drop_source) * probability) < 4 * deviation


# Batches and losses


def test_pictures_of_a_batch_become_the_tokens_of_each():
    vq_model = build_vq_model()
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.rand(2, 3, 8, 12, generator=generator) * 2 - 1 for _ in range(2))
    batch = {"source_pixel_values": source, "target_pixel_values": target, "input_ids": "kept"}
    encoded = encode_image_tokens(batch, vq_model)
    assert set(encoded) == {"source_image_tokens", "target_image_tokens", "input_ids"}
    assert set(batch) == {"source_pixel_values", "target_pixel_values", "input_ids"}
    assert torch.equal(encoded["source_image_tokens"], vq_model.encode(source).image_tokens)
    assert torch.equal(encoded["target_image_tokens"], vq_model.encode(target).image_tokens)
    assert encode_image_tokens(encoded, vq_model) is encoded


def test_a_share_of_the_targets_is_shown_with_tokens_of_the_source():
    generator = torch.Generator().manual_seed(0)
    target, source = torch.zeros(20_000, 16, dtype=torch.long), torch.arange(1, 17).expand(20_000, 16)
    shown = drop_target_tokens(target, source, 0.3, generator)
    dropped = shown != target
    assert torch.equal(shown[dropped], source[dropped])
    # Each of 0 … 16 dropped tokens is as likely as any other, when the rate is uniform.
    counts = torch.bincount(dropped.sum(dim=1), minlength=17) / len(target)
    expected = torch.full((17,), 0.3 / 17)
    expected[0] += 0.7
    torch.testing.assert_close(counts, expected, atol=0.005, rtol=0)
    assert dropped.float().mean(dim=0).tolist() == pytest.approx([0.15] * 16, abs=0.01)
    assert torch.equal(drop_target_tokens(target, source, 0.0, generator), target)


def test_token_losses_weigh_the_edit_within_a_sample():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    tokens = torch.randint(7, (3, 5), generator=generator)
    edit_mask = torch.tensor([[True, False, False, False, False], [True] * 5, [False] * 5])
    surprises = [
        [-math.log(math.exp(row[token]) / sum(map(math.exp, row))) for row, token in zip(*sample, strict=True)]
        for sample in zip(logits.tolist(), tokens.tolist(), strict=True)
    ]
    means = [np.mean(sample) for sample in surprises]
    assert compute_token_losses(logits, tokens).tolist() == pytest.approx(means, rel=1e-5)
    edited = (6 * surprises[0][0] + sum(surprises[0][1:])) / 10
    expected = [edited, *means[1:]]
    assert compute_token_losses(logits, tokens, edit_mask, 6.0).tolist() == pytest.approx(expected, rel=1e-5)
    assert compute_token_losses(logits.bfloat16(), tokens).dtype == torch.float32


# A step


def build_token_batch(pipe, size=3):
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randint(NUM_CODES, (2, size, 16), generator=generator)
    text = pipe.processor(text=["make the red circle blue"] * size)
    return {"source_image_tokens": source, "target_image_tokens": target, **text}


@pytest.mark.parametrize("is_trained", [False, True])
def test_frozen_text_encoder_stays_without_dropout(is_trained):
    pipe = build_pipeline()
    pipe.text_encoder.requires_grad_(is_trained)
    TrainingStep(pipe.transformer, pipe.text_encoder, (4, 4)).eval().train()
    assert (pipe.transformer.training, pipe.text_encoder.training) == (True, is_trained)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:A prompt is longer")
def test_dropped_target_tokens_are_shown_as_the_sources_and_asked_for_all_the_same(pipe):
    batch = build_token_batch(pipe)
    inputs = draw_dropout(batch, seed=0, place=0, drops_conditioning=False, target_token_dropout=1.0)
    source, target = (batch[f"{name}_image_tokens"] for name in ("source", "target"))
    shown = inputs["batch"]["shown_image_tokens"]
    assert (shown != target).any()
    assert ((shown == source) | (shown == target)).all()

    losses = TrainingStep(pipe.transformer, pipe.text_encoder, (4, 4)).eval()(**inputs)
    prompt_embeds = pipe.text_encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    logits = pipe.transformer(source, prompt_embeds, target_image_tokens=shown).logits
    expected = F.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(dim=1)
    torch.testing.assert_close(losses["token_losses"], expected)
    torch.testing.assert_close(losses["loss"], expected.mean())


@pytest.mark.filterwarnings("ignore:A prompt is longer")
def test_draws_depend_on_the_seed_and_the_place_in_the_run_alone(pipe):
    batch = build_token_batch(pipe, size=64)
    draws = {}
    for seed, place in ((0, 0), (0, 1), (1, 0), (0, 0)):
        drawn = draw_dropout(batch, seed, place)
        assert drawn["batch"] is batch
        drops = torch.stack([drawn["drop_source"], drawn["drop_prompt"]])
        assert torch.equal(draws.setdefault((seed, place), drops), drops)
    assert len({tuple(drops.flatten().tolist()) for drops in draws.values()}) == 3


def test_steps_without_finite_loss_are_skipped_until_they_are_many(accelerator, tmp_path, capsys):
    guard = NonFiniteGuard(accelerator, tmp_path, max_steps=1)
    one, nan = torch.tensor(1.0), torch.tensor(math.nan)
    assert guard.admits(one, one)
    assert not guard.admits(nan, one)
    assert not guard.admits(one, torch.tensor(math.inf))
    guard.skip(3, [{"batch": {"input_ids": one}}])
    assert "step 3: skipped, because the loss or gradient is not finite" in capsys.readouterr().out
    with pytest.raises(FloatingPointError, match=r"2 steps .* `max_nonfinite_steps` 1 .*step-7-process-0\.pt"):
        guard.skip(7, [{"batch": {"input_ids": one}}])
    (saved,) = torch.load(tmp_path / "nonfinite-step-7-process-0.pt", weights_only=True)
    assert torch.equal(saved["batch"]["input_ids"], one)


def test_infinite_gradients_of_fp16_are_left_to_the_loss_scaler(accelerator, tmp_path):
    """The scaler skips the step and lowers its scale; only a loss that is not finite is the guard's business."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    guard = NonFiniteGuard(accelerator, tmp_path, max_steps=1)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    accelerator.scaler.scale((weight * 1e38).sum()).backward()
    norm = weight.grad.norm()
    assert norm.isinf()
    assert guard.admits(torch.tensor(1.0), norm)
    assert not guard.admits(torch.tensor(math.nan), norm)
    accelerator.scaler.step(optimizer)
    accelerator.scaler.update()
    assert torch.equal(weight.detach(), torch.ones(2))
    assert accelerator.scaler.get_scale() == 2.0**9


# The teacher


TEACHERS = {
    "dinov2": (Dinov2Config, Dinov2Model, {}),
    "registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel, {"num_register_tokens": 3}),
}


@pytest.fixture(scope="module", params=TEACHERS)
def teacher(request, tmp_path_factory):
    config_class, model_class, more = TEACHERS[request.param]
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 56, "image_size": 224}
    folder = tmp_path_factory.mktemp("teacher")
    redraw_weights(model_class(config_class(**sizes, **more)), scale=0.3).save_pretrained(folder)
    return DistillationTeacher(str(folder))


@torch.no_grad()
@pytest.mark.parametrize(("width", "height"), [(256, 256), (64, 64), (300, 400)])
def test_teacher_sees_the_picture_as_dinov2s_own_preprocessing_shows_it(teacher, width, height):
    smooth = draw_image(0, 4, 4).resize((width, height), Image.Resampling.BICUBIC)
    pixel_values = torch.from_numpy(np.array(smooth)).permute(2, 0, 1)[None] / 127.5 - 1
    seen = []
    hook = teacher.backbone.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["pixel_values"]), with_kwargs=True
    )
    features = teacher(pixel_values)
    hook.remove()

    scale = 256 / min(width, height)
    resized = smooth.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 224) // 2, (resized.height - 224) // 2
    pixels = np.asarray(resized.crop((left, top, left + 224, top + 224))) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    # PIL rounds to 8 bits on the way, once per direction.
    torch.testing.assert_close(seen[0], torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), rtol=0, atol=0.03)
    # The class token comes first, then any registers.
    states = teacher.backbone(seen[0]).last_hidden_state
    num_others = 4 if isinstance(teacher.backbone, Dinov2WithRegistersModel) else 1
    assert features.shape == (1, 16, 8)
    assert torch.equal(features, states[:, num_others:])
    assert not teacher.backbone.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_distillation_loss_is_the_mean_squared_error_to_what_the_teacher_sees_on_the_decoders_grid():
    generator = torch.Generator().manual_seed(0)
    features, seen = (torch.randn(2, 9, 5, generator=generator) for _ in range(2))
    expected = ((features.numpy() - seen.numpy()) ** 2).mean()
    assert compute_distillation_loss(features, seen, 3, 3).item() == pytest.approx(expected, rel=1e-5)
    seen = torch.randn(2, 4, 4, 5, generator=generator)
    # Halved bilinearly, each cell is the mean of those it covers.
    halves = seen.unflatten(1, (2, 2)).unflatten(3, (2, 2)).mean((2, 4))
    seen = seen.flatten(1, 2)
    assert compute_distillation_loss(halves.flatten(1, 2), seen, 2, 2).item() == pytest.approx(0, abs=1e-10)
    rows = torch.arange(4.0)[:, None].expand(4, 4).reshape(1, 16, 1)
    upright = torch.tensor([[0.5, 0.5, 0.5, 0.5], [2.5, 2.5, 2.5, 2.5]]).reshape(1, 8, 1)
    assert compute_distillation_loss(upright, rows, 2, 4).item() == pytest.approx(0, abs=1e-10)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:A prompt is longer")
def test_on_an_odd_grid_the_head_learns_the_cells_that_it_has(pipe):
    """Of 3×3 tokens, the head sees the first 2×2 as its one cell; bilinearly, that is the middle of the teacher's."""
    config = type(pipe.transformer.config)(**{**pipe.transformer.config.to_dict(), "distillation_hidden_size": 12})
    transformer = redraw_weights(EditARForConditionalGeneration(config), scale=0.3)
    batch = {name: t[:, :9] if "tokens" in name else t for name, t in build_token_batch(pipe).items()}
    seen = torch.randn(3, 4, 4, 12, generator=torch.Generator().manual_seed(0))
    step = TrainingStep(transformer, pipe.text_encoder, (3, 3)).eval()
    losses = step(batch, teacher_features=seen.flatten(1, 2))
    output = transformer(
        batch["source_image_tokens"],
        pipe.text_encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state,
        target_image_tokens=batch["target_image_tokens"],
        grid_height=3,
        grid_width=3,
        output_distillation_features=True,
    )
    expected = (output.distillation_features - seen[:, 1:3, 1:3].mean((1, 2))[:, None]).square().mean()
    torch.testing.assert_close(losses["distillation_loss"], expected)
    torch.testing.assert_close(losses["loss"], losses["token_loss"] + 0.5 * expected)


# The optimizer


def test_optimizer_is_the_published_one_and_spares_vectors():
    layer, frozen = nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False)
    optimizer = build_optimizer([*layer.parameters(), *frozen.parameters()])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [[p.shape for p in group["params"]] for group in optimizer.param_groups] == [[(2, 3)], [(2,)]]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"]) == (1e-4, (0.9, 0.95))
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight, before[0] * (1 - 1e-4 * 0.05), rtol=1e-7, atol=0)
    assert torch.equal(layer.bias, before[1])


def test_muon_gets_the_trained_matrices_of_hidden_layers_and_nothing_else(pipe):
    frozen = nn.Linear(2, 2).requires_grad_(False)
    module = nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    matrices, others = ([names[id(p)] for p in part] for part in split_hidden_matrices(nn.ModuleList([module, frozen])))
    assert sorted(matrices + others) == sorted(names.values())
    assert {name.split(".")[-2] for name in matrices} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2"),
        *("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    }
    kept = ("embed_tokens", "lm_head", "shared", "relative_attention_bias", "norm", "distillation_head")
    assert all(any(part in name for part in kept) for name in others)


def test_muon_steps_along_the_nearest_orthogonal_matrix_as_far_as_adamw_would():
    """By the singular vectors: every direction of the gradient moves alike, however strong it is."""
    weight = nn.Parameter(torch.zeros(48, 24))
    gradient = torch.randn(48, 24, generator=torch.Generator().manual_seed(0))
    weight.grad = gradient.clone()
    build_muon([weight], learning_rate=1e-2, weight_decay=0.0).step()
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    moved = torch.diagonal(left.T @ weight.detach() @ right.T)
    assert ((-moved > 0.6 * 0.2 * 1e-2 * 48**0.5) & (-moved < 1.3 * 0.2 * 1e-2 * 48**0.5)).all()
    # The size of AdamW's steps: root mean square 0.2 of the learning rate (arXiv 2502.16982, section 2.2).
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 1e-2, rel=0.2)


# Checkpoints


class Counter:
    """Something to checkpoint, whose saving can fail half way, as a kill would."""

    def __init__(self, value: int = 0, is_broken: bool = False):
        self.value, self.is_broken = value, is_broken

    def state_dict(self):
        if self.is_broken:
            raise KeyboardInterrupt
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


@pytest.fixture
def run(accelerator):
    """An accelerator with a layer and a counter to save, and the two."""
    layer, counter = nn.Linear(2, 2), Counter()
    accelerator.register_for_checkpointing(counter)
    return accelerator, accelerator.prepare(layer), counter


def list_names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_checkpoints_stay_and_what_is_none(run, tmp_path):
    others = ["checkpoint-5-copy", "checkpoint-best"]
    for name in (*others, "unfinished-checkpoint-6"):  # The last one is what a kill left at another step.
        (tmp_path / name).mkdir()
    for step in (5, 100, 20):
        save_checkpoint(run[0], tmp_path, step, total_limit=3)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-20", "checkpoint-100"]
    save_checkpoint(run[0], tmp_path, 120, total_limit=2)
    assert list_names(tmp_path) == ["checkpoint-100", "checkpoint-120", *others]


def test_loading_restores_the_latest_or_the_named_checkpoint(run, tmp_path):
    accelerator, layer, counter = run
    assert load_checkpoint(accelerator, tmp_path, "latest") == 0
    weights = {}
    for step in (3, 12):
        with torch.no_grad():
            layer.weight.fill_(step)
        counter.value, weights[step] = step, layer.weight.detach().clone()
        save_checkpoint(accelerator, tmp_path, step, total_limit=2)
    for name, step in (("latest", 12), ("checkpoint-3", 3)):
        assert load_checkpoint(accelerator, tmp_path, name) == step
        assert counter.value == step
        assert torch.equal(layer.weight, weights[step])
    # The other one is kept under another name.
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` is 'checkpoint-4'.*: checkpoint-3\."):
        load_checkpoint(accelerator, tmp_path, "checkpoint-4")


def test_a_run_that_goes_on_from_an_earlier_checkpoint_keeps_its_own_and_loses_no_later_one(run, tmp_path):
    accelerator, _, counter = run
    for step in (3, 12):
        save_checkpoint(accelerator, tmp_path, step, total_limit=2)
    load_checkpoint(accelerator, tmp_path, "checkpoint-3")
    for step in (4, 5):
        counter.value = step
        save_checkpoint(accelerator, tmp_path, step, total_limit=1)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-5"]
    assert load_checkpoint(accelerator, tmp_path, "latest") == 5
    (aside,) = tmp_path.glob("checkpoint-12-set-aside-*")
    assert list(aside.iterdir())


def test_kill_while_saving_leaves_the_previous_checkpoint_and_is_overwritten_by_the_next(run, tmp_path):
    accelerator, _, counter = run
    counter.value = 1
    save_checkpoint(accelerator, tmp_path, 1, total_limit=1)
    counter.value, counter.is_broken = 2, True
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(accelerator, tmp_path, 2, total_limit=1)
    assert list_names(tmp_path) == ["checkpoint-1", "unfinished-checkpoint-2"]
    assert load_checkpoint(accelerator, tmp_path, "latest") == 1
    assert counter.value == 1
    counter.value, counter.is_broken = 2, False
    save_checkpoint(accelerator, tmp_path, 2, total_limit=1)
    assert list_names(tmp_path) == ["checkpoint-2"]
    counter.value = 0
    assert load_checkpoint(accelerator, tmp_path, "latest") == 2
    assert counter.value == 2


# Logs and pictures


def build_losses(*token_losses):
    token_losses = torch.tensor(token_losses)
    return {"token_losses": token_losses, "loss": token_losses.mean().requires_grad_()}


def test_log_prints_means_since_the_last_line(accelerator, capsys):
    log = LossLog(accelerator, num_steps=2)
    for losses, step in (((1.0, 2.0), 1), ((4.0,), 2)):
        for loss in losses:
            log.add(build_losses(loss), batch_size=8, tokens_per_sample=9, task=["edit"])
        log.log(step, learning_rate=0.25, nonfinite_steps=step)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(", samples")[0] for line in lines] == [
        "step 1: loss 1.5, learning_rate 0.25, nonfinite_steps 1",
        "step 2: loss 4, learning_rate 0.25, nonfinite_steps 2",
    ]
    for line in lines:
        figures = {name: float(figure) for name, figure in (part.split() for part in line.split(": ")[1].split(", "))}
        assert figures["tokens_per_second"] == pytest.approx(9 * figures["samples_per_second"], rel=1e-3)
        assert 0.01 < figures["memory_gib"] < 100


def test_log_tells_tasks_and_datasets_apart(accelerator, capsys):
    log = LossLog(accelerator, num_steps=2)
    log.add(build_losses(1.0, 2.0, 6.0), 3, 9, task=["edit", "depth", "depth"], dataset=["a", "a", "b"])
    log.add(build_losses(3.0, 4.0, 5.0), 3, 9, task=["edit", "edit", "edit"], dataset=["a", "b", "b"])
    log.log(1, learning_rate=0.25)
    line = capsys.readouterr().out
    assert "token_loss/task/depth 4, token_loss/task/edit 3.25" in line
    assert "token_loss/dataset/a 2, token_loss/dataset/b 5" in line
    log.add(build_losses(1.0), 1, 9, task=["edit"], dataset=["a"])
    log.log(2, learning_rate=0.25)
    assert "token_loss/" not in capsys.readouterr().out


def test_many_epochs_are_remarked_upon(accelerator, capsys):
    for num_steps, is_remarked in ((1000, False), (40000, True)):
        print_banner(accelerator, {}, nn.Linear(2, 2), 0, num_steps, samples_per_step=64, num_samples=640)
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith(f"{num_steps:,} steps are {num_steps / 10:,.1f} epochs.")
        assert ("memorizes a small data set" in line and "1,000 steps are 100 epochs" in line) == is_remarked


def test_time_limit_stops_a_run(accelerator):
    now = time.monotonic()
    limits = ((math.inf, 600), (1, 600), (1, 0), (0, 0.1))
    assert [is_out_of_time(accelerator, now - age, limit) for limit, age in limits] == [False, True, False, True]


@pytest.mark.parametrize(("height", "width"), [(None, None), (8, 12)])
def test_validation_pictures_are_source_edit_and_target(pipe, height, width):
    tall, wide = height or 16, width or 16
    pictures = [draw_image(k, wide, tall) for k in range(4)]
    size = {"height": height, "width": width}
    batch = {
        "source_image_tokens": pipe.encode_image(pictures[:2], **size),
        "target_image_tokens": pipe.encode_image(pictures[2:], **size),
        **pipe.processor(text=["make it blue", "remove it"]),
        "grid": (tall // STRIDE, wide // STRIDE),
    }
    sheets = [draw_validation_images(pipe, batch, 5) for _ in range(2)]
    assert np.array_equal(*map(np.asarray, sheets))
    edited = pipe(
        ["make it blue", "remove it"],
        source_image_tokens=batch["source_image_tokens"],
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        **size,
    ).images
    sides = [pipe.decode_image_tokens(batch[f"{name}_image_tokens"], **size) for name in ("source", "target")]
    assert sheets[0].size == (3 * (wide + 4) + 4, 2 * (tall + 4) + 4)
    for column, column_pictures in enumerate((sides[0], edited, sides[1])):
        for row, picture in enumerate(column_pictures):
            left, top = 4 + column * (wide + 4), 4 + row * (tall + 4)
            shown = sheets[0].crop((left, top, left + wide, top + tall))
            assert np.array_equal(np.asarray(shown), np.asarray(picture))


# The card


def test_card_quotes_the_command_as_a_shell_reads_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_editar.py", "--dataset", "two words"])
    assert "```\naccelerate launch train_editar.py --dataset 'two words'\n```" in describe_command()
