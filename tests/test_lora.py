"""LoRA in the pipeline, against PEFT itself and against the formula."""

import copy
import json
import shutil
import subprocess
import sys
from random import Random

import diffusers
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from hub_server import HubServer, Repository
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from processes import run_python
from safetensors.torch import load_file
from tiny import build_pipeline, build_transformer, draw_image

from editar_hf import EditARPipeline
from editar_hf.generation.decoding import describe_weights


# Each has its own targets, rank and scale, and replaced modules. Dropout is for training only.
ADAPTERS = {
    "plain": {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.5},
    "narrow": {"target_modules": ["down_proj", "o_proj"], "r": 2, "use_rslora": True},
    "dora": {"target_modules": ["v_proj", "down_proj"], "use_dora": True},
    "text": {"target_modules": ["q_proj", "v_proj", "down_proj"], "modules_to_save": ["text_projection"]},
    "other-text": {"target_modules": ["q_proj"], "modules_to_save": ["text_projection", "norm"]},
}
REFUSALS = r"`unfuse_lora\(\)` first|`enable_lora\(\)` before|all replace|no adapter is active|DoRA adapter .* alone"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Write adapters with random weights by PEFT alone, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        write_adapter(folder / name, seed, settings)
    return folder


def write_adapter(folder, seed, settings):
    torch.manual_seed(seed)
    model = get_peft_model(build_transformer(), LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)


def load(folder, adapter_name=None):
    """Build a pipeline and load an adapter into it."""
    pipe = build_pipeline()
    pipe.load_lora_weights(folder, adapter_name=adapter_name)
    return pipe


def load_by_peft(folder):
    return PeftModel.from_pretrained(build_transformer(), folder).eval()


@torch.no_grad()
def compute_logits(transformer):
    generator = torch.Generator().manual_seed(7)
    source, target = (torch.randint(40, (2, 16), generator=generator) for _ in range(2))
    prompt_embeds = torch.randn(2, 10, 16, generator=generator).to(transformer.dtype)
    return transformer(source, prompt_embeds, target_image_tokens=target).logits


@pytest.mark.parametrize("kind", ["plain", "text", "dora"])
def test_adapter_goes_from_peft_to_the_pipeline_and_back_to_the_bit(adapters, tmp_path, kind):
    pipe = load(adapters / kind)
    adapted = compute_logits(pipe.transformer)
    assert not torch.allclose(adapted, compute_logits(build_transformer()), atol=0.1)
    assert pipe.get_active_adapters() == pipe.list_adapters() == ["default_0"]
    pipe.save_lora_weights(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    for transformer in (load_by_peft(adapters / kind), load_by_peft(tmp_path), load(tmp_path).transformer):
        assert torch.equal(compute_logits(transformer), adapted)


def test_fused_and_unloaded_the_pipeline_saves_and_loads_what_was_learned(adapters, tmp_path):
    pipe = load(adapters / "text")
    adapted = compute_logits(pipe.transformer)
    with pytest.raises(ValueError, match=r"adapters default_0.*`save_lora_weights`.*`fuse_lora`"):
        pipe.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    loaded = EditARPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(compute_logits(loaded.transformer), adapted, atol=1e-4, rtol=1e-4)


def test_adapter_takes_the_dtype_of_the_decoder_and_fusing_it_costs_no_more_than_rounding(adapters):
    pipe = build_pipeline().to(torch.bfloat16)
    pipe.load_lora_weights(adapters / "text")
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for name, parameter in pipe.transformer.named_parameters() if "lora" in name)
    before, *_ = copy_state(pipe)
    pipe.fuse_lora()
    pipe.unfuse_lora()
    for name, tensor in pipe.transformer.state_dict().items():
        # Two roundings to 8 bits, of sums below 8.
        assert (tensor - before[name]).abs().max() <= 2 * 8 * 2**-9, name


def test_adapter_loads_by_hub_id(adapters, tmp_path):
    script = (
        "import sys, torch; sys.path.insert(0, 'tests')\n"
        "from test_lora import compute_logits, load\n"
        "torch.save(compute_logits(load('tester/style').transformer), sys.argv[1])"
    )
    with HubServer() as hub:
        hub.repositories["models/tester/style"] = repository = Repository()
        repository.commit({path.name: path.read_bytes() for path in (adapters / "plain").iterdir()})
        result = run_python("-c", script, tmp_path / "logits.pt", environment=hub.get_environment(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), compute_logits(load_by_peft(adapters / "plain")))


