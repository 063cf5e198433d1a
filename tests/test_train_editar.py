"""`examples/train_editar.py`, run at tiny size: what it writes, that it resumes bit for bit, and what it refuses."""

import contextlib
import json
import os
import runpy
import shutil
import signal
import time
from importlib import metadata
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from hub_server import HubServer, Repository
from PIL import Image
from processes import PythonProcess, read_launch_environment, start_ranks
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
from tiny import NUM_CODES, STRIDE, are_near, draw_image, needs_compiler, redraw_weights
from torch._dynamo.utils import counters
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, HfArgumentParser

from editar_hf import EditARForConditionalGeneration, EditARPipeline
from editar_hf.training.arguments import TrainingArguments
from editar_hf.training.checkpoints import list_checkpoints
from editar_hf.training.distillation import DistillationTeacher, prepare_teacher_pixels
from editar_hf.training.logs import print_epochs


# The tiny text length cuts most prompts, with a warning each.
pytestmark = pytest.mark.filterwarnings("ignore:A prompt is longer")


@pytest.fixture(scope="module")
def straight_run(editor, tokens, pictures, tmp_path_factory) -> tuple[Path, str]:
    """Four steps of two batches each, one and a half steps to an epoch; the folder, and what was printed."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, train_on_tokens(editor, tokens, pictures, folder)


def train_on_tokens(editor, tokens, pictures, folder, *words: str, train_text_encoder: bool = True) -> str:
    return run_script(
        "train_editar.py",
        *(["--train_text_encoder"] if train_text_encoder else []),
        *words,
        model=editor,
        dataset=tokens,
        validation_dataset=pictures,
        output_dir=folder,
        resolution=TOKEN_RESOLUTION,
        edit_region_weight=4,
        batch_size=4,
        gradient_accumulation_steps=2,
        max_train_steps=4,
        learning_rate=1e-2,
        lr_warmup_steps=3,
        checkpointing_steps=2,
        validation_steps=3,
        num_validation_images=3,
        logging_steps=1,
    )


def test_training_writes_checkpoints_pictures_and_a_pipeline(straight_run, editor):
    folder, printed = straight_run
    assert {path.name for path in folder.iterdir()} >= {"checkpoint-2", "checkpoint-4", "validation", "pipeline"}
    assert not list(folder.glob("unfinished-*"))
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


def test_a_run_begins_with_what_it_is(straight_run, editor, tokens):
    banner = straight_run[1].partition("\nstep 1: ")[0].partition("Training\n")[2].splitlines()
    facts = dict(line.strip().split(maxsplit=1) for line in banner if line.startswith("  "))
    assert facts["model"] == str(editor)
    assert facts["data"] == str(tokens)
    assert facts["pairs"] == "12"
    assert facts["steps"] == "0 to 4"
    assert facts["batch"] == "8 pairs: 4 × 2 accumulated × 1 processes"
    assert facts["device"] == "cpu"
    assert facts["dtype"] == "float32"
    pipeline = EditARPipeline.from_pretrained(editor)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (pipeline.transformer, pipeline.text_encoder)]
    head = sum(p.numel() for p in pipeline.transformer.distillation_head.parameters())
    assert facts["trained"] == f"{sum(sizes) - head:,} of {sum(sizes):,} parameters"
    assert banner[-1] == "4 steps are 2.7 epochs of 12 samples."


@pytest.mark.parametrize("name", ["train_editar.py", "train_vq.py", "precompute_tokens.py"])
def test_help_names_every_default(name):
    names = runpy.run_path(str(EXAMPLES / name))
    arguments = names.get("Arguments", TrainingArguments)
    parser = HfArgumentParser(arguments)
    for action in parser._actions:
        assert action.help, f"{action.option_strings} has no help"
    assert "(default: 64)" in parser.format_help()


def test_many_epochs_are_remarked_upon(capsys):
    accelerator = Accelerator(cpu=True)
    print_epochs(accelerator, "max-train-steps", 40000, 64, 640)
    line = capsys.readouterr().out
    assert line.startswith("40,000 steps are 4,000.0 epochs of 640 samples. A model memorises a small data set")
    assert "lower `--max-train-steps`; 1,000 steps are 100.0 epochs" in line
    reset_accelerate()


def test_the_first_step_is_logged_and_counts_in_the_first_means(editor, tokens, tmp_path, run_here, capsys):
    options = {"model": editor, "dataset": tokens, "resolution": TOKEN_RESOLUTION, "batch_size": 4}
    for logging_steps in (1, 3):
        folder = tmp_path / str(logging_steps)
        run_here("train_editar.py", output_dir=folder, max_train_steps=3, logging_steps=logging_steps, **options)
        reset_accelerate()
    printed = capsys.readouterr().out.split("Training\n")
    alone, joined = read_figures(printed[1]), read_figures(printed[2])
    assert list(joined) == [1, 3]
    assert joined[1] == alone[1]
    mean = sum(float(alone[step]["loss"]) for step in (1, 2, 3)) / 3
    assert float(joined[3]["loss"]) == pytest.approx(mean, rel=1e-3)


def test_validation_pictures_show_source_edit_and_target_in_rows(straight_run, pictures, editor):
    folder, _ = straight_run
    files = sorted((folder / "validation").iterdir())
    assert [file.name for file in files] == ["step-0000003.png"]
    with Image.open(files[0]) as sheet:
        # Three pictures of 8 pixels a row, three rows, gaps of 4.
        assert sheet.size == (40, 40)
        corner = np.asarray(sheet.crop((4, 4, 12, 12)))
    pipeline = EditARPipeline.from_pretrained(editor)
    row = datasets.Dataset.from_parquet(str(pictures / "validation-00000-of-00001.parquet"))[0]
    source = pipeline.encode_image(row["source_image"], height=8, width=8)
    assert are_near(corner, pipeline.decode_image_tokens(source, height=8, width=8)[0])


def test_card_says_what_the_pipeline_was_trained_on_and_how(straight_run, tokens, editor):
    card = (straight_run[0] / "pipeline" / "README.md").read_text()
    assert f"Trained from `{editor}` on `{tokens}`, 12 pairs, for 4 steps of 8 pairs." in card
    assert "the text encoder was trained too" in card
    headings = [line for line in card.splitlines() if line.startswith("#")]
    assert headings == ["# pipeline", "## Training", "## Figures", "## Licence"]
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "editar-hf"
    assert not {"datasets", "base_model"} & set(header)  # they are folders
    assert f"train_editar.py --model {editor} --dataset {tokens} " in card.replace("\n", " ")
    assert f"torch {metadata.version('torch')}" in card
    assert f'from_pretrained("{straight_run[0] / "pipeline"}")' in card


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(straight_run, editor, tokens, pictures, tmp_path):
    """From the middle of an epoch, with dropout, and beside what a kill has left."""
    folder, printed = straight_run
    run = tmp_path / "run"
    shutil.copytree(folder / "checkpoint-2", run / "checkpoint-2")
    (run / "unfinished-checkpoint-4").mkdir()
    (run / "unfinished-checkpoint-4" / "model.safetensors").write_bytes(b"half a file")
    resumed = train_on_tokens(editor, tokens, pictures, run, "--resume_from_checkpoint", "latest")
    straight_figures, figures = read_figures(printed), read_figures(resumed)
    assert figures == {step: straight_figures[step] for step in (3, 4)}
    assert not name_changed(folder / "pipeline", run / "pipeline")
    assert not list(run.glob("unfinished-*"))
    moments = [torch.load(path / "checkpoint-4" / "optimizer.bin", weights_only=True) for path in (folder, run)]
    for index, state in moments[0]["state"].items():
        assert all(torch.equal(tensor, moments[1]["state"][index][name]) for name, tensor in state.items())


def test_run_with_muon_resumes_bit_for_bit_too(editor, tokens, pictures, tmp_path):
    words = ("--optimizer", "muon", "--muon_learning_rate", "0.01")
    printed = train_on_tokens(editor, tokens, pictures, tmp_path / "straight", *words)
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    words += ("--resume_from_checkpoint", "latest")
    resumed = train_on_tokens(editor, tokens, pictures, tmp_path / "resumed", *words)
    assert read_figures(resumed) == {step: read_figures(printed)[step] for step in (3, 4)}
    assert not name_changed(tmp_path / "straight" / "pipeline", tmp_path / "resumed" / "pipeline")


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


def is_saving(folder: Path) -> bool:
    """Tell whether there is a checkpoint in the making that lacks files which the last complete one has."""
    complete, unfinished = list_checkpoints(folder), list(folder.glob("unfinished-checkpoint-*"))
    return bool(complete and unfinished) and set(os.listdir(unfinished[0])) < set(os.listdir(complete[-1]))


def kill_while_saving(process: PythonProcess, folder: Path):
    """Kill a process inside the saving of a checkpoint; it is stopped to make sure that it is there."""
    while True:
        assert process.is_running(), "the run is over, and was not caught while it saved"
        with contextlib.suppress(FileNotFoundError):  # Renamed meanwhile.
            if is_saving(folder):
                os.kill(process.pid, signal.SIGSTOP)
                while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
                    time.sleep(0.001)
                if is_saving(folder):
                    break
                os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.001)
    process.kill()
    process.wait()


def test_run_killed_while_it_saves_goes_on_bit_for_bit_from_the_checkpoint_before(
    editor, tokens, tmp_path, run_here, capsys
):
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    options = {"model": editor, "dataset": tokens, "resolution": TOKEN_RESOLUTION, "batch_size": 4}
    options |= {"learning_rate": 1e-2, "logging_steps": 1}
    command = [EXAMPLES / "train_editar.py", *list_words(options | {"output_dir": killed})]
    command += ["--max_train_steps", "200", "--checkpointing_steps", "1"]
    kill_while_saving(PythonProcess(*command, environment={**os.environ, "ACCELERATE_USE_CPU": "true"}), killed)
    (unfinished,) = killed.glob("unfinished-checkpoint-*")
    step = int(unfinished.name.rpartition("-")[2])
    assert list_checkpoints(killed)[-1].name == f"checkpoint-{step - 1}"

    options |= {"max_train_steps": step + 1}
    run_here("train_editar.py", output_dir=straight, **options)
    reset_accelerate()
    figures = read_figures(capsys.readouterr().out)
    options |= {"checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    run_here("train_editar.py", output_dir=killed, **options)
    assert read_figures(capsys.readouterr().out) == {number: figures[number] for number in (step, step + 1)}
    assert not name_changed(straight / "pipeline", killed / "pipeline")
    left = {path.name for path in killed.iterdir()}
    assert left == {f"checkpoint-{step}", f"checkpoint-{step + 1}", "pipeline"}


def test_another_number_of_workers_cannot_resume(straight_run, editor, tokens, tmp_path, run_here):
    shutil.copytree(straight_run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    options = {"model": editor, "dataset": tokens, "output_dir": tmp_path, "resolution": TOKEN_RESOLUTION}
    options |= {"resume_from_checkpoint": "latest", "num_workers": 2}
    with pytest.raises(ValueError, match=r"`num_workers` is 2; .*checkpoint-2 was written with 0"):
        run_here("train_editar.py", "--train_text_encoder", **options)


def test_tokens_and_text_states_made_in_advance_train_as_the_pictures_do(
    calm_editor, pictures, tokens, tmp_path, run_here, capsys
):
    options = {"dataset": pictures, "pipeline": calm_editor, "resolution": TOKEN_RESOLUTION}
    run_here("precompute_tokens.py", output_dir=tmp_path / "states", **options)
    options = {"model": calm_editor, "resolution": TOKEN_RESOLUTION, "batch_size": 4, "edit_region_weight": 3}
    options |= {"max_train_steps": 4, "learning_rate": 1e-2, "logging_steps": 1}
    printed = []
    for name, dataset in (("pictures", pictures), ("tokens", tokens), ("text states", tmp_path / "states")):
        run_here("train_editar.py", dataset=dataset, output_dir=tmp_path / name, **options)
        reset_accelerate()
        printed.append(read_figures(capsys.readouterr().out))
    assert list(printed[0]) == [1, 2, 3, 4]
    assert printed[0] == printed[1]
    assert not name_changed(tmp_path / "pictures" / "pipeline", tmp_path / "tokens" / "pipeline")
    # In other batches the text encoder rounds otherwise.
    for step, figures in printed[0].items():
        expected = {name: float(figure) for name, figure in figures.items()}
        assert {name: float(figure) for name, figure in printed[2][step].items()} == pytest.approx(expected, rel=2e-3)
    before, after = (load_weights(tmp_path / name / "pipeline") for name in ("pictures", "text states"))
    assert all(torch.allclose(before[name], after[name], atol=1e-4) for name in before)


def test_text_states_made_in_advance_refuse_a_text_encoder_that_learns(calm_editor, pictures, tmp_path, run_here):
    options = {"dataset": pictures, "pipeline": calm_editor, "resolution": TOKEN_RESOLUTION}
    run_here("precompute_tokens.py", output_dir=tmp_path / "states", **options)
    options = {"model": calm_editor, "dataset": tmp_path / "states", "resolution": TOKEN_RESOLUTION}
    reset_accelerate()
    with pytest.raises(ValueError, match="`train_text_encoder`: `dataset` holds text states"):
        run_here("train_editar.py", "--train_text_encoder", output_dir=tmp_path / "run", **options)
    with pytest.raises(ValueError, match="Give `vq_model` or `pipeline`"):
        run_here("precompute_tokens.py", dataset=pictures, output_dir=tmp_path, resolution=8)


def test_four_accumulated_batches_are_one_of_four_times_the_size(calm_editor, tokens, tmp_path, run_here, capsys):
    options = {"model": calm_editor, "dataset": tokens, "resolution": TOKEN_RESOLUTION, "edit_region_weight": 3}
    options |= {"max_train_steps": 3, "learning_rate": 1e-3, "logging_steps": 1}
    changes, printed = [], []
    for batch_size, accumulated in ((4, 1), (1, 4)):
        folder = tmp_path / f"{batch_size}"
        sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulated}
        run_here("train_editar.py", "--no_conditioning_dropout", output_dir=folder, **options, **sizes)
        reset_accelerate()
        before, after = load_weights(calm_editor), load_weights(folder / "pipeline")
        changes.append(torch.cat([(after[name] - before[name]).flatten() for name in sorted(before)]))
        printed.append(read_figures(capsys.readouterr().out))
    assert changes[0].norm() > 0
    assert (changes[1] - changes[0]).norm() < 1e-3 * changes[0].norm()
    for step in (1, 2, 3):
        assert float(printed[1][step]["loss"]) == pytest.approx(float(printed[0][step]["loss"]), rel=1e-3)


def test_mixed_precision_and_recomputed_activations_train_as_float32_does(
    calm_editor, tokens, pictures, tmp_path, run_here, capsys
):
    """And validate before there is a checkpoint."""
    options = {"model": calm_editor, "dataset": tokens, "resolution": TOKEN_RESOLUTION, "batch_size": 4}
    options |= {"max_train_steps": 3, "learning_rate": 1e-3, "logging_steps": 1}
    options |= {"validation_dataset": pictures, "validation_steps": 1, "num_validation_images": 1}
    printed = []
    for name, words in (("float32", ()), ("bf16", ("--mixed_precision", "bf16", "--gradient_checkpointing"))):
        run_here("train_editar.py", *words, output_dir=tmp_path / name, **options)
        reset_accelerate()
        printed.append(read_figures(capsys.readouterr().out))
    names = [(step, name) for step in (1, 2, 3) for name in ("loss", "validation_loss")]
    losses = [[float(figures[step][name]) for step, name in names] for figures in printed]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
    weights = load_weights(tmp_path / "bf16" / "pipeline")
    assert {tensor.dtype for name, tensor in weights.items() if "transformer" in name} == {torch.float32}


@needs_compiler
def test_compiled_step_trains_as_the_uncompiled_one_does(calm_editor, tokens, tmp_path, run_here, capsys):
    options = {"model": calm_editor, "dataset": tokens, "resolution": TOKEN_RESOLUTION, "batch_size": 4}
    options |= {"max_train_steps": 3, "learning_rate": 1e-3, "logging_steps": 1}
    printed = []
    for name, words in (("plain", ()), ("compiled", ("--compile",))):
        torch._dynamo.reset()
        counters.clear()
        run_here("train_editar.py", *words, output_dir=tmp_path / name, **options)
        reset_accelerate()
        printed.append(read_figures(capsys.readouterr().out))
        assert bool(counters["stats"]["calls_captured"]) == (name == "compiled")
    losses = [[float(figures[step]["loss"]) for step in (1, 2, 3)] for figures in printed]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    before, after = (load_weights(tmp_path / name / "pipeline") for name in ("plain", "compiled"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-4) for name in before)


LORA = ("--lora_rank", "3", "--lora_alpha", "6", "--lora_modules_to_save", "text_projection")


@pytest.fixture(scope="module")
def lora_run(editor, tokens, pictures, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    return folder, train_on_tokens(editor, tokens, pictures, folder, *LORA, train_text_encoder=False)


def test_lora_run_writes_an_adapter_that_makes_the_base_the_trained_model(lora_run, editor):
    folder, _ = lora_run
    assert not (folder / "pipeline").exists()
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "validation.png")
    }
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


def test_lora_run_resumes_bit_for_bit(lora_run, editor, tokens, pictures, tmp_path):
    folder, printed = lora_run
    shutil.copytree(folder / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    words = (*LORA, "--resume_from_checkpoint", "latest")
    resumed = train_on_tokens(editor, tokens, pictures, tmp_path / "run", *words, train_text_encoder=False)
    assert read_figures(resumed) == {step: read_figures(printed)[step] for step in (3, 4)}
    weights = [load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder, tmp_path / "run")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_card_of_an_adapter_loads_it_into_its_base(lora_run, editor):
    folder, _ = lora_run
    card = (folder / "adapter" / "README.md").read_text()
    assert f'from_pretrained("{editor}")\npipe.load_lora_weights("{folder / "adapter"}")' in card
    assert f"for the decoder of `{editor}`" in card
    assert "12 pairs, for 4 steps of 8 pairs" in card
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(editor)
    assert (config["r"], config["lora_alpha"]) == (3, 6)


@pytest.fixture(scope="module")
def distilling_run(calm_editor, tmp_path_factory):
    """One step on all pairs of a Hub data set under its own column names, validated on an image folder.

    The folder, what was printed, the pairs and the teacher.
    """
    folder = tmp_path_factory.mktemp("distilling")
    rng = np.random.default_rng(0)
    names = {"source_image": "before", "target_image": "after", "prompt": "instruction"}
    rows = {
        name: [Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)) for _ in range(4)]
        for name in ("before", "after", "unrelated")
    }
    rows["instruction"] = ["make the red circle blue", "remove the green square", "make it blue", "remove it"]
    images = {name: datasets.Image() for name in ("before", "after", "unrelated")}
    features = datasets.Features({**images, "instruction": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "pairs.parquet")

    (folder / "held-out").mkdir()
    lines = []
    for index in range(2):
        for name in ("before", "after"):
            rows[name][index].save(folder / "held-out" / f"{name}-{index}.png")
        line = {f"{name}_file_name": f"{name}-{index}.png" for name in ("before", "after")}
        lines.append(json.dumps({**line, "instruction": rows["instruction"][index]}))
    (folder / "held-out" / "metadata.jsonl").write_text("\n".join(lines))

    write_teacher(folder / "teacher")
    with HubServer() as hub:
        repository = hub.repositories["datasets/tester/pairs"] = Repository()
        repository.commit({"train-00000-of-00001.parquet": (folder / "pairs.parquet").read_bytes()})
        printed = run_script(
            "train_editar.py",
            "--no_conditioning_dropout",
            environment=hub.get_environment(folder / "home"),
            **{f"{ours}_column": theirs for ours, theirs in names.items()},
            model=calm_editor,
            dataset="tester/pairs",
            validation_dataset=folder / "held-out",
            distillation_model=folder / "teacher",
            distillation_loss_weight=0.25,
            output_dir=folder / "run",
            batch_size=4,
            max_train_steps=1,
            validation_steps=1,
            logging_steps=1,
        )
    return folder, printed, rows


def test_distilling_run_trains_the_decoder_alone(distilling_run, calm_editor):
    folder, _, _ = distilling_run
    assert name_changed(calm_editor, folder / "run" / "pipeline") == {"transformer"}
    heads = [
        load_weights(path)["transformer.distillation_head.weight"]
        for path in (calm_editor, folder / "run" / "pipeline")
    ]
    assert not torch.equal(*heads)


@torch.no_grad()
def test_losses_of_a_step_are_cross_entropy_and_distance_to_the_teacher(distilling_run, calm_editor):
    folder, printed, rows = distilling_run
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
    figures = {name: float(figure) for name, figure in read_figures(printed)[1].items()}
    assert figures["token_loss"] == pytest.approx(output.loss.item(), rel=1e-3)
    assert figures["distillation_loss"] == pytest.approx(distillation_loss.item(), rel=1e-3)
    assert figures["loss"] == pytest.approx((output.loss + 0.25 * distillation_loss).item(), rel=1e-3)


@torch.no_grad()
def test_validation_loss_is_that_of_the_held_out_pairs(distilling_run):
    folder, printed, rows = distilling_run
    pipeline = EditARPipeline.from_pretrained(folder / "run" / "pipeline")
    source, target = (pipeline.encode_image(rows[name][:2]) for name in ("before", "after"))
    logits = pipeline.transformer(source, pipeline.encode_prompt(rows["instruction"][:2]), labels=target).logits
    expected = F.nll_loss(logits.log_softmax(-1).flatten(0, 1), target.flatten()).item()
    assert float(read_figures(printed)[1]["validation_loss"]) == pytest.approx(expected, rel=1e-3)
    with Image.open(folder / "run" / "validation" / "step-0000001.png") as sheet:
        assert sheet.size == (3 * 20 + 4, 2 * 20 + 4)


def test_card_names_the_data_set_of_the_hub(distilling_run):
    card = (distilling_run[0] / "run" / "pipeline" / "README.md").read_text()
    header = card.split("---")[1]
    assert "tester/pairs" in header
    assert "base_model" not in header  # it is a folder
    assert "so was the text encoder" in card


@pytest.fixture(scope="module")
def foreign_tokens(tmp_path_factory) -> Path:
    """Tokens of a tokenizer with more codes than the editor knows."""
    path = tmp_path_factory.mktemp("foreign") / "train.parquet"
    ids = [[0, 1, 2, NUM_CODES]] * 4
    rows = {"source_image_tokens": ids, "target_image_tokens": ids, "prompt": ["make it blue"] * 4}
    datasets.Dataset.from_dict(rows).to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_column": "caption"}, r"lacks caption; it has .*source_image.*prompt"),
        ({"validation_dataset": "nowhere/at-all"}, "`dataset` 'nowhere/at-all' does not load"),
        ({"validation_dataset": "{foreign_tokens}"}, f"`source_image_tokens` runs from 0 to {NUM_CODES}"),
        ({"dataset": "{tokens}"}, "`[a-z_]+` holds 4 to 4 tokens a row; the model's grid of 4 × 4 has 16"),
        ({"dataset": "{foreign_tokens}"}, f"codes 0 to {NUM_CODES - 1}"),
        ({"resolution": 10}, "`resolution` is 10: .*multiple of 4"),
        ({"resolution": 20}, "`resolution` is 20: .* pass a multiple of 4 from 4 to 16"),
        ({"num_workers": 13}, r"`dataset` '.*' has 12 rows for 13 readers"),
        ({"recipe": "recipe.yaml"}, "Give `dataset` or `recipe`: one of them"),
        ({"ema_decay": 1}, r"`ema_decay` is 1\.0"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "`resume_from_checkpoint` is 'checkpoint-7'"),
        ({"distillation_model": "{editor}/text_encoder"}, "is of type 't5'"),
        ({"dataset": "{tokens}", "distillation_model": "unread"}, "`distillation_model` needs images"),
        ({"model": "{sticker_editor}", "distillation_model": "unread"}, "needs a model with a distillation head"),
        ({"model": "{editor}/vq_model"}, "model_index.json"),
        ({"lora_rank": 0}, "`rank` is 0"),
        ({"lora_rank": 4, "lora_target_modules": "query"}, "`target_modules` names query; the decoder has .*q_proj"),
        ({"lora_rank": 4, "lora_modules_to_save": "head"}, "`modules_to_save` names head; the decoder has .*lm_head"),
        ({"lora_rank": 4, "train_text_encoder": True}, "`train_text_encoder` and `lora_rank`"),
    ],
)
def test_training_refuses(options, message, request, editor, pictures, tmp_path, run_here):
    names = ("tokens", "foreign_tokens", "sticker_editor", "editor")
    needed = {name for name in names if any(f"{{{name}}}" in str(value) for value in options.values())}
    folders = {name: request.getfixturevalue(name) for name in needed}
    options = {name: value.format(**folders) if isinstance(value, str) else value for name, value in options.items()}
    tokens_fit = {"resolution": TOKEN_RESOLUTION} if "foreign_tokens" in needed or "unread" in options.values() else {}
    defaults = {"model": editor, "dataset": pictures, "output_dir": tmp_path / "run", "batch_size": 4, **tokens_fit}
    with pytest.raises(ValueError, match=message):
        run_here("train_editar.py", **(defaults | options))
    assert not list(tmp_path.glob("run/*checkpoint-*"))
    assert not (tmp_path / "run" / "pipeline").exists()


def test_teacher_with_registers_and_a_width_of_its_own_teaches_on_an_odd_grid(calm_editor, tmp_path, run_here, capsys):
    """Of 3×3 tokens, the head sees the first 2×2 as its one cell; bilinearly, that is the middle of the teacher's."""
    width, num_registers, resolution = 20, 3, 3 * STRIDE
    pipeline = EditARPipeline.from_pretrained(calm_editor)
    config = pipeline.transformer.config
    config.distillation_hidden_size = width
    pipeline.register_modules(transformer=redraw_weights(EditARForConditionalGeneration(config), scale=0.3))
    pipeline.save_pretrained(tmp_path / "editor")
    # Its positions are those of a larger picture, as published.
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 56}
    config = Dinov2WithRegistersConfig(**sizes, image_size=336, num_register_tokens=num_registers)
    backbone = redraw_weights(Dinov2WithRegistersModel(config), scale=0.3)
    backbone.save_pretrained(tmp_path / "teacher")
    names = ("source_image", "target_image")
    rows = {name: [draw_image((k, *name.encode()), resolution, resolution) for k in range(4)] for name in names}
    features = datasets.Features({**dict.fromkeys(names, datasets.Image()), "prompt": datasets.Value("string")})
    pairs = datasets.Dataset.from_dict(rows | {"prompt": ["make it blue"] * 4}, features=features)
    pairs.to_parquet(tmp_path / "pairs.parquet")
    paths = {"model": tmp_path / "editor", "dataset": tmp_path / "pairs.parquet", "output_dir": tmp_path / "run"}
    options = {"distillation_model": tmp_path / "teacher", "resolution": resolution, "batch_size": 4}
    options |= {"max_train_steps": 1, "logging_steps": 1}
    run_here("train_editar.py", "--no_conditioning_dropout", **paths, **options)

    sides = {"height": resolution, "width": resolution}
    source, target = (pipeline.encode_image(rows[name], **sides) for name in names)
    grid = {"grid_height": 3, "grid_width": 3, "output_distillation_features": True}
    with torch.no_grad():
        prompt_embeds = pipeline.encode_prompt(["make it blue"] * 4)
        predicted = pipeline.transformer(source, prompt_embeds, labels=target, **grid).distillation_features
        pixels = torch.from_numpy(np.stack(list(map(np.asarray, rows["target_image"])))).permute(0, 3, 1, 2)
        states = backbone(prepare_teacher_pixels(pixels / 127.5 - 1)).last_hidden_state
    seen = states[:, 1 + num_registers :].view(4, 4, 4, width)[:, 1:3, 1:3].mean((1, 2))
    expected = (predicted - seen[:, None]).square().mean().item()
    assert float(read_figures(capsys.readouterr().out)[1]["distillation_loss"]) == pytest.approx(expected, rel=1e-3)


def test_teacher_of_another_width_than_the_head_is_refused(editor, pictures, tmp_path, run_here):
    write_teacher(tmp_path / "large", width=2 * TEACHER_WIDTH)
    options = {"model": editor, "dataset": pictures, "output_dir": tmp_path / "run", "batch_size": 4}
    with pytest.raises(ValueError, match=rf"features of width {2 * TEACHER_WIDTH}; .* head predicts {TEACHER_WIDTH}"):
        run_here("train_editar.py", distillation_model=tmp_path / "large", **options)


def test_training_does_not_begin_over_the_checkpoints_of_another_run(straight_run, editor, pictures, run_here):
    with pytest.raises(ValueError, match="holds checkpoint-4; pass `--resume-from-checkpoint latest`"):
        run_here("train_editar.py", model=editor, dataset=pictures, output_dir=straight_run[0])
