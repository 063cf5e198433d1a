"""The work of decoding: its passes, what is told of them, the sources they share, and the caches of sources."""

import copy
import functools
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_decoding import (
    GREEDY,
    PassRecorder,
    compute_naive_logits,
    draw_inputs,
    draw_mask,
    seed_generators,
    select_row,
)
from tiny import NUM_CODES, NUM_TEXT_TOKENS, build_transformer
from torch.overrides import TorchFunctionMode
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from editar_hf.generation.cache import copy_to_one_block, join_caches
from editar_hf.generation.decoding import TokenDecoder, decode_target_tokens
from editar_hf.generation.sampling import DecodingSettings, TokenSelector, compute_noise_keys, select_branches


NUM_TOKENS = 16
WAYS = pytest.mark.parametrize("way", [{}, {"decoding": "speculative", "num_draft_tokens": 5}], ids=["exact", "drafts"])
INPUTS = draw_inputs()
ROW, SOURCE = select_row(INPUTS, 0), INPUTS["source_image_tokens"]
PROMPTS = {"prompt_embeds": INPUTS["prompt_embeds"]}


@pytest.fixture(scope="module")
def model():
    return build_transformer()


def generate(model, inputs, **kwargs):
    return model.generate(**{**inputs, "generator": seed_generators(1, 2), **kwargs}, return_dict_in_generate=True)


class PreferSource(LogitsProcessor):
    """Choose the source's token in some rows, except at some positions; note what is seen."""

    def __init__(self, rows=slice(None), exceptions=()):
        self.rows, self.exceptions, self.seen = rows, exceptions, []

    def __call__(self, input_ids, scores):
        position = input_ids.shape[1]
        self.seen.append((input_ids.tolist(), scores.dtype, scores.isfinite().all().item()))
        if position not in self.exceptions:
            scores = scores.clone()
            rows = torch.arange(len(scores))[self.rows]
            scores[rows, SOURCE[: len(scores), position][self.rows]] = 1e4
        return scores


class Listener(StoppingCriteria, BaseStreamer):
    """Note every token that is reported, to the criterion and to the streamer; stop each row after some."""

    def __init__(self, *stop_after):
        self.stop_after, self.asked, self.put_tokens, self.num_ends = torch.tensor(stop_after), [], [], 0

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.tolist())
        return input_ids.shape[1] >= self.stop_after

    def put(self, value):
        self.put_tokens.append(value)

    def end(self):
        self.num_ends += 1


class RecordLogits(LogitsProcessor):
    def __init__(self):
        self.tokens, self.logits = [], []

    def __call__(self, input_ids, scores):
        self.tokens.append(input_ids[0].tolist())
        self.logits.append(scores[0].double())
        return scores


# Passes


@pytest.mark.parametrize(
    ("change", "source_rows", "num_branches"),
    [
        ({"guidance_scale": 1}, [2], 1),
        ({}, [2], 2),
        ({"image_guidance_scale": 1.6}, [2, 1], 3),
        ({"source_image_tokens": None}, [1], 2),
    ],
    ids=str,
)
def test_sources_null_image_and_null_text_are_run_once_and_each_token_is_one_forward(
    model, change, source_rows, num_branches
):
    with PassRecorder(model) as recorder:
        output = generate(model, {**INPUTS, **GREEDY, **change})
    sources, (prompt, *steps) = recorder.passes[: len(source_rows)], recorder.passes[len(source_rows) :]
    null_text = {"prompt_embeds": NUM_TEXT_TOKENS} if num_branches > 1 else {}
    segments = {"source_image_tokens": NUM_TOKENS, **null_text}
    assert sources == [{name: (rows, length) for name, length in segments.items()} for rows in source_rows]
    assert prompt == {"prompt_embeds": (2, NUM_TEXT_TOKENS)}
    assert steps == [{"target_image_tokens": (2 * num_branches, 1)}] * (NUM_TOKENS - 1)
    assert output.num_decode_steps == len(steps)


