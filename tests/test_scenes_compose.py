"""Pairs of the scenes: what the pictures, the instructions and the splits promise."""

import colorsys
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


sys.path.insert(0, str(Path(__file__).parent.parent / "projects" / "scenes"))

import canny_edges
import compose
import global_edits
import instructions
import recoloring
from scenes_bank import HELD_OUT_PAIRS, NOUNS, make_bank

from editar_hf.condition_maps import make_canny_map
from editar_hf.training.dataset_specs import DatasetSpec, open_dataset
from editar_hf.training.rows import RowReader


LOCAL = ("add", "remove", "replace", "recolor", "move")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_bank(tmp_path_factory.mktemp("scenes") / "bank")


@pytest.fixture(scope="module")
def bank(folder):
    return compose.Bank.load(folder)


@pytest.fixture(scope="module")
def pairs(bank):
    return [compose.compose_pair(bank, 3, index) for index in range(400)]


@pytest.fixture(scope="module")
def test_pairs(bank):
    return [compose.compose_pair(bank, 3, index, "test", operation=LOCAL[index % 5]) for index in range(400)]


def list_pairs(pairs, *operations):
    return [pair for pair in pairs if pair.operation in operations]


def find_hue(pixels, is_inside):
    """Find the hue in degrees of the mean color of pixels."""
    return 360 * colorsys.rgb_to_hsv(*pixels[is_inside].mean(0) / 255)[0]


def test_a_pair_depends_on_its_arguments_alone(bank, folder):
    for index, operation in enumerate((None, *compose.OPERATIONS)):
        first = compose.compose_pair(bank, 1, index, operation=operation)
        compose.compose_pair(bank, 2, index)
        again = compose.compose_pair(compose.Bank.load(folder), 1, index, operation=operation)
        assert first.instruction == again.instruction
        for name in ("source", "target", "mask"):
            np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    pictures_of_seeds = {compose.compose_pair(bank, seed, 0).source.tobytes() for seed in range(5)}
    assert len(pictures_of_seeds) == 5


@pytest.mark.parametrize("operation", compose.OPERATIONS)
@pytest.mark.parametrize("shape", compose.SHAPES)
def test_every_operation_has_every_shape(bank, operation, shape):
    for index in range(3):
        pair = compose.compose_pair(bank, 0, index, "train", *shape, operation)
        assert pair.source.shape == pair.target.shape == (*shape, 3)
        assert pair.source.dtype == pair.target.dtype == np.uint8
        assert pair.mask.shape == shape
        assert pair.mask.dtype == bool
        assert pair.operation == operation
        assert pair.task == (operation if operation in compose.MAPS else "edit")
        assert (pair.source != pair.target).any()
        assert pair.instruction


def test_pictures_differ_inside_the_mask_alone(pairs):
    for pair in pairs:
        assert (pair.source == pair.target)[~pair.mask].all()
        if pair.operation in LOCAL:
            # The mask is not much larger than what changes.
            changed = (pair.source != pair.target).any(-1)
            assert changed.sum() > 0.5 * pair.mask.sum()
            assert pair.mask.mean() < 0.75
        else:
            assert pair.mask.all()


def test_the_box_holds_the_object(pairs):
    for pair in list_pairs(pairs, "add", "remove", "recolor"):
        left, top, right, bottom = pair.box
        changed = (pair.source != pair.target).any(-1)
        inside = changed[top:bottom, left:right].sum()
        assert inside > 0.6 * changed.sum()
        assert 0 <= left < right <= 128
        assert 0 <= top < bottom <= 128
        assert 20 <= max(right - left, bottom - top) <= 0.81 * 128


def test_places_in_instructions_are_true(pairs):
    named = [
        pair for pair in pairs if re.search(r"\b(on|to|in) (the )?(left|middle|right)\b", pair.instruction.lower())
    ]
    assert len(named) > 30
    assert {pair.operation for pair in named} == {"add", "move"}
    for pair in named:
        assert pair.place
        assert pair.place in pair.instruction
        center = (pair.box[0] + pair.box[2]) / 2 / pair.mask.shape[1]
        assert compose.PLACES[int(center * 3)] == pair.place
    for pair in list_pairs(pairs, "move"):
        # What changes reaches beyond the target's place: the object stood elsewhere before.
        columns = np.flatnonzero((pair.source != pair.target).any((0, 2)))
        left, _, right, _ = pair.box
        assert columns[0] < left - 5 or columns[-1] > right + 5


def test_training_never_shows_held_out_colors(bank, pairs):
    held_out = {tuple(pair) for pair in HELD_OUT_PAIRS}
    assert bank.held_out_pairs == held_out
    shown = set()
    for index in range(200):
        scene = compose.make_scene(bank, random.Random(index), "train", 128, 128)
        for thing in compose.draw_things(scene, 3):
            shown.add((thing.color or thing.view.color, thing.view.noun))
    shown |= {(pair.color, pair.new_noun or pair.noun) for pair in pairs if pair.color}
    shown |= {(pair.source_color, pair.noun) for pair in pairs if pair.source_color}
    assert len(shown) > 25
    assert not shown & held_out
    for text in [pair.instruction.lower() for pair in pairs]:
        assert "red car" not in text
        assert "green chair" not in text


