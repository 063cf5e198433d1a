"""The Gradio app: its answers, called directly on a tiny pipeline, and its page in headless Chromium."""

import contextlib
import functools
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from types import SimpleNamespace

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from browser import CHROMIUM, AppPage, run_app, run_browser
from pages import ROOT
from PIL import Image
from processes import PythonProcess, find_free_port
from serving import wait_until
from tiny import build_pipeline as build_tiny_pipeline
from tiny import draw_image, teach_to_keep

from editar_hf.commands import main
from editar_hf.condition_maps import make_canny_map
from editar_hf.image_processing_editar import DETAILS
from editar_hf.serving import sessions
from editar_hf.serving.gradio_app import EditApp, Example, create_demo, read_mask
from editar_hf.serving.sessions import Session, Step


pytestmark = pytest.mark.filterwarnings("ignore:The center crop cuts")
# Long enough for the prefixes of the tasks.
build_pipeline = functools.partial(build_tiny_pipeline, num_text_tokens=80)
PROMPT = "make the red circle blue"
CANNY = "Make a new image from the edges of this one"


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


@pytest.fixture(scope="module")
def app(pipe):
    return create_app(pipe)


def create_app(pipe):
    return EditApp(pipe, [], {"canny": make_canny_map}, lambda function: function)


def start_session(image):
    session = Session()
    session.start(image)
    return session


def edit(
    app,
    session,
    editor_value=None,
    prompt=PROMPT,
    task="Edit",
    seed=0,
    num_images=1,
    preserve=False,
    keep_detail=False,
):
    """Press the button, and give the answers one after the other."""
    run = app.begin(session)[app.run]
    return app.edit(session, run, editor_value, prompt, task, seed, num_images, 1.5, preserve, keep_detail)


def seed_generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def brush(size, *boxes):
    """What the editor sends if these boxes, in pixels, are marked; colors where nothing is marked are noise."""
    layers = []
    for box in boxes:
        layer = draw_image(len(layers), *size).convert("RGBA")
        layer.putalpha(0)
        layer.paste((16, 185, 129, 140), box)
        layers.append(layer)
    return {"background": None, "layers": layers, "composite": None}


def click(index):
    return gr.SelectData(None, {"index": index, "value": None})


class Gate:
    """Lets the decoder of a pipeline do only as many passes as are released, as if it were slow."""

    def __init__(self, pipeline):
        self.permits, self.num_passes = threading.Semaphore(0), 0
        self.handle = pipeline.transformer.model.register_forward_pre_hook(self.wait)

    def wait(self, module, args):
        self.num_passes += 1
        assert self.permits.acquire(timeout=20)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.remove()
        self.permits.release(1000)


# The brush


def test_mask_is_where_the_alpha_of_any_layer_is_high():
    value = brush((24, 16), (0, 0, 4, 4), (20, 8, 24, 16))
    value["layers"][0].putpixel((10, 10), (255, 255, 255, 40))  # what an eraser leaves
    expected = np.zeros((32, 48), bool)
    expected[:8, :8] = expected[16:, 40:] = True
    assert np.array_equal(np.asarray(read_mask(value, (48, 32))) == 255, expected)
    assert read_mask(brush((24, 16), (0, 0, 0, 0)), (24, 16)) is read_mask(None, (24, 16)) is None


# Sessions


def test_session_goes_on_in_tokens_and_keeps_what_no_brush_has_touched(app, pipe):
    photo = draw_image(0, 24, 16)
    session, image, tokens = start_session(photo), photo, pipe.encode_image(photo)
    for seed, box in enumerate([(4, 0, 8, 4), (8, 4, 12, 8)]):
        *previews, last = edit(app, session, brush(photo.size, box), seed=seed)
        assert [set(preview) for preview in previews] == [{app.slider, app.status}] * 4
        mask_image = Image.new("L", photo.size)
        mask_image.paste(255, box)
        arguments = {"image": image, "source_image_tokens": tokens, "mask_image": mask_image, "restore_size": True}
        output = pipe(PROMPT, **arguments, guidance_scale=1.5, generator=seed_generators(seed))
        before, (image,), tokens = image, output.images, output.image_tokens
        assert torch.equal(session.step.source_image_tokens, tokens)
        shown = [Image.open(path) for path in (*last[app.slider], last[app.download])]
        assert [np.array_equal(*map(np.asarray, pair)) for pair in zip(shown, (before, image, image), strict=True)]
    assert image.size == photo.size
    row, column = np.mgrid[:16, :24]
    untouched = (row >= 12) | (column >= 16)  # Beyond the feather, which is one token wide.
    assert np.array_equal(np.asarray(image)[untouched], np.asarray(photo)[untouched])
    kept = torch.ones(1, 16, dtype=torch.bool)
    kept[0, [0, 5]] = False
    assert torch.equal(tokens[kept], pipe.encode_image(photo)[kept])
    assert not torch.equal(tokens, pipe.encode_image(photo))


