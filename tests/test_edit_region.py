"""Masks: which tokens they free, how far a feather reaches, and which window is cut around them."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw

from editar_hf.pipelines.edit_region import (
    compute_edit_mask,
    compute_feather,
    compute_window,
    describe_lost_white,
    prepare_mask,
)


STRIDE = 4


def draw_points(height, width, *points):
    is_white = np.zeros((height, width), dtype=bool)
    for row, column in points:
        is_white[row, column] = True
    return is_white


# Tokens


@pytest.mark.parametrize("resize_mode", ["crop", "stretch"])
def test_a_token_is_free_exactly_if_one_of_its_pixels_is_white(resize_mode):
    is_white = np.random.default_rng(0).random((16, 24)) < 0.04
    edit_mask = compute_edit_mask(is_white, 16, 24, STRIDE, resize_mode)
    for row in range(4):
        for column in range(6):
            block = is_white[row * STRIDE : (row + 1) * STRIDE, column * STRIDE : (column + 1) * STRIDE]
            assert edit_mask[row, column] == block.any()
    assert 0 < edit_mask.sum() < 24


@pytest.mark.parametrize("scale", [1, 3, 37])
def test_no_stroke_is_too_thin_for_a_smaller_model(scale):
    """A single white pixel of a large picture frees the token it lies in."""
    for row, column in ((0, 0), (5, 11), (15, 15)):
        is_white = draw_points(16 * scale, 16 * scale, (row * scale + scale // 2, column * scale + scale // 2))
        edit_mask = compute_edit_mask(is_white, 16, 16, STRIDE, "stretch")
        assert edit_mask.nonzero().tolist() == [[row // STRIDE, column // STRIDE]]


def test_a_mask_is_cropped_as_its_image_is():
    left_over, inside = draw_points(16, 48, (8, 3)), draw_points(16, 48, (8, 16))
    assert not compute_edit_mask(left_over, 16, 16, STRIDE, "crop").any()
    assert compute_edit_mask(inside, 16, 16, STRIDE, "crop").nonzero().tolist() == [[2, 0]]
    assert compute_edit_mask(left_over, 16, 16, STRIDE, "stretch").nonzero().tolist() == [[2, 0]]


# What a mask may be


def test_gray_counts_as_white_from_the_middle_on_in_every_kind_of_picture():
    levels = np.array([[0, 127, 128, 255]], dtype=np.uint8)
    expected = [[False, False, True, True]]
    pictures = [levels, Image.fromarray(levels), Image.fromarray(levels).convert("RGB"), levels >= 128]
    pictures += [torch.from_numpy(levels), torch.from_numpy(levels >= 128), Image.fromarray(levels >= 128)]
    for picture in pictures:
        assert prepare_mask(picture, (4, 1)).tolist() == expected


def test_transparency_of_a_mask_is_black():
    stroke = Image.new("RGBA", (16, 8), (0, 0, 0, 0))
    stroke.paste((255, 255, 255, 255), (4, 2, 6, 4))
    erased = Image.new("RGBA", (16, 8), (255, 255, 255, 0))
    erased.paste((255, 255, 255, 255), (4, 2, 6, 4))
    expected = draw_points(8, 16, (2, 4), (2, 5), (3, 4), (3, 5))
    palette = Image.fromarray(expected.astype(np.uint8), "P")
    palette.putpalette([255] * 6)
    palette.info["transparency"] = 0
    tensor = torch.from_numpy(np.asarray(stroke).copy()).permute(2, 0, 1)
    for picture in (stroke, erased, np.asarray(stroke), tensor, stroke.convert("LA"), palette):
        assert np.array_equal(prepare_mask(picture, (16, 8)), expected)


def draw_openai_mask(photograph):
    """Make a part of a photograph transparent: that part is to be edited."""
    mask = photograph.convert("RGBA")
    mask.paste((0, 0, 0, 0), (20, 20, 50, 40))
    return mask


def draw_photograph():
    """Draw smooth colors, as photographs have them."""
    rows, columns = np.mgrid[:64, :96]
    pixels = np.stack([80 + columns, 200 - rows, 60 + rows + columns / 2], axis=2)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_strokes(width, color="white"):
    """Draw lines with soft edges on nothing: large, then made smaller."""
    strokes = Image.new("RGBA", (96 * 8, 64 * 8), (0, 0, 0, 0))
    drawing = ImageDraw.Draw(strokes)
    drawing.line((80, 80, 600, 420), fill=color, width=8 * width)
    drawing.line((80, 420, 600, 100), fill=color, width=8 * width)
    return strokes.resize((96, 64), Image.Resampling.BICUBIC)


PRODUCT = Image.new("L", (96, 64), 255)
PRODUCT.paste(150, (60, 10, 80, 30))
REFUSED = {
    "photograph": draw_openai_mask(draw_photograph()),
    "gray photograph": draw_openai_mask(draw_photograph().convert("L")),
    "product on white": draw_openai_mask(PRODUCT),
    "black with a hole": draw_openai_mask(Image.new("L", (96, 64))),
    "as an array": np.asarray(draw_openai_mask(draw_photograph())),
    "yellow strokes": draw_strokes(4, "yellow"),
    "blue strokes": draw_strokes(4, "blue"),
}


@pytest.mark.parametrize("mask", REFUSED.values(), ids=REFUSED)
def test_a_mask_whose_transparent_part_may_be_meant_is_refused_with_both_remedies(mask):
    with pytest.raises(ValueError, match=r"white where the image may change.*`ImageChops\.invert\(mask\.getchannel"):
        prepare_mask(mask, (96, 64))


def test_the_remedy_for_a_transparent_part_frees_it():
    mask = REFUSED["photograph"]
    is_white = prepare_mask(ImageChops.invert(mask.getchannel("A")), mask.size)
    expected = np.zeros((64, 96), dtype=bool)
    expected[20:40, 20:50] = True
    assert np.array_equal(is_white, expected)


@pytest.mark.parametrize("width", [1, 2, 12])
def test_strokes_with_soft_edges_on_transparency_pass(width):
    strokes = draw_strokes(width)
    is_white = prepare_mask(strokes, strokes.size)
    assert np.array_equal(is_white, np.asarray(strokes.getchannel("A")) >= 128)
    assert is_white.any()
    alpha = np.asarray(strokes.getchannel("A"))
    darkened = np.repeat(alpha[:, :, None], 4, axis=2)  # as OpenCV resizes white strokes on transparent black
    is_white = prepare_mask(darkened, strokes.size)
    assert is_white[alpha > 192].all()
    assert not is_white[alpha < 128].any()


def test_faint_and_missing_strokes_free_nothing():
    for mask in (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.new("RGBA", (8, 8), (255, 255, 255, 100))):
        assert not prepare_mask(mask, (8, 8)).any()


@pytest.mark.parametrize(("color", "is_free"), [("white", True), ("yellow", True), ("red", False), ("black", False)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colors_count_by_their_luminance_without_transparency(mode, color, is_free):
    assert (prepare_mask(Image.new(mode, (8, 8), color), (8, 8)) == is_free).all()


def test_what_is_no_mask_is_refused_by_its_own_name():
    for mask in ("no-such-mask.png", 5, np.full((8, 8), 2.0)):
        with pytest.raises(ValueError, match="`mask_image`"):
            prepare_mask(mask, (8, 8))


def test_white_that_cannot_be_edited_is_described_with_its_cause_and_remedy():
    nothing, inside, outside = draw_points(16, 48), draw_points(16, 48, (8, 16)), draw_points(16, 48, (8, 3))
    assert "`mask_image` has no white pixels" in describe_lost_white(nothing, 16, 16, "stretch")
    assert describe_lost_white(inside, 16, 16, "crop") is None
    assert describe_lost_white(outside, 16, 16, "stretch") is None
    message = describe_lost_white(inside | outside, 16, 16, "crop")
    assert "The center crop cuts away 50% of the white pixels of `mask_image`" in message
    assert 'Pass `resize_mode="stretch"`' in message


def test_a_mask_of_another_size_is_resized_with_a_warning():
    small = draw_points(10, 15, (2, 4))
    with pytest.warns(UserWarning, match="`mask_image` is 15×10 pixels and its image is 60×40; the mask was resized"):
        large = prepare_mask(small, (60, 40))
    assert np.array_equal(large, small.repeat(4, axis=0).repeat(4, axis=1))
    with pytest.warns(UserWarning, match="the mask was resized"):
        assert prepare_mask(large, (15, 10)).tolist() == small.tolist()
    with pytest.warns(UserWarning, match="the mask was resized"):
        assert prepare_mask(np.ones((67, 100), bool), (1500, 1000)).all()


@pytest.mark.parametrize("size", [(60, 60), (40, 60), (30, 40)])
def test_a_mask_of_other_proportions_is_refused(size):
    with pytest.raises(ValueError, match=r"`mask_image` is 60×40 pixels and its image .* proportions differ"):
        prepare_mask(np.ones((40, 60), bool), size)


# Feathers


def test_a_feather_is_one_on_free_tokens_and_ends_within_one_token():
    edit_mask = torch.zeros(2, 5, 6, dtype=torch.bool)
    edit_mask[0, 2, 3] = edit_mask[1, 0, 0] = edit_mask[1, 4, 4] = True
    weights = compute_feather(edit_mask, STRIDE)
    assert weights.shape == (2, 1, 20, 24)
    rows, columns = np.mgrid[:20, :24]
    for sample in range(2):
        distance = np.full((20, 24), np.inf)
        for row, column in edit_mask[sample].nonzero().tolist():
            top, left = row * STRIDE, column * STRIDE
            down = np.maximum(0, np.maximum(top - rows, rows - top - STRIDE + 1))
            across = np.maximum(0, np.maximum(left - columns, columns - left - STRIDE + 1))
            distance = np.minimum(distance, np.maximum(down, across))
        assert np.allclose(weights[sample, 0], np.clip(1 - distance / STRIDE, 0, 1))
        assert (weights[sample, 0].numpy()[distance >= STRIDE] == 0).all()


# Windows


@pytest.mark.parametrize(
    ("points", "size", "expected"),
    [
        ([(50, 60)], (16, 16), (52, 42, 68, 58)),
        ([(0, 0)], (16, 16), (0, 0, 16, 16)),
        ([(99, 199)], (16, 32), (168, 84, 200, 100)),
        ([(30, 40), (69, 79)], (16, 16), (30, 20, 90, 80)),
        ([(10, 60), (99, 139)], (16, 16), (50, 0, 150, 100)),
        ([], (16, 16), (92, 42, 108, 58)),
    ],
    ids=str,
)
def test_window_lies_around_the_white_inside_the_picture(points, size, expected):
    assert compute_window(draw_points(100, 200, *points), *size) == expected


def test_window_of_a_picture_smaller_than_the_model_is_all_of_it_that_fits():
    assert compute_window(draw_points(10, 20, (5, 2)), 16, 16) == (0, 0, 10, 10)


def test_white_that_no_window_of_the_proportions_holds_is_refused():
    with pytest.raises(ValueError, match=r"`mask_image` has a white area of 150×1 pixels.*16×16"):
        compute_window(draw_points(100, 200, (50, 10), (50, 159)), 16, 16)
