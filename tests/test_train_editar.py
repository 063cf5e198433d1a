"""`examples/train_editar.py`, run at tiny size: what it writes, that it resumes bit for bit, and what it refuses."""

import functools
import json
import runpy
import shutil
import time
from importlib import metadata
from pathlib import Path

import datasets
import psutil
import pytest
import torch
import torch.nn.functional as F
import yaml
from hub_server import HubServer, Repository
from PIL import Image
from processes import read_launch_environment, start_ranks
from safetensors.torch import load_file
from scripts import (
    EXAMPLES,
    TEACHER_WIDTH,
    TOKEN_RESOLUTION,
    list_words,
    load_weights,
    name_changed,
    read_figures,
    reset_accelerate,
    run_script,
    write_teacher,
)
from tiny import NUM_CODES, NUM_TEXT_TOKENS, TEXT_HIDDEN_SIZE, are_near, draw_image, needs_compiler, write_pairs
from torch._dynamo.utils import counters
from transformers import HfArgumentParser

from editar_hf import EditARPipeline
from editar_hf.training.arguments import TrainingArguments
from editar_hf.training.distillation import DistillationTeacher


# The tiny text length cuts most prompts, with a warning each.
pytestmark = pytest.mark.filterwarnings("ignore:A prompt is longer")
KINDS = {
    "whole": ("--train_text_encoder",),
    "muon": ("--train_text_encoder", "--optimizer", "muon", "--muon_learning_rate", "0.01"),
    "lora": ("--lora_rank", "3", "--lora_alpha", "6", "--lora_modules_to_save", "text_projection"),
}


@pytest.fixture(scope="module")
def train_on_tokens(editor, tokens, pictures):
    """Take four steps of two batches each, one and a half steps to an epoch; return what was printed."""

    def train(folder, kind, *words):
        options = {"model": editor, "dataset": tokens, "validation_dataset": pictures, "output_dir": folder}
        options |= {"resolution": TOKEN_RESOLUTION, "edit_region_weight": 4, "batch_size": 4, "max_train_steps": 4}
        options |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "lr_warmup_steps": 3, "logging_steps": 1}
        options |= {"checkpointing_steps": 2, "validation_steps": 3, "num_validation_images": 3}
        return run_script("train_editar.py", *KINDS[kind], *words, **options)

    return train


@pytest.fixture(scope="module")
def get_run(train_on_tokens, tmp_path_factory):
    """Give the folder of an uninterrupted run of a kind, and what it printed; each kind is trained once."""
    parent = tmp_path_factory.mktemp("runs")
    return functools.cache(lambda kind: (parent / kind, train_on_tokens(parent / kind, kind)))


@pytest.fixture
def train(run_here, capsys, tmp_path):
    """Train in this process, in `tmp_path / name`, and return the figures that were printed."""

    def run(name, *words, **options):
        defaults = {"output_dir": tmp_path / name, "resolution": TOKEN_RESOLUTION, "batch_size": 4}
        defaults |= {"max_train_steps": 3, "learning_rate": 1e-3, "logging_steps": 1}
        capsys.readouterr()
        run_here("train_editar.py", *words, **(defaults | options))
        reset_accelerate()
        return read_figures(capsys.readouterr().out)

    return run


def test_training_writes_checkpoints_pictures_and_a_pipeline(get_run, editor):
    folder, printed = get_run("whole")
    names = {"checkpoint-2", "checkpoint-4", "validation", "pipeline", "metrics.jsonl"}
    assert {path.name for path in folder.iterdir()} == names
    assert name_changed(editor, folder / "pipeline") == {"transformer", "text_encoder"}
    # Nobody asked for distillation.
    heads = [load_weights(path)["transformer.distillation_head.weight"] for path in (editor, folder / "pipeline")]
    assert torch.equal(*heads)
    pipeline = EditARPipeline.from_pretrained(folder / "pipeline")
    assert pipeline("make it blue", image=Image.new("RGB", (16, 16))).images[0].size == (16, 16)
    assert "attn_implementation" not in (folder / "pipeline" / "transformer" / "config.json").read_text()
    figures = read_figures(printed)
    assert list(figures) == [1, 2, 3, 4]
    assert [figures[step]["learning_rate"] for step in figures] == ["0.003333", "0.006667", "0.01", "0.01"]
    assert ["validation_loss" in figures[step] for step in figures] == [False, False, True, False]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [f"{line['loss']:.4g}" for line in lines if "loss" in line] == [figures[step]["loss"] for step in figures]


