"""Masks, drafts and source caches: each gives the tokens of the plain loop, in fewer passes or with less work."""

import copy
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from plain_decoding import compute_naive_logits, decode_batch_naively
from tiny import NUM_CODES, NUM_TEXT_TOKENS, TEXT_HIDDEN_SIZE, build_transformer
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from editar_hf.generation.cache import SharedSource, SourceCache, attend_to_sources


BATCH_SIZE, NUM_TOKENS = 2, 16
GREEDY = {"do_sample": False}
SETTINGS = [
    {"do_sample": False, "guidance_scale": 1},
    {"do_sample": False},
    {"do_sample": False, "image_guidance_scale": 1.6},
    {"top_k": 9, "temperature": 1.4},
    {"top_p": 0.8, "image_guidance_scale": 2.5},
]


@pytest.fixture(scope="module", params=["zero", "identity"])
def model(request):
    return build_transformer(text_rotary=request.param)


@pytest.fixture(scope="module")
def zero_model():
    return build_transformer(text_rotary="zero")


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "source_image_tokens": torch.randint(NUM_CODES, (BATCH_SIZE, NUM_TOKENS), generator=generator),
        "prompt_embeds": torch.randn(BATCH_SIZE, NUM_TEXT_TOKENS, TEXT_HIDDEN_SIZE, generator=generator),
    }


def draw_mask(*seeds, part=0.4):
    """A random mask for each seed."""
    rows = [torch.rand(NUM_TOKENS, generator=torch.Generator().manual_seed(seed)) < part for seed in seeds]
    return torch.stack(rows)


def seed_generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def decode_plainly(model, inputs, settings, **kwargs):
    """The plain loop with the seeds of generators 1 and 2."""
    seeds = [torch.randint(2**63 - 1, (), generator=generator).item() for generator in seed_generators(1, 2)]
    settings = {name: value for name, value in settings.items() if name != "do_sample"}
    is_sampled = len(settings) and ("top_k" in settings or "top_p" in settings)
    tokens = decode_batch_naively(model, **inputs, **settings, **kwargs, seeds=seeds if is_sampled else None)
    return torch.tensor(tokens)


def generate(model, inputs, **kwargs):
    return model.generate(**{**inputs, "generator": seed_generators(1, 2), **kwargs}, return_dict_in_generate=True)


def select_row(inputs, row):
    return {name: tensor[row : row + 1] for name, tensor in inputs.items()}


class PassRecorder:
    """Note what forwards bring of each segment, the cache of the last one, and how many logits they compute."""

    def __init__(self, model):
        self.passes, self.num_logits, self.cache = [], [], None
        self.handles = [
            model.register_forward_pre_hook(self.record_inputs, with_kwargs=True),
            model.lm_head.register_forward_hook(self.record_logits),
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def record_inputs(self, module, args, kwargs):
        segments = ("source_image_tokens", "prompt_embeds", "target_image_tokens")
        self.passes.append({name: tuple(kwargs[name].shape[:2]) for name in segments if name in kwargs})
        self.cache = kwargs.get("past_key_values")

    def record_logits(self, module, args, logits):
        self.num_logits.append(logits.shape[1])


class PreferSource(LogitsProcessor):
    """Choose the source's token, except at some positions; note what is seen."""

    def __init__(self, source_image_tokens, exceptions=()):
        self.source_image_tokens, self.exceptions, self.seen = source_image_tokens, exceptions, []

    def __call__(self, input_ids, scores):
        position = input_ids.shape[1]
        self.seen.append(input_ids.tolist())
        if position in self.exceptions:
            return scores
        preferred = self.source_image_tokens[:, position : position + 1]
        return scores.scatter_add(1, preferred, scores.new_full((len(scores), 1), 1e4))


class Listener(StoppingCriteria, BaseStreamer):
    """Note every token that is reported, to the criterion and to the streamer; stop after some."""

    def __init__(self, stop_after=NUM_TOKENS):
        self.stop_after, self.asked, self.put_tokens, self.num_ends = stop_after, [], [], 0

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.tolist())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.stop_after)

    def put(self, value):
        self.put_tokens.append(value)

    def end(self):
        self.num_ends += 1


