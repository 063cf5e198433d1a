"""The judge of the scenes, and the scoring of an editor with it."""

import json
import random
import shutil
import sys
from dataclasses import replace

import compose
import features
import numpy as np
import pytest
import score
import score_keep_source
import score_preserve
import score_shapes
import torch
import train_judge
from nouns import NOUNS
from PIL import Image
from safetensors.torch import save_file
from tiny import build_pipeline, build_vq_model

from editar_hf import EditARPipeline, keep_source


SIDE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scores")


@pytest.fixture(scope="module")
def dataset(bank, folder):
    compose.write_pairs(bank, folder / "pairs", "test", 3, 1, SIDE, SIDE)
    return folder / "pairs"


def make_judge(bank, noun="", color="red"):
    """Make a judge that always answers the same."""
    torch.manual_seed(0)
    judge = train_judge.Judge(sorted(bank.nouns), bank.colors).eval().requires_grad_(False)
    for head, number in ((judge.noun_head, judge.nouns.index(noun)), (judge.color_head, judge.colors.index(color))):
        head.weight.zero_()
        head.bias.zero_()
        head.bias[number] = 1
    return judge


def make_scorer(bank, noun="", color="red"):
    return score.Scorer(features.load_features(None), make_judge(bank, noun, color), 8, "cpu")


def load_sample(dataset, operation):
    return score.load_samples(dataset, operation, 1)[0]


def score_one(scorer, sample, image):
    return scorer.score([sample], [image], [sample["target"]])[0]


# Judge


def test_a_crop_is_a_square_around_the_box_inside_the_picture():
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[10:30, 40:60] = 255
    crop = np.asarray(train_judge.cut_crop(pixels, (40, 10, 60, 30), size=50))
    # 20 of 25 pixels a side are the object's.
    assert (crop.shape, crop[25, 25, 0], crop[2, 2, 0]) == ((50, 50, 3), 255, 0)
    assert abs((crop[:, :, 0] > 127).mean() - 0.64) < 0.05
    for box in ((0, 0, 20, 20), (80, 40, 100, 60), (0, 0, 100, 60)):
        assert train_judge.cut_crop(pixels, box, size=32).size == (32, 32)


@pytest.mark.parametrize("operation", train_judge.OPERATIONS)
def test_examples_show_what_their_labels_say(bank, operation):
    pair = compose.compose_pair(bank, 0, 5, operation=operation)
    shown = {}
    for example in train_judge.list_examples(pair):
        assert example.box == pair.box
        shown["source" if example.pixels is pair.source else "target"] = (example.noun, example.color)
    before, after = (pair.noun, pair.source_color), (pair.new_noun or pair.noun, pair.color)
    expected = {
        "add": {"source": ("", ""), "target": after},
        "remove": {"source": before, "target": ("", "")},
        "replace": {"target": after},
        "recolor": {"source": before, "target": after},
        "move": {"target": before},
    }
    assert shown == expected[operation]


def test_the_judge_sees_every_model_but_not_every_view(bank):
    views = [replace(view, id=f"{view.id} {number}") for view in bank.views for number in range(8)]
    split = train_judge.split_views(compose.Bank(bank.nouns, bank.colors, [["red", "car"]], views, bank.photographs))
    assert {view.model for view in split.views if view.split == "train"} == {view.model for view in views}
    held_out = [view for view in split.views if view.split == "test-view"]
    assert len(held_out) == pytest.approx(len(views) / 8, abs=len(bank.views))
    assert {view.id for view in split.views} == {view.id for view in views}
    assert not split.held_out_pairs
    again = train_judge.split_views(compose.Bank(bank.nouns, bank.colors, [], views[::-1], bank.photographs))
    assert {view.id for view in again.views if view.split == "test-view"} == {view.id for view in held_out}


def test_kin_are_nouns_of_the_bank_that_may_name_the_same_thing():
    assert set().union(*train_judge.KIN) <= set(NOUNS)
    answers = [train_judge.are_kin(*pair) for pair in (("sofa", "armchair"), ("cat", "cat"), ("sofa", "chair"))]
    assert answers == [True, True, False]


def test_degrading_changes_most_images_a_little(bank):
    pixels = compose.compose_pair(bank, 0, 0).target
    changed = [train_judge.degrade(pixels, random.Random(seed)) for seed in range(20)]
    differences = np.array([np.abs(image.astype(int) - pixels).mean() for image in changed])
    assert 0.5 < (differences > 0).mean() < 1
    assert differences.max() < 20


