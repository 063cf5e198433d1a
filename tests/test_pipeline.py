"""What the pipeline promises: how inputs pair up, what comes out, what a folder keeps, and what is refused."""

import json
import re
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
from tiny import NUM_TEXT_TOKENS, STRIDE, TEXT_HIDDEN_SIZE, build_pipeline, draw_image

from editar_hf import EditARPipeline
from editar_hf.pipelines.hub import make_card


PROMPT, OTHER_PROMPT = "make the red circle blue", "remove the green square"
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


def load(folder, **kwargs):
    pipe = EditARPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def edit(pipe, prompt=PROMPT, image=None, **kwargs):
    """Edit with a seed and return the tokens."""
    image = draw_image(0) if image is None else image
    return pipe(prompt, image=image, **{"generator": seeded(0), "output_type": "tokens", **kwargs}).image_tokens


# What a call does


def test_call_equals_its_parts_put_together_by_hand(pipe):
    image = draw_image(0)
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
    assert output.num_decode_steps == NUM_TOKENS - 1
    with pytest.warns(FutureWarning, match="num_decode_steps"):
        assert output.num_passes == NUM_TOKENS - 1


@pytest.mark.parametrize(
    ("prompts", "seeds_of_images", "num_images_per_prompt"),
    [([PROMPT, OTHER_PROMPT], [0, 1], 2), ([PROMPT, OTHER_PROMPT], [0], 1), ([PROMPT], [0, 1], 1), ([PROMPT], [0], 2)],
    ids=["pairs", "one image", "one prompt", "one pair"],
)
def test_every_result_is_that_of_its_own_prompt_image_and_seed(pipe, prompts, seeds_of_images, num_images_per_prompt):
    images, count = [draw_image(seed) for seed in seeds_of_images], num_images_per_prompt
    num_results = count * max(len(prompts), len(images))
    generators = [seeded(seed) for seed in range(num_results)]
    output = pipe(prompts, image=images, num_images_per_prompt=count, generator=generators, output_type="pt")
    assert len(output.images) == num_results
    for index, (tokens, result) in enumerate(zip(output.image_tokens, output.images, strict=True)):
        prompt, image = prompts[index // count % len(prompts)], images[index // count % len(images)]
        alone = pipe(prompt, image=image, generator=seeded(index), output_type="pt")
        assert torch.equal(tokens, alone.image_tokens[0])
        assert torch.equal(result, alone.images[0])
    assert len({tuple(tokens.tolist()) for tokens in output.image_tokens}) == num_results


def test_one_generator_gives_every_image_another_seed(pipe):
    tokens = edit(pipe, num_images_per_prompt=3)
    assert len({tuple(row.tolist()) for row in tokens}) == 3
    assert torch.equal(tokens[0], edit(pipe)[0])


def test_embeddings_stand_for_their_text(pipe):
    text = edit(pipe, negative_prompt=OTHER_PROMPT)
    embeds = {"prompt_embeds": pipe.encode_prompt(PROMPT), "negative_prompt_embeds": pipe.encode_prompt(OTHER_PROMPT)}
    assert torch.equal(text, edit(pipe, None, **embeds))
    assert not torch.equal(text, edit(pipe))


def test_encoded_image_stands_for_the_image(pipe):
    images = [draw_image(0, 20, 30), draw_image(1)]
    tokens = pipe.encode_image(images, resize_mode="stretch")
    output = pipe(PROMPT, source_image_tokens=tokens, generator=seeded(0), output_type="tokens")
    assert torch.equal(output.image_tokens, edit(pipe, image=images, resize_mode="stretch"))


def test_text_to_image_warns_unless_its_task_says_so(pipe):
    with pytest.warns(UserWarning, match="`image` is missing.*task='text-to-image'") as record:
        output = pipe(PROMPT, generator=seeded(0))
    assert record[0].filename == __file__
    with torch.no_grad():
        expected = pipe.transformer.generate(None, pipe.encode_prompt(PROMPT), generator=seeded(0))
    assert output.images[0].size == (SIDE, SIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked_for = pipe([PROMPT], task=["text-to-image"], generator=seeded(0))
    assert torch.equal(output.image_tokens, expected)
    assert torch.equal(asked_for.image_tokens, expected)


def test_task_puts_the_published_prefix_before_the_prompt():
    pipe = build_pipeline(num_text_tokens=90)
    prefix = "Given the depth image, generate an image following the description: "
    tokens = edit(pipe, "a star", task="depth")
    assert torch.equal(tokens, edit(pipe, prefix + "a star"))
    assert not torch.equal(tokens, edit(pipe, "a star"))
    both = edit(pipe, "a star", task=["depth", "edit"], generator=[seeded(0), seeded(0)])
    assert torch.equal(both, torch.cat([tokens, edit(pipe, "a star")]))


def test_height_and_width_choose_a_rectangle(pipe):
    output = pipe(PROMPT, image=draw_image(0, 12, 8), height=8, width=12, generator=seeded(0))
    assert output.images[0].size == (12, 8)
    assert output.image_tokens.shape == (1, 6)
    again = pipe(PROMPT, source_image_tokens=output.image_tokens, height=8, width=np.int64(12), generator=seeded(0))
    assert again.images[0].size == (12, 8)


def test_output_types_agree(pipe):
    outputs = {
        kind: pipe(PROMPT, image=draw_image(0), generator=seeded(0), output_type=kind, return_dict=False)[0]
        for kind in ("pil", "np", "pt", "tokens")
    }
    assert outputs["np"].shape == (1, SIDE, SIDE, 3)
    assert np.array_equal(outputs["np"], outputs["pt"].permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(outputs["pil"][0]), np.round(outputs["np"][0] * 255).astype(np.uint8))
    assert np.array_equal(pipe.decode_image_tokens(outputs["tokens"], output_type="np"), outputs["np"])


def test_what_goes_in_stays_as_it_is(pipe):
    image, array, tokens = draw_image(0), np.asarray(draw_image(0)).copy(), pipe.encode_image(draw_image(0))
    before = image.tobytes(), array.copy(), tokens.clone()
    prompts, tasks = [PROMPT], ["edit"]
    pipe(prompts, image=[image, array], task=tasks, restore_size=True)
    pipe(prompts, source_image_tokens=tokens)
    assert image.tobytes() == before[0]
    assert np.array_equal(array, before[1])
    assert torch.equal(tokens, before[2])
    assert (prompts, tasks) == ([PROMPT], ["edit"])


@pytest.mark.parametrize("kind", [str, Path])
def test_image_and_mask_may_be_paths(pipe, tmp_path, kind):
    draw_image(0).save(tmp_path / "photo.png")
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, 8, 8))
    mask.save(tmp_path / "mask.png")
    paths = {"image": kind(tmp_path / "photo.png"), "mask_image": kind(tmp_path / "mask.png")}
    assert torch.equal(edit(pipe, **paths), edit(pipe, image=draw_image(0), mask_image=mask))