# Masks


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_masked_tokens_are_those_of_the_plain_loop_with_the_same_tokens_forced(model, inputs, settings):
    edit_mask = draw_mask(1, 2)
    tokens = generate(model, inputs, **settings, edit_mask=edit_mask).sequences
    assert torch.equal(tokens, decode_plainly(model, inputs, settings, edit_mask=edit_mask))
    assert torch.equal(tokens[~edit_mask], inputs["source_image_tokens"][~edit_mask])


@pytest.mark.parametrize("free", [[0], [15], [3, 4, 9], [0, 15], list(range(16))], ids=str)
def test_a_mask_costs_a_pass_per_free_token_and_feeds_nothing_after_the_last(model, inputs, free):
    edit_mask = torch.zeros(1, NUM_TOKENS, dtype=torch.bool)
    edit_mask[:, free] = True
    with PassRecorder(model) as recorder:
        output = generate(model, select_row(inputs, 0), **GREEDY, edit_mask=edit_mask, generator=None)
    assert output.num_decode_steps == len(free) - 1
    source, text, *passes = recorder.passes
    assert list(source) == ["source_image_tokens"]
    assert text.get("target_image_tokens", (2, 0)) == (2, free[0]), "forced first tokens go in with the text"
    fed = [bring["target_image_tokens"][1] for bring in passes]
    assert fed == [after - before for before, after in pairwise(free)]
    assert recorder.num_logits == [1] * len(free), "the head runs where a token is chosen"


def test_a_mask_without_a_free_token_runs_nothing_and_keeps_the_source(model, inputs):
    listener = Listener()
    with PassRecorder(model) as recorder:
        output = generate(
            model, inputs, edit_mask=torch.zeros(BATCH_SIZE, NUM_TOKENS, dtype=torch.bool), stopping_criteria=[listener]
        )
    assert torch.equal(output.sequences, inputs["source_image_tokens"])
    assert (recorder.passes, output.num_decode_steps, len(listener.asked)) == ([], 0, NUM_TOKENS)


def test_rows_with_different_masks_get_the_tokens_they_get_alone(model, inputs):
    edit_mask = draw_mask(5, 6)
    together = generate(model, inputs, edit_mask=edit_mask).sequences
    for row in range(BATCH_SIZE):
        alone = generate(
            model, select_row(inputs, row), edit_mask=edit_mask[row : row + 1], generator=seed_generators(1 + row)
        )
        assert torch.equal(alone.sequences[0], together[row])


@pytest.mark.parametrize("free", [[140], [2, 140]], ids=str)
def test_forced_runs_of_more_queries_than_a_chunk_give_the_logits_of_one_forward(free):
    """With the text, 140 tokens are 150 queries; after it, 138."""
    model, record, num_tokens = build_transformer(grid_size=12), RecordLogits(), 144
    generator = torch.Generator().manual_seed(1)
    row = {
        "source_image_tokens": torch.randint(NUM_CODES, (1, num_tokens), generator=generator),
        "prompt_embeds": torch.randn(1, NUM_TEXT_TOKENS, TEXT_HIDDEN_SIZE, generator=generator),
    }
    edit_mask = torch.isin(torch.arange(num_tokens), torch.tensor(free))[None]
    generate(model, row, **GREEDY, edit_mask=edit_mask, logits_processor=[record], generator=None)
    plain = torch.stack([compute_plain_guided_logits(model, row, tokens) for tokens in record.tokens])
    assert [len(tokens) for tokens in record.tokens] == free
    assert (torch.stack(record.logits) - plain).abs().max() <= 1e-5 * plain.abs().max()


# Drafts


def test_a_speculative_pass_on_a_cpu_brings_eight_drafts(zero_model, inputs):
    with PassRecorder(zero_model) as recorder:
        generate(zero_model, select_row(inputs, 0), **GREEDY, decoding="speculative", generator=None)
    assert recorder.passes[1]["target_image_tokens"] == (2, 8), "for each branch"


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 40])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_speculative_tokens_are_those_of_the_plain_loop(model, inputs, settings, num_draft_tokens):
    how = {"decoding": "speculative", "num_draft_tokens": num_draft_tokens}
    tokens = generate(model, inputs, **settings, **how).sequences
    assert torch.equal(tokens, decode_plainly(model, inputs, settings))
    edit_mask = draw_mask(3, 4)
    masked = generate(model, inputs, **settings, **how, edit_mask=edit_mask).sequences
    assert torch.equal(masked, decode_plainly(model, inputs, settings, edit_mask=edit_mask))


