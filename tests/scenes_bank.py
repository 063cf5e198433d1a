"""A small bank of scenes in the format of `projects/scenes/build_bank.py`: colored shapes and gradient photographs."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw


sys.path.insert(0, str(Path(__file__).parents[1] / "projects" / "scenes"))

NOUNS = {
    "apple": {"synonyms": [], "article": "an", "size": 0.22, "recolor": True},
    "car": {"synonyms": ["automobile", "auto"], "article": "a", "size": 0.62, "recolor": True},
    "cat": {"synonyms": ["kitten"], "article": "a", "size": 0.4, "recolor": False},
    "chair": {"synonyms": ["seat"], "article": "a", "size": 0.45, "recolor": True},
    "scissors": {"synonyms": [], "article": "", "size": 0.25, "recolor": True},
}
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "black"]
HELD_OUT_PAIRS = [["red", "car"], ["green", "chair"], ["blue", "apple"]]
# Noun → size in pixels, its own color, and shapes as fractions of the view: kind and box.
SHAPES = {
    "apple": ((60, 66), (200, 40, 40), [("ellipse", (0, 0.1, 1, 1)), ("rectangle", (0.45, 0, 0.55, 0.2))]),
    "car": ((144, 80), (60, 90, 160), [("rectangle", (0, 0.35, 1, 0.85)), ("ellipse", (0.1, 0, 0.9, 1))]),
    "cat": ((70, 100), (120, 100, 90), [("ellipse", (0.2, 0, 0.8, 0.5)), ("rectangle", (0.1, 0.4, 0.9, 1))]),
    "chair": ((80, 120), (150, 110, 60), [("rectangle", (0, 0, 0.3, 1)), ("rectangle", (0, 0.4, 1, 1))]),
    "scissors": ((90, 50), (150, 150, 160), [("ellipse", (0, 0.4, 0.5, 1)), ("rectangle", (0.2, 0, 1, 0.7))]),
}
# The views of a noun: two for training and one held out of one model, and one of a held-out model.
VIEWS = (("a", "train"), ("a", "train"), ("a", "test-view"), ("b", "test-model"))


def encode_webp(image):
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def draw_view(noun, brightness):
    """Draw a noun's shape, lit from above, and its depth."""
    (width, height), color, shapes = SHAPES[noun]
    alpha = Image.new("L", (width, height))
    for kind, box in shapes:
        corners = [round(part * side) for part, side in zip(box, (width - 1, height - 1) * 2, strict=True)]
        getattr(ImageDraw.Draw(alpha), kind)(corners, fill=255)
    light = np.linspace(1.25, 0.6, height)[:, None, None] * brightness
    rgb = (np.broadcast_to(np.array(color), (height, width, 3)) * light).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(rgb)
    image.putalpha(alpha)
    depth = np.linspace(60, 255, height)[:, None] * (np.asarray(alpha) > 0)
    return encode_webp(image), encode_webp(Image.fromarray(depth.astype(np.uint8)))


def make_bank(folder):
    folder.mkdir(parents=True, exist_ok=True)
    objects, photographs = [], []
    for noun in NOUNS:
        for number, (model, split) in enumerate(VIEWS):
            image, depth = draw_view(noun, 0.8 + 0.1 * number)
            row = {"id": f"{noun}-{number}", "noun": noun, "model": f"{noun}-{model}", "split": split, "image": image}
            # One model has no depth, as emoji have none.
            objects.append({**row, "depth": None if (noun, model) == ("cat", "b") else depth})
    generator = np.random.default_rng(0)
    for number in range(8):
        down, across = np.mgrid[0:320, 0:440] / 320
        sky, earth = generator.integers(90, 250, 3), generator.integers(40, 200, 3)
        pixels = np.where((down < 0.5)[:, :, None], sky, earth) * (1 - 0.3 * across[:, :, None])
        pixels += 12 * np.sin(down * 60 + across * 45)[:, :, None]
        image = encode_webp(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
        kind, split = "other" if number % 4 == 3 else "place", "test" if number >= 4 else "train"
        photographs.append({"id": f"p{number}", "image": image, "kind": kind, "ground": 0.5, "split": split})
    pq.write_table(pa.Table.from_pylist(objects), folder / "objects.parquet")
    pq.write_table(pa.Table.from_pylist(photographs), folder / "photographs.parquet")
    tables = {"nouns": NOUNS, "colors": COLORS, "held_out_pairs": HELD_OUT_PAIRS}
    (folder / "bank.json").write_text(json.dumps(tables))
    (folder / "ATTRIBUTION.md").write_text("A cat: by someone, CC0.")
    return folder


@pytest.fixture(scope="session")
def bank_folder(tmp_path_factory):
    return make_bank(tmp_path_factory.mktemp("scenes") / "bank")


@pytest.fixture(scope="session")
def bank(bank_folder):
    from bank import Bank

    return Bank.load(bank_folder)
