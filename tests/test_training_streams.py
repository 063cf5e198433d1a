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
from tiny import STRIDE

from editar_hf import EditARImageProcessor
from editar_hf.training.dataset_specs import DatasetSpec
from editar_hf.training.rows import BadRowCount, RowReader, decode_image
from editar_hf.training.streams import MixedRows, build_dataloader


pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
PICTURE = Image.new("RGB", (2, 2), "red")
READER = RowReader(EditARImageProcessor(size=16, stride=STRIDE))
# Pairs 0 … 11 at hand, and pairs 100 … 106 in three shards that are streamed.
NUM_AT_HAND, NUM_STREAMED, NUM_SHARDS = 12, 7, 3


def encode(picture, kind="png"):
    stream = io.BytesIO()
    picture.save(stream, kind)
    return stream.getvalue()


def build_dataset(prompts, spoiled=None):
    """Build a data set of red pairs, of which some rows are changed: `{index: {column: value}}`."""
    rows = [{"prompt": p, "source_image": encode(PICTURE), "target_image": encode(PICTURE)} for p in prompts]
    return datasets.Dataset.from_list([row | (spoiled or {}).get(k, {}) for k, row in enumerate(rows)])


AT_HAND = build_dataset([str(k) for k in range(NUM_AT_HAND)])
STREAMED = build_dataset([str(100 + k) for k in range(NUM_STREAMED)])


def list_pairs(rows):
    """Stand in for a collator: the numbers of the pairs, in their order."""
    return [int(row["prompt"]) for row in rows]


def build_rows(opened, probabilities=(1.0, 2.0), seed=0, max_bad_rows_fraction=0.0, **process):
    specs = [
        DatasetSpec(f"data set {k}", probability=p) for k, p in zip(range(len(opened)), probabilities, strict=False)
    ]
    return MixedRows(specs, opened, READER, BadRowCount(max_bad_rows_fraction), seed, **process)


def stream_shards():
    return STREAMED.to_iterable_dataset(num_shards=NUM_SHARDS)


def take(iterable, count):
    return list(itertools.islice(iterable, count))


@pytest.mark.parametrize(
    ("opened", "pairs"),
    [(AT_HAND, range(NUM_AT_HAND)), (stream_shards(), range(100, 100 + NUM_STREAMED))],
    ids=["at hand", "streamed"],
)
def test_every_epoch_has_each_pair_once_in_an_order_of_its_own(opened, pairs):
    numbers = list_pairs(take(build_rows([opened]), 6 * len(pairs)))
    epochs = [tuple(numbers[start : start + len(pairs)]) for start in range(0, len(numbers), len(pairs))]
    assert all(sorted(epoch) == list(pairs) for epoch in epochs)
    assert len(set(epochs)) > 1
    assert list_pairs(take(build_rows([opened]), len(numbers))) == numbers
    others = [list_pairs(take(build_rows([opened], seed=seed), len(pairs))) for seed in range(1, 6)]
    assert any(tuple(other) != epochs[0] for other in others)


