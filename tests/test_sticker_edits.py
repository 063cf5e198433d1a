"""The "stickers" data set and its scoring: what the demo checkpoint learns from, and how it is judged."""

import json
import random
from dataclasses import replace
from pathlib import Path

import make_copy_edits as copying
import make_sticker_edits as stickers
import numpy as np
import pytest
import stickers as scoring
from datasets import load_dataset
from evaluation_data import evaluate_stickers, make_sticker_data
from PIL import Image, ImageFilter
from tiny import build_pipeline


RESOLUTION, TOKEN_SIZE = 64, 8
EDITS = tuple(stickers.OPERATIONS)
ALL_TASKS = EDITS + stickers.TRANSLATIONS


def make_samples(split, count, part="seen", operations=ALL_TASKS, resolution=RESOLUTION):
    jobs = [(operations[index % len(operations)], part, None) for index in range(count)]
    return [stickers.make_sample(3, split, index, resolution, job) for index, job in enumerate(jobs)]


@pytest.fixture(scope="module")
def train_samples():
    return [stickers.make_sample(3, "train", index, RESOLUTION) for index in range(300)]


@pytest.fixture(scope="module")
def test_samples():
    return make_samples("test", 96)


def get_pairs(*described):
    return {(sticker["colour"], sticker["shape"]) for sticker in described if sticker is not None}


def score(sample, image, vq_image=None):
    source, target, mask = (np.asarray(sample[name]) for name in ("source_image", "target_image", "mask"))
    through = np.asarray(vq_image or sample["target_image"].filter(ImageFilter.GaussianBlur(0.5)))
    ceiling = scoring.compute_outside_psnr(through, target, mask, TOKEN_SIZE)
    return scoring.score_sample(np.asarray(image), ceiling, source, target, mask, sample["details"], TOKEN_SIZE)


def run_main(folder, **options):
    options = {"num_train": 12, "num_validation": 8, "num_test": 1, "resolution": 32, "shard_size": 5} | options
    arguments = [text for name, value in options.items() for text in (f"--{name}", *map(str, np.atleast_1d(value)))]
    stickers.main(["--output_dir", str(folder), "--num_workers", "1", *arguments])
    return sorted(folder.glob("*.parquet"))


# The data


def test_the_same_seed_gives_the_same_sample_and_another_seed_another():
    first, again, other = (stickers.make_sample(seed, "train", 7, RESOLUTION) for seed in (0, 0, 1))
    for name in ("source_image", "target_image", "mask"):
        assert first[name].tobytes() == again[name].tobytes()
    assert (first["prompt"], first["details"]) == (again["prompt"], again["details"])
    assert first["source_image"].tobytes() != other["source_image"].tobytes()


def test_the_splits_see_parts_of_a_photograph_that_share_no_pixel():
    whole = np.asarray(Image.open(Path(stickers.skimage.__file__).parent / "data" / "coffee.png").convert("RGB"))
    border, middle = int(0.65 * whole.shape[1]), int(0.5 * whole.shape[0])
    parts = {"train": whole[:, :border], "validation": whole[:middle, border:], "test": whole[middle:, border:]}
    for split, part in parts.items():
        np.testing.assert_array_equal(stickers.load_photograph("coffee", split), part)


def test_held_out_photographs_are_only_in_their_own_part_of_the_test_split(train_samples, test_samples):
    validation_samples = make_samples("validation", 40)
    used = {sample["details"]["photograph"] for sample in train_samples + validation_samples + test_samples}
    assert used - {None} == set(stickers.PHOTOGRAPHS) - set(stickers.HELD_OUT)
    asked = {photograph for _, part, photograph in stickers.plan_split("test", 500) if part == "held_out"}
    assert asked == set(stickers.HELD_OUT) == {"chelsea", "rocket"}


def test_unseen_pairs_are_edited_in_their_part_of_the_test_split_alone(train_samples):
    samples = [sample for sample in train_samples if sample["task"] == "edit"]
    details = [sample["details"] for sample in samples + make_samples("validation", 60, operations=EDITS)]
    edited = set.union(*(get_pairs(detail["old"], detail["new"]) for detail in details))
    bystanders = set.union(*(get_pairs(*detail["bystanders"]) for detail in details))
    assert not edited & stickers.UNSEEN_PAIRS
    assert len(edited) == 28
    assert bystanders >= stickers.UNSEEN_PAIRS
    for sample in make_samples("test", 25, part="unseen_pairs", operations=EDITS):
        assert get_pairs(sample["details"]["old"], sample["details"]["new"]) & stickers.UNSEEN_PAIRS