def test_a_run_begins_with_what_it_is(get_run, editor, tokens):
    banner = get_run("whole")[1].partition("Training\n")[2].partition("\nstep 1: ")[0].splitlines()
    facts = dict(line.strip().split(maxsplit=1) for line in banner if line.startswith("  "))
    assert facts["model"] == str(editor)
    assert facts["data"] == str(tokens)
    assert (facts["samples"], facts["steps"]) == ("12", "0 to 4, each of 8 samples")
    pipeline = EditARPipeline.from_pretrained(editor)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (pipeline.transformer, pipeline.text_encoder)]
    head = sum(p.numel() for p in pipeline.transformer.distillation_head.parameters())
    assert facts["trained"] == f"{sum(sizes) - head:,} of {sum(sizes):,} parameters"
    assert banner[-1] == "4 steps are 2.7 epochs."


@pytest.mark.parametrize(("instructions", "is_slow"), [(["avx2"], True), (["avx2", "avx512_bf16"], False)])
def test_muon_warns_where_it_is_slow(editor, tokens, train, on_cpu, monkeypatch, caplog, instructions, is_slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
    train("muon", *KINDS["muon"], model=editor, dataset=tokens, max_train_steps=1)
    assert ("This CPU has no instructions for bfloat16, so steps are many times slower" in caplog.text) == is_slow


@pytest.mark.parametrize("name", ["train_editar.py", "train_vq.py", "precompute_tokens.py"])
def test_help_describes_every_option_with_its_default(name):
    parser = HfArgumentParser(runpy.run_path(str(EXAMPLES / name)).get("Arguments", TrainingArguments))
    assert all(action.help for action in parser._actions)
    assert "(default: 64)" in parser.format_help()


def test_the_first_step_is_logged_and_counts_in_the_first_means(editor, tokens, train):
    alone, joined = (train(str(k), model=editor, dataset=tokens, logging_steps=k) for k in (1, 3))
    assert list(joined) == [1, 3]
    assert joined[1] == alone[1]
    mean = sum(float(alone[step]["loss"]) for step in (1, 2, 3)) / 3
    assert float(joined[3]["loss"]) == pytest.approx(mean, rel=1e-3)


def test_card_says_what_the_pipeline_was_trained_on_and_how(get_run, tokens, editor):
    folder = get_run("whole")[0] / "pipeline"
    card = (folder / "README.md").read_text()
    assert f"Trained from `{editor}` on `{tokens}`, 12 pairs, for 4 steps of 8 pairs." in card
    assert "the text encoder was trained too" in card
    header = yaml.safe_load(card.split("---")[1])
    assert not {"datasets", "base_model"} & set(header)  # they are folders
    assert f"train_editar.py --model {editor} --dataset {tokens} " in card.replace("\n", " ")
    assert f"torch {metadata.version('torch')}" in card
    assert f'from_pretrained("{folder}")' in card


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, get_run, train_on_tokens, tmp_path):
    """From the middle of an epoch, with dropout, and beside what a kill has left."""
    folder, printed = get_run(kind)
    run = tmp_path / "run"
    shutil.copytree(folder / "checkpoint-2", run / "checkpoint-2")
    (run / "unfinished-checkpoint-4").mkdir()
    (run / "unfinished-checkpoint-4" / "model.safetensors").write_bytes(b"half a file")
    resumed = train_on_tokens(run, kind, "--resume_from_checkpoint", "latest")
    straight_figures, figures = read_figures(printed), read_figures(resumed)
    assert figures == {step: straight_figures[step] for step in (3, 4)}
    assert not list(run.glob("unfinished-*"))
    # The weights of the checkpoints, and of an adapter.
    assert not name_changed(folder, run)
    for file in (folder / "checkpoint-4").glob("optimizer*.bin"):
        moments = [torch.load(run / "checkpoint-4" / file.name, weights_only=True)["state"] for run in (folder, run)]
        for index, state in moments[0].items():
            assert all(torch.equal(tensor, moments[1][index][name]) for name, tensor in state.items())


