"""A small bank of scenes in the format of `projects/scenes/build_bank.py`: colored shapes and gradient photographs."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw


NOUNS = {
    "apple": {"synonyms": [], "article": "an", "size": 0.22, "recolor": True},
    "car": {"synonyms": ["automobile", "auto"], "article": "a", "size": 0.62, "recolor": True},
    "cat": {"synonyms": ["kitten"], "article": "a", "size": 0.4, "recolor": False},
    "chair": {"synonyms": ["seat"], "article": "a", "size": 0.45, "recolor": True},
    "scissors": {"synonyms": [], "article": "", "size": 0.25, "recolor": True},
}
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "black"]
HELD_OUT_PAIRS = [["red", "car"], ["green", "chair"], ["blue", "apple"]]
# Noun → its own color, and shapes as fractions of the view: kind and box.
SHAPES = {
    "apple": ((200, 40, 40), [("ellipse", (0, 0.1, 1, 1)), ("rectangle", (0.45, 0, 0.55, 0.2))]),
    "car": ((60, 90, 160), [("rectangle", (0, 0.35, 1, 0.85)), ("ellipse", (0.1, 0, 0.9, 1))]),
    "cat": ((120, 100, 90), [("ellipse", (0.2, 0, 0.8, 0.5)), ("rectangle", (0.1, 0.4, 0.9, 1))]),
    "chair": ((150, 110, 60), [("rectangle", (0, 0, 0.3, 1)), ("rectangle", (0, 0.4, 1, 1))]),
    "scissors": ((150, 150, 160), [("ellipse", (0, 0.4, 0.5, 1)), ("rectangle", (0.2, 0, 1, 0.7))]),
}
SIZES = {"apple": (60, 66), "car": (144, 80), "cat": (70, 100), "chair": (80, 120), "scissors": (90, 50)}


def encode_webp(image):
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def draw_view(noun, brightness):
    """Draw a noun's shape, lit from above, and its depth."""
    width, height = SIZES[noun]
    color, shapes = SHAPES[noun]
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
    """Write a bank: each noun has a training model with two views, a held-out view, and a held-out model."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for noun in NOUNS:
        for number, (model, split) in enumerate(
            (("a", "train"), ("a", "train"), ("a", "test-view"), ("b", "test-model"))
        ):
            image, depth = draw_view(noun, 0.8 + 0.1 * number)
            is_emoji = noun == "cat" and model == "b"
            objects.append(
                {
                    "id": f"{noun}-{number}",
                    "noun": noun,
                    "model": f"{noun}-{model}",
                    "kind": "emoji" if is_emoji else "model",
                    "yaw": 0.5 * number,
                    "pitch": 0.25,
                    "split": split,
                    "image": image,
                    "depth": None if is_emoji else depth,
                }
            )
    photographs = []
    generator = np.random.default_rng(0)
    for number in range(8):
        down, across = np.mgrid[0:320, 0:440] / 320
        sky, earth = generator.integers(90, 250, 3), generator.integers(40, 200, 3)
        pixels = np.where((down < 0.5)[:, :, None], sky, earth) * (1 - 0.3 * across[:, :, None])
        pixels += 12 * np.sin(down * 60 + across * 45)[:, :, None]
        photographs.append(
            {
                "id": f"photograph-{number}",
                "image": encode_webp(Image.fromarray(pixels.clip(0, 255).astype(np.uint8))),
                "kind": "other" if number % 4 == 3 else "place",
                "ground": 0.5,
                "split": "test" if number >= 4 else "train",
            }
        )
    pq.write_table(pa.Table.from_pylist(objects), folder / "objects.parquet")
    pq.write_table(pa.Table.from_pylist(photographs), folder / "photographs.parquet")
    tables = {"version": 1, "seed": 0, "view_size": 144, "nouns": NOUNS, "colors": COLORS}
    (folder / "bank.json").write_text(json.dumps({**tables, "held_out_pairs": HELD_OUT_PAIRS}))
    return folder
