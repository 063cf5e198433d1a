"""The systems that are compared: each gives what its own pipeline gives, seed by seed, at the size of the source."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from evaluation_data import evaluate, make_picture_folder
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from tiny import build_pipeline, draw_image, redraw_weights, teach_to_keep
from tiny_metrics import build_clip
from transformers import CLIPTextModel

from editar_hf.evaluation import systems
from editar_hf.evaluation.benchmarks import Benchmark, Sample
from editar_hf.evaluation.report import write_report
from editar_hf.evaluation.run import derive_seed
from editar_hf.evaluation.systems import System, build_system


pytestmark = pytest.mark.filterwarnings("ignore:A prompt is longer")
BASELINES = Path(__file__).parents[1] / "examples" / "baselines"
PROMPT = "make the red circle blue"
BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4}
UNET = {
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    **BLOCKS,
}


def build_samples(side=16, task="edit"):
    target = draw_image(9, side, side)
    return [
        Sample(f"{index}", f"{PROMPT} {index}", draw_image(index, side, side), task, target_image=target)
        for index in range(2)
    ]


def build_stable_diffusion(in_channels):
    """Build the parts of a Stable Diffusion, tiny."""
    clip, processor = build_clip()
    text_encoder = redraw_weights(CLIPTextModel(clip.config.text_config), scale=0.3)
    processor.tokenizer.model_max_length = 12
    torch.manual_seed(0)
    return {
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **BLOCKS
        ),
        "text_encoder": text_encoder,
        "tokenizer": processor.tokenizer,
        "unet": UNet2DConditionModel(
            in_channels=in_channels, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **UNET
        ),
        "scheduler": DDIMScheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@pytest.fixture
def run_here(monkeypatch):
    """A function that runs a script of examples/baselines in this process."""

    def run_here(script, words, **options):
        words = [*words, *(word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value))]
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        runpy.run_path(str(BASELINES / script), run_name="__main__")

    return run_here


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    build_pipeline().save_pretrained(folder / "editar")
    StableDiffusionInstructPix2PixPipeline(**build_stable_diffusion(8)).save_pretrained(folder / "instruct")
    torch.manual_seed(1)
    controlnet = ControlNetModel(conditioning_embedding_out_channels=(4, 8), **UNET)
    controlnet.save_pretrained(folder / "controlnet")
    parts = build_stable_diffusion(4)
    StableDiffusionControlNetPipeline(**parts, controlnet=controlnet).save_pretrained(folder / "diffusion")
    return folder


def edit(name, samples, seeds=(5, 6), **options):
    return build_system(name, **options).load()(samples, list(seeds))


def make_generators(seeds=(5, 6)):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def are_equal(first, second):
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(first, second, strict=True))


def test_copy_source_returns_the_source():
    samples = build_samples()
    assert are_equal(edit("copy-source", samples), [sample.source_image for sample in samples])


@pytest.mark.parametrize(("task", "side"), [("edit", 24), ("canny", 16)])
def test_editar_edits_as_its_pipeline_does_at_the_size_of_the_source(task, side, models):
    samples = build_samples(side, task)
    edited = edit("editar", samples, model=models / "editar", guidance_scale=2.0, top_k=7)
    expected = build_pipeline()(
        [sample.prompt for sample in samples],
        image=[sample.source_image for sample in samples],
        task=task,
        guidance_scale=2.0,
        top_k=7,
        restore_size=True,
        generator=make_generators(),
    ).images
    assert are_equal(edited, expected)
    assert edited[0].size == (side, side)
    assert not are_equal(edited, edit("editar", samples, (7, 8), model=models / "editar", guidance_scale=2.0, top_k=7))


def test_truncating_darkens_by_at_most_one_step(models):
    rounded, truncated = (
        np.stack(edit("editar", build_samples(), model=models / "editar", quantize=quantize)).astype(int)
        for quantize in ("round", "truncate")
    )
    assert set(np.unique(rounded - truncated)) == {0, 1}


def test_an_adapter_changes_what_editar_makes_and_is_described(models, tmp_path):
    pipeline = build_pipeline()
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, pipeline.transformer, adapter_name="mine")
    pipeline.save_lora_weights(tmp_path / "adapter", adapter_name="mine")
    samples, options = build_samples(), {"model": str(models / "editar"), "do_sample": False}
    adapted = edit("editar", samples, lora=str(tmp_path / "adapter"), **options)
    assert not are_equal(adapted, edit("editar", samples, **options))
    described = build_system("editar", lora=str(tmp_path / "adapter"), **options).describe()
    assert described["lora"] == str(tmp_path / "adapter")


def test_masks_are_used_only_where_they_are_asked_for(models):
    samples = build_samples()
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 8, 8))
    for sample in samples:
        sample.mask = mask
    unmasked, masked = (edit("editar", samples, model=models / "editar", use_masks=use) for use in (None, True))
    for sample, free, kept in zip(samples, unmasked, masked, strict=True):
        source, free, kept = (np.asarray(picture).astype(int) for picture in (sample.source_image, free, kept))
        # The pixels that are furthest from the mask are the source's, where it was used.
        assert np.array_equal(kept[12:], source[12:])
        assert not np.array_equal(free[12:], source[12:])


def test_the_rest_is_kept_without_the_masks_where_it_is_asked_for(tmp_path):
    pipeline, samples = build_pipeline(), build_samples()
    source = samples[0].source_image
    teach_to_keep(pipeline, [source], [samples[0].prompt])
    pipeline.save_pretrained(tmp_path)
    (plain, _), (kept, _) = (edit("editar", samples, model=tmp_path, preserve=how) for how in (None, "auto"))
    equal = [(np.asarray(image) == np.asarray(source)).all(axis=2).mean() for image in (plain, kept)]
    assert equal[0] < 0.01
    assert equal[1] > 0.1
    with pytest.raises(ValueError, match="`preserve` is 'auto' and `use_masks` is True"):
        build_system("editar", model=tmp_path, preserve="auto", use_masks=True)


def test_a_run_with_preserve_says_so_and_keeps_more_outside_the_masks(tmp_path):
    source, pipeline = make_picture_folder(tmp_path / "pictures"), build_pipeline()
    samples = list(Benchmark("folder", source).read())
    pipeline.transformer.generation_config.preserve_threshold = 1.0
    teach_to_keep(pipeline, [sample.source_image for sample in samples], [sample.prompt for sample in samples])
    pipeline.save_pretrained(tmp_path / "model")
    words = ["--benchmark", "folder", "--source", source, "--model", tmp_path / "model"]
    psnr = {}
    for preserve in ("off", "auto"):
        run = tmp_path / preserve
        assert evaluate("run", *words, "--preserve", preserve, "--output-dir", run) == 0
        psnr[preserve] = json.loads((run / "metrics.json").read_text())["overall"]["psnr_unedited"]["mean"]
        is_labeled = (
            "**preserve auto: the system kept what it found to be unedited**" in (run / "report.md").read_text()
        )
        assert is_labeled == (preserve == "auto")
    assert psnr["auto"] > psnr["off"] + 1


def test_vq_reconstruction_is_what_the_tokenizer_makes_of_source_or_target(models):
    samples, pipeline = build_samples(), build_pipeline()
    for name in ("source", "target"):
        pictures = [getattr(sample, f"{name}_image") for sample in samples]
        expected = pipeline.decode_image_tokens(pipeline.encode_image(pictures))
        assert are_equal(edit("vq-reconstruction", samples, model=models / "editar", reconstruct=name), expected)


@pytest.fixture(scope="module")
def wide_models(tmp_path_factory):
    """A pipeline that edits images at their own aspect ratios, and keeps a part of the square below."""
    folder, pipeline = tmp_path_factory.mktemp("wide"), build_pipeline()
    pipeline.transformer.generation_config.preserve_threshold = 1.0
    teach_to_keep(pipeline, [draw_image(1)], [PROMPT])
    pipeline.processor.image_processor.aspect = "source"
    pipeline.save_pretrained(folder)
    return folder, pipeline


@pytest.mark.parametrize("preserve", ["off", "auto"])
def test_images_of_several_shapes_are_edited_as_the_pipeline_edits_each(preserve, wide_models):
    folder, pipeline = wide_models
    sides = [(36, 24), (16, 16), (24, 36), (60, 40)]
    samples = [Sample(f"{index}", PROMPT, draw_image(index, *size)) for index, size in enumerate(sides)]
    seeds = list(range(4))
    edited = edit("editar", samples, seeds, model=folder, preserve=preserve)
    generators = make_generators(seeds)
    for sample, image, generator in zip(samples, edited, generators, strict=True):
        expected = pipeline(PROMPT, image=sample.source_image, preserve=preserve, generator=generator).images[0]
        assert np.array_equal(image, expected)
    kept = (np.asarray(edited[1]) == np.asarray(samples[1].source_image)).all(axis=2).mean()
    assert kept > 0.1 if preserve == "auto" else kept < 0.01


def test_truncated_images_have_the_shapes_of_their_sources(wide_models):
    samples = [Sample(f"{index}", PROMPT, draw_image(index, *size)) for index, size in enumerate([(16, 12), (36, 24)])]
    rounded, truncated = (
        edit("editar", samples, model=wide_models[0], quantize=quantize) for quantize in ("round", "truncate")
    )
    assert [image.size for image in truncated] == [(16, 12), (36, 24)]
    # The first one has the size of the model, so it is not resized.
    assert set(np.unique(np.asarray(rounded[0]).astype(int) - np.asarray(truncated[0]))) == {0, 1}


def test_vq_reconstruction_has_the_shape_of_each_image(wide_models):
    folder, pipeline = wide_models
    samples = [Sample(f"{index}", "", draw_image(index, *size)) for index, size in enumerate([(36, 24), (16, 16)])]
    for sample, image in zip(samples, edit("vq-reconstruction", samples, model=folder), strict=True):
        height, width = pipeline.choose_size([sample.source_image])
        resized = sample.source_image.resize((width, height), Image.Resampling.LANCZOS)
        tokens = pipeline.encode_image(resized, height, width)
        (decoded,) = pipeline.decode_image_tokens(tokens, height, width)
        assert np.array_equal(image, decoded.resize(sample.source_image.size, Image.Resampling.LANCZOS))


@pytest.fixture
def folder_benchmark(tmp_path):
    """Words that name a benchmark of three images of 20 pixels, and its samples."""
    source = make_picture_folder(tmp_path / "pictures", side=20)
    return ["--benchmark", "folder", "--source", source], list(Benchmark("folder", source).read())


def read_predictions(folder, samples):
    return [np.asarray(Image.open(folder / "images" / f"{sample.id}.png")) for sample in samples]


def edit_one_by_one(pipeline, samples, **options):
    """Edit samples with a pipeline of diffusers, with the seeds of a run, at the sources' size."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for sample in samples:
        (generator,) = make_generators([derive_seed(0, sample.id)])
        (image,) = pipeline(sample.prompt, image=sample.source_image, generator=generator, **options).images
        images.append(image.resize(sample.source_image.size, Image.Resampling.LANCZOS))
    return images