def test_images_of_several_aspect_ratios_are_trained_and_a_resumed_run_is_the_same(train, editor, tmp_path):
    sides = {"train": [(16, 16), (24, 16), (24, 16), (16, 24)] * 2, "validation": [(24, 16)] * 2 + [(16, 16)]}
    for split, sizes in sides.items():
        (tmp_path / "pairs" / split).mkdir(parents=True)
        lines = []
        for index, size in enumerate(sizes):
            row = {"prompt": "make it blue", "source_image_file_name": f"{index}-a.png"}
            row["target_image_file_name"] = f"{index}-b.png"
            draw_image(index, *size).save(tmp_path / "pairs" / split / f"{index}-a.png")
            draw_image(100 + index, *size).save(tmp_path / "pairs" / split / f"{index}-b.png")
            lines.append(json.dumps(row))
        (tmp_path / "pairs" / split / "metadata.jsonl").write_text("\n".join(lines))
    words = ("--aspect_ratios", "1:1", "3:2", "2:3")
    pairs = tmp_path / "pairs"
    options = {"model": editor, "dataset": pairs, "validation_dataset": pairs, "batch_size": 2, "max_train_steps": 6}
    options |= {"checkpointing_steps": 3, "validation_steps": 3, "resolution": 16, "resize_mode": "stretch"}
    straight = train("straight", *words, **options)
    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = train("resumed", *words, resume_from_checkpoint="latest", **options)
    assert resumed == {step: straight[step] for step in (4, 5, 6)}
    assert not name_changed(tmp_path / "straight" / "pipeline", tmp_path / "resumed" / "pipeline")
    pipeline = EditARPipeline.from_pretrained(tmp_path / "straight" / "pipeline")
    assert pipeline("make it blue", image=Image.new("RGB", (60, 40))).image_tokens.shape == (1, 12)
    # The sheet shows the first held-out pairs, 16×12 pixels each.
    sheet = Image.open(tmp_path / "straight" / "validation" / "step-0000006.png")
    assert sheet.size == (3 * (16 + 4) + 4, 2 * (12 + 4) + 4)
    # An adapter holds no setting of the pipeline, so its card says what to pass.
    train("adapter", *words, **options | {"max_train_steps": 1, "lora_rank": 2})
    card = (tmp_path / "adapter" / "adapter" / "README.md").read_text()
    assert 'at the aspect ratios 1:1, 3:2, 2:3. Pass `aspect="source"`' in card


@pytest.fixture(scope="module")
def recipe(pictures, tmp_path_factory) -> Path:
    """Two data sets: the pairs at hand, and as many again streamed from the shards of a Hub data set.

    The pairs that are streamed come from the repository `tester/streamed`, of which the fixture is the folder.
    """
    folder = tmp_path_factory.mktemp("mixed")
    pairs = datasets.Dataset.from_parquet(str(pictures / "train-00000-of-00001.parquet"))
    for index in range(4):
        pairs.shard(4, index).to_parquet(folder / f"train-{index:05d}-of-00004.parquet")
    specs = [
        {"dataset": str(pictures), "name": "at hand"},
        {"dataset": "tester/streamed", "name": "streamed", "probability": 2.0},
    ]
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"datasets": specs}))
    return folder


def train_on_recipe(editor, recipe, folder, environment, *words: str, kill_at: str | None = None) -> str:
    """Train in two processes with two workers each.

    With `kill_at`, they are killed by SIGKILL as soon as that checkpoint is there.
    """
    options = {"model": editor, "recipe": recipe / "recipe.yaml", "output_dir": folder, "resolution": TOKEN_RESOLUTION}
    options |= {"batch_size": 2, "num_workers": 2, "max_train_steps": 6, "checkpointing_steps": 3, "logging_steps": 1}
    command = [EXAMPLES / "train_editar.py", "--ema_decay", "0.9", *list_words(options), *words]
    processes = start_ranks(2, *command, environment=environment)
    while kill_at is not None and not (folder / kill_at).exists():
        assert all(process.is_running() for process in processes), processes[0].read("stderr")
        time.sleep(0.01)
    if kill_at is not None:
        for process in processes:
            for part in [*psutil.Process(process.pid).children(recursive=True), process]:
                part.kill()
    finished = [process.wait() for process in processes]
    assert kill_at is not None or not any(one.returncode for one in finished), finished[0].stderr
    return finished[0].stdout


