"""`generate`, one token at a time, against the plain loop; and its settings, processors, criteria and refusals."""

import copy
import inspect
import json

import pytest
import torch
from plain_decoding import decode_batch_naively
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from editar_hf import EditARConfig, EditARForConditionalGeneration
from editar_hf.generation.inputs import resolve_settings


VOCAB_SIZE, GRID_SIZE, NUM_TEXT_TOKENS, TEXT_HIDDEN_SIZE = 50, 3, 4, 12
BATCH_SIZE, NUM_IMAGE_TOKENS = 2, GRID_SIZE**2
PUBLISHED = {"do_sample": True, "temperature": 1.0, "top_k": 1000, "top_p": 1.0, "guidance_scale": 3.0}
GREEDY = {"do_sample": False}


def build_model(text_rotary="zero"):
    torch.manual_seed(0)
    config = EditARConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        grid_size=GRID_SIZE,
        num_text_tokens=NUM_TEXT_TOKENS,
        text_hidden_size=TEXT_HIDDEN_SIZE,
        text_rotary=text_rotary,
        distillation_hidden_size=None,
    )
    model = EditARForConditionalGeneration(config).eval()
    # A fresh model's head is zero and its conditions hardly reach the logits: every comparison would hold.
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.4 if "lm_head" in name or "embed" in name else 0.25)
    torch.nn.init.normal_(model.model.null_prompt_embeds)
    torch.nn.init.normal_(model.model.null_image_embeds, std=0.4)
    return model


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH_SIZE, NUM_TEXT_TOKENS, TEXT_HIDDEN_SIZE)
    return {
        "source_image_tokens": torch.randint(VOCAB_SIZE, (BATCH_SIZE, NUM_IMAGE_TOKENS), generator=generator),
        "prompt_embeds": torch.randn(shape, generator=generator),
    }


@pytest.fixture(scope="module")
def negative_prompt_embeds():
    return torch.randn(BATCH_SIZE, NUM_TEXT_TOKENS, TEXT_HIDDEN_SIZE, generator=torch.Generator().manual_seed(2))


# Seeds.


def seed_generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_image_seeds(*seeds):
    """The 63-bit seed that each image draws from its generator."""
    return [torch.randint(2**63 - 1, (), generator=generator).item() for generator in seed_generators(*seeds)]


# Tokens.


@pytest.mark.parametrize("guidance_scale", [1, 3.0, 7.5])
def test_greedy_tokens_match_the_naive_decoder(model, inputs, guidance_scale):
    tokens = model.generate(**inputs, **GREEDY, guidance_scale=guidance_scale)
    assert tokens.tolist() == decode_batch_naively(model, **inputs, guidance_scale=guidance_scale)


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 1},
        {"guidance_scale": 3.0},
        {"guidance_scale": 7.5, "top_k": 5},
        {"temperature": 1.7, "top_p": 0.8},
        {"temperature": 0.6, "top_k": 12, "top_p": 0.9},
        {"image_guidance_scale": 1.6, "top_k": 0},
    ],
    ids=str,
)
def test_sampled_tokens_match_the_naive_decoder(model, inputs, settings):
    tokens = model.generate(**inputs, **settings, generator=seed_generators(11, 12))
    assert tokens.tolist() == decode_batch_naively(model, **inputs, **settings, seeds=draw_image_seeds(11, 12))


@pytest.mark.parametrize("image_guidance_scale", [0.0, 1.6])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_two_knob_tokens_match_the_naive_decoder(model, inputs, guidance_scale, image_guidance_scale):
    scales = {"guidance_scale": guidance_scale, "image_guidance_scale": image_guidance_scale}
    assert model.generate(**inputs, **GREEDY, **scales).tolist() == decode_batch_naively(model, **inputs, **scales)


def test_image_guidance_scale_of_one_equals_none(model, inputs):
    """The oracle's three branches at 1, and our one-knob form."""
    tokens = model.generate(**inputs, **GREEDY, image_guidance_scale=1.0)
    assert torch.equal(tokens, model.generate(**inputs, **GREEDY))
    assert tokens.tolist() == decode_batch_naively(model, **inputs, image_guidance_scale=1.0)


