"""Benchmarks as they are published → samples; what is not as published is refused."""

import io
import json
import re
import struct
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from evaluation_data import (
    PROMPT,
    evaluate,
    make_magicbrush_folder,
    make_picture_folder,
    make_pie_folder,
    make_translation_data,
)
from kornia.filters import canny
from pages import ROOT, list_calls
from PIL import Image
from tiny import draw_image

from editar_hf.evaluation.benchmarks import BENCHMARKS, Benchmark, Sample, decode_mask
from editar_hf.evaluation.systems import SYSTEMS
from editar_hf.evaluation.table import METRICS, PROTOCOLS


def read(name, source, **options):
    """Check a benchmark, and read its samples."""
    return list(Benchmark(name, source, allow_partial=True, **options).read())


def list_values(samples, name):
    return [getattr(sample, name) for sample in samples]


def to_array(picture):
    return np.asarray(picture).astype(int)


def test_every_metric_of_a_benchmark_exists_and_so_do_those_it_trades_off():
    for kind in BENCHMARKS.values():
        assert {*kind.metrics, *kind.trade_off} <= METRICS.keys()


# Of the evaluation sets that EditAR (arXiv 2501.04699) and MagicBrush (arXiv 2306.10012) were measured on.
@pytest.mark.parametrize(
    ("name", "make_source", "count", "hub_id"),
    [
        ("depth", make_translation_data, 5000, "limingcv/MultiGen-20M_depth_eval"),
        ("canny", make_translation_data, 5000, "limingcv/MultiGen-20M_depth_eval"),
        ("segmentation", make_translation_data, 5000, "limingcv/Captioned_COCOStuff"),
        ("magicbrush", make_magicbrush_folder, 1053, None),
        ("magicbrush-multi-turn", make_magicbrush_folder, 1053, None),
    ],
)
def test_a_benchmark_comes_from_where_it_is_published_and_has_as_many_samples(
    name, make_source, count, hub_id, tmp_path
):
    options = {"resolution": 16} if hub_id else {}
    with pytest.raises(ValueError, match=f"`source` has 3 samples; the published benchmark has {count}"):
        Benchmark(name, make_source(tmp_path / "source"), **options)
    assert BENCHMARKS[name].default_source == hub_id


# PIE-Bench


def test_pie_bench_has_its_seven_hundred_samples_and_ten_kinds_in_their_order(tmp_path):
    # By `editing_type_id`, as the authors of PIE-Bench (arXiv 2310.01506) list them.
    published = {
        0: ("random", 140),
        1: ("change object", 80),
        2: ("add object", 80),
        3: ("delete object", 80),
        4: ("change content", 40),
        5: ("change pose", 40),
        6: ("change colour", 40),
        7: ("change material", 40),
        8: ("change background", 80),
        9: ("change style", 80),
    }
    samples = read("pie-bench", make_pie_folder(tmp_path / "pie", num_samples=10))
    assert list_values(samples, "category") == [published[type_id][0] for type_id in range(10)]
    assert BENCHMARKS["pie-bench"].expected == dict(published.values())
    assert sum(BENCHMARKS["pie-bench"].expected.values()) == 700


def test_pie_samples_keep_the_instruction_and_lose_the_brackets(tmp_path):
    sample = read("pie-bench", make_pie_folder(tmp_path / "pie"))[1]
    assert (sample.id, sample.prompt, sample.target_prompt) == ("000000000001", PROMPT, "a blue circle")
    with Image.open(tmp_path / "pie" / "annotation_images" / "some" / "000000000001.jpg") as picture:
        assert np.array_equal(to_array(sample.source_image), to_array(picture.convert("RGB")))
    mask = to_array(sample.mask)
    assert mask[100, 101] == mask[199, 150] == mask[0, 300] == 255
    assert mask[100, 100] == mask[100, 151] == mask[99, 101] == mask[200, 101] == 0
    # A hundred rows of 50, and the border.
    assert (mask == 255).sum() == 100 * 50 + 4 * 512 - 4