def test_killed_run_of_two_processes_on_mixed_streams_goes_on_bit_for_bit(editor, recipe, tmp_path):
    with HubServer() as hub:
        repository = hub.repositories["datasets/tester/streamed"] = Repository()
        repository.commit({file.name: file.read_bytes() for file in recipe.glob("*.parquet")})
        environment = {**hub.get_environment(recipe / "home"), "ACCELERATE_USE_CPU": "true"}
        # By the configuration for GPUs.
        config = EXAMPLES / "accelerate_configs" / "ddp.yaml"
        environment = read_launch_environment(config, environment, tmp_path)
        printed = train_on_recipe(editor, recipe, tmp_path / "straight", environment)
        train_on_recipe(editor, recipe, tmp_path / "killed", environment, kill_at="checkpoint-3")
        assert not (tmp_path / "killed" / "pipeline").exists()
        words = ("--resume_from_checkpoint", "checkpoint-3")
        resumed = train_on_recipe(editor, recipe, tmp_path / "killed", environment, *words)
    straight = read_figures(printed)
    assert list(straight) == [1, 2, 3, 4, 5, 6]
    assert any("token_loss/dataset/streamed" in figures for figures in straight.values())
    assert read_figures(resumed) == {step: straight[step] for step in (4, 5, 6)}
    for name in ("pipeline", "pipeline-ema"):
        assert not name_changed(tmp_path / "straight" / name, tmp_path / "killed" / name)
    assert name_changed(tmp_path / "straight" / "pipeline", tmp_path / "straight" / "pipeline-ema") == {"transformer"}


def test_tokens_and_text_states_made_in_advance_train_as_the_pictures_do(
    calm_editor, pictures, tokens, tmp_path, run_here, train
):
    options = {"dataset": pictures, "pipeline": calm_editor, "resolution": TOKEN_RESOLUTION}
    run_here("precompute_tokens.py", output_dir=tmp_path / "states", **options)
    reset_accelerate()
    options = {"model": calm_editor, "edit_region_weight": 3, "max_train_steps": 4, "learning_rate": 1e-2}
    datasets = {"pictures": pictures, "tokens": tokens, "text states": tmp_path / "states"}
    figures = {name: train(name, dataset=dataset, **options) for name, dataset in datasets.items()}
    assert list(figures["pictures"]) == [1, 2, 3, 4]
    assert figures["pictures"] == figures["tokens"]
    assert not name_changed(tmp_path / "pictures" / "pipeline", tmp_path / "tokens" / "pipeline")
    # In other batches the text encoder rounds otherwise.
    for step, expected in figures["pictures"].items():
        found = {name: float(figure) for name, figure in figures["text states"][step].items()}
        assert found == pytest.approx({name: float(figure) for name, figure in expected.items()}, rel=2e-3)
    before, after = (load_weights(tmp_path / name / "pipeline") for name in ("pictures", "text states"))
    assert all(torch.allclose(before[name], after[name], atol=1e-4) for name in before)


def test_four_accumulated_batches_are_one_of_four_times_the_size(calm_editor, tokens, tmp_path, train):
    before, changes, figures = load_weights(calm_editor), [], []
    for size, accumulated in ((4, 1), (1, 4)):
        options = {"batch_size": size, "gradient_accumulation_steps": accumulated, "edit_region_weight": 3}
        figures.append(train(str(size), "--no_conditioning_dropout", model=calm_editor, dataset=tokens, **options))
        after = load_weights(tmp_path / str(size) / "pipeline")
        changes.append(torch.cat([(after[name] - before[name]).flatten() for name in sorted(before)]))
    assert changes[0].norm() > 0
    assert (changes[1] - changes[0]).norm() < 1e-3 * changes[0].norm()
    losses = [[float(run[step]["loss"]) for step in (1, 2, 3)] for run in figures]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_mixed_precision_and_recomputed_activations_train_as_float32_does(
    calm_editor, tokens, pictures, tmp_path, train
):
    """And validate before there is a checkpoint."""
    options = {"model": calm_editor, "dataset": tokens, "validation_dataset": pictures}
    options |= {"validation_steps": 1, "num_validation_images": 1}
    words = {"float32": (), "bf16": ("--mixed_precision", "bf16", "--gradient_checkpointing")}
    figures = [train(name, *more, **options) for name, more in words.items()]
    names = [(step, name) for step in (1, 2, 3) for name in ("loss", "validation_loss")]
    losses = [[float(run[step][name]) for step, name in names] for run in figures]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
    weights = load_weights(tmp_path / "bf16" / "pipeline")
    assert {tensor.dtype for name, tensor in weights.items() if "transformer" in name} == {torch.float32}


