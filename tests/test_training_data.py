"""What training reads: data sets opened under our names, rows made ready, endless streams of them, batches."""

import io
import json
import logging
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NUM_CODES, NUM_TEXT_TOKENS, STRIDE, TEXT_HIDDEN_SIZE, build_pipeline, draw_image

from editar_hf.condition_maps import make_canny_map
from editar_hf.pipelines.edit_region import compute_edit_mask, prepare_mask
from editar_hf.processing_editar import TASK_PREFIXES
from editar_hf.training.data import EditCollator, check_image_tokens, pack_states, unpack_states
from editar_hf.training.dataset_specs import (
    DatasetSpec,
    check_held_out,
    find_files,
    load_recipe,
    open_dataset,
    rename_columns,
)
from editar_hf.training.rows import RowReader, UnusableRow, ask_for_removal, decode_image


RECIPE = Path(__file__).parents[1] / "examples" / "recipes" / "editar.yaml"


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


def open_pairs(path, split="train", columns=None):
    """Open a data set that is one source."""
    return open_dataset(DatasetSpec(str(path), split, columns=columns or {}))


# Data sets


def write_pairs(path, names=("source_image", "target_image", "prompt"), num_rows=3, **more):
    """Write a parquet file of pairs under the given column names; pair k of any file is the same."""
    source, target, prompt = names
    rows = {
        source: [draw_image(k) for k in range(num_rows)],
        target: [draw_image(100 + k) for k in range(num_rows)],
        prompt: [f"prompt {k}" for k in range(num_rows)],
        **more,
    }
    images = {name: datasets.Image() for name in rows if isinstance(rows[name][:1], list) and name in (source, target)}
    features = datasets.Features({name: images.get(name, datasets.Value("string")) for name in rows})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def assert_pairs(dataset, num_rows=3, column_names=None):
    """Check that a data set holds the pairs of `write_pairs`, and nothing else, under our names."""
    assert set(column_names or dataset.column_names) == {"source_image", "target_image", "prompt"}
    assert len(dataset) == num_rows
    for k, row in enumerate(sorted(dataset, key=lambda row: row["prompt"])):
        assert row["prompt"] == f"prompt {k}"
        for name, seed in (("source_image", k), ("target_image", 100 + k)):
            assert np.array_equal(np.asarray(decode_image(row[name])), np.asarray(draw_image(seed)))


THEIR_NAMES = ("before", "after", "caption")
THEIR_COLUMNS = dict(zip(("source_image", "target_image", "prompt"), THEIR_NAMES, strict=True))


def test_parquet_with_other_column_names_loads_under_ours(tmp_path):
    write_pairs(tmp_path / "train-0.parquet", THEIR_NAMES, unrelated=["x"] * 3)
    assert_pairs(open_pairs(tmp_path, columns=THEIR_COLUMNS))
    assert_pairs(open_pairs(tmp_path / "*.parquet", "validation", THEIR_COLUMNS))


def test_columns_under_each_others_names_are_swapped(tmp_path):
    write_pairs(tmp_path / "train.parquet", ("target_image", "source_image", "prompt"))
    columns = {"source_image": "target_image", "target_image": "source_image"}
    assert_pairs(open_pairs(tmp_path, columns=columns))


@pytest.mark.parametrize("streamed", [False, True])
def test_any_columns_are_renamed_streamed_or_not(streamed):
    dataset = datasets.Dataset.from_dict({"a": [1], "b": [2], "c": [3]})
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    assert list(rename_columns(dataset, {"a": "b", "b": "a", "c": "c"})) == [{"a": 2, "b": 1, "c": 3}]
    assert list(rename_columns(dataset, {"a": "a", "b": "d"})) == [{"a": 1, "d": 2, "c": 3}]