def test_the_pipeline_works_without_peft(tmp_path):
    script = (
        "import sys; sys.modules['peft'] = None; sys.path.insert(0, 'tests')\n"
        "from tiny import build_pipeline\n"
        "pipe = build_pipeline(); pipe.save_pretrained(sys.argv[1]); assert pipe.list_adapters() == []"
    )
    result = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# Hot-swap


@pytest.mark.parametrize(("kind", "weight"), [("plain", 0.3), ("dora", 1), ("text", 1), ("text", 0.3)])
def test_hotswap_is_the_other_adapter_at_the_same_addresses(adapters, tmp_path, kind, weight):
    write_adapter(tmp_path / "other", 9, ADAPTERS[kind])
    pipe, fresh = load(adapters / kind, "one"), load(tmp_path / "other", "one")
    for each in (pipe, fresh):
        each.set_adapters("one", weight)
    # A step of compiled decoding is used again if this is the same.
    described = describe_weights(pipe.transformer)
    cache = pipe.prepare_source_cache(draw_image(0))
    pipe.load_lora_weights(tmp_path / "other", hotswap=True)
    assert torch.equal(compute_logits(pipe.transformer), compute_logits(fresh.transformer))
    if weight == 1 or kind != "text":
        assert describe_weights(pipe.transformer) == described
    with pytest.raises(ValueError, match="`source_cache` was prepared with another decoder, or before"):
        pipe("make the red circle blue", source_cache=cache)
    assert pipe.get_active_adapters() == ["one"]
    pipe.save_lora_weights(tmp_path / "saved")
    assert torch.equal(
        compute_logits(load_by_peft(tmp_path / "saved")), compute_logits(load_by_peft(tmp_path / "other"))
    )


@pytest.mark.parametrize(
    ("settings", "name", "message"),
    [
        ({**ADAPTERS["text"], "r": 2}, "one", r"differs from the loaded 'one' in r\. .* without `hotswap`"),
        (ADAPTERS["plain"], "one", r"differs from the loaded 'one' in modules_to_save\. "),
        (ADAPTERS["text"], "nope", "`adapter_name` is 'nope'; pass one of the loaded adapters: one"),
    ],
)
def test_hotswap_of_another_kind_of_adapter_is_refused_and_changes_nothing(adapters, tmp_path, settings, name, message):
    write_adapter(tmp_path / "other", 9, settings)
    pipe = load(adapters / "text", "one")
    state = copy_state(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(tmp_path / "other", adapter_name=name, hotswap=True)
    with pytest.raises(ValueError, match="cannot prepare for adapters of other ranks"):
        pipe.enable_lora_hotswap(target_rank=8)
    assert_untouched(pipe, state)


# Fused and recorded: any sequence of calls


def add_adapters(base, folder, weights):
    """Compute W + Σ wᵢ · scaleᵢ · Bᵢ Aᵢ, and O + w · (T - O) where an adapter replaces O, from the files alone.

    DoRA: the rows of W + wᵢ · scaleᵢ · Bᵢ Aᵢ get the trained lengths.
    """
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
                matrix = name.replace(".lora_A.", ".")
                changed = base[matrix] + weight * update
                if config["use_dora"]:
                    lengths = tensors[name.replace("lora_A.weight", "lora_magnitude_vector")]
                    changed = torch.nn.functional.normalize(changed) * lengths[:, None]
                expected[matrix] += changed - base[matrix]
            elif ".lora_B." not in name and "magnitude" not in name:
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
        """Whether no two of these adapters replace the same module, and a DoRA adapter is alone."""
        kinds = [self.kinds[name] for name in names]
        return sum("text" in kind for kind in kinds) < 2 and ("dora" not in kinds or len(kinds) == 1)

    def compute_weights(self):
        active = {name: self.weights[name] for name in self.active if self.enabled}
        weights = active if self.fused is None else self.fused
        return add_adapters(self.base, self.folder, [(self.kinds[name], weight) for name, weight in weights.items()])


@pytest.mark.parametrize("seed", range(3))
def test_after_any_calls_the_decoder_has_the_weights_that_are_recorded(adapters, seed):
    random, pipe, expected = Random(seed), build_pipeline(), build_transformer().double()
    clean = copy.deepcopy(expected)
    for _ in range(20):
        pipe.transformer = copy.deepcopy(clean)
        record, calls = Record(clean.state_dict(), adapters), []
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


def test_while_adapters_are_fused_nothing_changes_and_pipelines_that_share_the_decoder_know(adapters):
    pipe = load(adapters / "text", "mine")
    pipe.fuse_lora(0.5)
    state, other = copy_state(pipe), EditARPipeline(**pipe.components)
    for change in (
        lambda: other.load_lora_weights(adapters / "plain"),
        lambda: other.set_adapters("mine", 0.3),
        lambda: other.delete_adapters("mine"),
        other.fuse_lora,
        other.disable_lora,
        other.enable_lora,
    ):
        with pytest.raises(ValueError, match=r"Adapters are fused \(mine\); call `unfuse_lora\(\)` first"):
            change()
    assert_untouched(pipe, state)
    other.unfuse_lora()
    assert not pipe.fused_loras


def test_adapter_is_saved_as_it_was_trained_whatever_its_weight(adapters, tmp_path):
    pipe = load(adapters / "text")
    pipe.set_adapters("default_0", 0.3)
    pipe.fuse_lora(0.5)
    pipe.save_lora_weights(tmp_path)
    saved, trained = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, adapters / "text"))
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained.items())


