"""Compiled decoding: the same tokens, one compilation for all edits of a size, caches that are safe and freed."""

import copy
import threading

import pytest
import torch
from plain_decoding import draw_inputs
from tiny import build_pipeline, build_transformer, draw_image, needs_compiler


GRID_SIZE, NUM_TOKENS = 5, 25


class CountingBackend:
    """Run what was captured as it is, and count how often that happened: a compilation without a compiler."""

    def __init__(self):
        self.num_compilations = 0

    def __call__(self, module, example_inputs):
        self.num_compilations += 1
        return module.forward


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
    assert backend.num_compilations == 2, "a pass of one token, and one of several"


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
    assert len(compiled.compiled_decoding.compiled) == 1


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
    assert backend.num_compilations == len(shapes) + 1, "one each, and two for the mask"


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
    assert backend.num_compilations == 1
    pipe.free_compiled_caches()
    assert not pipe.transformer.compiled_decoding.caches


def test_the_old_name_of_compiling_still_works_with_a_warning(backend):
    model = build_shallow_transformer()
    with pytest.warns(FutureWarning, match="compile_decoding"):
        model.compile_passes(backend=backend)
    assert model.compiled_decoding is not None