@pytest.mark.parametrize("free", [[0], [15], [3, 4, 9], [0, 15], list(range(16))], ids=str)
def test_a_mask_costs_a_pass_per_free_token_and_feeds_nothing_after_the_last(model, free):
    edit_mask = torch.zeros(1, NUM_TOKENS, dtype=torch.bool)
    edit_mask[:, free] = True
    with PassRecorder(model) as recorder:
        output = generate(model, ROW, **GREEDY, edit_mask=edit_mask, generator=None)
    _, _, *passes = recorder.passes
    assert output.num_decode_steps == len(passes)
    fed = [bring["target_image_tokens"][1] for bring in passes]
    # The text chooses token 0 without a pass.
    assert fed == [after - before for before, after in pairwise([0, *free]) if after > 0]
    assert recorder.num_logits == [1, 1] + [1] * len(passes), "the head runs for the texts, and where a token is chosen"


def test_a_mask_without_a_free_token_runs_nothing_and_keeps_the_source(model):
    with PassRecorder(model) as recorder:
        output = generate(model, INPUTS, edit_mask=torch.zeros(2, NUM_TOKENS, dtype=torch.bool))
    assert torch.equal(output.sequences, SOURCE)
    assert (recorder.passes, output.num_decode_steps) == ([], 0)


def test_a_speculative_pass_on_a_cpu_brings_eight_drafts(model):
    with PassRecorder(model) as recorder:
        generate(model, ROW, **GREEDY, decoding="speculative", generator=None)
    assert recorder.passes[2]["target_image_tokens"] == (2, 9), "for each branch: a token and its drafts"


@pytest.mark.parametrize(
    ("exceptions", "num_decode_steps"),
    [((), 3), ((2,), 4), ((5,), 3), ((3, 9), 5)],
    ids=["all hold", "one fails", "one fails where a pass ends", "two fail"],
)
def test_drafts_that_hold_save_passes(model, exceptions, num_decode_steps):
    """With four drafts a pass decides up to five tokens: 1–5, 6–10 and 11–15, unless a draft fails before.

    With 3 and 9 changed: 1–3, 4–8, 9, 10–14 and 15. The text decides token 0.
    """
    how = {"decoding": "speculative", "num_draft_tokens": 4, "generator": None}
    output = generate(model, ROW, **GREEDY, **how, logits_processor=[PreferSource(exceptions=exceptions)])
    changed = (output.sequences != SOURCE[:1])[0].nonzero()[:, 0].tolist()
    assert changed == list(exceptions), "the test needs a model that changes exactly these"
    assert output.num_decode_steps == num_decode_steps


def test_rows_advance_by_the_smallest_number_accepted(model):
    """One row's drafts hold throughout, the other's hardly ever."""
    how = {**GREEDY, "decoding": "speculative", "num_draft_tokens": 4}
    output = generate(model, INPUTS, **how, logits_processor=[PreferSource(rows=slice(1))])
    assert torch.equal(output.sequences[0], SOURCE[0])
    alone = generate(model, select_row(INPUTS, 1), **how, generator=None)
    assert torch.equal(output.sequences[1], alone.sequences[0])


def test_what_was_chosen_after_a_failed_draft_is_the_next_draft():
    """All tokens look alike to this model: what it chooses after wrong drafts is right, and holds in the next pass."""
    model = build_transformer()
    weight = model.model.embed_tokens.weight.data
    weight.copy_(weight[:1].clone().expand_as(weight))
    target = generate(model, ROW, generator=seed_generators(1)).sequences
    wrong_everywhere = {**ROW, "source_image_tokens": (target + 1) % NUM_CODES}
    how = {"decoding": "speculative", "num_draft_tokens": NUM_TOKENS, "generator": seed_generators(1)}
    output = generate(model, wrong_everywhere, **how)
    assert torch.equal(output.sequences, target)
    assert output.num_decode_steps == 2


