"""`editar-hf edit`, for one picture and for a folder of them."""

import json

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


def test_an_unreadable_picture_is_reported_and_the_others_go_on(model, pictures, tmp_path, capsys):
    lines = [{"image": f"{name}.png", "prompt": PROMPT} for name in ("broken", "missing", "a")]
    assert run_folder(model, pictures, write_prompts(tmp_path, *lines), tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "1 done, 2 failed" in captured.out
    assert f"{pictures / 'broken.png'}: cannot identify" in captured.err
    assert f"{pictures / 'missing.png'}: [Errno 2]" in captured.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


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
