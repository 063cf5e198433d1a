"""The decoder against the plain implementation of `plain_editar.py`, and what no second implementation can say."""

import functools
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from plain_editar import PlainEditAR, redraw
from transformers import StaticCache

from editar_hf import EditARConfig, EditARForConditionalGeneration
from editar_hf.conversion import convert_transformer


GRID_SIZE, TEXT_LENGTH, TEXT_WIDTH, VOCAB, WIDTH = 4, 5, 16, 64, 32
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


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


# Every combination of dropped conditions, as the model and the plain implementation call them.
DROP = {
    "drop_source": torch.tensor([False, False, True, True]),
    "drop_prompt": torch.tensor([False, True, False, True]),
}
PLAIN_DROP = {"drop_source": DROP["drop_source"], "drop_text": DROP["drop_prompt"]}


@pytest.mark.parametrize("grid", [(4, 4), (2, 4), (3, 2), (1, 1)])
def test_logits_match_the_plain_implementation_for_every_dropped_condition(plain, model, grid):
    source, text, target = draw_inputs(grid=grid)
    expected = plain(source, text, target, **PLAIN_DROP, grid=grid)
    assert expected.std() > 0.5
    assert_close(model(source, text, labels=target, **DROP, **grid_of(grid)).logits, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_every_attention_implementation_gives_the_plain_logits(plain, model, attention):
    source, text, target = draw_inputs()
    model.set_attn_implementation(attention)
    # Flex attention compiles itself on first use, for half a minute; the same operation runs uncompiled.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = model(source, text, labels=target).logits
    assert_close(logits, plain(source, text, target))


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
    assert_close(torch.cat(steps, 1), plain(source, text, target, grid=grid))


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
    assert_close(torch.cat(steps, 1), plain(source, text, target))


def test_zero_text_rotary_spreads_attention_evenly_over_the_prompt(model):
    source, text, target = draw_inputs()
    model.set_attn_implementation("eager")
    prompt = slice(source.shape[1], source.shape[1] + TEXT_LENGTH)
    for weights in model(source, text, labels=target, output_attentions=True).attentions:
        over_text = weights[:, :, prompt.stop :, prompt]
        assert_close(over_text, over_text[..., :1].expand_as(over_text), atol=1e-6)
        last_text = weights[:, :, prompt.stop - 1, : prompt.stop]
        assert_close(last_text, torch.full_like(last_text, 1 / prompt.stop), atol=1e-6)


def test_identity_text_rotary_leaves_text_keys_unrotated(plain, model):
    source, text, target = draw_inputs()
    identity = make_model(plain, text_rotary="identity")
    assert not torch.allclose(identity(source, text, labels=target).logits, model(source, text, labels=target).logits)
    layer = identity.model.layers[0]
    normed = layer.input_layernorm(identity.model.text_projection(text))
    unrotated = layer.self_attn.k_proj(normed).unflatten(-1, (2, -1)).transpose(1, 2)
    cache = identity(source, text, use_cache=True).past_key_values
    assert_close(cache.layers[0].keys[:, :, source.shape[1] :], unrotated)


@pytest.mark.parametrize("num_target", [0, 1, 7, 15, 16])
def test_t_target_tokens_give_t_plus_one_logits_and_never_more_than_the_image_has(plain, model, num_target):
    source, text, target = draw_inputs()
    given = target[:, :num_target] if num_target else None
    logits = model(source, text, target_image_tokens=given).logits
    assert logits.shape == (4, min(num_target + 1, 16), VOCAB)
    assert_close(logits, plain(source, text, target)[:, : num_target + 1])


def test_loss_is_the_mean_cross_entropy_of_labels_shifted_inside(plain, model):
    source, text, target = draw_inputs()
    loss = model(source, text, labels=target).loss
    assert_close(loss, plain.loss(source, text, target))
    assert_close(model(source, text, labels=target, target_image_tokens=target).loss, loss)


def test_ignored_labels_leave_the_loss_but_not_the_input(model):
    source, text, target = draw_inputs()
    labels = target.clone()
    labels[:, 5:] = -100
    output = model(source, text, labels=labels, target_image_tokens=target)
    log_probabilities = output.logits.log_softmax(-1).gather(-1, target[..., None])[:, :5]
    assert_close(output.loss, -log_probabilities.mean())
    assert_close(output.logits, model(source, text, labels=target).logits)


def test_gradients_match_the_plain_implementation(plain, model):
    source, text, target = draw_inputs()
    plain.loss(source, text, target, **PLAIN_DROP).backward()
    model(source, text, labels=target, **DROP).loss.backward()
    pairs = [
        (plain.tok_embeddings, model.model.embed_tokens),
        (plain.cls_embedding.cap_proj.fc1, model.model.text_projection.fc1),
        (plain.layers[0].attention.wo, model.model.layers[0].self_attn.o_proj),
        (plain.layers[1].feed_forward.w1, model.model.layers[1].mlp.gate_proj),
        (plain.layers[0].ffn_norm, model.model.layers[0].post_attention_layernorm),
        (plain.output, model.lm_head),
    ]
    for theirs, ours in pairs:
        assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-3, atol=1e-6)


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
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)  # the dropouts draw from the global generator
        model(source, text, labels=target).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert model.model.gradient_checkpointing
    for name, gradient in gradients[0].items():
        if gradient is not None:
            assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("grid", [(4, 4), (2, 4)])