class WaitCounter(TorchFunctionMode):
    """Count calls that would wait for a GPU."""

    WAITS = frozenset({"item", "cpu", "numpy", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"})

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in self.WAITS:
            self.waits.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_drafts", [0, 5], ids=["exact", "drafts"])
def test_decoding_reads_nothing_from_the_device_between_two_tokens(model, num_drafts):
    settings, cpu = DecodingSettings(top_k=5, top_p=0.9), torch.device("cpu")
    selector = TokenSelector(settings, 1, [], cpu, compute_noise_keys(torch.arange(2), NUM_TOKENS), draw_mask(3, 4))
    arguments = None, select_branches(3.0, 1), {"grid_height": 4, "grid_width": 4}, SOURCE.clone(), selector
    decoder = TokenDecoder(model, SOURCE, INPUTS["prompt_embeds"], *arguments)
    with torch.no_grad():
        tokens = decode_target_tokens(decoder, range(NUM_TOKENS), num_drafts)
        next(tokens)
        with WaitCounter() as counter:
            assert len(list(tokens)) == NUM_TOKENS - 1
    # Speculative decoding reads once in a pass how many drafts hold.
    assert counter.waits == ["__int__"] * (decoder.num_passes if num_drafts else 0)


# Processors, criteria, streamer


@pytest.mark.parametrize("settings", [GREEDY, {"top_k": 5, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_processors_see_in_every_way_the_tokens_so_far_and_unfiltered_fp32_logits(model, settings, dtype):
    model, prompts = copy.deepcopy(model).to(dtype), INPUTS["prompt_embeds"].to(dtype)
    for edit_mask in (None, draw_mask(3, 4)):
        free = range(NUM_TOKENS) if edit_mask is None else edit_mask.any(dim=0).nonzero()[:, 0].tolist()
        for way in ({}, {"decoding": "speculative", "num_draft_tokens": 5}) if dtype == torch.float32 else ({},):
            processor = PreferSource(exceptions=(1, 2, 7, 8, 12))
            how = {**settings, **way, "edit_mask": edit_mask, "prompt_embeds": prompts}
            tokens = generate(model, INPUTS, **how, logits_processor=[processor]).sequences
            assert processor.seen == [(tokens[:, :position].tolist(), torch.float32, True) for position in free]


@WAYS
@pytest.mark.parametrize("lengths", [(1, 1), (2, 6), (NUM_TOKENS, 3)], ids=str)
@pytest.mark.parametrize("is_masked", [False, True], ids=["whole", "masked"])
def test_criteria_and_streamer_hear_of_every_token_until_all_rows_are_to_stop(model, way, lengths, is_masked):
    how = {"edit_mask": draw_mask(3, 4) if is_masked else None}
    whole, listener = generate(model, INPUTS, **how).sequences, Listener(*lengths)
    output = generate(model, INPUTS, **way, **how, stopping_criteria=[listener], streamer=listener)
    assert torch.equal(output.sequences, whole[:, : max(lengths)])
    assert listener.asked == [whole[:, : end + 1].tolist() for end in range(max(lengths))]
    assert all(tokens.shape == (2, 1) for tokens in listener.put_tokens)
    assert torch.equal(torch.cat(listener.put_tokens, dim=1), output.sequences)
    assert listener.num_ends == 1


# Logits, and shared sources


def compute_plain_guided_logits(model, row, tokens):
    source, prompt = row["source_image_tokens"][0], row["prompt_embeds"][0].to(model.dtype)
    compute = functools.partial(compute_naive_logits, model, source, prompt, False, tokens=tokens)
    grid = {"height": model.config.grid_size, "width": model.config.grid_size}
    with torch.no_grad():
        both, image = (torch.from_numpy(compute(drop_prompt=drop, **grid)) for drop in (False, True))
    return image + 3.0 * (both - image)


def check_logits(model, row, record):
    plain = torch.stack([compute_plain_guided_logits(model, row, tokens) for tokens in record.tokens])
    assert (torch.stack(record.logits) - plain).abs().max() <= 1e-5 * plain.abs().max()


@WAYS
@pytest.mark.parametrize("text_rotary", ["zero", "identity"])
def test_logits_are_those_of_one_forward_over_the_whole_sequence(text_rotary, way):
    model, record = build_transformer(text_rotary=text_rotary), RecordLogits()
    mask = {"edit_mask": draw_mask(7, part=0.6), "source_cache": model.prepare_source_cache(SOURCE[:1])}
    generate(model, ROW, **way, **mask, logits_processor=[record], generator=None)
    assert len(record.tokens) > 5
    check_logits(model, ROW, record)


@pytest.mark.parametrize("free", [[140], [2, 140]], ids=str)
def test_forced_runs_of_more_queries_than_a_chunk_give_the_logits_of_one_forward(free):
    """With the text, 140 tokens are 150 queries; after it, 138."""
    model, record, row = build_transformer(grid_size=12), RecordLogits(), draw_inputs(1, num_tokens=144)
    edit_mask = torch.isin(torch.arange(144), torch.tensor(free))[None]
    generate(model, row, **GREEDY, edit_mask=edit_mask, logits_processor=[record], generator=None)
    assert [len(tokens) for tokens in record.tokens] == free
    check_logits(model, row, record)


@pytest.mark.parametrize("num_images", [1, 2], ids=["one image", "two images"])
def test_logits_in_bf16_are_as_near_to_fp32_as_those_of_one_forward(model, num_images):
    coarse, record = copy.deepcopy(model).bfloat16(), RecordLogits()
    coarse.generate(
        SOURCE[:1].repeat(num_images, 1),
        INPUTS["prompt_embeds"][:num_images].bfloat16(),
        edit_mask=draw_mask(7, part=0.6).repeat(num_images, 1),
        logits_processor=[record],
        generator=seed_generators(*range(1, 1 + num_images)),
    )
    fine, plain = (
        torch.stack([compute_plain_guided_logits(one, ROW, tokens) for tokens in record.tokens])
        for one in (copy.deepcopy(coarse).float(), coarse)
    )
    errors = [(logits - fine).square().mean().sqrt() for logits in (torch.stack(record.logits), plain)]
    assert errors[0] <= 1.3 * errors[1], errors
    assert errors[1] < 0.1 * fine.std(), "not vacuous"


@pytest.mark.parametrize(("rows", "num_sources"), [([0, 0, 0, 0], 1), ([0, 0, 1, 1], 2), ([0, 1, 1, 1], 4)], ids=str)
def test_images_of_one_source_share_its_prefill_and_get_the_tokens_they_get_alone(model, rows, num_sources):
    source, prompts = SOURCE[rows], torch.cat([INPUTS["prompt_embeds"], INPUTS["prompt_embeds"].flip(0)])
    how = {"image_guidance_scale": 1.6}
    with PassRecorder(model) as recorder:
        together = model.generate(source, prompts, **how, generator=seed_generators(1, 2, 3, 4))
    assert recorder.passes[:3] == [
        *(
            {"source_image_tokens": (rows, NUM_TOKENS), "prompt_embeds": (rows, NUM_TEXT_TOKENS)}
            for rows in (num_sources, 1)
        ),
        {"prompt_embeds": (4, NUM_TEXT_TOKENS)},
    ]
    assert recorder.cache.layers[0].keys.shape[::2] == (12, NUM_TEXT_TOKENS + NUM_TOKENS - 1)
    assert [len(source.keys[0]) for source in recorder.cache.sources] == [num_sources, 1], "stored once"
    for row in range(4):
        one = slice(row, row + 1)
        alone = model.generate(source[one], prompts[one], **how, generator=seed_generators(row + 1))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(("text_rotary", "num_slots"), [("zero", 1), ("identity", NUM_TEXT_TOKENS)])
def test_a_text_whose_keys_are_zero_takes_one_slot(text_rotary, num_slots):
    model = build_transformer(text_rotary=text_rotary)
    with PassRecorder(model) as recorder:
        generate(model, INPUTS)
    assert recorder.cache.layers[0].keys.shape[2] == num_slots + NUM_TOKENS - 1


# Source caches


def test_one_cached_source_serves_every_prompt_and_is_not_run_again(model):
    cache = model.prepare_source_cache(SOURCE[:1])
    with PassRecorder(model) as recorder:
        tokens = generate(model, PROMPTS, source_cache=cache).sequences
    assert not any("source_image_tokens" in bring for bring in recorder.passes)
    assert torch.equal(tokens, generate(model, {**PROMPTS, "source_image_tokens": SOURCE[:1].repeat(2, 1)}).sequences)


def test_a_cache_in_one_block_has_the_same_states_in_one_block_of_memory(model):
    cache = model.prepare_source_cache(SOURCE[:1])
    copy = copy_to_one_block(cache)
    for own, others in ((cache, copy), (cache.null_text, copy.null_text)):
        for name in ("keys", "values"):
            for states, copied in zip(getattr(own, name), getattr(others, name), strict=True):
                assert torch.equal(states, copied)
                assert (states.stride(-1) == 1) == (copied.stride(-1) == 1)
    tensors = [*copy.keys, *copy.values, *copy.null_text.keys, *copy.null_text.values]
    assert len({states.untyped_storage().data_ptr() for states in tensors}) == 1
    assert tensors[0].untyped_storage().nbytes() == sum(states.nbytes for states in tensors)


def test_joined_caches_are_the_cache_of_all_their_sources(model):
    joined = join_caches([model.prepare_source_cache(source[None]) for source in SOURCE])
    cache = model.prepare_source_cache(SOURCE)
    for part, expected in ((joined, cache), (joined.null_text, cache.null_text)):
        for name in ("keys", "values"):
            for states, others in zip(getattr(part, name), getattr(expected, name), strict=True):
                torch.testing.assert_close(states, others)
    assert [states.stride() for states in joined.values] == [states.stride() for states in cache.values]
    assert torch.equal(generate(model, PROMPTS, source_cache=joined).sequences, generate(model, INPUTS).sequences)


def test_a_cache_keeps_nothing_in_memory_but_its_keys_and_values(model):
    cache = model.prepare_source_cache(SOURCE)
    states = [*cache.keys, *cache.values, *cache.null_text.keys, *cache.null_text.values]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in states}
    assert sum(storages.values()) == sum(tensor.nbytes for tensor in states)


def test_a_cache_that_does_not_fit_is_refused_before_any_forward(model):
    cache, three = model.prepare_source_cache(SOURCE), model.prepare_source_cache(torch.zeros(3, 16).long())
    coarse = copy.copy(cache)
    coarse.keys = [keys.bfloat16() for keys in cache.keys]
    refusals = [
        ({"source_image_tokens": SOURCE.flip(0), "source_cache": cache}, "are of different images"),
        ({"source_cache": cache, "grid_height": 2}, "has a grid of 4 × 4 tokens, .* 2 × 4"),
        ({"source_cache": coarse}, "is torch.bfloat16 on cpu and"),
        ({"source_cache": three}, "holds 3 images and"),
    ]
    for arguments, message in refusals:
        with PassRecorder(model) as recorder, pytest.raises(ValueError, match=f"`source_cache`.*{message}"):
            model.generate(**PROMPTS, **arguments)
        assert recorder.passes == []


def test_a_cache_outlives_other_threads_and_a_file(tmp_path):
    model = build_transformer()
    torch.save(model.prepare_source_cache(SOURCE), tmp_path / "cache.pt")
    cache = torch.load(tmp_path / "cache.pt", weights_only=False)
    try:
        torch.set_num_threads(2)
        tokens = model.generate(**PROMPTS, **GREEDY, source_cache=cache)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(tokens, model.generate(**INPUTS, **GREEDY))


def check_caches(model, good, bad):
    dtype = {"prompt_embeds": INPUTS["prompt_embeds"].to(model.dtype)}
    model.generate(**dtype, **GREEDY, source_cache=good)
    with pytest.raises(ValueError, match=r"`source_cache` was prepared with another decoder.*prepare it again"):
        model.generate(**dtype, **GREEDY, source_cache=bad)


@pytest.mark.parametrize("modules_to_save", [None, ["up_proj"]])
def test_a_cache_made_with_an_adapter_is_of_the_decoder_that_has_it(modules_to_save):
    model = build_transformer()
    plain = model.prepare_source_cache(SOURCE)
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=modules_to_save))
    adapted = model.prepare_source_cache(SOURCE)
    check_caches(model, adapted, plain)
    with peft_model.disable_adapter():
        check_caches(model, plain, adapted)
    layer = model.model.layers[0].self_attn.q_proj
    layer.set_scale("default", 0.5)
    rescaled = model.prepare_source_cache(SOURCE)
    check_caches(model, rescaled, adapted)
    layer.lora_B["default"].weight.data += 0.1
    check_caches(model, model.prepare_source_cache(SOURCE), rescaled)


def change_slightly(weight):
    weight *= 1 + 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight.dtype)


def replace_most_embeddings(weight):
    if len(weight) == NUM_CODES:
        weight[2:] = weight[2:].flip(0).clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [change_slightly, replace_most_embeddings])
def test_a_cache_made_before_the_weights_changed_is_refused(dtype, change):
    model = build_transformer().to(dtype)
    before = model.prepare_source_cache(SOURCE)
    with torch.no_grad():
        for parameter in model.model.parameters():
            change(parameter)
    check_caches(model, model.prepare_source_cache(SOURCE), before)
