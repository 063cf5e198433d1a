"""`editar-hf edit`, for one image and for a folder of them."""

import json
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageCms
from tiny import build_pipeline, build_transformer, draw_image, needs_packing

from editar_hf.commands import edit, main
from editar_hf.commands.edit import RECORD_FILE
from editar_hf.processing_editar import TASK_PREFIXES, TEXT_TO_IMAGE


pytestmark = pytest.mark.filterwarnings("ignore:A prompt is longer", "ignore:The center crop cuts")
PROMPT = "make the red circle blue"
LINE = {"image": "a.png", "prompt": PROMPT}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "editor"
    build_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder `images` in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "images"
    folder.mkdir()
    draw_image(0).save(folder / "a.png")
    draw_image(1, 40, 24).save(folder / "b.png")
    (folder / "broken.png").write_bytes(b"no image")
    mask = Image.new("L", (40, 24))
    mask.paste(255, (20, 8, 24, 12))
    mask.save(tmp_path / "mask.png")
    return folder


def edit_directly(image, prompt=PROMPT, seed=0, **how):
    how = {"restore_size": True, "generator": torch.Generator().manual_seed(seed), **how}
    return [np.asarray(one) for one in build_pipeline()(prompt, image=image, **how).images]


def run(model, *options, image="images/b.png", output="edited.png"):
    """Run the command; a list among the options is written to a file of prompts."""
    words = ["edit", "--model", model, "--image", image, "--output", output]
    for option in options:
        if isinstance(option, list):
            with open("prompts.jsonl", "w", encoding="utf-8") as file:
                file.writelines((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in option)
            words += ["--prompts", "prompts.jsonl"]
        else:
            words.append(str(option))
    return main(words if {"--prompt", "--prompts"} & set(words) else [*words, "--prompt", PROMPT])


def run_folder(model, *options):
    return run(model, *options, image="images", output="out")


def read(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# One edit


def test_one_edit_is_the_pipelines_at_the_size_of_the_source(model, images, tmp_path):
    assert run(model, "--seed", 5, output="new/edited.png") == 0
    assert np.array_equal(read("new/edited.png"), edit_directly("images/b.png", seed=5)[0])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["edited.png"]


@pytest.mark.parametrize("is_window", [False, True])
def test_a_mask_and_the_detail_go_to_the_pipeline(model, images, is_window):
    assert run(model, "--mask", "mask.png", "--detail", "source", *["--crop-to-mask"] * is_window) == 0
    (expected,) = edit_directly("images/b.png", mask_image="mask.png", detail="source", crop_to_mask=is_window)
    assert np.array_equal(read("edited.png"), expected)


def test_options_are_passed_on_to_the_pipeline(model, images, tmp_path):
    options = ["--resize-mode", "stretch", "--no-restore-size", "--num-images", 2, "--seed", 4, "--task", "canny"]
    options += ["--guidance-scale", 5, "--image-guidance-scale", 1.5, "--negative-prompt", "green", "--device", "cpu"]
    options += ["--aspect", "source"]
    assert run(model, *options, output="EDITED.PNG") == 0
    how = {"aspect": "source", "resize_mode": "stretch", "restore_size": False, "num_images_per_prompt": 2}
    how |= {"guidance_scale": 5.0, "image_guidance_scale": 1.5, "negative_prompt": "green", "task": "canny"}
    expected = edit_directly("images/b.png", seed=4, **how)
    assert not np.array_equal(*expected)
    for index, image in enumerate(expected):
        assert np.array_equal(read(f"EDITED-{index}.PNG"), image)
    assert not (tmp_path / "EDITED.PNG").exists()


def test_a_result_of_which_nothing_is_kept_is_reported(images, tmp_path, capsys):
    pipe = build_pipeline()
    pipe.transformer.generation_config.preserve_threshold = 1e-9
    pipe.save_pretrained(tmp_path / "whole")
    assert run("whole", "--preserve", "auto") == 0
    assert "images/b.png: the instruction changes the whole image" in capsys.readouterr().err
    assert np.array_equal(read("edited.png"), edit_directly("images/b.png")[0])


def test_an_image_of_a_condition_map_is_not_put_into_the_map(model, images):
    assert run(model, "--task", "canny") == 0
    (expected,) = edit_directly("images/b.png", task="canny", restore_size=None)
    assert np.array_equal(read("edited.png"), expected)
    assert expected.shape != read("images/b.png").shape


def test_the_command_offers_every_task_of_an_image():
    assert {*edit.TASKS, TEXT_TO_IMAGE} == set(TASK_PREFIXES)


def test_an_adapter_and_a_dtype_are_loaded(model, images, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(build_transformer(), config).save_pretrained(tmp_path / "adapter")
    pipeline = build_pipeline()
    pipeline.load_lora_weights(tmp_path / "adapter")
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        how = {"restore_size": True, "generator": torch.Generator().manual_seed(0)}
        results.append(np.asarray(pipeline.to(dtype)(PROMPT, image="images/b.png", **how).images[0]))
    assert run(model, "--lora", "adapter", "--dtype", "bfloat16") == 0
    assert np.array_equal(read("edited.png"), results[0])
    assert not np.array_equal(*results)
    assert not np.array_equal(results[1], edit_directly("images/b.png")[0])


@needs_packing
def test_packed_weights_give_the_results_of_float32(images, tmp_path, capsys):
    build_pipeline().to(torch.bfloat16).save_pretrained(tmp_path / "editor")
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(build_transformer(), config).save_pretrained(tmp_path / "adapter")
    for options in ([], ["--lora", "adapter"]):
        assert run("editor", "--dtype", "float32", *options) == 0
        expected = read("edited.png")
        assert run("editor", "--pack-weights", *options) == 0
        # With an adapter, packing rounds the fused weights, so the edit is made again.
        assert options or np.array_equal(read("edited.png"), expected)
        run_folder("editor", [LINE], "--dtype", "float32", *options)
        capsys.readouterr()
        run_folder("editor", [LINE], "--pack-weights", *options)
        assert f"{len(options) // 2} done, 0 failed" in capsys.readouterr().out


def test_a_lossy_format_keeps_what_the_mask_keeps(model, images):
    source = read("images/b.png").astype(int)
    # JPEG and AVIF round; on noise, the hardest case, Pillow's defaults move pixels by more than 150.
    for suffix, options, limit in ((".jpg", [], 24), (".avif", [], 24), (".webp", [], 0), (".jpg", [50], 160)):
        output = f"edited{suffix}"
        assert run(model, "--mask", "mask.png", *(f"--quality={quality}" for quality in options), output=output) == 0
        moved = np.abs(read(output) - source)[:, :8].max()
        assert moved <= limit
    assert moved > 24


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif", ".tif"])
def test_a_color_profile_is_saved(model, images, suffix):
    image = draw_image(0)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save("images/a.png", icc_profile=profile)
    assert run(model, image="images/a.png", output=f"edited{suffix}") == 0
    with Image.open(f"edited{suffix}") as saved:
        assert saved.info["icc_profile"] == profile


def test_an_image_that_cannot_be_saved_leaves_the_old_file(tmp_path):
    path = tmp_path / "edited.webp"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="16383"):
        edit.save_image(Image.new("RGB", (16384, 1)), path, {"format": "WEBP"})
    assert path.read_bytes() == b"old"


def test_an_image_can_be_replaced_by_its_edit(model, images):
    (expected,) = edit_directly("images/b.png")
    assert run(model, output="images/b.png") == 0
    assert np.array_equal(read("images/b.png"), expected)


def test_an_edit_that_fails_is_one_line_with_the_image(model, images, capsys):
    (images / "cut.png").write_bytes((images / "b.png").read_bytes()[:500])
    for options, image, message in (
        ([], "images/broken.png", "ValueError: `image` is 'images/broken.png', which does not open as an image"),
        ([], "images/cut.png", "ValueError: `image` holds "),
        (["--mask", "mask.png"], "images/a.png", "ValueError: `mask_image` is 40×24 pixels and its image is 16×16"),
        (["--guidance-scale", 1e38], "images/a.png", "RuntimeError: The decoder's logits were NaN or infinite"),
    ):
        assert run(model, *options, image=image) == 1
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "Error" in line)
        assert line.startswith(f"{image}: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quality", "101"], "`--quality` is 101 for edited.png"),
        (["--quality", "90"], "`--quality` is 90 for edited.png"),
        (["--num-images", "0"], "`--num-images` is 0"),
        (["--device", "gpu"], "`--device` is 'gpu', which torch cannot use here"),
        (["--device", "cuda:99"], "`--device` is 'cuda:99', which torch cannot use here"),
        (["--pack-weights", "--dtype", "bfloat16"], "`--dtype` is bfloat16, but with `--pack-weights`"),
        (["--pack-weights", "--device", "meta"], "`--pack-weights` is for CPUs, but the device is meta"),
        (["--image", "missing.png"], "`--image` is missing.png, which is not a file"),
        (["--mask", "missing.png"], "`--mask` is missing.png, which is not a file"),
        (["--output", "images"], "`--output` is images; pass a file name with the suffix of an image format"),
        (["--output", "edited.psd"], "`--output` is edited.psd; pass a file name with the suffix of an image format"),
        (["--output", "images/a.png/edited.png"], "images/a.png"),
        (["--model", "images/missing"], "`images/missing` is not a local folder"),
        (["--image", "images", "--output", "images"], "a.png, or an edit would overwrite this input image"),
        (["--image", "empty", "--output", "out"], "`--image` is empty, a folder without images"),
        ([[LINE]], "`--image` is images/b.png, which is not a folder"),
        (["--prompt", " "], "`prompt` for images/b.png is empty"),
        (["--preserve", "auto", "--mask", "mask.png"], "`--preserve` is auto, but images/b.png has a mask"),
        (["--preserve", "auto", "--task", "depth"], "`--preserve` is auto, but images/b.png has the task depth"),
        (["--detail", "source", "--task", "depth"], "`--detail` is source, but images/b.png has the task depth"),
        (["--detail", "source", "--no-restore-size"], "`--detail` is source, but `--no-restore-size` is given"),
        (["--crop-to-mask"], "`--crop-to-mask` needs a mask, but images/b.png has no mask"),
        (["--image", "images", "--prompts", "images/a.png"], "`--prompts` is images/a.png, which is not UTF-8"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(words, message, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run("no-such-model", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "edited.png").exists()


@pytest.mark.parametrize(
    "words", [["--quality", "abc"], ["--dtype", "int8"], ["--task", "paint"], ["--image", ""], ["--mask", ""]]
)
def test_an_option_of_another_kind_is_refused_by_the_parser(words, images):
    with pytest.raises(SystemExit) as stop:
        run("no-such-model", *words)
    assert stop.value.code == 2


# Folders


def test_every_image_of_a_folder_gets_the_prompt_and_those_that_fail_are_listed(model, images, capsys):
    Image.open(images / "a.png").convert("L").save(images / "C.JPG")
    (images / "._d.png").write_bytes((images / "a.png").read_bytes())
    (images / "notes.txt").write_text("no image")
    (images / "folder.png").mkdir()
    assert run_folder(model, "--seed", 3) == 1
    captured = capsys.readouterr()
    assert "4 edits, 0 of them done before\n3 done, 1 failed" in captured.out
    assert "images/broken.png: ValueError: `image` is 'images/broken.png'" in captured.err
    out = images.parent / "out"
    assert sorted(path.name for path in out.iterdir()) == [RECORD_FILE, "C.png", "a.png", "b.png"]
    for name in ("a.png", "b.png"):
        assert np.array_equal(read(out / name), edit_directly(images / name, seed=3)[0])


def test_a_folder_is_edited_line_by_line(model, images, tmp_path, capsys):
    lines = [
        f"\ufeff{json.dumps(LINE)}",
        "",
        {"image": "b.png", "prompt": "a man", "output": "maps/b.bmp", "task": "canny", "seed": 3},
        {"image": "b.png", "prompt": "make the\u2028circle blue", "mask": "../mask.png"},
        {"image": "missing.png", "prompt": PROMPT},
    ]
    assert run_folder(model, lines) == 1
    assert np.array_equal(read("out/a.png"), edit_directly("images/a.png")[0])
    expected = edit_directly("images/b.png", "a man", 3, task="canny", restore_size=None)[0]
    assert np.array_equal(read("out/maps/b.bmp"), expected)
    expected = edit_directly("images/b.png", "make the\u2028circle blue", mask_image="mask.png")[0]
    assert np.array_equal(read("out/b.png"), expected)
    captured = capsys.readouterr()
    assert "3 done, 1 failed" in captured.out
    assert "images/missing.png: ValueError: `image` is" in captured.err


def test_a_file_without_lines_asks_for_no_edit(images, capsys):
    assert run_folder("no-such-model", []) == 0
    assert "0 edits" in capsys.readouterr().out


WRONG_LINES = [{"prompt": PROMPT}, {**LINE, "sed": 1}, {**LINE, "seed": "one"}, {**LINE, "seed": True}]
WRONG_LINES += ['"text"', '{"image": "a.png", "prompt"', {**LINE, "mask": ""}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        *((line, "prompts.jsonl, line 2 is") for line in WRONG_LINES),
        ({**LINE, "prompt": " "}, "`prompt` for images/a.png is empty"),
        ({**LINE, "task": "paint"}, "`task` for images/a.png is 'paint'"),
        ({**LINE, "output": "a.psd"}, "a.psd; pass a file name with the suffix of an image format"),
        ({**LINE, "output": "b.png"}, "two edits would write"),
        ({**LINE, "output": "../images/a.png"}, "a.png, or an edit would overwrite this input image"),
    ],
    ids=str,
)
def test_a_line_that_is_wrong_is_refused_before_any_work(line, message, images, tmp_path, capsys):
    assert run_folder("no-such-model", [{"image": "b.png", "prompt": PROMPT}, line]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_edit_is_made_again_where_anything_it_depends_on_has_changed(model, images, tmp_path, capsys):
    def count_done(*options, model=model, **values):
        capsys.readouterr()
        run_folder(model, [LINE | values], *options)
        (done,) = re.findall(r"^(\d+) done", capsys.readouterr().out, flags=re.MULTILINE)
        return int(done)

    Image.new("L", (16, 16), 255).save("mask.bmp")
    assert [count_done(), count_done()] == [1, 0]
    changed = [["--guidance-scale", 2], ["--negative-prompt", "red"], ["--num-images", 2], ["--dtype", "float32"]]
    for options in (*changed, ["--seed", 1], ["--mask", "mask.bmp"]):
        assert [count_done(*options), count_done(*options), count_done()] == [1, 0, 1], options
    for values in ({"prompt": "make the red square blue"}, {"task": "canny"}):
        assert [count_done(**values), count_done(**values), count_done()] == [1, 0, 1], values
    assert [count_done(model=f"{model}/"), count_done()] == [1, 1]
    (tmp_path / "out" / "a.png").unlink()
    assert [count_done(), count_done()] == [1, 0]
    draw_image(7).save("images/a.png")
    assert [count_done(), count_done()] == [1, 0]
    assert np.array_equal(read("out/a.png"), edit_directly("images/a.png")[0])
    before = (tmp_path / "out" / "a.png").read_bytes()
    (images / "a.png").unlink()
    assert [count_done(), count_done()] == [0, 0]
    assert (tmp_path / "out" / "a.png").read_bytes() == before, "an edit that fails costs no older result"


def test_a_killed_run_costs_one_edit(model, images, capsys, monkeypatch):
    def kill(*arguments):
        raise KeyboardInterrupt

    assert run_folder(model, [LINE]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(edit, "save_image", kill)
        with pytest.raises(KeyboardInterrupt):
            run_folder(model, [LINE], "--seed", 1)
    record = images.parent / "out" / RECORD_FILE
    record.write_bytes(record.read_bytes()[:-9])
    capsys.readouterr()
    for _ in range(2):
        assert run_folder(model, [LINE], "--seed", 1) == 0
    assert re.findall(r"^(\d+) done", capsys.readouterr().out, flags=re.MULTILINE) == ["1", "0"]
    assert np.array_equal(read("out/a.png"), edit_directly("images/a.png", seed=1)[0])