def test_the_command_trains_a_judge_that_loads_and_goes_on_from_it(bank_folder, bank, folder, tmp_path, run):
    """With a VQ model, half of the examples pass through it."""
    build_vq_model().save_pretrained(tmp_path / "vq_model")
    options = {"bank": bank_folder, "features": folder / "features.safetensors", "num_test": 4, "crop_size": 48}
    options |= {"num_pairs": 16, "num_passed": 4, "batch_size": 8, "vq_model": tmp_path / "vq_model"}
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    run(train_judge, {**options, "output": first})
    run(train_judge, {**options, "output": second, "start": first, "learning_rate": 1e-9})
    judge, again = train_judge.load_judge(first), train_judge.load_judge(second)
    assert (judge.nouns, judge.colors, judge.crop_size) == (["", *sorted(bank.nouns)], bank.colors, 48)
    assert judge.accuracy.keys() == {"plain", "degraded", "passed"}
    assert {"noun", "kin", "confused"} <= judge.accuracy["plain"].keys()
    for name, weight in judge.state_dict().items():
        torch.testing.assert_close(weight, again.state_dict()[name], rtol=1e-2, atol=1e-3)


def test_the_judge_learns(bank):
    torch.manual_seed(0)
    judge = train_judge.Judge(sorted(bank.nouns), bank.colors, crop_size=48)
    judge.network.load_state_dict(features.load_features(None, judge.network.strides).state_dict())
    frozen = judge.network.stem.weight.clone()
    examples = train_judge.Examples(judge, bank, "train", 0, 160, is_varied=True)
    losses = train_judge.train(judge, examples.load(8), None, learning_rate=3e-3)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert torch.equal(judge.network.stem.weight, frozen)


def test_passed_examples_show_what_the_vq_model_makes_of_an_image(bank):
    judge, vq_model = make_judge(bank), build_vq_model()
    plain = train_judge.Examples(judge, bank, "train", 0, 5, is_varied=False)
    passed = train_judge.PassedExamples(judge, bank, "train", 0, 5, is_varied=False).pass_images(vq_model, 3)
    for index in range(5):
        assert torch.equal(plain[index]["nouns"], passed[index]["nouns"])
        assert torch.equal(passed[index]["crops"], passed[index]["crops"])
    example = plain.compose(0)[0]
    with torch.no_grad():
        reconstruction = vq_model(train_judge.stack_crops([example.pixels])).reconstruction[0].permute(1, 2, 0)
    kept = torch.from_numpy(passed.kept[0][0].pixels) / 127.5 - 1
    # In bfloat16 a few tokens are others.
    assert torch.corrcoef(torch.stack([kept.flatten(), reconstruction.flatten()]))[0, 1] > 0.8
    passed.is_varied = True
    assert not torch.equal(passed[0]["crops"], passed[0]["crops"])


def test_batches_alternate_and_the_second_kind_begins_anew():
    assert list(train_judge.alternate([1, 2, 3], ["a", "b"])) == [1, "a", 2, "b", 3, "a"]
    assert list(train_judge.alternate([1, 2], None)) == [1, 2]


def test_a_constant_judge_has_the_accuracy_of_chance(bank):
    judge = make_judge(bank, "car", "blue")
    examples = train_judge.Examples(judge, bank, "test", 1, 40, is_varied=False)
    accuracy = train_judge.measure_accuracy(judge, examples.load(8))
    assert accuracy["nothing"] == 0
    assert 0 < accuracy["object"] < 0.6
    assert all(confusion.endswith(" as car") for confusion in accuracy["confused"])


# Scores of one image


@pytest.mark.parametrize("operation", ["add", "remove", "replace", "recolor", "move"])
def test_the_target_is_done_and_the_source_is_not(bank, dataset, operation):
    sample = load_sample(dataset, operation)
    noun = "" if operation == "remove" else sample["new_noun"] or sample["noun"]
    scorer = make_scorer(bank, noun, sample["color"] or "red")
    assert score_one(scorer, sample, sample["target"])["done"]
    assert not score_one(scorer, sample, sample["source"])["done"]
    wrong = make_scorer(bank, "scissors" if noun != "scissors" else "car", sample["color"] or "red")
    marks = score_one(wrong, sample, sample["target"])
    assert [marks[name] for name in ("done", "noun", "nearer", "kept")] == [False, False, True, True]


def test_another_color_than_the_asked_one_is_not_done(bank, dataset):
    sample = load_sample(dataset, "recolor")
    other = "green" if sample["color"] != "green" else "blue"
    marks = score_one(make_scorer(bank, sample["noun"], other), sample, sample["target"])
    assert [marks[name] for name in ("done", "noun", "color")] == [False, True, False]


