"""`detail="source"`: the change is applied to the source at its full size, which keeps its detail."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from tiny import are_near, build_pipeline, draw_image

from editar_hf import EditARImageProcessor


pytestmark = pytest.mark.filterwarnings("ignore:The center crop cuts", "ignore:A prompt is longer")
PROMPT = "make the red circle blue"
SMALL = (40, 30)


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


@pytest.fixture(scope="module")
def source():
    """Soft blotches under fine noise, four times the model's size."""
    blotches = draw_image(0, 8, 6).resize((160, 120), Image.Resampling.BICUBIC)
    return Image.blend(blotches, draw_image(1, 160, 120), 0.3)


@pytest.fixture(scope="module")
def reconstruction(source):
    """The source as a poor VQ model would return it."""
    return Image.blend(source.resize(SMALL).filter(ImageFilter.GaussianBlur(1)), draw_image(2, *SMALL), 0.05)


def restore(edited, source, reconstruction):
    processor = EditARImageProcessor(size={"height": 32, "width": 40}, stride=4, resize_mode="stretch")
    return np.asarray(processor.restore(edited, source, reconstruction=reconstruction), dtype=int)


def edit(pipe, **call):
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), **call)


def test_an_edit_that_changes_nothing_returns_the_source(source, reconstruction):
    assert np.array_equal(restore(reconstruction, source, reconstruction), np.asarray(source))
    gray = Image.new("RGB", SMALL, "gray")
    assert np.array_equal(restore(gray, source, gray), np.asarray(source))


@pytest.mark.parametrize(
    ("matrix", "offset"),
    [
        ([[0.27, 0.23, 0.16], [0.53, 0.45, 0.32], [0.10, 0.08, 0.06]], [8, 8, 8]),  # sepia: less than full rank
        ([[0.4, 0.1, 0.1], [0.1, 0.5, 0.1], [0.0, 0.1, 0.7]], [4, 7, 20]),  # night
    ],
)
def test_a_change_of_colors_is_that_of_the_full_size(source, reconstruction, matrix, offset):
    def change(image):
        return Image.fromarray(np.round(np.asarray(image) @ np.array(matrix) + offset).astype(np.uint8))

    result = restore(change(reconstruction), source, reconstruction)
    assert are_near(result, change(source))
    plain = np.asarray(change(reconstruction).resize(source.size, Image.Resampling.LANCZOS), dtype=int)
    assert np.abs(plain - result).mean() > 8  # what plain resizing loses


def test_a_new_object_is_resized_and_the_rest_is_the_source(source, reconstruction):
    edited = reconstruction.copy()
    edited.paste(draw_image(3, 5, 15).resize((20, 30), Image.Resampling.BICUBIC), (20, 0))
    result = restore(edited, source, reconstruction)
    resized = np.asarray(edited.resize(source.size, Image.Resampling.LANCZOS), dtype=int)
    detail = np.abs(np.asarray(source, dtype=int) - resized)
    # Columns of the object and of the rest, without windows that hold parts of both.
    assert np.abs(result - resized)[:, 120:].mean() < 0.05 * detail[:, 120:].mean()
    assert np.abs(result - np.asarray(source))[:, :28].mean() < 0.2 * detail[:, :28].mean()


MASK = Image.new("L", (72, 48))
MASK.paste(255, (20, 16, 30, 26))
# For each call: the height and width that the model works at, the resize mode, and the window that it sees.
WHOLE = (0, 0, 72, 48)
CALLS = [
    ({"aspect": "source"}, (12, 16), "stretch", WHOLE),
    ({"resize_mode": "crop"}, (16, 16), "crop", WHOLE),
    ({"height": 9, "width": 14, "size_policy": "fit", "restore_size": True}, (8, 16), "crop", WHOLE),
    ({"aspect": "source", "mask_image": MASK, "mask_blend": False}, (12, 16), "stretch", WHOLE),
    ({"mask_image": MASK, "mask_blend": False, "crop_to_mask": True}, (16, 16), "stretch", (17, 13, 33, 29)),
]


@pytest.mark.parametrize(("call", "size", "resize_mode", "window"), CALLS)
def test_a_call_restores_each_result_with_its_reconstruction(pipe, call, size, resize_mode, window):
    images = [draw_image(seed, 72, 48) for seed in range(2)]
    seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
    output = pipe(PROMPT, image=images, num_images_per_prompt=2, generator=seeds, detail="source", **call)
    for index, result in enumerate(output.images):
        expected = images[index // 2].copy()
        seen = expected.crop(window)
        before = pipe.decode_image_tokens(pipe.encode_image(seen, *size, resize_mode=resize_mode), *size)[0]
        after = pipe.decode_image_tokens(output.image_tokens[index : index + 1], *size)[0]
        by_hand = pipe.processor.image_processor.restore(after, seen, resize_mode, reconstruction=before)
        expected.paste(by_hand, window[:2])
        assert are_near(result, expected)
        assert not are_near(result, pipe.processor.image_processor.restore(after, images[index // 2], resize_mode))


def test_pixels_outside_the_mask_stay(pipe):
    image = draw_image(0, 72, 48)
    result = np.asarray(edit(pipe, image=image, mask_image=MASK, aspect="source", detail="source").images[0])
    # Tokens of 18×16 pixels: the mask touches the second column and row, and the feather reaches one token farther.
    stays = np.ones((48, 72), dtype=bool)
    stays[:, :54] = False
    assert np.array_equal(result[stays], np.asarray(image)[stays])
    assert not np.array_equal(result, image)


def test_the_detail_of_a_session_is_that_of_its_last_image(pipe):
    image = draw_image(0, 72, 48)
    first = edit(pipe, image=image, aspect="source", detail="source")
    turn = {"image": first.images[0], "source_image_tokens": first.image_tokens, "restore_size": True}
    mask = np.zeros((48, 72), dtype=bool)
    with pytest.warns(UserWarning, match="no white pixels"):
        same = edit(pipe, **turn, aspect="source", detail="source", mask_image=mask, mask_blend=False)
    assert np.array_equal(same.images[0], first.images[0])


def test_previews_keep_the_source_below_and_end_with_the_result(pipe):
    previews, image = [], draw_image(0, 72, 48)

    def keep(pipe, step, timestep, tensors):
        previews.extend(tensors.get("preview", []))

    how = {"callback_on_step_end": keep, "preview_every": 1}
    output = edit(pipe, image=image, aspect="source", detail="source", **how)
    assert len(previews) == 3
    assert np.array_equal(previews[-1], output.images[0])
    reconstruction = pipe.decode_image_tokens(pipe.encode_image(image, aspect="source"), height=12, width=16)[0]
    resized = pipe.processor.image_processor.restore(reconstruction, image, "stretch")
    error, lost = (np.abs(np.asarray(one, dtype=int) - np.asarray(image))[40:].mean() for one in (previews[0], resized))
    assert error < 0.1 * lost


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"detail": "high"}, "`detail` is 'high'"),
        ({"restore_size": False}, "not put back into the source"),
        ({"height": 16}, "not put back into the source"),
        ({"output_type": "np"}, "not put back into the source"),
        ({"image": None, "task": "text-to-image"}, "`task` is 'text-to-image'"),
        ({"task": "canny"}, "`task` is 'canny'"),
    ],
)
def test_detail_that_cannot_be_kept_is_refused(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        edit(pipe, **{"image": draw_image(0, 36, 24), "detail": "source", **call})
