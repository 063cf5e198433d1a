"""LoRA in the pipeline, against PEFT itself and against the formula."""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from hub_server import HubServer, Repository
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from processes import run_python
from safetensors.torch import load_file, save_file
from tiny import build_pipeline, build_transformer

from editar_hf import EditARPipeline


EXAMPLES = Path(__file__).parents[1] / "examples"
TARGETS = ["q_proj", "v_proj", "down_proj"]
# An adapter of low-rank updates alone, and one that also replaces the text projection.
KINDS = {"low rank": None, "with a replaced module": ["text_projection"]}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def modules_to_save(request):
    return request.param


def write_adapter(folder, seed=0, modules_to_save=None, transformer=None, targets=TARGETS, **settings):
    """Write an adapter with random weights by PEFT alone; return the decoder that has it."""
    torch.manual_seed(seed)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, **settings}, target_modules=targets, modules_to_save=modules_to_save
    )
    model = get_peft_model(transformer or build_transformer(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def compute_logits(transformer):
    generator = torch.Generator().manual_seed(7)
    source, target = (torch.randint(40, (2, 16), generator=generator) for _ in range(2))
    prompt_embeds = torch.randn(2, 10, 16, generator=generator).to(transformer.dtype)
    return transformer(source, prompt_embeds, target_image_tokens=target).logits


def test_adapter_made_by_peft_works_in_the_pipeline_to_the_bit(tmp_path, modules_to_save):
    model = write_adapter(tmp_path, modules_to_save=modules_to_save)
    pipe = build_pipeline()
    base = compute_logits(pipe.transformer)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(compute_logits(pipe.transformer), compute_logits(model.eval()))
    assert not torch.allclose(compute_logits(pipe.transformer), base, atol=0.1)
    assert pipe.get_active_adapters() == pipe.list_adapters() == ["default_0"]


def test_adapter_saved_by_the_pipeline_works_in_peft_and_in_another_pipeline(tmp_path, modules_to_save):
    write_adapter(tmp_path / "first", modules_to_save=modules_to_save)
    pipe, again = build_pipeline(), build_pipeline()
    pipe.load_lora_weights(tmp_path / "first", adapter_name="style")
    pipe.save_lora_weights(tmp_path / "second")
    assert {path.name for path in (tmp_path / "second").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    model = PeftModel.from_pretrained(build_transformer(), tmp_path / "second").eval()
    again.load_lora_weights(tmp_path / "second")
    for transformer in (model, again.transformer):
        assert torch.equal(compute_logits(transformer), compute_logits(pipe.transformer))


def test_adapters_add_up_by_their_weights(tmp_path):
    """Every adapted weight is W + Σ wᵢ · alpha / r · Bᵢ Aᵢ (arXiv 2106.09685, section 4.1)."""
    models = {name: write_adapter(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))}
    pipe, expected = build_pipeline(), build_transformer()
    for name in models:
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    pipe.set_adapters(["one", "two"], [0.5, -1.5])
    with torch.no_grad():
        for name, weight in (("one", 0.5), ("two", -1.5)):
            for path, layer in models[name].base_model.model.named_modules():
                if hasattr(layer, "lora_A"):
                    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                    expected.get_parameter(f"{path}.weight").add_(weight * 8 / 4 * update)
    torch.testing.assert_close(compute_logits(pipe.transformer), compute_logits(expected), atol=1e-4, rtol=1e-4)
    pipe.set_adapters("two")
    assert torch.equal(compute_logits(pipe.transformer), compute_logits(models["two"].eval()))


def test_disabled_adapters_change_nothing_and_come_back(tmp_path, modules_to_save):
    write_adapter(tmp_path, modules_to_save=modules_to_save)
    pipe = build_pipeline()
    base = compute_logits(pipe.transformer)
    pipe.load_lora_weights(tmp_path)
    adapted = compute_logits(pipe.transformer)
    pipe.disable_lora()
    assert torch.equal(compute_logits(pipe.transformer), base)
    pipe.enable_lora()
    assert torch.equal(compute_logits(pipe.transformer), adapted)


@pytest.mark.parametrize("leave", ["unload_lora_weights", "delete_adapters"])
def test_without_its_adapters_the_pipeline_is_the_one_before(tmp_path, modules_to_save, leave):
    write_adapter(tmp_path / "adapter", modules_to_save=modules_to_save)
    pipe = build_pipeline()
    before = copy.deepcopy(pipe.transformer.state_dict())
    pipe.load_lora_weights(tmp_path / "adapter")
    with pytest.raises(ValueError, match="`adapter_names` names nobody; there are default_0"):
        pipe.delete_adapters("nobody")
    pipe.unload_lora_weights() if leave == "unload_lora_weights" else pipe.delete_adapters("default_0")
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    pipe.save_pretrained(tmp_path / "pipeline")
    pipe.load_lora_weights(tmp_path / "adapter", adapter_name="default_0")


def test_fused_adapter_can_be_taken_out_again(tmp_path, modules_to_save):
    write_adapter(tmp_path, modules_to_save=modules_to_save)
    pipe = build_pipeline()
    pipe.load_lora_weights(tmp_path)
    adapted = compute_logits(pipe.transformer)
    pipe.fuse_lora()
    assert pipe.fused_loras == {"default_0"}
    torch.testing.assert_close(compute_logits(pipe.transformer), adapted, atol=1e-4, rtol=1e-4)
    pipe.unfuse_lora()
    assert not pipe.fused_loras
    torch.testing.assert_close(compute_logits(pipe.transformer), adapted, atol=1e-4, rtol=1e-4)


def test_fused_and_unloaded_the_pipeline_saves_and_loads_what_was_learnt(tmp_path, modules_to_save):
    write_adapter(tmp_path / "adapter", modules_to_save=modules_to_save)
    pipe = build_pipeline()
    pipe.load_lora_weights(tmp_path / "adapter")
    adapted = compute_logits(pipe.transformer)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = EditARPipeline.from_pretrained(tmp_path / "pipeline")
    torch.testing.assert_close(compute_logits(loaded.transformer), adapted, atol=1e-4, rtol=1e-4)
    assert loaded.transformer.state_dict().keys() == build_transformer().state_dict().keys()


def test_saving_a_pipeline_with_adapters_is_refused_with_the_two_ways_out(tmp_path):
    write_adapter(tmp_path / "adapter")
    pipe = build_pipeline()
    pipe.load_lora_weights(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"adapters default_0.*`save_lora_weights`.*`unload_lora_weights`.*`fuse_lora`"
    ):
        pipe.save_pretrained(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


def test_adapter_takes_the_dtype_of_the_decoder(tmp_path, modules_to_save):
    write_adapter(tmp_path, modules_to_save=modules_to_save)
    pipe = build_pipeline().to(torch.bfloat16)
    pipe.load_lora_weights(tmp_path)
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for n, parameter in pipe.transformer.named_parameters() if "lora_" in n)
    assert compute_logits(pipe.transformer).isfinite().all()


def test_adapter_loads_by_hub_id(tmp_path):
    model = write_adapter(tmp_path / "adapter")
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with HubServer() as hub:
        hub.repositories["models/tester/style"] = Repository()
        hub.repositories["models/tester/style"].commit(files)
        script = (
            "import sys, torch; sys.path.insert(0, 'tests')\n"
            "from test_lora import build_pipeline, compute_logits\n"
            "pipe = build_pipeline(); pipe.load_lora_weights('tester/style')\n"
            "torch.save(compute_logits(pipe.transformer), sys.argv[1])"
        )
        result = run_python("-c", script, tmp_path / "logits.pt", environment=hub.get_environment(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), compute_logits(model.eval()))


def test_the_pipeline_works_without_peft(tmp_path):
    script = (
        "import sys; sys.modules['peft'] = None; sys.path.insert(0, 'tests')\n"
        "from tiny import build_pipeline\n"
        "pipe = build_pipeline(); pipe.save_pretrained(sys.argv[1]); assert pipe.list_adapters() == []"
    )
    result = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# Fused and recorded: any sequence of calls

# Each has its own kind: targets, rank and scale, modules replaced.
ADAPTERS = {
    "plain": {"seed": 1},
    "narrow": {"seed": 2, "targets": ["down_proj", "o_proj"], "r": 2, "use_rslora": True},
    "text": {"seed": 3, "modules_to_save": ["text_projection"]},
    "other-text": {"seed": 4, "targets": ["q_proj"], "modules_to_save": ["text_projection", "norm"]},
}


REFUSALS = r"`unfuse_lora\(\)` first|`enable_lora\(\)` before|both replace|no adapter is active"


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for kind, settings in ADAPTERS.items():
        write_adapter(folder / kind, **settings)
    return folder


def add_adapters(base, folder, weights):
    """Compute W + Σ wᵢ · scaleᵢ · Bᵢ Aᵢ, and O + w · (T - O) where an adapter replaces O, from the files alone."""
    expected = {name: tensor.clone() for name, tensor in base.items()}
    for kind, weight in weights:
        config = json.loads((folder / kind / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        tensors = {
            name.removeprefix("base_model.model."): tensor.double()
            for name, tensor in load_file(folder / kind / "adapter_model.safetensors").items()
        }
        for name, tensor in tensors.items():
            if ".lora_A." in name:
                update = scale * tensors[name.replace(".lora_A.", ".lora_B.")] @ tensor
                expected[name.replace(".lora_A.", ".")] += weight * update
            elif ".lora_B." not in name:
                expected[name] = base[name] + weight * (tensor - base[name])
    return expected


class Record:
    """What calls should lead to, kept beside a pipeline that they are made of."""

    def __init__(self, base, folder):
        self.base, self.folder = base, folder
        self.kinds, self.weights, self.active, self.fused, self.enabled = {}, {}, [], None, True

    def load(self, pipe, random):
        kind = random.choice(list(ADAPTERS))
        name = next(name for name in (f"default_{i}" for i in range(99)) if name not in self.kinds)
        yield not self.fused, lambda: pipe.load_lora_weights(self.folder / kind)
        self.kinds[name], self.weights[name], self.active = kind, 1.0, [name]

    def choose(self, pipe, random):
        names = random.sample(list(self.kinds), random.randint(0, len(self.kinds)))
        weights = [random.choice([0, 0.3, 1, -1.5]) for _ in names]
        allowed = not self.fused and self.is_possible(names)
        yield allowed, lambda: pipe.set_adapters(names, weights)
        self.active = names
        self.weights |= dict(zip(names, weights, strict=True))

    def fuse(self, pipe, random):
        names = random.choice([None, random.sample(list(self.kinds), random.randint(0, len(self.kinds)))])
        scale, fused = random.choice([1.0, 0.5, -2, 0]), self.active if names is None else names
        allowed = not self.fused and self.enabled and fused and self.is_possible(fused)
        yield allowed, lambda: pipe.fuse_lora(scale, adapter_names=names)
        self.fused, self.unfused = {name: scale * self.weights[name] for name in fused}, self.active
        self.active = fused

    def unfuse(self, pipe, random):
        yield True, pipe.unfuse_lora
        if self.fused:
            self.active, self.fused = self.unfused, None

    def switch(self, pipe, random):
        enabled = random.random() < 0.5
        yield not self.fused, pipe.enable_lora if enabled else pipe.disable_lora
        self.enabled = enabled or not self.kinds

    def delete(self, pipe, random):
        names = random.sample(list(self.kinds), random.randint(0, len(self.kinds)))
        yield not self.fused, lambda: pipe.delete_adapters(names)
        self.active = [name for name in self.active if name not in names]
        for name in names:
            del self.kinds[name], self.weights[name]
        self.enabled = self.enabled or not self.kinds

    def unload(self, pipe, random):
        yield True, pipe.unload_lora_weights
        if self.fused:
            self.base = self.compute_weights()
        self.kinds, self.weights, self.active, self.fused, self.enabled = {}, {}, [], None, True

    def is_possible(self, names):
        """Whether no two of these adapters replace the same module."""
        return sum("text" in self.kinds[name] for name in names) < 2

    def compute_weights(self):
        active = {name: self.weights[name] for name in self.active if self.enabled}
        weights = active if self.fused is None else self.fused
        return add_adapters(self.base, self.folder, [(self.kinds[name], weight) for name, weight in weights.items()])


@pytest.mark.parametrize("seed", range(5))
def test_after_any_calls_the_decoder_has_the_weights_that_are_recorded(adapter_folder, seed):
    random, pipe, expected = Random(seed), build_pipeline(), build_transformer().double()
    clean = copy.deepcopy(expected)
    for _ in range(20):
        pipe.transformer = copy.deepcopy(clean)
        record, calls = Record(clean.state_dict(), adapter_folder), []
        for _ in range(9):
            often, seldom = [record.load, record.choose, record.fuse], [record.switch, record.delete, record.unload]
            call = random.choice(often * 2 + [record.unfuse] * 2 + seldom)
            step = call(pipe, random)
            allowed, act = next(step)
            calls.append(f"{call.__name__}{'' if allowed else ' (refused)'}")
            if allowed:
                act()
                next(step, None)
            else:
                with pytest.raises(ValueError, match=REFUSALS):
                    act()
            assert pipe.list_adapters() == list(record.kinds), calls
            assert pipe.get_active_adapters() == record.active, calls
            assert pipe.fused_loras == set(record.fused or ()), calls
            expected.load_state_dict(record.compute_weights())
            difference = compute_logits(pipe.transformer) - compute_logits(expected)
            assert difference.abs().max() < 1e-6, calls
        if record.fused:
            pipe.unfuse_lora()
        pipe.unload_lora_weights()
        after = pipe.transformer.state_dict()
        assert after.keys() == record.base.keys()
        assert all(torch.allclose(after[name], tensor, atol=1e-9) for name, tensor in record.base.items()), calls


def copy_state(pipe):
    """Copy everything that a refused call has to leave alone."""
    tensors = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    return tensors, pipe.list_adapters(), pipe.get_active_adapters(), set(pipe.fused_loras)


def assert_untouched(pipe, state):
    tensors, *record = copy_state(pipe)
    assert record == list(state[1:])
    assert tensors.keys() == state[0].keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state[0].items())


CHANGES = {
    "load": lambda pipe, folder: pipe.load_lora_weights(folder / "plain"),
    "weigh": lambda pipe, folder: pipe.set_adapters("mine", 0.3),
    "fuse again": lambda pipe, folder: pipe.fuse_lora(0.5),
    "delete": lambda pipe, folder: pipe.delete_adapters("mine"),
    "disable": lambda pipe, folder: pipe.disable_lora(),
    "enable": lambda pipe, folder: pipe.enable_lora(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_while_adapters_are_fused_changes_are_refused(adapter_folder, change):
    pipe = build_pipeline()
    base = compute_logits(pipe.transformer)
    pipe.load_lora_weights(adapter_folder / "text", adapter_name="mine")
    pipe.fuse_lora(0.5)
    state, fused = copy_state(pipe), compute_logits(pipe.transformer)
    with pytest.raises(ValueError, match=r"Adapters are fused \(mine\); call `unfuse_lora\(\)` first"):
        change(pipe, adapter_folder)
    assert_untouched(pipe, state)
    assert torch.equal(compute_logits(pipe.transformer), fused)
    # Pipelines that share a decoder share the record.
    assert EditARPipeline(**pipe.components).fused_loras == {"mine"}
    EditARPipeline(**pipe.components).unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(compute_logits(pipe.transformer), base, atol=1e-4, rtol=1e-4)


def test_scale_of_a_fuse_is_gone_when_it_is_undone(adapter_folder):
    pipe = build_pipeline()
    for kind in ("text", "plain"):
        pipe.load_lora_weights(adapter_folder / kind, adapter_name=kind)
    pipe.set_adapters("plain", 0.7)
    weighed, (before, *_) = compute_logits(pipe.transformer), copy_state(pipe)
    pipe.fuse_lora(0.5, adapter_names=["text"])
    assert pipe.get_active_adapters() == ["text"]
    pipe.unfuse_lora()
    assert pipe.get_active_adapters() == ["plain"]
    torch.testing.assert_close(compute_logits(pipe.transformer), weighed, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pipe.transformer.state_dict(), before)


def test_fusing_in_bfloat16_and_back_costs_no_more_than_rounding(adapter_folder):
    pipe = build_pipeline().to(torch.bfloat16)
    pipe.load_lora_weights(adapter_folder / "text")
    state = copy_state(pipe)
    pipe.fuse_lora()
    pipe.unfuse_lora()
    for name, tensor in pipe.transformer.state_dict().items():
        # Two roundings to 8 bits, of sums below 8.
        assert (tensor - state[0][name]).abs().max() <= 2 * 8 * 2**-9, name


def test_adapter_is_saved_as_it_was_trained_whatever_its_weight(adapter_folder, tmp_path):
    pipe = build_pipeline()
    pipe.load_lora_weights(adapter_folder / "text")
    pipe.set_adapters("default_0", 0.3)
    pipe.fuse_lora(0.5)
    pipe.save_lora_weights(tmp_path)
    saved, trained = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, adapter_folder / "text"))
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained.items())


def test_dropout_is_off(tmp_path):
    write_adapter(tmp_path, lora_dropout=0.5)
    pipe = build_pipeline()
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(compute_logits(pipe.transformer), compute_logits(pipe.transformer))


@pytest.mark.parametrize("name", ["weight", "fc1", "lora_A", "q_proj", "my style"])
def test_names_of_adapters_do_not_mix_with_names_of_modules(adapter_folder, tmp_path, name):
    pipe, again = build_pipeline(), build_pipeline()
    pipe.load_lora_weights(adapter_folder / "plain", adapter_name=name)
    pipe.load_lora_weights(adapter_folder / "text", adapter_name="text")
    pipe.save_lora_weights(tmp_path, adapter_name="text")
    pipe.set_adapters(name)
    again.load_lora_weights(adapter_folder / "plain")
    assert torch.equal(compute_logits(pipe.transformer), compute_logits(again.transformer))
    again.load_lora_weights(tmp_path)
    pipe.set_adapters("text")
    assert torch.equal(compute_logits(pipe.transformer), compute_logits(again.transformer))


def offload_sequentially(pipe):
    """Do what `enable_sequential_cpu_offload` does, with the CPU as the device."""
    cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=False)


OFFLOADS = {
    "sequential": offload_sequentially,
    "groups": lambda pipe: pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_what_needs_the_weights_is_refused_under_offload(adapter_folder, tmp_path, offload):
    pipe = build_pipeline()
    pipe.load_lora_weights(adapter_folder / "text")
    adapted = compute_logits(pipe.transformer)
    offload(pipe)
    for change in (
        pipe.fuse_lora,
        lambda: pipe.load_lora_weights(adapter_folder / "plain"),
        lambda: pipe.set_adapters("default_0", 0.5),
        lambda: pipe.save_lora_weights(tmp_path),
    ):
        with pytest.raises(ValueError, match="weights are offloaded"):
            change()
    assert pipe.list_adapters() == ["default_0"]
    pipe.disable_lora()
    pipe.enable_lora()
    assert torch.equal(compute_logits(pipe.transformer), adapted)
    if offload is offload_sequentially:
        pipe.remove_all_hooks()
        pipe.load_lora_weights(adapter_folder / "plain")
        pipe.set_adapters(["default_0", "default_1"], [1, 0])
        torch.testing.assert_close(compute_logits(pipe.transformer), adapted)


def test_adapters_work_under_model_offload(adapter_folder):
    pipe, plain = build_pipeline(), build_pipeline()
    cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
    for each in (pipe, plain):
        each.load_lora_weights(adapter_folder / "text")
        each.fuse_lora()
    assert torch.equal(compute_logits(pipe.transformer), compute_logits(plain.transformer))


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda pipe: pipe.set_adapters("one", float("nan")), ValueError, "`adapter_weights` is nan"),
        (lambda pipe: pipe.set_adapters("one", [float("-inf")]), ValueError, "`adapter_weights` is -inf"),
        (lambda pipe: pipe.set_adapters("one", 10**400), ValueError, "`adapter_weights` is 10000"),
        (lambda pipe: pipe.set_adapters("one", "0.5"), ValueError, "`adapter_weights` is '0.5'; pass a finite number"),
        (lambda pipe: pipe.set_adapters("one", True), ValueError, "`adapter_weights` is True"),
        (lambda pipe: pipe.set_adapters("one", {"transformer": 1}), ValueError, "`adapter_weights` is {"),
        (lambda pipe: pipe.set_adapters(["one"], [1, 1]), ValueError, "`adapter_weights` has 2 numbers; give one"),
        (lambda pipe: pipe.set_adapters(["one", "nope"]), ValueError, "`adapter_names` names nope; there are one"),
        (lambda pipe: pipe.set_adapters(["one", "one"]), ValueError, "give each adapter once"),
        (lambda pipe: pipe.set_adapters(None), TypeError, "`adapter_names` is None"),
        (lambda pipe: pipe.set_adapters([["one"]]), TypeError, r"`adapter_names` is \[\['one'\]\]"),
        (lambda pipe: pipe.delete_adapters(0), TypeError, "`adapter_names` is 0"),
        (lambda pipe: pipe.fuse_lora(adapter_names=["nope"]), ValueError, "`adapter_names` names nope"),
        (lambda pipe: pipe.fuse_lora(adapter_names=[]), ValueError, "no adapter is active; name adapters"),
        (lambda pipe: pipe.fuse_lora("1"), ValueError, "`lora_scale` is '1'"),
        (lambda pipe: pipe.fuse_lora(float("inf")), ValueError, "`lora_scale` is inf"),
        (lambda pipe: pipe.fuse_lora(1e39), ValueError, "would get infinite weights or NaN"),
        (lambda pipe: pipe.load_lora_weights(7), TypeError, "`pretrained_model_name_or_path` is 7"),
        (lambda pipe: pipe.load_lora_weights("./nowhere"), ValueError, "no such folder"),
        (lambda pipe: pipe.load_lora_weights("nowhere/lora", local_files_only=True), ValueError, "no such folder"),
        (lambda pipe: pipe.load_lora_weights(".", adapter_name=3), TypeError, "`adapter_name` is 3"),
        (lambda pipe: pipe.load_lora_weights(".", adapter_name=""), ValueError, "`adapter_name` is ''"),
        (lambda pipe: pipe.load_lora_weights(".", adapter_name="v1.0"), ValueError, "`adapter_name` is 'v1.0'"),
        (lambda pipe: pipe.load_lora_weights(".", adapter_name="keys"), ValueError, "`adapter_name` is 'keys'"),
    ],
)
def test_bad_arguments_are_named_and_leave_all_as_it_was(adapter_folder, call, error, message):
    pipe = build_pipeline()
    pipe.load_lora_weights(adapter_folder / "text", adapter_name="one")
    state = copy_state(pipe)
    with pytest.raises(error, match=message):
        call(pipe)
    assert_untouched(pipe, state)