def test_held_out_colors_are_about_half_of_the_tests(test_pairs):
    recolored = list_pairs(test_pairs, "recolor")
    share = np.mean([pair.new_color_pair for pair in recolored])
    assert 0.35 < share < 0.65
    for pair in recolored:
        assert pair.new_color_pair == ([pair.color, pair.noun] in HELD_OUT_PAIRS)


def test_splits_share_no_photograph_and_no_view(bank, pairs, test_pairs):
    photographs = {photograph.id: photograph.split for photograph in bank.photographs}
    assert {photographs[pair.photograph] for pair in pairs} == {"train"}
    assert {photographs[pair.photograph] for pair in test_pairs} == {"test"}
    assert not any(pair.new_photograph or pair.new_view or pair.new_model or pair.new_color_pair for pair in pairs)
    assert all(pair.new_photograph and pair.new_view for pair in test_pairs)
    share = np.mean([pair.new_model for pair in list_pairs(test_pairs, "remove", "move")])
    assert 0.35 < share < 0.65


def test_the_other_objects_stay(pairs):
    with_others = [pair for pair in list_pairs(pairs, *LOCAL) if pair.others]
    assert 0.4 < len(with_others) / len(list_pairs(pairs, *LOCAL)) < 0.7
    for pair in with_others:
        assert pair.noun not in pair.others
        assert pair.new_noun not in pair.others
    # A removed object leaves the other's pixels and shadow.
    removed = [pair for pair in list_pairs(pairs, "remove") if pair.others == ("cat",)]
    assert removed
    for pair in removed:
        assert (pair.source == pair.target)[~pair.mask].all()
        gray = np.abs(pair.target.astype(int) - np.array([96, 80, 72])).sum(-1)
        assert (gray < 110).sum() > 40


def test_recolored_objects_have_the_asked_hue(pairs, test_pairs):
    hues = {"red": 0, "orange": 29, "yellow": 51, "green": 126, "blue": 226, "purple": 278, "pink": 331}
    checked = set()
    for pair in list_pairs([*pairs, *test_pairs], "recolor"):
        is_changed = (np.abs(pair.source.astype(int) - pair.target).sum(-1) > 30) & pair.mask
        assert is_changed.sum() > 50
        mean = pair.target[is_changed].mean(0)
        if pair.color in hues:
            distance = abs(find_hue(pair.target, is_changed) - hues[pair.color])
            assert min(distance, 360 - distance) < 21, (pair.color, pair.instruction)
            assert mean.max() - mean.min() > 60
            checked.add(pair.color)
        elif pair.color in ("white", "black"):
            assert mean.max() - mean.min() < 45
            assert mean.mean() > 140 if pair.color == "white" else mean.mean() < 75
            checked.add(pair.color)
    assert len(checked) == 9


@pytest.mark.parametrize("color", recoloring.COLORS)
def test_painting_keeps_the_shading_and_the_alpha(color):
    values = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (8, 1))
    sprite = Image.fromarray(np.stack([values, values, values, np.full_like(values, 255)], axis=-1))
    sprite.putpixel((3, 3), (10, 20, 30, 0))
    painted = np.asarray(recoloring.recolor(sprite, color))
    np.testing.assert_array_equal(painted[:, :, 3], np.asarray(sprite)[:, :, 3])
    luminance = np.asarray(Image.fromarray(painted[:, :, :3]).convert("L"), int)[0]
    assert (np.diff(luminance) >= 0).all()
    assert luminance[-1] - luminance[0] > 60
    if color not in ("white", "gray", "black"):
        assert recoloring.name_color(painted[0, 32, :3]) == color


def test_articles_and_words(bank, pairs):
    assert [
        instructions.choose_article(words) for words in ("orange car", "apple", "unicorn", "hour glass", "cat")
    ] == [
        "an",
        "an",
        "a",
        "an",
        "a",
    ]
    for text in [pair.instruction for pair in pairs] + [text for text, _ in compose.list_instructions(bank, 500, 1)]:
        assert not re.search(r"\ban [^aeiou]|\ba [aeiou]|\b(a|an) (\w+ )?scissors|[{}]|  ", text), text
        sentence = text[0].isupper()
        assert sentence == text.endswith(".")
        assert text[1:] == text[1:].lower()
    named = {word for pair in pairs for word in re.findall(r"\w+", pair.instruction)}
    assert {"kitten", "automobile", "seat"} <= named
    assert instructions.name_new(random.Random(0), {"bread": NOUNS["cat"] | {"synonyms": []}}, "bread") == "bread"
    for kind, phrases in instructions.PHRASES.items():
        assert len(set(phrases)) == len(phrases) >= 8, kind


