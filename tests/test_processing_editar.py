"""Pictures and prompts become tensors, and tensors pictures, as the published pipeline does it."""

import io
import struct
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from transformers import AutoImageProcessor, AutoProcessor

from editar_hf import EditARImageProcessor, EditARProcessor
from editar_hf.image_processing_editar import compute_crop_geometry, prepare_rgb_image
from editar_hf.processing_editar import apply_task_prefix
from editar_hf.training.tokenizer import train_tokenizer


ORIENTATION = 0x0112  # EXIF tag


def draw_picture(height, width, channels=3, seed=0):
    """Draw smooth random colors with some noise, so that a wrong offset or filter shows."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = (pixels + generator.integers(-20, 21, (height, width, 3))).clip(0, 255).astype(np.uint8)
    if channels == 4:
        return Image.fromarray(np.dstack([noisy, generator.integers(0, 256, (height, width), dtype=np.uint8)]))
    return Image.fromarray(noisy)


def prepare_plainly(picture, height, width, is_stretched=False):
    """The published preparation (resize to cover with Lanczos, center crop, to [−1, 1]), or a plain resize."""
    scale = max(height / picture.height, width / picture.width)
    size = (width, height) if is_stretched else tuple(round(side * scale) for side in picture.size)
    pixels = np.asarray(picture.resize(size, Image.LANCZOS)).astype(np.float64)
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width].transpose(2, 0, 1) / 127.5 - 1


@pytest.fixture(scope="module")
def tokenizer():
    prompts = ["make the red circle blue", "remove the green star", "a photograph of a lake"] * 20
    return train_tokenizer(prompts, vocab_size=200)


@pytest.fixture
def processor(tokenizer):
    return EditARProcessor(EditARImageProcessor(size=32, stride=16), tokenizer, num_text_tokens=12)


# Pictures in


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 73), (97, 61), (20, 30), (64, 65), (40, 100), (100, 40)])
@pytest.mark.parametrize("size", [(48, 48), (32, 64)])
@pytest.mark.parametrize("resize_mode", ["crop", "stretch"])
@pytest.mark.filterwarnings("ignore:The center crop cuts")
def test_pixels_are_those_of_the_published_preparation_or_of_a_plain_resize(height, width, size, resize_mode):
    picture = draw_picture(height, width)
    pixel_values = EditARImageProcessor(size=size, resize_mode=resize_mode)(picture).pixel_values
    assert pixel_values.dtype == torch.float32
    expected = prepare_plainly(picture, *size, is_stretched=resize_mode == "stretch")
    np.testing.assert_allclose(pixel_values[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16, :16], upright[:16, 16:], upright[16:, :16] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    # What a camera held in each way stores, so that turning it upright gives `upright`. Source: EXIF 2.32, tag 0x0112.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(stored)).save(file, "PNG", exif=exif)
    image_processor = EditARImageProcessor(size=32)
    picture = image_processor.postprocess(image_processor(Image.open(file)).pixel_values)[0]
    np.testing.assert_array_equal(np.asarray(picture), upright)


def test_transparency_is_composited_over_white():
    picture = draw_picture(32, 32, channels=4)
    pixels = np.asarray(picture).astype(float)
    expected = pixels[..., :3] * pixels[..., 3:] / 255 + 255 - pixels[..., 3:]
    for image in (picture, np.asarray(picture), torch.from_numpy(np.array(picture)).permute(2, 0, 1)):
        assert np.abs(np.asarray(prepare_rgb_image(image)) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["P", "LA", "RGB"])
def test_a_fully_transparent_pixel_is_white_in_every_mode_with_transparency(mode):
    values = {"P": [0, 1], "LA": [(99, 0), (50, 255)], "RGB": [(1, 2, 3), (50, 50, 50)]}[mode]
    picture = Image.new(mode, (2, 1))
    if mode == "P":
        picture.putpalette([10, 20, 30, 50, 50, 50])
    picture.putdata(values)
    picture.info["transparency"] = {"P": 0, "LA": None, "RGB": (1, 2, 3)}[mode]
    prepared = prepare_rgb_image(picture)
    assert [prepared.getpixel((column, 0)) for column in (0, 1)] == [(255,) * 3, (50,) * 3]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (1, 1), 77), 77),
        (Image.new("1", (1, 1), 1), 255),
        (Image.new("I;16", (1, 1), 65535), 255),
        (Image.new("I;16", (1, 1), 257 * 100 + 128), 100),
        (Image.new("I;16", (1, 1), 257 * 100 + 129), 101),
        (Image.new("I", (1, 1), 257 * 30), 30),
        (Image.new("F", (1, 1), 0.2), 51),
        (np.full((1, 1), 9, np.uint8), 9),
        (np.ones((1, 1), bool), 255),
        (np.full((1, 1, 1), 257 * 9, np.uint16), 9),
        (np.full((1, 1), 257 * 9, ">u2"), 9),
        (np.full((1, 1, 3), 0.4999 / 255, np.float64), 0),
        (np.full((1, 1, 3), 0.5001 / 255, np.float64), 1),
        (torch.full((1, 1, 1), 0.2, dtype=torch.bfloat16), 51),
        (torch.full((3, 1, 1), 0.2, requires_grad=True), 51),
    ],
)
def test_every_kind_of_pixel_becomes_the_nearest_8_bit_rgb(image, expected):
    assert prepare_rgb_image(image).getpixel((0, 0)) == (expected,) * 3


def test_the_same_picture_gives_the_same_pixels_as_pil_array_tensor_batch_and_list():
    picture = draw_picture(32, 48)
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    image_processor = EditARImageProcessor(size=(32, 48))
    expected = image_processor(picture).pixel_values
    for image in (array, array / 255, array.astype(np.float32) / 255, tensor, tensor / 255, array[None], tensor[None]):
        assert torch.equal(image_processor(image).pixel_values, expected)
    mixed = [picture, array, tensor[None], tensor / 255]
    assert torch.equal(image_processor(mixed).pixel_values, expected.expand(4, -1, -1, -1))


def test_a_large_cut_warns_once_for_a_line_and_a_small_one_not_at_all():
    image_processor = EditARImageProcessor(size=96)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        image_processor(draw_picture(200, 203))  # resized to 96×97: 1 % is cut
        image_processor(draw_picture(100, 140), resize_mode="stretch")
        assert not caught
        for images in (draw_picture(200, 207), [draw_picture(100, 140), draw_picture(160, 100)]):
            image_processor(images)  # The first one is resized to 96×99: 3 % is cut.
            assert len(caught) == 1
        assert caught[0].filename == __file__
        assert "2%" in str(caught[0].message)


# Pictures out


def test_all_256_values_survive_the_round_trip():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image_processor = EditARImageProcessor(size=16)
    pixel_values = image_processor(values).pixel_values
    assert (pixel_values.min(), pixel_values.max()) == (-1, 1)
    np.testing.assert_array_equal(np.asarray(image_processor.postprocess(pixel_values)[0])[..., 0], values)
    for output_type in ("np", "pt"):
        assert torch.equal(
            image_processor(image_processor.postprocess(pixel_values, output_type)).pixel_values, pixel_values
        )


def test_output_types_have_their_layout_and_range_and_round_to_the_nearest_value():
    image_processor = EditARImageProcessor()
    pixel_values = torch.linspace(-1.5, 1.5, 2 * 3 * 4 * 8).reshape(2, 3, 4, 8).bfloat16()
    expected = (pixel_values.float().clamp(-1, 1) + 1) / 2
    tensor = image_processor.postprocess(pixel_values, "pt")
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor, expected)
    expected = expected.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(image_processor.postprocess(pixel_values, "np"), expected, atol=1e-6)
    pictures = [np.asarray(picture) for picture in image_processor.postprocess(pixel_values)]
    np.testing.assert_allclose(pictures, expected * 255, atol=0.51)


# Back to the source's size


@pytest.mark.parametrize(("height", "width"), [(120, 200), (201, 119), (40, 61), (64, 64)])
def test_restore_puts_the_square_back_and_leaves_the_rest_bit_identical(height, width):
    source = draw_picture(height, width)
    restored = EditARImageProcessor(size=64).restore(Image.new("RGB", (64, 64), "red"), source)
    left, top, right, bottom = compute_crop_geometry(height, width, 64, 64).box
    assert restored.size == source.size
    inside = np.zeros((height, width), bool)
    inside[top:bottom, left:right] = True
    pixels = np.asarray(restored)
    assert (pixels[inside] == (255, 0, 0)).all()
    np.testing.assert_array_equal(pixels[~inside], np.asarray(source)[~inside])


@pytest.mark.parametrize(("height", "width"), [(120, 200), (201, 119), (40, 61), (64, 64)])
def test_the_box_is_the_pixels_wholly_inside_the_crop(height, width):
    crop = compute_crop_geometry(height, width, 64, 32)
    left, top, right, bottom = crop.box
    columns = [x for x in range(width) if crop.left <= x * crop.resized_width / width + 1e-9]
    columns = [x for x in columns if (x + 1) * crop.resized_width / width <= crop.left + 32 + 1e-9]
    rows = [y for y in range(height) if crop.top <= y * crop.resized_height / height + 1e-9]
    rows = [y for y in rows if (y + 1) * crop.resized_height / height <= crop.top + 64 + 1e-9]
    assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == (left, top, right, bottom)


@pytest.mark.parametrize("resize_mode", ["crop", "stretch"])
@pytest.mark.filterwarnings("ignore:The center crop cuts")
def test_restoring_an_unedited_picture_gives_the_source_in_place(resize_mode):
    # Smooth, so that scaling down and up loses little, and steep, so that a shift of half a pixel would show.
    row, column = np.mgrid[0:90, 0:151]
    source = np.stack([column * 255 / 150, row * 255 / 89, 127 + 90 * np.sin(column / 9)], axis=-1)
    source = Image.fromarray(np.round(source).astype(np.uint8))
    image_processor = EditARImageProcessor(size=128, resize_mode=resize_mode)
    unedited = image_processor.postprocess(image_processor(source).pixel_values)[0]
    restored = image_processor.restore(unedited, source)
    assert np.abs(np.asarray(restored).astype(int) - np.asarray(source)).max() <= 2


def test_restore_turns_the_source_upright_and_its_transparency_white():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGBA", (60, 40), (255, 0, 0, 0)).save(file, "PNG", exif=exif)
    restored = EditARImageProcessor(size=32).restore(Image.new("RGB", (32, 32)), Image.open(file))
    assert restored.size == (40, 60)
    assert restored.getpixel((0, 0)) == (255, 255, 255)
    assert restored.getpixel((20, 30)) == (0, 0, 0)


# Prompts


def test_task_prefixes_are_the_published_ones():
    description = ", generate an image following the description: a lake"
    assert apply_task_prefix("a lake") == "a lake"
    assert apply_task_prefix("a lake", "canny") == "Given the canny edge image" + description
    assert apply_task_prefix("a lake", "depth") == "Given the depth image" + description
    assert apply_task_prefix("a lake", "segmentation") == "Given the segmentation mask" + description


def test_texts_and_tasks_pair_up():
    assert apply_task_prefix(["x", "y"], "edit") == ["x", "y"]
    assert apply_task_prefix(("x", "y"), ["edit", "depth"]) == ["x", apply_task_prefix("y", "depth")]
    assert apply_task_prefix("x", ["edit", "depth"]) == ["x", apply_task_prefix("x", "depth")]


def test_prompts_are_padded_on_the_right_and_end_with_the_end_token(processor, tokenizer):
    inputs = processor(text=["make the red circle blue", ""])
    words = tokenizer.convert_tokens_to_ids(["▁make", "▁the", "▁red", "▁circle", "▁blue"])
    assert inputs.input_ids.tolist() == [[*words, 1] + [0] * 6, [1] + [0] * 11]
    assert inputs.attention_mask.tolist() == [[1] * 6 + [0] * 6, [1] + [0] * 11]


def test_a_long_prompt_is_cut_with_a_warning_that_says_what_was_lost(processor, tokenizer):
    kept = " make  the red circle blue make the red circle blue make"
    with pytest.warns(UserWarning, match=r"longer than 12 tokens.*'the green star'"):
        inputs = processor(text=["blue", kept + " the green star"])
    words = kept.split()
    assert inputs.input_ids[1].tolist() == [*tokenizer.convert_tokens_to_ids(["▁" + word for word in words]), 1]
    assert inputs.attention_mask[1].all()


def test_a_prompt_that_just_fits_does_not_warn(processor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = processor(text="make the red circle blue make the red circle blue make  ")
    assert inputs.attention_mask.all()


# Together


def test_processor_prepares_source_target_and_prompt_for_training(processor):
    source, target = draw_picture(40, 40, seed=1), draw_picture(40, 40, seed=2)
    inputs = processor(images=[source, target], text=["x", "y"], target_images=[target, source])
    assert sorted(inputs) == ["attention_mask", "input_ids", "source_pixel_values", "target_pixel_values"]
    assert inputs.source_pixel_values.shape == (2, 3, 32, 32)
    assert torch.equal(inputs.source_pixel_values.flip(0), inputs.target_pixel_values)
    assert set(inputs) <= set(processor.model_input_names)


def test_processor_takes_size_and_mode_per_call(processor):
    picture = draw_picture(40, 90)
    inputs = processor(images=picture, target_images=picture, height=48, resize_mode="stretch")
    expected = prepare_plainly(picture, 48, 32, is_stretched=True)
    np.testing.assert_allclose(inputs.source_pixel_values[0].numpy(), expected, atol=1e-6)
    assert torch.equal(inputs.source_pixel_values, inputs.target_pixel_values)


def test_processor_returns_only_what_was_asked_for_and_numpy_on_request(processor):
    assert sorted(processor(text="x")) == ["attention_mask", "input_ids"]
    inputs = processor(images=draw_picture(32, 32), return_tensors="np")
    assert list(inputs) == ["source_pixel_values"]
    assert isinstance(inputs.source_pixel_values, np.ndarray)


def test_processor_survives_saving_and_loading(tmp_path, tokenizer):
    image_processor = EditARImageProcessor(size=(24, 40), stride=8, resize_mode="stretch")
    processor = EditARProcessor(image_processor, tokenizer, num_text_tokens=99)
    processor.save_pretrained(tmp_path)
    picture = draw_picture(30, 90)
    expected = processor(images=picture, text="make the red circle blue", task="depth")
    for loader in (EditARProcessor, AutoProcessor):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is EditARProcessor
        assert loaded.num_text_tokens == 99
        assert loaded.image_processor.stride == 8
        inputs = loaded(images=picture, text="make the red circle blue", task="depth")
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is EditARImageProcessor


# Files


def test_paths_and_urls_are_opened(tmp_path):
    path = tmp_path / "scene.png"
    draw_picture(32, 32).save(path)
    expected = EditARImageProcessor(size=32)(draw_picture(32, 32)).pixel_values
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_port}/{name}" for name in ("scene.png", "gone.png")]
        pixel_values = EditARImageProcessor(size=32)([path, str(path), urls[0]]).pixel_values
        with pytest.raises(ValueError, match=r"`images` is 'http://127.*gone.png', which does not open as an image"):
            EditARImageProcessor(size=32)(urls[1])
        server.shutdown()
    assert torch.equal(pixel_values, expected.expand(3, -1, -1, -1))


def test_pixels_are_taken_as_they_lie_where_the_exif_block_is_damaged(tmp_path):
    # Turned, and a horizontal resolution of -1/0, which cannot be written again.
    tags = struct.pack("<HHHIHHHHIII", 2, 0x112, 3, 1, 6, 0, 0x11A, 10, 1, 38, 0) + struct.pack("<ii", -1, 0)
    path = tmp_path / "scene.png"
    picture = draw_picture(32, 48)
    picture.save(path, exif=b"Exif\0\0II*\0\x08\0\0\0" + tags)
    with pytest.warns(UserWarning, match=r"The EXIF block of .*scene.png' in `images` is damaged") as record:
        upright = prepare_rgb_image(path)
    assert record[0].filename == __file__
    assert np.array_equal(np.asarray(upright), np.asarray(picture))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "CMYK"])
def test_a_result_carries_the_color_profile_of_an_rgb_source_and_no_other(mode):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    space = {"L": b"GRAY", "CMYK": b"CMYK"}.get(mode, b"RGB ")
    source = draw_picture(32, 32).convert(mode)
    source.info["icc_profile"] = profile[:16] + space + profile[20:]
    restored = EditARImageProcessor(size=32).restore(Image.new("RGB", (32, 32)), source, "stretch")
    assert restored.info.get("icc_profile") == (profile if space == b"RGB " else None)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_a_truncated_file_is_refused_by_name(tmp_path, file_format):
    path = tmp_path / f"scene.{file_format.lower()}"
    draw_picture(200, 200).save(path, file_format)
    path.write_bytes(path.read_bytes()[:3000])
    with Image.open(path) as picture, pytest.raises(ValueError, match=r"`images`.*scene.*does not decode"):
        EditARImageProcessor(size=32)(picture)


# Bad input


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("no-such-scene.png", "'no-such-scene.png', which does not open as an image"),
        (5, "holds a int, not an image; pass a PIL image, .* a path or a URL"),
        ([], "`images` is an empty list"),
        (torch.zeros(8, 8, 3), r"shape \(8, 3, 8\).*channels, height, width"),
        (np.zeros((0, 8, 3), np.uint8), "at least one pixel"),
        (Image.new("RGB", (0, 4)), "0×4 pixels"),
        (np.zeros((8, 8, 3), np.int64), "int64"),
        (np.full((8, 8, 3), 255.0), r"scale them to \[0, 1\]"),
        (torch.full((3, 8, 8), -1.0), r"scale them to \[0, 1\]"),
        (np.full((8, 8, 3), np.nan), r"scale them to \[0, 1\]"),
        (Image.new("RGB", (1, 1000)), r'1×1000 pixels.*resize_mode="stretch"'),
    ],
)
def test_what_is_not_a_picture_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        EditARImageProcessor(size=32)(image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 30}, "`height` is 30.*16"),
        ({"width": 0}, "`width` is 0"),
        ({"resize_mode": "pad"}, "`resize_mode` is 'pad'.*'crop', 'stretch'"),
        ({"task": "sketch"}, "`task` is 'sketch'.*'edit', 'canny', 'depth', 'segmentation'"),
        ({"text": ["x", "y"], "task": ["edit"] * 3}, "`task` has 3 entries for 2 texts"),
        ({"text": ["x", 3]}, "`text` is"),
        ({"text": []}, "`text` is"),
        ({"images": None, "text": None}, "`images`, `text` and `target_images`"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**{"images": draw_picture(32, 32), "text": "x", **arguments})


def test_pixels_that_overflowed_and_an_unknown_output_type_are_refused(processor):
    with pytest.raises(ValueError, match="`output_type` is 'tokens'"):
        processor.postprocess(torch.zeros(1, 3, 2, 2), "tokens")
    with pytest.raises(RuntimeError, match=r"`pixel_values` holds NaN.*float16"):
        processor.postprocess(torch.full((1, 3, 2, 2), torch.nan))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 100}, "`height` is 100"),
        ({"size": {"shortest_edge": 32}}, "`height` is None"),
        ({"size": 32, "stride": 64}, "`height` is 32; pass a multiple of 64"),
        ({"resize_mode": "fit"}, "`resize_mode` is 'fit'"),
    ],
)
def test_an_image_processor_that_cannot_work_is_not_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        EditARImageProcessor(**arguments)


def test_a_processor_without_text_tokens_is_not_built(tokenizer):
    with pytest.raises(ValueError, match="`num_text_tokens` is 0"):
        EditARProcessor(EditARImageProcessor(), tokenizer, num_text_tokens=0)
