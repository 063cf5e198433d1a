"""LoRA in the pipeline, against PEFT itself and against the formula."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer, Repository
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from processes import run_python
from tiny import build_pipeline, build_transformer

from editar_hf import EditARPipeline


EXAMPLES = Path(__file__).parents[1] / "examples"
TARGETS = ["q_proj", "v_proj", "down_proj"]
# An adapter of low-rank updates alone, and one that also replaces the text projection.
KINDS = {"low rank": None, "with a replaced module": ["text_projection"]}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def modules_to_save(request):
    return request.param


def write_adapter(folder, seed=0, modules_to_save=None, transformer=None, **settings):
    """Write an adapter with random weights by PEFT alone; return the decoder that has it."""
    torch.manual_seed(seed)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, **settings}, target_modules=TARGETS, modules_to_save=modules_to_save
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


# Bad input


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

    before = [pipe(prompt, image=picture) for prompt in prompts]
    assert is_blue(before[0].images[0]) == [True, False]
    pipe.load_lora_weights(EXAMPLES / "sticker-copy-lora")
    assert is_blue(pipe(prompts[0], image=picture).images[0]) == [True, True]
    pipe.disable_lora()
    after = [pipe(prompt, image=picture) for prompt in prompts]
    assert all(torch.equal(old.image_tokens, new.image_tokens) for old, new in zip(before, after, strict=True))
