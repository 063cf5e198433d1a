"""Canny edges of small images in numpy, fast enough to be made while pairs are composed.

`editar_hf.condition_maps.make_canny_map` draws the same edges (a test compares them); it takes kornia and more time.
"""

import numpy as np
from PIL import Image


LOW_THRESHOLD, HIGH_THRESHOLD = 0.1, 0.2


def blur_rows(values: np.ndarray) -> np.ndarray:
    """Blur along the first axis with five Gaussian weights of standard deviation 1, the border reflected."""
    weights = np.exp(-0.5 * np.arange(-2, 3, dtype=np.float32) ** 2)
    weights /= weights.sum()
    padded = np.pad(values, ((2, 2), (0, 0)), "reflect")
    return sum(weight * padded[shift : shift + len(values)] for shift, weight in enumerate(weights))


def find_edges(pixels: np.ndarray) -> np.ndarray:
    """Find the edges (height, width), bool, of uint8 pixels (height, width, 3)."""
    gray = pixels @ np.array([0.299, 0.587, 0.114], np.float32) / np.float32(255)
    gray = blur_rows(blur_rows(gray).T).T
    padded = np.pad(gray, 1, "edge")
    across = padded[:, 2:] - padded[:, :-2]
    across = across[:-2] + 2 * across[1:-1] + across[2:]
    down = padded[2:] - padded[:-2]
    down = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    magnitude = np.sqrt(across**2 + down**2)
    around = np.pad(magnitude, 1)

    def shifted(rows, columns):
        height, width = magnitude.shape
        return around[1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    # The gradient's direction, rounded to a multiple of 45 degrees, without an arctangent.
    steep, flat = np.abs(down), np.abs(across)
    tangent = np.float32(np.tan(np.pi / 8))
    is_level, is_upright = steep < tangent * flat, flat < tangent * steep
    falls = (across > 0) == (down > 0)
    level = (magnitude > shifted(0, -1)) & (magnitude >= shifted(0, 1))
    upright = (magnitude > shifted(-1, 0)) & (magnitude >= shifted(1, 0))
    falling = (magnitude > shifted(-1, -1)) & (magnitude > shifted(1, 1))
    rising = (magnitude > shifted(-1, 1)) & (magnitude > shifted(1, -1))
    is_ridge = np.where(is_level, level, np.where(is_upright, upright, np.where(falls, falling, rising)))
    return grow_edges(is_ridge & (magnitude > HIGH_THRESHOLD), is_ridge & (magnitude > LOW_THRESHOLD))


def grow_edges(strong: np.ndarray, weak: np.ndarray) -> np.ndarray:
    """Grow strong edges along weak ones, through all eight neighbors, until nothing changes."""
    edges, count = strong, -1
    while count != (count := int(edges.sum())):
        padded = np.pad(edges, 1)
        wide = padded[:, :-2] | padded[:, 1:-1] | padded[:, 2:]
        edges = (wide[:-2] | wide[1:-1] | wide[2:]) & weak
    return edges


def draw_canny_map(pixels: np.ndarray) -> np.ndarray:
    """Draw the edges of uint8 pixels in white on black, uint8 (height, width, 3)."""
    edges = find_edges(pixels).astype(np.uint8) * 255
    return np.asarray(Image.fromarray(edges).convert("RGB"))