def test_a_run_that_leaves_the_grid_is_cut_at_its_end():
    mask = decode_mask([512 * 300 + 510, 4, 512 * 511 + 200, 10_000])
    assert mask[300, 510] == mask[301, 1] == 255
    assert mask[301, 2] == mask[510, 200] == 0


@pytest.mark.parametrize("runs", [[5], [-1, 3], [512 * 512, 1], [4, -2], [1.5, 2], ["1", "2"], [None, 1]])
def test_a_mask_that_is_no_list_of_runs_is_refused(runs):
    with pytest.raises(ValueError, match="the mask of a sample is no list of starts and lengths"):
        decode_mask(runs)


MISSING = object()


def change_entry(folder, **changes):
    mapping = json.loads((folder / "mapping_file.json").read_text())
    changed = mapping["000000000002"] | changes
    mapping["000000000002"] = {name: value for name, value in changed.items() if value is not MISSING}
    (folder / "mapping_file.json").write_text(json.dumps(mapping))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"editing_instruction": MISSING}, "000000000002 in .* has no editing_instruction"),
        ({"editing_instruction": None}, "`editing_instruction` of 000000000002 in .* is None; it must be text"),
        ({"mask": "0 4"}, "`mask` of 000000000002 in .* is '0 4'; it must be a list"),
        ({"image_path": "none.jpg"}, r"the image .*none\.jpg of 000000000002 cannot be read"),
        ({"editing_type_id": "10"}, "`editing_type_id` of 000000000002 is '10'"),
        ({"image_path": "small.png"}, r"the image of 000000000002 has \(64, 64\) pixels"),
        ({"editing_instruction": " "}, "`prompt` of 000000000002 is empty"),
    ],
)
def test_pie_entries_that_are_not_as_published_are_refused(changes, message, tmp_path):
    folder = make_pie_folder(tmp_path / "pie")
    draw_image(0, 64, 64).save(folder / "annotation_images" / "small.png")
    change_entry(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read("pie-bench", folder)


def test_a_part_of_a_benchmark_is_refused_unless_it_is_asked_for(tmp_path, capsys):
    words = ["--benchmark", "pie-bench", "--source", make_pie_folder(tmp_path / "pie")]
    words += ["--system", "copy-source", "--output-dir", tmp_path / "run"]
    assert evaluate("generate", *words) == 2
    assert "'random': 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert evaluate("generate", *words, "--allow-partial") == 0
    assert not json.loads((tmp_path / "run" / "config.json").read_text())["generation"]["data"]["is_complete"]


# Depth, canny, segmentation


def test_pictures_are_scaled_to_the_shortest_side_and_cropped_in_the_middle(tmp_path):
    source = make_translation_data(tmp_path / "depth")
    sample = read("depth", source, resolution=20)[0]
    # 48×40 pixels become 24×20, of which the middle 20 columns stay.
    for name, seed in (("target_image", 0), ("source_image", 1)):
        resized = draw_image(seed, 48, 40).resize((24, 20), Image.Resampling.LANCZOS)
        assert np.array_equal(to_array(getattr(sample, name)), to_array(resized)[:, 2:22])
    assert (sample.task, sample.prompt) == ("depth", "a man")


def test_canny_sources_are_the_edges_of_the_truth(tmp_path):
    sample = read("canny", make_translation_data(tmp_path / "depth"), resolution=32)[1]
    pixels = torch.from_numpy(to_array(sample.target_image)).permute(2, 0, 1)[None].float() / 255
    edges = canny(pixels, 0.1, 0.2)[1][0, 0].numpy()
    assert np.array_equal(to_array(sample.source_image)[..., 0], edges * 255)
    assert 0 < edges.mean() < 1


def test_labels_are_cropped_like_the_picture_and_no_class_is_mixed(tmp_path):
    source = make_translation_data(tmp_path / "segmentation")
    sample = read("segmentation", source, resolution=20)[2]
    labels = to_array(sample.labels)
    assert set(np.unique(labels)) <= {0, 5, 170, 255}
    original = np.random.default_rng(2).choice([0, 5, 170, 255], size=(40, 48))
    assert np.array_equal(labels, original[1::2, 1::2][:, 2:22])


def test_the_detailed_prompt_goes_before_the_other_where_there_is_one(tmp_path):
    source = make_translation_data(tmp_path / "segmentation", detailed_prompt="a man in a red coat")
    benchmark = read("segmentation", source, resolution=20)
    assert list_values(benchmark, "prompt") == ["a man in a red coat", "a red man", "a red man"]


@pytest.mark.parametrize("mode", ["L", "P", "I", "I;16"])
def test_the_classes_of_labels_are_their_numbers_in_every_mode_that_has_numbers(mode, tmp_path):
    classes = np.random.default_rng(0).choice([0, 1, 5, 170, 255], size=(20, 20)).astype(np.uint8)
    dtype = {"I": np.int32, "I;16": np.uint16}.get(mode, np.uint8)
    labels = Image.fromarray(classes.astype(dtype))
    if mode == "P":
        # Colours that say nothing of the classes.
        labels.putpalette(list(range(255, -1, -1)) * 3)
    assert labels.mode == mode
    source = make_translation_data(tmp_path / "segmentation", panoptic_seg_map=labels)
    assert np.array_equal(to_array(read("segmentation", source, resolution=20)[0].labels), classes)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1"])
def test_labels_that_are_no_numbers_of_classes_are_refused(mode, tmp_path):
    labels = Image.fromarray(np.full((40, 48), 5, np.uint8)).convert(mode)
    source = make_translation_data(tmp_path / "segmentation", panoptic_seg_map=labels)
    with pytest.raises(ValueError, match=f"`panoptic_seg_map` of row 0 has the mode '{mode}'; pass an image whose"):
        read("segmentation", source, resolution=20)


@pytest.mark.parametrize(("label", "dtype"), [(171, np.uint8), (-1, np.int32), (511, np.uint16)])
def test_a_class_that_coco_stuff_does_not_have_is_refused(label, dtype, tmp_path):
    labels = Image.fromarray(np.full((40, 48), label, dtype))
    source = make_translation_data(tmp_path / "segmentation", panoptic_seg_map=labels)
    with pytest.raises(ValueError, match=rf"`panoptic_seg_map` of row 0 has the classes \[{label}\]"):
        read("segmentation", source, resolution=20)


def test_a_missing_column_is_named(tmp_path):
    (tmp_path / "other").mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "other" / "validation-0.parquet")
    with pytest.raises(ValueError, match="lacks control_depth, image; it has text"):
        read("depth", tmp_path / "other")


