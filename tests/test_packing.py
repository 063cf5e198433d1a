"""Packed 16-bit weights: the tokens of float32, the original bits after unpacking, and refusals of everything else."""

import copy
import gc
import pickle
import platform
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from plain_decoding import draw_inputs, draw_mask, seed_generators
from test_compilation import CountingBackend, build_shallow_transformer
from test_lora import adapters, load  # noqa: F401
from tiny import build_pipeline, build_transformer, draw_image, needs_compiler, needs_packing

from editar_hf import EditARPipeline
from editar_hf.packing import PackedLinear, explain_missing_kernel, is_packed


pytestmark = [needs_packing, pytest.mark.filterwarnings("ignore:A prompt is longer")]
STICKER_EDITOR = Path(__file__).parents[1] / "projects" / "stickers" / "sticker-editor"
# Rounding to float16 changes a weight by at most this part of it.
ROUNDING = 2**-11


def round_weights(model):
    """Give a model the weights that a file in bfloat16 holds, in float32."""
    return model.to(torch.bfloat16).to(torch.float32)


@pytest.fixture
def models():
    """A decoder in float32, and the same decoder packed."""
    model, packed = (round_weights(build_transformer(text_rotary="zero")) for _ in range(2))
    packed.pack_weights()
    return model, packed


@pytest.fixture
def pipe():
    """A packed pipeline."""
    pipe = round_weights(build_pipeline())
    pipe.pack_weights()
    return pipe


def edit(pipe, seed=0, prompt="make the red circle blue", **how):
    return pipe(prompt, image=draw_image(seed), generator=torch.Generator().manual_seed(seed), **how).image_tokens


def list_states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def has_same_bits(states, others):
    """Compare dtypes and bits, which also tell −0 from +0."""
    as_bytes = [
        {name: (t.dtype, bytes(t.view(torch.uint8).numpy())) for name, t in s.items()} for s in (states, others)
    ]
    return as_bytes[0] == as_bytes[1]


# The same results


@pytest.mark.parametrize("num_rows", [1, 2, 7, 300])
def test_a_packed_layer_multiplies_with_weights_of_eleven_bits(num_rows):
    """This test fails if torch removes the operators."""
    assert explain_missing_kernel() is None
    layer = torch.nn.Linear(37, 53, bias=False)
    hidden_states = torch.randn(num_rows, 3, 37)
    expected = F.linear(hidden_states.double(), layer.weight.half().double())
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(layer)(hidden_states).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"guidance_scale": 1, "top_k": 7},
        {"image_guidance_scale": 1.6, "temperature": 0.9},
        {"edit_mask": draw_mask(3, 4)},
        {"decoding": "speculative", "do_sample": False},
        {"decoding": "speculative", "edit_mask": draw_mask(3, 4)},
    ],
)
def test_packed_weights_give_the_tokens_of_float32(models, how):
    inputs = draw_inputs()
    tokens, expected = (model.generate(**inputs, **how, generator=seed_generators(1, 2)) for model in reversed(models))
    assert torch.equal(tokens, expected)
    assert len(expected.unique()) > 5


def test_packed_weights_give_the_logits_of_float32(models):
    inputs = draw_inputs()
    with torch.no_grad():
        packed, expected = (model(**inputs, labels=inputs["source_image_tokens"]).logits for model in reversed(models))
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-4 * expected.std().item())


def test_a_compiled_decoder_can_be_packed_and_unpacked():
    torch._dynamo.reset()
    inputs = {**draw_inputs(1, 25), "do_sample": False}
    model, compiled = (round_weights(build_shallow_transformer()) for _ in range(2))
    compiled.compile_decoding(backend=CountingBackend())
    expected, original = model.generate(**inputs), weakref.ref(compiled.lm_head.weight)
    for change in (compiled.eval, compiled.pack_weights, compiled.unpack_weights, compiled.pack_weights):
        change()
        assert torch.equal(compiled.generate(**inputs), expected)
    gc.collect()
    assert original() is None


@needs_compiler
def test_torchs_own_compiler_compiles_packed_weights():
    torch._dynamo.reset()
    model, compiled = (round_weights(build_shallow_transformer()) for _ in range(2))
    compiled.pack_weights()
    compiled.compile_decoding()
    how = {**draw_inputs(1), "do_sample": False, "grid_height": 4, "grid_width": 4}
    assert torch.equal(compiled.generate(**how), model.generate(**how))


def test_a_packed_pipeline_gives_the_tokens_and_text_states_of_float32(pipe):
    plain = round_weights(build_pipeline())
    states, expected = (one.encode_prompt("remove the green square") for one in (pipe, plain))
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
    cache = plain.prepare_source_cache(draw_image(0))
    for how in ({}, {"negative_prompt": "green"}, {"decoding": "speculative"}):
        assert torch.equal(edit(pipe, **how), edit(plain, **how))
    # The weights are the same, so a cache from before packing stays valid.
    generator = torch.Generator().manual_seed(0)
    tokens = pipe("make it blue", source_cache=cache, generator=generator).image_tokens
    assert torch.equal(tokens, edit(plain, prompt="make it blue"))