def test_fusing_needs_adapters_that_are_on(adapter_folder):
    pipe = build_pipeline()
    with pytest.raises(ValueError, match="no adapter is active"):
        pipe.fuse_lora()
    pipe.load_lora_weights(adapter_folder / "plain")
    pipe.set_adapters([])
    with pytest.raises(ValueError, match="no adapter is active"):
        pipe.fuse_lora()
    pipe.set_adapters("default_0")
    pipe.disable_lora()
    with pytest.raises(ValueError, match=r"call `enable_lora\(\)` before"):
        pipe.fuse_lora()


def change_config(**settings):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def change_weights(value):
    def change(folder):
        weights = load_file(folder / "adapter_model.safetensors")
        name = sorted(weights)[3]
        save_file(weights | {name: value(weights[name])}, folder / "adapter_model.safetensors")

    return change


def replace_file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def make_folder(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DAMAGES = {
    "config is no JSON": (replace_file(CONFIG, b"{"), f"{CONFIG}` is no JSON"),
    "config is no text": (replace_file(CONFIG, b"\xff\xfe{}"), f"{CONFIG}` is no JSON"),
    "config is nested without end": (replace_file(CONFIG, b"[" * 100000), f"{CONFIG}` is no JSON"),
    "config is empty": (replace_file(CONFIG, b""), f"{CONFIG}` is no JSON"),
    "config is a list": (replace_file(CONFIG, b"[1]"), f"{CONFIG}` holds a list, not an object"),
    "config is a folder": (make_folder(CONFIG), f"has no `{CONFIG}`"),
    "config of a model": (replace_file(CONFIG, b'{"model_type": "llama"}'), f"{CONFIG}` describes no LoRA adapter"),
    "another method": (change_config(peft_type="IA3"), f"{CONFIG}` describes no LoRA adapter"),
    "method of a wrong type": (change_config(peft_type=["LORA"]), f"{CONFIG}` describes no LoRA adapter"),
    "rank of gigabytes": (change_config(r=10**9), f"{WEIGHTS}` is no adapter of this decoder: 12 wrongly shaped"),
    "rank beyond numbers": (change_config(r=10**30), f"{CONFIG}` does not fit"),
    **{f"rank {rank!r}": (change_config(r=rank), f"rank `r` {rank!r};") for rank in (0, -4, "4", None, [4], 4.5)},
    "alpha is text": (change_config(lora_alpha="8"), f"{CONFIG}` does not fit"),
    "alpha is NaN": (change_config(lora_alpha=float("nan")), f"{CONFIG}` has the `lora_alpha` nan"),
    "alpha is huge": (change_config(lora_alpha=10**400), f"{CONFIG}` does not fit"),
    "dropout is text": (change_config(lora_dropout="a"), f"{CONFIG}` does not fit"),
    "targets are numbers": (change_config(target_modules=[1, 2]), f"{CONFIG}` does not fit"),
    "targets are no regex": (change_config(target_modules="("), f"{CONFIG}` does not fit"),
    "targets are nowhere": (change_config(target_modules=["nope"]), f"{CONFIG}` does not fit"),
    "no targets": (change_config(target_modules=None), f"{CONFIG}` does not fit"),
    "pattern of ranks is a list": (change_config(rank_pattern=[1]), f"{CONFIG}` does not fit"),
    "layer that another adapter replaces": (change_config(target_modules=["fc1"]), f"{CONFIG}` adapts a part"),
    "module that another adapter adapts": (change_config(modules_to_save=["mlp"]), f"{CONFIG}` "),
    "magnitudes": (change_config(use_dora=True), f"{CONFIG}` sets use_dora; the pipeline loads plain LoRA"),
    "biases": (change_config(bias="all"), f"{CONFIG}` sets bias;"),
    "start that changes the decoder": (change_config(init_lora_weights="pissa"), f"{CONFIG}` sets init_lora_weights;"),
    "repeated layers": (change_config(layer_replication=[[0, 2], [1, 2]]), f"{CONFIG}` sets layer_replication;"),
    "weights are no file of tensors": (replace_file(WEIGHTS, b"PK" * 99), f"{WEIGHTS}` is not a safetensors"),
    "weights are empty": (replace_file(WEIGHTS, b""), f"{WEIGHTS}` is not a safetensors"),
    "weights are a folder": (make_folder(WEIGHTS), f"has no `{WEIGHTS}`"),
    "weights are cut off": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]),
        f"{WEIGHTS}` is not a safetensors",
    ),
    "weights are NaN": (change_weights(lambda tensor: tensor * float("nan")), f"{WEIGHTS}` has values"),
    "weights are complex": (change_weights(lambda tensor: tensor.cfloat()), f"{WEIGHTS}` is not a safetensors"),
    "weights are integers": (change_weights(lambda tensor: tensor.int()), f"{WEIGHTS}` has values"),
    "weights are wrongly shaped": (change_weights(lambda tensor: tensor[:1].clone()), f"{WEIGHTS}` is no adapter"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_adapter_is_named_and_leaves_all_as_it_was(adapter_folder, tmp_path, damage, message):
    folder = tmp_path / "damaged"
    shutil.copytree(adapter_folder / "plain", folder)
    damage(folder)
    pipe = build_pipeline()
    pipe.load_lora_weights(adapter_folder / "text", adapter_name="one")
    state = copy_state(pipe)
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe.load_lora_weights(folder)
    assert_untouched(pipe, state)


def test_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no `adapter_config\.json`"):
        build_pipeline().load_lora_weights(tmp_path)


def test_name_that_is_taken_is_refused(tmp_path):
    write_adapter(tmp_path)
    pipe = build_pipeline()
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    with pytest.raises(ValueError, match="`adapter_name` is 'style', which is taken"):
        pipe.load_lora_weights(tmp_path, adapter_name="style")


@pytest.mark.parametrize("change", ["rank", "fewer targets"])
def test_adapter_whose_weights_do_not_fit_is_refused_and_leaves_no_trace(tmp_path, change):
    first = tmp_path / "first"
    write_adapter(first, seed=1)
    write_adapter(tmp_path)
    file = tmp_path / "adapter_config.json"
    changes = {"rank": {"r": 5}, "fewer targets": {"target_modules": ["q_proj"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes[change]))
    pipe = build_pipeline()
    pipe.load_lora_weights(first)
    adapted = compute_logits(pipe.transformer)
    problem = {"rank": r"12 wrongly shaped \(model\.layers\.0", "fewer targets": r"8 unexpected \(model\.layers\.0"}[
        change
    ]
    with pytest.raises(ValueError, match=f"no adapter of this decoder: {problem}"):
        pipe.load_lora_weights(tmp_path)
    assert pipe.list_adapters() == pipe.get_active_adapters() == ["default_0"]
    assert torch.equal(compute_logits(pipe.transformer), adapted)


def test_adapters_that_replace_the_same_module_are_not_active_together(tmp_path):
    pipe = build_pipeline()
    for seed, name in enumerate(("one", "two")):
        write_adapter(tmp_path / name, seed, modules_to_save=["text_projection"])
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    adapted = compute_logits(pipe.transformer)
    with pytest.raises(ValueError, match=r"one and two both replace `model\.text_projection`"):
        pipe.set_adapters(["one", "two"])
    assert pipe.get_active_adapters() == ["two"]
    assert torch.equal(compute_logits(pipe.transformer), adapted)


def test_saving_needs_to_know_which_adapter(tmp_path):
    pipe = build_pipeline()
    with pytest.raises(ValueError, match="there are no adapters"):
        pipe.save_lora_weights(tmp_path / "out")
    for seed, name in enumerate(("one", "two")):
        write_adapter(tmp_path / name, seed)
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    with pytest.raises(ValueError, match="`adapter_name` is None; there are one, two"):
        pipe.save_lora_weights(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shipped_adapter_copies_a_sticker_and_leaves_the_editor_alone_when_off():
    pipe = EditARPipeline.from_pretrained(EXAMPLES / "sticker-editor", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (64, 64), (128, 128, 128))
    picture.paste((20, 60, 230), (44, 44, 62, 62))
    prompts = ("copy the blue square to the top left", "remove the blue square")

    def is_blue(image):
        red, _, blue = np.asarray(image).astype(int)[(11, 53), (11, 53)].T
        return (blue - red > 100).tolist()

    before = [pipe(prompt, image=picture, do_sample=False) for prompt in prompts]
    assert is_blue(before[0].images[0]) == [True, False]
    pipe.load_lora_weights(EXAMPLES / "sticker-copy-lora")
    assert is_blue(pipe(prompts[0], image=picture, do_sample=False).images[0]) == [True, True]
    pipe.disable_lora()
    after = [pipe(prompt, image=picture, do_sample=False) for prompt in prompts]
    assert all(torch.equal(old.image_tokens, new.image_tokens) for old, new in zip(before, after, strict=True))
