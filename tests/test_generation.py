"""`generate` in all its ways gives the tokens of the plain loop; its noise, its settings and its refusals."""

import copy
import functools
import json

import numpy as np
import pytest
import torch
from plain_decoding import GREEDY, PassRecorder, decode_plainly, draw_inputs, draw_mask, seed_generators, select_row
from tiny import NUM_CODES, NUM_TEXT_TOKENS, TEXT_HIDDEN_SIZE, build_transformer
from transformers import GenerationConfig

from editar_hf import EditARForConditionalGeneration
from editar_hf.generation.inputs import resolve_settings


PUBLISHED = {"do_sample": True, "temperature": 1.0, "top_k": 1000, "top_p": 1.0, "guidance_scale": 3.0}
NEGATIVE = draw_inputs(seed=2)["prompt_embeds"]
TEXT_TO_IMAGE = {"source_image_tokens": None}


@functools.cache
def get_model(text_rotary="zero"):
    return build_transformer(text_rotary=text_rotary)


@pytest.fixture
def model():
    return get_model()


@pytest.fixture(scope="module")
def inputs():
    return draw_inputs()


# Tokens


SETTINGS = [
    {**GREEDY, "guidance_scale": 1},
    GREEDY,
    {**GREEDY, "guidance_scale": 7.5, "negative_prompt_embeds": NEGATIVE},
    {**GREEDY, "image_guidance_scale": 1.6},
    {**GREEDY, "image_guidance_scale": 0.0, "guidance_scale": 1.0, "negative_prompt_embeds": NEGATIVE},
    {"top_k": 9, "temperature": 1.4},
    {"top_p": 0.8, "image_guidance_scale": 2.5},
    {"temperature": 0.6, "top_k": 12, "top_p": 0.9, "guidance_scale": 7.5},
]
WAYS = [
    {},
    {"decoding": "speculative", "num_draft_tokens": 1},
    {"decoding": "speculative", "num_draft_tokens": 3},
    {"decoding": "speculative", "num_draft_tokens": 40},
    {"source_cache": True},
    {"source_cache": True, "decoding": "speculative"},
]


@functools.cache
def decode_settings_plainly(index, text_rotary, is_masked):
    edit_mask = {"edit_mask": draw_mask(1, 2)} if is_masked else {}
    return decode_plainly(get_model(text_rotary), **draw_inputs(), **SETTINGS[index], **edit_mask)


