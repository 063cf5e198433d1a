"""What the pipeline promises of masks, sessions, kept sources, drafts, previews, windows and the edit map."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from plain_decoding import compute_naive_logits
from tiny import STRIDE, are_near, build_pipeline, draw_image

from editar_hf.pipelines.edit_region import compute_edit_mask


PROMPT = "make the red circle blue"
SIDE, NUM_TOKENS = 16, 16
pytestmark = pytest.mark.filterwarnings("ignore:More than 2% of a picture", "ignore:A prompt is longer")


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


def list_other_tokens(free=FREE):
    return [token for token in range(NUM_TOKENS) if token not in free]


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
    source = pipe.encode_image(draw_image(0))
    assert torch.equal(output.image_tokens[:, list_other_tokens()], source[:, list_other_tokens()])
    assert output.num_passes == len(FREE) - 1
    edit_mask = torch.zeros(1, NUM_TOKENS, dtype=torch.bool)
    edit_mask[:, FREE] = True
    with torch.no_grad():
        expected = pipe.transformer.generate(
            source, pipe.encode_prompt(PROMPT), edit_mask=edit_mask, generator=seeded()
        )
    assert torch.equal(output.image_tokens, expected)
    assert not torch.equal(output.image_tokens, source)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_no_pixel_beyond_the_feather_changes(pipe, output_type):
    output = edit(pipe, mask_image=MASK, output_type=output_type)
    pixels = np.asarray(output.images[0], dtype=np.float64)
    if output_type == "pt":
        pixels = pixels.transpose(1, 2, 0)
    source = np.asarray(draw_image(0)) / (1 if output_type == "pil" else 255)
    distance = compute_distance((SIDE, SIDE), [(4, 4, 8, 8), (8, 8, 12, 12)])
    tolerance = 0 if output_type == "pil" else 1e-6
    assert np.abs(pixels - source)[distance >= STRIDE].max() <= tolerance
    drawn = pipe.decode_image_tokens(output.image_tokens, output_type="np")[0] * (255 if output_type == "pil" else 1)
    assert np.allclose(pixels[distance == 0], drawn[distance == 0], atol=0.5 if output_type == "pil" else 1e-6)
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
def test_a_mask_without_white_returns_the_source_with_a_warning(pipe, mask_blend, restore_size):
    image = draw_image(0, 40, 40) if restore_size else draw_image(0)
    empty = draw_mask(size=image.size)
    with pytest.warns(UserWarning, match="`mask_image` is white nowhere"):
        output = edit(pipe, image, mask_image=empty, mask_blend=mask_blend, restore_size=restore_size)
    assert np.array_equal(np.asarray(output.images[0]), np.asarray(image))
    assert torch.equal(output.image_tokens, pipe.encode_image(image))
    assert output.num_passes == 0


@pytest.mark.parametrize(
    ("mask", "message"),
    [(draw_mask(size=(48, 16)), "white nowhere"), (draw_mask((0, 0, 5, 5), size=(48, 16)), "100% lies in what")],
    ids=["empty", "cut away"],
)
def test_warning_of_a_mask_without_effect_points_at_the_call_and_names_the_cause(pipe, mask, message):
    image = draw_image(0, 48, 16)
    with pytest.warns(UserWarning, match=message) as record:
        output = edit(pipe, image, mask_image=mask, restore_size=True)
    (warning,) = (one for one in record if message in str(one.message))
    assert warning.filename == __file__
    assert np.array_equal(np.asarray(output.images[0]), np.asarray(image))


def test_an_empty_mask_leaves_the_other_images_of_a_batch_alone(pipe):
    with pytest.warns(UserWarning, match="white nowhere"):
        output = edit(pipe, mask_image=[draw_mask(), MASK], generator=[seeded(1), seeded(0)], mask_blend=False)
    assert np.array_equal(np.asarray(output.images[0]), np.asarray(draw_image(0)))
    alone = edit(pipe, mask_image=MASK, mask_blend=False)
    assert are_near(output.images[1], alone.images[0])


def test_masks_pair_up_with_images_and_prompts(pipe):
    masks, images = [MASK, draw_mask((0, 0, 16, 3))], [draw_image(0), draw_image(1)]
    generators = [seeded(seed) for seed in range(4)]
    output = pipe([PROMPT, "remove it"], image=images, mask_image=masks, num_images_per_prompt=2, generator=generators)
    for index in range(4):
        alone = pipe(
            [PROMPT, "remove it"][index // 2],
            image=images[index // 2],
            mask_image=masks[index // 2],
            generator=seeded(index),
        )
        assert torch.equal(alone.image_tokens[0], output.image_tokens[index])
        assert are_near(alone.images[0], output.images[index])
    many_images = pipe(PROMPT, image=images, mask_image=MASK, generator=[seeded(0), seeded(0)])
    many_masks = pipe(PROMPT, image=images[0], mask_image=masks, generator=[seeded(0), seeded(0)])
    assert torch.equal(many_images.image_tokens[0], many_masks.image_tokens[0])
    assert torch.equal(many_masks.image_tokens[1], edit(pipe, mask_image=masks[1]).image_tokens[0])


def test_untouched_tokens_are_the_first_images_after_ten_masked_edits(pipe):
    first = pipe.encode_image(draw_image(0))
    tokens, touched = first, set()
    for turn in range(10):
        token = (3 * turn) % 8
        row, column = divmod(token, 4)
        box = (column * STRIDE, row * STRIDE, column * STRIDE + 1, row * STRIDE + 1)
        output = pipe(PROMPT, source_image_tokens=tokens, mask_image=draw_mask(box), generator=seeded(turn))
        tokens, touched = output.image_tokens, {*touched, token}
    untouched = list_other_tokens(touched)
    assert len(untouched) == 8
    assert torch.equal(tokens[:, untouched], first[:, untouched])
    assert not torch.equal(tokens, first)


def test_a_masked_turn_of_a_session_is_laid_over_what_its_source_tokens_draw(pipe):
    tokens = pipe.encode_image(draw_image(0))
    output = pipe(PROMPT, source_image_tokens=tokens, mask_image=MASK, generator=seeded())
    before = np.asarray(pipe.decode_image_tokens(tokens)[0])
    distance = compute_distance((SIDE, SIDE), [(4, 4, 8, 8), (8, 8, 12, 12)])
    assert np.array_equal(np.asarray(output.images[0])[distance >= STRIDE], before[distance >= STRIDE])


def test_ten_masked_turns_at_full_size_keep_every_earlier_turn_and_the_untouched_pixels(pipe):
    photo = draw_image(0, 48, 48)
    picture, tokens, touched = photo, pipe.encode_image(photo), np.zeros((48, 48), bool)
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
    assert 0.2 < touched.mean() < 0.9
    assert np.array_equal(np.asarray(picture)[~touched], np.asarray(photo)[~touched])
    assert (np.asarray(picture) != np.asarray(photo)).any(axis=2)[12:24, :36].mean() > 0.9


# Windows


def test_a_window_around_the_mask_is_edited_by_itself_and_put_back(pipe):
    image, mask = draw_image(2, 100, 60), draw_mask((70, 10, 82, 16), size=(100, 60))
    output = edit(pipe, image, mask_image=mask, crop_to_mask=True)
    window = (67, 4, 85, 22)  # half as large again as 12 pixels, around the middle of the white
    inside = edit(
        pipe, image.crop(window), mask_image=mask.crop(window), resize_mode="stretch", restore_size=True
    ).images[0]
    expected = image.copy()
    expected.paste(inside, window[:2])
    assert np.array_equal(np.asarray(output.images[0]), np.asarray(expected))
    assert not np.array_equal(np.asarray(output.images[0]), np.asarray(image))


def test_each_mask_of_an_image_has_its_window(pipe):
    image = draw_image(2, 100, 60)
    masks = [draw_mask((70, 10, 82, 16), size=image.size), draw_mask((5, 40, 10, 45), size=image.size)]
    output = edit(pipe, image, mask_image=masks, crop_to_mask=True, generator=[seeded(0), seeded(0)])
    for mask, result in zip(masks, output.images, strict=True):
        alone = edit(pipe, image, mask_image=mask, crop_to_mask=True).images[0]
        assert are_near(alone, result)


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


def test_one_source_cache_serves_many_prompts_and_seeds(pipe):
    prompts = [PROMPT, "remove the green square"]
    generators = [[seeded(seed) for seed in range(4)] for _ in range(2)]
    cache = pipe.prepare_source_cache(draw_image(0))
    output = pipe(prompts, source_cache=cache, num_images_per_prompt=2, generator=generators[0])
    expected = pipe(prompts, image=draw_image(0), num_images_per_prompt=2, generator=generators[1])
    assert torch.equal(output.image_tokens, expected.image_tokens)


def test_a_cache_of_several_images_pairs_up_with_prompts_and_returns_into_the_images(pipe):
    images, prompts = [draw_image(0, 20, 31), draw_image(1, 40, 17)], [PROMPT, "remove it"]
    how = {"resize_mode": "stretch", "restore_size": True}
    cache = pipe.prepare_source_cache(images, resize_mode="stretch")
    output = pipe(prompts, image=images, source_cache=cache, generator=[seeded(0), seeded(1)], **how)
    expected = pipe(prompts, image=images, generator=[seeded(0), seeded(1)], **how)
    for one, other in zip(output.images, expected.images, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_a_cache_of_one_picture_serves_each_of_a_list_of_it(pipe):
    cache, generators = pipe.prepare_source_cache(draw_image(0)), [[seeded(0), seeded(1)] for _ in range(2)]
    images = [draw_image(0), draw_image(0)]
    output = pipe(PROMPT, image=images, source_cache=cache, restore_size=True, generator=generators[0])
    assert torch.equal(output.image_tokens, pipe(PROMPT, image=images, generator=generators[1]).image_tokens)
    with pytest.raises(ValueError, match="`source_cache` is of another image than `image`"):
        pipe(PROMPT, image=[draw_image(0), draw_image(1)], source_cache=cache, restore_size=True)


def test_a_cache_of_another_picture_or_a_changed_decoder_is_refused():
    pipe = build_pipeline()
    cache = pipe.prepare_source_cache(draw_image(0))
    with pytest.raises(ValueError, match="`source_cache` is of another image than `image`"):
        edit(pipe, draw_image(1), source_cache=cache, mask_image=MASK)
    with pytest.raises(ValueError, match="`source_cache` is of a grid of 4 × 4"):
        pipe(PROMPT, source_cache=cache, height=8)
    coarse = copy.deepcopy(pipe)
    coarse.transformer.bfloat16()
    with pytest.raises(ValueError, match=r"`source_cache` is torch.float32 on cpu and the decoder torch.bfloat16"):
        coarse(PROMPT, source_cache=cache)
    with torch.no_grad():
        pipe.transformer.model.layers[1].mlp.up_proj.weight[0] += 0.1
    with pytest.raises(ValueError, match="`source_cache` is of another decoder, or of this one with other weights"):
        pipe(PROMPT, source_cache=cache)


def test_speculative_decoding_gives_the_same_image_in_fewer_passes(pipe):
    # Some drafts come true in this random model, without guidance.
    how = {"do_sample": False, "guidance_scale": 1}
    exact, speculative = (edit(pipe, decoding=decoding, **how) for decoding in ("exact", "speculative"))
    assert torch.equal(exact.image_tokens, speculative.image_tokens)
    assert speculative.num_passes < exact.num_passes == NUM_TOKENS - 1


# Previews


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


def test_the_last_preview_comes_with_the_last_row_and_is_the_result(pipe):
    output, previews = collect_previews(pipe, preview_every=3, image=draw_image(2, 40, 30))
    assert list(previews) == [11, 15]
    assert np.array_equal(previews[15][0], np.asarray(output.images[0]))


def test_the_result_is_drawn_once_where_the_last_preview_shows_it(pipe):
    calls = []
    handle = pipe.vq_model.decoder.register_forward_hook(lambda *arguments: calls.append(arguments))
    collect_previews(pipe, preview_every=1)
    handle.remove()
    assert len(calls) == 4  # a call for each row of tokens


def test_previews_change_no_pixel_that_the_result_cannot_change(pipe):
    _, previews = collect_previews(pipe, preview_every=1, mask_image=MASK)
    distance = compute_distance((SIDE, SIDE), [(4, 4, 8, 8), (8, 8, 12, 12)])
    source = np.asarray(draw_image(0))
    for (preview,) in previews.values():
        assert np.array_equal(preview[distance >= STRIDE], source[distance >= STRIDE])
    assert not np.array_equal(previews[15][0][distance == 0], source[distance == 0])


@pytest.mark.parametrize("arguments", [{"restore_size": True}, {"crop_to_mask": True}], ids=["restored", "window"])
def test_previews_have_the_size_of_the_result_and_its_untouched_pixels(pipe, arguments):
    image, mask = draw_image(2, 100, 60), draw_mask((50, 10, 62, 16), size=(100, 60))
    output, previews = collect_previews(pipe, image=image, mask_image=mask, preview_every=4, **arguments)
    (preview,) = previews[15]
    untouched = (np.asarray(output.images[0]) == np.asarray(image)).all(axis=2)
    assert preview.shape == (60, 100, 3)
    assert untouched.mean() > 0.5
    # A pixel in the feather may be the same by chance in the result.
    assert (preview[untouched] == np.asarray(image)[untouched]).all(axis=1).mean() > 0.99
    assert (preview != np.asarray(image)).any()


def test_previews_without_a_source_begin_with_grey(pipe):
    seen = []
    pipe(
        PROMPT,
        generator=seeded(),
        preview_every=1,
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.extend(tensors.get("preview", [])),
    )
    assert len(seen) == 4
    assert (np.asarray(seen[0])[4:] == 128).all()


@pytest.mark.parametrize(
    "arguments", [{"mask_image": MASK}, {"decoding": "speculative"}], ids=["masked", "speculative"]
)
def test_an_interrupt_ends_a_call_within_a_pass(pipe, arguments):
    """Whatever a pass brought, nothing more is run; what is missing is the source's."""
    complete = edit(pipe, **arguments).image_tokens
    steps = []

    def interrupt(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 3

    output = edit(pipe, callback_on_step_end=interrupt, **arguments)
    assert steps == [0, 1, 2, 3]
    source = pipe.encode_image(draw_image(0))
    assert torch.equal(output.image_tokens, torch.cat([complete[:, :4], source[:, 4:]], dim=1))


# The edit map


def test_edit_map_is_how_much_the_instruction_lowers_the_likelihood_of_each_source_token(pipe):
    images = [draw_image(0), draw_image(1)]
    edit_map = pipe.compute_edit_map(images, PROMPT)
    assert edit_map.shape == (2, 4, 4)
    prompt = pipe.encode_prompt(PROMPT)[0]
    for index, source in enumerate(pipe.encode_image(images)):
        for position in (0, 6, 15):
            likelihoods = []
            for drop_prompt in (False, True):
                tokens = source[:position].tolist()
                with torch.no_grad():
                    logits = compute_naive_logits(pipe.transformer, source, prompt, False, drop_prompt, tokens, 4, 4)
                likelihoods.append(torch.from_numpy(logits).log_softmax(0)[source[position]])
            expected = likelihoods[1] - likelihoods[0]
            assert edit_map[index].flatten()[position] == pytest.approx(expected.item(), abs=1e-4)


# Bad input


TOKENS = torch.zeros(1, NUM_TOKENS, dtype=torch.long)
BAD_INPUT = {
    "mask of other proportions": ({"mask_image": draw_mask(size=(16, 20))}, "`mask_image` is 16×20 pixels and its"),
    "mask that is no picture": ({"mask_image": 5}, "`mask_image` holds a int"),
    "mask without image": ({"image": None, "mask_image": MASK}, "`mask_image` is given without an `image`"),
    "masks that do not pair up": ({"image": [draw_image(0)] * 2, "mask_image": [MASK] * 3}, "`mask_image` has 3"),
    "window without mask": ({"crop_to_mask": True}, "`crop_to_mask` is True; it needs `image` and `mask_image`"),
    "window of known tokens": (
        {"crop_to_mask": True, "mask_image": MASK, "source_image_tokens": TOKENS},
        "neither `source_image_tokens` nor",
    ),
    "window as an array": (
        {"crop_to_mask": True, "mask_image": MASK, "output_type": "np"},
        "`output_type` is 'np' with `crop_to_mask`",
    ),
    "window with a way to resize": (
        {"crop_to_mask": True, "mask_image": MASK, "resize_mode": "crop"},
        "`resize_mode` is 'crop' beside `crop_to_mask`",
    ),
    "unknown decoding": ({"decoding": "fast"}, "`decoding` is 'fast'"),
    "drafts without a source": (
        {"image": None, "decoding": "speculative"},
        "`decoding` is 'speculative', which drafts",
    ),
    "previews for nobody": ({"preview_every": 2}, "`preview_every` is 2 without `callback_on_step_end`"),
    "previews every no row": ({"preview_every": 0, "callback_on_step_end": print}, "`preview_every` is 0"),
}


@pytest.fixture
def pipe_at_rest(pipe):
    """The pipeline, in which running any network is a failure."""

    def fail(*arguments):
        pytest.fail("a network ran before the input was refused")

    networks = (pipe.transformer, pipe.vq_model, pipe.text_encoder)
    handles = [module.register_forward_pre_hook(fail) for network in networks for module in network.modules()]
    yield pipe
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("prompt", [None, 5, [], ["remove it", 5]], ids=str)
def test_what_is_no_prompt_is_refused_before_a_network_runs(pipe_at_rest, prompt):
    with pytest.raises(ValueError, match=r"`prompt` is .*; pass a string or a list of strings"):
        pipe_at_rest.compute_edit_map(draw_image(0), prompt)
    with pytest.raises(ValueError, match=r"`prompt` is .*; pass a string or a list of strings"):
        pipe_at_rest.encode_prompt(prompt)


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_before_a_network_runs(pipe_at_rest, case):
    arguments, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        pipe_at_rest(**{"prompt": PROMPT, "image": draw_image(0), **arguments})
