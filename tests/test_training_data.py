"""What training reads: data sets opened under our names, rows made ready, and batches of them."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NUM_CODES, NUM_TEXT_TOKENS, STRIDE, build_processor, draw_image, write_pairs

from editar_hf import EditARImageProcessor, EditARProcessor
from editar_hf.condition_maps import make_canny_map
from editar_hf.pipelines.edit_region import compute_edit_mask, prepare_mask
from editar_hf.processing_editar import TASK_PREFIXES
from editar_hf.training.dataset_specs import DatasetSpec, check_held_out, find_files, load_recipe, open_dataset
from editar_hf.training.rows import RowReader, collate_rows, decode_image, pack_states, unpack_states


RECIPE = Path(__file__).parents[1] / "examples" / "recipes" / "editar.yaml"
THEIR_NAMES = ("before", "after", "caption")
THEIR_COLUMNS = dict(zip(("source_image", "target_image", "prompt"), THEIR_NAMES, strict=True))


def open_pairs(path, split="train", columns=None):
    return open_dataset(DatasetSpec(str(path), split, columns=columns or {}))


def assert_pairs(dataset, num_rows=4):
    """Check that a data set holds the pairs of `write_pairs`, and nothing else, under our names."""
    assert set(dataset.column_names) == {"source_image", "target_image", "prompt"}
    rows = sorted(dataset, key=lambda row: row["prompt"])
    assert [row["prompt"] for row in rows] == [f"prompt {k}" for k in range(num_rows)]
    for k, row in enumerate(rows):
        for name, seed in (("source_image", k), ("target_image", 100 + k)):
            assert np.array_equal(np.asarray(decode_image(row[name])), np.asarray(draw_image(seed)))


# Data sets


def test_parquet_with_other_column_names_loads_under_ours(tmp_path):
    write_pairs(tmp_path / "train-0.parquet", columns=THEIR_NAMES, unrelated=["x"] * 4)
    assert_pairs(open_pairs(tmp_path, columns=THEIR_COLUMNS))
    assert_pairs(open_pairs(tmp_path / "*.parquet", "validation", THEIR_COLUMNS))


def test_columns_under_each_others_names_are_swapped(tmp_path):
    write_pairs(tmp_path / "train.parquet", columns=("target_image", "source_image", "prompt"))
    columns = {"source_image": "target_image", "target_image": "source_image"}
    assert_pairs(open_pairs(tmp_path, columns=columns))


def encode(image):
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


def write_tar(path, indices, source="source.png", target="target.png"):
    """Write pairs k as a webdataset tar: k.source.png, k.target.png, k.prompt.txt."""
    with tarfile.open(path, "w") as tar:
        for k in indices:
            files = {source: encode(draw_image(k)), target: encode(draw_image(100 + k))}
            for name, content in {**files, "prompt.txt": f"prompt {k}".encode()}.items():
                entry = tarfile.TarInfo(f"{k:03d}.{name}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("pattern", ["", "train-*.tar"])
def test_webdataset_tars_are_streamed(pattern, swapped, tmp_path):
    """Also under each other's names, which streams refuse in one step."""
    names = ["target_image", "source_image"] if swapped else ["source.png", "target.png"]
    write_tar(tmp_path / "train-0.tar", range(2), *names)
    write_tar(tmp_path / "train-1.tar", range(2, 3), *names)
    columns = TAR_COLUMNS | {"source_image": names[0], "target_image": names[1]}
    dataset = open_pairs(tmp_path / pattern, columns=columns)
    assert isinstance(dataset, datasets.IterableDataset)
    assert dataset.num_shards == 2
    assert_pairs(dataset, 3)


TAR_COLUMNS = {"source_image": "source.png", "target_image": "target.png", "prompt": "prompt.txt"}