# The source's size


def test_restored_crop_lies_in_its_place_in_the_untouched_source(pipe):
    source = draw_image(0, 4 * SIDE, 2 * SIDE)
    with pytest.warns(UserWarning, match="cuts away"):
        output = pipe(PROMPT, image=source, generator=seeded(0))
    expected = source.copy()
    edited = pipe.decode_image_tokens(output.image_tokens)[0].resize((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    expected.paste(edited, (SIDE, 0))
    assert np.array_equal(np.asarray(output.images[0]), np.asarray(expected))


def test_restored_stretch_has_the_size_of_each_source(pipe):
    sources = [draw_image(0, 31, 20), draw_image(1, 17, 40)]
    how = {"num_images_per_prompt": 2, "resize_mode": "stretch", "restore_size": True}
    tokens = pipe.encode_image(sources, resize_mode="stretch")
    for known in ({}, {"source_image_tokens": tokens}):
        images = pipe(PROMPT, image=sources, **known, **how).images
        assert [image.size for image in images] == [(31, 20), (31, 20), (17, 40), (17, 40)]


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
@pytest.mark.filterwarnings("ignore")
def test_an_edit_has_the_size_of_its_source_unless_another_is_asked_for(pipe, arguments, size):
    assert pipe(PROMPT, image=draw_image(0, 24, 20), generator=seeded(0), **arguments).images[0].size == size


# Guidance and sampling settings


def test_settings_are_the_folders_unless_an_argument_is_given(pipe, folder):
    path = folder / "transformer" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "guidance_scale": 1.5, "top_k": 5}))
    loaded = load(folder)
    assert torch.equal(edit(loaded), edit(pipe, guidance_scale=1.5, top_k=5))
    assert not torch.equal(edit(loaded), edit(pipe))
    assert torch.equal(edit(loaded, guidance_scale=3.0, top_k=1000), edit(pipe))
    loaded.save_pretrained(folder / "again")
    again = json.loads((folder / "again" / "transformer" / "generation_config.json").read_text())
    assert (again["guidance_scale"], again["top_k"]) == (1.5, 5)