def test_a_table_without_captions_is_refused(tmp_path):
    source = make_translation_data(tmp_path / "segmentation")
    (file,) = source.iterdir()
    datasets.Dataset.from_parquet(str(file)).remove_columns("prompt").to_parquet(str(file))
    with pytest.raises(ValueError, match="`prompt` of row 0 is missing; it must be text"):
        read("segmentation", source, resolution=20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, "`text` of row 0 is None; it must be text"),
        ({"image": None}, "`image` of row 0 is None; it must be an image"),
        ({"image": {"bytes": b"no picture", "path": None}}, "row 0 of .* cannot be read"),
    ],
)
def test_a_row_that_lacks_something_or_does_not_decode_is_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read("depth", make_translation_data(tmp_path / "depth", **changes), resolution=20)


@pytest.mark.filterwarnings("ignore:The EXIF block")
def test_an_image_with_a_damaged_exif_block_is_read_as_it_lies(tmp_path):
    """The block says that the image lies on its side, and its resolution, −1/0, cannot be written again."""
    tags = struct.pack("<HHHIHHHHIII", 2, 0x112, 3, 1, 6, 0, 0x11A, 10, 1, 38, 0) + struct.pack("<ii", -1, 0)
    stream = io.BytesIO()
    Image.new("RGB", (48, 40), "red").save(stream, "jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0" + tags)
    image = {"bytes": stream.getvalue(), "path": None}
    benchmark = read("depth", make_translation_data(tmp_path / "depth", image=image), resolution=20)
    assert len(benchmark) == 3
    assert to_array(benchmark[0].target_image)[10, 10].tolist() == [254, 0, 0]