def test_the_test_split_has_the_promised_number_of_samples():
    plan = stickers.plan_split("test", 500)
    for operation in ALL_TASKS:
        assert plan.count((operation, "seen", None)) == 500
    for operation in EDITS:
        assert plan.count((operation, "unseen_pairs", None)) == 200
        for photograph in stickers.HELD_OUT:
            assert plan.count((operation, "held_out", photograph)) == 100


@pytest.mark.parametrize("resolution", [48, 64, 128])
def test_every_changed_pixel_lies_in_the_mask(resolution):
    for split in ("train", "test"):
        for sample in make_samples(split, 20, operations=EDITS, resolution=resolution):
            changed = np.any(np.asarray(sample["source_image"]) != np.asarray(sample["target_image"]), -1)
            mask = np.asarray(sample["mask"]) > 0
            assert changed.any()
            assert not (changed & ~mask).any()
            assert mask.mean() < 0.4


def test_stickers_are_large_apart_and_inside_the_image(train_samples):
    for sample in train_samples:
        details = sample["details"]
        shown = details.get("stickers") or [details["new"] or details["old"], *details["bystanders"]]
        assert 1 <= len(shown) <= 4
        for index, one in enumerate(shown):
            reach = one["size"] / 2
            assert 2 / 8 <= one["size"] <= 2.6 / 8
            assert reach - 1e-9 <= min(one["x"], one["y"]) <= max(one["x"], one["y"]) <= 1 - reach + 1e-9
            for other in shown[:index]:
                distance = max(abs(one["x"] - other["x"]), abs(one["y"] - other["y"]))
                assert distance - reach - other["size"] / 2 >= 0.29 / 8


def test_a_prompt_names_one_sticker_of_its_image(train_samples):
    for sample in train_samples:
        details = sample["details"]
        described = details.get("stickers") or [details["old"], details["new"], *details["bystanders"]]
        described = [sticker for sticker in described if sticker is not None]
        places = {(sticker["x"], sticker["y"], sticker["colour"], sticker["shape"]) for sticker in described}
        # A moved sticker is described at both of its places.
        assert len(places) == len(get_pairs(*described)) + (details["operation"] == "move")


def test_removing_uncovers_what_adding_covers():
    (sample,) = make_samples("test", 1, operations=("remove",))
    again = stickers.draw_stickers(sample["target_image"], [stickers.Sticker(**sample["details"]["old"])])
    np.testing.assert_array_equal(np.asarray(again), np.asarray(sample["source_image"]))


@pytest.mark.parametrize("layout", stickers.LAYOUTS, ids=lambda layout: f"{layout.width}:{layout.height}")
def test_samples_of_every_layout_have_its_size_and_their_target_counts_as_done(layout):
    width, height = int(64 * layout.width), int(64 * layout.height)
    for index, task in enumerate(ALL_TASKS):
        sample = stickers.make_sample(3, "test", index, 64, (task, "seen", None), layouts=[layout])
        assert {sample[name].size for name in ("source_image", "target_image", "mask")} == {(width, height)}
        shown = sample["details"].get("stickers") or [sample["details"]["old"], sample["details"]["new"]]
        for sticker in filter(None, [*shown, *sample["details"].get("bystanders", [])]):
            assert sticker["size"] / 2 <= sticker["x"] <= layout.width - sticker["size"] / 2
            assert sticker["size"] / 2 <= sticker["y"] <= layout.height - sticker["size"] / 2
        assert score(sample, sample["target_image"])["done"]
        assert not score(sample, sample["source_image"])["done"]