@pytest.mark.parametrize(
    ("exceptions", "num_passes"),
    [((), 3), ((2,), 3), ((4,), 3), ((3, 9), 4)],
    ids=["all hold", "one fails in the text pass", "one fails where a pass ends", "two fail"],
)
def test_drafts_that_hold_save_passes(model, inputs, exceptions, num_passes):
    """With four drafts a pass decides up to five tokens: 0–4, 5–9, 10–14 and 15, unless a draft fails before.

    With 3 and 9 changed: 0–3, 4–8, 9, 10–14 and 15. The first of these belongs to the text.
    """
    row = select_row(inputs, 0)
    processor = PreferSource(row["source_image_tokens"], exceptions)
    how = {"decoding": "speculative", "num_draft_tokens": 4, "logits_processor": [processor], "generator": None}
    output = generate(model, row, **GREEDY, **how)
    changed = (output.sequences != row["source_image_tokens"])[0].nonzero()[:, 0].tolist()
    assert changed == list(exceptions), "the test needs a model that changes exactly these"
    assert output.num_decode_steps == num_passes


def test_rows_advance_by_the_smallest_number_accepted(model, inputs):
    """One row's drafts hold throughout, the other's never: a pass decides what the second may, one token."""

    class PreferInFirstRow(PreferSource):
        def __call__(self, input_ids, scores):
            return torch.cat([super().__call__(input_ids, scores)[:1], scores[1:]])

    processor = PreferInFirstRow(inputs["source_image_tokens"])
    how = {"decoding": "speculative", "num_draft_tokens": 4, "logits_processor": [processor]}
    output = generate(model, inputs, **GREEDY, **how)
    assert torch.equal(output.sequences[0], inputs["source_image_tokens"][0])
    alone = generate(model, select_row(inputs, 1), **GREEDY, decoding="speculative", num_draft_tokens=4, generator=None)
    assert torch.equal(output.sequences[1], alone.sequences[0])


def test_what_was_chosen_after_a_failed_draft_is_the_next_draft(inputs):
    """All tokens look alike to this model: what it chooses after wrong drafts is right, and holds in the next pass."""
    model = build_transformer()
    weight = model.model.embed_tokens.weight.data
    weight.copy_(weight[:1].clone().expand_as(weight))
    row = select_row(inputs, 0)
    target = generate(model, row, generator=seed_generators(1)).sequences
    wrong_everywhere = {**row, "source_image_tokens": (target + 1) % NUM_CODES}
    how = {"decoding": "speculative", "num_draft_tokens": NUM_TOKENS, "generator": seed_generators(1)}
    output = generate(model, wrong_everywhere, **how)
    assert torch.equal(output.sequences, target)
    assert output.num_decode_steps == 1


@pytest.mark.parametrize("is_masked", [False, True])
def test_processors_see_in_speculative_decoding_what_they_see_in_exact(model, inputs, is_masked):
    edit_mask = draw_mask(3, 4) if is_masked else None
    seen = []
    for how in ({}, {"decoding": "speculative", "num_draft_tokens": 5}):
        processor = PreferSource(inputs["source_image_tokens"], exceptions=(1, 2, 7, 8, 12))
        output = generate(model, inputs, **how, edit_mask=edit_mask, logits_processor=[processor])
        seen.append((output.sequences.tolist(), processor.seen))
    assert seen[0] == seen[1]
    is_free = torch.ones(NUM_TOKENS, dtype=torch.bool) if edit_mask is None else edit_mask.any(dim=0)
    assert len(seen[0][1]) == is_free.sum(), "once for every token that is chosen"


@pytest.mark.parametrize("how", [{}, {"decoding": "speculative", "num_draft_tokens": 5}], ids=["exact", "speculative"])
@pytest.mark.parametrize("stop_after", [1, 6, NUM_TOKENS])
def test_criteria_and_streamer_hear_of_every_token_in_order_forced_ones_included(model, inputs, how, stop_after):
    edit_mask = draw_mask(3, 4)
    whole = generate(model, inputs, edit_mask=edit_mask).sequences
    listener = Listener(stop_after)
    output = generate(model, inputs, **how, edit_mask=edit_mask, stopping_criteria=[listener], streamer=listener)
    assert torch.equal(output.sequences, whole[:, :stop_after])
    assert listener.asked == [whole[:, : end + 1].tolist() for end in range(stop_after)]
    assert torch.equal(torch.cat(listener.put_tokens, dim=1), whole[:, :stop_after])
    assert listener.num_ends == 1