def test_instruct_pix2pix_edits_as_diffusers_does(models, folder_benchmark, run_here, tmp_path):
    words, samples = folder_benchmark
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "image_guidance_scale": 1.2}
    run_here("instruct_pix2pix.py", words, model=models / "instruct", output_dir=tmp_path / "run", **options)
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(models / "instruct")
    assert are_equal(read_predictions(tmp_path / "run", samples), edit_one_by_one(pipeline, samples, **options))
    assert evaluate("score", *words, "--metrics", "l1", "--output-dir", tmp_path / "run") == 0
    page = write_report([tmp_path / "run"], tmp_path / "run").read_text()
    assert f"* run: instruct-pix2pix {models / 'instruct'} (dtype float32, num_inference_steps 2" in page


def test_controlnet_draws_as_diffusers_does(models, folder_benchmark, run_here, tmp_path):
    words, samples = folder_benchmark
    options = {"num_inference_steps": 2, "guidance_scale": 3.0}
    paths = {"model": models / "diffusion", "controlnet": models / "controlnet", "output_dir": tmp_path / "run"}
    run_here("controlnet.py", words, **paths, **options)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(models / "diffusion")
    assert are_equal(read_predictions(tmp_path / "run", samples), edit_one_by_one(pipeline, samples, **options))


