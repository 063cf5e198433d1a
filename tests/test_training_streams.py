"""Endless streams of rows: every pair once an epoch, mixed by probability, resumed exactly, bad rows counted."""

import io
import itertools
import logging
import re
import struct
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import STRIDE, build_pipeline

from editar_hf.training.dataset_specs import DatasetSpec
from editar_hf.training.rows import BadRowCount, RowReader, UnusableRow, decode_image
from editar_hf.training.streams import MixedRows, build_dataloader, collate_first_rows


PICTURE = Image.new("RGB", (2, 2), "red")
# Pairs 0 … 11 at hand, and pairs 100 … 106 in three shards that are streamed.
NUM_AT_HAND, NUM_STREAMED, NUM_SHARDS = 12, 7, 3


def build_dataset(prompts):
    rows = {"prompt": prompts, "source_image": [PICTURE] * len(prompts), "target_image": [PICTURE] * len(prompts)}
    images = dict.fromkeys(("source_image", "target_image"), datasets.Image())
    features = datasets.Features({"prompt": datasets.Value("string"), **images})
    return datasets.Dataset.from_dict(rows, features=features)


AT_HAND = build_dataset([str(k) for k in range(NUM_AT_HAND)])
STREAMED = build_dataset([str(100 + k) for k in range(NUM_STREAMED)])


@pytest.fixture(scope="module")
def row_reader():
    return RowReader(build_pipeline().processor.image_processor, 16, 16, "crop", STRIDE)


def list_pairs(rows):
    """Stand in for a collator: the numbers of the pairs, in their order."""
    return [int(row["prompt"]) for row in rows]


def build_rows(row_reader, opened, probabilities=(1.0, 2.0), seed=0, **process):
    specs = [
        DatasetSpec(f"data set {k}", probability=p) for k, p in zip(range(len(opened)), probabilities, strict=False)
    ]
    return MixedRows(specs, opened, row_reader, 0.0, seed, **process)


def stream_shards():
    return STREAMED.to_iterable_dataset(num_shards=NUM_SHARDS)


def take(iterable, count):
    return list(itertools.islice(iterable, count))


@pytest.mark.parametrize(
    ("opened", "pairs"),
    [(AT_HAND, range(NUM_AT_HAND)), (stream_shards(), range(100, 100 + NUM_STREAMED))],
    ids=["at hand", "streamed"],
)
def test_every_epoch_has_each_pair_once_in_an_order_of_its_own(opened, pairs, row_reader):
    numbers = list_pairs(take(build_rows(row_reader, [opened]), 6 * len(pairs)))
    epochs = [tuple(numbers[start : start + len(pairs)]) for start in range(0, len(numbers), len(pairs))]
    assert all(sorted(epoch) == list(pairs) for epoch in epochs)
    assert len(set(epochs)) > 1
    assert list_pairs(take(build_rows(row_reader, [opened]), len(numbers))) == numbers
    others = [list_pairs(take(build_rows(row_reader, [opened], seed=seed), len(pairs))) for seed in range(1, 6)]
    assert any(tuple(other) != epochs[0] for other in others)