@needs_compiler
def test_compiled_step_trains_as_the_uncompiled_one_does(calm_editor, tokens, tmp_path, train):
    losses = []
    for name, words in (("plain", ()), ("compiled", ("--compile",))):
        torch._dynamo.reset()
        counters.clear()
        figures = train(name, *words, model=calm_editor, dataset=tokens)
        losses.append([float(figures[step]["loss"]) for step in (1, 2, 3)])
        assert bool(counters["stats"]["calls_captured"]) == (name == "compiled")
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    before, after = (load_weights(tmp_path / name / "pipeline") for name in ("plain", "compiled"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-4) for name in before)


def test_lora_run_writes_an_adapter_that_makes_the_base_the_trained_model(get_run, editor):
    folder = get_run("lora")[0]
    assert not (folder / "pipeline").exists()
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md", "validation.png"}
    assert {path.name for path in (folder / "adapter").iterdir()} == names
    pipeline = EditARPipeline.from_pretrained(editor)
    before = pipeline.transformer.state_dict()
    pipeline.load_lora_weights(folder / "adapter")
    trained = {n: t for n, t in load_file(folder / "checkpoint-4" / "model.safetensors").items() if "lora_" in n}
    loaded = pipeline.transformer.state_dict()
    assert len(trained) == 2 * 7 * pipeline.transformer.config.num_hidden_layers
    for name, tensor in trained.items():
        assert torch.equal(loaded[name.removeprefix("transformer.").replace(".default.", ".default_0.")], tensor)
    assert all(tensor.any() for name, tensor in trained.items() if "lora_B" in name)
    # What is adapted, and what is replaced, stays beside its successor as it was.
    base = {name.replace(".base_layer.", ".").replace(".original_module.", "."): t for name, t in loaded.items()}
    assert all(torch.equal(base[name], tensor) for name, tensor in before.items())
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(editor), 3, 6)
    card = (folder / "adapter" / "README.md").read_text()
    assert f'from_pretrained("{editor}")\npipe.load_lora_weights("{folder / "adapter"}")' in card
    assert "12 pairs, for 4 steps of 8 pairs" in card


@pytest.fixture(scope="module")
def distilling_run(calm_editor, tmp_path_factory):
    """Take one step on all pairs of a Hub data set under its own column names, validated on an image folder.

    The folder, what was printed, the rows and the teacher.
    """
    folder = tmp_path_factory.mktemp("distilling")
    names = ("before", "after", "instruction")
    prompts = ["make the red circle blue", "remove the green square", "make it blue", "remove it"]
    write_pairs(folder / "pairs.parquet", columns=names, instruction=prompts, unrelated=["x"] * 4)
    rows = datasets.Dataset.from_parquet(str(folder / "pairs.parquet"))[:]
    (folder / "held-out").mkdir()
    lines = []
    for index in range(2):
        for name in ("before", "after"):
            rows[name][index].save(folder / "held-out" / f"{name}-{index}.png")
        line = {f"{name}_file_name": f"{name}-{index}.png" for name in ("before", "after")}
        lines.append(json.dumps({**line, "instruction": prompts[index]}))
    (folder / "held-out" / "metadata.jsonl").write_text("\n".join(lines))
    write_teacher(folder / "teacher")
    options = {"model": calm_editor, "dataset": "tester/pairs", "validation_dataset": folder / "held-out"}
    options |= dict(zip(("source_image_column", "target_image_column", "prompt_column"), names, strict=True))
    options |= {"distillation_model": folder / "teacher", "distillation_loss_weight": 0.25, "output_dir": folder}
    options |= {"batch_size": 4, "max_train_steps": 1, "validation_steps": 1, "logging_steps": 1}
    with HubServer() as hub:
        repository = hub.repositories["datasets/tester/pairs"] = Repository()
        repository.commit({"train-00000-of-00001.parquet": (folder / "pairs.parquet").read_bytes()})
        environment = hub.get_environment(folder / "home")
        printed = run_script("train_editar.py", "--no_conditioning_dropout", environment=environment, **options)
    return folder, {name: float(figure) for name, figure in read_figures(printed)[1].items()}, rows


