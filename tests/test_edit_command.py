"""`editar-hf edit`, for one picture and for a folder of them."""

import json
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageCms
from tiny import build_pipeline, build_transformer, draw_image

from editar_hf.commands import build_parser, edit, main
from editar_hf.commands.edit import RECORD_FILE


pytestmark = pytest.mark.filterwarnings("ignore:A prompt is longer", "ignore:More than 2% of an image")
PROMPT = "make the red circle blue"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "editor"
    build_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a", (16, 16)), ("b", (40, 24))):
        Image.fromarray(rng.integers(256, size=(*size[::-1], 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def edit_directly(picture, prompt, seed, task="edit", mask=None):
    how = {"task": task, "restore_size": True, "generator": torch.Generator().manual_seed(seed)}
    return build_pipeline()(prompt, image=Image.open(picture), mask_image=mask, **how).images[0]


def write_prompts(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def write_huge(path):
    """A file of a few bytes whose header promises 30000×30000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, b"IDAT")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def write_truncated(path, whole):
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])


def run_edit(model, image, prompt, output, *options):
    words = ["--model", model, "--image", str(image), "--prompt", prompt, "--output", str(output)]
    return main(["edit", *words, *map(str, options)])


def run_folder(model, pictures, prompts, output, *options):
    words = ["--model", model, "--image", str(pictures), "--prompts", prompts, "--output", str(output)]
    return main(["edit", *words, *map(str, options)])


def read_pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_one_edit_is_the_pipelines_at_the_size_of_the_source(model, pictures, tmp_path):
    output = tmp_path / "new" / "edited.png"
    words = ["edit", "--model", model, "--image", str(pictures / "b.png"), "--prompt", PROMPT, "--seed", "5"]
    assert main([*words, "--output", str(output)]) == 0
    with Image.open(output) as edited:
        assert edited.size == (40, 24)
        assert np.array_equal(np.asarray(edited), np.asarray(edit_directly(pictures / "b.png", PROMPT, 5)))
    assert [path.name for path in output.parent.iterdir()] == ["edited.png"]


def test_a_mask_keeps_the_rest_of_the_picture(model, pictures, tmp_path):
    mask, output = Image.new("L", (40, 24)), tmp_path / "edited.png"
    mask.paste(255, (20, 8, 24, 12))
    mask.save(pictures / "b-mask.png")
    words = ["edit", "--model", model, "--image", str(pictures / "b.png"), "--prompt", PROMPT]
    assert main([*words, "--mask", str(pictures / "b-mask.png"), "--output", str(output)]) == 0
    expected = edit_directly(pictures / "b.png", PROMPT, 0, mask=mask)
    lines = write_prompts(tmp_path, {"image": "b.png", "prompt": PROMPT, "mask": "b-mask.png"})
    assert run_folder(model, pictures, lines, tmp_path / "out") == 0
    for path in (output, tmp_path / "out" / "b.png"):
        with Image.open(path) as edited:
            assert np.array_equal(np.asarray(edited), np.asarray(expected))
    assert not np.array_equal(np.asarray(expected), np.asarray(edit_directly(pictures / "b.png", PROMPT, 0)))


def test_a_folder_is_edited_line_by_line(model, pictures, tmp_path):
    prompts = write_prompts(
        tmp_path,
        {"image": "a.png", "prompt": PROMPT},
        {"image": "b.png", "prompt": "a man", "output": "maps/b.bmp", "task": "canny", "seed": 3},
    )
    assert run_folder(model, pictures, prompts, tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / "a.png") as edited:
        assert np.array_equal(np.asarray(edited), np.asarray(edit_directly(pictures / "a.png", PROMPT, 0)))
    with Image.open(tmp_path / "out" / "maps" / "b.bmp") as edited:
        expected = edit_directly(pictures / "b.png", "a man", 3, "canny")
        assert edited.format == "BMP"
        assert np.array_equal(np.asarray(edited), np.asarray(expected))


def test_a_second_run_edits_what_is_missing_and_leaves_the_rest(model, pictures, tmp_path, capsys):
    prompts = write_prompts(tmp_path, {"image": "a.png", "prompt": PROMPT}, {"image": "b.png", "prompt": PROMPT})
    assert run_folder(model, pictures, prompts, tmp_path / "out") == 0
    (tmp_path / "out" / "a.png").write_bytes(b"made before")
    (tmp_path / "out" / "b.png").unlink()
    assert run_folder(model, pictures, prompts, tmp_path / "out") == 0
    assert "2 edits, 1 of them done before\n1 done, 0 failed" in capsys.readouterr().out
    assert (tmp_path / "out" / "a.png").read_bytes() == b"made before"
    assert (tmp_path / "out" / "b.png").exists()


def test_a_picture_that_fails_in_any_way_is_reported_and_the_others_go_on(model, pictures, tmp_path, capsys):
    write_huge(pictures / "huge.png")
    write_truncated(pictures / "truncated.png", pictures / "b.png")
    expected = {
        "broken.png": "UnidentifiedImageError: cannot identify",
        "missing.png": "FileNotFoundError: [Errno 2]",
        "huge.png": "ValueError: ",
        "truncated.png": "ValueError: `image` holds ",
        "a\0.png": "ValueError: ",
    }
    lines = [{"image": name, "prompt": PROMPT} for name in (*expected, "a.png")]
    lines.insert(0, {"image": "b.png", "prompt": PROMPT, "output": "b.jpg", "mask": "truncated.png"})
    assert run_folder(model, pictures, write_prompts(tmp_path, *lines), tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "1 done, 6 failed" in captured.out
    for name, message in expected.items():
        assert f"{pictures / name}: {message}" in captured.err
    assert f"{pictures / 'b.png'}: ValueError: `mask_image` holds '{pictures / 'truncated.png'}'" in captured.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [RECORD_FILE, "a.png"]


def test_an_error_that_is_not_of_the_input_stops_no_folder_either(pictures, tmp_path, capsys):
    """The words of one prompt have damaged states in the text encoder: a RuntimeError."""
    pipeline = build_pipeline()
    known, damaged = (set(pipeline.processor(text=text).input_ids[0].tolist()) for text in ("a", PROMPT))
    pipeline.text_encoder.shared.weight.data[list(damaged - known)] = float("nan")
    pipeline.save_pretrained(tmp_path / "deaf")
    lines = [{"image": "a.png", "prompt": PROMPT}, {"image": "b.png", "prompt": "a"}]
    assert run_folder(str(tmp_path / "deaf"), pictures, write_prompts(tmp_path, *lines), tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "1 done, 1 failed" in captured.out
    assert f"{pictures / 'a.png'}: RuntimeError: " in captured.err


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_huge, "bad.png does not open as an image: Image size (900000000 pixels) exceeds limit"),
        (lambda path: write_truncated(path, path.parent / "b.png"), "which does not decode: image file is truncated"),
        (lambda path: path.write_bytes(b"P6 12345678901 1 255 "), "bad.png does not open as an image: "),
        (lambda path: path.write_bytes(b"P3 9 9 255 few"), "bad.png', which does not decode: invalid literal"),
    ],
    ids=["huge", "truncated", "header", "pixels"],
)
def test_one_edit_says_in_a_line_what_is_wrong_with_its_file(write, message, model, pictures, tmp_path, capsys):
    write(pictures / "bad.png")
    words = ["edit", "--model", model, "--image", str(pictures / "bad.png"), "--prompt", PROMPT]
    assert main([*words, "--output", str(tmp_path / "edited.png")]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert line.startswith("editar-hf: error: ")
    assert message in line


def test_a_seed_out_of_range_is_refused_before_any_work(pictures, tmp_path, capsys):
    words = ["edit", "--model", "no-such-model", "--image", str(pictures / "a.png"), "--prompt", PROMPT]
    for seed in (2**64, -(2**63) - 1):
        assert main([*words, "--seed", str(seed), "--output", str(tmp_path / "edited.png")]) == 2
        assert f"`--seed` is {seed}; pass one from" in capsys.readouterr().err
        torch.Generator().manual_seed(seed + (1 if seed < 0 else -1))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"image": "a.png", "prompt"'], "line 1 is no JSON"),
        (
            [{"image": "a.png", "prompt": PROMPT}, {"image": "b.png"}],
            'line 2 is \'{"image": "b.png"}\'; give an object',
        ),
        ([{"image": "a.png", "prompt": PROMPT, "sed": 1}], "give an object with `image` and `prompt`"),
        ([{"image": "a.png", "prompt": PROMPT, "seed": "one"}], "give an object with `image` and `prompt`"),
        ([{"image": "a.png", "prompt": PROMPT, "seed": 2**70}], f"line 1: `seed` is {2**70}; pass one from"),
        ([{"image": "a.png", "prompt": PROMPT, "output": "a.psd"}], "a.psd; end it in an image format"),
        ([{"image": "a.png", "prompt": PROMPT}] * 2, "a.png more than once; give those lines an `output`"),
        ([{"image": "a.png", "prompt": PROMPT, "output": "a.txt"}], "a.txt; end it in an image format"),
    ],
)
def test_a_file_of_prompts_that_is_wrong_is_refused_before_any_work(lines, message, pictures, tmp_path, capsys):
    prompts = write_prompts(tmp_path, *lines)
    assert run_folder("no-such-model", pictures, prompts, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_refusal_of_a_wrong_line_says_what_each_value_is(pictures, tmp_path, capsys):
    sound = {"image": "a.png", "prompt": PROMPT}
    wrong = [
        *({"seed": value} for value in (True, None, 1.0, [0])),
        *(
            {name: value}
            for name in ("image", "prompt", "task", "output", "mask")
            for value in ("", None, 3, ["a.png"])
        ),
    ]
    for values in wrong:
        prompts = write_prompts(tmp_path, sound, sound | values)
        assert run_folder("no-such-model", pictures, prompts, tmp_path / "out") == 2
        message = capsys.readouterr().err
        assert "line 2 is " in message, values
        assert "`seed` is a whole number; the others are text, and not empty." in message
    for line in ('"text"', "[" * 100_000, "9" * 5000, "[]", "null"):
        assert run_folder("no-such-model", pictures, write_prompts(tmp_path, line), tmp_path / "out") == 2
        assert "editar-hf: error: `--prompts` " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": " "}, "line 2: `prompt` is empty"),
        ({"task": "paint"}, "line 2: `task` is 'paint'; choose one of 'edit', "),
        ({"output": "."}, "which is a folder"),
        ({"output": "a.xbm"}, "a.xbm; end it in an image format"),
        ({"output": "../pictures/b.png"}, "b.png would be overwritten"),
    ],
)
def test_a_line_that_cannot_be_done_is_refused_before_any_work(values, message, pictures, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    lines = [{"image": "b.png", "prompt": PROMPT}, {"image": "a.png", "prompt": PROMPT} | values]
    prompts = write_prompts(tmp_path, *lines)
    assert run_folder("no-such-model", pictures, prompts, tmp_path / "out") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quality", "0"], "`--quality` is 0; pass a whole number from 1 to 100."),
        (["--quality", "101"], "`--quality` is 101; pass a whole number from 1 to 100."),
        (["--quality", "90"], "edited.png has none; leave it out"),
        (["--num-images", "0"], "`--num-images` is 0; pass a whole number from 1 to 1000."),
        (["--num-images", "1000000000000"], "`--num-images` is 1000000000000; pass"),
        (["--device", "gpu"], "`--device` is 'gpu', which torch cannot use here"),
        (["--device", "cuda:99"], "`--device` is 'cuda:99', which torch cannot use here"),
        (["--device", "meta"], "`--device` is 'meta', which torch cannot use here"),
        (["--task", "paint"], "`task` is 'paint'; choose one of 'edit', "),
        (["--prompt", " "], "`--prompt` is empty"),
        (["--image", "missing.png"], "`--image` is missing.png, which is not a file"),
        (["--mask", "missing.png"], "`--mask` is missing.png, which is not a file"),
        (["--output", "."], "`--output` is ., which is a folder"),
        (["--output", "edited"], "`--output` is edited; end it in an image format"),
        (["--output", "edited.wmf"], "`--output` is edited.wmf; end it in an image format"),
        (["--output", "pictures/a.png/edited.png"], "no file can be written to pictures/a.png"),
        (["--crop-to-mask"], "`--crop-to-mask` needs a mask"),
        (["--image", "pictures", "--output", "out", "--mask", "pictures"], "`--mask` is pictures, which is not a file"),
        (["--model", "./missing"], "`--model` is './missing': there is no such folder"),
        (["--lora", "./missing"], "`--lora` is './missing': there is no such folder"),
    ],
)
def test_an_edit_that_cannot_be_done_is_refused_before_any_work(
    words, message, pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run_edit("no-such-model", "pictures/a.png", PROMPT, "edited.png", *words) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


@pytest.mark.parametrize(
    "words",
    [
        ["--quality", "abc"],
        ["--dtype", "int8"],
        ["--resize-mode", "a"],
        ["--seed", "x"],
        ["--image", ""],
        ["--mask", ""],
    ],
)
def test_an_option_of_another_kind_is_refused_by_the_parser(words, pictures, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run_edit("no-such-model", pictures / "a.png", PROMPT, tmp_path / "edited.png", *words)
    assert stop.value.code == 2


def test_options_are_passed_on_to_the_pipeline(model, pictures, tmp_path):
    options = ["--resize-mode", "stretch", "--no-restore-size", "--num-images", 2, "--seed", 4]
    options += ["--guidance-scale", 5, "--image-guidance-scale", 1.5, "--negative-prompt", "green", "--device", "cpu"]
    assert run_edit(model, pictures / "b.png", PROMPT, tmp_path / "EDITED.PNG", *options) == 0
    expected = build_pipeline()(
        PROMPT,
        image=Image.open(pictures / "b.png"),
        resize_mode="stretch",
        restore_size=False,
        num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(4),
        guidance_scale=5.0,
        image_guidance_scale=1.5,
        negative_prompt="green",
    ).images
    assert np.abs(np.asarray(expected[0]).astype(int) - np.asarray(expected[1])).max() > 0
    for index, image in enumerate(expected):
        assert np.array_equal(read_pixels(tmp_path / f"EDITED-{index}.PNG"), np.asarray(image))
    assert not (tmp_path / "EDITED.PNG").exists()


def test_a_window_around_a_mask_is_edited(model, pictures, tmp_path):
    mask = Image.new("L", (40, 24))
    mask.paste(255, (20, 8, 24, 12))
    mask.save(pictures / "b-mask.png")
    words = ["--mask", pictures / "b-mask.png", "--crop-to-mask"]
    assert run_edit(model, pictures / "b.png", PROMPT, tmp_path / "edited.png", *words) == 0
    source = Image.open(pictures / "b.png")
    generator = torch.Generator().manual_seed(0)
    (expected,) = build_pipeline()(PROMPT, image=source, mask_image=mask, crop_to_mask=True, generator=generator).images
    assert np.array_equal(read_pixels(tmp_path / "edited.png"), np.asarray(expected))


def test_a_refusal_of_the_pipeline_is_one_line(model, pictures, tmp_path, capsys):
    words = ["--mask", pictures / "b.png"]
    assert run_edit(model, pictures / "a.png", PROMPT, tmp_path / "edited.png", *words) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert line.startswith("editar-hf: error: `mask_image` is 40×24 pixels and its image 16×16")


def test_an_overflow_is_one_line(model, pictures, tmp_path, capsys):
    assert run_edit(model, pictures / "a.png", PROMPT, tmp_path / "edited.png", "--guidance-scale", 1e38) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "Error" in line)
    assert line.startswith(f"{pictures / 'a.png'}: RuntimeError: The decoder's logits were NaN or infinite")


def test_an_adapter_and_a_dtype_are_loaded(model, pictures, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(build_transformer(), config).save_pretrained(tmp_path / "adapter")
    pipeline = build_pipeline()
    pipeline.load_lora_weights(tmp_path / "adapter")
    how = {"restore_size": True, "generator": torch.Generator().manual_seed(0)}
    (expected,) = pipeline.to(torch.bfloat16)(PROMPT, image=Image.open(pictures / "a.png"), **how).images
    words = ["--lora", tmp_path / "adapter", "--dtype", "bfloat16"]
    assert run_edit(model, pictures / "a.png", PROMPT, tmp_path / "edited.png", *words) == 0
    assert np.array_equal(read_pixels(tmp_path / "edited.png"), np.asarray(expected))
    how["generator"].manual_seed(0)
    (in_float32,) = pipeline.to(torch.float32)(PROMPT, image=Image.open(pictures / "a.png"), **how).images
    assert not np.array_equal(np.asarray(expected), np.asarray(in_float32))
    assert not np.array_equal(np.asarray(in_float32), np.asarray(edit_directly(pictures / "a.png", PROMPT, 0)))


def test_a_lossy_format_keeps_what_the_mask_keeps(model, pictures, tmp_path):
    mask = Image.new("L", (40, 24))
    mask.paste(255, (8, 0, 12, 4))
    mask.save(pictures / "b-mask.png")
    source = read_pixels(pictures / "b.png")
    # JPEG and AVIF round; on noise, the hardest case, Pillow's defaults move pixels by more than 150.
    for words, limit in (([".jpg"], 24), ([".avif"], 24), ([".webp"], 0), ([".jpg", "--quality", 50], 160)):
        suffix, *options = words
        output = tmp_path / f"edited{suffix}"
        assert run_edit(model, pictures / "b.png", PROMPT, output, "--mask", pictures / "b-mask.png", *options) == 0
        moved = np.abs(read_pixels(output) - source)[:, 24:].max()
        assert moved <= limit
    assert moved > 24


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif", ".tif"])
def test_a_colour_profile_is_saved(suffix, tmp_path):
    image = draw_image(0)
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    edit.save_image(image, tmp_path / f"edited{suffix}", None)
    with Image.open(tmp_path / f"edited{suffix}") as saved:
        assert saved.info["icc_profile"] == image.info["icc_profile"]


def test_an_image_that_cannot_be_saved_leaves_the_old_file(tmp_path):
    path = tmp_path / "edited.webp"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="16383"):
        edit.save_image(Image.new("RGB", (16384, 1)), path, None)
    assert path.read_bytes() == b"old"


def test_an_image_is_replaced_by_its_edit_only_once_that_is_written(model, pictures, capsys):
    before = (pictures / "b.png").read_bytes()
    words = ["--mask", pictures / "broken.png"]
    assert run_edit(model, pictures / "b.png", PROMPT, pictures / "b.png", *words) == 2
    assert (pictures / "b.png").read_bytes() == before
    expected = np.asarray(edit_directly(pictures / "b.png", PROMPT, 0))
    assert run_edit(model, pictures / "b.png", PROMPT, pictures / "b.png") == 0
    assert np.array_equal(read_pixels(pictures / "b.png"), expected)


@pytest.mark.parametrize(
    ("encoding", "prompt"),
    [("utf-8-sig", PROMPT), ("utf-8", "make the red\u2028circle blue"), ("utf-8", "make the red\x85circle\x0b blue")],
)
def test_a_file_of_prompts_may_have_a_mark_of_its_encoding_and_any_white_space(encoding, prompt, pictures, tmp_path):
    line = json.dumps({"image": "a.png", "prompt": prompt}, ensure_ascii=False)
    (tmp_path / "prompts.jsonl").write_text(f"\n{line}\n \n", encoding=encoding)
    words = ["edit", "--model", "m", "--image", str(pictures), "--prompts", str(tmp_path / "prompts.jsonl")]
    (job,) = edit.read_prompts(build_parser().parse_args([*words, "--output", "out"]))
    assert job.prompt == prompt


def test_a_file_of_prompts_in_another_encoding_is_named(pictures, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"image": "a.png", "prompt": "é"}', encoding="latin-1")
    assert run_folder("no-such-model", pictures, str(path), tmp_path / "out") == 2
    assert f"`--prompts` {path} is not UTF-8: " in capsys.readouterr().err


def test_every_image_of_a_folder_gets_the_prompt(model, pictures, tmp_path, capsys):
    Image.open(pictures / "a.png").convert("L").save(pictures / "C.JPG")
    (pictures / ".unfinished-d.png").write_bytes((pictures / "a.png").read_bytes())
    (pictures / "notes.txt").write_text("no image")
    (pictures / "folder.png").mkdir()
    (pictures / "folder.png" / "inner.png").write_bytes((pictures / "a.png").read_bytes())
    assert run_edit(model, pictures, PROMPT, tmp_path / "out", "--seed", 3) == 1
    captured = capsys.readouterr()
    assert "4 edits, 0 of them done before\n3 done, 1 failed" in captured.out
    assert f"{pictures / 'broken.png'}: UnidentifiedImageError" in captured.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [RECORD_FILE, "C.png", "a.png", "b.png"]
    for name in ("a", "b"):
        expected = edit_directly(pictures / f"{name}.png", PROMPT, 3)
        assert np.array_equal(read_pixels(tmp_path / "out" / f"{name}.png"), np.asarray(expected))


def test_a_folder_that_cannot_be_edited_is_refused_before_any_work(pictures, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    Image.new("RGB", (8, 8)).save(pictures / "a.jpg")
    cases = {
        (tmp_path / "empty", tmp_path / "out"): "a folder without images",
        (pictures, tmp_path / "file"): "which is a file; give a folder",
        (pictures, tmp_path / "out"): f"has two images for {tmp_path / 'out' / 'a.png'}; rename one",
    }
    for (image, output), message in cases.items():
        assert run_edit("no-such-model", image, PROMPT, output) == 2
        assert message in capsys.readouterr().err
    (pictures / "a.jpg").unlink()
    assert run_edit("no-such-model", pictures, PROMPT, pictures) == 2
    assert f"{pictures / 'a.png'} would be overwritten" in capsys.readouterr().err
    prompts = write_prompts(tmp_path, {"image": "a.png", "prompt": PROMPT})
    assert run_folder("no-such-model", pictures / "a.png", prompts, tmp_path / "out") == 2
    assert "a.png, which is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_edit_is_made_again_where_anything_it_depends_on_has_changed(model, pictures, tmp_path, capsys):
    out, mask, line = tmp_path / "out", pictures / "mask.bmp", {"image": "a.png", "prompt": PROMPT}
    Image.new("L", (16, 16), 255).save(mask)

    def count_done(*options, model=model, **values):
        capsys.readouterr()
        assert run_folder(model, pictures, write_prompts(tmp_path, line | values), out, *options) == 0
        (done,) = re.findall(r"^(\d+) done", capsys.readouterr().out, flags=re.MULTILINE)
        return int(done)

    assert [count_done(), count_done()] == [1, 0]
    changed = [["--guidance-scale", 2], ["--negative-prompt", "red"], ["--num-images", 2], ["--dtype", "float32"]]
    for options in (*changed, ["--seed", 1], ["--mask", mask]):
        assert [count_done(*options), count_done(*options), count_done()] == [1, 0, 1], options
    for values in ({"prompt": "make the red square blue"}, {"task": "canny"}):
        assert [count_done(**values), count_done(**values), count_done()] == [1, 0, 1], values
    assert count_done(model=f"{model}/") == 1
    draw_image(7).save(pictures / "a.png")
    assert [count_done(), count_done()] == [1, 0]
    assert np.array_equal(read_pixels(out / "a.png"), np.asarray(edit_directly(pictures / "a.png", PROMPT, 0)))
    (pictures / "a.png").unlink()
    for _ in range(2):
        assert run_folder(model, pictures, write_prompts(tmp_path, line), out) == 1


def test_a_kill_between_an_image_and_its_record_costs_one_edit(model, pictures, tmp_path, capsys):
    out, record = tmp_path / "out", tmp_path / "out" / RECORD_FILE
    first = write_prompts(tmp_path, {"image": "a.png", "prompt": PROMPT})
    assert run_folder(model, pictures, first, out) == 0
    assert run_folder(model, pictures, first, out, "--seed", 1) == 0
    whole = record.read_bytes()
    for killed in (whole[: whole.rindex(b"\n{")], whole[:-9]):
        record.write_bytes(killed)
        capsys.readouterr()
        # The image is of seed 1, and the last whole record of seed 0.
        assert run_folder(model, pictures, first, out) == 0
        assert run_folder(model, pictures, first, out) == 0
        done = re.findall(r"^(\d+) done", capsys.readouterr().out, flags=re.MULTILINE)
        assert done == ["1", "0"]