def test_any_editor_of_diffusers_edits_by_its_id(models, folder_benchmark, run_here, tmp_path, monkeypatch):
    words, samples = folder_benchmark
    call = StableDiffusionInstructPix2PixPipeline.__call__
    quick = lambda self, **kwargs: call(self, num_inference_steps=1, **kwargs)  # noqa: E731
    monkeypatch.setattr(StableDiffusionInstructPix2PixPipeline, "__call__", quick)
    run_here("diffusers_editor.py", words, model=models / "instruct", output_dir=tmp_path / "run")
    monkeypatch.undo()
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(models / "instruct")
    expected = edit_one_by_one(pipeline, samples, num_inference_steps=1)
    assert are_equal(read_predictions(tmp_path / "run", samples), expected)


def test_any_system_edits_by_its_own_command_line(folder_benchmark, tmp_path):
    words, samples = folder_benchmark
    script = tmp_path / "my edit.py"
    script.write_text(
        "import sys, PIL.Image as I\n"
        "image, prompt, output, seed = sys.argv[1:]\n"
        "assert prompt.startswith('make the red circle blue')\n"
        "I.open(image).point(lambda value: value // 2 + int(seed) % 7).resize((40, 40), I.NEAREST).save(output)\n"
    )
    command = f"{sys.executable} '{script}' {{image}} {{prompt}} {{output}} {{seed}}"
    assert evaluate("generate", *words, "--command", command, "--output-dir", tmp_path / "run") == 0
    expected = []
    for sample in samples:
        shift = derive_seed(0, sample.id) % 7
        image = Image.fromarray((np.asarray(sample.source_image) // 2 + shift).astype(np.uint8))
        expected.append(image.resize((40, 40), Image.Resampling.NEAREST).resize((20, 20), Image.Resampling.LANCZOS))
    assert are_equal(read_predictions(tmp_path / "run", samples), expected)


def test_the_description_names_whole_paths_and_the_commits_of_hub_ids(models, monkeypatch):
    described = build_system("editar", model=models / ".." / models.name / "editar", use_masks=True).describe()
    assert (described["model"], described["model_commit"]) == (str(models / "editar"), None)
    assert (described["system"], described["use_masks"], described["dtype"]) == ("editar", True, "float32")
    snapshot = "/cache/models--owner--model/snapshots/0123abcd"
    monkeypatch.setattr(systems, "snapshot_download", lambda name, allow_patterns: snapshot)
    monkeypatch.setattr(systems, "check_folder_or_hub_id", lambda *args: None)
    described = System("mine", None, {"model": "owner/model"}).describe()
    assert described == {"system": "mine", "model": "owner/model", "model_commit": "0123abcd"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dance", {}, "`system` is 'dance'; choose one of 'editar', 'copy-source'"),
        ("copy-source", {"model": "m"}, "`system` copy-source: got an unexpected keyword argument 'model'"),
        ("editar", {"model": ".", "reconstruct": "c"}, "`system` editar: got an unexpected .*'reconstruct'"),
        ("editar", {"model": "/no/where"}, "`model` is '/no/where': there is no such folder"),
        ("vq-reconstruction", {"model": "/no/where"}, "`model` is '/no/where': there is no such folder"),
        ("editar", {"model": ".", "lora": "/no/where"}, "`lora` is '/no/where': there is no such folder"),
        ("editar", {}, "`system` editar: missing a required argument: 'model'"),
        ("command", {"command": "edit"}, "`command` is 'edit'; it must contain {image} and {output}"),
        ("editar", {"model": ".", "dtype": "int8"}, "`dtype` is 'int8'; choose one of 'float32'"),
        (
            "editar",
            {"model": ".", "quantize": "truncate", "use_masks": True},
            "`quantize` is 'truncate'.*`use_masks` is True",
        ),
        (
            "editar",
            {"model": ".", "quantize": "truncate", "preserve": "auto"},
            "`quantize` is 'truncate'.*`preserve` is 'auto'",
        ),
        ("editar", {"model": ".", "quantize": "ceil"}, "`quantize` is 'ceil'; choose one of"),
        ("vq-reconstruction", {"model": ".", "reconstruct": "mask"}, "`reconstruct` is 'mask'"),
    ],
)
def test_options_that_do_not_fit_a_system_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_system(name, **options)
