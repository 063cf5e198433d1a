"""Pairs of the scenes: what the images, the instructions and the splits promise."""

import colorsys
import random
import re

import bank as bank_module
import canny_edges
import compose
import global_edits
import instructions
import numpy as np
import pytest
import recoloring
from PIL import Image
from scenes_bank import HELD_OUT_PAIRS, NOUNS

from editar_hf import EditARImageProcessor
from editar_hf.condition_maps import make_canny_map
from editar_hf.training.dataset_specs import DatasetSpec, open_dataset
from editar_hf.training.rows import RowReader


LOCAL = ("add", "remove", "replace", "recolor", "move")


@pytest.fixture(scope="module")
def pairs(bank):
    return [compose.compose_pair(bank, 3, index) for index in range(400)]


@pytest.fixture(scope="module")
def test_pairs(bank):
    return [compose.compose_pair(bank, 3, index, "test", operation=LOCAL[index % 5]) for index in range(400)]


def list_pairs(pairs, *operations):
    return [pair for pair in pairs if pair.operation in operations]


def test_a_pair_depends_on_its_arguments_alone(bank, bank_folder):
    for index, operation in enumerate((None, *compose.OPERATIONS)):
        first = compose.compose_pair(bank, 1, index, operation=operation)
        compose.compose_pair(bank, 2, index)
        again = compose.compose_pair(bank_module.Bank.load(bank_folder), 1, index, operation=operation)
        assert first.instruction == again.instruction
        for name in ("source", "target", "mask"):
            np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert len({compose.compose_pair(bank, seed, 0).source.tobytes() for seed in range(5)}) == 5


@pytest.mark.parametrize("operation", compose.OPERATIONS)
def test_every_operation_has_every_shape(bank, operation):
    for shape in ((128, 128), (96, 128), (128, 96), (72, 128), (128, 72)):
        for index in range(3):
            pair = compose.compose_pair(bank, 0, index, "train", *shape, operation)
            assert pair.source.shape == pair.target.shape == (*shape, 3)
            assert pair.source.dtype == pair.target.dtype == np.uint8
            assert (pair.mask.shape, pair.mask.dtype, pair.operation) == (shape, bool, operation)
            assert pair.task == (operation if operation in compose.MAPS else "edit")
            assert (pair.source != pair.target).any()


def test_images_differ_inside_the_mask_alone(pairs):
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
        assert changed[top:bottom, left:right].sum() > 0.6 * changed.sum()
        assert 0 <= left < right <= 128
        assert 0 <= top < bottom <= 128
        assert 20 <= max(right - left, bottom - top) <= 0.81 * 128


def test_places_in_instructions_are_true(pairs):
    place = re.compile(r"\b(on|to|in) (the )?(left|middle|right)\b")
    named = [pair for pair in pairs if place.search(pair.instruction.lower())]
    assert len(named) > 30
    assert {pair.operation for pair in named} == {"add", "move"}
    for pair in named:
        assert pair.place in pair.instruction
        center = (pair.box[0] + pair.box[2]) / 2 / pair.mask.shape[1]
        assert compose.PLACES[int(center * 3)] == pair.place
    for pair in list_pairs(pairs, "move"):
        # What changes reaches beyond the target's place: the object stood elsewhere before.
        columns = np.flatnonzero((pair.source != pair.target).any((0, 2)))
        assert columns[0] < pair.box[0] - 5 or columns[-1] > pair.box[2] + 5


def test_training_never_shows_held_out_colors(bank, pairs):
    shown = {(pair.color, pair.new_noun or pair.noun) for pair in pairs if pair.color}
    shown |= {(pair.source_color, pair.noun) for pair in pairs if pair.source_color}
    for index in range(200):
        scene = compose.make_scene(bank, random.Random(index), "train", 128, 128)
        shown |= {(thing.color or thing.view.color, thing.view.noun) for thing in compose.draw_things(scene, 3)}
    assert len(shown) > 25
    assert not shown & {tuple(pair) for pair in HELD_OUT_PAIRS}
    assert not [pair for pair in pairs if re.search("red car|green chair", pair.instruction.lower())]