# Sources that are shared, and kept


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("mask_seeds", [None, (1, 2)], ids=["whole", "masked"])
def test_tokens_are_the_same_with_a_source_cache(model, inputs, settings, mask_seeds):
    edit_mask = None if mask_seeds is None else draw_mask(*mask_seeds)
    cache = model.prepare_source_cache(inputs["source_image_tokens"])
    known = {"source_image_tokens": None, "source_cache": cache}
    for _ in range(2):  # nothing a call does may change the cache
        cached = generate(model, inputs, **settings, **known, edit_mask=edit_mask)
        assert torch.equal(cached.sequences, generate(model, inputs, **settings, edit_mask=edit_mask).sequences)


def test_source_is_not_run_again_with_a_cache(inputs):
    model = build_transformer(grid_size=6)
    cache = model.prepare_source_cache(torch.arange(72).view(2, 36) % NUM_CODES)
    with PassRecorder(model) as recorder:
        generate(model, {"prompt_embeds": inputs["prompt_embeds"]}, **GREEDY, source_cache=cache)
    assert not any("source_image_tokens" in bring for bring in recorder.passes)


def test_one_cached_source_serves_every_prompt(model, inputs):
    cache = model.prepare_source_cache(inputs["source_image_tokens"][:1])
    tokens = generate(model, {"prompt_embeds": inputs["prompt_embeds"]}, source_cache=cache).sequences
    repeated = inputs["source_image_tokens"][:1].repeat(2, 1)
    assert torch.equal(tokens, generate(model, {**inputs, "source_image_tokens": repeated}).sequences)


@pytest.mark.parametrize(("rows", "num_sources"), [([0, 0, 0, 0], 1), ([0, 0, 1, 1], 2), ([0, 1, 1, 1], 4)], ids=str)
def test_images_of_one_source_share_its_prefill_and_get_the_tokens_they_get_alone(model, inputs, rows, num_sources):
    source = inputs["source_image_tokens"][rows]
    prompts = torch.cat([inputs["prompt_embeds"], inputs["prompt_embeds"].flip(0)])
    arguments = {"image_guidance_scale": 1.6}
    with PassRecorder(model) as recorder:
        together = model.generate(source, prompts, **arguments, generator=seed_generators(1, 2, 3, 4))
    sources = [bring["source_image_tokens"][0] for bring in recorder.passes if "source_image_tokens" in bring]
    assert sources == [num_sources, 1], "and one null image"
    for row in range(4):
        one = slice(row, row + 1)
        alone = model.generate(source[one], prompts[one], **arguments, generator=seed_generators(row + 1))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(
    ("dtype", "num_images"),
    [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1), (torch.bfloat16, 2)],
    ids=str,
)
def test_branches_and_images_read_one_stored_source(zero_model, inputs, dtype, num_images):
    model = copy.deepcopy(zero_model).to(dtype)
    source, prompts = inputs["source_image_tokens"][:1].repeat(num_images, 1), inputs["prompt_embeds"][:num_images]
    with PassRecorder(model) as recorder:
        model.generate(source, prompts.to(dtype), **GREEDY)
    assert recorder.cache.layers[0].keys.shape[::2] == (2 * num_images, NUM_TEXT_TOKENS + NUM_TOKENS - 1)
    assert [len(source.cache.keys[0]) for source in recorder.cache.sources] == [1]


def attend(query, source_keys, source_values, num_images, keys, values, bias):
    """Attend as one layer of the decoder does, to one block of sources."""
    source = SourceCache(source_keys, [source_keys], [source_values], 1, source_keys.shape[2])
    sources = [SharedSource(source, len(query), num_images)]
    layer = SimpleNamespace(layer_idx=0)
    output, _ = attend_to_sources(layer, query, keys, values, bias[None, None], 0.25, sources)
    return output.transpose(1, 2)