@pytest.mark.parametrize("folder", ["", "validation"])
def test_image_folder_with_metadata_loads(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    lines = []
    for k in range(3):
        draw_image(k).save(tmp_path / folder / f"source-{k}.png")
        draw_image(100 + k).save(tmp_path / folder / f"target-{k}.png")
        names = {"source_file_name": f"source-{k}.png", "target_file_name": f"target-{k}.png"}
        lines.append(json.dumps({**names, "prompt": f"prompt {k}"}))
    (tmp_path / folder / "metadata.jsonl").write_text("\n".join(lines))
    columns = {"source_image": "source", "target_image": "target"}
    assert_pairs(open_pairs(tmp_path, "validation", columns))


def test_folder_gives_the_files_of_a_split_in_order(tmp_path):
    for name in ("train-1.parquet", "train-0.parquet", "validation-0.parquet", "train-0.json"):
        (tmp_path / name).touch()
    files = [str(tmp_path / name) for name in ("train-0.parquet", "train-1.parquet")]
    assert find_files(str(tmp_path), "train") == files
    assert find_files(f"{tmp_path}/train-*", "validation") == files
    assert find_files(f"{tmp_path}/*-1.parquet", "validation") == files[1:]


def write_image_folder(folder, prompt):
    folder.mkdir(parents=True)
    draw_image(0).save(folder / "a.png")
    row = {"source_image_file_name": "a.png", "target_image_file_name": "a.png", "prompt": prompt}
    (folder / "metadata.jsonl").write_text(json.dumps(row))


@pytest.mark.parametrize("name", ["pairs[1]", "my [pairs]", "pairs*", "pairs?"])
@pytest.mark.parametrize("kind", ["pictures", "parquet", "tar", "jsonl"])
def test_a_path_that_exists_is_no_pattern(name, kind, tmp_path):
    columns, suffix = {}, ""
    for folder, prompt in (("pairs1", "another folder's"), (name, "right")):
        folder = tmp_path / folder
        write_image_folder(folder, prompt)
        if kind != "pictures":
            (folder / "metadata.jsonl").rename(folder / "rows.jsonl")
        if kind == "parquet":
            rows = {"source_image": [draw_image(0)], "target_image": [draw_image(0)], "prompt": [prompt]}
            features = {"source_image": datasets.Image(), "target_image": datasets.Image()}
            features = datasets.Features({**features, "prompt": datasets.Value("string")})
            datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
        elif kind == "tar":
            write_tar(folder / "train-0.tar", [0 if prompt == "right" else 1])
            columns = TAR_COLUMNS
        elif kind == "jsonl":
            columns = {n: f"{n}_file_name" for n in ("source_image", "target_image")}
            suffix = "/rows.jsonl"
    row = next(iter(open_pairs(f"{tmp_path / name}{suffix}", columns=columns)))
    assert row["prompt"] == ("prompt 0" if kind == "tar" else "right")
    if kind != "pictures":
        pattern = {"parquet": "*.parquet", "tar": "*.tar", "jsonl": "*.jsonl"}[kind]
        assert find_files(f"{tmp_path / name}/{pattern}", "x") == [str(next((tmp_path / name).glob(pattern)))]


@pytest.mark.parametrize(
    ("file", "content", "cause"),
    [
        ("train.parquet", b"no parquet", "Parquet magic bytes not found"),
        ("rows.jsonl", b'{"prompt": "p"}\n{"prompt": ', r"generating the dataset \(\w+: .*JSON parse error"),
    ],
)
def test_errors_of_datasets_are_told_with_their_cause(file, content, cause, tmp_path):
    draw_image(0).save(tmp_path / "a.png")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"`dataset` '.*' does not load: .*{cause}"):
        open_pairs(tmp_path / "rows.jsonl" if file == "rows.jsonl" else tmp_path)


def test_validation_on_what_is_trained_on_is_refused(tmp_path):
    flat, apart = tmp_path / "flat", tmp_path / "apart"
    write_image_folder(flat, "p")
    write_image_folder(apart / "train", "p")
    write_image_folder(apart / "validation", "q")

    def check(training, validation):
        check_held_out([DatasetSpec(str(training))], DatasetSpec(str(validation), "validation"))

    for training, validation in ((flat, flat), (flat, f"{flat}/."), (apart, apart / "train")):
        with pytest.raises(
            ValueError, match=r"`validation_dataset` '.*' holds what is trained on, such as .*folder `v"
        ):
            check(training, validation)
    check(apart, apart)
    check(flat, apart)
    check("owner/name", "owner/name")
    with pytest.raises(ValueError, match=r"such as owner/name, validation"):
        check_held_out([DatasetSpec("owner/name", "validation[:9]")], DatasetSpec("owner/name", "validation"))
    # A folder `validation` inside the folder of pictures that is trained on.
    write_image_folder(flat / "validation", "q")
    with pytest.raises(ValueError, match=r"such as .*flat/validation/a\.png"):
        check(flat, flat)
    for name in ("train", "validation"):
        write_pairs(tmp_path / f"{name}-0.parquet")
    check(tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"such as .*train-0\.parquet"):
        check(tmp_path, f"{tmp_path}/*.parquet")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "lacks source_image, target_image, prompt; it has before, after, caption"),
        ({**THEIR_COLUMNS, "prompt": "text"}, "lacks text; it has before, after, caption"),
        ({**THEIR_COLUMNS, "mask": "region"}, "lacks region; it has before, after, caption"),
    ],
)
def test_missing_columns_are_listed_beside_those_there_are(tmp_path, columns, message):
    write_pairs(tmp_path / "train.parquet", THEIR_NAMES)
    with pytest.raises(ValueError, match=message):
        open_pairs(tmp_path, columns=columns)


