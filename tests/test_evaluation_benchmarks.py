"""Benchmarks as they are published → samples; what is not as published is refused."""

import io
import json
import struct
from dataclasses import replace

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
    with pytest.raises(ValueError, match=f"`source` has 3 samples; the published benchmark has {count}"):
        Benchmark(name, make_source(tmp_path / "source"))
    assert BENCHMARKS[name].default_source == hub_id


def test_every_metric_of_a_benchmark_exists_and_so_do_those_it_trades_off():
    for kind in BENCHMARKS.values():
        assert {*kind.metrics, *kind.trade_off} <= METRICS.keys()


@pytest.mark.parametrize(
    ("name", "make_source"),
    [
        ("pie-bench", make_pie_folder),
        ("depth", make_translation_data),
        ("magicbrush", make_magicbrush_folder),
        ("folder", make_picture_folder),
    ],
)
def test_only_samples_that_are_wanted_are_decoded(name, make_source, tmp_path):
    benchmark = Benchmark(name, make_source(tmp_path / name), allow_partial=True)
    wanted = list(benchmark.categories)[1]
    assert [sample.id for sample in benchmark.read({wanted})] == [wanted]


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
        6: ("change color", 40),
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


def test_a_run_of_a_mask_that_leaves_the_grid_is_cut_at_its_end():
    mask = decode_mask([512 * 300 + 510, 4, 512 * 511 + 200, 10_000])
    assert mask[300, 510] == mask[301, 1] == 255
    assert mask[301, 2] == mask[510, 200] == 0


def test_a_part_of_a_benchmark_is_refused_unless_it_is_asked_for(tmp_path, capsys):
    words = ["--benchmark", "pie-bench", "--source", make_pie_folder(tmp_path / "pie")]
    words += ["--system", "copy-source", "--output-dir", tmp_path / "run"]
    assert evaluate("generate", *words) == 2
    assert "'random': 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert evaluate("generate", *words, "--allow-partial") == 0


# Depth, canny, segmentation


def test_pictures_are_scaled_to_the_shortest_side_and_cropped_in_the_middle(tmp_path):
    sample = read("depth", make_translation_data(tmp_path / "depth"), resolution=20)[0]
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
    source = make_translation_data(tmp_path / "segmentation", detailed_prompt="a man in a red coat")
    samples = read("segmentation", source, resolution=20)
    original = np.random.default_rng(2).choice([0, 5, 170, 255], size=(40, 48))
    assert np.array_equal(to_array(samples[2].labels), original[1::2, 1::2][:, 2:22])
    # The detailed prompt goes before the other where there is one.
    assert list_values(samples, "prompt") == ["a man in a red coat", "a red man", "a red man"]


@pytest.mark.parametrize("mode", ["L", "P", "I", "I;16"])
def test_the_classes_of_labels_are_their_numbers_in_every_mode_that_has_numbers(mode, tmp_path):
    classes = np.random.default_rng(0).choice([0, 1, 5, 170, 255], size=(20, 20)).astype(np.uint8)
    labels = Image.fromarray(classes.astype({"I": np.int32, "I;16": np.uint16}.get(mode, np.uint8)))
    if mode == "P":
        # Colors that say nothing of the classes.
        labels.putpalette(list(range(255, -1, -1)) * 3)
    assert labels.mode == mode
    source = make_translation_data(tmp_path / "segmentation", panoptic_seg_map=labels)
    assert np.array_equal(to_array(read("segmentation", source, resolution=20)[0].labels), classes)


@pytest.mark.parametrize(
    "labels",
    [np.full((40, 48, 3), 5, np.uint8), np.full((40, 48), 171, np.uint8), np.full((40, 48), -1, np.int32)],
    ids=["colors", "171", "-1"],
)
def test_labels_that_are_no_classes_of_coco_stuff_are_refused(labels, tmp_path):
    source = make_translation_data(tmp_path / "segmentation", panoptic_seg_map=Image.fromarray(labels))
    with pytest.raises(ValueError, match=r"`source`: sample 00000: `panoptic_seg_map` .* 0 to 170, or 255"):
        read("segmentation", source, resolution=20)


@pytest.mark.filterwarnings("ignore:The EXIF block")
def test_an_image_with_a_damaged_exif_block_is_read_as_it_lies(tmp_path):
    """The block says that the image lies on its side, and its resolution, −1/0, cannot be written again."""
    tags = struct.pack("<HHHIHHHHIII", 2, 0x112, 3, 1, 6, 0, 0x11A, 10, 1, 38, 0) + struct.pack("<ii", -1, 0)
    stream = io.BytesIO()
    Image.new("RGB", (48, 40), "red").save(stream, "jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0" + tags)
    image = {"bytes": stream.getvalue(), "path": None}
    samples = read("depth", make_translation_data(tmp_path / "depth", image=image), resolution=20)
    assert len(samples) == 3
    assert to_array(samples[0].target_image)[10, 10].tolist() == [254, 0, 0]


# MagicBrush