def test_half_a_parquet_file_is_named(tmp_path):
    source = make_translation_data(tmp_path / "depth")
    (file,) = source.iterdir()
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"validation-.*\.parquet is no whole parquet file"):
        read("depth", source, resolution=20)


@pytest.mark.parametrize("resolution", [0, -8])
def test_a_resolution_without_pixels_is_refused(resolution, tmp_path):
    with pytest.raises(ValueError, match=f"`resolution` is {resolution}"):
        read("depth", make_translation_data(tmp_path / "depth"), resolution=resolution)


# MagicBrush


def test_single_turns_start_from_the_truth_and_multi_turns_from_the_turn_before(tmp_path):
    folder = make_magicbrush_folder(tmp_path / "magicbrush")
    single = read("magicbrush", folder)
    multi = read("magicbrush-multi-turn", folder)
    assert list_values(single, "id") == list_values(multi, "id") == ["30-1", "30-2", "139-1"]
    assert list_values(single, "previous") == [None] * 3
    assert list_values(single, "is_scored") == [True] * 3
    assert list_values(multi, "previous") == [None, "30-1", None]
    assert list_values(multi, "is_scored") == [False, True, True]
    assert np.array_equal(to_array(single[1].source_image), to_array(draw_image(31, 24, 24)))
    assert (single[1].prompt, single[1].category, single[1].target_prompt) == (f"{PROMPT} 2", "turn 2", "a blue circle")


def test_a_source_of_another_size_than_the_truth_is_brought_to_it(tmp_path):
    folder = make_magicbrush_folder(tmp_path / "magicbrush")
    draw_image(3, 30, 20).save(folder / "images" / "30" / "30-input.png")
    assert read("magicbrush", folder)[0].source_image.size == (24, 24)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("edit_sessions", [1], r"line 1 of .*edit_sessions\.json is \[1\]; it must be an object"),
        ("edit_sessions", {"30": {}}, r"`30` of .*edit_sessions\.json is {}; it must be a list"),
        ("edit_sessions", {"30": ["a"]}, r"30-1 in .*edit_sessions\.json is 'a'; it must be an object"),
        ("edit_sessions", {"30": [{"input": "30-input.png"}]}, "`output` of 30-1 in .* is missing; it must be text"),
        ("local_descriptions", {}, r"`30` of .*local_descriptions\.json is missing; it must be an object"),
        ("local_descriptions", {"30": {}, "139": {}}, r"`30-output1\.png` of 30 in .* is missing; it must be text"),
    ],
)
def test_magicbrush_entries_that_are_not_as_published_are_refused(name, content, message, tmp_path):
    folder = make_magicbrush_folder(tmp_path / "magicbrush")
    (folder / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read("magicbrush", folder)


@pytest.mark.parametrize(
    ("name", "make_source", "file", "text", "message"),
    [
        ("folder", make_picture_folder, "metadata.jsonl", b"\n\n{no", "line 3 of {} is no JSON: Expecting"),
        ("folder", make_picture_folder, "metadata.jsonl", b'{"id": "\xe9"}', "{} is not UTF-8"),
        pytest.param("folder", make_picture_folder, "metadata.jsonl", b"[" * 100_000, "line 1 of {} is no", id="deep"),
        pytest.param("folder", make_picture_folder, "metadata.jsonl", b"9" * 5000, "line 1 of {} is no", id="long"),
        ("pie-bench", make_pie_folder, "mapping_file.json", b'{"1":\n no}', "line 2 of {} is no JSON: Expecting"),
        ("magicbrush", make_magicbrush_folder, "edit_sessions.json", b"", "line 1 of {} is no JSON: Expecting"),
    ],
)
def test_json_that_cannot_be_read_is_named_with_file_and_line(name, make_source, file, text, message, tmp_path):
    folder = make_source(tmp_path / "source")
    (folder / file).write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(message.format(folder / file))):
        read(name, folder)


# Folders


