"""What the pipeline promises of masks, sessions, kept sources, drafts, previews, windows and the edit map."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plain_decoding import compute_naive_logits
from tiny import STRIDE, build_pipeline, draw_image
from torch.testing import assert_close

from editar_hf import EditARVQConfig, EditARVQModel
from editar_hf.pipelines.callbacks import RowPreview
from editar_hf.pipelines.edit_region import compute_edit_mask


PROMPT = "make the red circle blue"
SIDE, NUM_TOKENS = 16, 16
STICKER_EDITOR = Path(__file__).parents[1] / "projects" / "stickers" / "sticker-editor"
pytestmark = pytest.mark.filterwarnings("ignore:The center crop cuts", "ignore:`image` is missing")


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_mask(*boxes, size=(SIDE, SIDE)):
    """White boxes (left, top, right, bottom) on black."""
    mask = Image.new("L", size)
    for box in boxes:
        mask.paste(255, box)
    return mask


MASK = draw_mask((5, 5, 7, 7), (8, 10, 9, 11))  # the tokens (1, 1) and (2, 2)
FREE = [5, 10]


def compute_distance(size, boxes):
    """Pixels from each pixel to the nearest box, along rows, columns or diagonals."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    distances = []
    for left, top, right, bottom in boxes:
        down = np.maximum(0, np.maximum(top - rows, rows - bottom + 1))
        across = np.maximum(0, np.maximum(left - columns, columns - right + 1))
        distances.append(np.maximum(down, across))
    return np.min(distances, axis=0)


def edit(pipe, image=None, **kwargs):
    image = draw_image(0) if image is None else image
    return pipe(PROMPT, image=image, **{"generator": seeded(), **kwargs})


# Masks


def test_tokens_outside_the_mask_are_the_sources_and_a_pass_is_run_for_each_inside(pipe):
    output = edit(pipe, mask_image=MASK)
    source, edit_mask = pipe.encode_image(draw_image(0)), torch.zeros(1, NUM_TOKENS, dtype=torch.bool)
    edit_mask[:, FREE] = True
    assert torch.equal(output.image_tokens[~edit_mask], source[~edit_mask])
    assert not torch.equal(output.image_tokens, source)
    assert output.num_decode_steps == len(FREE)
    how = {"edit_mask": edit_mask, "generator": seeded()}
    with torch.no_grad():
        assert torch.equal(output.image_tokens, pipe.transformer.generate(source, pipe.encode_prompt(PROMPT), **how))


def test_the_source_stays_beyond_the_feather_and_the_result_shows_inside(pipe):
    output = edit(pipe, mask_image=MASK, output_type="np")
    pixels, source = output.images[0], np.asarray(draw_image(0)) / 255
    distance = compute_distance((SIDE, SIDE), [(4, 4, 8, 8), (8, 8, 12, 12)])
    assert np.allclose(pixels[distance >= STRIDE], source[distance >= STRIDE], atol=1e-6)
    drawn = pipe.decode_image_tokens(output.image_tokens, output_type="np")[0]
    assert np.allclose(pixels[distance == 0], drawn[distance == 0], atol=1e-6)
    assert (np.abs(pixels - source)[(distance > 0) & (distance < STRIDE)] > 0.001).any(), "there is a feather"