def test_the_test_split_shows_what_training_does_not(bank, pairs, test_pairs):
    photographs = {photograph.id: photograph.split for photograph in bank.photographs}
    assert {photographs[pair.photograph] for pair in pairs} == {"train"}
    assert {photographs[pair.photograph] for pair in test_pairs} == {"test"}
    assert not any(pair.new_photograph or pair.new_view or pair.new_model or pair.new_color_pair for pair in pairs)
    assert all(pair.new_photograph and pair.new_view for pair in test_pairs)
    recolored = list_pairs(test_pairs, "recolor")
    for pair in recolored:
        assert pair.new_color_pair == ([pair.color, pair.noun] in HELD_OUT_PAIRS)
    new_models = [pair.new_model for pair in list_pairs(test_pairs, "remove", "move")]
    for marks in (new_models, [pair.new_color_pair for pair in recolored]):
        assert 0.35 < np.mean(marks) < 0.65


def test_the_other_objects_stay(pairs):
    local = list_pairs(pairs, *LOCAL)
    with_others = [pair for pair in local if pair.others]
    assert 0.4 < len(with_others) / len(local) < 0.7
    assert not [pair for pair in with_others if {pair.noun, pair.new_noun} & set(pair.others)]
    # Behind a removed object the cat's own gray is still there.
    removed = [pair for pair in list_pairs(pairs, "remove") if pair.others == ("cat",)]
    assert removed
    for pair in removed:
        assert (np.abs(pair.target.astype(int) - np.array([96, 80, 72])).sum(-1) < 110).sum() > 40


def test_recolored_objects_have_the_asked_hue(pairs, test_pairs):
    hues = {"red": 0, "orange": 29, "yellow": 51, "green": 126, "blue": 226, "purple": 278, "pink": 331}
    checked = set()
    for pair in list_pairs([*pairs, *test_pairs], "recolor"):
        is_changed = (np.abs(pair.source.astype(int) - pair.target).sum(-1) > 30) & pair.mask
        assert is_changed.sum() > 50
        mean = pair.target[is_changed].mean(0)
        checked.add(pair.color)
        if pair.color in hues:
            distance = abs(360 * colorsys.rgb_to_hsv(*mean / 255)[0] - hues[pair.color])
            assert min(distance, 360 - distance) < 21, (pair.color, pair.instruction)
            assert np.ptp(mean) > 60
        elif pair.color in ("white", "black"):
            assert np.ptp(mean) < 45
            assert mean.mean() > 140 if pair.color == "white" else mean.mean() < 75
    assert checked >= {*hues, "white", "black"}


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
    words = {"orange car": "an", "apple": "an", "unicorn": "a", "hour glass": "an", "cat": "a"}
    assert {name: instructions.choose_article(name) for name in words} == words
    for text in [pair.instruction for pair in pairs] + [text for text, _ in compose.list_instructions(bank, 500, 1)]:
        assert not re.search(r"\ban [^aeiou]|\ba [aeiou]|\b(a|an) (\w+ )?scissors|[{}]|  ", text), text
        assert text[0].isupper() == text.endswith(".")
        assert text[1:] == text[1:].lower()
    named = {word for pair in pairs for word in re.findall(r"\w+", pair.instruction)}
    assert {"kitten", "automobile", "seat"} <= named
    assert instructions.name_new(random.Random(0), {"bread": NOUNS["cat"] | {"synonyms": []}}, "bread") == "bread"
    for pair in list_pairs(pairs, *LOCAL):
        for noun in filter(None, (pair.noun, pair.new_noun)):
            assert any(name in pair.instruction.lower() for name in (noun, *NOUNS[noun]["synonyms"]))
        assert pair.color in pair.instruction.lower()
    for kind, phrases in instructions.PHRASES.items():
        assert len(set(phrases)) == len(phrases) >= 8, kind