def test_processes_share_the_pairs_of_an_epoch_among_them():
    for opened, pairs in ((AT_HAND, range(12)), (stream_shards(), range(100, 107))):
        parts = []
        for process in range(3):
            rows = build_rows([opened], process=process, num_processes=3)
            # The shards hold 3, 2 and 2 pairs, the parts at hand 4 each.
            parts.append(set(list_pairs(take(rows, len(pairs) // 3))))
        assert not set.intersection(*parts)
        assert len(set.union(*parts)) >= len(pairs) - 1


def test_workers_read_different_pairs_and_all_of_them():
    dataloader = build_dataloader(build_rows([AT_HAND]), list_pairs, batch_size=3, num_workers=2)
    batches = take(dataloader, 4)
    assert sorted(pair for batch in batches for pair in batch) == list(range(NUM_AT_HAND))


def test_data_sets_are_mixed_by_their_probabilities():
    numbers = list_pairs(take(build_rows([AT_HAND, stream_shards()], (1.0, 3.0)), 2000))
    num_streamed = sum(number >= 100 for number in numbers)
    assert abs(num_streamed - 1500) < 4 * np.sqrt(2000 * 0.75 * 0.25)
    # Independent of the place: half a run has as many.
    assert abs(sum(number >= 100 for number in numbers[:1000]) - 750) < 4 * np.sqrt(1000 * 0.75 * 0.25)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_seen", [1, 5, 11])
def test_loader_goes_on_exactly_where_another_stopped(num_workers, num_seen, tmp_path):
    def build():
        rows = build_rows([AT_HAND, stream_shards()])
        return build_dataloader(rows, list_pairs, batch_size=3, num_workers=num_workers)

    dataloader = build()
    batches = iter(dataloader)
    take(batches, num_seen)
    torch.save(dataloader.state_dict(), tmp_path / "state.pt")
    expected = take(batches, 12)
    resumed = build()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert take(resumed, 12) == expected


@pytest.mark.parametrize(
    ("opened", "num_workers", "process"),
    [(AT_HAND, 0, {"process": 12, "num_processes": 13}), (stream_shards(), 4, {})],
    ids=["rows", "shards"],
)
def test_more_readers_than_a_data_set_can_serve_are_refused(opened, num_workers, process):
    # At once: a data set that is drawn seldom would end the run only when its turn comes.
    with pytest.raises(ValueError, match="`dataset` 'data set 0' has fewer"):
        build_dataloader(build_rows([opened], **process), list_pairs, 2, num_workers)


def test_a_run_on_another_number_of_data_sets_cannot_resume():
    state = build_rows([AT_HAND, AT_HAND]).state_dict()
    with pytest.raises(ValueError, match=r"gave 2 data sets in the checkpoint, and now it gives 1\. Resume"):
        build_rows([AT_HAND]).load_state_dict(state)


# Bad rows


SPOILED = {
    2: ({"source_image": b"no picture"}, "`source_image` does not decode"),
    4: ({"target_image": None}, "`target_image` is empty"),
    5: ({"prompt": " \n"}, "`prompt` is empty"),
    9: ({"prompt": None}, "`prompt` is empty"),
}


@pytest.fixture(scope="module")
def spoiled():
    return build_dataset(AT_HAND["prompt"][:], {index: changes for index, (changes, _) in SPOILED.items()})


def test_unusable_rows_are_skipped_counted_and_logged(spoiled, caplog):
    rows = build_rows([spoiled], max_bad_rows_fraction=0.34)
    with caplog.at_level(logging.WARNING, "editar_hf"):
        numbers = list_pairs(take(rows, 16))
    good = [k for k in range(NUM_AT_HAND) if k not in SPOILED]
    assert Counter(numbers) == dict.fromkeys(good, 2)
    assert rows.bad_rows.num_bad == rows.bad_rows.num_read - 16 >= len(SPOILED)
    for index, (_, reason) in SPOILED.items():
        assert f"Skipped data set 0, row {index}: {reason}" in caplog.text


def test_too_many_unusable_rows_stop_a_run_and_the_first_are_named(spoiled):
    message = r"4 of 12 rows .* `max_bad_rows_fraction` 0.3 .* first: data set 0, row \d+: `"
    with pytest.raises(ValueError, match=message):
        take(build_rows([spoiled], max_bad_rows_fraction=0.3), 16)


def test_long_data_sets_are_judged_before_their_end():
    def prepare(row):
        if row % 2:
            raise ValueError("is broken")
        return row

    usable = BadRowCount(0.1).read(enumerate(range(1000)), prepare, "pairs")
    assert take(usable, 50) == list(range(0, 100, 2))
    with pytest.raises(ValueError, match=r"50 of 100 rows .*pairs, row 1: is broken; .*row 9: is broken\. Repair"):
        next(usable)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"source_image": encode(Image.new("RGB", (2000, 1)))}, "An image has 2000×1 pixels"),
        (
            {"target_image": encode(Image.fromarray(np.full((8, 8), 7.5, np.float32)), "tiff")},
            "`target_image` holds floats in",
        ),
        ({"task": "recolour"}, "`task` is 'recolour'; choose one of 'edit'"),
        ({"task": ["edit"]}, "`task` is "),
        ({"source_image": b""}, "`source_image` does not decode"),
        ({"source_image": encode(Image.new("L", (512, 512)))}, "`source_image` does not decode: Image size"),
        ({"mask": encode(Image.new("L", (8, 2)))}, "`mask_image` is 8×2 pixels and its image is 2×2"),
        ({"source_image": encode(Image.new("RGB", (64, 64)))[:60]}, "does not decode"),
    ],
    ids=["thin", "float", "task", "task type", "no bytes", "bomb", "mask", "cut file"],
)
def test_a_row_that_cannot_be_prepared_is_refused(changes, reason, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    row = {"prompt": "1", "source_image": encode(PICTURE), "target_image": encode(PICTURE), **changes}
    for rewrite in (None, "canny"):
        with pytest.raises(ValueError, match=re.escape(reason)):
            READER.read(row, DatasetSpec("pairs", rewrite=rewrite))


@pytest.mark.filterwarnings("ignore:The EXIF block")
def test_a_damaged_exif_block_costs_no_row():
    """The image is said to lie on its side, and its resolution, −1/0, cannot be written again."""
    tags = struct.pack("<HHHIHHHHIII", 2, 0x112, 3, 1, 6, 0, 0x11A, 10, 1, 38, 0) + struct.pack("<ii", -1, 0)
    picture, stream = Image.new("RGB", (8, 4), "red"), io.BytesIO()
    picture.save(stream, "jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0" + tags)
    row = {"prompt": "1", "source_image": stream.getvalue(), "target_image": stream.getvalue()}
    assert READER.read(row, DatasetSpec("pairs"))["source_image"].size == (8, 4)


def test_images_decode_from_bytes_structs_and_paths(tmp_path):
    PICTURE.save(tmp_path / "picture.png")
    content, path = encode(PICTURE), str(tmp_path / "picture.png")
    for value in (PICTURE, content, {"bytes": content, "path": None}, {"bytes": None, "path": path}, path):
        assert decode_image(value).getpixel((0, 0)) == (255, 0, 0)
    assert decode_image("picture.png", image_folder=str(tmp_path)).size == (2, 2)
    for broken in (content[:40], b"", "nowhere.png", {"bytes": None, "path": None}, 3):
        with pytest.raises(ValueError, match="`before`"):
            decode_image(broken, "before")
