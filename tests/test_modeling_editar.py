"""The decoder against the plain implementation of `plain_editar.py`, and what no second implementation can say."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from plain_editar import PlainEditAR, redraw
from safetensors.torch import load_file
from transformers import StaticCache

from editar_hf import EditARConfig, EditARForConditionalGeneration
from editar_hf.conversion import convert_transformer


GRID_SIZE, TEXT_LENGTH, TEXT_WIDTH, VOCAB, WIDTH = 4, 5, 16, 64, 32
GRIDS = [(4, 4), (2, 4), (3, 2), (1, 1)]


@pytest.fixture
def plain():
    return redraw(PlainEditAR(VOCAB, WIDTH, 2, 2, GRID_SIZE, TEXT_LENGTH, TEXT_WIDTH))


@pytest.fixture
def model(plain):
    return make_model(plain)


def make_model(plain, **overrides):
    """Build the model with the oracle's weights, and `overrides` in its configuration."""
    converted = convert_transformer(plain.state_dict(), num_attention_heads=2)
    model = EditARForConditionalGeneration(EditARConfig(**{**converted.config.to_diff_dict(), **overrides}))
    model.load_state_dict(converted.state_dict())
    return model.eval()


def draw_inputs(batch_size=4, grid=(GRID_SIZE, GRID_SIZE), seed=0):
    """Draw source tokens, text states and target tokens."""
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.randint(VOCAB, (2, batch_size, grid[0] * grid[1]), generator=generator)
    return source, torch.randn(batch_size, TEXT_LENGTH, TEXT_WIDTH, generator=generator), target


def grid_of(grid):
    return {"grid_height": grid[0], "grid_width": grid[1]}


EVERY_DROP = {"source": torch.tensor([False, False, True, True]), "text": torch.tensor([False, True, False, True])}


@pytest.mark.parametrize("grid", GRIDS)
def test_logits_match_the_plain_implementation_for_every_dropped_condition(plain, model, grid):
    source, text, target = draw_inputs(grid=grid)
    expected = plain(source, text, target, drop_source=EVERY_DROP["source"], drop_text=EVERY_DROP["text"], grid=grid)
    output = model(
        source,
        text,
        labels=target,
        drop_source=EVERY_DROP["source"],
        drop_prompt=EVERY_DROP["text"],
        **grid_of(grid),
    )
    assert expected.std() > 0.5
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_every_attention_implementation_gives_the_plain_logits(plain, model, attention):
    source, text, target = draw_inputs()
    model.set_attn_implementation(attention)
    # Flex attention compiles itself on first use, for half a minute; the same operation runs uncompiled.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = model(source, text, labels=target).logits
    torch.testing.assert_close(logits, plain(source, text, target), rtol=1e-4, atol=1e-4)


def test_no_dropped_sample_equals_no_drop_flags(model):
    source, text, target = draw_inputs()
    none = torch.zeros(4, dtype=torch.bool)
    flagged = model(source, text, labels=target, drop_source=none, drop_prompt=none)
    torch.testing.assert_close(flagged.logits, model(source, text, labels=target).logits, rtol=0, atol=0)


@pytest.mark.parametrize("grid", [(4, 4), (3, 2)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_decoding_matches_full_forward(plain, model, grid, attention):
    source, text, target = draw_inputs(grid=grid)
    model.set_attn_implementation(attention)
    prefix = model(source, use_cache=True, **grid_of(grid))
    assert prefix.logits is None
    cache = prefix.past_key_values
    steps = [model(prompt_embeds=text, past_key_values=cache, **grid_of(grid)).logits]
    for tokens in target[:, :-1].split([1, 2] + [1] * (target.shape[1] - 4), dim=1):
        steps.append(model(target_image_tokens=tokens, past_key_values=cache, **grid_of(grid)).logits)
    torch.testing.assert_close(torch.cat(steps, 1), plain(source, text, target, grid=grid), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_static_cache_with_a_fixed_mask_matches_full_forward(plain, model, attention):
    source, text, target = draw_inputs()
    model.set_attn_implementation(attention)
    prefix_length = source.shape[1] + TEXT_LENGTH
    num_slots = prefix_length + target.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=num_slots)
    mask = torch.zeros(4, num_slots, dtype=torch.long)
    mask[:, :prefix_length] = 1
    steps = [model(source, text, past_key_values=cache, attention_mask=mask).logits]
    for index in range(target.shape[1] - 1):
        mask[:, prefix_length + index] = 1
        step = model(
            target_image_tokens=target[:, index : index + 1],
            past_key_values=cache,
            attention_mask=mask,
            position_ids=torch.full((4, 1), prefix_length + index),
        )
        steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), plain(source, text, target), rtol=1e-4, atol=1e-4)


