"""The scripts in `examples/`, run as command lines at tiny size: what they write, and what they refuse."""

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState, GradientState
from hub_server import HubServer, Repository
from PIL import Image
from safetensors.torch import load_file
from tiny import NUM_CODES, STRIDE, build_pipeline, draw_image, redraw_weights
from torch._dynamo.utils import counters
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from editar_hf import EditARForConditionalGeneration, EditARPipeline, EditARVQConfig, EditARVQModel
from editar_hf.processing_editar import apply_task_prefix
from editar_hf.training.checkpoints import list_checkpoints
from editar_hf.training.distillation import DistillationTeacher, prepare_teacher_pixels


EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import make_sticker_edits as stickers  # noqa: E402


# The tiny text length cuts most prompts, with a warning each.
pytestmark = pytest.mark.filterwarnings("ignore:A prompt is longer")
# Pairs for the editor of `tiny` are encoded at half its side: 2×2 tokens.
TOKEN_RESOLUTION, NUM_TOKENS = 8, 4
NUM_TRAIN = 12
TEACHER_WIDTH = 12


def list_words(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", *map(str, np.atleast_1d(value)))]


def run_script(name: str, *words: str, environment: dict | None = None, **options) -> str:
    """Run a script in a fresh interpreter and return what it printed."""
    command = [sys.executable, "-W", "ignore", EXAMPLES / name, *list_words(options), *words]
    environment = {**(environment or os.environ), "ACCELERATE_USE_CPU": "true"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def reset_accelerate():
    """Forget the state that accelerate shares between all of an interpreter's accelerators."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    reset_accelerate()


@pytest.fixture
def run_here(monkeypatch, on_cpu):
    """Run a script in this interpreter, as if from its command line: quicker, and its errors can be caught."""

    def run(name: str, *words: str, **options):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *list_words(options), *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def read_figures(printed: str) -> dict[int, dict[str, str]]:
    """Read the lines `step 3: loss 1.2, …` of a training run: step → name → figure, speeds left out."""
    steps: dict[int, dict[str, str]] = {}
    for step, line in re.findall(r"^step (\d+): (.*)$", printed, re.MULTILINE):
        figures = dict(part.rsplit(" ", 1) for part in line.split(", "))
        for name in ("samples_per_second", "tokens_per_second", "memory_gib"):
            figures.pop(name, None)
        steps.setdefault(int(step), {}).update(figures)
    return steps


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}.{name}": t
        for file in folder.glob("*/*.safetensors")
        for name, t in load_file(file).items()
    }


def write_teacher(folder: Path, width: int = TEACHER_WIDTH):
    """Write a tiny DINOv2 with random weights."""
    config = Dinov2Config(hidden_size=width, num_hidden_layers=1, num_attention_heads=2, patch_size=56, image_size=224)
    redraw_weights(Dinov2Model(config), scale=0.3).save_pretrained(folder)


def name_changed(before: Path, after: Path) -> set[str]:
    """Name the components of two pipeline folders that differ in any bit of their weights."""
    before, after = load_weights(before), load_weights(after)
    assert before.keys() == after.keys()
    return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}


# What the scripts work on


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A small "stickers" data set of 64×64 pixels: every operation twice in `test`, and some held-out ones."""
    folder = tmp_path_factory.mktemp("stickers")
    plan = stickers.plan_split("test", 5)
    jobs = {"train": [None] * NUM_TRAIN, "validation": [None] * 5, "test": plan[:16] + plan[40:42] + plan[-2:]}
    for split, split_jobs in jobs.items():
        stickers.write_shard(folder / f"{split}-00000-of-00001.parquet", 3, split, 0, split_jobs, 64)
    return folder


@pytest.fixture(scope="module")
def editor(tmp_path_factory) -> Path:
    """The pipeline of `tiny`, with a distillation head and with the dropouts of the published training."""
    pipeline = build_pipeline()
    config = pipeline.transformer.config
    config.distillation_hidden_size = TEACHER_WIDTH
    pipeline.register_modules(transformer=redraw_weights(EditARForConditionalGeneration(config), scale=0.3))
    folder = tmp_path_factory.mktemp("pipelines") / "editor"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def calm_editor(editor) -> Path:
    """The same without dropout: what it computes in training can be computed again."""
    folder = editor.with_name("calm-editor")
    shutil.copytree(editor, folder)
    for name, dropouts in {
        "transformer": ("text_dropout", "residual_dropout", "mlp_dropout"),
        "text_encoder": ("dropout_rate",),
    }.items():
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict.fromkeys(dropouts, 0.0)))
    return folder


