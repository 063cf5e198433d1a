"""Draw the pictures of the page `docs/app.md`: drive the app of the scene editor in a headless browser.

python docs/make_app_pictures.py
"""

import sys
from pathlib import Path

from PIL import Image

from editar_hf import EditARPipeline
from editar_hf.serving.gradio_app import Example


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import AppPage, run_app, run_browser  # noqa: E402


def save_screenshot(app: AppPage, name: str):
    """Save a picture of the page, with few colors, so that the repository stays small."""
    path = ROOT / "docs" / name
    app.page.mouse.move(2, 2)
    app.page.wait_for_timeout(800)
    app.page.screenshot(path=path, full_page=True)
    picture = Image.open(path).convert("RGB")
    palette = picture.quantize(256, kmeans=2)
    picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KB")


def paint_car(app: AppPage, size: tuple[int, int]):
    """Brush over the car of the photograph."""
    for y in (0.56, 0.63, 0.7, 0.77, 0.84):
        app.brush((0.53, y), (0.96, y), size)


def main():
    pipeline = EditARPipeline.from_pretrained(ROOT / "examples" / "scene-editor")
    pipeline.set_progress_bar_config(disable=True)
    photo = Image.open(ROOT / "examples" / "photo.png")
    with run_app(pipeline, [Example(photo, "make the car red")]) as url, run_browser() as browser:
        for name, options in {
            "app.png": {"width": 1180, "height": 700},
            "app-phone.png": {"width": 390, "height": 844},
        }.items():
            app = AppPage(browser, url, **options)
            app.wait_for_image()
            paint_car(app, photo.size)
            app.edit("make the car red")
            paint_car(app, photo.size)
            app.page.get_by_label("Instruction").fill("remove the car")
            app.move_slider(0.72)
            save_screenshot(app, name)


if __name__ == "__main__":
    main()
