"""Compiled decoding: the same tokens, one compilation for all edits of a size, caches that are safe and freed."""

import copy
import threading
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_decoding import draw_inputs
from tiny import build_pipeline, build_transformer, draw_image, needs_compiler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from editar_hf.generation import decoding


GRID_SIZE, NUM_TOKENS = 5, 25


class CountingBackend:
    """Run what was captured as it is, and count how often that happened: a compilation without a compiler."""

    def __init__(self):
        self.num_compilations = 0

    def __call__(self, module, example_inputs):
        self.num_compilations += 1
        return module.forward


SOURCE = draw_inputs(1, NUM_TOKENS, 9)["source_image_tokens"]


@pytest.fixture
def backend():
    torch._dynamo.reset()
    return CountingBackend()


def build_shallow_transformer():
    """One layer: every layer makes a compilation longer."""
    model = build_transformer(GRID_SIZE)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    return model


def draw_call(seed, batch_size=1, num_tokens=NUM_TOKENS):
    return {**draw_inputs(batch_size, num_tokens, seed), "generator": torch.Generator().manual_seed(seed)}


def draw_edit_mask(seed):
    return torch.rand(1, NUM_TOKENS, generator=torch.Generator().manual_seed(seed)) < 0.3


def count_compiled(model):
    """Count what was compiled, by the name of the function: a step, a pass of several tokens, a selection."""
    return Counter(function.__name__ for function, _ in model.compiled_decoding.compiled)


def test_compiled_passes_give_the_same_tokens_without_compiling_again(backend):
    model, compiled = (build_transformer(GRID_SIZE, text_rotary="zero") for _ in range(2))
    compiled.compile_decoding(backend=backend)
    ways = [
        {"edit_mask": draw_edit_mask(1)},
        {"decoding": "speculative", "num_draft_tokens": 16},
        {},
        {"edit_mask": draw_edit_mask(3), "do_sample": False},
        {"decoding": "speculative", "num_draft_tokens": 7, "top_k": 5},
        {"source_cache": compiled.prepare_source_cache(draw_call(5)["source_image_tokens"])},
    ]
    for seed, way in enumerate(ways):
        assert torch.equal(compiled.generate(**draw_call(seed), **way), model.generate(**draw_call(seed), **way))
    # Sampled and greedy, with a mask and without one, and with top-k 5: only the selections are compiled again.
    assert count_compiled(compiled) == {"compute_step_logits": 1, "forward": 1, "select_step_token": 4}
    assert backend.num_compilations == 6


@needs_compiler
def test_torchs_own_compiler_gives_the_same_tokens():
    torch._dynamo.reset()
    model, compiled = (build_shallow_transformer() for _ in range(2))
    compiled.compile_decoding()
    for seed in range(2):
        # 16 tokens: passes of one token only
        how = {"do_sample": False, "grid_height": 4, "grid_width": 4}
        tokens, expected = (one.generate(**draw_call(seed, num_tokens=16), **how) for one in (compiled, model))
        assert torch.equal(tokens, expected)
    assert count_compiled(compiled) == {"compute_step_logits": 1, "select_step_token": 1}


def test_any_number_of_shapes_is_compiled(backend):
    """Rows, branches, grids, pass lengths and dtypes; torch itself stops at 8 compilations of one function."""
    model, compiled = (build_shallow_transformer() for _ in range(2))
    compiled.compile_decoding(backend=backend)
    shapes = [(batch_size, 1, 3, {}) for batch_size in range(1, 6)]
    shapes += [(1, *grid, {"guidance_scale": 1}) for grid in ((2, 2), (1, 4), (4, 1))]
    shapes += [(1, 2, 3, {"image_guidance_scale": 1.6}), (1, 4, 5, {"edit_mask": torch.arange(20)[None] % 7 < 2})]
    for batch_size, height, width, how in shapes:
        inputs = draw_call(0, batch_size, height * width)
        how |= {"do_sample": False, "grid_height": height, "grid_width": width}
        assert torch.equal(compiled.generate(**inputs, **how), model.generate(**inputs, **how))
    num_steps = {"compute_step_logits": len(shapes), "select_step_token": len(shapes)}
    assert count_compiled(compiled) == {**num_steps, "forward": 1}, (
        "one each, and a pass of several tokens for the mask"
    )