@pytest.mark.parametrize("task", ["canny", "depth"])
def test_canny_and_depth_maps_do_not_know_the_colours(task):
    scene = stickers.draw_translation_scene(random.Random(0), "test")
    recoloured = [replace(sticker, colour="white", rgb=(255, 255, 255)) for sticker in scene]
    draw = {"canny": stickers.draw_canny_map, "depth": stickers.draw_depth_map}[task]
    maps = [np.asarray(draw(random.Random(1), shown, (RESOLUTION, RESOLUTION))) for shown in (scene, recoloured)]
    np.testing.assert_array_equal(*maps)


def test_the_parquet_files_load_and_their_images_decode(tmp_path):
    files = run_main(tmp_path)
    assert [file.name for file in files] == [
        *(f"test-0000{shard}-of-00002.parquet" for shard in range(2)),
        *(f"train-0000{shard}-of-00003.parquet" for shard in range(3)),
        *(f"validation-0000{shard}-of-00002.parquet" for shard in range(2)),
    ]
    data_files = {"train": str(tmp_path / "train-*"), "test": str(tmp_path / "test-*")}
    data = load_dataset("parquet", data_files=data_files, cache_dir=str(tmp_path / "cache"))
    assert (len(data["train"]), len(data["test"])) == (12, 8)
    row, sample = data["train"][11], stickers.make_sample(0, "train", 11, 32)
    for name in ("source_image", "target_image", "mask"):
        np.testing.assert_array_equal(np.asarray(row[name]), np.asarray(sample[name]))
    assert (row["prompt"], row["task"]) == (sample["prompt"], sample["task"])
    assert json.loads(row["details"]) == json.loads(json.dumps(sample["details"]))


def test_a_second_run_makes_only_the_missing_shards(tmp_path):
    files = run_main(tmp_path)
    contents = {file: file.read_bytes() for file in files}
    files[2].unlink()
    kept = {file: file.stat().st_mtime_ns for file in files if file.exists()}
    assert run_main(tmp_path) == files
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert {file: file.read_bytes() for file in files} == contents
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize(
    "shares",
    [(0.5, 0.2, 0.2, 0.2, 0), (0.5, 0.2, -0.1, 0.2, 0.2), (0, 0, 0, 0, 0), (0.5, 0.5)],
    ids=["above 1", "negative", "none", "too few"],
)
def test_shares_that_are_no_parts_of_a_whole_are_refused_before_anything_is_written(shares, tmp_path):
    with pytest.raises(ValueError, match="`shares` is"):
        run_main(tmp_path / "pairs", shares=shares)
    assert not (tmp_path / "pairs").exists()


def test_shares_that_make_up_the_whole_leave_no_translations(tmp_path):
    """Before Python 3.12, the sum of these five in floating point is a little above 1."""
    run_main(tmp_path, shares=(0.1, 0.2, 0.3, 0.3, 0.1))
    rows = load_dataset("parquet", data_files=str(tmp_path / "train-*"), cache_dir=str(tmp_path / "cache"))["train"]
    assert set(rows["task"]) == {"edit"}


# The scoring


def test_the_target_is_always_done_and_the_source_never(test_samples):
    for sample in test_samples:
        assert score(sample, sample["target_image"])["done"]
        assert not score(sample, sample["source_image"])["done"]


def test_a_target_may_be_blurred_as_much_as_the_vq_model_blurs_it_and_no_more(test_samples):
    for sample in test_samples:
        blurred, more = (sample["target_image"].filter(ImageFilter.GaussianBlur(radius)) for radius in (1, 2))
        assert score(sample, blurred, blurred)["done"]
        assert sample["task"] != "edit" or not score(sample, more)["outside"]


def change_colour(sticker):
    return replace(sticker, rgb=stickers.COLOURS["blue" if sticker.colour != "blue" else "orange"])


def change_shape(sticker):
    return replace(sticker, shape=stickers.SHAPES[stickers.SHAPES.index(sticker.shape) - 1])


@pytest.mark.parametrize("operation", ["recolour", "reshape"])
def test_a_wrong_colour_in_the_right_shape_is_told_apart(operation):
    for sample in make_samples("test", 12, operations=(operation,)):
        wrong = change_colour(stickers.Sticker(**sample["details"]["new"]))
        result = score(sample, stickers.draw_stickers(sample["target_image"], [wrong]))
        assert (result["colour"], result["shape"], result["inside"]) == (False, True, False)