@pytest.mark.parametrize("is_masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_every_way_gives_the_tokens_of_the_plain_loop(inputs, index, way, is_masked):
    text_rotary = ("zero", "identity")[index % 2]
    model, call = get_model(text_rotary), {**inputs, **SETTINGS[index], **way}
    if way.get("source_cache"):
        call["source_cache"] = model.prepare_source_cache(call.pop("source_image_tokens"))
    if is_masked:
        call["edit_mask"] = draw_mask(1, 2)
    expected = decode_settings_plainly(index, text_rotary, is_masked)
    for _ in range(2):  # nothing a call does may change the cache
        assert torch.equal(model.generate(**call, generator=seed_generators(1, 2)), expected)
    if is_masked:
        assert torch.equal(expected[~call["edit_mask"]], inputs["source_image_tokens"][~call["edit_mask"]])


@pytest.mark.parametrize(
    "change",
    [
        TEXT_TO_IMAGE,
        {**TEXT_TO_IMAGE, "guidance_scale": 1},
        {**TEXT_TO_IMAGE, **GREEDY},
        {},
        {"image_guidance_scale": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (1, 1)])
def test_any_grid_and_no_source_give_the_tokens_of_the_plain_loop(model, inputs, change, grid):
    sides = {"grid_height": grid[0], "grid_width": grid[1]}
    source = inputs["source_image_tokens"][:, : grid[0] * grid[1]]
    call = {"source_image_tokens": source, "prompt_embeds": inputs["prompt_embeds"], **sides, **change}
    output = model.generate(**call, generator=seed_generators(1, 2), return_dict_in_generate=True)
    assert torch.equal(output.sequences, decode_plainly(model, **call))
    assert output.num_decode_steps == grid[0] * grid[1] - 1


def test_every_condition_changes_the_tokens(inputs):
    """Without this the comparisons above could hold vacuously."""
    calls = [*SETTINGS, TEXT_TO_IMAGE, {**GREEDY, "prompt_embeds": NEGATIVE}, {"generator": seed_generators(3, 4)}]
    decoded = [get_model().generate(**{**inputs, "generator": seed_generators(1, 2), **call}) for call in calls]
    decoded.append(get_model("identity").generate(**inputs, **GREEDY))
    assert len({tuple(tokens.flatten().tolist()) for tokens in decoded}) == len(decoded)


# Noise and batches


@pytest.mark.parametrize(
    "how", [{"image_guidance_scale": 1.6}, {"edit_mask": draw_mask(5, 6)}], ids=["whole", "masked"]
)
def test_an_image_is_the_same_alone_and_in_a_batch(model, inputs, how):
    together = model.generate(**inputs, generator=seed_generators(7, 8), **how)
    for row, seed in enumerate((7, 8)):
        one = {name: value[row : row + 1] if isinstance(value, torch.Tensor) else value for name, value in how.items()}
        alone = model.generate(**select_row(inputs, row), generator=seed_generators(seed), **one)
        assert torch.equal(alone[0], together[row])


def test_one_generator_serves_the_images_in_order(model, inputs):
    together = model.generate(**inputs, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    for row in range(2):
        assert torch.equal(model.generate(**select_row(inputs, row), generator=generator)[0], together[row])


def test_without_a_generator_torchs_own_is_used_and_advances(model, inputs):
    torch.manual_seed(5)
    first, second = model.generate(**inputs), model.generate(**inputs)
    assert not torch.equal(first, second)
    assert torch.equal(first, model.generate(**inputs, generator=torch.Generator().manual_seed(5)))


def test_greedy_decoding_uses_neither_the_generator_nor_the_temperature(model, inputs):
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    tokens = model.generate(**inputs, **GREEDY, generator=generator, temperature=0.0)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(tokens, model.generate(**inputs, **GREEDY))


def test_top_k_of_zero_and_above_the_vocabulary_mean_all_and_one_is_greedy(model, inputs):
    decoded = [
        model.generate(**inputs, top_k=top_k, temperature=3.0, generator=seed_generators(1, 2))
        for top_k in (0, NUM_CODES, 10 * NUM_CODES, 1)
    ]
    assert torch.equal(decoded[0], decoded[1])
    assert torch.equal(decoded[0], decoded[2])
    assert torch.equal(decoded[3], model.generate(**inputs, **GREEDY))


# Settings


def select_settings(generation_config):
    return resolve_settings(generation_config, None, {})._asdict()


def test_defaults_are_the_published_settings_not_those_of_transformers(model, inputs):
    assert type(model.generation_config) is GenerationConfig
    assert select_settings(model.generation_config) == PUBLISHED
    default = model.generate(**inputs, generator=seed_generators(1, 2))
    assert torch.equal(default, model.generate(**inputs, **PUBLISHED, generator=seed_generators(1, 2)))


def test_arguments_win_over_the_given_config_over_the_models_own(model, inputs):
    model = copy.deepcopy(model)
    model.generation_config = GenerationConfig(do_sample=False, guidance_scale=1.0)
    before = copy.deepcopy(model.generation_config)
    assert torch.equal(model.generate(**inputs), model.generate(**inputs, **GREEDY, guidance_scale=1.0))

    # A plain config says only what it sets: this one leaves `do_sample=False` to the model's own.
    given = GenerationConfig(guidance_scale=7.5)
    tokens = model.generate(**inputs, generation_config=given)
    assert torch.equal(tokens, model.generate(**inputs, **GREEDY, guidance_scale=7.5))
    tokens = model.generate(**inputs, generation_config=given, guidance_scale=3.0)
    assert torch.equal(tokens, model.generate(**inputs, **GREEDY, guidance_scale=3.0))
    assert (model.generation_config, given) == (before, GenerationConfig(guidance_scale=7.5))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        GREEDY,
        {"top_k": 0, "top_p": 0.9, "temperature": 0.7, "guidance_scale": 1.5},
        {"top_k": np.int64(7), "top_p": np.float32(0.5), "guidance_scale": np.float32(1.5)},
    ],
    ids=str,
)
def test_generation_config_survives_saving_and_loading(model, tmp_path, settings):
    model = copy.deepcopy(model)
    model.generation_config = GenerationConfig(**settings)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved.items() >= (settings if "do_sample" in settings else {**PUBLISHED, **settings}).items()
    # Every transformers setting that is said to have no effect raises here; on loading it would be a warning.
    GenerationConfig.from_pretrained(tmp_path).validate(strict=True)
    loaded = EditARForConditionalGeneration.from_pretrained(tmp_path)
    assert select_settings(loaded.generation_config) == {**PUBLISHED, **settings}
    loaded.save_pretrained(tmp_path / "again")
    again = EditARForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert again.generation_config == loaded.generation_config


@pytest.mark.parametrize("saved", [None, {"top_k": 7}], ids=["no file", "partial file"])
def test_settings_missing_on_disk_are_the_published_ones(model, tmp_path, saved):
    model.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.unlink() if saved is None else path.write_text(json.dumps(saved))
    loaded = EditARForConditionalGeneration.from_pretrained(tmp_path)
    assert select_settings(loaded.generation_config) == {**PUBLISHED, **(saved or {})}


def test_old_names_still_work_with_a_warning(model, inputs):
    with pytest.warns(FutureWarning, match=r"is now `transformers.GenerationConfig`"):
        from editar_hf.generation import EditARGenerationConfig
    greedy = EditARGenerationConfig(do_sample=False, temperature=0.3, top_k=7)  # sampling's settings may stay
    output = model.generate(**inputs, generation_config=greedy, return_dict_in_generate=True)
    assert torch.equal(output.sequences, model.generate(**inputs, **GREEDY))
    with pytest.warns(FutureWarning, match="num_decode_steps"):
        assert output.num_passes == output.num_decode_steps == 15


# Bad input


BAD_INPUT = [
    ({"prompt_embeds": None}, "`prompt_embeds` is None"),
    ({"prompt_embeds": torch.zeros(2, NUM_TEXT_TOKENS, 5)}, r"`prompt_embeds` has shape \(2, 10, 5\)"),
    ({"prompt_embeds": torch.zeros(2, 9, TEXT_HIDDEN_SIZE)}, r"`prompt_embeds` has shape \(2, 9, 16\)"),
    ({"prompt_embeds": NEGATIVE[0]}, r"`prompt_embeds` has shape \(10, 16\)"),
    ({"prompt_embeds": NEGATIVE / 0}, "`prompt_embeds` holds NaN"),
    ({"prompt_embeds": NEGATIVE.bfloat16()}, "`prompt_embeds` holds torch.bfloat16"),
    ({"prompt_embeds": NEGATIVE[:1]}, "`source_image_tokens` has batch size"),
    ({"negative_prompt_embeds": NEGATIVE[:, :1]}, r"`negative_prompt_embeds` has shape \(2, 1, 16\)"),
    ({"negative_prompt_embeds": NEGATIVE[:1]}, r"`negative_prompt_embeds` has shape \(1, 10, 16\)"),
    ({"source_image_tokens": torch.zeros(2, 8).long()}, r"`source_image_tokens` has shape \(2, 8\)"),
    ({"source_image_tokens": torch.zeros(16).long()}, r"`source_image_tokens` has shape \(16,\)"),
    ({"source_image_tokens": torch.zeros(2, 16)}, "`source_image_tokens` holds torch.float32"),
    ({"source_image_tokens": torch.full((2, 16), NUM_CODES)}, "tokens from 40 to 40"),
    ({"source_image_tokens": torch.full((2, 16), -1)}, "tokens from -1 to -1"),
    ({**TEXT_TO_IMAGE, "image_guidance_scale": 1.5}, "`image_guidance_scale` is 1.5"),
    ({"grid_height": 5}, "`grid_height` × `grid_width` is 5 × 4"),
    ({"grid_width": 0}, "`grid_height` × `grid_width` is 4 × 0"),
    ({"temperature": 0.0}, "`temperature` is 0.0"),
    ({"temperature": -1.0, "do_sample": False}, "`temperature` is -1.0"),
    ({"temperature": float("nan")}, "`temperature` is nan"),
    ({"top_k": -1}, "`top_k` is -1"),
    ({"top_p": 0.0}, "`top_p` is 0.0"),
    ({"top_p": 1.5}, "`top_p` is 1.5"),
    ({"generator": seed_generators(1, 2, 3)}, "`generator` is a list of 3 generators for 2"),
    ({"generator": 0}, "`generator` is 0"),
    ({"generation_config": GenerationConfig(num_beams=4)}, "`num_beams` is 4"),
    ({"edit_mask": torch.ones(2, 15).bool()}, r"`edit_mask` is torch.bool of shape \(2, 15\)"),
    ({"edit_mask": torch.ones(2, 16)}, "`edit_mask` is torch.float32"),
    ({**TEXT_TO_IMAGE, "edit_mask": torch.ones(2, 16).bool()}, "`edit_mask` is given without"),
    ({"decoding": "jacobi"}, "`decoding` is 'jacobi'"),
    ({**TEXT_TO_IMAGE, "decoding": "speculative"}, "`decoding` is 'speculative', .* source image"),
    ({"decoding": "speculative", "num_draft_tokens": 0}, "`num_draft_tokens` is 0"),
    ({"num_draft_tokens": 3}, "`num_draft_tokens` is 3"),
]


@pytest.mark.parametrize(("change", "message"), BAD_INPUT, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_refused_before_any_forward(model, inputs, change, message):
    with PassRecorder(model) as recorder, pytest.raises(ValueError, match=message):
        model.generate(**{**inputs, **change})
    assert recorder.passes == []


def test_logits_that_are_not_finite_are_an_error(model, inputs):
    model = copy.deepcopy(model)
    torch.nn.init.constant_(model.lm_head.weight, float("inf"))
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        model.generate(**inputs)
