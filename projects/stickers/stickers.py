"""Draw stickers, and decide from the pixels alone whether an edit of stickers is done.

An edit is done when both of these conditions hold:

* Inside the mask, the requested sticker is there, or the removed sticker is gone. A sticker is there if the mean colour
  of its eroded shape is nearest to the requested colour in Lab, and the requested shape fits best of the four shapes.
* Further than one token from the mask, the PSNR between result and target is at most 1 dB lower than the PSNR between
  the target and its reconstruction by the VQ model.

A translation is done when all stickers and the background are right. The positions come from the column `details` of
the data set that `make_sticker_edits.py` draws with the colours and outlines of this file. A `size` is (height, width)
of an image in pixels; the lengths of stickers are fractions of the longer side.

    ceiling = compute_outside_psnr(target_through_vq_model, target, mask, token_size)
    scores = [score_sample(image, ceiling, source, target, mask, details, token_size) for ...]
    aggregate_scores(scores)["recolour"]["done"]            # fraction of edits that are done
"""

import math
from collections import defaultdict

import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage.color import rgb2lab
from skimage.morphology import isotropic_dilation, isotropic_erosion

from editar_hf.evaluation.metrics import compute_psnr


# The colours are far apart in Lab: the distance of the closest two, blue and purple, is 41, and so is the smallest
# distance between a background and a sticker.
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

# How far a mask reaches beyond a sticker, as a fraction of the longer side: a quarter of a token of an 8×8 grid.
MASK_MARGIN = 1 / 32

# Erosion of a sticker on each side, as a fraction of its width, so that blurred outlines do not change its mean colour.
EROSION = 0.07
# A sticker is there only if the intersection over union of its pixels and the best template is at least this.
SMALLEST_OVERLAP = 0.5
# Named colours with a smaller Lab distance to the photograph are ignored in the decision whether a sticker is gone.
ALIKE = 25.0
# Outside the mask, the PSNR of a result may be lower than the PSNR of the VQ reconstruction by this many dB.
PSNR_TOLERANCE = 1.0

# What a score is grouped by. All other entries of a score are numbers.
LABELS = ("operation", "part", "photograph", "size")

COLOURS_LAB = {name: rgb2lab(np.array(rgb) / 255) for name, rgb in COLOURS.items()}
BACKGROUNDS_LAB = {name: rgb2lab(np.array(rgb) / 255) for name, rgb in BACKGROUNDS.items()}


def compute_outlines():
    """Compute the corners of each shape around its centre, (points, 2) in [-0.5, 0.5]. All shapes have the width 1."""
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
    """Draw how much of each pixel a shape covers. Return the coverage inside the bounding box, and its (left, top)."""
    side = math.ceil(size * resolution) + 4
    left, top = (math.floor((centre - size / 2) * resolution) - 1 for centre in (x, y))
    points = 4 * (OUTLINES[shape] * size * resolution + (x * resolution - left, y * resolution - top))
    coverage = Image.new("L", (4 * side, 4 * side))
    ImageDraw.Draw(coverage).polygon([tuple(point) for point in (points - 0.5).tolist()], fill=255)
    return coverage.reduce(4), (left, top)


def draw_template(sticker, size, shape=None):
    """Draw the fraction of each pixel that a sticker covers, (height, width). `shape` replaces its shape."""
    coverage, corner = draw_coverage(shape or sticker["shape"], sticker["x"], sticker["y"], sticker["size"], max(size))
    template = Image.new("L", size[::-1])
    template.paste(coverage, corner)
    return np.asarray(template) / 255


def draw_core(sticker, size, shape=None):
    """Draw the eroded shape of a sticker, bool (height, width). `shape` replaces its shape."""
    template = draw_template(sticker, size, shape) > 0.5
    return isotropic_erosion(template, EROSION * sticker["size"] * max(size))


def draw_box(sticker, size, margin):
    """Draw the bounding square of a sticker, wider by `margin` (a fraction of the longer side) on every side."""
    rows, columns = ((np.arange(side) + 0.5) / max(size) for side in size)
    reach = sticker["size"] / 2 + margin
    return (abs(rows - sticker["y"]) < reach)[:, None] & (abs(columns - sticker["x"]) < reach)


def draw_ring(sticker, size):
    """Draw the ring around a sticker, bool: a quarter of a token around its bounding square."""
    return draw_box(sticker, size, MASK_MARGIN) & ~draw_box(sticker, size, 0.5 / max(size))


def compute_mean_lab(image, region):
    """Compute the mean Lab colour of an RGB image (height, width, 3) over a region, bool (height, width)."""
    return rgb2lab(image[region]).mean(0)


def find_nearest(lab, names):
    """Return the name in `names`, a dict from names to Lab colours, whose colour is nearest to `lab`."""
    return min(names, key=lambda name: np.linalg.norm(names[name] - lab))