def test_adding_a_wrong_colour_a_wrong_shape_or_nothing_are_each_told_apart():
    for sample in make_samples("test", 30, operations=("add",)):
        new = stickers.Sticker(**sample["details"]["new"])
        assert score(sample, stickers.draw_stickers(sample["source_image"], [new]))["done"]
        wrong_shape = score(sample, stickers.draw_stickers(sample["source_image"], [change_shape(new)]))
        assert (wrong_shape["colour"], wrong_shape["shape"]) == (True, False)
        wrong_colour = score(sample, stickers.draw_stickers(sample["source_image"], [change_colour(new)]))
        assert (wrong_colour["colour"], wrong_colour["inside"]) == (False, False)


def test_a_move_needs_the_sticker_at_the_new_place_and_not_at_the_old():
    for sample in make_samples("test", 12, operations=("move",)):
        old, new = (stickers.Sticker(**sample["details"][name]) for name in ("old", "new"))
        copied = score(sample, stickers.draw_stickers(sample["source_image"], [new]))
        assert (copied["colour"], copied["shape"], copied["gone"], copied["inside"]) == (True, True, False, False)
        box = tuple(round((centre + sign * old.size) * RESOLUTION) for sign in (-0.5, 0.5) for centre in (new.x, new.y))
        removed = sample["target_image"].copy()
        removed.paste(sample["source_image"].crop(box), box)
        removed = score(sample, removed)
        assert (removed["gone"], removed["inside"]) == (True, False)


def test_a_sticker_of_another_colour_is_not_gone():
    for sample in make_samples("test", 20, operations=("remove",)):
        old = stickers.Sticker(**sample["details"]["old"])
        beneath = sample["target_image"]
        legible = sorted(colour for place, colour in stickers.find_legible(beneath) if place == old.place)
        for colour in legible:
            still_there = stickers.draw_stickers(beneath, [replace(old, rgb=stickers.COLOURS[colour])])
            assert not score(sample, still_there)["done"]


def test_editing_a_bystander_fails_outside_the_mask():
    samples = [
        sample for sample in make_samples("test", 30, operations=("recolour",)) if sample["details"]["bystanders"]
    ]
    for sample in samples:
        spoilt = change_colour(stickers.Sticker(**sample["details"]["bystanders"][0]))
        result = score(sample, stickers.draw_stickers(sample["target_image"], [spoilt]))
        assert (result["inside"], result["outside"], result["done"]) == (True, False, False)
    assert samples


def test_a_translation_counts_each_sticker_and_the_background():
    for sample in make_samples("test", 12, operations=stickers.TRANSLATIONS):
        shown = [stickers.Sticker(**sticker) for sticker in sample["details"]["stickers"]]
        background = sample["details"]["background"]
        other = "pink" if background != "pink" else "grey"
        plain, wrong_plain = (
            Image.new("RGB", (RESOLUTION, RESOLUTION), stickers.BACKGROUNDS[name]) for name in (background, other)
        )
        result = score(sample, stickers.draw_stickers(wrong_plain, shown))
        assert (result["stickers"], result["background"], result["done"]) == (1, False, False)
        result = score(sample, stickers.draw_stickers(plain, shown[1:]))
        assert (result["stickers"], result["background"]) == (pytest.approx(1 - 1 / len(shown)), True)
        result = score(sample, stickers.draw_stickers(plain, [change_shape(shown[0]), *shown[1:]]))
        assert (result["stickers"], result["placed"]) == (pytest.approx(1 - 1 / len(shown)), 1)


def test_scores_are_averaged_per_group_and_serialise():
    samples = make_samples("test", 8)
    scores = [score(sample, sample["target_image"]) for sample in samples]
    scores += [score(sample, sample["source_image"]) for sample in samples]
    rates = scoring.aggregate_scores(json.loads(json.dumps(scores)))
    assert set(rates) == set(ALL_TASKS)
    assert all(rate["n"] == 2 and rate["done"] == 0.5 for rate in rates.values())


# The benchmark


