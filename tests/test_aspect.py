"""`aspect="source"`: the model works at the proportions of the image."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import STRIDE, build_pipeline, draw_image

from editar_hf import EditARImageProcessor, EditARPipeline


pytestmark = pytest.mark.filterwarnings("ignore:The center crop cuts", "ignore:A prompt is longer")
PROMPT = "make the red circle blue"
# Width and height of images, and the rows and columns of tokens that the model of `tiny` (at most 4×4) edits them at.
GRIDS = {(40, 40): (4, 4), (36, 24): (3, 4), (24, 36): (4, 3), (80, 40): (2, 4), (7, 12): (4, 2), (90, 9): (2, 4)}


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


def edit(pipe, **call):
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), **call)


@pytest.mark.parametrize("size", GRIDS)
@pytest.mark.filterwarnings("ignore:An image of 90×9 pixels")
def test_the_whole_image_is_edited_at_the_grid_of_its_proportions(pipe, size):
    image, (rows, columns) = draw_image(0, *size), GRIDS[size]
    output = edit(pipe, image=image, aspect="source")
    resized = image.resize((columns * STRIDE, rows * STRIDE), Image.Resampling.LANCZOS)
    by_hand = edit(pipe, image=resized, height=rows * STRIDE, width=columns * STRIDE, resize_mode="stretch")
    assert torch.equal(output.image_tokens, by_hand.image_tokens)
    assert np.array_equal(output.images[0], by_hand.images[0].resize(size, Image.Resampling.LANCZOS))


def test_no_other_grid_is_nearer_to_the_proportions(pipe):
    for width, height in np.random.default_rng(0).integers(16, 33, (50, 2)).tolist():
        rows, columns = np.divide(pipe.choose_size([Image.new("RGB", (width, height))]), STRIDE)
        others = [(4, 2), (4, 3), (4, 4), (3, 4), (2, 4)]
        change = [abs(math.log(other[1] / other[0]) - math.log(width / height)) for other in [(rows, columns), *others]]
        assert change[0] == min(change)


@pytest.mark.filterwarnings("error")
def test_a_warning_tells_of_an_image_that_is_much_longer_than_any_grid(pipe):
    assert pipe.choose_size([Image.new("RGB", (24, 10))]) == (8, 16)
    for size, proportions in ((26, 10), "4:2"), ((10, 26), "2:4"):
        with pytest.warns(UserWarning, match=f"{size[0]}×{size[1]} pixels is edited at the proportions {proportions}"):
            pipe.choose_size([Image.new("RGB", size)])


def test_the_size_of_a_turned_photograph_is_that_of_its_tokens(pipe, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned by 90°.
    path = tmp_path / "turned.png"
    draw_image(0, 36, 24).save(path, exif=exif)
    photo = Image.open(path)
    assert pipe.prepare_source_cache(photo, aspect="source").pixel_values.shape == (1, 3, 16, 12)
    for image in (photo, [photo], path, str(path), torch.zeros(2, 3, 36, 24)):
        assert pipe.choose_size(image) == (16, 12)
    output = edit(pipe, image=photo, aspect="source")
    (decoded,) = pipe.decode_image_tokens(output.image_tokens, *pipe.choose_size(photo))
    assert np.array_equal(output.images[0], decoded.resize((24, 36), Image.Resampling.LANCZOS))


def test_a_condition_map_gives_an_image_of_its_size(pipe):
    assert edit(pipe, image=draw_image(0, 36, 24), task="canny", aspect="source").images[0].size == (36, 24)


def test_tokens_of_another_size_are_refused_with_the_size_that_is_missing(pipe):
    tokens, how = pipe.encode_image(draw_image(0, 36, 24), aspect="source"), {"height": 12, "width": 16}
    for call in (
        lambda **size: edit(pipe, source_image_tokens=tokens, **size),
        lambda **size: pipe.decode_image_tokens(tokens, **size),
    ):
        with pytest.raises(
            ValueError, match=r"has shape \(1, 12\), but an image of 16×16 pixels has 16 tokens; pass the"
        ):
            call()
        assert call(**how)


def test_a_resize_mode_that_is_given_wins(pipe):
    image = draw_image(0, 36, 24)
    cropped = edit(pipe, image=image, aspect="source", resize_mode="crop")
    by_hand = edit(pipe, image=image, height=12, width=16, resize_mode="crop", restore_size=True)
    assert torch.equal(cropped.image_tokens, by_hand.image_tokens)
    assert np.array_equal(cropped.images[0], by_hand.images[0])


def test_pixels_outside_the_mask_stay(pipe):
    image, mask = draw_image(0, 72, 48), Image.new("L", (72, 48))
    mask.paste(255, (0, 0, 18, 16))  # one token of 3×4
    output = edit(pipe, image=image, mask_image=mask, aspect="source")
    assert output.num_decode_steps < 12
    assert np.array_equal(np.asarray(output.images[0])[32:], np.asarray(image)[32:])
    assert not np.array_equal(output.images[0], image)


def test_crop_to_mask_takes_a_window_of_the_proportions(pipe):
    image, mask = draw_image(0, 144, 96), Image.new("L", (144, 96))
    mask.paste(255, (60, 40, 70, 50))
    output = edit(pipe, image=image, mask_image=mask, crop_to_mask=True, aspect="source")
    assert output.images[0].size == (144, 96)
    assert output.image_tokens.shape == (1, 12)


def test_a_session_and_a_cache_have_the_grid_of_the_image(pipe):
    image = draw_image(0, 36, 24)
    first = edit(pipe, image=image, aspect="source")
    tokens = pipe.encode_image(image, aspect="source")
    cached = edit(
        pipe,
        image=image,
        source_cache=pipe.prepare_source_cache(image, aspect="source"),
        restore_size=True,
        aspect="source",
    )
    assert tokens.shape == first.image_tokens.shape == (1, 12)
    assert torch.equal(cached.image_tokens, first.image_tokens)
    assert np.array_equal(cached.images[0], first.images[0])
    second = edit(
        pipe, image=first.images[0], source_image_tokens=first.image_tokens, restore_size=True, aspect="source"
    )
    assert second.images[0].size == (36, 24)
    assert pipe.compute_edit_map(image, PROMPT, aspect="source").shape == (1, 3, 4)


def test_images_of_one_grid_share_a_call_and_others_do_not(pipe):
    wide, wider, tall = draw_image(0, 36, 24), draw_image(1, 44, 33), draw_image(2, 24, 36)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    output = pipe(PROMPT, image=[wide, wider], generator=generators, aspect="source")
    assert [image.size for image in output.images] == [(36, 24), (44, 33)]
    with pytest.raises(ValueError, match=r"`aspect` is 'source', but the images .* need 16×12, 12×16 pixels"):
        pipe(PROMPT, image=[wide, tall], aspect="source")


def test_a_model_has_an_aspect_of_its_own_which_every_call_can_overrule(pipe, tmp_path):
    image = draw_image(0, 36, 24)
    own = build_pipeline()
    own.processor.image_processor.aspect = "source"
    own.save_pretrained(tmp_path)
    own = EditARPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    explicit = edit(pipe, image=image, aspect="source")
    assert torch.equal(edit(own, image=image).image_tokens, explicit.image_tokens)
    assert np.array_equal(edit(own, image=image).images[0], explicit.images[0])
    cache = own.prepare_source_cache(image)
    for call in ({"source_cache": cache}, {"source_cache": cache, "image": image, "restore_size": True}):
        assert torch.equal(edit(own, **call).image_tokens, explicit.image_tokens)
    for call in ({"aspect": "model"}, {"height": 16}, {"task": "text-to-image", "image": None}):
        call = {"image": image, **call}
        assert torch.equal(edit(own, **call).image_tokens, edit(pipe, **call).image_tokens)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"aspect": "square"}, "`aspect` is 'square'"),
        ({"aspect": "source", "height": 16}, "`height` is 16 and `width` is None"),
        ({"aspect": "source", "image": None, "task": "text-to-image"}, "there is no `image`; leave `aspect` out"),
    ],
)
def test_bad_aspects_are_refused(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, **{"image": draw_image(0, 36, 24), **call})


@pytest.mark.parametrize("name", ["aspect", "resize_mode"])
def test_an_unknown_setting_of_a_model_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` is 'square'"):
        EditARImageProcessor(**{name: "square"})
    pipe = build_pipeline()
    setattr(pipe.processor.image_processor, name, "square")
    with pytest.raises(ValueError, match=f"`{name}` is 'square'"):
        edit(pipe, image=draw_image(0))