def compute_overlaps(image, surroundings, sticker):
    """Compute how well each shape fits the pixels at the place of a sticker: dict shape → [0, 1].

    First, the fraction of each pixel that the sticker covers is estimated. All four shapes cover the middle, which
    gives the colour of the sticker. Blurring and antialiasing move the RGB colour of a pixel along the line from the
    background to this colour, so the position on the line gives the fraction. The fit is the soft intersection over
    union of these fractions and the coverage of the shape. `surroundings` (n, 3) are pixels of the background.
    """
    size = image.shape[:2]
    colour = image[np.all([draw_core(sticker, size, shape) for shape in SHAPES], 0)].mean(0)
    box = draw_box(sticker, size, MASK_MARGIN)
    pixels = image[box].astype(float)
    # A photograph is not uniform. The background of each pixel is therefore a surrounding pixel with a similar colour:
    # the pixel at the 10 % quantile of colour distances.
    candidates = surroundings[:: max(1, len(surroundings) // 40)].astype(float)
    tenth = len(candidates) // 10
    distance = ((pixels[:, None] - candidates) ** 2).sum(-1)
    background = candidates[np.argpartition(distance, tenth, axis=1)[:, tenth]]
    along, whole = ((pixels - background) * (colour - background)).sum(-1), ((colour - background) ** 2).sum(-1)
    found = np.clip(along / np.maximum(whole, 1), 0, 1)
    templates = {shape: draw_template(sticker, size, shape)[box] for shape in SHAPES}
    return {
        shape: float(np.minimum(found, template).sum() / np.maximum(found, template).sum())
        for shape, template in templates.items()
    }


def score_sticker(image, surroundings, sticker, other_colours):
    """Return whether a sticker is at its place with the right colour and shape: a dict with `colour` and `shape`.

    `surroundings` (n, 3) are pixels of the background. `other_colours` are possible colours in addition to the eight
    named colours.
    """
    overlaps = compute_overlaps(image, surroundings, sticker)
    best = max(overlaps, key=overlaps.get)
    core = draw_core(sticker, image.shape[:2], best)
    colour = find_nearest(compute_mean_lab(image, core), COLOURS_LAB | other_colours)
    present = overlaps[best] >= SMALLEST_OVERLAP
    return {
        "colour": present and colour == sticker["colour"],
        "shape": present and best == sticker["shape"],
    }


def is_gone(image, source, target, sticker):
    """Return whether a sticker of the source image is gone, so that its place looks as in the target image.

    The mean colour of its place must be nearer to the mean colour in the target image than to the colour of the sticker
    and to all named colours that differ clearly from the target image. Means are compared, because the texture of the
    photograph may be different.
    """
    core = draw_core(sticker, image.shape[:2])
    beneath = compute_mean_lab(target, core)
    answers = {name: colour for name, colour in COLOURS_LAB.items() if np.linalg.norm(colour - beneath) > ALIKE}
    answers |= {"sticker": compute_mean_lab(source, core), "beneath": beneath}
    return find_nearest(compute_mean_lab(image, core), answers) == "beneath"


def compute_outside_psnr(image, target, mask, token_size):
    """Compute the PSNR in dB, at most 148, over pixels further than a token from the mask; NaN if there are none.

    The arguments are the same as in `score_edit`.
    """
    edited = torch.from_numpy(isotropic_dilation(np.asarray(mask) > 127, token_size))[None, None]
    images, references = (torch.tensor(pixels).permute(2, 0, 1)[None] / 255 for pixels in (image, target))
    return compute_psnr(images, references, edited, masked_mean=True).clamp(max=148).item()


def score_edit(image, outside_psnr_ceiling, source, target, mask, details, token_size):
    """Score one edited image.

    Args:
        image, source, target: uint8 arrays (height, width, 3).
        outside_psnr_ceiling: `compute_outside_psnr` of the VQ model's reconstruction of the target, in dB.
        mask: uint8 array (height, width), above 127 where pixels may change.
        details: the data set's `details`, parsed.
        token_size: pixels per token.

    Returns:
        A dict. `done` is true if `inside` and `outside` are true. `inside` combines `colour` and `shape`, for a sticker
        that must be there, and `gone`, for a sticker that must not. `outside` compares `outside_psnr` with
        `outside_psnr_ceiling`.
    """
    score = {}
    if details["new"] is not None:
        ring = target[draw_ring(details["new"], target.shape[:2])]
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
    """Score one image made from a condition map. `image` and `details` are as in `score_edit`.

    Returns:
        A dict with `stickers`, the fraction of stickers with the right colour and shape at the right place; `placed`,
        the fraction with the right colour at the right place; `background`, whether the background has the right
        colour; and `done`, whether everything is right.
    """
    plain = ~np.any([draw_box(sticker, image.shape[:2], MASK_MARGIN) for sticker in details["stickers"]], 0)
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
    """Score one edit or translation. Add `operation`, `part` and `photograph` from `details` to the scores."""
    if details["operation"] in TRANSLATIONS:
        score = score_translation(image, details)
    else:
        score = score_edit(image, outside_psnr_ceiling, source, target, mask, details, token_size)
    return {name: details[name] for name in ("operation", "part", "photograph")} | score


def aggregate_scores(scores, by="operation"):
    """Average scores for each value of `by`: dict value → {"n": count, name of score: mean}."""
    groups = defaultdict(list)
    for score in scores:
        groups[score[by]].append(score)
    return {group: {"n": len(members)} | compute_means(members) for group, members in groups.items()}


def compute_means(scores):
    """Compute the mean of each score. If only some dicts have a score, the mean is over these dicts."""
    names = dict.fromkeys(name for score in scores for name in score if name not in LABELS)
    return {name: float(np.mean([score[name] for score in scores if name in score])) for name in names}