@pytest.fixture(scope="module")
def tokens(pictures, editor, tmp_path_factory) -> Path:
    """The pictures to train on as tokens, in shards of five."""
    folder = tmp_path_factory.mktemp("tokens")
    options = {"vq_model": editor / "vq_model", "resolution": TOKEN_RESOLUTION, "batch_size": 3, "shard_size": 5}
    run_script("precompute_tokens.py", dataset=pictures, output_dir=folder, **options)
    return folder


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
        num_validation_pictures=3,
        logging_steps=1,
    )


# precompute_tokens.py


def test_precomputed_tokens_are_those_of_the_tokenizer(tokens, pictures, editor):
    files = sorted(tokens.iterdir())
    assert [file.name for file in files] == [f"train-{index:05d}-of-00003.parquet" for index in range(3)]
    rows = datasets.Dataset.from_parquet(list(map(str, files)))
    truth = datasets.Dataset.from_parquet(str(pictures / "train-00000-of-00001.parquet"))
    assert rows["prompt"][:] == truth["prompt"][:]
    assert rows["task"][:] == truth["task"][:]

    vq_model = EditARVQModel.from_pretrained(editor / "vq_model")
    for row, true_row in zip(rows, truth, strict=True):
        small = {
            name: np.asarray(true_row[name].convert("RGB").resize((TOKEN_RESOLUTION,) * 2, Image.Resampling.LANCZOS))
            for name in ("source_image", "target_image", "mask")
        }
        for name in ("source_image", "target_image"):
            pixel_values = torch.from_numpy(small[name].copy()).permute(2, 0, 1)[None] / 127.5 - 1
            assert row[f"{name}_tokens"] == vq_model.encode(pixel_values).image_tokens[0].tolist()
        cells = small["mask"].mean(-1).reshape(2, STRIDE, 2, STRIDE)
        assert row["edit_mask"] == (cells > 127.5).any(axis=(1, 3)).ravel().tolist()
    assert {any(mask) for mask in rows["edit_mask"]} | {all(mask) for mask in rows["edit_mask"]} == {True, False}


def test_precomputing_again_makes_only_the_missing_shards(tokens, pictures, editor, tmp_path, run_here):
    folder = tmp_path / "tokens"
    shutil.copytree(tokens, folder)
    first, second, _ = sorted(folder.iterdir())
    content, kept = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    options = {"vq_model": editor / "vq_model", "resolution": TOKEN_RESOLUTION, "batch_size": 3, "shard_size": 5}
    run_here("precompute_tokens.py", dataset=pictures, output_dir=folder, **options)
    assert second.read_bytes() == content
    assert first.stat().st_mtime_ns == kept
    assert len(list(folder.iterdir())) == 3
    with pytest.raises(ValueError, match=r"holds train-00000-of-00003\.parquet, and this data set makes 2 shards"):
        run_here("precompute_tokens.py", dataset=pictures, output_dir=folder, **(options | {"shard_size": 6}))
    assert len(list(folder.iterdir())) == 3


# create_sticker_editor.py and evaluate_sticker_editor.py


@pytest.fixture(scope="module")
def sticker_editor(pictures, tmp_path_factory) -> Path:
    """What create_sticker_editor.py makes, with a random tokenizer of stride 8."""
    folder = tmp_path_factory.mktemp("sticker-editor")
    torch.manual_seed(0)
    config = EditARVQConfig(
        num_embeddings=32,
        base_channels=8,
        latent_channels=8,
        channel_multipliers=(1,) * 4,
        num_res_blocks=1,
        norm_num_groups=4,
    )
    EditARVQModel(config).save_pretrained(folder / "tokenizer")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_sizes = {"text_hidden_size": 64, "text_num_layers": 1, "num_text_tokens": 40}
    paths = {"dataset": pictures, "vq_model": folder / "tokenizer", "output_dir": folder / "editor"}
    run_script("create_sticker_editor.py", **paths, **sizes, **text_sizes, seed=5)
    return folder / "editor"