class OperationTape(TorchDispatchMode):
    """Record operations and repeat them on the same tensors, without any Python of the step: what a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a step waits for the device"
        output = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, output))
        return output

    def replay(self):
        for function, args, kwargs, output in self.calls:
            again = function(*args, **kwargs)
            for tensor, values in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if tensor.data_ptr() != values.data_ptr():  # neither a view nor changed in place
                    tensor.copy_(values)


@pytest.fixture
def tapes(monkeypatch):
    """Capture steps on tapes instead of CUDA graphs."""
    tapes = []

    def capture(step, device):
        step()
        tapes.append(OperationTape())
        with tapes[-1]:
            step()
        return tapes[-1].replay

    monkeypatch.setattr(decoding, "capture_graph", capture)
    return tapes


def test_a_captured_step_serves_other_inputs_of_its_settings(tapes):
    model, captured = (build_transformer(GRID_SIZE, text_rotary="zero") for _ in range(2))
    captured.compile_decoding(disable=True)
    sampled = [{}, {}, {"decoding": "speculative"}, {"source_cache": captured.prepare_source_cache(SOURCE)}]
    masked = [{"edit_mask": draw_edit_mask(seed)} for seed in range(2)]
    for seed, way in enumerate([*sampled, *masked]):
        expected = model.generate(**draw_call(seed) | {"source_image_tokens": SOURCE}, **way)
        assert torch.equal(captured.generate(**draw_call(seed) | {"source_image_tokens": SOURCE}, **way), expected)
    assert len(tapes) == 2, "with a mask and without one"
    assert torch.equal(captured.generate(**draw_call(7), top_k=3), model.generate(**draw_call(7), top_k=3))
    assert torch.equal(captured.generate(**draw_call(8), top_k=3), model.generate(**draw_call(8), top_k=3))
    assert len(tapes) == 3, "other settings are captured again, another source is not"


def test_a_captured_step_is_not_used_after_adapters_or_weights_changed(tapes):
    model = build_shallow_transformer()
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    layer = model.model.layers[0].self_attn.v_proj

    def check(num_captured):
        captured = model.generate(**draw_call(0))
        compiled, model.compiled_decoding = model.compiled_decoding, None
        assert torch.equal(captured, model.generate(**draw_call(0)))
        model.compiled_decoding = compiled
        assert len(tapes) == num_captured

    model.compile_decoding(disable=True)
    check(1)
    layer.set_scale("default", 5.0)
    check(2)
    with peft_model.disable_adapter():
        check(3)
    check(4)
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.flip(0) + 1)
    check(5)
    model.lm_head.weight.data.mul_(-1)
    check(5)


def test_a_copy_of_a_compiled_model_decodes_without_compiled_passes(backend):
    model = build_shallow_transformer()
    expected = model.generate(**draw_call(0))
    model.compile_decoding(backend=backend)
    copied = copy.deepcopy(model)
    assert copied.compiled_decoding is None
    assert torch.equal(copied.generate(**draw_call(0)), expected)
    assert backend.num_compilations == 0


def test_compiled_caches_stay_between_calls_even_after_an_error_until_they_are_freed(backend):
    model = build_shallow_transformer()
    expected = model.generate(**draw_call(0))
    model.compile_decoding(backend=backend)

    def list_caches():
        return [cache.layers[0].keys.data_ptr() for cache in model.compiled_decoding.caches.values()]

    def fail(input_ids, scores):
        raise RuntimeError("the user's own")

    model.generate(**draw_call(0))
    first = list_caches()
    with pytest.raises(RuntimeError, match="the user's own"):
        model.generate(**draw_call(1), stopping_criteria=[fail])
    assert list_caches() == first
    model.generate(**draw_call(0, batch_size=2))
    assert len(list_caches()) == 2, "one for each shape"
    model.free_compiled_caches()
    assert list_caches() == []
    assert torch.equal(model.generate(**draw_call(0)), expected)


def test_no_two_layers_of_a_compiled_cache_share_memory(backend):
    """Where compiled code writes to a view it writes the whole tensor back: 12 layers in one took 7 times as long."""
    model = build_transformer(GRID_SIZE)
    model.compile_decoding(backend=backend)
    model.generate(**draw_call(0))
    (cache,) = model.compiled_decoding.caches.values()
    states = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in states}) == 2 * model.config.num_hidden_layers
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in states)


def test_two_threads_decode_at_once_with_compiled_passes(backend):
    model = build_shallow_transformer()
    expected = [model.generate(**draw_call(seed)) for seed in range(2)]
    model.compile_decoding(backend=backend)
    model.generate(**draw_call(0))
    barrier, results = threading.Barrier(2), [None, None]

    def wait(input_ids, scores):
        barrier.wait()  # after every token of the two: they take turns
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def decode(index):
        results[index] = model.generate(**draw_call(index), stopping_criteria=[wait])

    threads = [threading.Thread(target=decode, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, tokens) for result, tokens in zip(results, expected, strict=True))


def test_pipeline_compiles_its_decoder(backend):
    pipe = build_pipeline()

    def edit():
        generator = torch.Generator().manual_seed(0)
        return pipe("make the red circle blue", image=draw_image(0), generator=generator).image_tokens

    expected = edit()
    pipe.compile(backend=backend)
    assert torch.equal(edit(), expected)
    assert torch.equal(edit(), expected)
    assert backend.num_compilations == 2, "a step, and its selection"
    pipe.free_compiled_caches()
    assert not pipe.transformer.compiled_decoding.caches
    assert not pipe.transformer.compiled_decoding.steps


def test_the_old_name_of_compiling_still_works_with_a_warning(backend):
    model = build_shallow_transformer()
    with pytest.warns(FutureWarning, match="compile_decoding"):
        model.compile_passes(backend=backend)
    assert model.compiled_decoding is not None