def test_source_keys_and_values_do_not_depend_on_the_prompt(model):
    source, text, _ = draw_inputs()
    caches = [
        model(source, prompt, drop_prompt=drop, use_cache=True).past_key_values
        for prompt, drop in ((text, None), (text.flip(0), None), (text, torch.ones(4, dtype=torch.bool)))
    ]
    num_source = source.shape[1]
    for layer in range(2):
        keys = [cache.layers[layer].keys for cache in caches]
        for other in keys[1:]:
            torch.testing.assert_close(keys[0][:, :, :num_source], other[:, :, :num_source])
    assert not torch.allclose(keys[0], keys[1]) or model.config.text_rotary == "zero"


def test_zero_text_rotary_spreads_attention_evenly_over_the_prompt(model):
    source, text, target = draw_inputs()
    model.set_attn_implementation("eager")
    num_source = source.shape[1]
    for weights in model(source, text, labels=target, output_attentions=True).attentions:
        over_text = weights[:, :, num_source + TEXT_LENGTH - 1 :, num_source : num_source + TEXT_LENGTH]
        torch.testing.assert_close(over_text, over_text[..., :1].expand_as(over_text))
        last_text = weights[:, :, num_source + TEXT_LENGTH - 1, : num_source + TEXT_LENGTH]
        torch.testing.assert_close(last_text, torch.full_like(last_text, 1 / (num_source + TEXT_LENGTH)))


def test_identity_text_rotary_attends_to_words_apart_and_leaves_them_unrotated(plain, model):
    source, text, target = draw_inputs()
    identity = make_model(plain, text_rotary="identity")
    identity.set_attn_implementation("eager")
    num_source = source.shape[1]
    output = identity(source, text, labels=target, output_attentions=True)
    over_text = output.attentions[0][:, :, num_source + TEXT_LENGTH :, num_source : num_source + TEXT_LENGTH]
    assert over_text.std(-1).mean() > 0.01
    assert not torch.allclose(output.logits, model(source, text, labels=target).logits, atol=1e-2)

    layer = identity.model.layers[0]
    normed = layer.input_layernorm(identity.model.text_projection(text))
    unrotated = layer.self_attn.k_proj(normed).unflatten(-1, (2, -1)).transpose(1, 2)
    cache = identity(source, text, use_cache=True).past_key_values
    torch.testing.assert_close(cache.layers[0].keys[:, :, num_source:], unrotated)


def test_token_predictions_see_no_later_token(model):
    source, text, target = draw_inputs()
    changed = target.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    difference = (model(source, text, labels=target).logits - model(source, text, labels=changed).logits).abs()
    assert difference[:, :8].max() == 0
    assert difference[:, 8:].amax((0, 2)).min() > 0


@pytest.mark.parametrize("num_target", [0, 1, 7, 15, 16])
def test_t_target_tokens_give_t_plus_one_logits_and_never_more_than_the_image_has(plain, model, num_target):
    source, text, target = draw_inputs()
    given = target[:, :num_target] if num_target else None
    logits = model(source, text, target_image_tokens=given).logits
    assert logits.shape == (4, min(num_target + 1, 16), VOCAB)
    torch.testing.assert_close(logits, plain(source, text, target)[:, : num_target + 1], rtol=1e-4, atol=1e-4)


def test_loss_is_the_mean_cross_entropy_of_labels_shifted_inside(plain, model):
    source, text, target = draw_inputs()
    loss = model(source, text, labels=target).loss
    torch.testing.assert_close(loss, plain.loss(source, text, target), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(source, text, labels=target, target_image_tokens=target).loss, loss)