def test_data_sets_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`dataset` is '.*nowhere': there is no such folder or file"):
        open_pairs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`dataset` is empty; give a Hub id"):
        open_pairs("")
    with pytest.raises(ValueError, match="no parquet or tar or jsonl file matches"):
        open_pairs(tmp_path / "train-*.parquet")
    with pytest.raises(ValueError, match=r"`dataset` '.*' does not load: .* that has the split 'train'"):
        open_pairs(tmp_path)
    write_pairs(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"name starts with 'validation'; it has train\.parquet"):
        open_pairs(tmp_path, "validation")
    write_pairs(tmp_path / "empty.parquet", num_rows=0)
    with pytest.raises(ValueError, match=r"empty\.parquet' does not load"):
        open_pairs(tmp_path / "empty.parquet")


def build_token_dataset(**columns):
    ids = [[0, 1, NUM_CODES - 1, 3, 4, 5]] * 2
    rows = {"source_image_tokens": ids, "target_image_tokens": ids, "edit_mask": [[True] * 6] * 2, "prompt": ["a"] * 2}
    return datasets.Dataset.from_dict(rows | columns)


def test_tokens_must_fill_the_grid_and_be_codes_of_the_model():
    check_image_tokens(build_token_dataset(), NUM_CODES, 2, 3)
    check_image_tokens(build_token_dataset().remove_columns("edit_mask"), NUM_CODES, 3, 2)
    check_image_tokens(datasets.Dataset.from_dict({"prompt": ["pictures have no tokens"]}), NUM_CODES, 2, 3)
    with pytest.raises(ValueError, match=r"`source_image_tokens` holds 6 to 6 tokens a row; .* 2 × 2 has 4"):
        check_image_tokens(build_token_dataset(), NUM_CODES, 2, 2)
    with pytest.raises(ValueError, match=f"runs from 0 to {NUM_CODES - 1}; the model has codes 0 to {NUM_CODES - 2}"):
        check_image_tokens(build_token_dataset(), NUM_CODES - 1, 2, 3)
    ragged = build_token_dataset(target_image_tokens=[[0] * 6, [0] * 5])
    with pytest.raises(ValueError, match="`target_image_tokens` holds 5 to 6 tokens"):
        check_image_tokens(ragged, NUM_CODES, 2, 3)
    with pytest.raises(ValueError, match="`target_image_tokens` runs from -1 to 0"):
        check_image_tokens(build_token_dataset(target_image_tokens=[[0] * 6, [-1] * 6]), NUM_CODES, 2, 3)
    with pytest.raises(ValueError, match="`edit_mask` holds 4 to 4"):
        check_image_tokens(build_token_dataset(edit_mask=[[True] * 4] * 2), NUM_CODES, 2, 3)


# Rows to batches


# What every row has that was read from a source.
READ = {"prompt": "a circle", "task": "edit", "dataset": "pairs"}


def build_collator(pipe, height=16, width=16, resize_mode="stretch"):
    return EditCollator(pipe.processor, height, width, resize_mode, STRIDE, TEXT_HIDDEN_SIZE)


def test_rows_of_pictures_become_what_the_processor_makes_of_each(pipe):
    rows = [{"source_image": draw_image(k, 20, 10), "target_image": draw_image(k + 9), **READ} for k in range(2)]
    # A row without a mask, of a source that has none, may change everywhere.
    rows[0]["edit_mask"] = [True, True, False, False, False, False]
    batch = build_collator(pipe, 8, 12)(rows)
    assert batch.pop("groups") == {"task": ["edit"] * 2, "dataset": ["pairs"] * 2}
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    text = (2, NUM_TEXT_TOKENS)
    pixels = (2, 3, 8, 12)
    assert shapes == {
        "source_pixel_values": pixels,
        "target_pixel_values": pixels,
        "input_ids": text,
        "attention_mask": text,
        "edit_mask": (2, 6),
    }
    assert batch["edit_mask"].tolist() == [[True, True, False, False, False, False], [True] * 6]
    for k, row in enumerate(rows):
        for name in ("source", "target"):
            alone = row[f"{name}_image"].resize((12, 8), Image.Resampling.LANCZOS)
            expected = np.asarray(alone).transpose(2, 0, 1) / 127.5 - 1
            assert np.allclose(batch[f"{name}_pixel_values"][k], expected, atol=1e-6)


