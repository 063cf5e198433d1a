"""`editar-hf edit`, for one picture and for a folder of them."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build_pipeline

from editar_hf.commands import main


pytestmark = pytest.mark.filterwarnings("ignore:A prompt is longer", "ignore:More than 2% of a picture")
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


def run_folder(model, pictures, prompts, output):
    return main(["edit", "--model", model, "--image", str(pictures), "--prompts", prompts, "--output", str(output)])


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
        "truncated.png": "ValueError: `images` holds ",
    }
    lines = [{"image": name, "prompt": PROMPT} for name in (*expected, "a.png")]
    lines.insert(0, {"image": "b.png", "prompt": PROMPT, "output": "b.jpg", "mask": "truncated.png"})
    assert run_folder(model, pictures, write_prompts(tmp_path, *lines), tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "1 done, 5 failed" in captured.out
    for name, message in expected.items():
        assert f"{pictures / name}: {message}" in captured.err
    assert f"{pictures / 'b.png'}: ValueError: `mask_image` holds '{pictures / 'truncated.png'}'" in captured.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


def test_an_error_that_is_not_of_the_input_stops_no_folder_either(pictures, tmp_path, capsys):
    """The words of one prompt are none that this text encoder knows: an IndexError."""
    pipeline = build_pipeline()
    pipeline.text_encoder.resize_token_embeddings(max(pipeline.processor(text="a").input_ids[0]) + 1)
    pipeline.save_pretrained(tmp_path / "deaf")
    lines = [{"image": "a.png", "prompt": PROMPT}, {"image": "b.png", "prompt": "a"}]
    assert run_folder(str(tmp_path / "deaf"), pictures, write_prompts(tmp_path, *lines), tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "1 done, 1 failed" in captured.out
    assert f"{pictures / 'a.png'}: IndexError: " in captured.err


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_huge, "bad.png is no picture that opens: Image size (900000000 pixels) exceeds limit"),
        (lambda path: write_truncated(path, path.parent / "b.png"), "which does not decode: image file is truncated"),
        (lambda path: path.write_bytes(b"P6 12345678901 1 255 "), "bad.png is no picture that opens: "),
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
        ([{"image": "a.png", "prompt": PROMPT, "output": "a.psd"}], "a.psd; end it in a picture format"),
        ([{"image": "a.png", "prompt": PROMPT}] * 2, "a.png more than once; give those lines an `output`"),
        ([{"image": "a.png", "prompt": PROMPT, "output": "a.txt"}], "a.txt; end it in a picture format"),
    ],
)
def test_a_file_of_prompts_that_is_wrong_is_refused_before_any_work(lines, message, pictures, tmp_path, capsys):
    prompts = write_prompts(tmp_path, *lines)
    assert run_folder("no-such-model", pictures, prompts, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