def test_the_benchmark_scores_predictions_with_the_functions_themselves(tmp_path, capsys):
    source = make_sticker_data(tmp_path / "stickers")
    build_pipeline(grid_size=8).save_pretrained(tmp_path / "editor")
    words = ["--benchmark", "sticker-edits", "--source", source, "--output-dir", tmp_path / "run"]
    assert evaluate_stickers("run", *words, "--system", "vq-reconstruction", "--model", tmp_path / "editor") == 0
    capsys.readouterr()
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    names = ("done", "inside", "outside")
    pipeline, kinds = build_pipeline(grid_size=8), {}
    for row, line in zip(load_dataset("parquet", data_dir=str(source))["test"], lines, strict=True):
        through = pipeline.decode_image_tokens(pipeline.encode_image(row["target_image"]))[0]
        image = Image.open(tmp_path / "run" / "images" / f"{line['id']}.png")
        images = [np.asarray(row[name]) for name in ("source_image", "target_image", "mask")]
        details = json.loads(row["details"])
        ceiling = scoring.compute_outside_psnr(np.asarray(through), *images[1:], pipeline.vq_model.config.stride)
        expected = scoring.score_sample(np.asarray(image), ceiling, *images, details, pipeline.vq_model.config.stride)
        assert {name: line["values"][name] for name in names} == {name: expected.get(name) for name in names}
        kinds[details["operation"]] = expected
    categories = json.loads((tmp_path / "run" / "metrics.json").read_text())["categories"]
    assert list(categories) == list(kinds) == list(ALL_TASKS)
    page = (tmp_path / "run" / "report.md").read_text()
    assert "| edits done % ↑ |" in page
    assert "| recolour |" in page


def test_the_benchmark_needs_a_vq_model_of_its_images_size(tmp_path, capsys):
    build_pipeline(grid_size=8).save_pretrained(tmp_path / "editor")
    words = ["--benchmark", "sticker-edits", "--source", make_sticker_data(tmp_path / "stickers", resolution=48)]
    words += ["--output-dir", tmp_path / "run"]
    assert evaluate_stickers("generate", *words, "--system", "copy-source") == 0
    assert evaluate_stickers("score", *words) == 2
    assert "`vq_model` is missing" in capsys.readouterr().err
    assert evaluate_stickers("score", *words, "--vq-model", tmp_path / "editor") == 2
    assert "`vq_model` works at 32×32 pixels" in capsys.readouterr().err


# The operation that an adapter learns


@pytest.fixture(scope="module")
def copies():
    rows = [copying.make_copy(3, "test", index, RESOLUTION) for index in range(30)]
    return [row | {"details": json.loads(row["details"])} for row in rows]


def test_copying_changes_the_mask_alone_and_is_done_when_original_and_copy_are_there(copies):
    for sample in copies:
        source, target = (np.asarray(sample[f"{name}_image"]).astype(int) for name in ("source", "target"))
        changed = (source != target).any(axis=-1)
        assert changed.any()
        assert not (changed & (np.asarray(sample["mask"]) == 0)).any()
        assert score(sample, sample["target_image"])["done"]
        assert not score(sample, sample["source_image"])["done"]


def test_a_copy_looks_like_its_original_which_must_stay(copies):
    for sample in copies:
        original, copy = sample["details"]["bystanders"][0], sample["details"]["new"]
        assert all(original[name] == copy[name] for name in ("colour", "shape", "size", "rgb"))
        assert original["place"] != copy["place"]
        left, top = (int((original[name] - original["size"] / 2) * RESOLUTION) for name in "xy")
        moved, side = sample["target_image"].copy(), int(original["size"] * RESOLUTION) + 1
        moved.paste("grey", (left, top, left + side, top + side))
        assert not score(sample, moved)["done"]


def test_copying_is_asked_for_in_words_no_other_operation_uses(copies, train_samples):
    verbs = {prompt.split()[0] for prompt in copying.PROMPTS}
    assert {sample["prompt"].split()[0] for sample in copies} == verbs
    assert not verbs & {word for sample in train_samples for word in sample["prompt"].split()}


def test_copies_of_one_seed_are_the_same_and_train_and_test_differ(copies):
    again = copying.make_copy(3, "test", 0, RESOLUTION)
    assert again["source_image"].tobytes() == copies[0]["source_image"].tobytes()
    other = copying.make_copy(3, "train", 0, RESOLUTION)
    assert other["source_image"].tobytes() != copies[0]["source_image"].tobytes()