@pytest.mark.parametrize("name", ["weight", "fc1", "lora_A", "my style"])
def test_names_of_adapters_do_not_mix_with_names_of_modules(adapters, tmp_path, name):
    pipe = load(adapters / "text", "text")
    pipe.load_lora_weights(adapters / "plain", adapter_name=name)
    assert torch.equal(compute_logits(pipe.transformer), compute_logits(load_by_peft(adapters / "plain")))
    pipe.save_lora_weights(tmp_path, adapter_name="text")
    assert torch.equal(compute_logits(load_by_peft(tmp_path)), compute_logits(load_by_peft(adapters / "text")))


OFFLOADS = {
    # What `enable_sequential_cpu_offload` does, with the CPU as the device.
    "sequential": lambda pipe: cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=False),
    "groups": lambda pipe: pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
}
# Before version 0.42, group offload of diffusers needs an accelerator.
GROUPS = torch.accelerator.is_available() or Version(diffusers.__version__) >= Version("0.42")


@pytest.mark.parametrize("offload", OFFLOADS if GROUPS else ["sequential"])
def test_what_needs_the_weights_is_refused_under_offload(adapters, tmp_path, offload):
    pipe = load(adapters / "text")
    adapted = compute_logits(pipe.transformer)
    OFFLOADS[offload](pipe)
    for change in (
        pipe.fuse_lora,
        lambda: pipe.load_lora_weights(adapters / "plain"),
        lambda: pipe.set_adapters("default_0", 0.5),
        lambda: pipe.save_lora_weights(tmp_path),
    ):
        with pytest.raises(ValueError, match="weights are offloaded"):
            change()
    pipe.disable_lora()
    pipe.enable_lora()
    assert torch.equal(compute_logits(pipe.transformer), adapted)
    if offload == "sequential":
        pipe.remove_all_hooks()
        pipe.load_lora_weights(adapters / "plain")
        pipe.set_adapters(["default_0", "default_1"], [1, 0])
        torch.testing.assert_close(compute_logits(pipe.transformer), adapted)