@pytest.mark.parametrize("resize_mode", ["crop", "stretch"])
@pytest.mark.parametrize("factor", [1, 3, 7.3, 0.6])
def test_no_pixel_beyond_the_feather_changes_at_the_size_of_the_source(pipe, resize_mode, factor):
    width, height = round(2 * SIDE * factor), round(SIDE * factor)
    image = draw_image(1, width, height)
    mask = draw_mask((width // 2, height // 2, width // 2 + 1, height // 2 + 1), size=image.size)
    output = edit(pipe, image, mask_image=mask, resize_mode=resize_mode, restore_size=True)
    changed = (np.asarray(output.images[0]) != np.asarray(image)).any(axis=2)
    assert output.images[0].size == image.size
    assert changed.any()
    # The free tokens and one more on each side, in pixels of the source.
    tokens = compute_edit_mask(np.asarray(mask) > 0, SIDE, SIDE, STRIDE, resize_mode).nonzero().numpy()
    scale = height / SIDE, (height if resize_mode == "crop" else width) / SIDE
    offset = 0, ((width - height) / 2 if resize_mode == "crop" else 0)
    first, last = (tokens.min(axis=0) - 1) * STRIDE * scale + offset, (tokens.max(axis=0) + 2) * STRIDE * scale + offset
    top, left = np.floor(first).astype(int).clip(0)
    bottom, right = np.ceil(last).astype(int)
    changed[top:bottom, left:right] = False
    assert not changed.any()


def test_without_blending_the_tokenizers_own_picture_comes_out(pipe):
    output = edit(pipe, mask_image=MASK, mask_blend=False, output_type="np")
    assert np.array_equal(output.images, pipe.decode_image_tokens(output.image_tokens, output_type="np"))


@pytest.mark.parametrize("mask_blend", [True, False])
@pytest.mark.parametrize("restore_size", [True, False])
def test_a_mask_without_white_returns_the_source_with_a_warning_at_the_call(pipe, mask_blend, restore_size):
    image = draw_image(0, 40, 40) if restore_size else draw_image(0)
    empty = draw_mask(size=image.size)
    with pytest.warns(UserWarning, match="`mask_image` has no white pixels") as record:
        output = edit(pipe, image, mask_image=empty, mask_blend=mask_blend, restore_size=restore_size)
    assert record[0].filename == __file__
    assert np.array_equal(np.asarray(output.images[0]), np.asarray(image))
    assert torch.equal(output.image_tokens, pipe.encode_image(image))
    assert output.num_decode_steps == 0


def test_an_empty_mask_leaves_the_other_images_of_a_batch_alone(pipe):
    with pytest.warns(UserWarning, match="no white pixels"):
        output = edit(pipe, mask_image=[draw_mask(), MASK], generator=[seeded(1), seeded(0)], mask_blend=False)
    assert np.array_equal(np.asarray(output.images[0]), np.asarray(draw_image(0)))
    assert np.array_equal(output.images[1], edit(pipe, mask_image=MASK, mask_blend=False).images[0])


def test_masks_pair_up_with_images_and_prompts(pipe):
    prompts, masks, images = [PROMPT, "remove it"], [MASK, draw_mask((0, 0, 16, 3))], [draw_image(0), draw_image(1)]
    generators = [seeded(seed) for seed in range(4)]
    output = pipe(prompts, image=images, mask_image=masks, num_images_per_prompt=2, generator=generators)
    for index in range(4):
        pair = index // 2
        alone = pipe(prompts[pair], image=images[pair], mask_image=masks[pair], generator=seeded(index))
        assert torch.equal(alone.image_tokens[0], output.image_tokens[index])
        assert np.array_equal(alone.images[0], output.images[index])
    many_images = pipe(PROMPT, image=images, mask_image=MASK, generator=[seeded(0), seeded(0)])
    many_masks = pipe(PROMPT, image=images[0], mask_image=masks, generator=[seeded(0), seeded(0)])
    assert torch.equal(many_images.image_tokens[0], many_masks.image_tokens[0])
    assert torch.equal(many_masks.image_tokens[1], edit(pipe, mask_image=masks[1]).image_tokens[0])


def test_a_masked_turn_of_a_session_is_laid_over_what_its_source_tokens_draw(pipe):
    tokens = pipe.encode_image(draw_image(0))
    output = pipe(PROMPT, source_image_tokens=tokens, mask_image=MASK, generator=seeded())
    before = np.asarray(pipe.decode_image_tokens(tokens)[0])
    distance = compute_distance((SIDE, SIDE), [(4, 4, 8, 8), (8, 8, 12, 12)])
    assert np.array_equal(np.asarray(output.images[0])[distance >= STRIDE], before[distance >= STRIDE])


def test_ten_masked_turns_keep_every_earlier_turn_and_what_no_mask_touched(pipe):
    photo = draw_image(0, 48, 48)
    first = tokens = pipe.encode_image(photo)
    picture, touched = photo, np.zeros((48, 48), bool)
    for turn in range(10):
        # One token of 12 pixels; the feather ends one further.
        row, column = divmod((3 * turn) % 8, 4)
        mask = draw_mask((12 * column, 12 * row, 12 * column + 6, 12 * row + 6), size=photo.size)
        how = {"mask_image": mask, "restore_size": True, "generator": seeded(turn)}
        output = pipe(PROMPT, image=picture, source_image_tokens=tokens, **how)
        token = (12 * column, 12 * row, 12 * column + 12, 12 * row + 12)
        distance = compute_distance(photo.size, [token])
        before, after = np.asarray(picture), np.asarray(output.images[0])
        assert np.array_equal(after[distance > 12], before[distance > 12])
        drawn = pipe.decode_image_tokens(output.image_tokens)[0].resize(photo.size, Image.Resampling.LANCZOS)
        # The feather is enlarged with the picture, and smooth: its first pixel lies within the token.
        inside = compute_distance(photo.size, [(token[0] + 2, token[1] + 2, token[2] - 2, token[3] - 2)]) == 0
        assert np.array_equal(after[inside], np.asarray(drawn)[inside])
        picture, tokens, touched = output.images[0], output.image_tokens, touched | (distance <= 12)
    assert torch.equal(tokens[:, 8:], first[:, 8:]), "the masks lie in the first two rows of tokens"
    assert 0.2 < touched.mean() < 0.9
    assert np.array_equal(np.asarray(picture)[~touched], np.asarray(photo)[~touched])
    assert (np.asarray(picture) != np.asarray(photo)).any(axis=2)[12:24, :36].mean() > 0.9


# Windows


def test_a_window_around_each_mask_is_edited_by_itself_and_put_back(pipe):
    image = draw_image(2, 100, 60)
    masks = [draw_mask((70, 10, 82, 16), size=image.size), draw_mask((5, 40, 10, 45), size=image.size)]
    how = {"crop_to_mask": True, "generator": [seeded(0), seeded(0)]}
    output = edit(pipe, image, mask_image=masks, **how)
    # Half as large again as the white, and at least as large as the model, around the middle of the white.
    for mask, window, result in zip(masks, [(67, 4, 85, 22), (0, 34, 16, 50)], output.images, strict=True):
        how = {"resize_mode": "stretch", "restore_size": True}
        inside = edit(pipe, image.crop(window), mask_image=mask.crop(window), **how).images[0]
        expected = image.copy()
        expected.paste(inside, window[:2])
        assert np.array_equal(result, expected)
        assert not np.array_equal(result, image)


# Kept sources


class NetworkRecorder:
    """Count the forwards of the tokenizer's encoder, and the source tokens that go through the decoder."""

    def __init__(self, pipe):
        self.num_encoded, self.num_source_tokens = 0, 0
        self.handles = [
            pipe.vq_model.encoder.register_forward_pre_hook(self.count_encoded),
            pipe.transformer.register_forward_pre_hook(self.count_source_tokens, with_kwargs=True),
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def count_encoded(self, module, args):
        self.num_encoded += 1

    def count_source_tokens(self, module, args, kwargs):
        self.num_source_tokens += kwargs["source_image_tokens"].numel() if "source_image_tokens" in kwargs else 0


@pytest.mark.parametrize(
    "arguments", [{}, {"mask_image": MASK}, {"decoding": "speculative"}], ids=["exact", "masked", "speculative"]
)
def test_a_source_cache_gives_the_same_images_without_the_sources_work(pipe, arguments):
    cache = pipe.prepare_source_cache(draw_image(0))
    expected = edit(pipe, restore_size=False, **arguments)
    with NetworkRecorder(pipe) as recorder:
        output = pipe(PROMPT, source_cache=cache, generator=seeded(), **arguments)
    assert torch.equal(output.image_tokens, expected.image_tokens)
    assert np.array_equal(np.asarray(output.images[0]), np.asarray(expected.images[0]))
    assert (recorder.num_encoded, recorder.num_source_tokens) == (0, 0)


@pytest.mark.parametrize("num_images", [1, 2])
def test_a_source_cache_serves_many_prompts_and_seeds_and_returns_into_its_images(pipe, num_images):
    images, prompts = [draw_image(0, 31, 20), draw_image(1, 17, 40)][:num_images], [PROMPT, "remove the green square"]
    how = {"image": images, "resize_mode": "stretch", "restore_size": True, "num_images_per_prompt": 2}
    generators = [[seeded(seed) for seed in range(4)] for _ in range(2)]
    cache = pipe.prepare_source_cache(images, resize_mode="stretch")
    output = pipe(prompts, source_cache=cache, generator=generators[0], **how)
    expected = pipe(prompts, generator=generators[1], **how)
    assert torch.equal(output.image_tokens, expected.image_tokens)
    for one, other in zip(output.images, expected.images, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_a_cache_of_one_image_serves_each_of_a_list_of_it(pipe):
    cache, generators = pipe.prepare_source_cache(draw_image(0)), [[seeded(0), seeded(1)] for _ in range(2)]
    images = [draw_image(0), draw_image(0)]
    output = pipe(PROMPT, image=images, source_cache=cache, restore_size=True, generator=generators[0])
    assert torch.equal(output.image_tokens, pipe(PROMPT, image=images, generator=generators[1]).image_tokens)


def test_a_cache_of_another_image_or_a_changed_decoder_is_refused():
    pipe = build_pipeline()
    cache = pipe.prepare_source_cache(draw_image(0))
    for image in (draw_image(1), [draw_image(0), draw_image(1)]):
        with pytest.raises(ValueError, match="`source_cache` is of another image than `image`"):
            edit(pipe, image, source_cache=cache, mask_image=MASK)
    with pytest.raises(ValueError, match="`source_cache` has a grid of 4 × 4"):
        edit(pipe, source_cache=cache, restore_size=True, height=8)
    coarse = copy.deepcopy(pipe)
    coarse.transformer.bfloat16()
    with pytest.raises(ValueError, match=r"`source_cache` is torch.float32 on cpu and the decoder is torch.bfloat16"):
        coarse(PROMPT, source_cache=cache)
    with torch.no_grad():
        pipe.transformer.model.layers[1].mlp.up_proj.weight[0] += 0.1
    with pytest.raises(ValueError, match="`source_cache` was prepared with another decoder, or before"):
        pipe(PROMPT, source_cache=cache)


def test_speculative_decoding_gives_the_same_image_in_fewer_passes(pipe):
    # Some drafts come true in this random model, without guidance.
    how = {"do_sample": False, "guidance_scale": 1}
    exact, speculative = (edit(pipe, decoding=decoding, **how) for decoding in ("exact", "speculative"))
    assert torch.equal(exact.image_tokens, speculative.image_tokens)
    assert speculative.num_decode_steps < exact.num_decode_steps == NUM_TOKENS - 1


# Steps and previews


def test_callback_gets_the_tensors_it_asks_for_and_cannot_change_the_result(pipe):
    source, seen = pipe.encode_image(draw_image(0)), []

    def erase(caller, step, timestep, tensors):
        assert caller is pipe
        assert step == timestep
        assert list(tensors) == ["image_tokens", "source_image_tokens"]
        assert torch.equal(tensors["source_image_tokens"], source)
        seen.append(tensors["image_tokens"].clone())
        tensors["image_tokens"].zero_()

    names = ["image_tokens", "source_image_tokens"]
    tokens = edit(pipe, callback_on_step_end=erase, callback_on_step_end_tensor_inputs=names).image_tokens
    assert torch.equal(tokens, edit(pipe).image_tokens)
    assert len(seen) == NUM_TOKENS
    assert all(torch.equal(one, tokens[:, : step + 1]) for step, one in enumerate(seen))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"image": None}, {"mask_image": MASK}, {"decoding": "speculative"}],
    ids=["image", "no image", "masked", "speculative"],
)
def test_an_interrupt_ends_a_call_within_a_pass_and_still_gives_an_image(pipe, arguments):
    """Whatever a pass brought, nothing more is run; what is missing is the source's, or that of a gray image."""
    steps = []

    def interrupt(pipe, step, timestep, tensors):
        steps.append(step)
        if step == 3:
            pipe.interrupt()

    arguments = {"prompt": PROMPT, "image": draw_image(0), **arguments}
    output = pipe(generator=seeded(), callback_on_step_end=interrupt, **arguments)
    assert steps == [0, 1, 2, 3]
    complete = pipe(generator=seeded(), **arguments)
    fill = pipe.encode_image(arguments["image"] or np.full((SIDE, SIDE, 3), 0.5))
    assert torch.equal(output.image_tokens, torch.cat([complete.image_tokens[:, :4], fill[:, 4:]], dim=1))
    assert output.images[0].size == (SIDE, SIDE)
    assert output.num_decode_steps <= 3


def collect_previews(pipe, **arguments):
    """Edit; the output, and the previews as arrays by step."""
    previews = {}

    def keep(pipe, step, timestep, tensors):
        if "preview" in tensors:
            previews[step] = [np.asarray(image) for image in tensors["preview"]]

    return edit(pipe, callback_on_step_end=keep, **arguments), previews


MASKED = {"mask_image": draw_mask((0, 0, 16, 12)), "mask_blend": False}


@pytest.mark.parametrize("arguments", [{}, MASKED], ids=["whole", "masked"])
def test_previews_turn_from_source_to_result_row_by_row(pipe, arguments):
    output, previews = collect_previews(pipe, preview_every=2, num_images_per_prompt=2, **arguments)
    assert list(previews) == [7, 15]
    half, whole = previews[7], previews[15]
    for index in range(2):
        assert np.array_equal(half[index][8:], np.asarray(draw_image(0))[8:]), "not decoded yet"
        first_rows = pipe.decode_image_tokens(output.image_tokens[index : index + 1, :8], height=8)[0]
        assert np.array_equal(half[index][:8], np.asarray(first_rows))
        assert np.array_equal(whole[index], np.asarray(output.images[index])), "the last is the result"


def test_new_rows_of_a_preview_fade_into_the_row_above(pipe):
    output, previews = collect_previews(pipe, preview_every=1)
    with torch.no_grad():
        above, strip = (pipe.vq_model.decode(output.image_tokens[:, : 4 * n], n, 4) for n in (1, 2))
    weights = torch.tensor([1, 2, 3, 4, 5, 5, 5, 5])[:, None] / 5
    expected = strip * weights + torch.cat([above, strip[:, :, 4:]], dim=2) * (1 - weights)
    expected = ((expected[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(previews[7][0][:8] - expected).max() < 0.51


def test_previews_of_a_larger_stride_are_decoded_small_and_keep_rows_outside_the_mask():
    torch.manual_seed(0)
    config = EditARVQConfig(num_embeddings=40, base_channels=8, channel_multipliers=(1, 1, 2, 2), norm_num_groups=4)
    vq_model, tokens, pixels = EditARVQModel(config).eval(), torch.arange(16)[None], torch.rand(1, 3, 32, 32) * 2 - 1
    edit_mask = (tokens >= 6) & (tokens < 8)  # in the second row
    preview = RowPreview(vq_model, pixels, edit_mask, (4, 4), 1, torch.clone)
    with torch.no_grad():
        first, second, third, last = (preview.draw(tokens[:, : 4 * num_rows]) for num_rows in (1, 2, 3, 4))
        strip = vq_model.decode(tokens[:, :8], 2, 4, num_skipped_upsamples=1)
        assert_close(last, vq_model.decode(tokens, 4, 4), rtol=0, atol=0)
    assert torch.equal(first, pixels)
    assert torch.equal(second[:, :, 16:], pixels[:, :, 16:])
    assert torch.equal(third, second)
    # Enlarged linearly: the pixels 2k and 2k + 1 lie a quarter of a small pixel before and after small pixel k.
    middle = 0.25 * strip[..., :-1] + 0.75 * strip[..., 1:]
    expected = 0.25 * middle[:, :, 5:7] + 0.75 * middle[:, :, 6:8]
    assert_close(second[:, :, 12:16:2, 2::2], expected)


def test_preview_of_a_trained_vq_model_shows_the_new_tokens():
    """Where a row of the result differs from the source, its preview is nearer to the result."""
    vq_model = EditARVQModel.from_pretrained(STICKER_EDITOR / "vq_model", dtype=torch.float32)
    pixels = []
    for color in ("red", "blue"):
        image = Image.new("RGB", (64, 64), "white")
        image.paste(color, (16, 16, 48, 48))
        pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1)
    with torch.no_grad():
        source, tokens = (vq_model.encode(one).image_tokens for one in pixels)
        result, before = vq_model.decode(tokens), vq_model.decode(source)
        preview = RowPreview(vq_model, before, None, (8, 8), 1, torch.clone)
        for row in range(8):
            rows = slice(8 * row, 8 * row + 8)
            drawn, target, old = (one[:, :, rows] for one in (preview.draw(tokens[:, : rows.stop]), result, before))
            if 2 <= row < 6:
                assert (drawn - target).square().mean() < 0.2 * (old - target).square().mean()


def test_the_result_is_drawn_once_where_the_last_preview_shows_it(pipe):
    calls = []
    handle = pipe.vq_model.decoder.register_forward_hook(lambda *arguments: calls.append(arguments))
    collect_previews(pipe, preview_every=1)
    handle.remove()
    assert len(calls) == 4  # a call for each row of tokens


@pytest.mark.parametrize(
    "arguments",
    [{"restore_size": False}, {"restore_size": True}, {"crop_to_mask": True}],
    ids=["model's size", "restored", "window"],
)
def test_previews_have_the_size_of_the_result_and_its_untouched_pixels(pipe, arguments):
    size = (100, 60) if arguments.get("restore_size", True) else (SIDE, SIDE)
    image, mask = draw_image(2, *size), draw_mask((size[0] // 2, 4, size[0] // 2 + 3, 6), size=size)
    output, previews = collect_previews(pipe, image=image, mask_image=mask, preview_every=3, **arguments)
    assert list(previews) == [11, 15], "the last comes with the last row"
    assert np.array_equal(previews[15][0], np.asarray(output.images[0]))
    untouched = (np.asarray(output.images[0]) == np.asarray(image)).all(axis=2)
    assert untouched.mean() > 0.3
    # A pixel in the feather may be the same by chance in the result.
    same = (previews[11][0] == np.asarray(image)).all(axis=2)
    assert same[untouched].mean() > 0.99
    assert not same.all()


def test_previews_without_a_source_begin_with_gray(pipe):
    seen = []
    pipe(
        PROMPT,
        task="text-to-image",
        generator=seeded(),
        preview_every=1,
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.extend(tensors.get("preview", [])),
    )
    assert len(seen) == 4
    assert (np.asarray(seen[0])[4:] == 128).all()


# The edit map


def test_edit_map_is_how_unlikely_the_instruction_makes_the_source_tokens_around_each_token(pipe):
    images = [draw_image(0), draw_image(1)]
    edit_map = pipe.compute_edit_map(images, PROMPT)
    assert edit_map.shape == (2, 4, 4)
    prompt = pipe.encode_prompt(PROMPT)[0]
    for index, source in enumerate(pipe.encode_image(images)):
        losses = np.empty((4, 4))
        for position, token in enumerate(source.tolist()):
            inputs = source, prompt, False, False, source[:position].tolist(), 4, 4
            with torch.no_grad():
                logits = torch.from_numpy(compute_naive_logits(pipe.transformer, *inputs))
            losses[divmod(position, 4)] = -logits.log_softmax(0)[token]
        for row, column in ((0, 0), (1, 2), (3, 1)):
            around = losses[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            assert edit_map[index, row, column].item() == pytest.approx(around.mean(), abs=1e-4)