def test_distillation_features_match_the_plain_implementation(plain, model, grid):
    source, text, target = draw_inputs(grid=grid)
    output = model(source, text, labels=target, output_distillation_features=True, **grid_of(grid))
    assert output.distillation_features.shape == (4, grid[0] * grid[1] // 4, 12)
    expected = plain.distillation_features(source, text, target, grid=grid)
    assert_close(output.distillation_features, expected)


def test_hidden_states_are_those_between_the_layers(plain, model):
    source, text, target = draw_inputs()
    output = model(source, text, labels=target, output_hidden_states=True)
    num_positions = 2 * source.shape[1] + TEXT_LENGTH - 1
    assert [tuple(states.shape) for states in output.hidden_states] == [(4, num_positions, WIDTH)] * 3
    captions = plain.cls_embedding.cap_proj(text)
    embedded = torch.cat([plain.tok_embeddings(source), captions, plain.tok_embeddings(target[:, :-1])], dim=1)
    assert_close(output.hidden_states[0], embedded)
    final = plain.hidden_states(source, text, target[:, :-1])
    assert_close(output.hidden_states[-1], final)
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
        assert_close(dropped_logits, zeroed(source, text, labels=target).logits)
        whole_logits = dropping.eval()(source, text, labels=target).logits
    assert_close(whole_logits, plain(source, text, target))
    assert not torch.allclose(dropped_logits, whole_logits, atol=1e-2)


def test_a_loaded_model_is_the_same_with_null_embeddings_that_are_never_trained(model, tmp_path):
    source, text, target = draw_inputs()
    model.save_pretrained(tmp_path)
    loaded = EditARForConditionalGeneration.from_pretrained(tmp_path)
    expected = model(source, text, labels=target, **DROP).logits
    assert_close(loaded(source, text, labels=target, **DROP).logits, expected, rtol=0, atol=0)
    assert not {"model.null_prompt_embeds", "model.null_image_embeds"} & dict(loaded.named_parameters()).keys()
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


def test_bfloat16_loads_everything_in_bfloat16_and_stays_near_float32(model, tmp_path):
    source, text, target = draw_inputs()
    model.save_pretrained(tmp_path)
    half = EditARForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    output = half(source, text.to(torch.bfloat16), labels=target, **DROP)
    expected = model(source, text, labels=target, **DROP)
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


SOURCE, TEXT = torch.zeros(1, 16).long(), torch.zeros(1, 5, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source_image_tokens": SOURCE[:, :15]}, r"`source_image_tokens` has shape \(1, 15\); .* needs \(batch, 16\)"),
        ({"source_image_tokens": SOURCE, "grid_height": 2}, r"has shape \(1, 16\); .* needs \(batch, 8\)"),
        ({"source_image_tokens": SOURCE, "grid_height": 5}, "`grid_height` × `grid_width` is 5 × 4"),
        ({"source_image_tokens": SOURCE, "grid_width": 0}, "is 4 × 0"),
        ({"prompt_embeds": TEXT[..., :15]}, r"`prompt_embeds` has shape \(1, 5, 15\); pass \(batch, 5, 16\)"),
        ({"prompt_embeds": TEXT[:, :4]}, r"`prompt_embeds` has shape \(1, 4, 16\)"),
        (
            {"source_image_tokens": SOURCE, "prompt_embeds": TEXT, "labels": SOURCE[:, :12]},
            "`labels` holds 12 tokens",
        ),
        ({"source_image_tokens": SOURCE, "labels": SOURCE}, "`labels` holds 16 tokens"),
        (
            {"prompt_embeds": TEXT, "target_image_tokens": SOURCE[:, :5], "output_distillation_features": True},
            "this call has 6 target positions; pass all 16",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused_by_name(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_features_of_a_model_without_a_distillation_head_are_refused(model):
    config = EditARConfig(**{**model.config.to_diff_dict(), "distillation_hidden_size": None})
    model = EditARForConditionalGeneration(config)
    assert not [name for name in model.state_dict() if "distillation" in name]
    with pytest.raises(ValueError, match="distillation_hidden_size"):
        model(SOURCE, TEXT, labels=SOURCE, output_distillation_features=True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"hidden_size": 36, "num_attention_heads": 6}, "multiple of 4"),
        ({"text_dropout": 1.0}, "text_dropout"),
        ({"mlp_dropout": -0.1}, "mlp_dropout"),
        ({"name": "GPT-4"}, "GPT-XXL"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        EditARConfig.from_preset(**{"name": "GPT-B", **arguments})


@pytest.mark.parametrize("arguments", [{"text_rotary": "none"}, {"vocab_size": "many"}])
def test_a_configuration_field_of_the_wrong_type_is_refused(arguments):
    with pytest.raises(StrictDataclassError, match=next(iter(arguments))):
        EditARConfig(**arguments)
