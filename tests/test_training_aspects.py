"""Training at several aspect ratios: each batch has one, each pair the nearest one, and a run resumes exactly."""

import io
import itertools
import logging
from collections import Counter
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny import STRIDE, build_pipeline, draw_image

from editar_hf import EditARImageProcessor, EditARProcessor
from editar_hf.training.arguments import TrainingArguments
from editar_hf.training.aspects import AspectReader, BucketedRows
from editar_hf.training.checkpoints import load_checkpoint, save_checkpoint
from editar_hf.training.dataset_specs import DatasetSpec
from editar_hf.training.rows import BadRowCount, RowReader, collate_rows
from editar_hf.training.streams import MixedRows, build_dataloader


pytestmark = pytest.mark.filterwarnings(
    "ignore:'set_vital' is deprecated", "ignore:The center crop cuts", "ignore:A prompt is longer"
)
BATCH_SIZE = 3
# Height and width at which a square of 16 pixels is trained, for each aspect ratio.
SIZES = {"1:1": (16, 16), "3:2": (12, 16), "1:2": (16, 8)}
# Width and height of images, and their nearest aspect ratio.
NEAREST = {(20, 20): "1:1", (24, 20): "1:1", (36, 24): "3:2", (80, 20): "3:2", (12, 20): "1:2", (18, 20): "1:1"}


def encode(image, orientation=None):
    stream, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[274] = orientation
    image.save(stream, "png", exif=exif)
    return stream.getvalue()


def build_dataset(sizes, first=0, **columns):
    """Build a data set of pairs whose prompts are numbers from `first` on."""
    images = [draw_image(0, *size) for size in sizes]
    rows = [
        {"prompt": str(first + k), "source_image": encode(image), "target_image": encode(image)}
        for k, image in enumerate(images)
    ]
    return datasets.Dataset.from_list([{**row, **columns} for row in rows])


def build_rows(opened, probabilities=(1.0, 1.0), seed=0, ratios=SIZES, batch_size=BATCH_SIZE, max_bad=0.0, **process):
    specs = [
        DatasetSpec(f"data set {k}", probability=p) for k, p in zip(range(len(opened)), probabilities, strict=False)
    ]
    reader = AspectReader(ratios, RowReader(EditARImageProcessor(size=16, stride=STRIDE)))
    return BucketedRows(batch_size, specs, opened, reader, BadRowCount(max_bad), seed, **process)


def list_pairs(rows):
    """Stand in for a collator: the numbers and the sizes of the pairs."""
    return [(int(row["prompt"]), row["size"]) for row in rows]


def take_batches(rows, count):
    return list(itertools.islice(build_dataloader(rows, list_pairs, BATCH_SIZE, 0), count))


def test_every_pair_has_the_nearest_ratio_and_every_batch_one_ratio():
    sizes = list(NEAREST) * 4
    batches = take_batches(build_rows([build_dataset(sizes)]), 60)
    seen = dict(itertools.chain.from_iterable(batches))
    assert seen == {k: SIZES[NEAREST[size]] for k, size in enumerate(sizes)}
    assert all(len({size for _, size in batch}) == 1 for batch in batches)
    assert [batch[0][1] for batch in batches] != sorted(batch[0][1] for batch in batches)


def test_an_image_lying_on_its_side_counts_as_it_is_shown():
    rows = build_rows([build_dataset([(36, 24)])])
    sideways = encode(draw_image(0, 24, 36), orientation=6)
    rows = build_rows(
        [datasets.Dataset.from_list([{"prompt": "0", "source_image": sideways, "target_image": sideways}])]
    )
    row = next(iter(rows))
    assert (row["size"], row["source_image"].size) == ((12, 16), (36, 24))


def test_the_pairs_of_a_bucket_all_come_before_one_comes_again():
    sizes = [(20, 20)] * 5 + [(36, 24)] * 7
    pairs = list(itertools.chain.from_iterable(take_batches(build_rows([build_dataset(sizes)]), 40)))
    for size, expected in ((SIZES["1:1"], range(5)), (SIZES["3:2"], range(5, 12))):
        own = [number for number, shape in pairs if shape == size]
        epochs = [own[start : start + len(expected)] for start in range(0, len(own), len(expected))][:-1]
        assert len(epochs) > 2
        assert all(sorted(epoch) == list(expected) for epoch in epochs)


