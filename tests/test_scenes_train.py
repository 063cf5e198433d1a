"""The training of the scene editor, rehearsed: pairs from other processes, both stages, what is shipped."""

import json
import math
import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import ship
import torch
import train
from compose import compose_pair
from features import load_features
from pair_stream import NUM_VALIDATION_CHUNKS, PairStream, compute_token_mask
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from editar_hf import EditARImageProcessor, EditARPipeline, EditARProcessor
from editar_hf.image_processing_editar import choose_grid
from editar_hf.training.tokenizer import train_tokenizer


ROOT = Path(__file__).parents[1]
SHAPES = [(64, 64), (48, 64)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text encoder and features, both tiny."""
    folder = tmp_path_factory.mktemp("scenes")
    tokenizer = train_tokenizer(["remove the ball", "add a red box", "make it night"] * 10, vocab_size=160)
    config = T5Config(vocab_size=len(tokenizer), d_model=64, d_kv=64, d_ff=64, num_heads=1, num_layers=1)
    T5EncoderModel(config).save_pretrained(folder / "text-encoder")
    tokenizer.save_pretrained(folder / "text-encoder")
    save_file(load_features(None).state_dict(), folder / "features.safetensors")
    return folder


@pytest.fixture(scope="module")
def words(bank_folder):
    """What every run is given."""
    return ["--bank", str(bank_folder), "--device", "cpu", "--workers", "1", "--log_steps", "1"]


@pytest.fixture(scope="module")
def inputs(folder):
    """What a run from nothing is given as well."""
    return ["--text_encoder", str(folder / "text-encoder"), "--features", str(folder / "features.safetensors")]


@pytest.fixture(scope="module")
def run(folder, words, inputs):
    """Both stages, some seconds each, as they run on a GPU machine."""
    environment = {**os.environ, "PYTHON": sys.executable, "LIBRARIES": "none", "OUT": str(folder / "slot")}
    options = ["--rehearse", "--stages", "training", "--vq_minutes", "0.05", "--editor_minutes", "0.05"]
    command = ["bash", ROOT / "benchmarks" / "gpu_slot.sh", *options, *words, *inputs]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder / "slot" / "training"


@pytest.fixture(scope="module")
def processor(folder):
    tokenizer = train.AutoTokenizer.from_pretrained(folder / "text-encoder")
    return EditARProcessor(EditARImageProcessor(size=64, stride=8), tokenizer, num_text_tokens=32)


@pytest.mark.filterwarnings("ignore:A prompt is longer")
def test_chunks_are_the_pairs_of_their_numbers(bank, processor):
    stream = PairStream(bank, processor, SHAPES, [0.5, 0.5], 8, chunk_size=2, num_slots=3, num_workers=2, seed=5)
    try:
        shapes = set()
        for _ in range(8):  # more than there are slots: they are used again
            chunk = stream.take(timeout=60)
            height, width = chunk.sources.shape[1:3]
            shapes.add((height, width))
            split = "test" if chunk.number < NUM_VALIDATION_CHUNKS else "train"
            assert chunk.is_validation == (split == "test")
            for place in range(2):
                pair = compose_pair(bank, 5, 2 * chunk.number + place, split=split, height=height, width=width)
                assert np.array_equal(chunk.sources[place], pair.source)
                assert np.array_equal(chunk.targets[place], pair.target)
                assert np.array_equal(chunk.edit_masks[place], compute_token_mask(pair.mask, 8))
                inputs = processor(text=pair.instruction, task=pair.task, return_tensors="np")
                assert np.array_equal(chunk.input_ids[place], inputs.input_ids[0])
            stream.release(chunk)
        assert shapes == set(SHAPES)
    finally:
        stream.close()


def test_a_process_that_fails_is_reported(processor):
    stream = PairStream(None, processor, SHAPES, [0.5, 0.5], 8, chunk_size=2, num_slots=1, num_workers=1)
    try:
        with pytest.raises(RuntimeError, match="Traceback"):
            stream.take(timeout=60)
    finally:
        stream.close()


def test_token_masks_mark_every_square_that_holds_a_pixel():
    mask = np.zeros((16, 24), dtype=bool)
    mask[7, 8] = mask[8, 23] = True
    assert compute_token_mask(mask, 8).tolist() == [False, True, False, False, False, True]


def test_the_shapes_are_those_that_the_pipeline_chooses_for_their_ratios():
    ratios = [(1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (2, 1), (1, 2)]
    assert list(train.SHAPES) == [choose_grid(*ratio, 16) for ratio in ratios]
    assert sum(train.SHAPES.values()) == pytest.approx(1)


def test_edited_pixels_weigh_more_in_the_vq_loss_and_the_mean_stays():
    is_edited = torch.tensor([[True, False, False, False], [True, True, True, True]])
    weights = train.compute_pixel_weights(is_edited, 16, 16, weight=4.0)
    assert torch.allclose(weights.mean(dim=(1, 2, 3)), torch.ones(2))
    assert torch.allclose(weights[0, 0, :8, :8], 4 * weights[0, 0, 8:, 8:])
    assert torch.equal(weights[1], torch.ones(1, 16, 16))


GO_ON = ["--editor", "folder", "--vq-minutes", "0"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "`text_encoder` is None; give `--text-encoder`"),
        (["--text-encoder", "folder"], "`features` is None, but .* 2.5 minutes; give `--features`"),
        (["--text-encoder", "folder", "--vq-model", "folder"], "`features` is None"),
        ([*GO_ON, "--text-encoder", "folder"], "`text_encoder` is folder, but with `--editor` it is not read"),
        ([*GO_ON, "--vq-model", "folder"], "`vq_model` is folder, but with `--editor` it is not read"),
        ([*GO_ON, "--features", "file"], "`features` is file, but with `--vq-minutes 0` it is not read"),
    ],
)
def test_what_a_run_reads_must_be_given_and_nothing_else(words, given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.main([*words, "--output-dir", str(tmp_path / "out"), *given])
    assert not (tmp_path / "out").exists()


def test_both_stages_leave_a_pipeline_that_edits(run, tmp_path):
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in log if line.get("event") == "held out"] == ["vq_model", "editor"]
    assert all(np.isfinite(value) for line in log for value in line.values() if isinstance(value, float))
    pipe = EditARPipeline.from_pretrained(ship.unpack_pipeline(run, tmp_path), dtype="auto")
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe("remove the ball", image=Image.new("RGB", (64, 48)), height=48, width=64).images[0].size == (64, 48)


def test_results_are_at_most_eight_files_of_16_mib(run):
    """Two of them are the benchmarks'. The pipeline is as large as the one that is shipped."""
    files = [path for path in run.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 2**24
    shipped = sum(path.stat().st_size for path in (ROOT / "examples" / "scene-editor").glob("*/*"))
    num_parts = math.ceil(shipped / train.PART_SIZE)
    others = [path for path in files if not path.name.startswith("pipeline.tar.")]
    assert 2 + num_parts + len(others) <= 8
    assert train.PART_SIZE <= 2**24


def test_training_goes_on_from_a_vq_model_and_saves_it_half_way(run, words, inputs, tmp_path, monkeypatch):
    """The clock advances by each reading, and the run is stopped after the first save: the warm-up's first steps."""
    readings, save = count(), train.save_vq_model

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Clock, "progress", property(lambda clock: next(readings) / 20))
    monkeypatch.setattr(train, "save_vq_model", save_and_stop)
    start, stopped = ship.unpack_pipeline(run, tmp_path) / "vq_model", tmp_path / "stopped"
    words = [*words, *inputs, "--rehearse", "--vq_model", str(start), "--output_dir", str(stopped)]
    with pytest.raises(KeyboardInterrupt):
        train.main(words)
    log = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in log] == ["bank", "first chunks"]
    before, after = (
        train.EditARVQModel.from_pretrained(folder, dtype=torch.float32) for folder in (start, stopped / "vq_model")
    )
    pairs = list(zip(before.parameters(), after.parameters(), strict=True))
    assert all(torch.allclose(old, new, atol=1e-3) for old, new in pairs)
    assert not all(torch.equal(old, new) for old, new in pairs)