def test_the_rest_is_kept_without_a_brush_if_asked_and_the_brush_wins():
    pipe, image = build_pipeline(), draw_image(0)
    teach_to_keep(pipe, [image], [PROMPT])
    app, session = create_app(pipe), start_session(image)
    for editor_value in (None, brush(image.size, (0, 0, 4, 4))):
        session.start(image)
        *_, last = edit(app, session, editor_value, preserve=True)
        how = {"preserve": "auto"} if editor_value is None else {"mask_image": read_mask(editor_value, image.size)}
        expected = pipe(PROMPT, image=image, guidance_scale=1.5, generator=seed_generators(0), **how)
        assert torch.equal(session.step.image_tokens, expected.image_tokens)
        assert np.array_equal(session.step.image, expected.images[0])
        assert "whole image" not in last[app.status]
    pipe.transformer.generation_config.preserve_threshold = 1e-9
    session.start(image)
    *_, last = edit(app, session, preserve=True)
    assert last[app.status].endswith("The instruction changes the whole image, so nothing of it was kept.")
    pipe.transformer.generation_config.preserve_threshold = 99.0
    session.start(image)
    with pytest.warns(UserWarning, match="no value of the edit map is above"):
        *_, last = edit(app, session, preserve=True)
    assert "The model found no part to change." in last[app.status]


def test_a_large_image_keeps_its_detail_if_asked_with_and_without_a_brush():
    pipe, image = build_pipeline(), draw_image(0, 60, 40)
    app, session = create_app(pipe), start_session(image)
    for editor_value in (None, brush(image.size, (20, 0, 40, 20))):
        session.start(image)
        list(edit(app, session, editor_value, keep_detail=True))
        for detail in DETAILS:
            how = {"mask_image": read_mask(editor_value, image.size), "generator": seed_generators(0)}
            expected = pipe(PROMPT, image=image, guidance_scale=1.5, detail=detail, **how).images[0]
            assert np.array_equal(session.step.image, expected) == (detail == "source")


@pytest.mark.parametrize("task", ["Edit", "Make a new image; this one is a map of depth"])
def test_a_model_of_several_aspect_ratios_edits_the_whole_image_at_its_own(task):
    pipe = build_pipeline()
    pipe.processor.image_processor.aspect = "source"
    app, photo = create_app(pipe), draw_image(0, 36, 24)
    session = start_session(photo)
    *_, last = edit(app, session, brush(photo.size), task=task)
    kind = "edit" if task == "Edit" else "depth"
    arguments = {"task": kind, "guidance_scale": 1.5, "generator": seed_generators(0)}
    expected = pipe(PROMPT, image=photo, **arguments)
    assert torch.equal(session.step.image_tokens, expected.image_tokens)
    assert session.step.image_tokens.shape == (1, 12)
    shown = [np.asarray(Image.open(path)) for path in last[app.slider]]
    assert np.array_equal(shown[0], photo)
    assert np.array_equal(shown[1], expected.images[0])
    *_, last = edit(app, session, brush(photo.size))  # The session goes on in tokens.
    assert session.step.image_tokens.shape == (1, 12)
    assert Image.open(last[app.slider][1]).size == photo.size