def test_buckets_are_drawn_by_their_share_of_the_pairs():
    # Data set 0: 4 squares. Data set 1, three times as probable: 1 square, 3 wide ones. Wide: 3 / 4 · 3 / 4 = 9 / 16.
    opened = [build_dataset([(20, 20)] * 4), build_dataset([(20, 20)] + [(36, 24)] * 3, first=100)]
    batches = take_batches(build_rows(opened, (1.0, 3.0)), 800)
    counts = Counter(batch[0][1] for batch in batches)
    assert abs(counts[SIZES["3:2"]] / 800 - 9 / 16) < 4 * np.sqrt(9 / 16 * 7 / 16 / 800)
    # Among the squares, data set 0 has 1 / 4 and data set 1 has 3 / 4 · 1 / 4.
    squares = [number for batch in batches for number, size in batch if size == (16, 16)]
    assert abs(np.mean(np.array(squares) < 100) - 4 / 7) < 4 * np.sqrt(4 / 7 * 3 / 7 / len(squares))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_seen", [1, 6])
def test_loader_goes_on_exactly_where_another_stopped(num_workers, num_seen, tmp_path):
    opened = [build_dataset(list(NEAREST) * 2), build_dataset(list(NEAREST) * 2, first=100)]

    def build():
        return build_dataloader(build_rows(opened), list_pairs, BATCH_SIZE, num_workers)

    dataloader = build()
    batches = iter(dataloader)
    list(itertools.islice(batches, num_seen))
    torch.save(dataloader.state_dict(), tmp_path / "state.pt")
    expected = list(itertools.islice(batches, 12))
    resumed = build()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.state_dict() == torch.load(tmp_path / "state.pt", weights_only=True)  # As in `load_checkpoint`.
    assert list(itertools.islice(resumed, 12)) == expected


@pytest.fixture
def two_broken():
    """40 wide pairs and 5 squares: a wide image that does not open, and a square one that ends early."""
    dataset = build_dataset([(36, 24)] * 40 + [(20, 20)] * 5)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    broken = {7: b"no image", 42: encode(noise)[:2000]}
    images = [broken.get(k, image) for k, image in enumerate(dataset["source_image"])]
    return dataset.remove_columns("source_image").add_column("source_image", images)


def test_bad_rows_are_counted_over_all_buckets(two_broken, caplog):
    """One image in five of the squares is bad, but only two in 45 of the data set."""
    with caplog.at_level(logging.WARNING, "editar_hf"):
        batches = take_batches(build_rows([two_broken], max_bad=0.05), 60)
    seen = dict(itertools.chain.from_iterable(batches))
    assert seen == {k: (16, 16) if k >= 40 else (12, 16) for k in range(45) if k not in (7, 42)}
    assert "Skipped data set 0, row 7: `source_image` does not decode" in caplog.text


def test_too_many_bad_rows_stop_a_run_before_it_starts_if_their_images_do_not_open(two_broken):
    with pytest.raises(ValueError, match=r"1 of 45 rows .* first: data set 0, row 7: `source_image` does not decode"):
        build_rows([two_broken], max_bad=0.02)
    with pytest.raises(ValueError, match=r"`max_bad_rows_fraction` 0.023 .* The first: data set 0, row 7"):
        take_batches(build_rows([two_broken], max_bad=0.023), 600)


def test_processes_draw_buckets_of_their_own():
    opened = [build_dataset(list(NEAREST) * 4)]
    draws = [
        [batch[0][1] for batch in take_batches(build_rows(opened, process=process, num_processes=2), 20)]
        for process in range(2)
    ]
    assert draws[0] != draws[1]


def test_a_batch_holds_its_grid_and_images_and_masks_of_it():
    pipe, image_processor = build_pipeline(), EditARImageProcessor(size=16, stride=STRIDE, resize_mode="stretch")
    processor = EditARProcessor(image_processor, pipe.processor.tokenizer, pipe.processor.num_text_tokens)
    mask = Image.new("L", (36, 24))
    mask.paste(255, (0, 0, 9, 8))
    opened = build_dataset([(36, 24)] * 3, mask=encode(mask))
    reader = AspectReader(["1:1", "3:2"], RowReader(image_processor))
    rows = BucketedRows(BATCH_SIZE, [DatasetSpec("pairs")], [opened], reader, BadRowCount(0.0), 0)
    batch = next(iter(build_dataloader(rows, partial(collate_rows, processor=processor), BATCH_SIZE, 0)))
    resized = np.asarray(draw_image(0, 36, 24).resize((16, 12), Image.Resampling.LANCZOS))
    assert batch["grid"] == (3, 4)
    assert np.allclose(batch["target_pixel_values"][0].permute(1, 2, 0), resized / 127.5 - 1, atol=1e-6)
    assert batch["edit_mask"].tolist() == [[True] + [False] * 11] * 3