@pytest.mark.parametrize("image_guidance_scale", [None, 1.6])
def test_negative_prompt_replaces_the_null_text(model, inputs, negative_prompt_embeds, image_guidance_scale):
    scale = {"image_guidance_scale": image_guidance_scale}
    tokens = model.generate(**inputs, **GREEDY, **scale, negative_prompt_embeds=negative_prompt_embeds)
    assert tokens.tolist() == decode_batch_naively(model, **inputs, **scale, negative=negative_prompt_embeds)
    assert not torch.equal(tokens, model.generate(**inputs, **GREEDY, **scale))


@pytest.mark.parametrize("guidance_scale", [1, 3.0])
def test_text_to_image_decodes_from_the_null_image(model, inputs, guidance_scale):
    prompts = {"source_image_tokens": None, "prompt_embeds": inputs["prompt_embeds"]}
    tokens = model.generate(**prompts, **GREEDY, guidance_scale=guidance_scale)
    assert tokens.tolist() == decode_batch_naively(model, **prompts, guidance_scale=guidance_scale)


@pytest.mark.parametrize("source", ["image", "null"])
def test_rectangular_grids_match_the_naive_decoder(model, inputs, source):
    height, width = 2, 3
    tokens = inputs["source_image_tokens"][:, : height * width] if source == "image" else None
    generated = model.generate(
        tokens, inputs["prompt_embeds"], grid_height=height, grid_width=width, generator=seed_generators(1, 2)
    )
    assert generated.tolist() == decode_batch_naively(
        model, tokens, inputs["prompt_embeds"], height=height, width=width, seeds=draw_image_seeds(1, 2)
    )


def test_a_grid_of_one_token_needs_no_pass(model, inputs):
    source = inputs["source_image_tokens"][:, :1]
    output = model.generate(
        source, inputs["prompt_embeds"], **GREEDY, grid_height=1, grid_width=1, return_dict_in_generate=True
    )
    assert output.num_decode_steps == 0
    assert output.sequences.tolist() == decode_batch_naively(model, source, inputs["prompt_embeds"], height=1, width=1)


def test_identity_text_rotary_matches_the_naive_decoder(inputs):
    model = build_model("identity")
    tokens = model.generate(**inputs, **GREEDY, image_guidance_scale=1.6)
    assert tokens.tolist() == decode_batch_naively(model, **inputs, image_guidance_scale=1.6)
    assert not torch.equal(tokens, build_model("zero").generate(**inputs, **GREEDY, image_guidance_scale=1.6))