def test_created_editor_has_the_sizes_asked_for_and_reads_every_prompt(sticker_editor, pictures):
    pipeline = EditARPipeline.from_pretrained(sticker_editor)
    config = pipeline.transformer.config
    assert (config.hidden_size, config.num_hidden_layers, config.grid_size, config.vocab_size) == (32, 1, 8, 32)
    assert (pipeline.text_encoder.config.d_model, pipeline.text_encoder.config.num_layers) == (64, 1)
    assert pipeline.processor.num_text_tokens == config.num_text_tokens == 40
    tokenizer = EditARVQModel.from_pretrained(sticker_editor.with_name("tokenizer")).state_dict()
    assert all(torch.equal(tensor, tokenizer[name]) for name, tensor in pipeline.vq_model.state_dict().items())

    rows = datasets.Dataset.from_parquet(str(pictures / "train-00000-of-00001.parquet"))
    for prompt in apply_task_prefix(rows["prompt"][:], rows["task"][:]):
        token_ids = pipeline.processor.tokenizer(prompt).input_ids
        assert pipeline.processor.tokenizer.unk_token_id not in token_ids
        assert pipeline.processor.tokenizer.decode(token_ids, skip_special_tokens=True) == prompt


def test_text_width_that_no_head_divides_is_refused(pictures, sticker_editor, tmp_path, run_here):
    paths = {"dataset": pictures, "vq_model": sticker_editor.with_name("tokenizer"), "output_dir": tmp_path / "editor"}
    with pytest.raises(ValueError, match="`text_hidden_size` is 96; give a multiple of 64"):
        run_here("create_sticker_editor.py", **paths, text_hidden_size=96)
    assert not (tmp_path / "editor").exists()


def test_evaluation_writes_the_settings_beside_the_ceiling_and_the_controls(sticker_editor, pictures, tmp_path):
    output = tmp_path / "new" / "results.json"
    options = {"settings": ["sampled-2", "greedy-1"], "batch_size": 7}
    run_script("evaluate_sticker_editor.py", model=sticker_editor, dataset=pictures, output=output, **options)
    results = json.loads(output.read_text())
    controls = {"ceiling", "untouched source", "another instruction"}
    assert set(results) == controls | {"sampled-2", "greedy-1"}
    assert [path.name for path in output.parent.iterdir()] == ["results.json"]

    for summary in results.values():
        assert {operation: means["n"] for operation, means in summary["seen"].items()} == dict.fromkeys(
            (*stickers.OPERATIONS, *stickers.TRANSLATIONS), 2
        )
        assert sum(means["n"] for part in ("held_out", "unseen_pairs") for means in summary[part].values()) == 4
        assert not summary["photographs"].keys() - set(stickers.PHOTOGRAPHS)
    untouched = results["untouched source"]["seen"]
    # Outside the mask the source is the target; inside, nothing has been done to it.
    assert all(untouched[operation]["outside_psnr"] > 100 for operation in stickers.OPERATIONS)
    assert all(untouched[operation]["done"] == 0 for operation in ("recolour", "add", "remove"))
    # The ceiling's pictures are the yardstick outside the mask.
    ceiling = results["ceiling"]["seen"]["add"]
    assert ceiling["outside_psnr"] == ceiling["outside_psnr_ceiling"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": ["gready-3"]}, "`settings` holds 'gready-3'"),
        ({"settings": ["greedy"]}, "`settings` holds 'greedy'"),
        ({"split": "holdout"}, "no parquet file whose name starts with 'holdout'"),
        ({"max_samples": 1}, "`dataset` has one prompt of operation"),
        ({"controls": ["floor"]}, "`controls` holds floor; there are ceiling, untouched source, another instruction"),
        ({"model": "editor"}, r"`dataset` has pictures of \(64, 64\) pixels; the model makes 16 × 16"),
    ],
)
def test_evaluation_refuses(options, message, sticker_editor, editor, pictures, tmp_path, run_here):
    models = {"editor": editor}
    options = options | {"model": models.get(options.get("model"), sticker_editor)}
    with pytest.raises(ValueError, match=message):
        run_here("evaluate_sticker_editor.py", dataset=pictures, output=tmp_path / "results.json", **options)
    assert not (tmp_path / "results.json").exists()


