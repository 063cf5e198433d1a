"""How tests run the scripts in `examples/` and `projects/stickers/`, and the fixtures that they run them on."""

import os
import re
import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from processes import run_python
from safetensors.torch import load_file
from tiny import build_pipeline, redraw_weights
from transformers import Dinov2Config, Dinov2Model

from editar_hf import EditARForConditionalGeneration, EditARPipeline, EditARVQConfig, EditARVQModel


EXAMPLES = Path(__file__).parents[1] / "examples"
STICKERS = EXAMPLES.parent / "projects" / "stickers"
sys.path.insert(0, str(STICKERS))

import make_sticker_edits as stickers  # noqa: E402


# Pairs for the editor of `tiny` are encoded at half its side: 2×2 tokens.
TOKEN_RESOLUTION, NUM_TOKENS = 8, 4
NUM_TRAIN = 12
TEACHER_WIDTH = 12


def list_words(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", *map(str, np.atleast_1d(value)))]


def find_script(name: str) -> Path:
    return next(folder / name for folder in (EXAMPLES, STICKERS) if (folder / name).exists())


def run_script(name: str, *words: str, environment: dict | None = None, **options) -> str:
    """Run a script in a process of its own and return what it printed."""
    environment = {**(environment or os.environ), "ACCELERATE_USE_CPU": "true"}
    finished = run_python(find_script(name), *list_words(options), *words, environment=environment)
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
        script = str(find_script(name))
        monkeypatch.setattr(sys, "argv", [script, *list_words(options), *words])
        runpy.run_path(script, run_name="__main__")

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


def save_calm(pipeline: EditARPipeline, folder: Path):
    """Save a pipeline that trains without dropout."""
    for name in ("text_dropout", "residual_dropout", "mlp_dropout"):
        setattr(pipeline.transformer.config, name, 0.0)
    pipeline.text_encoder.config.dropout_rate = 0.0
    pipeline.save_pretrained(folder)


def name_changed(before: Path, after: Path) -> set[str]:
    """Name the components of two pipeline folders that differ in any bit of their weights."""
    before, after = load_weights(before), load_weights(after)
    assert before.keys() == after.keys()
    return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def own_datasets_cache(tmp_path_factory):
    """Keep what `datasets` caches apart from that of other test files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# What the scripts work on


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A small "stickers" data set of 64×64 pixels: every operation twice in `test`, and some held-out ones."""
    folder = tmp_path_factory.mktemp("stickers")
    plan = stickers.plan_split("test", 5)
    jobs = {"train": [None] * NUM_TRAIN, "validation": [None] * 5, "test": plan[:16] + plan[40:42] + plan[-2:]}
    for split, split_jobs in jobs.items():
        stickers.write_shard(folder / f"{split}-00000-of-00001.parquet", 3, split, 0, split_jobs, 64)
    return folder


@pytest.fixture(scope="session")
def editor(tmp_path_factory) -> Path:
    """The pipeline of `tiny`, with a distillation head and with the dropouts of the published training."""
    pipeline = build_pipeline()
    config = pipeline.transformer.config
    config.distillation_hidden_size = TEACHER_WIDTH
    pipeline.register_modules(transformer=redraw_weights(EditARForConditionalGeneration(config), scale=0.3))
    folder = tmp_path_factory.mktemp("pipelines") / "editor"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def calm_editor(editor) -> Path:
    """The same without dropout: what it computes in training can be computed again."""
    folder = editor.with_name("calm-editor")
    save_calm(EditARPipeline.from_pretrained(editor), folder)
    return folder


@pytest.fixture(scope="session")
def tokens(pictures, editor, tmp_path_factory) -> Path:
    """The pictures to train on as tokens, in shards of five."""
    folder = tmp_path_factory.mktemp("tokens")
    options = {"vq_model": editor / "vq_model", "resolution": TOKEN_RESOLUTION, "batch_size": 3, "shard_size": 5}
    run_script("precompute_tokens.py", dataset=pictures, output_dir=folder, **options)
    return folder


@pytest.fixture(scope="session")
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