def test_ignored_labels_leave_the_loss_but_not_the_input(model):
    source, text, target = draw_inputs()
    labels = target.clone()
    labels[:, 5:] = -100
    output = model(source, text, labels=labels, target_image_tokens=target)
    log_probabilities = output.logits.log_softmax(-1).gather(-1, target[..., None])[:, :5]
    torch.testing.assert_close(output.loss, -log_probabilities.mean())
    torch.testing.assert_close(output.logits, model(source, text, labels=target).logits)


def test_gradients_match_the_plain_implementation(plain, model):
    source, text, target = draw_inputs()
    plain.loss(source, text, target, drop_source=EVERY_DROP["source"], drop_text=EVERY_DROP["text"]).backward()
    model(source, text, labels=target, drop_source=EVERY_DROP["source"], drop_prompt=EVERY_DROP["text"]).loss.backward()
    pairs = [
        (plain.tok_embeddings, model.model.embed_tokens),
        (plain.cls_embedding.cap_proj.fc1, model.model.text_projection.fc1),
        (plain.layers[0].attention.wo, model.model.layers[0].self_attn.o_proj),
        (plain.layers[1].feed_forward.w1, model.model.layers[1].mlp.gate_proj),
        (plain.layers[0].ffn_norm, model.model.layers[0].post_attention_layernorm),
        (plain.output, model.lm_head),
    ]
    for theirs, ours in pairs:
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dropped", [False, True])
def test_every_parameter_gets_a_gradient_whatever_is_dropped(model, dropped):
    source, text, target = draw_inputs()
    drop = torch.full((4,), dropped)
    output = model(source, text, labels=target, drop_source=drop, drop_prompt=drop, output_distillation_features=True)
    (output.loss + output.distillation_features.square().mean()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_gradient_checkpointing_gives_the_same_gradients(plain):
    source, text, target = draw_inputs()
    gradients = []
    for checkpointing in (False, True):
        model = make_model(plain).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)  # the dropouts draw from the global generator
        model(source, text, labels=target).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert model.is_activation_checkpointing
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("grid", [(4, 4), (2, 4)])
def test_distillation_features_match_the_plain_implementation(plain, model, grid):
    source, text, target = draw_inputs(grid=grid)
    output = model(source, text, labels=target, output_distillation_features=True, **grid_of(grid))
    assert output.distillation_features.shape == (4, grid[0] * grid[1] // 4, 12)
    expected = plain.distillation_features(source, text, target, grid=grid)
    torch.testing.assert_close(output.distillation_features, expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_distillation_has_no_head(plain):
    config = EditARConfig(**{**make_model(plain).config.to_diff_dict(), "distillation_hidden_size": None})
    model = EditARForConditionalGeneration(config)
    assert not [name for name in model.state_dict() if "distillation" in name]
    source, text, target = draw_inputs()
    with pytest.raises(ValueError, match="distillation_hidden_size"):
        model(source, text, labels=target, output_distillation_features=True)


def test_distillation_needs_every_target_position(model):
    source, text, target = draw_inputs()
    with pytest.raises(ValueError, match="16 target positions; this call has 6"):
        model(source, text, target_image_tokens=target[:, :5], output_distillation_features=True)


def test_hidden_states_are_those_between_the_layers(plain, model):
    source, text, target = draw_inputs()
    output = model(source, text, labels=target, output_hidden_states=True)
    num_positions = 2 * source.shape[1] + TEXT_LENGTH - 1
    assert [tuple(states.shape) for states in output.hidden_states] == [(4, num_positions, WIDTH)] * 3
    captions = plain.cls_embedding.cap_proj(text)
    embedded = torch.cat([plain.tok_embeddings(source), captions, plain.tok_embeddings(target[:, :-1])], dim=1)
    torch.testing.assert_close(output.hidden_states[0], embedded)
    final = plain.hidden_states(source, text, target[:, :-1])
    torch.testing.assert_close(output.hidden_states[-1], final, rtol=1e-4, atol=1e-4)
    assert model(source, text, labels=target).hidden_states is None


# With a probability this close to 1 every entry is dropped, so a dropout at the published place equals a zero there.
ALMOST_ONE = 1 - 1e-9
DROPOUT_PLACES = {
    "text_dropout": [".text_projection.fc2."],
    "residual_dropout": [".o_proj."],
    "mlp_dropout": [".down_proj."],
    "attention_dropout": [".v_proj."],
}
NO_DROPOUT = dict.fromkeys(DROPOUT_PLACES, 0.0)


@pytest.mark.parametrize("dropout", DROPOUT_PLACES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dropout_acts_at_its_published_place_and_nowhere_else(plain, dropout, attention):
    source, text, target = draw_inputs()
    dropping = make_model(plain, **{**NO_DROPOUT, dropout: ALMOST_ONE}).train()
    dropping.set_attn_implementation(attention)
    zeroed = make_model(plain, **NO_DROPOUT).train()
    with torch.no_grad():
        for name, weight in zeroed.named_parameters():
            if any(place in name for place in DROPOUT_PLACES[dropout]):
                weight.zero_()
        dropped_logits = dropping(source, text, labels=target).logits
        torch.testing.assert_close(dropped_logits, zeroed(source, text, labels=target).logits, rtol=1e-4, atol=1e-4)
        whole_logits = dropping.eval()(source, text, labels=target).logits
    torch.testing.assert_close(whole_logits, plain(source, text, target), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dropped_logits, whole_logits, atol=1e-2)


def compute_dropped_places(model):
    """Run what ends in a dropout, and return its output by the dropout's name."""
    source, text, target = draw_inputs()
    layer, states = model.model.layers[0], torch.randn(4, 9, WIDTH, generator=torch.Generator().manual_seed(1))
    no_turn = torch.ones(1, 1, 9, WIDTH // 2), torch.zeros(1, 1, 9, WIDTH // 2)
    embedded = model(source, text, labels=target, output_hidden_states=True).hidden_states[0]
    return {
        "text_dropout": embedded[:, source.shape[1] : source.shape[1] + TEXT_LENGTH],
        "residual_dropout": layer.self_attn(states, None, no_turn)[0],
        "mlp_dropout": layer.mlp(states),
    }


@pytest.mark.parametrize("dropout", ["text_dropout", "residual_dropout", "mlp_dropout"])
def test_dropout_zeroes_entries_of_the_output_and_scales_the_rest(plain, dropout):
    model = make_model(plain, **{**NO_DROPOUT, dropout: 0.5})
    whole, dropped = compute_dropped_places(model), compute_dropped_places(model.train())
    for name in whole:
        kept = dropped[name] != 0
        scale = 2 if name == dropout else 1
        torch.testing.assert_close(dropped[name][kept], scale * whole[name][kept])
        assert abs(kept.float().mean() - 1 / scale) < 0.1


def test_published_dropout_is_the_default():
    config = EditARConfig()
    assert (config.text_dropout, config.residual_dropout, config.mlp_dropout) == (0.1, 0.1, 0.1)
    assert config.attention_dropout == 0


def test_null_embeddings_are_saved_loaded_and_never_trained(model, tmp_path):
    names = {"model.null_prompt_embeds", "model.null_image_embeds"}
    assert not names & {name for name, _ in model.named_parameters()}
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert names <= saved.keys()
    loaded = EditARForConditionalGeneration.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


def test_a_loaded_model_gives_the_same_logits(model, tmp_path):
    source, text, target = draw_inputs()
    model.save_pretrained(tmp_path)
    loaded = EditARForConditionalGeneration.from_pretrained(tmp_path)
    conditions = {"drop_source": EVERY_DROP["source"], "drop_prompt": EVERY_DROP["text"]}
    expected = model(source, text, labels=target, **conditions).logits
    torch.testing.assert_close(loaded(source, text, labels=target, **conditions).logits, expected, rtol=0, atol=0)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_bfloat16_loads_everything_in_bfloat16_and_stays_near_float32(model, tmp_path):
    source, text, target = draw_inputs()
    model.save_pretrained(tmp_path)
    half = EditARForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    conditions = {"labels": target, "drop_source": EVERY_DROP["source"], "drop_prompt": EVERY_DROP["text"]}
    output = half(source, text.to(torch.bfloat16), **conditions)
    expected = model(source, text, **conditions)
    assert output.logits.dtype == torch.bfloat16
    assert (output.logits - expected.logits).square().mean().sqrt() < 0.05 * expected.logits.std()
    assert math.isclose(output.loss.item(), expected.loss.item(), rel_tol=0.02)


def test_a_fresh_model_has_a_zero_head_and_null_embeddings_of_the_published_scale():
    config = EditARConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, grid_size=16, text_hidden_size=32
    )
    model = EditARForConditionalGeneration(config)
    assert model.lm_head.weight.abs().max() == 0
    assert math.isclose(model.model.null_image_embeds.std().item(), 64**-0.5, rel_tol=0.05)
    assert math.isclose(model.model.null_prompt_embeds.std().item(), 32**-0.5, rel_tol=0.05)
    for weight in (model.model.embed_tokens.weight, model.model.layers[0].mlp.down_proj.weight):
        assert math.isclose(weight.std().item(), 0.02, rel_tol=0.05)


# Source: LlamaGen (arXiv 2406.06525), table 1, in millions. The text projection and the null embeddings are not in it.
@pytest.mark.parametrize(
    ("preset", "millions"), [("GPT-B", 111), ("GPT-L", 343), ("GPT-XL", 775), ("GPT-XXL", 1400), ("GPT-3B", 3100)]
)
def test_presets_have_the_published_number_of_parameters(preset, millions):
    with torch.device("meta"):
        model = EditARForConditionalGeneration(EditARConfig.from_preset(preset))
    decoder = [
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.startswith(("model.text_projection", "distillation_head"))
    ]
    assert math.isclose(sum(decoder) / 1e6, millions, rel_tol=0.01 if millions < 1000 else 0.025)


BAD_INPUTS = {
    "nothing": ({}, "at least one of `source_image_tokens`"),
    "source count": ({"source_image_tokens": (1, 15)}, "`source_image_tokens` holds 15 tokens.* has 16"),
    "source count on a grid": ({"source_image_tokens": (1, 16), "grid_height": 2}, "holds 16 tokens.* has 8"),
    "grid too large": ({"source_image_tokens": (1, 20), "grid_height": 5}, "`grid_height` × `grid_width` is 5 × 4"),
    "empty grid": ({"source_image_tokens": (1, 0), "grid_width": 0}, "is 4 × 0"),
    "text width": ({"prompt_embeds": (1, 5, 15)}, r"`prompt_embeds` has shape \(1, 5, 15\); expected \(batch, 5, 16\)"),
    "text length": ({"prompt_embeds": (1, 4, 16)}, r"`prompt_embeds` has shape \(1, 4, 16\)"),
    "label count": (
        {"source_image_tokens": (1, 16), "prompt_embeds": (1, 5, 16), "labels": (1, 12)},
        "`labels` holds 12 tokens",
    ),
    "labels without a prompt": ({"source_image_tokens": (1, 16), "labels": (1, 16)}, "`labels` holds 16 tokens"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused_by_name(model, case):
    arguments, message = BAD_INPUTS[case]
    arguments = {
        name: value
        if isinstance(value, int)
        else torch.zeros(value, dtype=torch.float if name == "prompt_embeds" else torch.long)
        for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"hidden_size": 36, "num_attention_heads": 6}, "multiple of 4"),
        ({"text_dropout": 1.0}, "text_dropout"),
        ({"mlp_dropout": -0.1}, "mlp_dropout"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        EditARConfig(**arguments)


@pytest.mark.parametrize("arguments", [{"text_rotary": "none"}, {"vocab_size": "many"}])
def test_a_configuration_field_of_the_wrong_type_is_refused(arguments):
    with pytest.raises(StrictDataclassError, match=next(iter(arguments))):
        EditARConfig(**arguments)


def test_an_unknown_preset_is_refused_with_the_names_of_those_there_are():
    with pytest.raises(ValueError, match="GPT-XXL"):
        EditARConfig.from_preset("GPT-4")


def test_configuration_survives_saving(tmp_path):
    config = EditARConfig.from_preset("GPT-B", text_rotary="identity", distillation_hidden_size=None, grid_size=16)
    config.save_pretrained(tmp_path)
    assert EditARConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert config.num_image_tokens == 256
    assert config.head_dim == 64