def test_the_shipped_checkpoint_gives_the_same_tokens():
    """It is stored in bfloat16, and packed without an intermediate step in float32."""
    packed = EditARPipeline.from_pretrained(STICKER_EDITOR, dtype="auto")
    assert packed.transformer.dtype == torch.bfloat16
    packed.pack_weights()
    plain = EditARPipeline.from_pretrained(STICKER_EDITOR, dtype=torch.float32)
    image = Image.new("RGB", (64, 64), "lightgrey")
    ImageDraw.Draw(image).ellipse((20, 20, 40, 40), fill="red")
    prompts = ["make the red circle blue", "remove the red circle", "add a green square"]
    for how in ({}, {"decoding": "speculative"}):
        for one in (packed, plain):
            one.set_progress_bar_config(disable=True)
        tokens, expected = (
            one(prompts, image=image, generator=seed_generators(0, 1, 2), **how).image_tokens for one in (packed, plain)
        )
        assert torch.equal(tokens, expected)


# Memory and bits


def test_packing_frees_the_original_weights():
    plain = build_pipeline().to(torch.bfloat16)
    originals = []
    for part in (plain.transformer, plain.text_encoder):
        originals += [weakref.ref(layer.weight) for layer in part.modules() if isinstance(layer, torch.nn.Linear)]
    shapes = {one().shape for one in originals}
    plain.pack_weights()
    gc.collect()
    assert len(originals) > 20
    assert not [one for one in originals if one() is not None]
    kept = [tensor for module in plain.transformer.modules() for tensor in vars(module).values()]
    assert not [tensor for tensor in kept if isinstance(tensor, torch.Tensor) and tensor.shape in shapes]
    assert {tensor.dtype for tensor in plain.transformer.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unpacking_restores_every_bit_and_dtype(dtype):
    pipe = build_pipeline()
    weight = pipe.transformer.lm_head.weight
    weight.data[:8] *= torch.logspace(0, -7, 8)[:, None]  # float16 cannot hold the smallest.
    pipe.to(torch.bfloat16).to(dtype)
    weight.data[0, :2], weight.data[0, 2:4] = -0.0, 0.0
    weight.requires_grad_(False)
    originals = [list_states(part) for part in (pipe.transformer, pipe.text_encoder)]
    pipe.pack_weights()
    pipe.pack_weights()  # This changes nothing.
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.float32
    pipe.unpack_weights()
    assert all(map(has_same_bits, originals, map(list_states, (pipe.transformer, pipe.text_encoder))))
    assert not pipe.transformer.lm_head.weight.requires_grad
    assert pipe.transformer.model.layers[0].mlp.up_proj.weight.requires_grad
    pipe.unpack_weights()


def test_weights_of_32_bits_are_rounded_and_cannot_be_unpacked():
    model, packed = (build_transformer() for _ in range(2))
    packed.pack_weights()
    inputs = draw_inputs()
    with torch.no_grad():
        logits, expected = (one(**inputs).logits for one in (packed, model))
    assert 0 < (logits - expected).abs().max() < 20 * ROUNDING * expected.std()
    with pytest.raises(ValueError, match="load the model again"):
        packed.unpack_weights()
    assert torch.equal(packed.generate(**inputs).isfinite(), torch.ones(2, 16).bool())


# Adapters and source caches


def test_fused_adapters_are_packed(adapters):  # noqa: F811
    for name in ("plain", "text"):
        pipe, plain = (load(adapters / name) for _ in range(2))
        for one in (pipe, plain):
            one.fuse_lora()
            round_weights(one)
        pipe.pack_weights()
        assert torch.equal(edit(pipe), edit(plain))
        with pytest.raises(ValueError, match="unpack_weights"):
            pipe.unfuse_lora()
        pipe.unpack_weights()
        assert has_same_bits(list_states(pipe.transformer), list_states(plain.transformer))
        pipe.pack_weights()
        pipe.unload_lora_weights()
        assert torch.equal(edit(pipe), edit(plain))
        with pytest.raises(ValueError, match="unpack_weights"):
            pipe.load_lora_weights(adapters / "narrow")
        assert pipe.list_adapters() == []


def test_adapters_can_be_chosen_while_the_weights_below_them_are_packed(adapters):  # noqa: F811
    pipe, plain = build_pipeline(), build_pipeline()
    for one in (pipe, plain):
        round_weights(one)
        for name in ("narrow", "text", "other-text"):
            one.load_lora_weights(adapters / name, adapter_name=name)
    before = list_states(pipe.transformer)
    pipe.pack_weights()
    for names in (["text"], [], ["narrow"], ["other-text", "narrow"], ["narrow"]):
        for one in (pipe, plain):
            one.set_adapters(names)
        assert torch.equal(edit(pipe), edit(plain)), names
    pipe.unpack_weights()
    assert has_same_bits(list_states(pipe.transformer), before)


def test_weights_that_dora_reads_are_not_packed(adapters):  # noqa: F811
    pipe, plain = build_pipeline(), build_pipeline()
    for one in (pipe, plain):
        round_weights(one)
        one.load_lora_weights(adapters / "dora", adapter_name="dora")
    pipe.pack_weights()
    adapted = [layer for layer in pipe.transformer.modules() if hasattr(layer, "lora_A")]
    assert {type(layer.base_layer) for layer in adapted} == {torch.nn.Linear}
    assert is_packed(pipe.transformer)
    for names in (["dora"], []):
        for one in (pipe, plain):
            one.set_adapters(names)
        assert torch.equal(edit(pipe), edit(plain)), names


def test_a_source_cache_is_refused_if_it_has_other_weights(models):
    model, packed = models
    inputs = draw_inputs()
    text = {"prompt_embeds": inputs["prompt_embeds"], "do_sample": False}
    cache = packed.prepare_source_cache(inputs["source_image_tokens"])
    assert torch.equal(packed.generate(source_cache=cache, **text), model.generate(**inputs, do_sample=False))
    packed.unpack_weights()
    packed.generate(source_cache=cache, **text)
    packed.model.layers[1].mlp.up_proj.weight.data *= 2
    packed.pack_weights()
    with pytest.raises(ValueError, match="prepare it again"):
        packed.generate(source_cache=cache, **text)
    rounded = build_transformer(text_rotary="zero")
    cache = rounded.prepare_source_cache(inputs["source_image_tokens"])
    rounded.pack_weights()
    with pytest.raises(ValueError, match="prepare it again"):
        rounded.generate(source_cache=cache, **text)


# What is refused


OPERATIONS = {
    "to a dtype": lambda pipe, path: pipe.to(torch.bfloat16),
    "to a device": lambda pipe, path: pipe.to("meta"),
    "half": lambda pipe, path: pipe.transformer.half(),
    "text encoder to": lambda pipe, path: pipe.text_encoder.to(torch.bfloat16),
    "save": lambda pipe, path: pipe.save_pretrained(path),
    "push": lambda pipe, path: pipe.push_to_hub("me/editor"),
    "save the decoder": lambda pipe, path: pipe.transformer.save_pretrained(path),
    "save the text encoder": lambda pipe, path: pipe.text_encoder.save_pretrained(path),
    "state_dict": lambda pipe, path: pipe.transformer.state_dict(),
    "load_state_dict": lambda pipe, path: pipe.transformer.load_state_dict(build_transformer().state_dict()),
    "pickle": lambda pipe, path: pickle.dumps(pipe.transformer),
    "train": lambda pipe, path: pipe.transformer.train()(**draw_inputs(), labels=draw_inputs()["source_image_tokens"]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_needs_the_original_weights_is_refused(pipe, tmp_path, name):
    expected = edit(pipe)
    with pytest.raises(ValueError, match=r"not possible with packed weights; call `unpack_weights\(\)` first"):
        OPERATIONS[name](pipe, tmp_path)
    if name != "save the text encoder":
        assert not list(tmp_path.iterdir())
    pipe.transformer.eval()
    assert torch.equal(edit(pipe), expected)


def test_what_changes_nothing_is_allowed(pipe):
    expected = edit(pipe)
    pipe.to("cpu").to(torch.float32)
    copied = copy.deepcopy(pipe.transformer.float())
    pipe.transformer = build_transformer()
    pipe.transformer = copied
    gc.collect()
    assert torch.equal(edit(pipe), expected)
    copied.unpack_weights()
    assert torch.equal(edit(pipe), expected)


def break_kernel(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")


def break_instructions(monkeypatch):
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["qnnpack"])


@pytest.mark.parametrize("break_machine", [break_kernel, break_instructions])
def test_a_machine_without_the_kernel_is_refused(monkeypatch, break_machine):
    model = build_transformer()
    break_machine(monkeypatch)
    with pytest.raises(ValueError, match=r"aarch64.*without `pack_weights|AVX2.*without `pack_weights"):
        model.pack_weights()


@pytest.mark.parametrize(
    ("value", "message"), [(1e5, "65,504"), (float("nan"), "damaged"), (-float("inf"), "65,504"), (None, "on meta")]
)
def test_weights_that_cannot_be_packed_are_refused_before_any_is_packed(value, message):
    pipe = build_pipeline()
    if value is None:
        pipe.text_encoder.to("meta")
    else:
        pipe.text_encoder.encoder.block[0].layer[0].SelfAttention.q.weight.data[0, 0] = value
    with pytest.raises(ValueError, match=message):
        pipe.pack_weights()
    assert not any(isinstance(module, PackedLinear) for module in pipe.transformer.modules())
