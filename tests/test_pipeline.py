"""What the pipeline promises: how inputs pair up, what comes out, what a folder keeps, and what is refused."""

import json
import re
import runpy
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
import accelerate.hooks
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import NUM_CODES, NUM_TEXT_TOKENS, STRIDE, TEXT_HIDDEN_SIZE, build_pipeline

from editar_hf import EditARPipeline
from editar_hf.pipelines.hub import make_card


EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPT = "make the red circle blue"
SIDE = 16
NUM_TOKENS = (SIDE // STRIDE) ** 2
COMPONENTS = ("transformer", "vq_model", "text_encoder")


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    """A folder that the pipeline was saved to; copy it before changing it."""
    folder = tmp_path_factory.mktemp("saved") / "tiny-editor"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny-editor")


def draw_image(seed=0, height=SIDE, width=SIDE):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def edit(pipe, prompt=PROMPT, image=None, **kwargs):
    """Edit with a seed and return the tokens."""
    image = draw_image() if image is None else image
    return pipe(prompt, image=image, **{"generator": seeded(0), "output_type": "tokens", **kwargs}).image_tokens


def compute_pixels(images):
    return np.stack([np.asarray(image) for image in images])


# What a call does


def test_call_equals_its_parts_put_together_by_hand(pipe):
    image = draw_image()
    output = pipe(PROMPT, image=image, generator=seeded(3))

    pixel_values = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    inputs = pipe.processor.tokenizer(PROMPT, padding="max_length", max_length=NUM_TEXT_TOKENS, return_tensors="pt")
    with torch.no_grad():
        tokens = pipe.transformer.generate(
            pipe.vq_model.encode(pixel_values).image_tokens,
            pipe.text_encoder(**inputs).last_hidden_state,
            generator=seeded(3),
        )
        drawn = pipe.vq_model.decode(tokens)[0]
    assert torch.equal(output.image_tokens, tokens)
    expected = ((drawn.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(output.images[0]), expected)
    assert output.num_passes == NUM_TOKENS - 1


def test_prompt_source_and_seed_each_change_the_tokens(pipe):
    tokens = [
        edit(pipe),
        edit(pipe, prompt="remove the green square"),
        edit(pipe, image=draw_image(1)),
        edit(pipe, generator=seeded(1)),
    ]
    assert len({tuple(one[0].tolist()) for one in tokens}) == 4


def test_image_is_the_same_alone_and_in_a_batch(pipe):
    prompts, images = [PROMPT, "remove the green square", "add a star"], [draw_image(seed) for seed in range(3)]
    batch = edit(pipe, prompts, images, generator=[seeded(7), seeded(8), seeded(9)])
    for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        assert torch.equal(edit(pipe, prompt, image, generator=seeded(7 + index))[0], batch[index])


def test_one_image_serves_many_prompts_and_one_prompt_many_images(pipe):
    prompts, images = [PROMPT, "remove the green square"], [draw_image(0), draw_image(1)]
    many_prompts = edit(pipe, prompts, images[0], generator=[seeded(0), seeded(1)])
    many_images = edit(pipe, PROMPT, images, generator=[seeded(0), seeded(1)])
    for index in range(2):
        assert torch.equal(many_prompts[index], edit(pipe, prompts[index], images[0], generator=seeded(index))[0])
        assert torch.equal(many_images[index], edit(pipe, PROMPT, images[index], generator=seeded(index))[0])


def test_images_per_prompt_come_prompt_by_prompt(pipe):
    prompts, images = [PROMPT, "remove the green square"], [draw_image(0), draw_image(1)]
    tokens = edit(pipe, prompts, images, num_images_per_prompt=2, generator=[seeded(seed) for seed in range(4)])
    for index in range(4):
        alone = edit(pipe, prompts[index // 2], images[index // 2], generator=seeded(index))
        assert torch.equal(tokens[index], alone[0])


def test_one_generator_gives_every_image_another_seed(pipe):
    tokens = edit(pipe, num_images_per_prompt=3)
    assert len({tuple(row.tolist()) for row in tokens}) == 3
    assert torch.equal(tokens[0], edit(pipe)[0])


def test_embeddings_stand_for_their_text(pipe):
    negative = "remove the green square"
    text = edit(pipe, negative_prompt=negative)
    embeds = {"prompt_embeds": pipe.encode_prompt(PROMPT), "negative_prompt_embeds": pipe.encode_prompt(negative)}
    assert torch.equal(text, edit(pipe, None, **embeds))
    assert not torch.equal(text, edit(pipe))


def test_encoded_image_stands_for_the_image(pipe):
    images = [draw_image(0, 30, 20), draw_image(1)]
    tokens = pipe.encode_image(images, resize_mode="stretch")
    assert tokens.shape == (2, NUM_TOKENS)
    output = pipe(PROMPT, source_image_tokens=tokens, generator=seeded(0), output_type="tokens")
    assert torch.equal(output.image_tokens, edit(pipe, image=images, resize_mode="stretch"))


def test_tokens_of_one_turn_are_the_source_of_the_next(pipe):
    first = pipe(PROMPT, image=draw_image(), generator=seeded(0))
    second = pipe("remove it", source_image_tokens=first.image_tokens, generator=seeded(1)).image_tokens
    with torch.no_grad():
        expected = pipe.transformer.generate(first.image_tokens, pipe.encode_prompt("remove it"), generator=seeded(1))
    assert torch.equal(second, expected)


def test_text_to_image_needs_no_image(pipe):
    output = pipe(PROMPT, generator=seeded(0))
    with torch.no_grad():
        expected = pipe.transformer.generate(None, pipe.encode_prompt(PROMPT), generator=seeded(0))
    assert torch.equal(output.image_tokens, expected)
    assert output.images[0].size == (SIDE, SIDE)


def test_task_puts_the_published_prefix_before_the_prompt():
    pipe = build_pipeline(num_text_tokens=60)
    prefix = "Given the depth image, generate an image following the description: "
    tokens = edit(pipe, "a star", task="depth")
    assert torch.equal(tokens, edit(pipe, prefix + "a star"))
    assert not torch.equal(tokens, edit(pipe, "a star"))
    both = edit(pipe, "a star", task=["depth", "edit"], generator=[seeded(0), seeded(0)])
    assert torch.equal(both, torch.cat([tokens, edit(pipe, "a star")]))


def test_height_and_width_choose_a_rectangle(pipe):
    output = pipe(PROMPT, image=draw_image(0, 8, 12), height=8, width=12, generator=seeded(0))
    assert output.images[0].size == (12, 8)
    assert output.image_tokens.shape == (1, 6)
    again = pipe(PROMPT, source_image_tokens=output.image_tokens, height=8, width=12, generator=seeded(0))
    assert again.images[0].size == (12, 8)


def test_output_types_agree(pipe):
    outputs = {
        kind: pipe(PROMPT, image=draw_image(), generator=seeded(0), output_type=kind).images
        for kind in ("pil", "np", "pt", "tokens")
    }
    assert outputs["np"].shape == (1, SIDE, SIDE, 3)
    assert np.array_equal(outputs["np"], outputs["pt"].permute(0, 2, 3, 1).numpy())
    assert np.array_equal(compute_pixels(outputs["pil"]), np.round(outputs["np"] * 255).astype(np.uint8))
    drawn = pipe.decode_image_tokens(outputs["tokens"], output_type="np")
    assert np.array_equal(drawn, outputs["np"])


def test_values_come_as_a_tuple_on_request(pipe):
    images, image_tokens, num_passes = pipe(PROMPT, image=draw_image(), generator=seeded(0), return_dict=False)
    assert (len(images), image_tokens.shape, num_passes) == (1, (1, NUM_TOKENS), NUM_TOKENS - 1)


def test_what_goes_in_stays_as_it_is(pipe):
    image, array, tokens = draw_image(), np.asarray(draw_image()).copy(), pipe.encode_image(draw_image())
    before = image.tobytes(), array.copy(), tokens.clone()
    prompts, tasks = [PROMPT], ["edit"]
    pipe(prompts, image=[image, array], task=tasks, restore_size=True)
    pipe(prompts, source_image_tokens=tokens)
    assert image.tobytes() == before[0]
    assert np.array_equal(array, before[1])
    assert torch.equal(tokens, before[2])
    assert (prompts, tasks) == ([PROMPT], ["edit"])


# The source's size


def test_restored_crop_lies_in_its_place_in_the_untouched_source(pipe):
    source = draw_image(0, 2 * SIDE, 4 * SIDE)
    with pytest.warns(UserWarning, match="cut away"):
        output = pipe(PROMPT, image=source, generator=seeded(0), restore_size=True)
    expected = source.copy()
    edited = pipe.decode_image_tokens(output.image_tokens)[0].resize((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    expected.paste(edited, (SIDE, 0))
    assert np.array_equal(np.asarray(output.images[0]), np.asarray(expected))


def test_restored_stretch_has_the_size_of_each_source(pipe):
    sources = [draw_image(0, 20, 31), draw_image(1, 40, 17)]
    output = pipe(PROMPT, image=sources, num_images_per_prompt=2, resize_mode="stretch", restore_size=True)
    assert [image.size for image in output.images] == [(31, 20), (31, 20), (17, 40), (17, 40)]


def test_edited_tokens_return_into_the_first_source(pipe):
    source = draw_image(0, 20, 31)
    tokens = pipe.encode_image(source, resize_mode="stretch")
    same = pipe(PROMPT, image=source, source_image_tokens=tokens, resize_mode="stretch", restore_size=True)
    assert same.images[0].size == (31, 20)


# Guidance and sampling settings


def test_explicit_argument_wins_over_the_generation_config_of_the_folder(saved):
    pipe = EditARPipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    sampled = edit(pipe)
    greedy = edit(pipe, do_sample=False)
    assert not torch.equal(sampled, greedy)
    pipe.transformer.generation_config.do_sample = False
    assert torch.equal(edit(pipe), greedy)
    assert torch.equal(edit(pipe, do_sample=True), sampled)


def test_settings_of_the_generation_config_round_trip(pipe, folder):
    path = folder / "transformer" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "guidance_scale": 1.5, "top_k": 5}))
    loaded = EditARPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    expected = edit(pipe, guidance_scale=1.5, top_k=5)
    assert torch.equal(edit(loaded), expected)
    assert not torch.equal(edit(pipe), expected)
    loaded.save_pretrained(folder / "again")
    again = json.loads((folder / "again" / "transformer" / "generation_config.json").read_text())
    assert (again["guidance_scale"], again["top_k"]) == (1.5, 5)


def test_image_guidance_scale_of_one_equals_none(pipe):
    assert torch.equal(edit(pipe, image_guidance_scale=1), edit(pipe))
    assert not torch.equal(edit(pipe, image_guidance_scale=2.5), edit(pipe))


# Steps


def test_callback_sees_every_token_as_it_is_decoded(pipe):
    seen = []
    tokens = edit(pipe, callback_on_step_end=lambda *arguments: seen.append(arguments))
    assert [(step, timestep) for _, step, timestep, _ in seen] == [(step, step) for step in range(NUM_TOKENS)]
    for caller, step, _, tensors in seen:
        assert caller is pipe
        assert list(tensors) == ["image_tokens"]
        assert torch.equal(tensors["image_tokens"], tokens[:, : step + 1])


def test_callback_gets_the_tensors_it_asks_for_and_cannot_change_the_result(pipe):
    def erase(caller, step, timestep, tensors):
        assert torch.equal(tensors["source_image_tokens"], pipe.encode_image(draw_image()))
        tensors["image_tokens"].zero_()

    names = ["image_tokens", "source_image_tokens"]
    erased = edit(pipe, callback_on_step_end=erase, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(erased, edit(pipe))


@pytest.mark.parametrize("has_source", [True, False])
def test_interrupt_stops_within_a_step_and_still_gives_a_picture(pipe, has_source):
    def interrupt(caller, step, timestep, tensors):
        if step == 4:
            caller.interrupt()

    arguments = {"image": draw_image() if has_source else None, "generator": seeded(0)}
    output = pipe(PROMPT, **arguments, callback_on_step_end=interrupt)
    complete = pipe(PROMPT, **{**arguments, "generator": seeded(0)})
    fill = pipe.encode_image(draw_image() if has_source else np.full((SIDE, SIDE, 3), 0.5))
    assert output.num_passes == 4
    assert torch.equal(output.image_tokens, torch.cat([complete.image_tokens[:, :5], fill[:, 5:]], dim=1))
    assert output.images[0].size == (SIDE, SIDE)
    assert complete.num_passes == NUM_TOKENS - 1, "an interrupt must not outlive its call"


def test_progress_bar_counts_tokens_and_can_be_switched_off(capsys):
    pipe = build_pipeline()
    edit(pipe)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    edit(pipe)
    assert f"{NUM_TOKENS}/{NUM_TOKENS}" in capsys.readouterr().err


# Offload. On a CPU too hooks fire, and weights move between the CPU and "meta", as they would beside an accelerator.


def test_model_offload_calls_the_hook_of_every_network_a_call_uses(monkeypatch):
    pipe = build_pipeline()
    expected = edit(pipe)
    called = []
    plain = accelerate.hooks.CpuOffload.pre_forward
    monkeypatch.setattr(
        accelerate.hooks.CpuOffload,
        "pre_forward",
        lambda hook, module, *args, **kwargs: (called.append(module), plain(hook, module, *args, **kwargs))[1],
    )
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(edit(pipe), expected)
    assert [called.count(part) for part in (pipe.text_encoder, pipe.vq_model)] == [1, 1]
    assert called.count(pipe.transformer) > NUM_TOKENS
    pipe(PROMPT, image=draw_image())
    assert called.count(pipe.vq_model) == 3, "once to encode and once to decode"


def test_sequential_offload_finds_every_weight():
    pipe = build_pipeline()
    expected = pipe(PROMPT, image=draw_image(), generator=seeded(0), image_guidance_scale=2.0)
    for name in COMPONENTS:  # what `enable_sequential_cpu_offload` does; itself it insists on a device with an index
        part = getattr(pipe, name)
        accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {"meta"}
    output = pipe(PROMPT, image=draw_image(), generator=seeded(0), image_guidance_scale=2.0)
    assert torch.equal(output.image_tokens, expected.image_tokens)
    assert np.array_equal(compute_pixels(output.images), compute_pixels(expected.images))


# Folders


def test_saved_pipeline_gives_the_same_picture_after_loading(pipe, saved):
    loaded = EditARPipeline.from_pretrained(saved)
    loaded.set_progress_bar_config(disable=True)
    pictures = [each(PROMPT, image=draw_image(), generator=seeded(0)).images for each in (pipe, loaded)]
    assert np.array_equal(compute_pixels(pictures[0]), compute_pixels(pictures[1]))


def test_model_index_names_the_package_and_no_module_of_it(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["transformer"] == ["editar_hf", "EditARForConditionalGeneration"]
    assert index["vq_model"] == ["editar_hf", "EditARVQModel"]
    assert index["processor"] == ["editar_hf", "EditARProcessor"]
    assert index["text_encoder"] == ["transformers", "T5EncoderModel"]


def test_folder_holds_no_path_of_this_machine(saved):
    for path in saved.rglob("*"):
        if path.is_file():
            assert str(saved.parent).encode() not in path.read_bytes(), path


def test_component_can_be_passed_in_or_left_out(pipe, folder):
    shutil.rmtree(folder / "text_encoder")
    loaded = EditARPipeline.from_pretrained(folder, vq_model=pipe.vq_model, text_encoder=None)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.vq_model is pipe.vq_model
    assert torch.equal(edit(loaded, None, prompt_embeds=pipe.encode_prompt(PROMPT)), edit(pipe))
    with pytest.raises(ValueError, match=r"`prompt` is .*no text encoder"):
        edit(loaded)


def test_dtype_is_chosen_per_component(saved):
    dtype = {"transformer": torch.bfloat16, "text_encoder": torch.float64, "default": torch.float32}
    pipe = EditARPipeline.from_pretrained(saved, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    assert [getattr(pipe, name).dtype for name in COMPONENTS] == [torch.bfloat16, torch.float32, torch.float64]
    assert edit(pipe).shape == (1, NUM_TOKENS)


def test_feed_forward_output_of_the_text_encoder_stays_fp32_in_fp16(saved):
    pipe = EditARPipeline.from_pretrained(saved, dtype=torch.float16)
    dtypes = {name: weight.dtype for name, weight in pipe.text_encoder.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".wo." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".wo." not in name} == {torch.float16}
    assert pipe.transformer.dtype == pipe.vq_model.dtype == torch.float16


def test_variant_is_loaded_where_there_is_one(pipe, folder):
    shutil.copyfile(folder / "vq_model" / "model.safetensors", folder / "vq_model" / "model.other.safetensors")
    weights = load_file(folder / "transformer" / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].flip(0)
    save_file(weights, folder / "transformer" / "model.other.safetensors", metadata={"format": "pt"})
    loaded = EditARPipeline.from_pretrained(folder, variant="other")
    assert torch.equal(loaded.transformer.lm_head.weight, pipe.transformer.lm_head.weight.flip(0))


def test_card_is_written_once_and_kept_afterwards(pipe, folder):
    card = folder / "README.md"
    assert card.read_text() == make_card("base", "tiny-editor")
    card.write_text("what the user says")
    pipe.save_pretrained(folder)
    assert card.read_text() == "what the user says"


# The example


@pytest.mark.parametrize("has_image", [False, True])
def test_example_writes_before_and_after_side_by_side(saved, tmp_path, capsys, has_image):
    main = runpy.run_path(str(EXAMPLES / "edit_photo.py"))["main"]
    output, source = tmp_path / "new" / "both.png", tmp_path / "source.png"
    draw_image(0, 20, 20).save(source)
    main(["--model", str(saved), "--output", str(output), *(["--image", str(source)] if has_image else [])])
    assert str(output) in capsys.readouterr().out
    with Image.open(output) as both:
        assert both.width > 2 * both.height
        before, after = (
            both.crop((0, 0, both.height, both.height)),
            both.crop((both.width - both.height, 0, *both.size)),
        )
    if has_image:
        assert np.array_equal(np.asarray(before), np.asarray(draw_image(0, 20, 20)))
    assert not np.array_equal(np.asarray(before), np.asarray(after))


# Folders that are refused


def change_weights(folder, component, change):
    path = folder / component / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("component", "key"),
    [
        ("transformer", "model.layers.1.mlp.up_proj.weight"),
        ("vq_model", "quantize.embedding.weight"),
        ("text_encoder", "encoder.final_layer_norm.weight"),
    ],
)
def test_missing_unexpected_and_misshaped_keys_are_listed(folder, component, key):
    change_weights(folder, component, lambda weights: weights.update({"stray": weights.pop(key)}))
    with pytest.raises(ValueError, match=rf"1 missing \({key}\); 1 unexpected \(stray\)"):
        EditARPipeline.from_pretrained(folder)
    change_weights(folder, component, lambda weights: weights.update({key: weights.pop("stray")[:-1]}))
    with pytest.raises(ValueError, match=rf"1 wrongly shaped \({key} \(.*\) instead of \(.*\)\)"):
        EditARPipeline.from_pretrained(folder)


def test_text_encoder_may_store_either_name_of_its_embedding(pipe, folder):
    def rename(weights):
        weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")

    change_weights(folder, "text_encoder", rename)
    loaded = EditARPipeline.from_pretrained(folder)
    assert torch.equal(loaded.text_encoder.shared.weight, pipe.text_encoder.shared.weight)


def test_file_that_is_no_checkpoint_is_refused(folder):
    (folder / "vq_model" / "model.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="vq_model` holds no EditARVQModel that loads"):
        EditARPipeline.from_pretrained(folder)


def test_folder_without_model_index_is_refused(folder):
    (folder / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"has no `model_index\.json`"):
        EditARPipeline.from_pretrained(folder)


def test_folder_of_another_pipeline_is_refused(folder):
    (folder / "model_index.json").write_text('{"_class_name": "OtherPipeline", "unet": ["diffusers", "Unet"]}')
    with pytest.raises(ValueError, match="lacks transformer, vq_model, text_encoder, processor"):
        EditARPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "file",
    ["model_index.json", "transformer/config.json", "transformer/generation_config.json", "processor/tokenizer.json"],
)
def test_json_that_is_cut_off_is_refused_by_its_folder(folder, file):
    (folder / file).write_text('{"a":')
    with pytest.raises((ValueError, OSError), match=re.escape(str((folder / file).parent))):
        EditARPipeline.from_pretrained(folder)


def test_a_configuration_that_describes_no_network_is_refused_by_its_folder(folder):
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps({**config, "num_attention_heads": 0}))
    with pytest.raises(ValueError, match="transformer` holds no EditARForConditionalGeneration that loads"):
        EditARPipeline.from_pretrained(folder)


@pytest.mark.parametrize("instructions", [[], ["avx512_bf16"], ["amx_bf16"], ["avx512_fp16"]], ids=str)
def test_bf16_files_stay_bf16_where_the_cpu_computes_in_it(saved, tmp_path, monkeypatch, instructions):
    EditARPipeline.from_pretrained(saved, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    expected = torch.bfloat16 if set(instructions) & {"avx512_bf16", "amx_bf16"} else torch.float32
    assert EditARPipeline.from_pretrained(tmp_path / "bf16").dtype == expected
    assert EditARPipeline.from_pretrained(tmp_path / "bf16", dtype="auto").dtype == torch.bfloat16
    assert EditARPipeline.from_pretrained(tmp_path / "bf16", dtype=torch.float64).dtype == torch.float64
    assert EditARPipeline.from_pretrained(saved).dtype == torch.float32


def test_a_dtype_that_is_a_word_is_refused(saved):
    with pytest.raises(ValueError, match="`dtype` is 'bf16'"):
        EditARPipeline.from_pretrained(saved, dtype="bf16")


def test_pipelines_loaded_at_once_in_threads_have_their_weights(pipe, saved):
    with ThreadPoolExecutor(4) as pool:
        pipelines = list(pool.map(lambda _: EditARPipeline.from_pretrained(saved), range(8)))
    for loaded in pipelines:
        for name in COMPONENTS:
            weights = getattr(loaded, name).state_dict()
            assert all(torch.equal(weights[key], value) for key, value in getattr(pipe, name).state_dict().items())


def test_the_attention_of_the_decoder_is_chosen_at_loading(saved):
    loaded = EditARPipeline.from_pretrained(saved, attn_implementation="eager")
    assert loaded.transformer.config._attn_implementation == "eager"


def test_a_missing_folder_is_called_missing(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        EditARPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(OSError, match="`sticker-editor` is no folder here, and neither the cache nor the Hub"):
        EditARPipeline.from_pretrained("sticker-editor")


def test_file_in_place_of_a_folder_is_refused(tmp_path):
    path = Path(tmp_path / "editar.pt")
    path.write_bytes(b"weights")
    with pytest.raises(ValueError, match="is a file; give a pipeline folder"):
        EditARPipeline.from_pretrained(path)


# Bad input

TEXT = torch.zeros(1, NUM_TEXT_TOKENS, TEXT_HIDDEN_SIZE)
TOKENS = torch.zeros(1, NUM_TOKENS, dtype=torch.long)
BAD_INPUT = {
    "no prompt": ({"prompt": None}, "`prompt` is None"),
    "prompt that is no text": ({"prompt": 3}, "`prompt` is 3"),
    "empty list of prompts": ({"prompt": []}, r"`prompt` is \[\]"),
    "text beside its states": ({"prompt_embeds": TEXT}, "`prompt` is .* beside `prompt_embeds`"),
    "negative text beside its states": (
        {"negative_prompt": "ugly", "negative_prompt_embeds": TEXT},
        "`negative_prompt` is 'ugly' beside `negative_prompt_embeds`",
    ),
    "states of another width": ({"prompt": None, "prompt_embeds": TEXT[..., 1:]}, r"`prompt_embeds` has shape"),
    "states of another length": ({"prompt": None, "prompt_embeds": TEXT[:, 1:]}, r"`prompt_embeds` has shape"),
    "task without text": ({"prompt": None, "prompt_embeds": TEXT, "task": "depth"}, "`task` is 'depth'"),
    "unknown task": ({"task": "colour"}, "`task` is 'colour'"),
    "tasks that do not pair up": ({"prompt": ["a", "b"], "task": ["edit"] * 3}, "`task` has 3 entries"),
    "lists that do not pair up": (
        {"prompt": ["a", "b", "c"], "image": [draw_image()] * 2},
        "`prompt` has 3, `image` has 2",
    ),
    "image that is nowhere": ({"image": "no-such-photo.png"}, "`image` is 'no-such-photo.png', from which no image"),
    "image of another type": ({"image": 5}, "`image` holds a int"),
    "image of two channels": ({"image": np.zeros((4, 4, 2), np.uint8)}, "holds an image of shape"),
    "no images in a list": ({"image": []}, "`image` is an empty list"),
    "image beside tokens": ({"source_image_tokens": TOKENS}, "`image` is .* beside `source_image_tokens`"),
    "too few tokens": ({"image": None, "source_image_tokens": TOKENS[:, 1:]}, "`source_image_tokens` has shape"),
    "tokens out of range": ({"image": None, "source_image_tokens": TOKENS + NUM_CODES}, "holds ids from 40"),
    "negative tokens": ({"image": None, "source_image_tokens": TOKENS - 1}, "holds ids from -1"),
    "height off the stride": ({"height": 10}, "`height` is 10"),
    "width beyond the grid": ({"width": 2 * SIDE}, "`width` is 32"),
    "width of zero": ({"width": 0}, "`width` is 0"),
    "unknown resize mode": ({"resize_mode": "pad"}, "`resize_mode` is 'pad'"),
    "unknown output type": ({"output_type": "jpg"}, "`output_type` is 'jpg'"),
    "size restored without image": ({"image": None, "restore_size": True}, "`restore_size` is True without"),
    "size restored for arrays": ({"restore_size": True, "output_type": "np"}, "`output_type` is 'np' with"),
    "image guidance without image": ({"image": None, "image_guidance_scale": 2}, "`image_guidance_scale` is 2"),
    "negative temperature": ({"temperature": -1.0}, "`temperature` is -1.0"),
    "top-p above one": ({"top_p": 1.5}, "`top_p` is 1.5"),
    "negative top-k": ({"top_k": -1}, "`top_k` is -1"),
    "no images per prompt": ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
    "too few generators": ({"generator": [seeded(0)], "num_images_per_prompt": 2}, "`generator` is a list of 1"),
    "guidance that is no number": ({"guidance_scale": float("nan")}, "`guidance_scale` is nan; pass a finite number"),
    "guidance as text": ({"guidance_scale": "3"}, "`guidance_scale` is '3'"),
    "image guidance that is infinite": ({"image_guidance_scale": float("inf")}, "`image_guidance_scale` is inf"),
    "temperature that is no number": ({"temperature": float("nan")}, "`temperature` is nan"),
    "sampling as text": ({"do_sample": "no"}, "`do_sample` is 'no'; pass True or False"),
    "top-k in parts": ({"top_k": 1.5}, "`top_k` is 1.5"),
    "states that are not finite": ({"prompt": None, "prompt_embeds": TEXT / 0}, "`prompt_embeds` holds NaN"),
    "states that are no tensor": ({"prompt": None, "prompt_embeds": "states"}, "`prompt_embeds` is 'states'"),
    "tokens that are no tensor": ({"image": None, "source_image_tokens": [1]}, r"`source_image_tokens` is \[1\]"),
    "tokens as floats": ({"image": None, "source_image_tokens": TOKENS.float()}, "holds torch.float32"),
    "seed as a generator": ({"generator": 0}, r"`generator` is 0; pass `torch.Generator\(\)"),
    "seed as a generator of greedy decoding": ({"generator": 0, "do_sample": False}, "`generator` is 0"),
    "callback that is no function": ({"callback_on_step_end": 3}, "`callback_on_step_end` is 3; pass a function"),
    "names of tensors as text": ({"callback_on_step_end_tensor_inputs": "image_tokens"}, "pass a list of names"),
    "far too many images": ({"num_images_per_prompt": 10**12}, "`num_images_per_prompt` is 1000000000000"),
    "size restored by a word": ({"restore_size": "yes"}, "`restore_size` is 'yes'"),
    "height as text": ({"height": "16"}, "`height` is '16'"),
    "source of text-to-image": ({"task": "text-to-image"}, "`task` is 'text-to-image' beside a source image"),
    "unknown callback tensor": ({"callback_on_step_end_tensor_inputs": ["latents"]}, "holds latents"),
}


@pytest.fixture
def pipe_at_rest(pipe):
    """The pipeline, in which running any network is a failure."""

    def fail(*arguments):
        pytest.fail("a network ran before the input was refused")

    handles = [
        module.register_forward_pre_hook(fail) for name in COMPONENTS for module in getattr(pipe, name).modules()
    ]
    yield pipe
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_before_a_network_runs(pipe_at_rest, case):
    arguments, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        pipe_at_rest(**{"prompt": PROMPT, "image": draw_image(), **arguments})


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("seed", "torch.Generator"), ("strength", "mask_image"), ("num_inference_steps", "speculative"), ("x", "help")],
)
def test_arguments_of_other_pipelines_are_refused_with_what_to_use_instead(pipe_at_rest, name, remedy):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}': .*{remedy}"):
        pipe_at_rest(PROMPT, image=draw_image(), **{name: 1})


def test_numbers_of_numpy_are_numbers(pipe):
    arguments = {"height": 16, "num_images_per_prompt": 2, "top_k": 5, "guidance_scale": 2.0}
    numpy_arguments = {name: np.array(value)[()] for name, value in arguments.items()}
    assert torch.equal(edit(pipe, **numpy_arguments), edit(pipe, **arguments))


def test_states_that_overflow_end_in_an_error_that_names_the_cause():
    pipe = build_pipeline()
    pipe.text_encoder.encoder.final_layer_norm.weight.data.fill_(float("inf"))
    with pytest.raises(RuntimeError, match=r"states of `prompt` are NaN or infinite.*float16"):
        pipe(PROMPT, image=draw_image())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("arguments", [{}, {"decoding": "speculative"}, {"guidance_scale": 1.0}], ids=str)
def test_logits_that_overflow_end_in_an_error_that_names_the_cause(value, arguments):
    pipe = build_pipeline()
    pipe.transformer.lm_head.weight.data[3, 5] = value
    with pytest.raises(RuntimeError, match=r"logits were NaN or infinite.*float16"):
        edit(pipe, **arguments)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.9}, "`temperature`, `top_k`, `top_p`"),
        ({"num_images_per_prompt": 2}, "`num_images_per_prompt`"),
        ({"num_images_per_prompt": 2, "generator": [seeded(0), seeded(1)]}, "`generator`, `num_images_per_prompt`"),
        ({"prompt": [PROMPT, PROMPT], "generator": [seeded(0), seeded(1)]}, "`generator`"),
    ],
)
def test_what_changes_nothing_without_sampling_warns_at_the_call(pipe, arguments, names):
    with pytest.warns(UserWarning, match=f"^{names} had no effect") as record:
        pipe(**{"prompt": PROMPT, **arguments}, image=draw_image(), do_sample=False)
    assert record[0].filename == __file__


def test_an_edit_without_an_image_warns_and_text_to_image_does_not(pipe):
    with pytest.warns(UserWarning, match="`image` is missing.*task='text-to-image'") as record:
        expected = pipe(PROMPT, generator=seeded(0)).image_tokens
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = pipe(PROMPT, task="text-to-image", generator=seeded(0)).image_tokens
        listed = pipe([PROMPT], task=["text-to-image"], generator=seeded(0)).image_tokens
    assert torch.equal(tokens, expected)
    assert torch.equal(listed, expected)


@pytest.mark.parametrize("kind", [str, Path])
def test_image_and_mask_may_be_paths(pipe, tmp_path, kind):
    draw_image().save(tmp_path / "photo.png")
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, 8, 8))
    mask.save(tmp_path / "mask.png")
    paths = {"image": kind(tmp_path / "photo.png"), "mask_image": kind(tmp_path / "mask.png")}
    assert torch.equal(edit(pipe, **paths), edit(pipe, image=draw_image(), mask_image=mask))


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({}, (24, 20)),
        ({"restore_size": False}, (SIDE, SIDE)),
        ({"height": SIDE}, (SIDE, SIDE)),
        ({"task": "canny"}, (SIDE, SIDE)),
        ({"task": ["edit"]}, (24, 20)),
    ],
)
def test_an_edit_has_the_size_of_its_source_unless_another_is_asked_for(pipe, arguments, size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = pipe(PROMPT, image=draw_image(0, 20, 24), generator=seeded(0), **arguments)
    assert output.images[0].size == size


def test_image_that_does_not_decode_is_refused_before_a_network_runs(pipe_at_rest, tmp_path):
    path = tmp_path / "broken.png"
    draw_image().save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"broken\.png.* does not decode"):
        pipe_at_rest(PROMPT, image=Image.open(path))


def test_long_prompt_is_cut_with_a_warning(pipe):
    with pytest.warns(UserWarning, match="this part was cut"):
        edit(pipe, "make the red circle blue and " * 10)


def test_tokens_that_do_not_fill_the_grid_cannot_be_drawn(pipe):
    with pytest.raises(ValueError, match="`image_tokens` holds 15 tokens"):
        pipe.decode_image_tokens(TOKENS[:, 1:])