def draw_masks():
    """Draw masks of a 64×32 picture: white on black, on nothing, thin, coloured, and of half the size."""
    rows, columns = slice(8, 24), slice(40, 56)
    opaque = np.zeros((32, 64), dtype=np.uint8)
    opaque[rows, columns] = 255
    on_nothing = Image.new("RGBA", (64, 32), (0, 0, 0, 0))
    on_nothing.paste("white", (40, 8, 56, 24))
    thin = Image.new("L", (64, 32))
    thin.putpixel((41, 9), 255)
    coloured = Image.new("RGB", (64, 32))
    coloured.paste("yellow", (40, 8, 56, 24))
    opaque = Image.fromarray(opaque)
    return {
        "opaque": opaque,
        "on nothing": on_nothing,
        "thin": thin,
        "coloured": coloured,
        "half": opaque.resize((32, 16), Image.Resampling.NEAREST),
        "none": Image.new("L", (64, 32)),
    }


@pytest.mark.filterwarnings("ignore:`mask_image` is 32×16 pixels and its image 64×32; it was resized")
@pytest.mark.parametrize("resize_mode", ["crop", "stretch"])
@pytest.mark.parametrize("name", draw_masks())
def test_masks_are_read_as_the_pipeline_reads_them(name, resize_mode, pipe):
    picture, mask = draw_image(0, 64, 32), draw_masks()[name]
    row_reader = RowReader(pipe.processor.image_processor, 16, 16, resize_mode, STRIDE)
    row = {"source_image": picture, "target_image": picture, "mask": mask, "prompt": "a circle"}
    row = row_reader.read(row, DatasetSpec("pairs"))
    assert "mask" not in row
    tokens = compute_edit_mask(prepare_mask(mask, (64, 32)), 16, 16, STRIDE, resize_mode)
    assert row["edit_mask"] == tokens.flatten().tolist()
    # In the crop the edit begins at column 24 of 32, and in the stretched picture at 40 of 64.
    right_half = {"opaque", "on nothing", "coloured", "half"}
    expected = ([3] if resize_mode == "crop" else [2, 3]) if name in right_half else []
    if name in right_half:
        assert tokens.any(dim=0).nonzero().flatten().tolist() == expected
    assert tokens.any() == (name != "none")


@pytest.mark.parametrize("stored", [None, [1, 2, 3], [0] * 5])
def test_tokens_that_do_not_fill_the_grid_make_a_row_unusable(stored, pipe):
    row_reader = RowReader(pipe.processor.image_processor, 8, 8, "crop", STRIDE)
    row = {"source_image_tokens": [0] * 4, "target_image_tokens": stored, "prompt": "a circle"}
    with pytest.raises(UnusableRow, match="`target_image_tokens` does not hold 4 tokens"):
        row_reader.read(row, DatasetSpec("pairs"))
    assert row_reader.read(row | {"target_image_tokens": [1] * 4}, DatasetSpec("pairs"))["task"] == "edit"
    with pytest.raises(UnusableRow, match="`prompt_embeds` is empty"):
        row_reader.read(row | {"target_image_tokens": [1] * 4, "prompt_embeds": None}, DatasetSpec("pairs"))