def test_attention_to_shared_sources_in_bf16_is_that_to_copies_up_to_rounding():
    """Two branches of four images, two of each source: rows 0, 1, 4 and 5 read the first."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, 4, 40, 16, generator=generator).bfloat16()

    prefix_keys, prefix_values, (query, keys, values) = draw(2), draw(2), draw(3, 8)
    bias = torch.full((40, 40), -math.inf).triu(1)
    shared = attend(query, prefix_keys, prefix_values, 4, keys, values, bias)
    rows = [0, 0, 1, 1] * 2
    keys, values = torch.cat([prefix_keys[rows], keys], dim=2), torch.cat([prefix_values[rows], values], dim=2)
    bias = torch.cat([torch.zeros(40, 40), bias], dim=1).double()
    exact = F.scaled_dot_product_attention(*(x.double() for x in (query, keys, values)), attn_mask=bias, scale=0.25)
    assert (shared - exact).square().mean().sqrt() < torch.finfo(torch.bfloat16).eps * exact.std()


class RecordLogits(LogitsProcessor):
    def __init__(self):
        self.tokens, self.logits = [], []

    def __call__(self, input_ids, scores):
        self.tokens.append(input_ids[0].tolist())
        self.logits.append(scores[0].double())
        return scores


def compute_plain_guided_logits(model, row, tokens):
    source, prompt = row["source_image_tokens"][0], row["prompt_embeds"][0].to(model.dtype)
    grid = (model.config.grid_size, model.config.grid_size)
    with torch.no_grad():
        both, image = (
            torch.from_numpy(compute_naive_logits(model, source, prompt, False, drop, tokens, *grid))
            for drop in (False, True)
        )
    return image + 3.0 * (both - image)


@pytest.mark.parametrize("how", [{}, {"decoding": "speculative", "num_draft_tokens": 5}], ids=["exact", "speculative"])
def test_logits_are_those_of_one_forward_over_the_whole_sequence(model, inputs, how):
    row, record = select_row(inputs, 0), RecordLogits()
    mask = {"edit_mask": draw_mask(7, part=0.6), "source_cache": model.prepare_source_cache(row["source_image_tokens"])}
    generate(model, row, **how, **mask, logits_processor=[record], generator=None)
    plain = torch.stack([compute_plain_guided_logits(model, row, tokens) for tokens in record.tokens])
    assert len(plain) > 5
    assert (torch.stack(record.logits) - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize("num_images", [1, 2], ids=["one image", "two images"])
def test_logits_in_bf16_are_as_near_to_fp32_as_those_of_one_forward(model, inputs, num_images):
    coarse = copy.deepcopy(model).bfloat16()
    row = select_row(inputs, 0)
    record = RecordLogits()
    coarse.generate(
        row["source_image_tokens"].repeat(num_images, 1),
        inputs["prompt_embeds"][:num_images].bfloat16(),
        edit_mask=draw_mask(7, part=0.6).repeat(num_images, 1),
        logits_processor=[record],
        generator=seed_generators(*range(1, 1 + num_images)),
    )
    fine, plain = (
        torch.stack([compute_plain_guided_logits(one, row, tokens) for tokens in record.tokens])
        for one in (copy.deepcopy(coarse).float(), coarse)
    )
    errors = [(logits - fine).square().mean().sqrt() for logits in (torch.stack(record.logits), plain)]
    assert errors[0] <= 1.3 * errors[1], errors
    assert errors[1] < 0.1 * fine.std(), "not vacuous"


# Bad input


def spoil(cache, **changes):
    spoiled = copy.copy(cache)
    for name, value in changes.items():
        setattr(spoiled, name, value)
    return spoiled


def test_a_cache_that_does_not_fit_is_refused(zero_model, inputs):
    cache = zero_model.prepare_source_cache(inputs["source_image_tokens"])
    prompts = {"prompt_embeds": inputs["prompt_embeds"]}
    refusals = [
        ({"source_image_tokens": inputs["source_image_tokens"].flip(0), "source_cache": cache}, "is of other images"),
        ({"source_cache": cache, "grid_height": 2}, "is of a grid of 4 × 4 tokens, this call of 2 × 4"),
        ({"source_cache": spoil(cache, keys=[keys.bfloat16() for keys in cache.keys])}, "is torch.bfloat16 on cpu and"),
        ({"source_cache": spoil(cache, keys=[keys.to("meta") for keys in cache.keys])}, "float32 on meta and the"),
        ({"source_cache": zero_model.prepare_source_cache(torch.zeros(3, 16, dtype=torch.long))}, "holds 3 images and"),
    ]
    for arguments, message in refusals:
        with PassRecorder(zero_model) as recorder, pytest.raises(ValueError, match=f"`source_cache`.*{message}"):
            zero_model.generate(**{**prompts, **arguments})
        assert recorder.passes == []


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_a_cache_made_before_the_weights_changed_is_refused(inputs, name):
    model = build_transformer(text_rotary="zero")
    cache = model.prepare_source_cache(inputs["source_image_tokens"])
    with torch.no_grad():
        getattr(model.model.layers[0].self_attn, name).weight += 0.05
    with pytest.raises(ValueError, match="`source_cache` is of another decoder, or of this one with other weights"):
        model.generate(prompt_embeds=inputs["prompt_embeds"], source_cache=cache)


def test_a_cache_outlives_other_threads_another_head_and_a_file(inputs, tmp_path):
    model = build_transformer(text_rotary="zero")
    torch.save(model.prepare_source_cache(inputs["source_image_tokens"]), tmp_path / "cache.pt")
    cache = torch.load(tmp_path / "cache.pt", weights_only=False)
    torch.nn.init.normal_(model.lm_head.weight)
    try:
        torch.set_num_threads(2)
        tokens = model.generate(prompt_embeds=inputs["prompt_embeds"], **GREEDY, source_cache=cache)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(tokens, model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("modules_to_save", [None, ["up_proj"]])
def test_a_cache_made_with_an_adapter_is_of_the_decoder_that_has_it(inputs, modules_to_save):
    model = build_transformer(text_rotary="zero")
    known = {"prompt_embeds": inputs["prompt_embeds"], **GREEDY}
    plain = model.prepare_source_cache(inputs["source_image_tokens"])
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=modules_to_save))
    adapted = model.prepare_source_cache(inputs["source_image_tokens"])

    def check(good, bad):
        model.generate(**known, source_cache=good)
        with pytest.raises(ValueError, match="`source_cache` is of another decoder"):
            model.generate(**known, source_cache=bad)

    check(adapted, plain)
    with peft_model.disable_adapter():
        check(plain, adapted)
    layer = model.model.layers[0].self_attn.q_proj
    layer.set_scale("default", 0.5)
    check(model.prepare_source_cache(inputs["source_image_tokens"]), adapted)


def change_slightly(weight):
    weight *= 1 + 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight.dtype)


def replace_most_embeddings(weight):
    if len(weight) == NUM_CODES:
        weight[2:] = weight[2:].flip(0).clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [change_slightly, replace_most_embeddings])
def test_a_cache_of_a_similar_decoder_is_refused(inputs, dtype, change):
    model = build_transformer(text_rotary="zero").to(dtype)
    prompts = {"prompt_embeds": inputs["prompt_embeds"].to(dtype)}
    cache = model.prepare_source_cache(inputs["source_image_tokens"])
    model.generate(**prompts, **GREEDY, source_cache=cache)
    with torch.no_grad():
        for parameter in model.model.parameters():
            change(parameter)
    with pytest.raises(ValueError, match=r"`source_cache` is of another decoder.*prepare it again with"):
        model.generate(**prompts, source_cache=cache)


BAD_INPUT = [
    ({"edit_mask": torch.ones(2, 15, dtype=torch.bool)}, r"`edit_mask` is torch.bool of shape \(2, 15\)"),
    ({"edit_mask": torch.ones(2, 16)}, "`edit_mask` is torch.float32"),
    ({"edit_mask": torch.ones(2, 16, dtype=torch.bool), "source_image_tokens": None}, "`edit_mask` is given without"),
    ({"decoding": "jacobi"}, "`decoding` is 'jacobi'"),
    ({"decoding": "speculative", "source_image_tokens": None}, "`decoding` is 'speculative', which drafts from"),
    ({"decoding": "speculative", "num_draft_tokens": 0}, "`num_draft_tokens` is 0"),
    ({"num_draft_tokens": 3}, "`num_draft_tokens` is 3"),
]


@pytest.mark.parametrize(("change", "message"), BAD_INPUT, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_refused_before_any_forward(zero_model, inputs, change, message):
    with PassRecorder(zero_model) as recorder, pytest.raises(ValueError, match=message):
        zero_model.generate(**{**inputs, **change})
    assert recorder.passes == []