def write_image_folder(folder, num_rows=4):
    folder.mkdir(parents=True)
    lines = []
    for k in range(num_rows):
        draw_image(k).save(folder / f"source-{k}.png")
        draw_image(100 + k).save(folder / f"target-{k}.png")
        names = {f"{name}_image_file_name": f"{name}-{k}.png" for name in ("source", "target")}
        lines.append(json.dumps({**names, "prompt": f"prompt {k}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("folder", ["pairs", "pairs/validation"])
def test_image_folder_with_metadata_loads(tmp_path, folder):
    write_image_folder(tmp_path / folder)
    assert_pairs(open_pairs(tmp_path / "pairs", "validation"))


def test_folder_gives_the_files_of_a_split_in_order(tmp_path):
    for name in ("train-1.parquet", "train-0.parquet", "validation-0.parquet", "train-0.json"):
        (tmp_path / name).touch()
    files = [str(tmp_path / name) for name in ("train-0.parquet", "train-1.parquet")]
    assert find_files(str(tmp_path), "train") == files
    assert find_files(f"{tmp_path}/train-*", "validation") == files
    assert find_files(f"{tmp_path}/*-1.parquet", "validation") == files[1:]


@pytest.mark.parametrize("name", ["pairs[1]", "my [pairs]", "pairs*", "pairs?"])
@pytest.mark.parametrize("kind", ["images", "parquet", "tar", "jsonl"])
def test_a_path_that_exists_is_no_pattern(name, kind, tmp_path):
    """`pairs1`, which the pattern would mean, has fewer rows."""
    columns, suffix = {}, ""
    for folder, num_rows in ((tmp_path / "pairs1", 1), (tmp_path / name, 2)):
        if kind in ("images", "jsonl"):
            write_image_folder(folder, num_rows)
        else:
            folder.mkdir()
        if kind == "parquet":
            write_pairs(folder / "train.parquet", num_rows)
        elif kind == "tar":
            write_tar(folder / "train-0.tar", range(num_rows))
            columns = TAR_COLUMNS
        elif kind == "jsonl":
            columns = {name: f"{name}_file_name" for name in ("source_image", "target_image")}
            suffix = "/metadata.jsonl"
    assert len(list(open_pairs(f"{tmp_path / name}{suffix}", columns=columns))) == 2


@pytest.mark.parametrize(
    ("training", "validation", "shared"),
    [
        ("flat", "flat", "flat"),
        ("flat", "flat/.", "flat"),
        ("apart", "apart/train", "apart/train"),
        ("apart", "apart", None),
        ("flat", "apart", None),
        ("nested", "nested", "nested/validation"),
        ("files", "files", None),
        ("files", "files/*.parquet", r"train-0\.parquet"),
        ("owner/name", "owner/name", None),
    ],
)
def test_validation_on_what_is_trained_on_is_refused(training, validation, shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("flat", "apart/train", "apart/validation", "nested", "nested/validation", "files"):
        write_image_folder(Path(folder), 1) if folder != "files" else Path(folder).mkdir()
    for split in ("train", "validation"):
        write_pairs(f"files/{split}-0.parquet", 1)
    specs = [DatasetSpec(training)], DatasetSpec(validation, "validation")
    if shared is None:
        check_held_out(*specs)
    else:
        with pytest.raises(ValueError, match=f"`validation_dataset` '.*' contains training data, such as .*{shared}"):
            check_held_out(*specs)


def test_validation_on_a_slice_of_a_hub_split_that_is_trained_on_is_refused():
    with pytest.raises(ValueError, match=r"such as owner/name, validation"):
        check_held_out([DatasetSpec("owner/name", "validation[:9]")], DatasetSpec("owner/name", "validation"))


@pytest.mark.parametrize(
    ("columns", "missing"),
    [
        ({}, "source_image, target_image, prompt"),
        ({**THEIR_COLUMNS, "prompt": "text"}, "text"),
        ({**THEIR_COLUMNS, "mask": "region"}, "region"),
    ],
)
def test_missing_columns_are_listed_beside_those_there_are(tmp_path, columns, missing):
    write_pairs(tmp_path / "train.parquet", columns=THEIR_NAMES)
    with pytest.raises(ValueError, match=f"lacks {missing}; it has before, caption, after"):
        open_pairs(tmp_path, columns=columns)


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("nowhere", "train", r"`dataset` is '.*nowhere': there is no such folder or file"),
        ("no-*.parquet", "train", "no parquet or tar or jsonl file matches"),
        ("empty", "train", r"`dataset` '.*' has no images"),
        ("", "validation", r"name starts with 'validation'; it has empty\.parquet, train\.parquet"),
        ("empty.parquet", "train", r"empty\.parquet' does not load"),
        ("damaged/train.parquet", "train", r"does not load: [^()]*Parquet magic bytes not found[^()]* Give"),
        ("damaged/rows.jsonl", "train", r"does not load: .*\(\w+: .*JSON parse error"),
    ],
)
def test_data_sets_that_do_not_load_are_refused(path, split, message, tmp_path):
    for folder in ("empty", "damaged"):
        (tmp_path / folder).mkdir()
    write_pairs(tmp_path / "train.parquet")
    write_pairs(tmp_path / "empty.parquet", num_rows=0)
    (tmp_path / "damaged" / "train.parquet").write_bytes(b"no parquet")
    (tmp_path / "damaged" / "rows.jsonl").write_bytes(b'{"prompt": "p"}\n{"prompt": ')
    with pytest.raises(ValueError, match=message):
        open_pairs(tmp_path / path, split)


# Rows


READ = {"prompt": "a circle", "task": "edit", "dataset": "pairs"}


def build_reader(size=16, num_codes=0, states_shape=(0, 0)):
    return RowReader(EditARImageProcessor(size=size, stride=STRIDE), num_codes, states_shape)


def draw_masks():
    """Draw masks of a 64×32 picture: white on black, on nothing, thin, colored, and of half the size."""
    rows, columns = slice(8, 24), slice(40, 56)
    opaque = np.zeros((32, 64), dtype=np.uint8)
    opaque[rows, columns] = 255
    on_nothing = Image.new("RGBA", (64, 32), (0, 0, 0, 0))
    on_nothing.paste("white", (40, 8, 56, 24))
    thin = Image.new("L", (64, 32))
    thin.putpixel((41, 9), 255)
    colored = Image.new("RGB", (64, 32))
    colored.paste("yellow", (40, 8, 56, 24))
    opaque = Image.fromarray(opaque)
    return {
        "opaque": opaque,
        "on nothing": on_nothing,
        "thin": thin,
        "colored": colored,
        "half": opaque.resize((32, 16), Image.Resampling.NEAREST),
        "none": Image.new("L", (64, 32)),
    }


@pytest.mark.filterwarnings("ignore:`mask_image` is 32×16 pixels and its image is 64×32; the mask was resized")
@pytest.mark.parametrize("resize_mode", ["crop", "stretch"])
@pytest.mark.parametrize("name", draw_masks())
def test_masks_are_read_as_the_pipeline_reads_them(name, resize_mode):
    picture, mask = draw_image(0, 64, 32), draw_masks()[name]
    reader = RowReader(EditARImageProcessor(size=16, stride=STRIDE, resize_mode=resize_mode))
    row = {"source_image": picture, "target_image": picture, "mask": mask, "prompt": "a circle"}
    row = reader.read(row, DatasetSpec("pairs"))
    assert "mask" not in row
    tokens = compute_edit_mask(prepare_mask(mask, (64, 32)), 16, 16, STRIDE, resize_mode)
    assert torch.equal(row["edit_mask"], tokens.flatten())
    # In the crop the edit begins at column 24 of 32, and in the stretched picture at 40 of 64.
    right_half = {"opaque", "on nothing", "colored", "half"}
    expected = ([3] if resize_mode == "crop" else [2, 3]) if name in right_half else []
    if name in right_half:
        assert tokens.any(dim=0).nonzero().flatten().tolist() == expected
    assert tokens.any() == (name != "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_image_tokens": None}, "`target_image_tokens` does not hold 4 tokens"),
        ({"target_image_tokens": [1, 2, 3]}, "`target_image_tokens` does not hold 4 tokens"),
        ({"target_image_tokens": [0.5] * 4}, "`target_image_tokens` does not hold 4 tokens"),
        ({"source_image_tokens": [0, 1, 2, NUM_CODES]}, f"runs from 0 to {NUM_CODES}; .* 0 to {NUM_CODES - 1}"),
        ({"source_image_tokens": [0, -1, 0, 0]}, "`source_image_tokens` runs from -1 to 0"),
        ({"edit_mask": [True] * 5}, "`edit_mask` does not hold 4 tokens"),
        ({"prompt_embeds": None}, "`prompt_embeds` does not hold 5 states of width 3"),
        ({"prompt_embeds": bytes(40)}, "`prompt_embeds` does not hold 5 states of width 3"),
    ],
)
def test_tokens_and_states_of_another_model_make_a_row_unusable(changes, message):
    reader, row = build_reader(8, NUM_CODES, (5, 3)), {"prompt": "a circle", "edit_mask": [True, False] * 2}
    row |= {"source_image_tokens": [0] * 4, "target_image_tokens": [NUM_CODES - 1] * 4, "prompt_embeds": bytes(60)}
    assert reader.read(row, DatasetSpec("pairs"))["task"] == "edit"
    with pytest.raises(ValueError, match=message):
        reader.read(row | changes, DatasetSpec("pairs"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_states_are_packed_and_unpacked_bit_for_bit(dtype):
    states = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    unpacked = unpack_states(pack_states(states), 5, 3)
    assert torch.equal(unpacked, states)
    assert unpacked.dtype == dtype


# Batches


def test_rows_of_pictures_become_what_the_processor_makes_of_each():
    processor, size = build_processor(), {"height": 8, "width": 12}
    image_processor = EditARImageProcessor(size=size, stride=STRIDE, resize_mode="stretch")
    processor = EditARProcessor(image_processor, processor.tokenizer, NUM_TEXT_TOKENS)
    images = [{"source_image": draw_image(k, 20, 10), "target_image": draw_image(k + 9)} for k in range(2)]
    rows = [{**row, **READ, "size": (8, 12)} for row in images]
    # A row without a mask, of a data set that has none, may change everywhere.
    rows[0]["edit_mask"] = torch.tensor([True, True, False, False, False, False])
    batch = collate_rows(rows, processor)
    assert batch.pop("groups") == {"task": ["edit"] * 2, "dataset": ["pairs"] * 2}
    assert batch.pop("grid") == (2, 3)
    shapes = {"source_pixel_values": (2, 3, 8, 12), "target_pixel_values": (2, 3, 8, 12), "edit_mask": (2, 6)}
    shapes |= dict.fromkeys(("input_ids", "attention_mask"), (2, NUM_TEXT_TOKENS))
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == shapes
    assert batch["edit_mask"].tolist() == [[True, True, False, False, False, False], [True] * 6]
    for k, row in enumerate(rows):
        for name in ("source", "target"):
            alone = row[f"{name}_image"].resize((12, 8), Image.Resampling.LANCZOS)
            expected = np.asarray(alone).transpose(2, 0, 1) / 127.5 - 1
            assert np.allclose(batch[f"{name}_pixel_values"][k], expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:A prompt is longer")
def test_rows_of_tokens_become_tensors_and_tasks_their_prefixes():
    reader, processor = build_reader(8, NUM_CODES), build_processor()
    tokens = [{"source_image_tokens": [k] * 4, "target_image_tokens": [k, 1, 2, 3]} for k in range(2)]
    rows = [
        reader.read({**row, "edit_mask": [True, False] * 2, **READ, "task": task}, DatasetSpec("pairs"))
        for row, task in zip(tokens, ("edit", "canny"), strict=True)
    ]
    batch = collate_rows(rows, processor)
    assert batch["source_image_tokens"].tolist() == [[0] * 4, [1] * 4]
    assert batch["target_image_tokens"].tolist() == [[0, 1, 2, 3], [1, 1, 2, 3]]
    assert batch["edit_mask"].tolist() == [[True, False] * 2] * 2
    texts = ["a circle", TASK_PREFIXES["canny"] + "a circle"]
    expected = processor.tokenizer(texts, padding="max_length", truncation=True, max_length=NUM_TEXT_TOKENS)
    assert batch["input_ids"].tolist() == expected.input_ids
    assert batch["attention_mask"].tolist() == expected.attention_mask
    assert batch["groups"] == {"task": ["edit", "canny"], "dataset": ["pairs"] * 2}


# The published data sets

# The three ways in which the data sets of the recipe hold images.
STORED = {
    "bytes": (encode, datasets.Value("binary")),
    "struct": (
        lambda image: {"bytes": encode(image), "path": None},
        {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
    ),
    "image": (lambda image: image, datasets.Image()),
}


def read_published(name, path, stored, images, texts=None, **changes):
    """Write two rows of images and texts, unless `texts` is None, and read them as a data set of the recipe.

    Image `name` of row k is drawn from the seed of both.
    """
    if texts is not None:
        make, feature = STORED[stored]
        rows = {name: [make(draw_image((k, *name.encode()), 24, 24)) for k in range(2)] for name in images}
        features = {**dict.fromkeys(images, feature), **dict.fromkeys(texts, datasets.Value("string"))}
        datasets.Dataset.from_dict({**rows, **texts}, features=datasets.Features(features)).to_parquet(path)
    (spec,) = (spec for spec in load_recipe(RECIPE) if spec.name == name)
    spec = replace(spec, dataset=str(path), **changes)
    return [build_reader().read(row, spec) for row in open_dataset(spec)]


def assert_drawn(rows, **images):
    """Check that the images of rows are those drawn for the given columns of the data set."""
    for k, row in enumerate(rows):
        for ours, theirs in images.items():
            assert np.array_equal(np.asarray(row[ours]), np.asarray(draw_image((k, *theirs.encode()), 24, 24)))


def test_recipe_names_the_published_data_sets_and_probabilities():
    """The defaults of the published script; PIPE half the time each way."""
    totals = {}
    for spec in load_recipe(RECIPE):
        totals[spec.dataset] = totals.get(spec.dataset, 0) + spec.probability
    assert totals == pytest.approx(
        {
            "limingcv/MultiGen-20M_depth": 0.30,
            "limingcv/Captioned_COCOStuff": 0.15,
            "paint-by-inpaint/PIPE": 0.25,
            "seed-data-edit/annotations/*.jsonl": 0.30,
        }
    )
    halves = {spec.name: spec.probability for spec in load_recipe(RECIPE)}
    assert halves["multigen-depth"] == halves["multigen-canny"]
    assert halves["pipe-add"] == halves["pipe-remove"]


@pytest.mark.parametrize("stored", STORED)
def test_multigen_rows_are_depth_maps_or_edges_and_the_picture(stored, tmp_path):
    written = (tmp_path / "train.parquet", stored, ("control_depth", "image"), {"text": ["a barn", "a cow"]})
    depth, canny = (read_published(f"multigen-{task}", *written) for task in ("depth", "canny"))
    assert [(row["prompt"], row["task"]) for row in depth] == [("a barn", "depth"), ("a cow", "depth")]
    assert {row["dataset"] for row in depth} == {"multigen-depth"}
    assert_drawn(depth, source_image="control_depth", target_image="image")
    assert [(row["prompt"], row["task"]) for row in canny] == [("a barn", "canny"), ("a cow", "canny")]
    assert_drawn(canny, target_image="image")
    for row in canny:  # Found at the size the model works at.
        smaller = row["target_image"].resize((16, 16), Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(row["source_image"]), np.asarray(make_canny_map(smaller)))


@pytest.mark.parametrize("detailed", [True, False])
def test_cocostuff_rows_have_the_detailed_prompt_if_there_is_one(detailed, tmp_path):
    texts = {"prompt": ["short"] * 2, **({"detailed_prompt": ["long"] * 2} if detailed else {})}
    rows = read_published("cocostuff", tmp_path / "train.parquet", "struct", ("control_seg", "image"), texts)
    assert [(row["prompt"], row["task"]) for row in rows] == [("long" if detailed else "short", "segmentation")] * 2
    assert_drawn(rows, source_image="control_seg", target_image="image")


def test_pipe_rows_go_both_ways(tmp_path):
    prompts = ["add a dog on the left", "Add two cups"]
    written = (tmp_path / "train.parquet", "image", ("source_img", "target_img"), {"Instruction_VLM-LLM": prompts})
    added, removed = (read_published(name, *written) for name in ("pipe-add", "pipe-remove"))
    assert [row["prompt"] for row in added] == prompts
    assert [row["prompt"] for row in removed] == ["Remove a dog on the left", "Remove two cups"]
    assert_drawn(added, source_image="source_img", target_image="target_img")
    assert_drawn(removed, source_image="target_img", target_image="source_img")
    with pytest.raises(ValueError, match="'Put a hat on' does not begin with 'add '"):
        read_published("pipe-remove", *written[:3], {"Instruction_VLM-LLM": ["Put a hat on"] * 2})


def test_seed_data_edit_rows_are_read_from_json_lines_and_a_folder_of_images(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    lines = []
    for k in range(2):
        names = {name: f"images/{name}-{k}.png" for name in ("source_image", "target_image")}
        for name, file in names.items():
            draw_image((k, *name.encode()), 24, 24).save(tmp_path / file)
        lines.append(json.dumps({**names, "instruction": f"edit {k}"}))
    (tmp_path / "annotations" / "part.jsonl").write_text("\n".join(lines))
    pattern = tmp_path / "annotations" / "*.jsonl"
    rows = read_published("seed-data-edit", pattern, None, (), image_folder=str(tmp_path))
    assert [(row["prompt"], row["task"]) for row in rows] == [("edit 0", "edit"), ("edit 1", "edit")]
    assert_drawn(rows, source_image="source_image", target_image="target_image")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: [", "does not load"),
        ("datasets: []", "lists no `datasets`"),
        ("- dataset: x", "needs a list `datasets`"),
        ("datasets: [{dataset: x, weight: 2}]", "'weight'.* fields are dataset, split, .*probability"),
        ("datasets: [{task: edit}]", "'dataset'"),
        ("datasets: [{dataset: ''}]", "`dataset` is empty"),
        ("datasets: [{dataset: x, probability: 0}]", "`probability` of 'x' is 0; it must be positive"),
        ("datasets: [{dataset: x, task: sketch}]", "`task` is 'sketch'; choose one of 'edit'"),
        ("datasets: [{dataset: x, rewrite: blur}]", "`rewrite` is 'blur'; choose one of 'canny', 'removal'"),
    ],
)
def test_recipes_that_are_none_are_refused(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"`recipe` '.*recipe\.yaml' .*{message}"):
        load_recipe(path)


def test_recipe_with_the_old_name_of_its_list_still_loads(tmp_path, caplog):
    path = tmp_path / "recipe.yaml"
    path.write_text("sources: [{dataset: x}]")
    assert [spec.dataset for spec in load_recipe(path)] == ["x"]
    assert "rename `sources` to `datasets`" in caplog.text