def test_image_guidance_scale_of_one_equals_none(pipe):
    assert torch.equal(edit(pipe, image_guidance_scale=1), edit(pipe))
    assert not torch.equal(edit(pipe, image_guidance_scale=2.5), edit(pipe))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.9}, "`temperature`, `top_k`, `top_p`"),
        ({"num_images_per_prompt": 2}, "`num_images_per_prompt`"),
    ],
)
def test_what_changes_nothing_without_sampling_warns_at_the_call(pipe, arguments, names):
    with pytest.warns(UserWarning, match=f"^{names} had no effect") as record:
        pipe(PROMPT, image=draw_image(0), do_sample=False, **arguments)
    assert record[0].filename == __file__


WIDE = {"image": draw_image(0, 90, 9), "aspect": "source"}


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("__call__", {**WIDE, "prompt": PROMPT}, "edited at the proportions"),
        ("encode_image", WIDE, "edited at the proportions"),
        ("prepare_source_cache", WIDE, "edited at the proportions"),
        ("compute_edit_map", {**WIDE, "prompt": PROMPT}, "edited at the proportions"),
        ("choose_size", {"image": WIDE["image"]}, "edited at the proportions"),
        ("encode_image", {"image": draw_image(0, 40, 20)}, "The center crop cuts"),
        ("compute_edit_map", {"image": draw_image(0), "prompt": 9 * PROMPT}, "A prompt is longer"),
        ("__call__", {"image": draw_image(0), "prompt": PROMPT, "mask_image": np.ones((8, 8), bool)}, "was resized"),
    ],
)
def test_every_function_warns_at_the_line_of_its_caller(pipe, name, call, message):
    with pytest.warns(UserWarning, match=message) as record:
        getattr(pipe, name)(**call)
    assert {warning.filename for warning in record} == {__file__}


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
    pipe(PROMPT, image=draw_image(0))
    assert called.count(pipe.vq_model) == 3, "once to encode and once to decode"


def test_sequential_offload_finds_every_weight():
    pipe = build_pipeline()
    expected = edit(pipe, image_guidance_scale=2.0, output_type="pil")
    for name in COMPONENTS:  # what `enable_sequential_cpu_offload` does; itself it insists on a device with an index
        part = getattr(pipe, name)
        accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {"meta"}
    assert torch.equal(edit(pipe, image_guidance_scale=2.0, output_type="pil"), expected)


# Folders


def test_saved_pipeline_gives_the_same_image_after_loading(pipe, saved):
    images = [one(PROMPT, image=draw_image(0), generator=seeded(0)).images[0] for one in (pipe, load(saved))]
    assert np.array_equal(*map(np.asarray, images))