def test_a_moved_object_must_leave_its_old_place(bank, dataset):
    sample = load_sample(dataset, "move")
    at_new, at_old = score.split_mask(sample)
    assert at_new.any()
    assert at_old.any()
    assert (at_new ^ at_old == sample["mask"]).all()
    doubled = np.where(at_new[..., None], sample["target"], sample["source"])
    assert not score_one(make_scorer(bank, sample["noun"]), sample, doubled)["nearer"]


def test_a_global_edit_must_be_the_asked_one(bank, dataset):
    scorer = make_scorer(bank)
    sample = load_sample(dataset, "global")
    assert score_one(scorer, sample, sample["target"])["done"]
    assert not score_one(scorer, sample, sample["source"])["done"]
    other = "sepia" if sample["edit"] != "sepia" else "night"
    edited = score.apply_global_edit(sample["source"], other, score.GROUND, random.Random(0))
    assert not score_one(scorer, sample, edited)["done"]


def test_the_image_of_a_map_must_be_nearest_to_its_own_target(bank, dataset):
    samples = score.load_samples(dataset, "canny", None)
    targets = [sample["target"] for sample in samples]
    scorer = make_scorer(bank)
    assert [row["done"] for row in scorer.score(samples, targets, targets)] == [True] * 3
    maps = [sample["source"] for sample in samples]
    assert [row["done"] for row in scorer.score(samples, maps, targets)] == [False] * 3
    assert [row["done"] for row in scorer.score(samples, targets[1:] + targets[:1], targets)] == [False] * 3


def test_damage_counts_where_it_is_farther_than_a_token_from_the_mask(bank, dataset):
    """The mask's neighborhood may change; a mask that leaves nothing outside keeps everything."""
    sample = load_sample(dataset, "remove") | {"mask": np.zeros((SIDE, SIDE), bool)}
    sample["mask"][20:30, 20:30] = True
    for row, is_kept in ((12, True), (11, False)):
        damaged = sample["target"].copy()
        damaged[row, 24] ^= 255
        assert score_one(make_scorer(bank), sample, damaged)["kept"] == is_kept
    sample["mask"][:] = True
    assert score_one(make_scorer(bank), sample, sample["target"] ^ 255)["kept"]


def test_another_prompt_asks_for_something_else(dataset):
    samples = score.load_samples(dataset, "add", None)
    prompts = score.pick_other_prompts([samples[0], samples[0] | {"prompt": "the same, said otherwise"}, samples[1]])
    assert prompts[0] == prompts[1] == samples[1]["prompt"]
    assert prompts[2] == samples[0]["prompt"]


@pytest.mark.parametrize("setting", ["greedy", "greedy-3-1", "beam-3", "sampled-x"])
def test_unknown_settings_are_named(setting):
    with pytest.raises(ValueError, match=f"`settings` holds '{setting}'"):
        score.parse_setting(setting)
    assert score.parse_setting("greedy-1.5") == {"do_sample": False, "guidance_scale": 1.5}
    assert score.parse_setting("sampled-3-0.5") == {"do_sample": True, "guidance_scale": 3.0, "temperature": 0.5}


def test_means_leave_out_marks_that_no_sample_has():
    rows = [{"done": True, "color": None}, {"done": False, "color": False}, {"done": False, "color": True}]
    assert score.summarize(rows) == {"count": 3, "done": 0.3333, "color": 0.5}


# The command


@pytest.fixture(scope="module", autouse=True)
def files(bank, folder):
    build_pipeline(grid_size=16, num_text_tokens=160).save_pretrained(folder / "editor")
    network = features.load_features(None, tuple(features.LAST_STAGES))
    save_file(network.state_dict(), folder / "features.safetensors")
    for noun, accuracy in (("car", 0.5), ("chair", 0.25)):
        judge = make_judge(bank, noun)
        train_judge.save_judge(judge, {"plain": {"noun": accuracy}}, folder / f"{noun}.safetensors")


@pytest.fixture
def run(monkeypatch):
    def run(module, options):
        words = []
        for name, value in options.items():
            words += [f"--{name}", *map(str, np.atleast_1d(value))]
        monkeypatch.setattr(sys, "argv", [module.__name__, *words])
        module.main()

    return run


