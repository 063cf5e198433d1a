"""The scripts in `examples/` beside training, and the commands of the pages on training, at tiny size."""

import json
import shutil
from pathlib import Path

import datasets
import make_sticker_edits as stickers
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from pages import list_calls, read_blocks
from PIL import Image
from scripts import TOKEN_RESOLUTION, list_words, name_changed, reset_accelerate, run_script, write_teacher

from editar_hf import EditARPipeline, EditARVQModel
from editar_hf.processing_editar import apply_task_prefix
from editar_hf.training.dataset_specs import DatasetSpec, check_held_out, open_dataset


# The tiny text length cuts most prompts, with a warning each.
pytestmark = pytest.mark.filterwarnings("ignore:A prompt is longer")


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
            for name in ("source_image", "target_image")
        }
        for name in small:
            pixel_values = torch.from_numpy(small[name].copy()).permute(2, 0, 1)[None] / 127.5 - 1
            assert row[f"{name}_tokens"] == vq_model.encode(pixel_values).image_tokens[0].tolist()
        # A token is free if any pixel of its part of the mask is white.
        cells = np.asarray(true_row["mask"].convert("L")).reshape(2, 32, 2, 32)
        assert row["edit_mask"] == (cells >= 128).any(axis=(1, 3)).ravel().tolist()
    assert {any(mask) for mask in rows["edit_mask"]} | {all(mask) for mask in rows["edit_mask"]} == {True, False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline": "editor", "resolution": 32}, "`resolution` is 32: `height` is 32; pass a multiple of 4 from 4"),
        ({"vq_model": "editor/vq_model", "resolution": 18}, "`resolution` is 18: .* pass a multiple of 4"),
        ({"vq_model": "editor/vq_model"}, "`resolution` is None"),
        ({"vq_model": "editor/vq", "resolution": 8}, r"`vq_model` is '.*editor/vq': there is no such folder"),
        ({"pipeline": "editors"}, r"`pipeline` is '.*editors': there is no such folder"),
        ({}, "Give either `vq_model` or `pipeline`"),
        ({"dataset_name": "other"}, "`dataset_name` is '.*other'; choose one of .*never-opened"),
    ],
)
def test_what_cannot_be_precomputed_is_refused_before_any_work(options, message, editor, tmp_path, run_here):
    options = {name: editor.parent / value if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        run_here("precompute_tokens.py", dataset=tmp_path / "never-opened", output_dir=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_tokens_are_of_the_size_of_the_pipeline_and_know_their_pictures(pictures, editor, tmp_path, run_here):
    run_here("precompute_tokens.py", dataset=pictures, pipeline=editor, output_dir=tmp_path)
    rows = open_dataset(DatasetSpec(str(tmp_path)))
    assert len(rows[0]["source_image_tokens"]) == 16
    check_held_out([DatasetSpec(str(tmp_path))], DatasetSpec(str(pictures), "validation"))
    with pytest.raises(ValueError, match=r"`validation_dataset` .* contains training data"):
        check_held_out([DatasetSpec(str(tmp_path))], DatasetSpec(str(pictures), "train"))


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
    with pytest.raises(ValueError, match=r"holds train-0000.-of-00003\.parquet, but this data set makes 2 shards"):
        run_here("precompute_tokens.py", dataset=pictures, output_dir=folder, **(options | {"shard_size": 6}))
    assert len(list(folder.iterdir())) == 3


# create_sticker_editor.py and evaluate_sticker_editor.py


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
    options = {"settings": ["sampled-2-0.5", "greedy-1"], "batch_size": 7}
    run_script("evaluate_sticker_editor.py", model=sticker_editor, dataset=pictures, output=output, **options)
    results = json.loads(output.read_text())
    controls = {"ceiling", "untouched source", "another instruction"}
    assert set(results) == controls | {"sampled-2-0.5", "greedy-1"}
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
    # The ceiling's images are the yardstick outside the mask.
    ceiling = results["ceiling"]["seen"]["add"]
    assert ceiling["outside_psnr"] == ceiling["outside_psnr_ceiling"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": ["gready-3"]}, "`settings` holds 'gready-3'"),
        ({"settings": ["greedy"]}, "`settings` holds 'greedy'"),
        ({"settings": ["greedy-3-0.5"]}, "`settings` holds 'greedy-3-0.5'"),
        ({"split": "holdout"}, "no parquet file whose name starts with 'holdout'"),
        ({"max_samples": 1}, "`dataset` has one prompt of operation"),
        ({"model": "editor"}, r"`dataset` has images of \(64, 64\) pixels; make one of 16"),
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
        for left, name in ((8, "source_image"), (8 + 2 * 132, "target_image")):
            shown = sheet[44 + index * height :][:128, left : left + 128]
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
    assert [row[1] for row in rows[1:]] == ["copy", *stickers.OPERATIONS, *stickers.TRANSLATIONS, "all but copy"]
    assert rows[1][2:6] == [
        "3",
        *(f"{100 * f[s]['seen']['copy']['done']:.1f}" for f, s in ((base, "ceiling"), (base, "greedy-1"))),
        f"{100 * adapted['greedy-1']['seen']['copy']['done']:.1f}",
    ]
    assert rows[-1][2] == "16"
    assert "rank 2, alpha 2" in card
    assert "Hardware: no GPU" in card
    EditARPipeline.from_pretrained(sticker_editor).load_lora_weights(tmp_path / "shipped")
    results = ModelCard(card).data.eval_results
    assert [result.metric_name.partition(":")[0] for result in results] == [row[1] for row in rows[1:-1]]
    assert [f"{result.metric_value:.1f}" for result in results] == [row[5] for row in rows[1:-1]]
    with Image.open(tmp_path / "shipped" / "copies.png") as sheet:
        assert sheet.size == (4 * 132 + 4, 3 * 132 + 4)


# The pages on training


def test_commands_of_the_training_pages_run_as_written(editor, pictures, tmp_path, run_here, monkeypatch):
    """At tiny size: what the commands name lies in the working directory, and sizes are appended to them."""
    (tmp_path / "my-editor").symlink_to(editor)
    (tmp_path / "start").symlink_to(editor)
    (tmp_path / "my-pairs").symlink_to(pictures)
    write_teacher(tmp_path / "facebook" / "dinov2-base")
    (tmp_path / "examples" / "recipes").mkdir(parents=True)
    specs = [{"dataset": "my-pairs", "name": name, "probability": 0.5} for name in ("one", "other")]
    (tmp_path / "examples" / "recipes" / "editar.yaml").write_text(yaml.safe_dump({"datasets": specs}))
    monkeypatch.chdir(tmp_path)

    calls = [call for page in ("docs/train.md", "docs/lora.md") for call in list_calls(page, tmp_path)]
    assert [call for call in list_calls("README.md", tmp_path) if call[0] == "accelerate"] == calls[-1:]
    commands = []
    for words in calls:
        script = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
        if script is not None:
            commands.append((Path(words[script]).name, words[script + 1 :]))
    steps = {"batch_size": 2, "num_workers": 0, "compile": False}
    tiny = {
        "precompute_tokens.py": {},
        "train_editar.py": {"max_train_steps": 2, **steps},
        "train_vq.py": {"max_steps": 2, "batch_size": 2, "resolution": 16, "base_channels": 32, "num_embeddings": 32},
    }
    assert {name for name, _ in commands} == tiny.keys()
    for name, words in commands:
        run_here(name, *words, *list_words(tiny[name]))
        reset_accelerate()
    assert name_changed(editor, tmp_path / "runs" / "editar" / "pipeline") == {"transformer"}
    assert name_changed(tmp_path / "runs" / "mine" / "pipeline", tmp_path / "runs" / "mine" / "pipeline-ema")
    (snippet,) = (block.code for block in read_blocks("docs/lora.md", "python") if "0.8" in block.code)
    pipe = EditARPipeline.from_pretrained("my-editor")
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    exec(snippet, {"pipe": pipe})
    assert not torch.equal(
        pipe.transformer.state_dict()["model.layers.0.self_attn.q_proj.base_layer.weight"],
        before["model.layers.0.self_attn.q_proj.weight"],
    )