def test_single_turns_start_from_the_truth_and_multi_turns_from_the_turn_before(tmp_path):
    folder = make_magicbrush_folder(tmp_path / "magicbrush")
    # A source of another size than the truth is brought to it.
    draw_image(3, 30, 20).save(folder / "images" / "30" / "30-input.png")
    single, multi = read("magicbrush", folder), read("magicbrush-multi-turn", folder)
    assert list_values(single, "id") == list_values(multi, "id") == ["30-1", "30-2", "139-1"]
    assert list_values(single, "previous") == [None] * 3
    assert list_values(single, "is_scored") == [True] * 3
    assert list_values(multi, "previous") == [None, "30-1", None]
    assert list_values(multi, "is_scored") == [False, True, True]
    assert single[0].source_image.size == (24, 24)
    assert np.array_equal(to_array(single[1].source_image), to_array(draw_image(31, 24, 24)))
    assert (single[1].prompt, single[1].category, single[1].target_prompt) == (f"{PROMPT} 2", "turn 2", "a blue circle")


# Folders


def test_a_folder_may_leave_out_all_but_source_and_prompt(tmp_path):
    folder = make_picture_folder(tmp_path / "pictures")
    change_line(folder, id=None, category=None, mask_file_name=None)
    # A byte order mark is no part of the first line, and null says no more than a name left out.
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + (folder / "metadata.jsonl").read_bytes())
    first, second, last = read("folder", folder)
    assert (first.id, first.category, first.target_prompt) == ("first", "kind", "a blue circle")
    assert set(np.unique(to_array(first.mask))) == {0, 255}
    assert (second.id, second.category, second.mask) == ("00002", "all", None)
    assert (last.id, last.category, last.target_image, last.mask) == ("00003", "all", None, None)


def change_line(folder, **changes):
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines[1] |= changes
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_mask_that_marks_the_edit_with_a_small_number_is_refused(dtype, tmp_path):
    folder = make_picture_folder(tmp_path / "pictures")
    white = 1 if dtype is np.uint8 else 255
    Image.fromarray(np.eye(16, dtype=dtype) * dtype(white)).save(folder / "1-mask.png")
    with pytest.raises(ValueError, match="sample 00002: the mask has no pixel above 1"):
        read("folder", folder)


@pytest.mark.filterwarnings("ignore:`mask_image` is 8×8 pixels and its image is 16×16; the mask was resized")
def test_masks_of_a_folder_are_read_as_the_pipeline_reads_them(tmp_path):
    folder = make_picture_folder(tmp_path / "pictures")
    strokes = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    strokes.paste("white", (2, 4, 4, 6))
    strokes.save(folder / "1-mask.png")
    expected = np.zeros((16, 16), dtype=np.uint8)
    expected[8:12, 4:8] = 255
    assert np.array_equal(to_array(read("folder", folder)[1].mask), expected)
    Image.new("L", (16, 16)).save(folder / "1-mask.png")
    assert not to_array(read("folder", folder)[1].mask).any()
    Image.new("L", (16, 4)).save(folder / "1-mask.png")
    with pytest.raises(ValueError, match=r"sample 00002: .* proportions differ"):
        read("folder", folder)


# What cannot be read is named


def change_json(file, change):
    def apply(folder):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(change(content)))

    return apply


def change_pie(**changes):
    return change_json("mapping_file.json", lambda content: content | {"2": content.popitem()[1] | changes})


@pytest.mark.parametrize(
    ("name", "make_source", "spoil", "message"),
    [
        ("pie-bench", make_pie_folder, change_pie(editing_instruction=None), "sample 2: `prompt` is None"),
        ("pie-bench", make_pie_folder, change_pie(editing_instruction=" "), "sample 2: `prompt` is ' '; it must be"),
        ("pie-bench", make_pie_folder, change_pie(mask=[4]), "sample 2: "),
        ("pie-bench", make_pie_folder, change_pie(mask="0 4"), "sample 2: "),
        ("pie-bench", make_pie_folder, change_pie(image_path="none.jpg"), r"sample 2: .*none\.jpg"),
        ("pie-bench", make_pie_folder, change_pie(image_path="small.png"), r"`mask` has \(512, 512\) pixels"),
        (
            "pie-bench",
            make_pie_folder,
            change_json("mapping_file.json", lambda content: {"2": {"mask": []}}),
            "sample 2: 'editing_instruction' is missing",
        ),
        (
            "magicbrush",
            make_magicbrush_folder,
            change_json("local_descriptions.json", lambda content: {}),
            r"sample 30-1: '30-output1\.png' is missing",
        ),
        ("magicbrush", make_magicbrush_folder, change_json("edit_sessions.json", lambda content: [1]), "no attribute"),
        ("folder", make_picture_folder, lambda folder: change_line(folder, prompt=7), "00002: `prompt` is 7; it must"),
        ("folder", make_picture_folder, lambda folder: change_line(folder, prompt=None), "00002: .*'prompt'"),
        ("folder", make_picture_folder, lambda folder: change_line(folder, instruction="p"), "00002: .*'instruction'"),
        ("folder", make_picture_folder, lambda folder: change_line(folder, task="dance"), "00002: `task` is 'dance'"),
        ("folder", make_picture_folder, lambda folder: change_line(folder, id="a/b"), "sample a/b: `id` is 'a/b'"),
        ("folder", make_picture_folder, lambda folder: change_line(folder, id="é" * 101), "at most 200 bytes"),
        (
            "folder",
            make_picture_folder,
            lambda folder: change_line(folder, id="first"),
            "two samples have the `id` 'first'",
        ),
        ("folder", make_picture_folder, lambda folder: (folder / "metadata.jsonl").write_text(""), "has no samples"),
    ],
)
def test_samples_that_are_not_as_published_are_named(name, make_source, spoil, message, tmp_path):
    folder = make_source(tmp_path / "source")
    if name == "pie-bench":
        draw_image(0, 64, 64).save(folder / "annotation_images" / "small.png")
    spoil(folder)
    with pytest.raises(ValueError, match=f"`source`.*{message}"):
        read(name, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, "sample 00000: `prompt` is None; it must be text"),
        ({"image": None}, "sample 00000: "),
        ({"image": {"bytes": b"no picture", "path": None}}, "sample 00000: cannot identify image"),
    ],
)
def test_a_row_that_lacks_something_or_does_not_decode_is_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"`source`: {message}"):
        read("depth", make_translation_data(tmp_path / "depth", **changes), resolution=20)