def test_global_edits_differ_from_the_source_and_from_one_another(bank):
    for index in range(6):
        rng = random.Random(index)
        scene = compose.make_scene(bank, rng, "train", 96, 128)
        images = {"none": np.asarray(scene.draw(compose.draw_things(scene, 2)))}
        for edit in global_edits.GLOBAL_EDITS:
            edited = global_edits.apply_global_edit(images["none"], edit, 0.5, rng)
            assert (edited.shape, edited.dtype) == ((96, 128, 3), np.uint8)
            for other, image in images.items():
                difference = np.abs(edited.astype(int) - image).mean()
                assert difference > (1.5 if {edit, other} == {"none", "blur"} else 6), (edit, other)
            images[edit] = edited


def test_canny_maps_are_those_of_the_package(bank):
    for index in range(4):
        pair = compose.compose_pair(bank, 4, index, operation="canny")
        expected = np.asarray(make_canny_map(Image.fromarray(pair.target)))[:, :, 0] > 0
        found = canny_edges.find_edges(pair.target)
        assert expected.any()
        assert (found & expected).sum() / (found | expected).sum() > 0.97
        assert set(np.unique(pair.source)) == {0, 255}


def test_depth_and_segmentation_show_the_objects(bank):
    for index in range(10):
        depth = compose.compose_pair(bank, 4, index, operation="depth").source
        assert (depth.min(), depth.max()) == (0, 255)
        assert depth[0].max() < 100
        assert depth[-1].mean() > depth[0].mean() + 60
        flat = compose.compose_pair(bank, 4, index, operation="segmentation")
        colors = {tuple(color) for color in flat.source.reshape(-1, 3).tolist()} - {(0, 0, 0)}
        labels = [bank.segmentation_labels[noun] for noun in flat.others]
        assert colors
        assert colors <= {tuple(color) for color in bank.segmentation_palette[labels].tolist()}


def test_names_that_contain_one_another_never_stand_together():
    noun = NOUNS["cat"] | {"synonyms": []}
    assert not bank_module.Bank({"ball": noun, "soccer ball": noun}, [], [], [], []).are_distinct("ball", "soccer ball")


def test_the_data_set_opens_with_the_package(bank, bank_folder, tmp_path):
    output_dir, sheet = tmp_path / "pairs", tmp_path / "sheet.png"
    words = ["--bank", bank_folder, "--output-dir", output_dir, "--per_operation", 3, "--seed", 2, "--height", 96]
    compose.main([str(word) for word in [*words, "--sheet", sheet, "--number", 4]])
    spec = DatasetSpec(str(output_dir), split="test")
    reader = RowReader(EditARImageProcessor(size={"height": 96, "width": 128}, stride=8))
    rows = [reader.read(row, spec) for row in open_dataset(spec)]
    assert len(rows) == 3 * len(compose.OPERATIONS)
    assert {row["task"] for row in rows} == {"edit", "canny", "depth", "segmentation"}
    pair = compose.compose_pair(bank, 2, 0, "test", 96, 128, "add")
    row = next(row for row in rows if row["prompt"] == pair.instruction)
    np.testing.assert_array_equal(np.asarray(row["source_image"]), pair.source)
    np.testing.assert_array_equal(np.asarray(row["target_image"]), pair.target)
    assert sum(row["edit_mask"]) == pair.mask.reshape(12, 8, 16, 8).any((1, 3)).sum()
    assert Image.open(sheet).width > 1000


def test_bad_input_is_refused_by_name(bank, tmp_path):
    with pytest.raises(ValueError, match="`operation` is 'melt'"):
        compose.compose_pair(bank, 0, 0, operation="melt")
    with pytest.raises(ValueError, match="`split` is 'validation'"):
        compose.compose_pair(bank, 0, 0, split="validation")
    with pytest.raises(ValueError, match=r"lacks bank\.json"):
        bank_module.Bank.load(tmp_path)