@pytest.mark.parametrize("ratio", ["3", "0:1", "1:0", "5:2", "2:5", "a:b", "1:1:1", "-3:-2"])
def test_bad_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="`aspect_ratios` holds"):
        TrainingArguments(model="/no/where", output_dir="run", aspect_ratios=["1:1", ratio])


def test_streamed_data_and_tokens_are_refused():
    dataset = build_dataset([(20, 20)] * 3)
    with pytest.raises(ValueError, match="'data set 0' is streamed"):
        build_rows([dataset.to_iterable_dataset()])
    with pytest.raises(ValueError, match="'data set 0' holds tokens"):
        build_rows([dataset.rename_columns({"source_image": "source_image_tokens"})])


def test_a_bucket_with_fewer_pairs_than_readers_is_refused():
    with pytest.raises(ValueError, match=r"'data set 0, 3:2' has fewer rows.*leave this ratio out"):
        build_dataloader(build_rows([build_dataset([(20, 20)] * 3 + [(36, 24)])]), list_pairs, BATCH_SIZE, 2)


@pytest.mark.parametrize("ratios", [["1:1", "4:3", "9:16"], ["1:1", "3:2"], ["3:2", "1:1", "1:2"]])
def test_a_state_of_other_ratios_is_refused_and_an_old_one_loads(ratios):
    opened = [build_dataset(list(NEAREST) * 2)]
    state = build_rows(opened).state_dict()
    with pytest.raises(ValueError, match="`aspect_ratios` was 1:1 3:2 1:2 in the checkpoint, and now"):
        build_rows(opened, ratios=ratios).load_state_dict(state)
    old = {name: value for name, value in state.items() if name not in ("aspect_ratios", "batch_size")}
    build_rows(opened).load_state_dict(old)


def test_a_checkpoint_of_other_ratios_is_refused_before_later_ones_are_renamed(on_cpu, tmp_path):
    opened, accelerator = [build_dataset(list(NEAREST) * 2)], Accelerator()
    saved, other = (
        build_dataloader(build_rows(opened, ratios=ratios), list_pairs, BATCH_SIZE, 0) for ratios in (SIZES, ["1:1"])
    )
    for step in (1, 2):
        save_checkpoint(accelerator, tmp_path, step, 2, saved)
    with pytest.raises(ValueError, match="`aspect_ratios` was"):
        load_checkpoint(accelerator, tmp_path, "checkpoint-1", other)
    assert (tmp_path / "checkpoint-2").exists()


def test_a_state_of_data_with_other_ratios_is_refused():
    state = build_rows([build_dataset([(20, 20), (36, 24)])]).state_dict()
    with pytest.raises(ValueError, match=r"gave 2 aspect ratios that have pairs in the checkpoint, and now it gives 1"):
        build_rows([build_dataset([(20, 20)] * 2)]).load_state_dict(state)


def test_a_run_of_another_batch_size_resumes_at_the_start_of_a_batch():
    opened = [build_dataset([(20, 20)] * 4 + [(36, 24)] * 4)]
    rows, resumed = build_rows(opened), build_rows(opened, batch_size=2)
    list(itertools.islice(rows, BATCH_SIZE))
    resumed.load_state_dict(rows.state_dict())
    sizes = [row["size"] for row in itertools.islice(resumed, 40)]
    assert sizes[::2] == sizes[1::2]


def test_states_with_and_without_ratios_are_told_apart():
    opened, specs = [build_dataset([(20, 20)])], [DatasetSpec("pairs")]
    reader = RowReader(EditARImageProcessor(size=16, stride=STRIDE))
    squares = MixedRows(specs, opened, reader, BadRowCount(0.0), 0)
    with pytest.raises(ValueError, match="`aspect_ratios` was not given in the checkpoint, and now it is 1:1 3:2 1:2"):
        build_rows(opened).load_state_dict(squares.state_dict())
    with pytest.raises(ValueError, match="`aspect_ratios` was 1:1 3:2 1:2 in the checkpoint, and now it is not given"):
        squares.load_state_dict(build_rows(opened).state_dict())


def test_the_longer_side_of_a_size_that_is_no_square_is_kept():
    image_processor = EditARImageProcessor(size={"height": 8, "width": 16}, stride=STRIDE)
    readers = AspectReader(SIZES, RowReader(image_processor)).readers
    sizes = [(reader.image_processor.size.height, reader.image_processor.size.width) for reader in readers]
    assert sizes == list(SIZES.values())
