"""Sticker edits: what stickers look like, and whether an edit of them was carried out, told by the pixels alone.

An edit counts as done when two things hold:

* inside the mask, the asked sticker is there (its eroded mean colour is nearest to the asked one in Lab, and the asked
  shape fits best of the four), or the sticker is gone;
* everything further than a token from the mask is as near to the target as the target that the VQ model has encoded
  and decoded, minus 1 dB of PSNR.

A translated image counts as done when every sticker and the background are right. Geometry comes from the `details` of
the data set that `make_sticker_edits.py` draws, with the colours and outlines of this file.

    ceiling = compute_outside_psnr(target_through_vq_model, target, mask, token_size)
    scores = [score_sample(image, ceiling, source, target, mask, details, token_size) for ...]
    aggregate_scores(scores)["recolour"]["done"]            # share of edits done
"""

import math
from collections import defaultdict

import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage.color import rgb2lab
from skimage.morphology import isotropic_dilation, isotropic_erosion

from editar_hf.evaluation.metrics import compute_psnr


# Chosen far apart in Lab: the closest two, blue and purple, are 41 apart; a background and a sticker, 41.
COLOURS = {
    "red": (205, 0, 30),
    "orange": (255, 140, 0),
    "yellow": (255, 240, 60),
    "green": (0, 150, 40),
    "blue": (20, 60, 230),
    "purple": (170, 50, 190),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
BACKGROUNDS = {"grey": (128, 128, 128), "pink": (255, 170, 200), "brown": (110, 70, 40), "cyan": (70, 215, 225)}
SHAPES = ("circle", "square", "triangle", "star")
TRANSLATIONS = ("canny", "depth", "segmentation")

# How far a mask reaches beyond a sticker, as a fraction of the image: a quarter of a token of an 8×8 grid.
MASK_MARGIN = 1 / 32

# How much of a sticker's width erosion takes off: blurred outlines must not count as its colour.
EROSION = 0.07
# A sticker is there only if its pixels and the best template share half of their union.
SMALLEST_OVERLAP = 0.5
# Named colours nearer than this to the photograph (in Lab) say nothing about whether a sticker is gone.
ALIKE = 25.0
# How far outside the mask a image may fall behind the VQ model, in dB.
PSNR_TOLERANCE = 1.0

COLOURS_LAB = {name: rgb2lab(np.array(rgb) / 255) for name, rgb in COLOURS.items()}
BACKGROUNDS_LAB = {name: rgb2lab(np.array(rgb) / 255) for name, rgb in BACKGROUNDS.items()}


def compute_outlines():
    """Compute each shape's corners around its centre, (points, 2) in [-0.5, 0.5]; every shape is exactly 1 wide."""
    turn = np.arange(64) * 2 * math.pi / 64
    circle = 0.5 * np.stack([np.cos(turn), np.sin(turn)], -1)
    square = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    triangle = np.array([[0, -0.45], [0.5, 0.45], [-0.5, 0.45]])
    turn = np.arange(10) * math.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 0.526, 0.23)[:, None]
    star = radius * np.stack([np.sin(turn), -np.cos(turn)], -1)
    star[:, 1] -= (star[:, 1].min() + star[:, 1].max()) / 2
    return {"circle": circle, "square": square, "triangle": triangle, "star": star}


OUTLINES = compute_outlines()


def draw_coverage(shape, x, y, size, resolution):
    """Draw how much of each pixel a shape covers; returns (coverage, (left, top)) of the bounding box alone."""
    side = math.ceil(size * resolution) + 4
    left, top = (math.floor((centre - size / 2) * resolution) - 1 for centre in (x, y))
    points = 4 * (OUTLINES[shape] * size * resolution + (x * resolution - left, y * resolution - top))
    coverage = Image.new("L", (4 * side, 4 * side))
    ImageDraw.Draw(coverage).polygon([tuple(point) for point in (points - 0.5).tolist()], fill=255)
    return coverage.reduce(4), (left, top)