def test_undo_shows_the_image_and_the_prompt_before_and_a_new_edit_replaces_what_was_undone(app):
    session = start_session(draw_image(0))
    for prompt in ("first", "second"):
        list(edit(app, session, prompt=prompt))
    first, second = session.steps[1:]
    assert app.undo(session)[app.prompt]["value"] == "second"
    assert session.step is first
    app.go_to(session, click(2))
    assert session.step is second
    app.go_to(session, click(0))
    assert app.undo(session)[app.undo_button] == gr.update(interactive=False)
    assert session.step is session.steps[0]
    list(edit(app, session, prompt="third"))
    assert [step.prompt for step in session.steps] == ["", "third"]


def test_session_forgets_its_oldest_images_when_it_grows_too_large(monkeypatch):
    monkeypatch.setattr(sessions, "MAX_SESSION_PIXELS", 3 * 256)
    session = start_session(draw_image(0))
    for k in range(5):
        session.add(Step([draw_image(k)], prompt=str(k)))
    assert [step.prompt for step in session.steps] == ["2", "3", "4"]
    assert session.step.prompt == "4"


def test_variants_have_the_seeds_that_follow_and_the_chosen_one_is_edited_next(app, pipe):
    session = start_session(draw_image(0))
    *_, last = edit(app, session, num_images=3, seed=5)
    assert last[app.variants]["visible"]
    alone = pipe(PROMPT, image=draw_image(0), guidance_scale=1.5, generator=seed_generators(7)).image_tokens
    assert torch.equal(session.step.image_tokens[2:], alone)
    app.choose(session, click(2))
    assert torch.equal(session.step.source_image_tokens, alone)
    list(edit(app, session))
    assert session.step.before is session.steps[1].images[2]


def test_task_makes_the_condition_map_of_the_image_or_takes_the_image_as_the_map(app, pipe):
    image = draw_image(0, 24, 16)
    for choice, source in ((CANNY, make_canny_map(image)), ("Make a new image; this one is a map of edges", image)):
        session = start_session(image)
        list(edit(app, session, task=choice))
        expected = pipe(PROMPT, image=source, task="canny", guidance_scale=1.5, generator=seed_generators(0))
        assert torch.equal(session.step.image_tokens, expected.image_tokens)
        assert session.step.image.size == session.step.before.size == (16, 16)


# Errors


@pytest.mark.parametrize(
    ("session", "options", "words"),
    [
        (Session(), {}, "no image yet"),
        (start_session(draw_image(0)), {"prompt": " "}, "Write what to change"),
        (start_session(draw_image(0)), {"prompt": PROMPT * 20}, "too long: it has .* tokens"),
        (
            start_session(draw_image(0)),
            {"task": CANNY, "editor_value": brush((16, 16), (0, 0, 9, 9))},
            "only for edits",
        ),
        (start_session(draw_image(0, 24, 16)), {"editor_value": brush((24, 16), (0, 0, 3, 9))}, "nothing inside"),
    ],
)
def test_edit_that_cannot_be_made_says_why(app, session, options, words):
    with pytest.raises(gr.Error, match=words):
        list(edit(app, session, **options))
    assert len(session.steps) <= 1


