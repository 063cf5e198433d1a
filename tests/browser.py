"""The Gradio app in a headless browser, used as a person uses it. `docs/make_app_pictures.py` uses it too."""

import contextlib
import re
import shutil
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright
from processes import find_free_port

from editar_hf.serving.gradio_app import create_demo, launch_demo


CHROMIUM = shutil.which("chromium")
TIMEOUT = 20_000  # ms


@contextlib.contextmanager
def run_app(*arguments, **options):
    """Start the app of these arguments of `create_demo` on loopback, and give its address."""
    demo, port = create_demo(*arguments, **options), find_free_port()
    launch_demo(demo, server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        demo.close(verbose=False)


@contextlib.contextmanager
def run_browser():
    """Start headless Chromium."""
    with sync_playwright() as playwright:
        # In a container, Chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class AppPage:
    """The page of the app in a browser context of its own, as on another computer.

    Args:
        browser (`Browser`): The browser.
        url (`str`): The address of the app.
        width, height (`int`): Size of the window in pixels.
        options: Further options of the context, such as `color_scheme`.
    """

    def __init__(self, browser: Browser, url: str, width: int = 1200, height: int = 860, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **options)
        context.set_default_timeout(TIMEOUT)
        self.page: Page = context.new_page()
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.edit_button.wait_for()

    def close(self):
        self.page.context.close()

    @property
    def edit_button(self):
        return self.page.locator("#edit")

    def upload(self, path: Path):
        """Upload a file: through the drop zone before there is an image, and through the button afterwards."""
        drop_zone = self.page.locator("#drop-zone input[type=file]")
        button = self.page.get_by_test_id("Upload-upload-button")
        (drop_zone if drop_zone.count() else button).set_input_files(path)

    def wait_for_image(self):
        """Wait until the editor shows an image on which one can brush."""
        self.page.locator("#editor canvas").first.wait_for()
        self.page.wait_for_function("document.querySelector('#editor').innerText.includes('%')")
        self.page.wait_for_timeout(700)  # The editor draws the image some frames later, and tells nobody.

    def brush(self, start: tuple[float, float], end: tuple[float, float], size: tuple[int, int]):
        """Draw a stroke between two places, which are fractions of the image of `size` (width, height)."""
        box = self.page.locator("#editor canvas").first.bounding_box()
        zoom = int(re.search(r"(\d+)%", self.page.locator("#editor").inner_text())[1]) / 100
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        places = [(x + (a - 0.5) * zoom * size[0], y + (b - 0.5) * zoom * size[1]) for a, b in (start, end)]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        self.page.mouse.move(*places[1], steps=8)
        self.page.mouse.up()
        self.page.wait_for_timeout(300)

    def start_edit(self, prompt: str | None = None):
        if prompt is not None:
            self.page.get_by_label("Instruction").fill(prompt)
        self.edit_button.click()
        self.page.locator("#cancel").wait_for()

    def edit(self, prompt: str | None = None):
        """Make an edit, and wait for its result."""
        self.start_edit(prompt)
        self.page.get_by_text("Done in").wait_for()
        self.edit_button.wait_for()
        self.wait_for_image()

    def move_slider(self, place: float):
        """Move the handle between before and after to a place, which is a fraction of the width."""
        self.page.locator("#slider").scroll_into_view_if_needed()
        box = self.page.locator("#slider").bounding_box()
        y = box["y"] + box["height"] / 2
        self.page.mouse.move(box["x"] + box["width"] / 2, y)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + place * box["width"], y, steps=5)
        self.page.mouse.up()

    def cancel(self):
        self.page.locator("#cancel").click()
        self.page.get_by_text("Canceled.").wait_for()

    def undo(self):
        self.page.locator("#undo").click()

    def wait_for_history(self, num_images: int):
        """Wait until the history has so many images. A single image is no history."""
        expect(self.page.locator("#history button.thumbnail-lg")).to_have_count(num_images, timeout=TIMEOUT)

    def read_error(self) -> str:
        toast = self.page.locator(".toast-body").first
        toast.wait_for()
        return toast.inner_text()

    def download(self) -> Path:
        with self.page.expect_download() as download:
            self.page.locator("#download").click()
        return download.value.path()
