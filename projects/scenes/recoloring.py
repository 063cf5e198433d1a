"""Named colors: paint an object in one, and name the color that an object has."""

import colorsys
from functools import lru_cache

import numpy as np
from PIL import Image


# name: (RGB of the paint in plain light, contrast of the object's shading that is kept)
COLORS = {
    "red": ((205, 24, 26), 0.8),
    "orange": ((238, 122, 16), 0.8),
    "yellow": ((250, 224, 34), 0.8),
    "green": ((36, 150, 48), 0.8),
    "turquoise": ((36, 188, 182), 0.8),
    "blue": ((32, 74, 208), 0.8),
    "purple": ((122, 36, 172), 0.8),
    "pink": ((246, 122, 182), 0.8),
    "brown": ((112, 66, 32), 0.7),
    "white": ((222, 222, 222), 0.55),
    "gray": ((128, 128, 128), 0.6),
    "black": ((34, 34, 36), 0.45),
}
LUMINANCE = np.array([0.299, 0.587, 0.114])
# Of the distance between an object's mean luminance and the paint's, so much remains.
KEPT_LUMINANCE = 0.18


@lru_cache(maxsize=4096)
def make_paint_table(color: str, mean_luminance: int) -> np.ndarray:
    """Make the table (256, 3), uint8, from an object's luminance to its painted pixels.

    Shadows run to black and highlights to white; the object's mean becomes the paint, a little lighter on a light
    object.
    """
    paint, contrast = COLORS[color]
    paint = np.array(paint, np.float64)
    base = paint @ LUMINANCE
    level = (np.arange(256) - mean_luminance) * contrast + base + KEPT_LUMINANCE * (mean_luminance - base)
    level = level.clip(0, 255)[:, None]
    below = paint * level / base
    above = paint + (255 - paint) * ((level - base).clip(0) / (255 - base)) ** 1.5
    return np.where(level < base, below, above).round().clip(0, 255).astype(np.uint8)


def recolor(sprite: Image.Image, color: str) -> Image.Image:
    """Paint an RGBA sprite in a named color; its shading and its alpha stay."""
    pixels = np.array(sprite)
    luminance = np.asarray(sprite.convert("RGB").convert("L"))
    solid = luminance[pixels[:, :, 3] > 127]
    mean = int(solid.mean()) if solid.size else 128
    # Steps of 4 let objects share tables.
    pixels[:, :, :3] = make_paint_table(color, mean // 4 * 4)[luminance]
    return Image.fromarray(pixels)


def name_color(rgb) -> str:
    """Name the color that is nearest to an RGB mean in [0, 255]."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(float(channel) / 255 for channel in rgb))
    hue *= 360
    if value < 0.2:
        return "black"
    if saturation < 0.18:
        return "white" if value > 0.6 else "gray" if value > 0.35 else "black"
    if (hue < 45 or hue > 345) and value < (0.6 if saturation < 0.75 else 0.5):
        return "brown"
    if hue < 16 or hue > 345:
        return "pink" if saturation < 0.55 and value > 0.7 else "red"
    for limit, name in ((42, "orange"), (68, "yellow"), (165, "green"), (195, "turquoise"), (255, "blue")):
        if hue < limit:
            return name
    return "purple" if hue < 300 else "pink"


def compute_color_distance(one: Image.Image, other: Image.Image) -> float:
    """Compute the mean absolute difference of RGB, in [0, 255], over the solid pixels of two RGBA sprites."""
    first, second = np.asarray(one), np.asarray(other)
    solid = first[:, :, 3] > 127
    if not solid.any():
        return 0.0
    return float(np.abs(first[solid][:, :3].astype(np.int16) - second[solid][:, :3]).mean())