@pytest.mark.parametrize(
    ("name", "make_source", "text", "message"),
    [
        ("folder", make_picture_folder, b"\n\n{no", "line 3 of .*metadata.jsonl: Expecting"),
        ("folder", make_picture_folder, b'{"id": "\xe9"}', "utf-8"),
        pytest.param("folder", make_picture_folder, b"[" * 100_000, "line 1 of .*metadata.jsonl", id="deep"),
        ("pie-bench", make_pie_folder, b'{"1":\n no}', "mapping_file.json: .* line 2"),
        ("magicbrush", make_magicbrush_folder, b"", "edit_sessions.json: Expecting"),
        ("depth", make_translation_data, b"PAR1 and a half", "validation-.*parquet: "),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, make_source, text, message, tmp_path):
    folder = make_source(tmp_path / "source")
    endings = ("metadata.jsonl", "mapping_file.json", "edit_sessions.json", ".parquet")
    (file,) = (path for path in folder.iterdir() if path.name.endswith(endings))
    file.write_bytes(text)
    with pytest.raises(ValueError, match=f"`source`: .*{message}"):
        read(name, folder)


def test_samples_whose_images_or_turns_do_not_fit_are_refused(monkeypatch):
    for changes, message in (
        ({"mask": Image.new("L", (8, 8))}, r"sample two: `mask` has \(8, 8\) pixels, but the result has \(16, 16\)"),
        ({"target_image": Image.new("RGB", (8, 9))}, r"sample two: `source_image` has \(16, 16\) pixels"),
        ({"previous": "three"}, "`previous` of two is 'three'; name an earlier sample"),
    ):
        samples = [Sample("one", "p", draw_image(0)), Sample("two", "p", draw_image(0), **changes)]
        listed = {sample.id: sample for sample in samples}
        functions = {"list_entries": lambda source, listed=listed: listed.items()}
        functions["make_sample"] = lambda source, sample_id, entry: entry
        monkeypatch.setitem(BENCHMARKS, "folder", replace(BENCHMARKS["folder"], **functions))
        with pytest.raises(ValueError, match=message):
            Benchmark("folder", "here")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "dance"], "`benchmark` is 'dance'; choose one of 'pie-bench'"),
        (["--task", "pie-bench"], "`source` is missing"),
        (["--task", "pie-bench", "--source", "nowhere"], "nowhere/mapping_file.json"),
        (["--task", "folder", "--source", "nowhere"], "nowhere/metadata.jsonl"),
        (["--task", "depth", "--source", "./nowhere"], "`source` is './nowhere': there is no such folder"),
        (["--task", "depth", "--source", "examples"], "no parquet file whose name starts with 'validation'"),
        (["--task", "depth", "--source", "nowhere", "--resolution", "0"], "`resolution` is 0"),
        (["--task", "folder", "--source", "x", "--resolution", "32"], "the benchmark folder has no such option"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert evaluate("generate", "--system", "copy-source", *words, "--output-dir", tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# The page that users read


def test_the_evaluation_page_names_everything_by_its_name_and_uses_every_step(tmp_path):
    page = (ROOT / "docs" / "evaluate.md").read_text()
    assert not [name for name in (*BENCHMARKS, *SYSTEMS, *PROTOCOLS, *METRICS) if f"`{name}`" not in page]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    calls = list_calls("docs/evaluate.md", tmp_path)
    steps = {words[2] for words in calls if words[1] in ("evaluate", "projects/stickers/evaluate_stickers.py")}
    assert steps == {"generate", "score", "report", "run"}
