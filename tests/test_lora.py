"""LoRA in the pipeline, against PEFT itself and against the formula."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from hub_server import HubServer, Repository
from peft import LoraConfig, PeftModel, get_peft_model
from processes import run_python
from safetensors.torch import load_file
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


@pytest.mark.parametrize("leave", ["unload_lora_weights", "delete_adapters"])
def test_without_its_adapters_the_pipeline_is_the_one_before(tmp_path, modules_to_save, leave):
    write_adapter(tmp_path / "adapter", modules_to_save=modules_to_save)
    pipe = build_pipeline()
    before = copy.deepcopy(pipe.transformer.state_dict())
    pipe.load_lora_weights(tmp_path / "adapter")
    pipe.unload_lora_weights() if leave == "unload_lora_weights" else pipe.delete_adapters("default_0")
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


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


def test_saving_a_pipeline_with_adapters_is_refused_with_the_two_ways_out(adapter_folder, tmp_path):
    pipe = build_pipeline()
    pipe.load_lora_weights(adapter_folder / "plain")
    with pytest.raises(ValueError, match=r"adapters default_0.*`save_lora_weights`.*`fuse_lora`"):
        pipe.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


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


@pytest.mark.parametrize("seed", range(3))
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


def test_while_adapters_are_fused_nothing_changes_and_pipelines_that_share_the_decoder_know(adapter_folder):
    pipe = build_pipeline()
    pipe.load_lora_weights(adapter_folder / "text", adapter_name="mine")
    pipe.fuse_lora(0.5)
    state, other = copy_state(pipe), EditARPipeline(**pipe.components)
    for change in (
        lambda: other.load_lora_weights(adapter_folder / "plain"),
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


@pytest.mark.parametrize("name", ["weight", "fc1", "lora_A", "my style"])
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
        (lambda pipe: pipe.set_adapters(["one"], [1, 1]), ValueError, "`adapter_weights` has 2 numbers; give one"),
        (lambda pipe: pipe.set_adapters(["one", "nope"]), ValueError, "`adapter_names` names nope; there are one"),
        (lambda pipe: pipe.set_adapters(["one", "one"]), ValueError, "give each adapter once"),
        (lambda pipe: pipe.set_adapters(None), TypeError, "`adapter_names` is None"),
        (lambda pipe: pipe.delete_adapters("nope"), ValueError, "`adapter_names` names nope"),
        (lambda pipe: pipe.fuse_lora(adapter_names=["nope"]), ValueError, "`adapter_names` names nope"),
        (lambda pipe: pipe.fuse_lora("1"), ValueError, "`lora_scale` is '1'"),
        (lambda pipe: pipe.fuse_lora(1e39), ValueError, "would get infinite weights or NaN"),
        (lambda pipe: pipe.save_lora_weights("out", "nope"), ValueError, "`adapter_name` is 'nope'; there are one"),
        (lambda pipe: pipe.load_lora_weights("./nowhere"), ValueError, "no such folder"),
        (lambda pipe: pipe.load_lora_weights("nowhere/lora", local_files_only=True), ValueError, "holds no LoRA"),
        (lambda pipe: pipe.load_lora_weights(".", adapter_name=""), ValueError, "`adapter_name` is ''"),
        (lambda pipe: pipe.load_lora_weights(".", adapter_name="v1.0"), ValueError, "`adapter_name` is 'v1.0'"),
        (lambda pipe: pipe.load_lora_weights(".", adapter_name="keys"), ValueError, "`adapter_name` is 'keys'"),
        (lambda pipe: pipe.load_lora_weights(".", adapter_name="one"), ValueError, "`adapter_name` is 'one'"),
    ],
)
def test_bad_arguments_are_named_and_leave_all_as_it_was(adapter_folder, call, error, message):
    pipe = build_pipeline()
    pipe.load_lora_weights(adapter_folder / "text", adapter_name="one")
    state = copy_state(pipe)
    with pytest.raises(error, match=message):
        call(pipe)
    assert_untouched(pipe, state)


def change_config(**settings):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

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
    "layer that another adapter replaces": (change_config(target_modules=["fc1"]), "adapts a part of"),
    "module that another adapter adapts": (change_config(modules_to_save=["mlp"]), "adapts a part of"),
    "magnitudes": (change_config(use_dora=True), "sets use_dora; the pipeline loads plain LoRA"),
    "biases": (change_config(bias="all"), "sets bias"),
    "start that changes the decoder": (change_config(init_lora_weights="pissa"), "sets init_lora_weights"),
    "weights are cut off": (cut_off("adapter_model.safetensors"), "safetensor|header|incomplete"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_adapter_that_does_not_fit_is_named_and_leaves_all_as_it_was(adapter_folder, tmp_path, damage, message):
    folder = tmp_path / "damaged"
    shutil.copytree(adapter_folder / "plain", folder)
    damage(folder)
    pipe = build_pipeline()
    pipe.load_lora_weights(adapter_folder / "text", adapter_name="one")
    state, adapted = copy_state(pipe), compute_logits(pipe.transformer)
    with pytest.raises(ValueError, match=rf"`{folder}` holds no LoRA adapter of this decoder: .*({message})"):
        pipe.load_lora_weights(folder)
    assert_untouched(pipe, state)
    assert torch.equal(compute_logits(pipe.transformer), adapted)


def test_saving_needs_to_know_which_adapter(adapter_folder, tmp_path):
    pipe = build_pipeline()
    with pytest.raises(ValueError, match="there are no adapters"):
        pipe.save_lora_weights(tmp_path)
    for name in ("one", "two"):
        pipe.load_lora_weights(adapter_folder / "plain", adapter_name=name)
    with pytest.raises(ValueError, match="`adapter_name` is None; there are one, two"):
        pipe.save_lora_weights(tmp_path)