def test_a_folder_may_leave_out_all_but_source_and_prompt(tmp_path):
    benchmark = read("folder", make_picture_folder(tmp_path / "pictures"))
    first, last = benchmark[0], benchmark[2]
    assert (first.id, first.category, first.target_prompt) == ("first", "kind", "a blue circle")
    assert set(np.unique(to_array(first.mask))) == {0, 255}
    assert (last.id, last.category, last.target_image, last.mask) == ("00003", "all", None, None)


def test_a_line_with_an_unknown_name_is_refused(tmp_path):
    folder = make_picture_folder(tmp_path / "pictures")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('\n{"source_image_file_name": "0-before.png", "prompt": "p", "instruction": "p"}')
    with pytest.raises(ValueError, match=r"line 4 of .* has source_image_file_name, prompt, instruction"):
        read("folder", folder)


def change_line(folder, **changes):
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines[1] = {name: value for name, value in (lines[1] | changes).items() if value is not MISSING}
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize("name", ["id", "prompt", "category", "task", "target_prompt", "mask_file_name"])
@pytest.mark.parametrize("value", [7, ["a"]])
def test_what_should_be_text_and_is_not_is_named(name, value, tmp_path):
    folder = make_picture_folder(tmp_path / "pictures")
    change_line(folder, **{name: value})
    with pytest.raises(ValueError, match=rf"`{name}` of line 2 of .* is {re.escape(repr(value))}; it must be text"):
        read("folder", folder)


@pytest.mark.parametrize("value", [MISSING, None])
def test_a_line_without_its_prompt_is_refused(value, tmp_path):
    folder = make_picture_folder(tmp_path / "pictures")
    change_line(folder, prompt=value)
    with pytest.raises(ValueError, match=r"`prompt` of line 2 of .* is missing; it must be text"):
        read("folder", folder)


def test_null_says_no_more_than_a_name_left_out(tmp_path):
    folder = make_picture_folder(tmp_path / "pictures")
    change_line(folder, id=None, category=None, mask_file_name=None)
    sample = read("folder", folder)[1]
    assert (sample.id, sample.category, sample.mask) == ("00002", "all", None)


def test_a_line_that_is_a_list_is_refused(tmp_path):
    folder = make_picture_folder(tmp_path / "pictures")
    (folder / "metadata.jsonl").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"line 1 of .* is \[1, 2\]; it must be an object"):
        read("folder", folder)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    folder = make_picture_folder(tmp_path / "pictures")
    file = folder / "metadata.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(read("folder", folder)) == 3


def test_a_picture_too_large_to_open_is_named(tmp_path, monkeypatch):
    folder = make_picture_folder(tmp_path / "pictures")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"the image .*0-before\.png of line 1 of .* cannot be read"):
        read("folder", folder)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_mask_that_marks_the_edit_with_a_small_number_is_refused(dtype, tmp_path):
    folder = make_picture_folder(tmp_path / "pictures")
    white = 1 if dtype is np.uint8 else 255
    Image.fromarray(np.eye(16, dtype=dtype) * dtype(white)).save(folder / "1-mask.png")
    with pytest.raises(ValueError, match="`mask` of 00002 has no pixel above 1"):
        read("folder", folder)


@pytest.mark.filterwarnings("ignore:`mask_image` is 8×8 pixels and its image 16×16; it was resized")
def test_masks_of_a_folder_are_read_as_the_pipeline_reads_them(tmp_path):
    folder = make_picture_folder(tmp_path / "pictures")
    strokes = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    strokes.paste("white", (2, 4, 4, 6))
    strokes.save(folder / "1-mask.png")
    expected = np.zeros((16, 16), dtype=np.uint8)
    expected[8:12, 4:8] = 255
    assert np.array_equal(to_array(read("folder", folder)[1].mask), expected)


def test_a_mask_of_other_proportions_or_of_another_convention_is_refused(tmp_path):
    folder = make_picture_folder(tmp_path / "pictures")
    Image.new("L", (16, 4)).save(folder / "1-mask.png")
    with pytest.raises(ValueError, match=r"1-mask\.png of line 2 of .* of other proportions"):
        read("folder", folder)
    mask = Image.new("RGBA", (16, 16), (90, 120, 60, 255))
    mask.paste((0, 0, 0, 0), (2, 4, 4, 6))
    mask.save(folder / "1-mask.png")
    with pytest.raises(ValueError, match=r"1-mask\.png of line 2 .* has transparency"):
        read("folder", folder)