def test_instructions_name_the_object(pairs):
    for pair in list_pairs(pairs, *LOCAL):
        text = pair.instruction.lower()
        for noun in filter(None, (pair.noun, pair.new_noun)):
            assert any(name in text for name in (noun, *NOUNS[noun]["synonyms"])), text
        assert pair.color in text


def test_global_edits_differ_from_the_picture_and_from_one_another(bank):
    for index in range(6):
        rng = random.Random(index)
        scene = compose.make_scene(bank, rng, "train", 96, 128)
        source = np.asarray(scene.draw(compose.draw_things(scene, 2)))
        pictures = {"none": source}
        for edit in global_edits.GLOBAL_EDITS:
            pictures[edit] = global_edits.apply_global_edit(source, edit, 0.5, rng)
            assert pictures[edit].dtype == np.uint8
            assert pictures[edit].shape == source.shape
        names = list(pictures)
        for position, one in enumerate(names):
            for other in names[position + 1 :]:
                difference = np.abs(pictures[one].astype(int) - pictures[other]).mean()
                assert difference > (1.5 if {one, other} == {"none", "blur"} else 6), (one, other)


def test_canny_maps_are_those_of_the_package(bank):
    pytest.importorskip("kornia")
    for index in range(4):
        pair = compose.compose_pair(bank, 4, index, operation="canny")
        expected = np.asarray(make_canny_map(Image.fromarray(pair.target)))[:, :, 0] > 0
        assert expected.any()
        found = canny_edges.find_edges(pair.target)
        assert (found & expected).sum() / (found | expected).sum() > 0.97
        assert set(np.unique(pair.source)) == {0, 255}


def test_depth_and_segmentation_show_the_objects(bank):
    for index in range(10):
        depth = compose.compose_pair(bank, 4, index, operation="depth")
        assert depth.source.min() == 0
        assert depth.source.max() == 255
        assert depth.source[0].max() < 100
        assert depth.source[-1].mean() > depth.source[0].mean() + 60
        flat = compose.compose_pair(bank, 4, index, operation="segmentation")
        colors = {tuple(color) for color in flat.source.reshape(-1, 3).tolist()} - {(0, 0, 0)}
        palette = bank.segmentation_palette
        assert colors <= {tuple(palette[bank.segmentation_labels[noun]].tolist()) for noun in flat.others}
        assert colors


def test_names_that_contain_one_another_never_stand_together(bank):
    bank = compose.Bank(
        {"ball": NOUNS["cat"] | {"synonyms": []}, "soccer ball": NOUNS["cat"] | {"synonyms": []}}, [], [], [], []
    )
    assert not bank.are_distinct("ball", "soccer ball")


def test_the_data_set_opens_with_the_package(folder, tmp_path):
    output_dir = tmp_path / "pairs"
    arguments = ["--bank", str(folder), "--output_dir", str(output_dir), "--per_operation", "3", "--seed", "2"]
    compose.main([*arguments, "--height", "96", "--sheet", str(tmp_path / "sheet.png"), "--number", "4"])
    assert sorted(path.name for path in output_dir.iterdir()) == sorted(
        f"test-{operation}.parquet" for operation in compose.OPERATIONS
    )
    source = DatasetSpec(str(output_dir), split="test")
    rows = list(open_dataset(source))
    assert len(rows) == 3 * len(compose.OPERATIONS)
    reader = RowReader(None, 96, 128, "crop", 8)
    prepared = [reader.read(row, source) for row in rows]
    assert {row["task"] for row in prepared} == {"edit", "canny", "depth", "segmentation"}
    pair = compose.compose_pair(compose.Bank.load(folder), 2, 0, "test", 96, 128, "add")
    row = next(row for row in prepared if row["prompt"] == pair.instruction)
    np.testing.assert_array_equal(np.asarray(row["source_image"]), pair.source)
    np.testing.assert_array_equal(np.asarray(row["target_image"]), pair.target)
    assert sum(row["edit_mask"]) == pair.mask.reshape(12, 8, 16, 8).any((1, 3)).sum()
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000


def test_bad_input_is_refused_by_name(bank, tmp_path):
    with pytest.raises(ValueError, match="`operation` is 'melt'; choose one of add"):
        compose.compose_pair(bank, 0, 0, operation="melt")
    with pytest.raises(ValueError, match="`split` is 'validation'"):
        compose.compose_pair(bank, 0, 0, split="validation")
    with pytest.raises(ValueError, match=r"lacks bank\.json"):
        compose.Bank.load(tmp_path)
    with pytest.raises(ValueError, match="`colors` of the bank names mauve"):
        compose.Bank({}, ["mauve"], [], [], [])