def test_eager_attention_gives_the_tokens_of_sdpa(model, inputs):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert torch.equal(eager.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


def test_every_condition_changes_the_tokens(model, inputs, negative_prompt_embeds):
    """Without this the comparisons above could hold vacuously."""
    variants = [
        model.generate(**inputs, **GREEDY, guidance_scale=1),
        model.generate(**inputs, **GREEDY, guidance_scale=3),
        model.generate(**inputs, **GREEDY, guidance_scale=3, image_guidance_scale=1.6),
        model.generate(None, inputs["prompt_embeds"], **GREEDY),
        model.generate(inputs["source_image_tokens"], negative_prompt_embeds, **GREEDY),
        model.generate(**inputs, generator=seed_generators(1, 2)),
        model.generate(**inputs, generator=seed_generators(3, 4)),
    ]
    assert len({tuple(tokens.flatten().tolist()) for tokens in variants}) == len(variants)


# Noise and batches.


def test_image_is_the_same_alone_and_in_a_batch(model, inputs):
    together = model.generate(**inputs, generator=seed_generators(7, 8), image_guidance_scale=1.6)
    for row, seed in enumerate((7, 8)):
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        tokens = model.generate(**alone, generator=seed_generators(seed), image_guidance_scale=1.6)
        assert torch.equal(tokens[0], together[row])


def test_one_generator_serves_the_images_in_order(model, inputs):
    together = model.generate(**inputs, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    for row in range(BATCH_SIZE):
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        assert torch.equal(model.generate(**alone, generator=generator)[0], together[row])


def test_without_a_generator_torchs_own_is_used_and_advances(model, inputs):
    torch.manual_seed(5)
    first, second = model.generate(**inputs), model.generate(**inputs)
    assert not torch.equal(first, second)
    assert torch.equal(first, model.generate(**inputs, generator=torch.Generator().manual_seed(5)))


def test_greedy_decoding_leaves_the_generator_alone(model, inputs):
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    model.generate(**inputs, **GREEDY, generator=generator)
    assert torch.equal(generator.get_state(), state)


def test_top_k_of_zero_and_above_the_vocabulary_mean_all(model, inputs):
    decoded = [
        model.generate(**inputs, top_k=top_k, temperature=3.0, generator=seed_generators(1, 2))
        for top_k in (0, VOCAB_SIZE, 10 * VOCAB_SIZE)
    ]
    assert torch.equal(decoded[0], decoded[1])
    assert torch.equal(decoded[0], decoded[2])


def test_top_k_of_one_is_greedy(model, inputs):
    tokens = model.generate(**inputs, top_k=1, generator=seed_generators(1, 2))
    assert torch.equal(tokens, model.generate(**inputs, **GREEDY))


# The work done.


class ForwardRecorder:
    """Note what each forward call brings: rows and positions of every segment."""

    def __init__(self, model):
        self.calls = []
        self.handle = model.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, module, args, kwargs):
        segments = ("source_image_tokens", "prompt_embeds", "target_image_tokens")
        self.calls.append({name: tuple(kwargs[name].shape[:2]) for name in segments if name in kwargs})


@pytest.mark.parametrize(
    ("arguments", "source_rows", "rows"),
    [
        ({"guidance_scale": 1}, [2], 2),
        ({}, [2], 4),
        ({"image_guidance_scale": 1.6}, [2, 1], 6),
        ({"source_image_tokens": None}, [1], 4),
    ],
    ids=str,
)
def test_source_is_prefilled_once_per_image_and_each_step_is_one_forward(model, inputs, arguments, source_rows, rows):
    recorder = ForwardRecorder(model)
    output = model.generate(**{**inputs, **GREEDY, **arguments}, return_dict_in_generate=True)
    recorder.handle.remove()
    sources, (prompt, *steps) = recorder.calls[: len(source_rows)], recorder.calls[len(source_rows) :]
    assert sources == [{"source_image_tokens": (rows, NUM_IMAGE_TOKENS)} for rows in source_rows]
    assert prompt == {"prompt_embeds": (rows, NUM_TEXT_TOKENS)}
    assert steps == [{"target_image_tokens": (rows, 1)}] * (NUM_IMAGE_TOKENS - 1)
    assert output.num_decode_steps == len(steps)


# Processors, criteria, streamer.


class ForbidRepeats(LogitsProcessor):
    """A processor that needs the tokens so far; notes what it saw."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids.tolist(), scores.dtype, scores.isfinite().all().item()))
        return scores.scatter(1, input_ids, -torch.inf)


@pytest.mark.parametrize("settings", [GREEDY, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_processors_see_tokens_so_far_and_unfiltered_guided_logits(model, inputs, settings):
    processor = ForbidRepeats()
    tokens = model.generate(
        **inputs, **settings, generator=seed_generators(1, 2), logits_processor=LogitsProcessorList([processor])
    )
    assert all(len(set(row)) == NUM_IMAGE_TOKENS for row in tokens.tolist())
    expected = [(tokens[:, :position].tolist(), torch.float32, True) for position in range(NUM_IMAGE_TOKENS)]
    assert processor.seen == expected


def test_guidance_is_combined_in_float32(inputs):
    model = build_model().bfloat16()
    processor = ForbidRepeats()
    model.generate(
        inputs["source_image_tokens"], inputs["prompt_embeds"].bfloat16(), **GREEDY, logits_processor=[processor]
    )
    assert {dtype for _, dtype, _ in processor.seen} == {torch.float32}


class StopAfter(StoppingCriteria):
    """Stop row r after `lengths[r]` tokens; notes what it saw."""

    def __init__(self, *lengths):
        self.lengths = torch.tensor(lengths)
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return input_ids.shape[1] >= self.lengths


def test_decoding_ends_with_the_tokens_so_far_when_all_rows_are_to_stop(model, inputs):
    whole = model.generate(**inputs, **GREEDY)
    output = model.generate(
        **inputs, **GREEDY, stopping_criteria=StoppingCriteriaList([StopAfter(2, 4)]), return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, whole[:, :4])
    assert output.num_decode_steps == 3


def test_criteria_are_asked_after_every_token(model, inputs):
    criterion = StopAfter(100, 100)
    tokens = model.generate(**inputs, **GREEDY, stopping_criteria=[criterion])
    assert [seen.tolist() for seen in criterion.seen] == [
        tokens[:, : position + 1].tolist() for position in range(NUM_IMAGE_TOKENS)
    ]


class CollectTokens(BaseStreamer):
    def __init__(self):
        self.tokens, self.num_ends = [], 0

    def put(self, value):
        assert self.num_ends == 0
        self.tokens.append(value)

    def end(self):
        self.num_ends += 1


@pytest.mark.parametrize("stopping_criteria", [None, [StopAfter(3, 3)]], ids=["whole", "stopped"])
def test_streamer_gets_every_token_and_the_end(model, inputs, stopping_criteria):
    streamer = CollectTokens()
    tokens = model.generate(**inputs, **GREEDY, streamer=streamer, stopping_criteria=stopping_criteria)
    assert all(value.shape == (BATCH_SIZE, 1) for value in streamer.tokens)
    assert torch.equal(torch.cat(streamer.tokens, dim=1), tokens)
    assert streamer.num_ends == 1


# Settings.


def select_settings(generation_config):
    return resolve_settings(generation_config, None, {})._asdict()


def test_model_can_generate_with_the_published_settings(model):
    assert EditARForConditionalGeneration.can_generate()
    assert type(model.generation_config) is GenerationConfig
    assert select_settings(model.generation_config) == PUBLISHED


def test_defaults_are_the_published_settings_not_those_of_transformers(model, inputs):
    default = model.generate(**inputs, generator=seed_generators(1, 2))
    assert torch.equal(default, model.generate(**inputs, **PUBLISHED, generator=seed_generators(1, 2)))
    assert not torch.equal(default, model.generate(**inputs, **GREEDY))
    assert default.shape == (BATCH_SIZE, NUM_IMAGE_TOKENS)


def test_arguments_win_over_the_given_config_over_the_models_own(inputs):
    model = build_model()
    model.generation_config = GenerationConfig(do_sample=False, guidance_scale=1.0)
    before = copy.deepcopy(model.generation_config)
    assert torch.equal(model.generate(**inputs), model.generate(**inputs, **GREEDY, guidance_scale=1.0))

    # A plain config says only what it sets: this one leaves `do_sample=False` to the model's own.
    given = GenerationConfig(guidance_scale=7.5)
    tokens = model.generate(**inputs, generation_config=given)
    assert torch.equal(tokens, model.generate(**inputs, **GREEDY, guidance_scale=7.5))
    tokens = model.generate(**inputs, generation_config=given, guidance_scale=3.0)
    assert torch.equal(tokens, model.generate(**inputs, **GREEDY, guidance_scale=3.0))
    assert model.generation_config == before
    assert given == GenerationConfig(guidance_scale=7.5)


@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": False}, {"top_k": 0, "top_p": 0.9, "temperature": 0.7, "guidance_scale": 1.5}]
)
def test_generation_config_survives_saving_and_loading(tmp_path, settings):
    model = build_model()
    model.generation_config = GenerationConfig(**settings)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved.items() >= (settings if "do_sample" in settings else {**PUBLISHED, **settings}).items()
    # Every transformers setting that is said to have no effect raises here; on loading it would be a warning.
    GenerationConfig.from_pretrained(tmp_path).validate(strict=True)
    loaded = EditARForConditionalGeneration.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is GenerationConfig
    assert select_settings(loaded.generation_config) == {**PUBLISHED, **settings}
    loaded.save_pretrained(tmp_path / "again")
    again = EditARForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert again.generation_config == loaded.generation_config
    assert again.generation_config.do_sample is settings.get("do_sample", True)


@pytest.mark.parametrize("saved", [None, {"top_k": 7}], ids=["no file", "partial file"])
def test_settings_missing_on_disk_are_the_published_ones(tmp_path, saved):
    build_model().save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.unlink() if saved is None else path.write_text(json.dumps(saved))
    loaded = EditARForConditionalGeneration.from_pretrained(tmp_path)
    assert select_settings(loaded.generation_config) == {**PUBLISHED, **(saved or {})}


def test_settings_of_sampling_may_stay_in_a_greedy_config(model, inputs):
    greedy = {"generation_config": GenerationConfig(do_sample=False, temperature=0.3, top_k=7)}
    assert torch.equal(model.generate(**inputs, **greedy), model.generate(**inputs, **GREEDY))


def test_the_old_name_of_the_configuration_still_works_with_a_warning(model, inputs):
    with pytest.warns(FutureWarning, match=r"is now `transformers.GenerationConfig`"):
        from editar_hf.generation import EditARGenerationConfig
    settings = EditARGenerationConfig(do_sample=False)
    assert torch.equal(model.generate(**inputs, generation_config=settings), model.generate(**inputs, **GREEDY))


def test_the_old_name_of_the_number_of_decode_steps_still_works_with_a_warning(model, inputs):
    output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    with pytest.warns(FutureWarning, match="num_decode_steps"):
        assert output.num_passes == output.num_decode_steps


def test_generate_takes_no_argument_it_does_not_know(model, inputs):
    with pytest.raises(TypeError, match="max_new_tokens"):
        model.generate(**inputs, max_new_tokens=5)
    parameters = inspect.signature(model.generate).parameters.values()
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters)


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_embeds": None}, "`prompt_embeds` is None"),
        ({"prompt_embeds": torch.zeros(2, NUM_TEXT_TOKENS, 5)}, r"`prompt_embeds` has shape \(2, 4, 5\)"),
        ({"prompt_embeds": torch.zeros(2, 9, TEXT_HIDDEN_SIZE)}, r"`prompt_embeds` has shape \(2, 9, 12\)"),
        ({"prompt_embeds": torch.zeros(NUM_TEXT_TOKENS, TEXT_HIDDEN_SIZE)}, r"`prompt_embeds` has shape \(4, 12\)"),
        ({"prompt_embeds": torch.zeros(3, NUM_TEXT_TOKENS, TEXT_HIDDEN_SIZE)}, "`source_image_tokens` has batch size"),
        ({"negative_prompt_embeds": torch.zeros(2, 1, 12)}, r"`negative_prompt_embeds` has shape \(2, 1, 12\)"),
        ({"negative_prompt_embeds": torch.zeros(1, 4, 12)}, "`negative_prompt_embeds` has batch size 1"),
        ({"source_image_tokens": torch.zeros(2, 8, dtype=torch.long)}, r"`source_image_tokens` has shape \(2, 8\)"),
        ({"source_image_tokens": torch.zeros(9, dtype=torch.long)}, r"`source_image_tokens` has shape \(9,\)"),
        ({"source_image_tokens": torch.full((2, 9), VOCAB_SIZE)}, "ids from 50 to 50"),
        ({"source_image_tokens": torch.full((2, 9), -1)}, "ids from -1 to -1"),
        ({"source_image_tokens": None, "image_guidance_scale": 1.5}, "`image_guidance_scale` is 1.5"),
        ({"grid_height": GRID_SIZE + 1}, "`grid_height` × `grid_width` is 4 × 3"),
        ({"grid_width": 0}, "`grid_height` × `grid_width` is 3 × 0"),
        ({"temperature": 0.0}, "`temperature` is 0.0"),
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"temperature": -1.0, "do_sample": False}, "`temperature` is -1.0"),
        ({"temperature": float("nan")}, "`temperature` is nan"),
        ({"top_k": -1}, "`top_k` is -1"),
        ({"top_p": 0.0}, "`top_p` is 0.0"),
        ({"top_p": 1.5}, "`top_p` is 1.5"),
        ({"generator": seed_generators(1, 2, 3)}, "`generator` is a list of 3 for 2"),
        ({"generation_config": GenerationConfig(num_beams=4)}, "`num_beams` is 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused_before_any_forward(model, inputs, change, message):
    recorder = ForwardRecorder(model)
    with pytest.raises(ValueError, match=message):
        model.generate(**{**inputs, **change})
    recorder.handle.remove()
    assert recorder.calls == []


def test_greedy_decoding_does_not_mind_the_temperature(model, inputs):
    tokens = model.generate(**inputs, **GREEDY, temperature=0.0)
    assert torch.equal(tokens, model.generate(**inputs, **GREEDY))


def test_image_guidance_scale_of_one_needs_no_image(model, inputs):
    tokens = model.generate(None, inputs["prompt_embeds"], **GREEDY, image_guidance_scale=1)
    assert torch.equal(tokens, model.generate(None, inputs["prompt_embeds"], **GREEDY))