def test_the_command_scores_and_goes_on_where_it_stopped(run, dataset, folder, tmp_path):
    options = {
        "model": folder / "editor",
        "dataset": dataset,
        "features": folder / "features.safetensors",
        "judge": folder / "car.safetensors",
        "output_dir": tmp_path,
        "operations": ["recolor", "global", "canny"],
        "settings": ["greedy-2", "sampled-1"],
        "num_sweep": 1,
        "num_control": 2,
        "num_shown": 4,
    }
    run(score, options)
    results = json.loads((tmp_path / "scores.json").read_text())
    settings = results["settings"]
    assert list(settings) == ["ceiling", "untouched source", "another instruction", "greedy-2", "sampled-1"]
    assert [means["recolor"]["count"] for means in settings.values()] == [3, 3, 2, 3, 1]
    assert settings["untouched source"]["recolor"]["done"] == settings["untouched source"]["global"]["done"] == 0
    assert results["judge"] == {"plain": {"noun": 0.5}}
    tables = (tmp_path / "scores.md").read_text()
    for text in ("| setting | recolor | global | canny |", "| greedy-2, of the ceiling |", "| ceiling: noun |"):
        assert text in tables
    for name in ("samples.png", "failures.png"):
        assert min(Image.open(tmp_path / name).size) > SIDE
    assert not np.array_equal(*(np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("samples", "failures")))
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("images/*/*")}
    missing = tmp_path / "images" / "greedy-2" / "global"
    for image in missing.iterdir():
        image.unlink()
    missing.rmdir()
    run(score, options)
    again = {path: path.stat().st_mtime_ns for path in tmp_path.glob("images/*/*")}
    assert [path for path in made if made[path] != again[path]] == [missing]
    assert json.loads((tmp_path / "scores.json").read_text()) == results
    # Another judge sees other nouns in the same images.
    run(score, {**options, "judge": folder / "chair.safetensors"})
    rescored = json.loads((tmp_path / "scores.json").read_text())
    assert rescored["judge"] == {"plain": {"noun": 0.25}}
    assert rescored["settings"]["ceiling"]["global"] == settings["ceiling"]["global"]
    marks = json.loads((tmp_path / "marks.json").read_text())
    assert {row["seen"] for row in marks["greedy-2"]["recolor"]} == {"red chair"}
    with pytest.raises(ValueError, match=r"`output_dir` .* holds images of `seed` 0"):
        run(score, {**options, "seed": 1})


def test_shapes_are_scored_at_the_sizes_of_their_proportions(run, bank, bank_folder, folder, tmp_path, monkeypatch):
    for name, few in (
        ("TRAINED_SHAPES", ("1:1", "4:3")),
        ("OTHER_SHAPES", ("2:1",)),
        ("LARGE_SHAPES", ("2:1",)),
        ("OPERATIONS", ("recolor", "global")),
        ("LOCAL", ("recolor",)),
    ):
        monkeypatch.setattr(score_shapes, name, few)
    options = {
        "model": folder / "editor",
        "bank": bank_folder,
        "features": folder / "features.safetensors",
        "judge": folder / "car.safetensors",
        "output_dir": tmp_path,
        "setting": "greedy-1",
        "number": 2,
        "num_large": 1,
    }
    run(score_shapes, options)
    figures = json.loads((tmp_path / "shapes.json").read_text())
    assert {name: len(one["recolor"]["greedy-1"]) for name, one in figures["shapes"].items()} == dict.fromkeys(
        ("1:1", "4:3", "2:1"), 2
    )
    tables = [table.splitlines()[2:] for table in (tmp_path / "shapes.md").read_text().split("\n\n")]
    assert [line.split(" | ")[:2] for line in tables[0]] == [
        ["| 1:1", "yes"],
        ["| 4:3", "yes"],
        ["| 2:1", "no"],
        ["| 4:3", "yes"],
        ["| 2:1", "no"],
    ]
    assert list(figures["squares"]) == ["4:3", "2:1"]
    done, square_done = (
        100 * np.mean([mark["done"] for mark in figures[part]["4:3"]["recolor"]["ceiling"]])
        for part in ("shapes", "squares")
    )
    assert tables[1][0].startswith("| 4:3 | ")
    assert f"| {done - square_done:+.1f} ± " in tables[1][0].split(" | ", 4)[4]
    pipe = EditARPipeline.from_pretrained(folder / "editor", dtype=torch.float32)
    assert score_shapes.choose_sizes(pipe, "2:1") == ((32, 64), (96, 192))
    # By hand: a large image is edited whole, and its result compared at the full size.
    pair = compose.compose_pair(bank, 7, 0, "test", 96, 192, "recolor")
    generator = torch.Generator().manual_seed(7)
    image = Image.fromarray(pair.source)
    how = {"aspect": "source", "do_sample": False, "guidance_scale": 1.0}
    edited = pipe(pair.instruction, image=image, generator=generator, **how).images[0]
    error = np.square(np.asarray(edited, float) - pair.target).mean() / 255**2
    psnr = figures["ways"]["2:1"]["recolor"]['aspect="source"']["psnr"]
    assert psnr == pytest.approx([-10 * np.log10(error)], abs=1e-3)