def test_folder_names_the_package_but_no_module_of_it_and_no_path_of_this_machine(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["transformer"] == ["editar_hf", "EditARForConditionalGeneration"]
    assert index["vq_model"] == ["editar_hf", "EditARVQModel"]
    assert index["processor"] == ["editar_hf", "EditARProcessor"]
    assert index["text_encoder"] == ["transformers", "T5EncoderModel"]
    for path in saved.rglob("*"):
        assert path.is_dir() or str(saved.parent).encode() not in path.read_bytes(), path


def test_component_can_be_passed_in_or_left_out(pipe, folder):
    shutil.rmtree(folder / "text_encoder")
    loaded = load(folder, vq_model=pipe.vq_model, text_encoder=None)
    assert loaded.vq_model is pipe.vq_model
    assert torch.equal(edit(loaded, None, prompt_embeds=pipe.encode_prompt(PROMPT)), edit(pipe))
    with pytest.raises(ValueError, match=r"`prompt` is .*no text encoder"):
        edit(loaded)


def test_dtype_is_chosen_per_component(saved):
    dtype = {"transformer": torch.bfloat16, "text_encoder": torch.float64, "default": torch.float32}
    pipe = load(saved, dtype=dtype)
    assert [getattr(pipe, name).dtype for name in COMPONENTS] == [torch.bfloat16, torch.float32, torch.float64]
    assert edit(pipe).shape == (1, NUM_TOKENS)


def test_feed_forward_output_of_the_text_encoder_stays_fp32_in_fp16(saved):
    pipe = load(saved, dtype=torch.float16)
    dtypes = {name: weight.dtype for name, weight in pipe.text_encoder.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".wo." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".wo." not in name} == {torch.float16}
    assert pipe.transformer.dtype == pipe.vq_model.dtype == torch.float16


def test_variant_is_loaded_where_there_is_one(pipe, folder):
    shutil.copyfile(folder / "vq_model" / "model.safetensors", folder / "vq_model" / "model.other.safetensors")
    weights = load_file(folder / "transformer" / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].flip(0)
    save_file(weights, folder / "transformer" / "model.other.safetensors", metadata={"format": "pt"})
    assert torch.equal(
        load(folder, variant="other").transformer.lm_head.weight, pipe.transformer.lm_head.weight.flip(0)
    )


def test_card_is_written_once_and_kept_afterwards(pipe, folder):
    card = folder / "README.md"
    assert card.read_text() == make_card("base", "tiny-editor")
    card.write_text("what the user says")
    pipe.save_pretrained(folder)
    assert card.read_text() == "what the user says"


@pytest.mark.parametrize("instructions", [[], ["avx512_bf16"], ["amx_bf16"], ["avx512_fp16"]], ids=str)
def test_bf16_files_stay_bf16_where_the_cpu_computes_in_it(saved, tmp_path, monkeypatch, instructions):
    load(saved, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    expected = torch.bfloat16 if set(instructions) & {"avx512_bf16", "amx_bf16"} else torch.float32
    assert load(tmp_path / "bf16").dtype == expected
    assert load(tmp_path / "bf16", dtype="auto").dtype == torch.bfloat16
    assert load(tmp_path / "bf16", dtype=torch.float64).dtype == torch.float64
    assert load(saved).dtype == torch.float32


def test_pipelines_loaded_at_once_in_threads_have_their_weights(pipe, saved):
    with ThreadPoolExecutor(4) as pool:
        pipelines = list(pool.map(lambda _: load(saved), range(8)))
    for loaded in pipelines:
        for name in COMPONENTS:
            weights = getattr(loaded, name).state_dict()
            assert all(torch.equal(weights[key], value) for key, value in getattr(pipe, name).state_dict().items())


def test_the_attention_of_the_decoder_is_chosen_at_loading(saved):
    assert load(saved, attn_implementation="eager").transformer.config._attn_implementation == "eager"


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
    assert torch.equal(load(folder).text_encoder.shared.weight, pipe.text_encoder.shared.weight)


def test_file_that_is_no_checkpoint_is_refused(folder):
    (folder / "vq_model" / "model.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="vq_model` does not load as EditARVQModel"):
        EditARPipeline.from_pretrained(folder)


def test_folder_without_its_vocabulary_is_refused(folder):
    (folder / "processor" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"processor` does not load as EditARProcessor: there is no .*tokenizer\.json"):
        EditARPipeline.from_pretrained(folder)


def test_folder_without_model_index_or_of_another_pipeline_is_refused(folder):
    (folder / "model_index.json").write_text('{"_class_name": "OtherPipeline", "unet": ["diffusers", "Unet"]}')
    with pytest.raises(ValueError, match="lacks transformer, vq_model, text_encoder, processor"):
        EditARPipeline.from_pretrained(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"has no `model_index\.json`"):
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
    with pytest.raises(ValueError, match="transformer` does not load as EditARForConditionalGeneration"):
        EditARPipeline.from_pretrained(folder)


def test_a_dtype_that_is_a_word_is_refused(saved):
    with pytest.raises(ValueError, match="`dtype` is 'bf16'"):
        EditARPipeline.from_pretrained(saved, dtype="bf16")


def test_a_missing_folder_and_a_file_in_its_place_are_called_what_they_are(tmp_path):
    (tmp_path / "editar.pt").write_bytes(b"weights")
    with pytest.raises(ValueError, match="there is no such folder"):
        EditARPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"`sticker-editor` is not a local folder, .* the Hub"):
        EditARPipeline.from_pretrained("sticker-editor")
    with pytest.raises(ValueError, match="is a file; pass a pipeline folder"):
        EditARPipeline.from_pretrained(tmp_path / "editar.pt")


# Bad input

TEXT = torch.zeros(1, NUM_TEXT_TOKENS, TEXT_HIDDEN_SIZE)
TOKENS = torch.zeros(1, NUM_TOKENS, dtype=torch.long)
MASK = Image.new("L", (SIDE, SIDE), 255)
NO_IMAGE = {"image": None, "task": "text-to-image"}
BAD_INPUT = {
    "no prompt": ({"prompt": None}, "`prompt` and `prompt_embeds` are both None"),
    "prompt that is no text": ({"prompt": ["remove it", 3]}, "`prompt` is"),
    "empty list of prompts": ({"prompt": []}, r"`prompt` is \[\]"),
    "text beside its states": ({"prompt_embeds": TEXT}, "`prompt_embeds` is also given"),
    "negative text beside its states": (
        {"negative_prompt": "ugly", "negative_prompt_embeds": TEXT},
        "`negative_prompt_embeds` is also given",
    ),
    "task without text": ({"prompt": None, "prompt_embeds": TEXT, "task": "depth"}, "`task` is 'depth'"),
    "unknown task": ({"task": "color"}, "`task` is 'color'"),
    "tasks that do not pair up": ({"prompt": ["a", "b"], "task": ["edit"] * 3}, "`task` has 3 entries"),
    "lists that do not pair up": (
        {"prompt": ["a", "b", "c"], "image": [draw_image(0)] * 2},
        "`prompt` has 3, `image` has 2",
    ),
    "masks that do not pair up": ({"image": [draw_image(0)] * 2, "mask_image": [MASK] * 3}, "`mask_image` has 3"),
    "too few generators": ({"generator": [seeded(0)], "num_images_per_prompt": 2}, "`generator` is a list of 1"),
    "seed as a generator": ({"generator": 0}, "`generator` is 0"),
    "image that is nowhere": ({"image": "no-such-photo.png"}, "`image` is 'no-such-photo.png', which does not open"),
    "no images in a list": ({"image": []}, "`image` is an empty list"),
    "image beside tokens": ({"source_image_tokens": TOKENS}, "`image` and `source_image_tokens` are both given"),
    "tokens beside a cache": (
        {"image": None, "source_image_tokens": TOKENS, "source_cache": 1},
        "`source_image_tokens` and `source_cache` are both given",
    ),
    "source of text-to-image": ({"task": "text-to-image"}, "`task` is 'text-to-image', but a source image"),
    "height off the stride": ({"height": 10}, "`height` is 10"),
    "width beyond the grid": ({"width": 2 * SIDE}, "`width` is 32"),
    "unknown resize mode": ({"resize_mode": "pad"}, "`resize_mode` is 'pad'"),
    "size restored without image": ({"image": None, "restore_size": True}, "`restore_size` is True without"),
    "size restored for arrays": (
        {"restore_size": True, "output_type": "np"},
        "`output_type` is 'np', but `restore_size`",
    ),
    "unknown output type": ({"output_type": "jpg"}, "`output_type` is 'jpg'"),
    "mask of other proportions": ({"mask_image": Image.new("L", (16, 20))}, "`mask_image` is 16×20 pixels"),
    "mask without image": ({"image": None, "mask_image": MASK}, "`mask_image` is given without a source image"),
    "window without mask": ({"crop_to_mask": True}, "`crop_to_mask` is True; pass `image`"),
    "window of known tokens": (
        {"crop_to_mask": True, "mask_image": MASK, "source_image_tokens": TOKENS},
        "`crop_to_mask` is True; pass `image`",
    ),
    "window and resize mode": (
        {"crop_to_mask": True, "mask_image": MASK, "resize_mode": "crop"},
        "`resize_mode` is 'crop' and `crop_to_mask` is True",
    ),
    "window as an array": (
        {"crop_to_mask": True, "mask_image": MASK, "output_type": "np"},
        "`output_type` is 'np', but `crop_to_mask`",
    ),
    "unknown decoding": ({"decoding": "fast"}, "`decoding` is 'fast'"),
    "drafts without a source": ({**NO_IMAGE, "decoding": "speculative"}, "`decoding` is 'speculative', which takes"),
    "image guidance without image": ({**NO_IMAGE, "image_guidance_scale": 2}, "`image_guidance_scale` is 2"),
    "sampling settings out of range": ({"temperature": -1.0}, "`temperature` is -1.0"),
    "no images per prompt": ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
    "unknown callback tensor": ({"callback_on_step_end_tensor_inputs": ["latents"]}, "holds latents"),
    "previews for nobody": ({"preview_every": 2}, "`preview_every` is 2 without `callback_on_step_end`"),
    "previews every no row": ({"preview_every": 0, "callback_on_step_end": print}, "`preview_every` is 0"),
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
        pipe_at_rest(**{"prompt": PROMPT, "image": draw_image(0), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None, "prompt_embeds": TEXT[:, 1:]}, "`prompt_embeds` has shape"),
        ({"image": None, "source_image_tokens": TOKENS[:, 1:]}, "`source_image_tokens` has shape"),
    ],
)
def test_tensors_that_do_not_fit_the_decoder_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": PROMPT, "image": draw_image(0), **arguments})


def test_tokenizer_of_another_text_encoder_or_without_padding_is_refused():
    parts = build_pipeline().components
    parts["text_encoder"].config.vocab_size = 100
    with pytest.raises(ValueError, match=r"`processor` has a tokenizer of .* entries and `text_encoder` has 100"):
        EditARPipeline(**parts)
    parts["processor"].tokenizer.pad_token = None
    with pytest.raises(ValueError, match="`processor` has a tokenizer without a padding token"):
        EditARPipeline(**parts)


def test_states_that_overflow_end_in_an_error_that_names_the_cause():
    pipe = build_pipeline()
    pipe.text_encoder.encoder.final_layer_norm.weight.data.fill_(float("inf"))
    with pytest.raises(RuntimeError, match=r"states of `prompt` are NaN or infinite.*float16"):
        pipe(PROMPT, image=draw_image(0))


@pytest.mark.parametrize("arguments", [{}, {"decoding": "speculative"}, {"guidance_scale": 1.0}], ids=str)
def test_logits_that_overflow_end_in_an_error_that_names_the_cause(arguments):
    pipe = build_pipeline()
    pipe.transformer.lm_head.weight.data[3, 5] = float("nan")
    with pytest.raises(RuntimeError, match=r"logits were NaN or infinite.*float16"):
        edit(pipe, **arguments)