def test_missing_kornia_and_failures_of_the_model_are_explained_without_their_traceback(app, pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.filters", None)
    with pytest.raises(gr.Error, match="needs kornia, which is not installed"):
        list(edit(app, start_session(draw_image(0)), task=CANNY))
    with torch.no_grad():
        damaged = pipe.transformer.lm_head.weight
        weights = damaged.clone()
        damaged.fill_(torch.nan)
        with pytest.raises(gr.Error) as caught:
            list(edit(app, start_session(draw_image(0))))
        damaged.copy_(weights)
    assert caught.value.message == "The model failed. The log of the app has the reason."
    assert not caught.value.print_exception


def test_upload_turns_photographs_upright_and_refuses_other_files(app, tmp_path):
    photo = draw_image(0, 24, 16)
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.png", exif=exif)
    session = Session()
    app.upload(session, tmp_path / "turned.png")
    assert np.array_equal(np.asarray(session.step.image), np.rot90(np.asarray(photo), -1))
    (tmp_path / "text.png").write_text("not an image")
    Image.new("1", (5000, 5000)).save(tmp_path / "huge.png")
    for name, words in (("text.png", "not a PNG, JPEG or WebP"), ("huge.png", "more than 16777216 pixels")):
        with pytest.raises(gr.Error, match=words):
            app.upload(session, tmp_path / name)
    assert session.step.image.size == (16, 24)


# Cancel


def test_cancel_stops_only_the_edit_of_its_session(app, pipe):
    first, second = start_session(draw_image(0)), start_session(draw_image(1))
    answers, waiting = edit(app, first), edit(app, second)
    collected = []
    thread = threading.Thread(target=lambda: collected.extend(answers))
    with Gate(pipe) as gate:
        thread.start()
        wait_until(lambda: gate.num_passes == 1)
        app.cancel(first)
        gate.permits.release(2)  # Source and text, after which the first token is known.
        wait_until(lambda: pipe._interrupt)
        gate.permits.release(1000)
        thread.join()
        assert gate.num_passes <= 3  # The pass of the next token may have begun.
    assert collected == [{app.slider: None}]
    assert len(first.steps) == 1
    list(waiting)
    expected = pipe(PROMPT, image=draw_image(1), guidance_scale=1.5, generator=seed_generators(0))
    assert torch.equal(second.step.image_tokens, expected.image_tokens)


def test_edit_that_is_canceled_while_it_waits_never_reaches_the_pipeline(app, pipe):
    session = start_session(draw_image(0))
    with Gate(pipe) as gate:
        answers = edit(app, session)
        app.cancel(session)
        assert list(answers) == []
        assert gate.num_passes == 0


def test_pipeline_stops_when_the_browser_leaves(app, pipe):
    answers = edit(app, start_session(draw_image(0)))
    with Gate(pipe) as gate:
        gate.permits.release(5)
        next(answers)  # The preview of the first row, which has four tokens.
        threading.Timer(0.1, gate.permits.release, [1000]).start()
        answers.close()
        assert gate.num_passes == 6
    assert not [thread for thread in threading.enumerate() if thread.name == "editar-hf edit"]


# In the browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with run_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def url(pipe):
    with run_app(pipe, [Example(draw_image(0, 240, 160), PROMPT)]) as url:
        yield url


def test_person_edits_brushes_undoes_and_downloads(browser, url, pipe, tmp_path):
    example, photo = draw_image(0, 240, 160), draw_image(1, 240, 160)
    page = AppPage(browser, url)
    page.wait_for_image()
    page.edit()
    expected = pipe(PROMPT, image=example, generator=seed_generators(0)).images[0]
    assert np.array_equal(np.asarray(Image.open(page.download())), np.asarray(expected))
    photo.save(tmp_path / "photo.png")
    page.upload(tmp_path / "photo.png")
    page.page.get_by_text("Brush over the part").wait_for()
    page.wait_for_image()
    page.brush((0.5, 0.03), (0.6, 0.03), photo.size)
    page.edit("remove the green square")
    edited = np.asarray(Image.open(page.download()))
    # The stroke is in the first row of tokens, which are 40 pixels high, and the feather ends one token below.
    assert np.array_equal(edited[80:], np.asarray(photo)[80:])
    assert not np.array_equal(edited[:40], np.asarray(photo)[:40])
    page.wait_for_history(2)
    page.edit()
    page.wait_for_history(3)
    page.undo()
    page.undo()
    page.page.get_by_text("Brush over the part").wait_for()
    assert np.array_equal(np.asarray(Image.open(page.download())), np.asarray(photo))
    assert not [request for request in page.requests if not request.startswith((url, "blob:", "data:"))]
    page.close()


def test_file_that_is_no_image_is_explained_and_another_one_can_be_uploaded(browser, pipe, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    draw_image(0, 240, 160).save(tmp_path / "photo.png")
    with run_app(pipe) as url:
        page = AppPage(browser, url)
        page.upload(tmp_path / "text.png")
        assert "not a PNG, JPEG or WebP image" in page.read_error()
        page.page.locator("#drop-zone input[type=file]").wait_for(state="attached")
        page.upload(tmp_path / "photo.png")
        page.wait_for_image()
        page.close()


def test_browsers_have_sessions_of_their_own_and_one_edit_at_a_time(browser, url, pipe):
    first, second = AppPage(browser, url), AppPage(browser, url, 390, 844)
    for page in (first, second):
        page.wait_for_image()
    assert second.page.evaluate("document.documentElement.scrollWidth") == 390
    with Gate(pipe) as gate:
        first.start_edit("make the red circle green")
        wait_until(lambda: gate.num_passes == 1)
        second.start_edit()
        second.cancel()  # It waits.
        first.cancel()  # It runs.
        second.start_edit()
        gate.permits.release(1000)
        second.page.get_by_text("Done in").wait_for()
    second.wait_for_history(2)
    first.wait_for_history(0)
    assert [page.page.locator(".toast-body").count() for page in (first, second)] == [0, 0]
    for page in (first, second):
        page.close()


def test_loading_the_page_only_shows_the_example(pipe):
    # What else runs then can run later than the first edit begins.
    events = create_demo(pipe, [Example(draw_image(0), PROMPT)]).config["dependencies"]
    assert len([one for one in events if "load" in {event for _, event in one["targets"]}]) == 1


def test_paths_that_a_client_names_are_not_read(url):
    photo = ROOT / "examples" / "photo.png"
    config = httpx.get(f"{url}/config").json()
    events = [part["id"] for part in config["dependencies"] if "upload" in {event for _, event in part["targets"]}]
    assert len(events) == 2
    (uploaded,) = httpx.post(f"{url}/gradio_api/upload", files={"files": photo.open("rb")}).json()
    for event in events:
        for path, success in ((str(photo), "false"), (uploaded, "true")):
            data = [None, {"path": path, "meta": {"_type": "gradio.FileData"}}]
            client = {"session_hash": f"client-{event}-{success}"}
            httpx.post(f"{url}/gradio_api/queue/join", json={"fn_index": event, "data": data, **client})
            with httpx.stream("GET", f"{url}/gradio_api/queue/data", params=client) as answer:
                assert f'"success":{success}' in "".join(answer.iter_text())


# The command and the Space


def test_command_starts_the_app_with_its_example_and_stops_on_ctrl_c(tmp_path):
    build_pipeline().save_pretrained(tmp_path / "model")
    draw_image(0).save(tmp_path / "image.png")
    port = find_free_port()
    words = ["app", "--model", tmp_path / "model", "--image", tmp_path / "image.png", "--prompt", PROMPT]
    process = PythonProcess("-m", "editar_hf.commands", *words, "--port", port)
    try:
        url, config = f"http://127.0.0.1:{port}", None
        while config is None:
            assert process.is_running(), process.read("stderr")
            time.sleep(0.1)
            with contextlib.suppress(httpx.TransportError):
                config = httpx.get(f"{url}/config").json()
        (gallery,) = [part for part in config["components"] if part["props"].get("label") == "Examples"]
        assert gallery["props"]["value"][0]["caption"] == PROMPT
        assert not config["analytics_enabled"]
        for path in ("/etc/passwd", ROOT / "setup.cfg", tmp_path / "image.png"):
            assert httpx.get(f"{url}/gradio_api/file={path}").status_code == 403
        os.kill(process.pid, signal.SIGINT)
        assert process.wait().returncode == 0, process.read("stderr")
    finally:
        process.kill()


def test_command_refuses_a_prompt_without_an_image(capsys):
    assert main(["app", "--model", str(ROOT / "projects" / "stickers" / "sticker-editor"), "--prompt", PROMPT]) == 2
    assert "`--prompt` is 'make the red circle blue' without `--image`" in capsys.readouterr().err


def test_space_builds_the_app_and_uses_zerogpu_where_it_is_there(tmp_path, monkeypatch):
    shutil.copy(ROOT / "examples" / "space" / "app.py", tmp_path)
    draw_image(0).save(tmp_path / "photo.png")
    build_pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.setenv("MODEL", str(tmp_path / "model"))
    decorated = []
    spaces = SimpleNamespace(GPU=lambda function: decorated.append(function) or function)
    for module in (None, spaces):
        monkeypatch.setitem(sys.modules, "spaces", module)
        assert isinstance(runpy.run_path(tmp_path / "app.py", run_name="space")["demo"], gr.Blocks)
        assert len(decorated) == (module is spaces)