def draw_template(sticker, resolution, shape=None):
    """Draw how much of each pixel a sticker covers, in [0, 1] (resolution, resolution); `shape` replaces its own."""
    coverage, corner = draw_coverage(shape or sticker["shape"], sticker["x"], sticker["y"], sticker["size"], resolution)
    template = Image.new("L", (resolution, resolution))
    template.paste(coverage, corner)
    return np.asarray(template) / 255


def draw_core(sticker, resolution, shape=None):
    """Draw a sticker's eroded inside, bool (resolution, resolution); `shape` replaces its own."""
    template = draw_template(sticker, resolution, shape) > 0.5
    return isotropic_erosion(template, EROSION * sticker["size"] * resolution)


def draw_box(sticker, resolution, margin):
    """Draw a sticker's bounding square, `margin` (fraction of the image) wider on every side."""
    centres = (np.arange(resolution) + 0.5) / resolution
    reach = sticker["size"] / 2 + margin
    return (abs(centres - sticker["y"]) < reach)[:, None] & (abs(centres - sticker["x"]) < reach)


def draw_ring(sticker, resolution):
    """Draw the background next to a sticker, bool: a quarter of a token around its bounding square."""
    return draw_box(sticker, resolution, MASK_MARGIN) & ~draw_box(sticker, resolution, 0.5 / resolution)


def compute_mean_lab(image, region):
    """Compute the mean Lab colour of an RGB image (height, width, 3) over a region, bool (height, width)."""
    return rgb2lab(image[region]).mean(0)


def find_nearest(lab, names):
    """Return the name whose Lab colour is nearest to `lab`, of a dict name → Lab."""
    return min(names, key=lambda name: np.linalg.norm(names[name] - lab))