def test_the_sheet_shows_the_first_test_samples_of_every_task(sticker_editor, tmp_path, run_here):
    output = tmp_path / "new" / "sheet.png"
    run_here("show_sticker_edits.py", model=sticker_editor, output=output, num_per_task=1)
    with Image.open(output) as sheet:
        sheet = np.asarray(sheet)
    order = (*stickers.OPERATIONS, *stickers.TRANSLATIONS)
    height = len(sheet) // len(order)
    for index, operation in enumerate(order):
        sample = stickers.make_sample(0, "test", index, 64, (operation, "seen", None))
        for left, name in ((0, "source_image"), (2 * 132, "target_image")):
            shown = sheet[index * height :][:128, left : left + 128]
            assert np.array_equal(shown[::2, ::2], np.asarray(sample[name]))


def test_an_adapter_learns_a_new_operation_is_measured_with_its_base_and_shipped(
    sticker_editor, pictures, tmp_path, run_here
):
    """The whole way at tiny size: pairs, training with `--lora_rank`, evaluation with and without, and the card."""
    run_here("make_copy_edits.py", output_dir=tmp_path / "copy", resolution=64, num_train=4, num_test=3)
    reset_accelerate()
    run_here(
        "train_editar.py",
        "--no_conditioning_dropout",
        model=sticker_editor,
        dataset=tmp_path / "copy",
        output_dir=tmp_path / "run",
        lora_rank=2,
        batch_size=4,
        max_train_steps=3,
        learning_rate=0.3,
    )
    reset_accelerate()
    adapter = tmp_path / "run" / "adapter"
    figures = {}
    for part, dataset in (("new", tmp_path / "copy"), ("old", pictures)):
        for name, more in (("without", {}), ("with", {"lora": adapter})):
            output = tmp_path / "figures" / f"{part}-{name}.json"
            options = {"dataset": dataset, "settings": "greedy-1", "controls": "ceiling", "output": output}
            run_here("evaluate_sticker_editor.py", model=sticker_editor, **options, **more)
            figures[part, name] = json.loads(output.read_text())
    base, adapted = figures["new", "without"], figures["new", "with"]
    assert set(base) == {"ceiling", "greedy-1"}
    assert base["ceiling"] == adapted["ceiling"]
    assert base["greedy-1"]["seen"]["copy"]["n"] == 3
    assert base["greedy-1"] != adapted["greedy-1"]

    paths = {"dataset": tmp_path / "copy", "figures": tmp_path / "figures", "output_dir": tmp_path / "shipped"}
    run_here("ship_copy_lora.py", model=sticker_editor, adapter=adapter, hardware="no GPU", **paths)
    card = (tmp_path / "shipped" / "README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in card.splitlines() if line.startswith("| ")]
    assert [row[1] for row in rows[1:]] == ["copy", *stickers.OPERATIONS, *stickers.TRANSLATIONS, "all of these"]
    assert rows[1][2:6] == [
        "3",
        *(f"{100 * f[s]['seen']['copy']['done']:.1f}" for f, s in ((base, "ceiling"), (base, "greedy-1"))),
        f"{100 * adapted['greedy-1']['seen']['copy']['done']:.1f}",
    ]
    assert rows[-1][2] == "16"
    assert "Rank 2, alpha 2" in card
    assert "hardware: no GPU" in card
    EditARPipeline.from_pretrained(sticker_editor).load_lora_weights(tmp_path / "shipped")
    with Image.open(tmp_path / "shipped" / "copies.png") as sheet:
        assert sheet.size == (4 * 132 + 4, 3 * 132 + 4)


# train_editar.py


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
    assert np.array_equal(corner, np.asarray(pipeline.decode_image_tokens(source, height=8, width=8)[0]))


def test_card_says_what_the_pipeline_was_trained_on_and_how(straight_run, tokens, editor):
    card = (straight_run[0] / "pipeline" / "README.md").read_text()
    assert f"Trained from `{editor}` on `{tokens}`, 12 pairs, for 4 steps of 8 pairs." in card
    assert "the text encoder was trained along" in card
    assert f"train_editar.py --model {editor} --dataset {tokens} " in card.replace("\n", " ")
    assert f"torch {torch.__version__}" in card
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
    """Two sources: the pairs at hand, and as many again streamed from the shards of a Hub data set.

    The pairs that are streamed come from the repository `tester/streamed`, of which the fixture is the folder.
    """
    folder = tmp_path_factory.mktemp("mixed")
    pairs = datasets.Dataset.from_parquet(str(pictures / "train-00000-of-00001.parquet"))
    for index in range(4):
        pairs.shard(4, index).to_parquet(folder / f"train-{index:05d}-of-00004.parquet")
    sources = [
        {"dataset": str(pictures), "name": "at hand"},
        {"dataset": "tester/streamed", "name": "streamed", "probability": 2.0},
    ]
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"sources": sources}))
    return folder


