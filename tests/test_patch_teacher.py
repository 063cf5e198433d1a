"""The stand-in teacher of the distillation study: what it is taught, and that training takes it for a DINOv2."""

import numpy as np
import pytest
import torch
import train_patch_teacher as teacher
from stickers import COLOURS, SHAPES

from editar_hf.training.distillation import DistillationTeacher


def make_sticker(x, y, size, colour, shape="square"):
    return {"shape": shape, "colour": colour, "x": x, "y": y, "size": size}


def test_patches_are_labelled_by_the_sticker_that_covers_most_of_them():
    # The eight patches are 7 of 64 pixels wide and begin at pixel 4. One square covers pixels 4 to 18 each way: four
    # patches whole. The other begins at pixel 32 and covers pixels 32 to 40: patches at 32 to 39 alone, whole.
    red_square = make_sticker(11 / 64, 11 / 64, 14 / 64, "red")
    blue_circle = make_sticker(36 / 64, 36 / 64, 8 / 64, "blue", "circle")
    colours, shapes = teacher.label_patches([red_square, blue_circle])
    colours = colours.reshape(8, 8)
    red, blue, none = list(COLOURS).index("red"), list(COLOURS).index("blue"), len(COLOURS)
    expected = np.full((8, 8), none)
    expected[:2, :2], expected[4, 4] = red, blue
    assert np.array_equal(colours, expected)
    kinds = {red: SHAPES.index("square"), blue: SHAPES.index("circle"), none: len(SHAPES)}
    assert list(shapes) == [kinds[colour] for colour in colours.ravel()]


def test_a_batch_shows_what_an_edit_leaves_and_labels_that():
    pixel_values, labels = teacher.make_batch("train", range(12), seed=0)
    assert pixel_values.shape == (12, 3, 64, 64)
    assert labels.shape == (2, 12, 64)
    # A patch (7 pixels of the middle 56) with a colour has that colour somewhere, jittered by at most 6 of 255.
    patches = pixel_values[:, :, 4:60, 4:60].unfold(2, 7, 7).unfold(3, 7, 7).flatten(4).flatten(2, 3)
    rgb = torch.tensor([*COLOURS.values(), (0, 0, 0)]) / 127.5 - 1
    distance = (patches - rgb[labels[0]].permute(0, 2, 1)[..., None]).abs().amax(1).amin(-1)
    on_sticker = labels[0] < len(COLOURS)
    assert on_sticker.float().mean() > 0.05
    assert (distance[on_sticker] < 6.5 / 127.5).all()
    assert (distance[~on_sticker] < 6.5 / 127.5).float().mean() < 0.5


def test_the_teacher_that_is_saved_is_one_for_training(tmp_path, run_here, capsys):
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "num_validation": 4}
    run_here("train_patch_teacher.py", output_dir=tmp_path / "teacher", max_steps=2, batch_size=4, **sizes)
    assert "validation, patches on stickers: colour" in capsys.readouterr().out
    features = DistillationTeacher(str(tmp_path / "teacher"))(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert features.shape == (2, 64, 12)


@pytest.mark.parametrize("side", [64, 128])
def test_the_teacher_sees_the_centre_of_any_image_at_the_same_scale(side):
    image = torch.full((1, 3, side, side), -1.0)
    image[:, :, side // 2 :, :] = 1
    pixels = teacher.prepare_teacher_pixels(image)
    assert pixels.shape == (1, 3, 224, 224)
    assert torch.allclose(pixels[0, 0, 0], torch.tensor(-0.485 / 0.229))
    assert torch.allclose(pixels[0, 0, -1], torch.tensor((1 - 0.485) / 0.229))