def test_adapters_work_under_model_offload(adapters):
    pipe, plain = build_pipeline(), build_pipeline()
    cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
    for each in (pipe, plain):
        each.load_lora_weights(adapters / "text")
        each.fuse_lora()
    assert torch.equal(compute_logits(pipe.transformer), compute_logits(plain.transformer))


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.set_adapters("one", float("nan")), "`adapter_weights` is nan"),
        (lambda pipe: pipe.set_adapters(["one"], [1, 1]), "`adapter_weights` has 2 numbers; pass one"),
        (lambda pipe: pipe.set_adapters(["one", "nope"]), "`adapter_names` holds nope; .* one"),
        (lambda pipe: pipe.set_adapters(["one", "one"]), "pass each adapter only once"),
        (lambda pipe: pipe.set_adapters(None), "`adapter_names` is None"),
        (lambda pipe: pipe.delete_adapters("nope"), "`adapter_names` holds nope"),
        (lambda pipe: pipe.fuse_lora(adapter_names=["nope"]), "`adapter_names` holds nope"),
        (lambda pipe: pipe.fuse_lora("1"), "`lora_scale` is '1'"),
        (lambda pipe: pipe.fuse_lora(1e39), "would get infinite weights or NaN"),
        (lambda pipe: pipe.save_lora_weights("out", "nope"), "`adapter_name` is 'nope'; .*: one"),
        (lambda pipe: pipe.load_lora_weights("./nowhere"), "no such folder"),
        (
            lambda pipe: pipe.load_lora_weights("nowhere/lora", local_files_only=True),
            "`nowhere/lora` is not a local folder",
        ),
        (lambda pipe: pipe.load_lora_weights(".", adapter_weights=2), "argument 'adapter_weights'"),
        (lambda pipe: pipe.load_lora_weights(".", adapter_name=""), "`adapter_name` is ''"),
        (lambda pipe: pipe.load_lora_weights(".", adapter_name="v1.0"), "`adapter_name` is 'v1.0'"),
        (lambda pipe: pipe.load_lora_weights(".", adapter_name="keys"), "`adapter_name` is 'keys'"),
        (lambda pipe: pipe.load_lora_weights(".", adapter_name="one"), "`adapter_name` is 'one'"),
    ],
)
def test_bad_arguments_are_named_and_leave_all_as_it_was(adapters, call, message):
    pipe = load(adapters / "text", "one")
    state = copy_state(pipe)
    with pytest.raises((TypeError, ValueError), match=message):
        call(pipe)
    assert_untouched(pipe, state)


def change_config(**settings):
    def change(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | settings))

    return change


def cut_off(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


DAMAGES = {
    "config is cut off": (cut_off("adapter_config.json"), "delimiter"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "No such file"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "No such file"),
    "another method": (change_config(peft_type="IA3"), "Its `peft_type` is 'IA3'"),
    "rank of other weights": (change_config(r=5), r"12 wrongly shaped \(model\.layers\.0"),
    "rank 0": (change_config(r=0), "positive"),
    "fewer targets than weights": (change_config(target_modules=["q_proj"]), r"8 unexpected \(model\.layers\.0"),
    "targets are nowhere": (change_config(target_modules=["nope"]), "nope"),
    "layer that another adapter replaces": (change_config(target_modules=["fc1"]), "which is part of a module"),
    "module that another adapter adapts": (change_config(modules_to_save=["mlp"]), "which is part of a module"),
    "no magnitudes": (change_config(use_dora=True), r"missing \(model.*lora_magnitude_vector"),
    "biases": (change_config(bias="all"), "sets bias, but the pipeline loads only LoRA"),
    "start that changes the decoder": (change_config(init_lora_weights="pissa"), "sets init_lora_weights"),
    "weights are cut off": (cut_off("adapter_model.safetensors"), "safetensor|header|incomplete"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_adapter_that_does_not_fit_is_named_and_leaves_all_as_it_was(adapters, tmp_path, damage, message):
    folder = tmp_path / "damaged"
    shutil.copytree(adapters / "plain", folder)
    damage(folder)
    pipe = load(adapters / "text", "one")
    state, adapted = copy_state(pipe), compute_logits(pipe.transformer)
    with pytest.raises(ValueError, match=rf"`{folder}` holds no LoRA adapter for this decoder: .*({message})"):
        pipe.load_lora_weights(folder)
    assert_untouched(pipe, state)
    assert torch.equal(compute_logits(pipe.transformer), adapted)


def test_saving_needs_to_know_which_adapter(adapters, tmp_path):
    with pytest.raises(ValueError, match=r"`adapter_name` is None.*: none"):
        build_pipeline().save_lora_weights(tmp_path)
    pipe = load(adapters / "plain", "one")
    pipe.load_lora_weights(adapters / "plain", adapter_name="two")
    with pytest.raises(ValueError, match=r"`adapter_name` is None; .*: one, two"):
        pipe.save_lora_weights(tmp_path)