def test_preserve_is_calibrated_and_measured_beside_off_and_the_true_mask(run, dataset, folder, tmp_path):
    editor = shutil.copytree(folder / "editor", tmp_path / "editor")
    options = {"model": editor, "dataset": dataset, "operations": "recolor", "num_samples": 1}
    run(score_preserve, {**options, "calibrate": True})
    pipe = EditARPipeline.from_pretrained(editor, dtype=torch.float32)
    threshold, inside = pipe.transformer.generation_config.preserve_threshold, []
    for operation in score.LOCAL:
        for sample in score.load_samples(dataset, operation, 1):
            edit_map = pipe.compute_edit_map(sample["source"], sample["prompt"])[0].numpy()
            side = pipe.vq_model.config.stride
            inside.append(edit_map[sample["mask"].reshape(SIDE // side, side, -1, side).any(axis=(1, 3))])
    assert np.mean(np.concatenate(inside) > threshold) == pytest.approx(0.9, abs=0.02)
    options |= {name: folder / f"{file}.safetensors" for name, file in (("features", "features"), ("judge", "car"))}
    run(score_preserve, {**options, "output_dir": tmp_path, "settings": "greedy-1", "num_timed": 1})
    results = json.loads((tmp_path / "preserve.json").read_text())
    assert {operation: list(modes) for operation, modes in results.items()} == {"recolor": ["off", "auto", "mask"]}
    off, mask = results["recolor"]["off"], results["recolor"]["mask"]
    assert off["passes"] > mask["passes"]
    assert off["psnr"] < mask["psnr"]
    assert mask["at_floor"] == 1
    assert "| recolor (1) | off |" in (tmp_path / "preserve.md").read_text()


def test_squares_of_a_shape_show_objects_as_small_as_the_shape(bank):
    assert score_shapes.name_square("3:4") == score_shapes.name_square("4:3") == "4:3"
    sides = []
    for size, object_scale in (((96, 128), 1.0), ((128, 128), 96 / 128), ((128, 128), 1.0)):
        samples = score_shapes.compose_samples(bank, "recolor", size, 40, 7, object_scale)
        boxes = np.array([sample["box"] for sample in samples])
        sides.append(np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]).mean())
    assert sides[1] == pytest.approx(sides[0], rel=0.1)
    assert sides[2] > 1.2 * sides[1]


def test_an_average_over_shapes_weighs_operations_and_shapes_alike():
    def mark(*values):
        return {"greedy-1": [{"done": value} for value in values]}

    figures = {"1:1": {"add": mark(True), "move": mark(True, False)}, "2:1": {"add": mark(False), "move": mark(False)}}
    how = ("done", "greedy-1", ("add", "move"))
    # The only error is that of a half among two: 0.354, halved because there are two operations.
    assert score_shapes.average(figures, ["1:1"], *how) == pytest.approx((75, 17.68), abs=0.01)
    assert score_shapes.average(figures, ["1:1", "2:1"], *how) == pytest.approx((37.5, 8.84), abs=0.01)
    assert score_shapes.average(figures, ["1:1", "1:1", "2:1"], *how) == pytest.approx((50, 11.79), abs=0.01)


def test_keep_source_is_measured_on_spoiled_targets(run, dataset, folder, tmp_path):
    options = {"model": folder / "editor", "dataset": dataset, "num_samples": 1, "output": tmp_path / "keep_source.md"}
    run(score_keep_source, options)
    lines = (tmp_path / "keep_source.md").read_text().splitlines()
    assert len(lines) == 2 + 5 * 3
    vq_model = EditARPipeline.from_pretrained(folder / "editor", dtype=torch.float32).vq_model
    taken, kept = [], []
    for operation in score.LOCAL:
        sample = load_sample(dataset, operation)
        source, edited = Image.fromarray(sample["source"]), score_keep_source.blur(Image.fromarray(sample["target"]))
        result = np.asarray(keep_source(source, edited, vq_model, 0.2))
        is_edited, is_source = ((result == np.asarray(image)).all(axis=2) for image in (edited, source))
        taken.append(is_edited[sample["mask"]].mean())
        is_far = ~score.find_inside(sample["mask"], 2 * vq_model.config.stride)
        kept += [is_source[is_far].mean()] if is_far.any() else []
    assert f"| a blur of 0.7 pixels | 0.2 | {np.mean(taken):.2f} | {np.mean(kept):.2f} |" in "\n".join(lines)
