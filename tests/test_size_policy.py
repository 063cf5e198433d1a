"""`size_policy`: what a call returns where the model cannot work at the size that is asked for."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import STRIDE, build_pipeline, draw_image


pytestmark = pytest.mark.filterwarnings("ignore:The center crop cuts")
PROMPT = "make the red circle blue"
# The model of `tiny` works at up to 16×16 pixels, in steps of 4: height and width asked for, and those it works at.
SIZES = {
    (1024, 1024): (16, 16),
    (48, 96): (8, 16),
    (24, 40): (8, 16),
    (18, 10): (16, 8),
    (9, 13): (8, 12),
    (1, 1): (4, 4),
    (90, 9): (16, 4),
}


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


def edit(pipe, **call):
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), **call)


def resize_by_hand(image, height, width, resize_mode):
    """Resize an image to a size, as the published code does for `crop`."""
    if resize_mode == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    scale = max(height / image.height, width / image.width)
    resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    return resized.crop((left, top, left + width, top + height))


def draw_mask():
    mask = Image.new("L", (40, 24))
    mask.paste(255, (20, 8, 26, 14))
    return mask


@pytest.mark.parametrize("resize_mode", ["crop", "stretch"])
@pytest.mark.parametrize("asked", SIZES)
def test_fit_edits_the_resized_source_at_the_nearest_size_and_resizes_the_result(pipe, asked, resize_mode):
    image, (height, width) = draw_image(0, 40, 24), SIZES[asked]
    fitted = edit(pipe, image=image, height=asked[0], width=asked[1], size_policy="fit", resize_mode=resize_mode)
    resized = resize_by_hand(image, *asked, resize_mode)
    by_hand = edit(pipe, image=resized, height=height, width=width, resize_mode="stretch", restore_size=True)
    assert fitted.image_tokens.shape == (1, height * width // STRIDE**2)
    assert torch.equal(fitted.image_tokens, by_hand.image_tokens)
    assert fitted.images[0].size == asked[::-1]
    assert np.array_equal(fitted.images[0], by_hand.images[0])


# The white area of `draw_mask` where its source has 64×64 pixels: after the crop, it reaches into another token.
@pytest.mark.parametrize(("resize_mode", "box"), [("crop", (33, 22, 49, 37)), ("stretch", (33, 22, 41, 37))])
def test_fit_resizes_the_mask_like_the_source_and_keeps_the_rest_of_the_resized_source(pipe, resize_mode, box):
    image = draw_image(0, 40, 24)
    call = {"height": 64, "width": 64, "size_policy": "fit", "resize_mode": resize_mode}
    fitted = edit(pipe, image=image, mask_image=draw_mask(), **call)
    resized, mask = resize_by_hand(image, 64, 64, resize_mode), Image.new("L", (64, 64))
    mask.paste(255, box)
    call = {"height": 16, "width": 16, "resize_mode": "stretch", "restore_size": True}
    by_hand = edit(pipe, image=resized, mask_image=mask, **call)
    assert torch.equal(fitted.image_tokens, by_hand.image_tokens)
    assert np.array_equal(fitted.images[0], by_hand.images[0])
    # A token is 16 pixels of the result, and the feather ends one token beyond the white ones.
    kept = np.s_[:, :16]
    assert np.array_equal(np.asarray(fitted.images[0])[kept], np.asarray(resized)[kept])
    assert not np.array_equal(fitted.images[0], resized)


def test_a_size_that_the_model_can_work_at_is_the_same_with_either_policy(pipe):
    for call in ({}, {"height": 8}, {"height": 8, "width": 12}, {"mask_image": draw_mask(), "width": 8}):
        strict, fit = (edit(pipe, image=draw_image(0, 40, 24), size_policy=of, **call) for of in ("strict", "fit"))
        assert np.array_equal(strict.images[0], fit.images[0])


def test_all_output_types_hold_the_same_result(pipe):
    call = {"image": [draw_image(0), draw_image(1, 40, 24)], "height": 30, "width": 50, "size_policy": "fit"}
    outputs = {kind: edit(pipe, output_type=kind, **call) for kind in ("pil", "np", "pt", "tokens")}
    pixels = np.stack([np.asarray(image) for image in outputs["pil"].images])
    assert pixels.shape == (2, 30, 50, 3)
    assert outputs["np"].images.dtype == np.float32
    assert np.array_equal(np.round(outputs["np"].images * 255), pixels)
    assert outputs["pt"].images.dtype == torch.float32
    assert np.array_equal(outputs["pt"].images.permute(0, 2, 3, 1), outputs["np"].images)
    assert all(torch.equal(output.image_tokens, outputs["tokens"].images) for output in outputs.values())


def test_an_image_from_text_is_resized_from_the_nearest_size(pipe):
    call = {"task": "text-to-image"}
    fitted = edit(pipe, height=20, width=60, size_policy="fit", **call)
    small = edit(pipe, height=4, width=16, **call)
    assert torch.equal(fitted.image_tokens, small.image_tokens)
    assert np.array_equal(fitted.images[0], small.images[0].resize((60, 20), Image.Resampling.LANCZOS))


def test_tokens_of_a_fitted_result_are_the_source_of_the_next_call(pipe):
    asked = {"height": 48, "width": 96, "size_policy": "fit"}
    first = edit(pipe, image=draw_image(0, 40, 24), **asked)
    mask = Image.new("L", (96, 48))
    mask.paste(255, (72, 0, 96, 48))
    second = edit(pipe, source_image_tokens=first.image_tokens, mask_image=mask, **asked)
    kept = np.s_[:, :48]
    assert second.images[0].size == (96, 48)
    tokens = first.image_tokens.unflatten(1, (2, 4)), second.image_tokens.unflatten(1, (2, 4))
    assert torch.equal(tokens[0][:, :, :3], tokens[1][:, :, :3])
    shown = pipe.decode_image_tokens(first.image_tokens, 8, 16)[0].resize((96, 48))
    assert np.array_equal(np.asarray(second.images[0])[kept], np.asarray(shown)[kept])


@pytest.mark.parametrize("how", [{"restore_size": True}, {"mask_image": draw_mask(), "crop_to_mask": True}])
def test_a_result_that_goes_back_into_its_source_has_the_size_of_the_source(pipe, how):
    image = draw_image(0, 40, 24)
    fitted = edit(pipe, image=image, height=100, width=100, size_policy="fit", **how)
    strict = edit(pipe, image=image, height=16, width=16, **how)
    assert np.array_equal(fitted.images[0], strict.images[0])
    assert fitted.images[0].size == image.size


def test_previews_have_the_size_that_is_asked_for(pipe):
    previews = []
    edit(
        pipe,
        image=draw_image(0),
        height=48,
        width=96,
        size_policy="fit",
        preview_every=1,
        callback_on_step_end=lambda pipe, step, _, tensors: previews.extend(tensors.get("preview", [])),
    )
    assert [preview.size for preview in previews] == [(96, 48)] * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": 1024}, "`height` is 1024; pass a multiple of 4 from 4 to 16"),
        ({"width": 15}, "`width` is 15; pass a multiple of 4 from 4 to 16"),
        ({"height": 0, "size_policy": "fit"}, "`height` is 0; pass an integer from 1 to 16384"),
        ({"width": 10**12, "size_policy": "fit"}, "`width` is 1000000000000; pass an integer from 1 to 16384"),
        ({"width": 20.0, "size_policy": "fit"}, "`width` is 20.0; pass an integer"),
        ({"size_policy": "loose"}, "`size_policy` is 'loose'; choose one of 'strict', 'fit'"),
    ],
)
def test_a_size_or_policy_that_cannot_be_is_refused(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        edit(pipe, image=draw_image(0), **call)
