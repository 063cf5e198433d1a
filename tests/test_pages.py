"""What stands on the README and on the pages in `docs/`, run as written, in order.

The scene editor has a decoder of one layer with random weights here, which is fast. Its other parts are the shipped
ones. `test_user_examples.py` edits with the shipped decoder.
"""

import ast
import inspect
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import PAGES, ROOT, list_calls, read_blocks
from serving import run_server
from tiny import draw_image, redraw_weights

from editar_hf import EditARConfig, EditARForConditionalGeneration, EditARPipeline
from editar_hf.commands import build_parser, main
from editar_hf.training.dataset_specs import DatasetSpec, open_dataset
from editar_hf.training.rows import decode_image


pytestmark = pytest.mark.filterwarnings("ignore:The center crop cuts", "ignore:A prompt is longer")
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
# What the pages suppose a user has: the published weights, an editor, pairs, and an adapter trained on them.
STAND_INS = {
    "projects": "projects",
    "editar": "projects/stickers/sticker-editor",
    "my-editor": "projects/stickers/sticker-editor",
    "runs/my-lora/adapter": "projects/stickers/sticker-copy-lora",
}
# Where the pages suppose a server.
ADDRESS = "http://127.0.0.1:8000"
PAIR = {"before": draw_image(0), "after": draw_image(1)}


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    """The folder `examples`, with a decoder of one layer in the scene editor."""
    folder = tmp_path_factory.mktemp("examples")
    for path in (ROOT / "examples").iterdir():
        if path.name != "scene-editor":
            (folder / path.name).symlink_to(path)
    pipeline = EditARPipeline.from_pretrained(ROOT / "examples" / "scene-editor", dtype=torch.float32)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = EditARConfig(**pipeline.transformer.config.to_dict() | sizes)
    decoder = redraw_weights(EditARForConditionalGeneration(config), scale=0.3)
    decoder.generation_config = pipeline.transformer.generation_config
    pipeline.register_modules(transformer=decoder)
    pipeline.save_pretrained(folder / "scene-editor")
    return folder


def fill_desk(folder: Path, examples: Path):
    """Put into a working directory what the pages suppose a user has."""
    (folder / "examples").symlink_to(examples)
    for name, target in STAND_INS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(ROOT / target)
    pairs = folder / "my-pairs" / "train"
    pairs.mkdir(parents=True)
    for name, image in PAIR.items():
        image.save(pairs / f"0-{name}.png")


@pytest.fixture(scope="module")
def served_address():
    """The address of a server of the sticker editor and its adapter, which needs no key."""

    def load_pipeline():
        pipeline = EditARPipeline.from_pretrained(ROOT / "projects/stickers/sticker-editor")
        pipeline.load_lora_weights(ROOT / "projects/stickers/sticker-copy-lora", adapter_name="copy")
        return pipeline

    with run_server(load_pipeline, loras=("copy",), api_key=None) as running:
        running.wait_until_loaded()
        yield running.url


@pytest.fixture(scope="module")
def run_page(tmp_path_factory, examples, request):
    """Run the Python of a page, once for all tests, and return its names and its working directory."""

    @cache
    def run(page: str) -> tuple[dict, Path]:
        folder, names = tmp_path_factory.mktemp("desk"), {}
        fill_desk(folder, examples)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for block in read_blocks(page, "python"):
                code = block.code
                if ADDRESS in code:
                    code = code.replace(ADDRESS, request.getfixturevalue("served_address"))
                if block.reason is None:
                    torch.manual_seed(0)
                    exec(code, names)
                else:
                    try:
                        check_calls(block.code, names)
                    except ModuleNotFoundError as error:
                        if error.name.partition(".")[0] not in block.reason:
                            raise
        return names, folder

    return run


def check_calls(code: str, names: dict):
    """Check code that cannot run here: what it imports is there, and what it calls takes these arguments."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), names)
        elif isinstance(node, ast.Call):
            function = eval(ast.unparse(node.func), names)
            inspect.signature(function).bind(*node.args, **{word.arg: word.value for word in node.keywords})


@pytest.mark.parametrize("page", [name for name in NAMES if read_blocks(name, "python")])
def test_python_of_a_page_runs_as_written(page, run_page):
    run_page(page)


def test_calls_that_cannot_run_are_checked(run_page):
    with pytest.raises(TypeError, match="unexpected keyword argument 'privat'"):
        check_calls('pipe.push_to_hub("me/mine", privat=True)', run_page("docs/share.md")[0])


@pytest.mark.parametrize("page", [name for name in NAMES if read_blocks(name, "bash")])
def test_commands_of_a_page_parse_and_edits_run(page, examples, tmp_path, monkeypatch, request):
    fill_desk(tmp_path, examples)
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results"))
    monkeypatch.chdir(tmp_path)
    calls = list_calls(page, tmp_path)
    assert calls
    for program, *words in calls:
        if program == "editar-hf":
            args = build_parser().parse_args(words)
            if words[0] == "edit":
                assert main(words) == 0, words
                assert args.output.exists(), words
        elif program == "curl":
            words = [word.replace(ADDRESS, request.getfixturevalue("served_address")) for word in words]
            subprocess.run(["curl", "--fail", *words], check=True)


@pytest.mark.parametrize("page", NAMES)
def test_links_of_a_page_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


def test_page_of_docs_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    pages = {name for name in NAMES if name.startswith("docs/")} - {"docs/index.md"}  # which includes the README
    assert not [name for name in pages if f"]({name})" not in text]


def test_readme_is_short_and_shows_the_gpu_first():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    assert "cuda" in read_blocks("README.md", "python")[0].code


# What the code of a page promises


def test_session_of_the_masks_page_keeps_what_no_mask_freed(run_page):
    names, _ = run_page("docs/masks-and-sessions.md")
    photo, image = np.asarray(names["photo"]), np.asarray(names["image"])
    # A token is 23.3 pixels of the photograph, whose crop begins at its column 5.8. The mask begins in the token of row
    # 5 and column 7, and the feather ends one token before.
    row, column = np.mgrid[:256, :384]
    may_change = (row >= 93) & (column >= 145)
    assert np.array_equal(image[~may_change], photo[~may_change])
    assert not np.array_equal(image, photo)


def test_snippets_write_and_return_what_their_pages_say(run_page):
    edit, _ = run_page("docs/edit.md")
    assert isinstance(edit["processor"], edit["EditARProcessor"])
    assert edit["edges"].size == edit["photo"].size == edit["edited"].size
    speed, _ = run_page("docs/speed.md")
    assert len(speed["variants"]) == 2
    _, folder = run_page("README.md")
    assert (folder / "edited.png").exists()


def test_parquet_file_of_the_training_page_holds_the_images(run_page, monkeypatch):
    _, folder = run_page("docs/train.md")
    for name in PAIR:
        (folder / "my-pairs" / "train" / f"0-{name}.png").unlink()
    (row,) = open_dataset(DatasetSpec(str(folder / "my-parquet")))
    assert row["prompt"] == "make the car red"
    for name, image in zip(("source_image", "target_image"), PAIR.values(), strict=True):
        assert np.array_equal(np.asarray(decode_image(row[name])), np.asarray(image))