def compute_overlaps(image, surroundings, sticker):
    """Compute how well each shape fits the pixels at a sticker's place, dict shape → [0, 1].

    How much of a pixel the sticker covers is read off where its RGB colour lies on the line from the background to the
    colour in the middle, which all four shapes cover; blurring and antialiasing move a pixel along that line. The fit
    is the soft intersection over union with the shape's own coverage. `surroundings` (n, 3): pixels it lies on.
    """
    resolution = len(image)
    colour = image[np.all([draw_core(sticker, resolution, shape) for shape in SHAPES], 0)].mean(0)
    box = draw_box(sticker, resolution, MASK_MARGIN)
    pixels = image[box].astype(float)
    # Photographs are not plain: each pixel has its own background, the tenth of the surroundings most like it.
    candidates = surroundings[:: max(1, len(surroundings) // 40)].astype(float)
    tenth = len(candidates) // 10
    distance = ((pixels[:, None] - candidates) ** 2).sum(-1)
    background = candidates[np.argpartition(distance, tenth, axis=1)[:, tenth]]
    along, whole = ((pixels - background) * (colour - background)).sum(-1), ((colour - background) ** 2).sum(-1)
    found = np.clip(along / np.maximum(whole, 1), 0, 1)
    templates = {shape: draw_template(sticker, resolution, shape)[box] for shape in SHAPES}
    return {
        shape: float(np.minimum(found, template).sum() / np.maximum(found, template).sum())
        for shape, template in templates.items()
    }


def score_sticker(image, surroundings, sticker, other_colours):
    """Tell whether a sticker is at its place with the right `colour`, and with the right `shape`: a dict of the two.

    `surroundings` are pixels (n, 3) of what it lies on; `other_colours` answers besides the eight named colours.
    """
    overlaps = compute_overlaps(image, surroundings, sticker)
    best = max(overlaps, key=overlaps.get)
    core = draw_core(sticker, len(image), best)
    colour = find_nearest(compute_mean_lab(image, core), COLOURS_LAB | other_colours)
    present = overlaps[best] >= SMALLEST_OVERLAP
    return {
        "colour": present and colour == sticker["colour"],
        "shape": present and best == sticker["shape"],
    }


def is_gone(image, source, target, sticker):
    """Tell whether a sticker of the source has made way for what the target shows in its place.

    The mean colour there must be nearer to the target's than to the sticker's and to any other named colour unlike the
    target's. Means, because a photograph's texture may come back differently.
    """
    core = draw_core(sticker, len(image))
    beneath = compute_mean_lab(target, core)
    answers = {name: colour for name, colour in COLOURS_LAB.items() if np.linalg.norm(colour - beneath) > ALIKE}
    answers |= {"sticker": compute_mean_lab(source, core), "beneath": beneath}
    return find_nearest(compute_mean_lab(image, core), answers) == "beneath"


def compute_outside_psnr(image, target, mask, token_size):
    """Compute the PSNR in dB, at most 148, of what lies further than a token from the mask; NaN where nothing does.

    Arguments as in `score_edit`.
    """
    edited = torch.from_numpy(isotropic_dilation(np.asarray(mask) > 127, token_size))[None, None]
    images, references = (torch.tensor(pixels).permute(2, 0, 1)[None] / 255 for pixels in (image, target))
    return compute_psnr(images, references, edited, masked_mean=True).clamp(max=148).item()


def score_edit(image, outside_psnr_ceiling, source, target, mask, details, token_size):
    """Score one edited image.

    Args:
        image, source, target: uint8 arrays (height, width, 3); height = width.
        outside_psnr_ceiling: `compute_outside_psnr` of the target that the VQ model has encoded and decoded, in dB.
        mask: uint8 array (height, width), above 127 where pixels may change.
        details: the data set's `details`, parsed.
        token_size: pixels per token.

    Returns:
        A dict with `done`; `inside` and `outside`, which make it up; `colour` and `shape` of a sticker that must be
        there and `gone` of one that must not, which make up `inside`; `outside_psnr` and its `outside_psnr_ceiling`.
    """
    score = {}
    if details["new"] is not None:
        ring = target[draw_ring(details["new"], len(target))]
        score |= score_sticker(image, ring, details["new"], {"background": rgb2lab(ring).mean(0)})
    if details["operation"] in ("remove", "move"):
        score["gone"] = is_gone(image, source, target, details["old"])
    inside = all(score.values())
    psnr = compute_outside_psnr(image, target, mask, token_size)
    outside = psnr >= outside_psnr_ceiling - PSNR_TOLERANCE
    return score | {
        "inside": inside,
        "outside": outside,
        "outside_psnr": psnr,
        "outside_psnr_ceiling": outside_psnr_ceiling,
        "done": inside and outside,
    }


def score_translation(image, details):
    """Score one image made from a condition map; images as in `score_edit`.

    Returns:
        A dict with `stickers`, the share of them with the right colour and shape at the right place; `placed`, the same
        whatever the shape; `background`, whether it has the right colour; `done`, whether everything is right.
    """
    plain = ~np.any([draw_box(sticker, len(image), MASK_MARGIN) for sticker in details["stickers"]], 0)
    found = [score_sticker(image, image[plain], sticker, BACKGROUNDS_LAB) for sticker in details["stickers"]]
    background = find_nearest(compute_mean_lab(image, plain), COLOURS_LAB | BACKGROUNDS_LAB) == details["background"]
    right = [sticker["colour"] and sticker["shape"] for sticker in found]
    return {
        "stickers": float(np.mean(right)),
        "placed": float(np.mean([sticker["colour"] for sticker in found])),
        "background": background,
        "done": all(right) and background,
    }


def score_sample(image, outside_psnr_ceiling, source, target, mask, details, token_size):
    """Score one image, edit or translation: its score with `operation`, `part` and `photograph` from `details`."""
    if details["operation"] in TRANSLATIONS:
        score = score_translation(image, details)
    else:
        score = score_edit(image, outside_psnr_ceiling, source, target, mask, details, token_size)
    return {name: details[name] for name in ("operation", "part", "photograph")} | score


def aggregate_scores(scores, by="operation"):
    """Average scores per operation, or `by` another name: dict group → {"n": count, score name: mean}."""
    groups = defaultdict(list)
    for score in scores:
        groups[score[by]].append(score)
    return {group: {"n": len(members)} | compute_means(members) for group, members in groups.items()}


def compute_means(scores):
    """Compute the mean of every number or truth value in score dicts; one that only some have counts where it is."""
    names = dict.fromkeys(name for score in scores for name in score if name not in ("operation", "part", "photograph"))
    return {name: float(np.mean([score[name] for score in scores if name in score])) for name in names}