def test_distilling_run_trains_the_decoder_alone(distilling_run, calm_editor):
    folder = distilling_run[0] / "pipeline"
    assert name_changed(calm_editor, folder) == {"transformer"}
    heads = [load_weights(path)["transformer.distillation_head.weight"] for path in (calm_editor, folder)]
    assert not torch.equal(*heads)
    card = (folder / "README.md").read_text()
    header = card.split("---")[1]
    assert "tester/pairs" in header
    assert "base_model" not in header  # it is a folder
    assert "text encoder were frozen" in card


@torch.no_grad()
def test_losses_of_a_step_are_cross_entropy_and_distance_to_the_teacher(distilling_run, calm_editor):
    folder, figures, rows = distilling_run
    pipeline = EditARPipeline.from_pretrained(calm_editor)
    source, target = (pipeline.encode_image(rows[name]) for name in ("before", "after"))
    output = pipeline.transformer(
        source, pipeline.encode_prompt(rows["instruction"]), labels=target, output_distillation_features=True
    )
    target_pixel_values = pipeline.processor(images=rows["after"]).source_pixel_values
    seen = DistillationTeacher(str(folder / "teacher"))(target_pixel_values).view(4, 4, 4, TEACHER_WIDTH)
    # Four cells meet where bilinear resizing from 4×4 to 2×2 looks.
    seen = seen.unflatten(1, (2, 2)).unflatten(3, (2, 2)).mean((2, 4)).flatten(1, 2)
    distillation_loss = (output.distillation_features - seen).square().mean()
    assert figures["token_loss"] == pytest.approx(output.loss.item(), rel=1e-3)
    assert figures["distillation_loss"] == pytest.approx(distillation_loss.item(), rel=1e-3)
    assert figures["loss"] == pytest.approx((output.loss + 0.25 * distillation_loss).item(), rel=1e-3)


@torch.no_grad()
def test_validation_loss_is_that_of_the_held_out_pairs(distilling_run):
    folder, figures, rows = distilling_run
    pipeline = EditARPipeline.from_pretrained(folder / "pipeline")
    source, target = (pipeline.encode_image(rows[name][:2]) for name in ("before", "after"))
    logits = pipeline.transformer(source, pipeline.encode_prompt(rows["instruction"][:2]), labels=target).logits
    expected = F.nll_loss(logits.log_softmax(-1).flatten(0, 1), target.flatten()).item()
    assert figures["validation_loss"] == pytest.approx(expected, rel=1e-3)
    # Rows of source, edited and target, with gaps of 4 pixels.
    with Image.open(folder / "validation" / "step-0000001.png") as sheet:
        assert sheet.size == (3 * 20 + 4, 2 * 20 + 4)
        assert are_near(sheet.crop((4, 24, 20, 40)), pipeline.decode_image_tokens(source)[1])