def find_free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def train_on_recipe(editor, recipe, folder, hub, *words: str, kill_at: str | None = None) -> str:
    """Train in two processes, by the configuration for GPUs, with two workers each.

    With `kill_at`, they are killed by SIGKILL as soon as that checkpoint is there.
    """
    options = {"model": editor, "recipe": recipe / "recipe.yaml", "output_dir": folder, "resolution": TOKEN_RESOLUTION}
    options |= {"batch_size": 2, "num_workers": 2, "max_train_steps": 6, "checkpointing_steps": 3, "logging_steps": 1}
    launch = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launch += ["--config_file", EXAMPLES / "accelerate_configs" / "ddp.yaml", "--main_process_port", find_free_port()]
    command = [*map(str, launch), EXAMPLES / "train_editar.py", "--ema_decay", "0.9", *list_words(options), *words]
    environment = {**hub.get_environment(recipe / "home"), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while kill_at is not None and not (folder / kill_at).exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        if kill_at is not None:
            # The launcher's processes are in sessions of their own.
            for part in [*psutil.Process(process.pid).children(recursive=True), process]:
                part.kill()
        printed, errors = process.communicate()
    assert kill_at is not None or process.returncode == 0, errors
    return printed


def test_killed_run_of_two_processes_on_mixed_streams_goes_on_bit_for_bit(editor, recipe, tmp_path):
    with HubServer() as hub:
        repository = hub.repositories["datasets/tester/streamed"] = Repository()
        repository.commit({file.name: file.read_bytes() for file in recipe.glob("*.parquet")})
        printed = train_on_recipe(editor, recipe, tmp_path / "straight", hub)
        train_on_recipe(editor, recipe, tmp_path / "killed", hub, kill_at="checkpoint-3")
        assert not (tmp_path / "killed" / "pipeline").exists()
        words = ("--resume_from_checkpoint", "checkpoint-3")
        resumed = train_on_recipe(editor, recipe, tmp_path / "killed", hub, *words)
    straight = read_figures(printed)
    assert list(straight) == [1, 2, 3, 4, 5, 6]
    assert any("token_loss/source/streamed" in figures for figures in straight.values())
    assert read_figures(resumed) == {step: straight[step] for step in (4, 5, 6)}
    for name in ("pipeline", "pipeline-ema"):
        assert not name_changed(tmp_path / "straight" / name, tmp_path / "killed" / name)
    assert name_changed(tmp_path / "straight" / "pipeline", tmp_path / "straight" / "pipeline-ema") == {"transformer"}


def is_saving(folder: Path) -> bool:
    """Tell whether there is a checkpoint in the making that lacks files which the last complete one has."""
    complete, unfinished = list_checkpoints(folder), list(folder.glob("unfinished-checkpoint-*"))
    return bool(complete and unfinished) and set(os.listdir(unfinished[0])) < set(os.listdir(complete[-1]))


def kill_while_saving(process: subprocess.Popen, folder: Path):
    """Kill a process inside the saving of a checkpoint; it is stopped to make sure that it is there."""
    while True:
        assert process.poll() is None, "the run is over, and was not caught while it saved"
        with contextlib.suppress(FileNotFoundError):  # Renamed meanwhile.
            if is_saving(folder):
                process.send_signal(signal.SIGSTOP)
                os.waitpid(process.pid, os.WUNTRACED)
                if is_saving(folder):
                    break
                process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    process.kill()
    process.wait()


def test_run_killed_while_it_saves_goes_on_bit_for_bit_from_the_checkpoint_before(
    editor, tokens, tmp_path, run_here, capsys
):
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    options = {"model": editor, "dataset": tokens, "resolution": TOKEN_RESOLUTION, "batch_size": 4}
    options |= {"learning_rate": 1e-2, "logging_steps": 1}
    command = [sys.executable, EXAMPLES / "train_editar.py", *list_words(options | {"output_dir": killed})]
    command += ["--max_train_steps", "200", "--checkpointing_steps", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        kill_while_saving(process, killed)
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
    assert printed[0] == printed[1] == printed[2]
    assert not name_changed(tmp_path / "pictures" / "pipeline", tmp_path / "tokens" / "pipeline")
    # In other batches the text encoder rounds otherwise.
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
    options |= {"validation_dataset": pictures, "validation_steps": 1, "num_validation_pictures": 1}
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


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
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
    assert "and so did the text encoder" in card


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
        ({"resolution": 20}, "`resolution` is 20: .*16, which this model covers"),
        ({"num_workers": 13}, r"`dataset` '.*' has 12 rows for 13 readers"),
        ({"recipe": "recipe.yaml"}, "Give `dataset` or `recipe`: one of them"),
        ({"ema_decay": 1}, r"`ema_decay` is 1\.0"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "`resume_from_checkpoint` is 'checkpoint-7'"),
        ({"distillation_model": "{editor}/text_encoder"}, "is of type 't5'"),
        ({"dataset": "{tokens}", "distillation_model": "unread"}, "`distillation_model` looks at pictures"),
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
    with pytest.raises(ValueError, match="holds checkpoint-4; pass `--resume_from_checkpoint latest`"):
        run_here("train_editar.py", model=editor, dataset=pictures, output_dir=straight_run[0])


# The README


def test_recipes_of_the_readme_run_as_written(editor, pictures, tmp_path, run_here, monkeypatch):
    """At tiny size: what the commands name lies in the working directory, and sizes are appended to them."""
    (tmp_path / "my-editor").symlink_to(editor)
    (tmp_path / "start").symlink_to(editor)
    (tmp_path / "my-pairs").symlink_to(pictures)
    write_teacher(tmp_path / "facebook" / "dinov2-base")
    (tmp_path / "examples" / "recipes").mkdir(parents=True)
    sources = [{"dataset": "my-pairs", "name": name, "probability": 0.5} for name in ("one", "other")]
    (tmp_path / "examples" / "recipes" / "editar.yaml").write_text(yaml.safe_dump({"sources": sources}))
    monkeypatch.chdir(tmp_path)

    page = (EXAMPLES.parent / "README.md").read_text().replace("\\\n", "")
    commands = re.findall(r"examples/(precompute_tokens|train_editar)\.py +(--[^`\n]*)$", page, re.MULTILINE)
    assert [name for name, _ in commands] == [
        "train_editar",
        "train_editar",
        "precompute_tokens",
        "train_editar",
        "train_editar",
    ]
    tiny = {
        "precompute_tokens": {"resolution": 16},
        "train_editar": {"max_train_steps": 2, "batch_size": 2, "num_workers": 0, "compile": False},
    }
    for name, words in commands:
        run_here(f"{name}.py", *shlex.split(words), *list_words(tiny[name]))
        reset_accelerate()
    assert name_changed(editor, tmp_path / "runs" / "editar" / "pipeline") == {"transformer"}
    assert name_changed(tmp_path / "runs" / "mine" / "pipeline", tmp_path / "runs" / "mine" / "pipeline-ema")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (snippet,) = (block for block in blocks if "load_lora_weights" in block)
    pipe = EditARPipeline.from_pretrained("my-editor")
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    exec(snippet, {"pipe": pipe})
    assert not torch.equal(
        pipe.transformer.state_dict()["model.layers.0.self_attn.q_proj.base_layer.weight"],
        before["model.layers.0.self_attn.q_proj.weight"],
    )