def test_a_mask_may_be_empty(tmp_path):
    folder = make_picture_folder(tmp_path / "pictures")
    Image.new("L", (16, 16)).save(folder / "1-mask.png")
    assert not to_array(read("folder", folder)[1].mask).any()


# What every benchmark must be


@pytest.fixture
def open_samples(monkeypatch):
    """A function from samples to a benchmark that reads them."""

    def open_samples(*samples):
        kind = BENCHMARKS["folder"]
        monkeypatch.setitem(BENCHMARKS, "folder", replace(kind, read=lambda source, wanted=None: iter(samples)))
        return Benchmark("folder", "here")

    return open_samples


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "a/b"}, "`id` is 'a/b'"),
        ({"id": "one"}, "`id` is 'one'; give each sample one of its own"),
        ({"id": "é" * 101}, "dots and dashes, at most 200"),
        ({"task": "dance"}, "`task` of two is 'dance'"),
        ({"previous": "three"}, "`previous` of two is 'three', which is no earlier sample"),
        ({"mask": Image.new("L", (8, 8))}, r"`mask` of two has \(8, 8\) pixels; its result has 16×16"),
        ({"target_image": Image.new("RGB", (8, 9))}, r"`source_image` of two has \(16, 16\) pixels"),
    ],
)
def test_samples_that_could_not_be_scored_are_refused(changes, message, open_samples):
    samples = [Sample(id=name, prompt="p", source_image=draw_image(0)) for name in ("one", "two")]
    for name, value in changes.items():
        setattr(samples[1], name, value)
    with pytest.raises(ValueError, match=message):
        open_samples(*samples)


def test_the_fingerprint_tells_one_changed_pixel_and_one_changed_word(open_samples):
    fingerprints = set()
    for seed, prompt in [(0, "p"), (1, "p"), (0, "q"), (0, "p")]:
        picture = draw_image(0)
        if seed:
            picture.putpixel((3, 3), (1, 2, 3))
        fingerprints.add(open_samples(Sample("one", prompt, picture)).info["fingerprint"])
    assert len(fingerprints) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "dance"], "`benchmark` is 'dance'; choose one of pie-bench"),
        (["--task", "pie-bench"], "`source` is missing"),
        (["--task", "pie-bench", "--source", "nowhere"], "`source` 'nowhere' has no mapping_file.json"),
        (["--task", "folder", "--source", "nowhere"], "`source` 'nowhere' has no metadata.jsonl"),
        (["--task", "depth", "--source", "./nowhere"], "`source` is './nowhere': there is no such folder"),
        (["--task", "magicbrush", "--source", "nowhere"], "`source` 'nowhere' has no edit_sessions.json"),
        (["--task", "folder", "--source", "x", "--resolution", "32"], "the benchmark folder has no such option"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(words, message, tmp_path, capsys):
    assert evaluate("generate", "--system", "copy-source", *words, "--output-dir", tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_only_samples_that_are_wanted_are_decoded(tmp_path):
    for name, make_source in {
        "pie-bench": make_pie_folder,
        "depth": make_translation_data,
        "magicbrush": make_magicbrush_folder,
        "folder": make_picture_folder,
    }.items():
        benchmark = Benchmark(name, make_source(tmp_path / name), allow_partial=True)
        assert [sample.id for sample in benchmark.read({benchmark.ids[1]})] == benchmark.ids[1:2]


# The page that users read


def test_the_evaluation_page_names_every_benchmark_and_system_and_uses_every_step(tmp_path):
    page = (ROOT / "docs" / "evaluate.md").read_text()
    assert not [name for name in (*BENCHMARKS, *SYSTEMS, *PROTOCOLS) if f"`{name}`" not in page]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    calls = list_calls("docs/evaluate.md", tmp_path)
    steps = {words[2] for words in calls if words[1] in ("evaluate", "projects/stickers/evaluate_stickers.py")}
    assert steps == {"generate", "score", "report", "run"}
