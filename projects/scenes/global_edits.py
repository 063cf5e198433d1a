"""Edits of a whole image: night, sunset, snow, rain, fog, sepia, black and white, blur, pencil sketch.

Each takes and returns uint8 pixels (height, width, 3). Lengths are fractions of the shorter side.
"""

import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def compute_luminance(pixels: np.ndarray) -> np.ndarray:
    """Compute the luminance (height, width, 1), float32 in [0, 255]."""
    return np.asarray(Image.fromarray(pixels).convert("L"), np.float32)[:, :, None]


def blur_pixels(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Blur uint8 pixels with a Gaussian; `radius` is its standard deviation in pixels."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def quantize(pixels: np.ndarray) -> np.ndarray:
    """Round and clip float pixels to uint8."""
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def compute_sky_weight(height: int, ground: float, softness: float = 0.1) -> np.ndarray:
    """Compute how far each row lies above the ground line: (height, 1, 1), 1 in the sky, 0 on the ground."""
    rows = (np.arange(height, dtype=np.float32) + 0.5) / height
    return np.clip(0.5 + (ground - rows) / (2 * softness), 0, 1)[:, None, None]


def make_night(pixels, ground, rng):
    luminance = compute_luminance(pixels)
    mixed = (0.55 * pixels + 0.45 * luminance) / 255
    # Moonlight on the ground; the sky above is darker.
    color = np.array([88, 112, 172], np.float32) * (1 - 0.42 * compute_sky_weight(len(pixels), ground, 0.5))
    return quantize(mixed**1.2 * color + np.array([4, 7, 20], np.float32))


def make_sunset(pixels, ground, rng):
    height, width = pixels.shape[:2]
    sky = compute_sky_weight(height, ground, 0.15)
    tint = sky * np.array([1.05, 0.66, 0.58], np.float32) + (1 - sky) * np.array([0.86, 0.58, 0.46], np.float32)
    rows = ((np.arange(height, dtype=np.float32) + 0.5) / height - ground)[:, None, None]
    # The glow lies on the horizon, in the middle of the image.
    columns = ((np.arange(width, dtype=np.float32) + 0.5) / width - 0.5)[None, :, None]
    glow = np.exp(-((rows / 0.3) ** 2)) * (0.3 + 0.35 * np.exp(-((columns / 0.35) ** 2)))
    top = np.clip(-rows - 0.25, 0, 0.4)
    lit = pixels * tint
    lit += glow * (np.array([255, 150, 50], np.float32) - lit)
    return quantize(lit + top * (np.array([90, 50, 130], np.float32) - lit))


def make_snow(pixels, ground, rng):
    height, width = pixels.shape[:2]
    luminance = compute_luminance(pixels)
    sky = compute_sky_weight(height, ground)
    # The ground turns white but keeps its shading; above it, colors fade as on a gray day.
    pale = 0.55 * luminance + 118
    amount = 0.8 - 0.3 * sky
    snowy = pixels + amount * (pale - pixels)
    snowy = snowy * np.array([0.96, 0.98, 1.0], np.float32) + np.array([4, 6, 10], np.float32)
    flakes = np.zeros((height, width), np.uint8)
    generator = np.random.default_rng(rng.getrandbits(64))
    number = height * width // 110
    rows, columns = (generator.integers(0, side - 1, number) for side in (height, width))
    flakes[rows, columns] = 255
    large = slice(0, number // 3)
    flakes[rows[large] + 1, columns[large]] = flakes[rows[large], columns[large] + 1] = 230
    flakes[rows[large] + 1, columns[large] + 1] = 230
    covered = blur_pixels(flakes, 0.45)[:, :, None] * np.float32(0.95 / 255)
    return quantize(snowy + covered * (255 - snowy))


def make_rain(pixels, ground, rng):
    height, width = pixels.shape[:2]
    luminance = compute_luminance(pixels)
    wet = (0.5 * pixels + 0.5 * luminance) * np.array([0.58, 0.66, 0.74], np.float32)
    wet += np.array([26, 30, 36], np.float32)
    streaks = Image.new("L", (width, height))
    drawing = ImageDraw.Draw(streaks)
    length = 0.11 * min(height, width)
    for _ in range(height * width // 230):
        column, row = rng.uniform(-5, width), rng.uniform(-length, height)
        extent = length * rng.uniform(0.6, 1.2)
        drawing.line((column, row, column + 0.25 * extent, row + extent), fill=rng.randint(80, 150))
    return quantize(wet + np.asarray(streaks, np.float32)[:, :, None] / 255 * (225 - wet))


def make_fog(pixels, ground, rng):
    height, width = pixels.shape[:2]
    soft = blur_pixels(pixels, 0.008 * min(height, width))
    # What is near the bottom is near the camera, with less fog before it.
    amount = 0.5 + 0.34 * compute_sky_weight(height, max(ground, 0.3) + 0.1, 0.4)
    return quantize(soft + amount * (np.array([204, 209, 213], np.float32) - soft))


def make_sepia(pixels, ground, rng):
    return quantize(compute_luminance(pixels) * np.array([1.04, 0.84, 0.6], np.float32) + 8)


def make_black_and_white(pixels, ground, rng):
    return np.repeat(compute_luminance(pixels).astype(np.uint8), 3, axis=2)


def make_blur(pixels, ground, rng):
    return blur_pixels(pixels, 0.03 * min(pixels.shape[:2]))


def make_pencil_sketch(pixels, ground, rng):
    luminance = compute_luminance(pixels).astype(np.uint8)[:, :, 0]
    soft = blur_pixels(luminance, 0.03 * min(luminance.shape))
    # Color dodge: what is darker than its surroundings becomes a line, what is not becomes paper.
    lines = np.minimum((luminance + 8.0) / (soft + 8.0), 1) ** 2.2
    shade = 0.82 + 0.18 * soft / 255
    return quantize((lines * shade * 246)[:, :, None] * np.array([1, 1, 0.985]))


GLOBAL_EDITS = {
    "night": make_night,
    "sunset": make_sunset,
    "snow": make_snow,
    "rain": make_rain,
    "fog": make_fog,
    "sepia": make_sepia,
    "black and white": make_black_and_white,
    "blur": make_blur,
    "pencil sketch": make_pencil_sketch,
}
# Those that change what a place looks like outdoors.
WEATHERS = ("night", "sunset", "snow", "rain", "fog")


def apply_global_edit(pixels: np.ndarray, edit: str, ground: float, rng: random.Random) -> np.ndarray:
    """Apply a global edit to uint8 pixels (height, width, 3).

    Args:
        edit (`str`): A key of `GLOBAL_EDITS`.
        ground (`float`): Where the ground begins, as a fraction of the height from the top.
        rng (`random.Random`): Draws the places of snow flakes and rain.
    """
    return GLOBAL_EDITS[edit](pixels, ground, rng)