@pytest.fixture(scope="module")
def refused(tokens, editor, sticker_editor, get_run, tmp_path_factory) -> dict[str, Path]:
    """Folders that training refuses: tokens of a VQ model with more codes than the editor knows, text states, …"""
    folder = tmp_path_factory.mktemp("refused")
    rows = {"source_image_tokens": [[0, 1, 2, NUM_CODES]] * 4, "prompt": ["make it blue"] * 4}
    rows["target_image_tokens"] = rows["source_image_tokens"]
    datasets.Dataset.from_dict(rows).to_parquet(folder / "foreign.parquet")
    rows["prompt_embeds"] = [bytes(4 * NUM_TEXT_TOKENS * TEXT_HIDDEN_SIZE)] * 4
    datasets.Dataset.from_dict(rows).to_parquet(folder / "states.parquet")
    write_teacher(folder / "teacher", width=2 * TEACHER_WIDTH)
    folders = {"foreign": folder / "foreign.parquet", "states": folder / "states.parquet"}
    folders |= {"teacher": folder / "teacher", "tokens": tokens, "editor": editor, "sticker_editor": sticker_editor}
    return folders | {"run": get_run("whole")[0]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_column": "caption"}, r"lacks caption; it has .*source_image.*prompt"),
        ({"validation_dataset": "nowhere/at-all"}, "`dataset` 'nowhere/at-all' does not load"),
        ({"validation_dataset": "{foreign}", "resolution": 8}, f"`source_image_tokens` runs from 0 to {NUM_CODES}"),
        ({"dataset": "{tokens}"}, "`source_image_tokens` does not hold 16 tokens"),
        ({"dataset": "{foreign}", "resolution": 8}, f"codes 0 to {NUM_CODES - 1}"),
        (
            {"dataset": "{states}", "train_text_encoder": True},
            "`train_text_encoder`: `dataset` holds precomputed text states",
        ),
        ({"resolution": 10}, "`resolution` is 10: .*multiple of 4"),
        ({"resolution": 20}, "`resolution` is 20: .* pass a multiple of 4 from 4 to 16"),
        ({"num_workers": 13}, "`num_workers` is 13. Use fewer processes or workers"),
        # With a model that does not load, to see that these are refused earlier.
        ({"recipe": "recipe.yaml", "model": "{editor}/vq_model"}, "Give either `dataset` or `recipe`"),
        ({"resize_mode": "pad", "model": "{editor}/vq_model"}, "`resize_mode` is 'pad'; choose one of 'crop'"),
        ({"lr_scheduler": "step", "model": "{editor}/vq_model"}, "`lr_scheduler` is 'step'; choose one of 'linear'"),
        ({"ema_decay": 1}, r"`ema_decay` is 1\.0"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "`resume_from_checkpoint` is 'checkpoint-7'"),
        ({"output_dir": "{run}"}, "holds checkpoint-4; pass `--resume-from-checkpoint latest`"),
        ({"distillation_model": "{editor}/text_encoder"}, "has type 't5'"),
        (
            {"distillation_model": "{teacher}"},
            f"features of width {2 * TEACHER_WIDTH}, .* `distillation_hidden_size` .* is {TEACHER_WIDTH};",
        ),
        ({"dataset": "{tokens}", "resolution": 8, "distillation_model": "unread"}, "`distillation_model` needs images"),
        ({"model": "{sticker_editor}", "distillation_model": "{teacher}"}, "`distillation_hidden_size` .* is None;"),
        ({"model": "{editor}/vq_model"}, "model_index.json"),
        ({"lora_rank": 0}, "`r` should be a positive integer"),
        ({"lora_rank": 4, "lora_target_modules": "query"}, "`target_modules` names query; the decoder has .*q_proj"),
        ({"lora_rank": 4, "lora_modules_to_save": "head"}, "`modules_to_save` names head; the decoder has .*lm_head"),
        ({"lora_rank": 4, "train_text_encoder": True}, "`train_text_encoder` and `lora_rank`"),
    ],
)
def test_training_refuses(options, message, refused, editor, pictures, tmp_path, run_here):
    options = {n: value.format(**refused) if isinstance(value, str) else value for n, value in options.items()}
    defaults = {"model": editor, "dataset": pictures, "output_dir": tmp_path / "run", "batch_size": 4}
    with pytest.raises(ValueError, match=message):
        run_here("train_editar.py", **(defaults | options))
    assert not list(tmp_path.glob("run/*checkpoint-*"))
    assert not (tmp_path / "run" / "pipeline").exists()


def test_another_number_of_workers_cannot_resume(get_run, editor, tokens, tmp_path, train):
    shutil.copytree(get_run("whole")[0] / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    options = {"model": editor, "dataset": tokens, "resume_from_checkpoint": "latest", "num_workers": 2}
    with pytest.raises(ValueError, match=r"no dataloader-\S+with-2-workers\.pt; it has \S+with-0-.* `num_workers`"):
        train("run", "--train_text_encoder", **options)