@pytest.mark.filterwarnings("ignore:A prompt is longer")
def test_rows_of_tokens_become_tensors_and_tasks_their_prefixes(pipe):
    rows = [
        {
            "source_image_tokens": [k] * 4,
            "target_image_tokens": [k, 1, 2, 3],
            "edit_mask": [True, False] * 2,
            **READ,
            "task": task,
        }
        for k, task in enumerate(("edit", "canny"))
    ]
    batch = build_collator(pipe)(rows)
    assert batch["source_image_tokens"].tolist() == [[0] * 4, [1] * 4]
    assert batch["target_image_tokens"].tolist() == [[0, 1, 2, 3], [1, 1, 2, 3]]
    assert batch["edit_mask"].tolist() == [[True, False] * 2] * 2
    texts = ["a circle", TASK_PREFIXES["canny"] + "a circle"]
    expected = pipe.processor.tokenizer(texts, padding="max_length", truncation=True, max_length=NUM_TEXT_TOKENS)
    assert batch["input_ids"].tolist() == expected.input_ids
    assert batch["attention_mask"].tolist() == expected.attention_mask
    assert batch["groups"]["task"] == ["edit", "canny"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_states_are_packed_and_unpacked_bit_for_bit(dtype):
    states = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(unpack_states(pack_states(states), 5, 3), states)
    assert unpack_states(pack_states(states), 5, 3).dtype == dtype
    with pytest.raises(ValueError, match="the model reads 5 states of width 4"):
        unpack_states(pack_states(states), 5, 4)


# The published data sets


def encode(picture):
    stream = io.BytesIO()
    picture.save(stream, "png")
    return stream.getvalue()


# The three ways in which the data sets of the recipe hold pictures.
STORED = {
    "bytes": (encode, datasets.Value("binary")),
    "struct": (
        lambda picture: {"bytes": encode(picture), "path": None},
        {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
    ),
    "image": (lambda picture: picture, datasets.Image()),
}


def write_rows(path, stored, pictures, texts):
    """Write two rows of random pictures and of texts; picture `name` of row k has the seed of both."""
    make, feature = STORED[stored]
    rows = {name: [make(draw_image((k, *name.encode()), 24, 24)) for k in range(2)] for name in pictures}
    features = {**dict.fromkeys(pictures, feature), **dict.fromkeys(texts, datasets.Value("string"))}
    datasets.Dataset.from_dict({**rows, **texts}, features=datasets.Features(features)).to_parquet(path)


def read_source(name, path, pipe, **changes):
    """Read all rows of a source of the published recipe, with its data set replaced by a file."""
    (source,) = (source for source in load_recipe(RECIPE) if source.name == name)
    source = replace(source, dataset=str(path), **changes)
    row_reader = RowReader(pipe.processor.image_processor, 16, 16, "crop", STRIDE)
    return [row_reader.read(row, source) for row in open_dataset(source)]


def assert_drawn(picture, k, name):
    assert np.array_equal(np.asarray(picture), np.asarray(draw_image((k, *name.encode()), 24, 24)))


def test_recipe_names_the_published_data_sets_and_probabilities():
    """The defaults of the published script; PIPE half the time each way."""
    totals = {}
    for source in load_recipe(RECIPE):
        totals[source.dataset] = totals.get(source.dataset, 0) + source.probability
    assert totals == pytest.approx(
        {
            "limingcv/MultiGen-20M_depth": 0.30,
            "limingcv/Captioned_COCOStuff": 0.15,
            "paint-by-inpaint/PIPE": 0.25,
            "seed-data-edit/annotations/*.jsonl": 0.30,
        }
    )
    halves = {source.name: source.probability for source in load_recipe(RECIPE)}
    assert halves["multigen-depth"] == halves["multigen-canny"]
    assert halves["pipe-add"] == halves["pipe-remove"]


@pytest.mark.parametrize("stored", STORED)
def test_multigen_rows_are_depth_maps_or_edges_and_the_picture(stored, tmp_path, pipe):
    path = tmp_path / "train-0.parquet"
    write_rows(path, stored, ("control_depth", "image"), {"text": ["a barn", "a cow"]})
    for k, row in enumerate(read_source("multigen-depth", path, pipe)):
        assert (row["prompt"], row["task"], row["dataset"]) == (("a barn", "a cow")[k], "depth", "multigen-depth")
        assert_drawn(row["source_image"], k, "control_depth")
        assert_drawn(row["target_image"], k, "image")
    for k, row in enumerate(read_source("multigen-canny", path, pipe)):
        assert (row["prompt"], row["task"]) == (("a barn", "a cow")[k], "canny")
        assert_drawn(row["target_image"], k, "image")
        # Found at the size the model works at.
        smaller = row["target_image"].resize((16, 16), Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(row["source_image"]), np.asarray(make_canny_map(smaller)))


@pytest.mark.parametrize("detailed", [True, False])
def test_cocostuff_rows_have_the_detailed_prompt_if_there_is_one(detailed, tmp_path, pipe):
    texts = {"prompt": ["short"] * 2, **({"detailed_prompt": ["long"] * 2} if detailed else {})}
    write_rows(tmp_path / "train-0.parquet", "struct", ("control_seg", "image"), texts)
    rows = read_source("cocostuff", tmp_path, pipe)
    assert [(row["prompt"], row["task"]) for row in rows] == [("long" if detailed else "short", "segmentation")] * 2
    assert_drawn(rows[1]["source_image"], 1, "control_seg")
    assert_drawn(rows[1]["target_image"], 1, "image")


def test_pipe_rows_go_both_ways(tmp_path, pipe):
    instructions = {"Instruction_VLM-LLM": ["add a dog on the left", "Add two cups"]}
    write_rows(tmp_path / "train-0.parquet", "image", ("source_img", "target_img"), instructions)
    added, removed = (read_source(name, tmp_path, pipe) for name in ("pipe-add", "pipe-remove"))
    assert [row["prompt"] for row in added] == instructions["Instruction_VLM-LLM"]
    assert [row["prompt"] for row in removed] == ["Remove a dog on the left", "Remove two cups"]
    for k in range(2):
        assert_drawn(added[k]["source_image"], k, "source_img")
        assert_drawn(added[k]["target_image"], k, "target_img")
        assert_drawn(removed[k]["source_image"], k, "target_img")
        assert_drawn(removed[k]["target_image"], k, "source_img")
    with pytest.raises(UnusableRow, match="'Put a hat on' does not begin with 'add '"):
        ask_for_removal("Put a hat on")


def test_seed_data_edit_rows_are_read_from_json_lines_and_a_folder_of_pictures(tmp_path, pipe):
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    lines = []
    for k in range(2):
        names = {name: f"images/{name}-{k}.png" for name in ("source_image", "target_image")}
        for name, file in names.items():
            draw_image((k, *name.encode()), 24, 24).save(tmp_path / file)
        lines.append(json.dumps({**names, "instruction": f"edit {k}"}))
    (tmp_path / "annotations" / "part.jsonl").write_text("\n".join(lines))
    rows = read_source("seed-data-edit", tmp_path / "annotations" / "*.jsonl", pipe, image_folder=str(tmp_path))
    assert [(row["prompt"], row["task"]) for row in rows] == [("edit 0", "edit"), ("edit 1", "edit")]
    for k, row in enumerate(rows):
        for name in ("source_image", "target_image"):
            assert_drawn(row[name], k, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: [", "does not load"),
        ("datasets: []", "has no list `datasets`"),
        ("- dataset: x", "has no list `datasets`"),
        ("datasets: [{dataset: x, weight: 2}]", "names weight; a data set has dataset, split, .*probability"),
        ("datasets: [{task: edit}]", "has a data set without the field `dataset`"),
        ("datasets: [{dataset: x, probability: 0}]", "`probability` of 'x' is 0; it must be positive"),
        ("datasets: [{dataset: x, task: sketch}]", "`task` of 'x' is 'sketch'; the tasks are edit, canny"),
        ("datasets: [{dataset: x, rewrite: blur}]", "`rewrite` of 'x' is 'blur'; there are canny, removal"),
    ],
)
def test_recipes_that_are_none_are_refused(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)
    with pytest.raises(ValueError, match="does not load"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_recipe_with_the_old_name_of_its_list_still_loads(tmp_path, caplog):
    path = tmp_path / "recipe.yaml"
    path.write_text("sources: [{dataset: x}]")
    logging.getLogger("editar_hf").addHandler(caplog.handler)
    assert [spec.dataset for spec in load_recipe(path)] == ["x"]
    assert "rename `sources` to `datasets`" in caplog.text


def write_tar(path, indices):
    """Write pairs k as a webdataset tar: k.source.png, k.target.png, k.prompt.txt."""
    with tarfile.open(path, "w") as tar:
        for k in indices:
            files = {"source.png": encode(draw_image(k)), "target.png": encode(draw_image(100 + k))}
            for name, content in {**files, "prompt.txt": f"prompt {k}".encode()}.items():
                entry = tarfile.TarInfo(f"{k:03d}.{name}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


TAR_COLUMNS = {"source_image": "source.png", "target_image": "target.png", "prompt": "prompt.txt"}


@pytest.mark.parametrize("pattern", ["", "train-*.tar"])
def test_webdataset_tars_are_streamed(pattern, tmp_path):
    write_tar(tmp_path / "train-0.tar", range(2))
    write_tar(tmp_path / "train-1.tar", range(2, 3))
    dataset = open_pairs(tmp_path / pattern, columns=TAR_COLUMNS)
    assert isinstance(dataset, datasets.IterableDataset)
    assert dataset.num_shards == 2
    assert_pairs(list(dataset), column_names=dataset.column_names)