def test_a_saved_vq_model_has_averages_but_its_own_codes(tmp_path):
    model = train.build_vq_model(rehearse=True)
    average = train.AveragedWeights(model.parameters())
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    wanted["quantize.embedding.weight"] += 1.0
    train.save_vq_model(model, average, tmp_path)
    saved = load_file(tmp_path / "vq_model" / "model.safetensors")
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)


def test_training_goes_on_from_a_pipeline(run, words, tmp_path):
    """No step but a warm-up's first: the weights stay within its learning rate, and the VQ model is the same.

    Neither the text encoder's folder nor the file of features is given.
    """
    editor = ship.unpack_pipeline(run, tmp_path)
    times = ["--vq_minutes", "0", "--editor_minutes", "0.0001"]
    train.main([*words, "--rehearse", "--editor", str(editor), "--output_dir", str(tmp_path / "again"), *times])
    before = EditARPipeline.from_pretrained(editor)
    after = EditARPipeline.from_pretrained(ship.unpack_pipeline(tmp_path / "again", tmp_path / "unpacked"))
    assert torch.equal(before.transformer.model.null_prompt_embeds, after.transformer.model.null_prompt_embeds)
    for name in ("transformer", "text_encoder"):
        pairs = zip(getattr(before, name).parameters(), getattr(after, name).parameters(), strict=True)
        assert all(torch.allclose(old, new, atol=1e-3, rtol=2**-7) for old, new in pairs)
    pairs = zip(before.vq_model.parameters(), after.vq_model.parameters(), strict=True)
    assert all(torch.equal(old, new) for old, new in pairs)


def test_shipped_folder_has_its_defaults_and_credits(run, bank_folder, tmp_path):
    words = ["--parts", run, "--bank", bank_folder, "--output_dir", tmp_path / "editor", "--guidance_scale", 2.5]
    ship.main([str(word) for word in words])
    pipe = EditARPipeline.from_pretrained(tmp_path / "editor")
    assert (pipe.transformer.generation_config.guidance_scale, pipe.processor.num_text_tokens) == (2.5, 32)
    assert (tmp_path / "editor" / "ATTRIBUTION.md").read_text() == (bank_folder / "ATTRIBUTION.md").read_text()
    assert not [path for path in (tmp_path / "editor").rglob("*.json") if str(tmp_path) in path.read_text()]


def test_missing_parts_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="`parts`"):
        ship.unpack_pipeline(tmp_path, tmp_path)
    (tmp_path / "pipeline.tar.1").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pipeline\.tar\.1"):
        ship.unpack_pipeline(tmp_path, tmp_path)