def test_processes_share_the_pairs_of_an_epoch_among_them(row_reader):
    for opened, pairs in ((AT_HAND, range(12)), (stream_shards(), range(100, 107))):
        parts = []
        for process in range(3):
            rows = build_rows(row_reader, [opened], process=process, num_processes=3)
            # The shards hold 3, 2 and 2 pairs, the parts at hand 4 each.
            parts.append(set(list_pairs(take(rows, len(pairs) // 3))))
        assert not set.intersection(*parts)
        assert len(set.union(*parts)) >= len(pairs) - 1


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_workers_read_different_pairs_and_all_of_them(row_reader):
    dataloader = build_dataloader(build_rows(row_reader, [AT_HAND]), list_pairs, batch_size=3, num_workers=2)
    batches = take(dataloader, 4)
    assert sorted(pair for batch in batches for pair in batch) == list(range(NUM_AT_HAND))


def test_data_sets_are_mixed_by_their_probabilities(row_reader):
    numbers = list_pairs(take(build_rows(row_reader, [AT_HAND, stream_shards()], (1.0, 3.0)), 2000))
    num_streamed = sum(number >= 100 for number in numbers)
    assert abs(num_streamed - 1500) < 4 * np.sqrt(2000 * 0.75 * 0.25)
    # Independent of the place: half a run has as many.
    assert abs(sum(number >= 100 for number in numbers[:1000]) - 750) < 4 * np.sqrt(1000 * 0.75 * 0.25)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_seen", [1, 5, 11])
def test_loader_goes_on_exactly_where_another_stopped(num_workers, num_seen, row_reader, tmp_path):
    def build():
        rows = build_rows(row_reader, [AT_HAND, stream_shards()])
        return build_dataloader(rows, list_pairs, batch_size=3, num_workers=num_workers)

    dataloader = build()
    batches = iter(dataloader)
    take(batches, num_seen)
    torch.save(dataloader.state_dict(), tmp_path / "state.pt")
    expected = take(batches, 12)
    resumed = build()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert take(resumed, 12) == expected


def test_more_readers_than_a_source_can_serve_are_refused(row_reader):
    rows = build_rows(row_reader, [AT_HAND, stream_shards()])
    message = "`num_workers` is 4; `dataset` 'data set 1' has 3 shards for each of 1 processes"
    with pytest.raises(ValueError, match=message):
        build_dataloader(rows, list_pairs, batch_size=2, num_workers=4)
    rows = build_rows(row_reader, [AT_HAND], num_processes=13)
    with pytest.raises(ValueError, match="'data set 0' has 12 rows for 13 readers"):
        build_dataloader(rows, list_pairs, batch_size=2, num_workers=0)


# Bad rows


def spoil(dataset, spoiled):
    """Store a data set's pictures as bytes, and change some rows: `{index: {column: value}}`."""
    rows = [{**row} for row in dataset.cast_column("source_image", datasets.Image(decode=False))]
    for row in rows:
        row["source_image"], row["target_image"] = row["source_image"]["bytes"], row["source_image"]["bytes"]
    for index, changes in spoiled.items():
        rows[index].update(changes)
    return datasets.Dataset.from_list(rows)


SPOILED = {
    2: ({"source_image": b"no picture"}, "`source_image` does not decode"),
    4: ({"target_image": None}, "`target_image` is empty"),
    5: ({"prompt": " \n"}, "`prompt` is empty"),
    9: ({"prompt": None}, "`prompt` is empty"),
}


@pytest.fixture
def spoiled():
    return spoil(AT_HAND, {index: changes for index, (changes, _) in SPOILED.items()})


def test_unusable_rows_are_skipped_counted_and_logged(spoiled, row_reader, caplog):
    rows = MixedRows([DatasetSpec("pairs")], [spoiled], row_reader, max_bad_rows_fraction=0.34, seed=0)
    with caplog.at_level(logging.WARNING, "editar_hf"):
        logging.getLogger("editar_hf").addHandler(caplog.handler)
        numbers = list_pairs(take(rows, 16))
    good = [k for k in range(NUM_AT_HAND) if k not in SPOILED]
    assert Counter(numbers) == dict.fromkeys(good, 2)
    assert rows.bad_rows.num_bad == rows.bad_rows.num_read - 16 >= len(SPOILED)
    for index, (_, reason) in SPOILED.items():
        assert f"Skipped pairs, row {index}: {reason}" in caplog.text


def encode(picture, kind="png"):
    stream = io.BytesIO()
    picture.save(stream, kind)
    return stream.getvalue()


REFUSED = {
    "thin": ({"source_image": encode(Image.new("RGB", (2000, 1)))}, "An image has 2000×1 pixels"),
    "float": (
        {"target_image": encode(Image.fromarray(np.full((8, 8), 7.5, np.float32)), "tiff")},
        "`target_image` holds floats in",
    ),
    "task": ({"task": "recolour"}, "`task` is 'recolour'; the tasks are edit"),
    "task type": ({"task": ["edit"]}, "`task` is "),
    "no bytes": ({"source_image": b""}, "`source_image` does not decode: it is in no known format"),
    "bomb": ({"source_image": encode(Image.new("L", (512, 512)))}, "`source_image` does not decode: Image size"),
    "mask": ({"mask": encode(Image.new("L", (8, 2)))}, "`mask_image` is 8×2 pixels and its image 2×2"),
    "cut file": ({"source_image": encode(Image.new("RGB", (64, 64)))[:60]}, "`source_image` does not decode"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_cannot_be_prepared_is_skipped_in_training_and_validation(name, row_reader, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    changes, reason = REFUSED[name]
    rows = [
        {"prompt": str(k), "source_image": encode(PICTURE), "target_image": encode(PICTURE)}
        | ({"mask": encode(PICTURE)} if "mask" in changes else {})
        for k in range(4)
    ]
    rows[2] |= changes
    source, bad_rows = DatasetSpec("pairs"), BadRowCount(0.5)

    def collate(rows):
        return {"pairs": list_pairs(rows), "groups": "for logs"}

    batches = collate_first_rows(rows, source, row_reader, collate, 3, 1, bad_rows)
    assert batches == [{"pairs": [0, 1, 3]}]
    assert (bad_rows.num_read, bad_rows.num_bad) == (4, 1)
    assert bad_rows.offenders[0].startswith(f"pairs, row 2: {reason}")
    with pytest.raises(UnusableRow, match=re.escape(reason)):
        row_reader.read(rows[2], DatasetSpec("pairs", rewrite="canny"))


@pytest.mark.filterwarnings("ignore:The EXIF block")
def test_a_damaged_exif_block_costs_no_row(row_reader):
    """The image is said to lie on its side, and its resolution, −1/0, cannot be written again."""
    tags = struct.pack("<HHHIHHHHIII", 2, 0x112, 3, 1, 6, 0, 0x11A, 10, 1, 38, 0) + struct.pack("<ii", -1, 0)
    picture, stream = Image.new("RGB", (8, 4), "red"), io.BytesIO()
    picture.save(stream, "jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0" + tags)
    row = {"prompt": "1", "source_image": stream.getvalue(), "target_image": stream.getvalue()}
    assert row_reader.read(row, DatasetSpec("pairs"))["source_image"].size == (8, 4)


def test_too_many_unusable_rows_stop_a_run_and_the_first_are_named(spoiled, row_reader):
    rows = MixedRows([DatasetSpec("pairs")], [spoiled], row_reader, max_bad_rows_fraction=0.3, seed=0)
    with pytest.raises(ValueError, match=r"4 of 12 rows .* `max_bad_rows_fraction` 0.3 .* first: pairs, row \d+: `"):
        take(rows, 16)


def test_long_data_sets_are_judged_before_their_end():
    def prepare(row):
        if row % 2:
            raise UnusableRow("is broken")
        return row

    usable = BadRowCount(0.1).read(enumerate(range(1000)), prepare, "pairs")
    assert take(usable, 50) == list(range(0, 100, 2))
    with pytest.raises(ValueError, match=r"50 of 100 rows .*pairs, row 1: is broken; .*row 9: is broken\. Repair"):
        next(usable)


def test_the_first_usable_rows_are_what_a_run_is_validated_on(spoiled, row_reader):
    def collate(rows):
        return {"pairs": list_pairs(rows), "groups": "for logs"}

    source = DatasetSpec("pairs", split="validation")
    bad_rows = BadRowCount(0.0)
    batches = collate_first_rows(spoiled, source, row_reader, collate, 3, 2, bad_rows)
    assert (bad_rows.num_read, bad_rows.num_bad) == (9, 3)
    assert batches == [{"pairs": [0, 1, 3]}, {"pairs": [6, 7, 8]}]
    unusable = spoil(AT_HAND, {k: {"prompt": ""} for k in range(NUM_AT_HAND)})
    with pytest.raises(ValueError, match="`validation_dataset` 'pairs' has no usable row"):
        collate_first_rows(unusable, source, row_reader, collate, 3, 2, bad_rows)


def test_pictures_decode_from_bytes_structs_and_paths(tmp_path):
    PICTURE.save(tmp_path / "picture.png")
    content = (tmp_path / "picture.png").read_bytes()
    path = str(tmp_path / "picture.png")
    ways = [PICTURE, content, {"bytes": content, "path": None}, {"bytes": None, "path": path}, path]
    for value in ways:
        assert decode_image(value).getpixel((0, 0)) == (255, 0, 0)
    assert decode_image("picture.png", str(tmp_path)).size == (2, 2)
    for broken in (content[:40], b"", "nowhere.png", {"bytes": None, "path": None}, 3):
        with pytest.raises(UnusableRow):
            decode_image(broken)
