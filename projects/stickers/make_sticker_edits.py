"""Make the "stickers" data set: pairs of a source image and a target image, with an instruction for the edit.

An image is a crop of a real photograph with one to four coloured stickers on it. An edit recolours, reshapes, removes,
adds or moves one sticker. A translation turns a canny, depth or segmentation map into stickers on a plain background,
and the caption gives the colours. Every length is a fraction of the longer side of the image, so any resolution works.

    python projects/stickers/make_sticker_edits.py --output-dir stickers --num-train 200000 --resolution 128

The script writes `train-*.parquet`, `validation-*.parquet` and `test-*.parquet` with the columns `source_image`,
`target_image`, `prompt` (without a task prefix), `mask` (white = may change), `task` and `details` (JSON with the data
that scoring needs). Sample `i` of a split depends only on the seed, the split, `i` and the resolution. Existing shards
are kept, so a second run continues where the first stopped.
"""

import io
import itertools
import json
import math
import random
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import skimage
from datasets import Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageDraw
from skimage.color import rgb2lab
from skimage.feature import canny
from stickers import BACKGROUNDS, COLOURS, MASK_MARGIN, SHAPES, TRANSLATIONS, draw_coverage
from transformers import HfArgumentParser

from editar_hf.io import atomic_path


# The photographs are part of the wheel of scikit-image. Licences are as in the docstrings of `skimage.data`.
# name: (file, licence, weight among the training photographs). The weight None marks a held-out photograph.
PHOTOGRAPHS = {
    "astronaut": ("astronaut.png", "public domain (NASA)", 3),
    "coffee": ("coffee.png", "CC0 (Rachel Michetti)", 3),
    "camera": ("camera.png", "CC0 (Lav Varshney)", 2),
    "hubble_deep_field": ("hubble_deep_field.jpg", "public domain (NASA)", 1),
    "retina": ("retina.jpg", "CC0 (Mikael Häggström)", 2),
    "clock": ("clock_motion.png", "public domain (Stefan van der Walt)", 1),
    "brick": ("brick.png", "CC0 (CC0Textures, Bricks25)", 1),
    "grass": ("grass.png", "CC0 (linolafett)", 1),
    "gravel": ("gravel.png", "CC0 (CC0Textures, Gravel04)", 1),
    "chelsea": ("chelsea.png", "CC0 (Stefan van der Walt)", None),
    "rocket": ("rocket.jpg", "public domain (SpaceX)", None),
}
HELD_OUT = tuple(name for name, (_, _, weight) in PHOTOGRAPHS.items() if weight is None)

# The region (left, top, right, bottom) of a photograph for each split, as fractions. The regions do not overlap.
REGIONS = {"train": (0, 0, 0.65, 1), "validation": (0.65, 0, 1, 0.5), "test": (0.65, 0.5, 1, 1)}

SEGMENTATION_PALETTE = {
    "circle": (0, 140, 150),
    "square": (150, 80, 60),
    "triangle": (200, 150, 200),
    "star": (90, 100, 90),
}

OPERATIONS = ("recolour", "reshape", "remove", "add", "move")
# Fractions of the training pairs, in the order of `OPERATIONS`. The other pairs are translations.
SHARES = (0.1625, 0.13, 0.0975, 0.13, 0.13)

# In training and validation, these pairs are never edited and never the result of an edit. They occur as bystanders.
UNSEEN_PAIRS = {("red", "triangle"), ("yellow", "circle"), ("blue", "star"), ("white", "square")}

# Lengths in tokens of an 8×8 grid, as fractions of the longer side.
TOKEN = 1 / 8
SMALLEST, LARGEST, CANONICAL = 2.0 * TOKEN, 2.6 * TOKEN, 2.3 * TOKEN
GAP = 0.3 * TOKEN

# The phrasings for each kind of edit, separated by "|".
PROMPTS = {
    "recolour": (
        "make the {old} {to_colour} | turn the {old} {to_colour} | paint the {old} {to_colour} | "
        "change the {old} to {to_colour} | make the {old_turned} {to_colour} | use {to_colour} for the {old} | "
        "paint {to_colour} over the {old} | the {old} should be {to_colour}"
    ),
    "reshape": (
        "turn the {old} into a {to_shape} | make the {old} a {to_shape} | change the {old} to a {to_shape} | "
        "turn the {old_turned} into a {to_shape} | replace the {old} with a {to_shape} | "
        "put a {to_shape} in place of the {old} | the {old} should be a {to_shape}"
    ),
    "remove": (
        "remove the {old} | delete the {old} | erase the {old} | take away the {old} | remove the {old_turned} | "
        "the {old} should go"
    ),
    "add": (
        "add {new} {at} | put {new} {at} | draw {new} {at} | add {new_turned} {at} | {at} add {new} | "
        "there should be {new} {at}"
    ),
    "move": (
        "move the {old} {to} | bring the {old} {to} | put the {old} {at} | move the {old_turned} {to} | "
        "{at} put the {old} | the {old} should be {at}"
    ),
    "translation": (
        "{stickers} on a {background} background | a {background} background with {stickers} | "
        "on a {background} background {stickers} | {stickers}, the background is {background}"
    ),
}
PROMPTS = {kind: tuple(phrasings.split(" | ")) for kind, phrasings in PROMPTS.items()}

FEATURES = Features(
    source_image=Image(),
    target_image=Image(),
    prompt=Value("string"),
    mask=Image(),
    task=Value("string"),
    details=Value("string"),
)


@dataclass(frozen=True)
class Layout:
    """The named places of an image of `width` and `height`, as fractions of its longer side.

    A square has 3×3 places. A shorter side has two or only one, so that every sticker fits into the cell of its place.
    """

    width: float = 1.0
    height: float = 1.0

    @cached_property
    def rows(self):
        return list_cells(self.height, ("top", "", "bottom"))

    @cached_property
    def columns(self):
        return list_cells(self.width, ("left", "", "right"))

    @cached_property
    def places(self):
        return [" ".join(filter(None, pair)) or "centre" for pair in itertools.product(self.rows, self.columns)]

    @property
    def cell(self):
        """The width and height of the cell of a place."""
        return self.width / len(self.columns), self.height / len(self.rows)

    def get_size(self, resolution):
        """Return the width and height of an image whose longer side has `resolution` pixels."""
        return round(self.width * resolution), round(self.height * resolution)

    def get_centre(self, place):
        """Return the centre (x, y) of a place, as fractions of the longer side."""
        row, column = divmod(self.places.index(place), len(self.columns))
        return (
            (2 * column + 1) * self.width / (2 * len(self.columns)),
            (2 * row + 1) * self.height / (2 * len(self.rows)),
        )


def list_cells(length, names):
    """List the names of the cells along a side: three along at least 7/8 of the longer side, two along 5/8."""
    return names if length >= 7 / 8 else names[::2] if length >= 5 / 8 else names[1:2]


SQUARE = Layout()
# One layout for each number of tokens that the shorter side of an 8×8 grid can have.
LAYOUTS = (SQUARE, *(Layout(*sides) for side in (7 / 8, 6 / 8, 5 / 8, 4 / 8) for sides in ((1.0, side), (side, 1.0))))
PLACES = SQUARE.places


@dataclass(frozen=True)
class Sticker:
    """A sticker. `x`, `y` are its centre and `size` is the width of its bounding square, in fractions of a side.

    The side is the longer side of the image.
    """

    colour: str
    shape: str
    place: str
    x: float
    y: float
    size: float
    rgb: tuple[int, int, int]


# Drawing


def draw_stickers(background, stickers, fill=None):
    """Draw stickers on a copy of `background`. `fill` maps a sticker to its colour, which defaults to its `rgb`."""
    image = background.copy()
    for sticker in stickers:
        coverage, corner = draw_coverage(sticker.shape, sticker.x, sticker.y, sticker.size, max(image.size))
        image.paste(fill(sticker) if fill else sticker.rgb, corner, coverage)
    return image


def draw_mask(stickers, size):
    """Draw the mask of pixels that may change: the bounding squares, a quarter of a token wider on every side."""
    mask, resolution = PILImage.new("L", size), max(size)
    for sticker in stickers:
        reach = sticker.size / 2 + MASK_MARGIN
        low = [math.floor((centre - reach) * resolution) for centre in (sticker.x, sticker.y)]
        high = [math.ceil((centre + reach) * resolution) - 1 for centre in (sticker.x, sticker.y)]
        ImageDraw.Draw(mask).rectangle((*low, *high), fill=255)
    return mask


@lru_cache
def load_photograph(name, split):
    """Load the region of a photograph for `split`. A held-out photograph is loaded whole."""
    path = Path(skimage.__file__).parent / "data" / PHOTOGRAPHS[name][0]
    photograph = PILImage.open(path).convert("RGB")
    if name in HELD_OUT:
        return photograph
    width, height = photograph.size
    left, top, right, bottom = REGIONS[split]
    return photograph.crop((int(left * width), int(top * height), int(right * width), int(bottom * height)))


def draw_colour_matrix(rng):
    """Draw a random change of channel order, hue, saturation, gain and bias: 12 numbers for `PIL.Image.convert`."""
    order = np.eye(3)[rng.sample(range(3), 3) if rng.random() < 0.5 else [0, 1, 2]]
    angle = rng.uniform(-0.5, 0.5)
    grey = np.full((3, 3), 1 / 3)
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    hue = grey + math.cos(angle) * (np.eye(3) - grey) + math.sin(angle) * across
    saturation = grey + rng.uniform(0.4, 1.5) * (np.eye(3) - grey)
    gain = np.diag([rng.uniform(0.85, 1.15) for _ in range(3)]) * rng.uniform(0.7, 1.25)
    matrix = gain @ saturation @ hue @ order
    bias = 127.5 * (1 - matrix.sum(1).mean()) + rng.uniform(-35, 35)
    return np.concatenate([matrix, np.full((3, 1), bias)], 1).ravel().tolist()


def draw_background(rng, split, resolution, photograph=None, layout=SQUARE):
    """Draw a crop of a photograph. Some training crops are also mirrored and have changed colours."""
    if photograph is None:
        names = [name for name in PHOTOGRAPHS if name not in HELD_OUT]
        photograph = rng.choices(names, [PHOTOGRAPHS[name][2] for name in names])[0]
    image = load_photograph(photograph, split)
    side = min(image.width / layout.width, image.height / layout.height) * math.exp(rng.uniform(math.log(0.5), 0))
    width, height = side * layout.width, side * layout.height
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    crop = image.resize(layout.get_size(resolution), PILImage.Resampling.BICUBIC, box, reducing_gap=2)
    if split == "train":
        crop = crop.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop
        crop = crop.convert("RGB", draw_colour_matrix(rng)) if rng.random() < 0.8 else crop
    return photograph, crop


COLOURS_LAB = rgb2lab(np.array([list(COLOURS.values())], dtype=np.uint8))[0]


def find_legible(background, layout=SQUARE):
    """Return the pairs (place, colour) where a sticker stands out from the photograph.

    In the cell of the place, the mean Lab distance from the colour to the photograph must be at least 35, and at
    most a tenth of the cell may have a distance below 18.
    """
    num_rows, num_columns = len(layout.rows), len(layout.columns)
    lab = rgb2lab(np.asarray(background.resize((8 * num_columns, 8 * num_rows), PILImage.Resampling.BOX)))
    distance = np.linalg.norm(lab[:, :, None] - COLOURS_LAB, axis=-1)
    cells = distance.reshape(num_rows, 8, num_columns, 8, len(COLOURS)).swapaxes(1, 2).reshape(-1, 64, len(COLOURS))
    legible = (cells.mean(1) >= 35) & ((cells < 18).mean(1) <= 0.1)
    colours = list(COLOURS)
    return {(layout.places[place], colours[colour]) for place, colour in np.argwhere(legible).tolist()}


# Scenes


def draw_rgb(rng, colour, split):
    """Draw the RGB values of a named colour: exact for validation and test, up to 6 off per channel for training."""
    jitter = 6 if split == "train" else 0
    return tuple(min(255, max(0, value + rng.randint(-jitter, jitter))) for value in COLOURS[colour])


def draw_sticker(rng, pair, place, split, layout=SQUARE):
    """Draw a sticker with a random size and a random position inside the cell of its place."""
    size = min(rng.uniform(SMALLEST, LARGEST), *layout.cell)
    slacks = [side / 2 - size / 2 for side in layout.cell]
    x, y = (centre + rng.uniform(-slack, slack) for centre, slack in zip(layout.get_centre(place), slacks, strict=True))
    return Sticker(*pair, place, x, y, size, draw_rgb(rng, pair[0], split))


def are_apart(stickers):
    """Return whether there is a gap between the bounding squares of any two stickers."""
    return all(
        max(abs(one.x - other.x), abs(one.y - other.y)) >= (one.size + other.size) / 2 + GAP
        for one, other in itertools.combinations(stickers, 2)
    )


def draw_pair(rng, like=None):
    """Draw a pair (colour, shape). With `like`, in 70 % of the draws it has the colour or the shape of `like`."""
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    draw = rng.random()
    if like is None or draw > 0.7:
        return colour, shape
    return (like[0], shape) if draw < 0.35 else (colour, like[1])


def draw_edited_pair(rng, operation, unseen):
    """Draw the pair (colour, shape) of the edited sticker before and after; one is an unseen pair if `unseen`."""
    while True:
        old = draw_pair(rng)
        new = old
        if operation == "recolour":
            new = (rng.choice([colour for colour in COLOURS if colour != old[0]]), old[1])
        elif operation == "reshape":
            new = (old[0], rng.choice([shape for shape in SHAPES if shape != old[1]]))
        if bool({old, new} & UNSEEN_PAIRS) == unseen:
            return old, new


def draw_edit_scene(rng, operation, num_bystanders, unseen, legible, split, layout=SQUARE):
    """Draw (old sticker, new sticker, bystanders). Return None if they collide, repeat a pair or are hard to see."""
    old_pair, new_pair = draw_edited_pair(rng, operation, unseen)
    pairs = [draw_pair(rng, like=old_pair) for _ in range(num_bystanders)]
    if len({old_pair, new_pair, *pairs}) < num_bystanders + 1 + (old_pair != new_pair):
        return None
    places = rng.sample(layout.places, num_bystanders + 2)
    old = draw_sticker(rng, old_pair, places[0], split, layout)
    if operation == "add":
        old = replace(old, **dict(zip("xy", layout.get_centre(places[0]), strict=True)), size=CANONICAL)
    new = old
    if operation == "move":
        new = replace(old, place=places[1], **dict(zip("xy", layout.get_centre(places[1]), strict=True)))
    elif operation == "recolour":
        new = replace(old, colour=new_pair[0], rgb=draw_rgb(rng, new_pair[0], split))
    elif operation == "reshape":
        new = replace(old, shape=new_pair[1])
    bystanders = [draw_sticker(rng, *where, split, layout) for where in zip(pairs, places[2:], strict=True)]
    everyone = [old, new, *bystanders]
    apart = everyone if operation == "move" else everyone[1:]
    if not are_apart(apart) or any((sticker.place, sticker.colour) not in legible for sticker in everyone):
        return None
    return old, new, bystanders


def draw_translation_scene(rng, split, layout=SQUARE):
    """Draw one to four stickers for a plain background. All pairs (colour, shape) are different."""
    num_stickers = rng.randint(1, min(4, len(layout.places)))
    while True:
        pairs = [draw_pair(rng)]
        pairs += [draw_pair(rng, like=pairs[0]) for _ in range(num_stickers - 1)]
        places = rng.sample(layout.places, num_stickers)
        stickers = [draw_sticker(rng, *where, split, layout) for where in zip(pairs, places, strict=True)]
        if len(set(pairs)) == num_stickers and are_apart(stickers):
            return stickers


# Words


def describe(sticker, turned=False):
    """Name a sticker: "red circle", or with `turned`, "circle that is red"."""
    return f"{sticker.shape} that is {sticker.colour}" if turned else f"{sticker.colour} {sticker.shape}"


def describe_place(place, motion=False):
    """Add the preposition to a place: "at the top", "on the right", "in the centre"; with `motion`, "to the top"."""
    preposition = {"left": "on", "right": "on", "centre": "in"}.get(place, "at")
    return f"{'to' if motion else preposition} the {place}"


def add_article(words):
    """Add "a" or "an" before words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def draw_edit_prompt(rng, operation, old, new):
    """Draw one phrasing of the edit that turns `old` into `new`."""
    return rng.choice(PROMPTS[operation]).format(
        old=describe(old),
        old_turned=describe(old, turned=True),
        new=add_article(describe(new)),
        new_turned=add_article(describe(new, turned=True)),
        to_colour=new.colour,
        to_shape=new.shape,
        at=describe_place(new.place),
        to=describe_place(new.place, motion=True),
    )


def draw_caption(rng, stickers, background):
    """Draw a caption that names every sticker, in random order, and the background."""
    names = [f"{add_article(describe(sticker))} {describe_place(sticker.place)}" for sticker in stickers]
    rng.shuffle(names)
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return rng.choice(PROMPTS["translation"]).format(stickers=listed, background=background)


# Samples


def make_edit(rng, operation, split, resolution, part="seen", photograph=None, layout=SQUARE):
    """Make one edit: a dict of PIL images, prompt, task and details."""
    num_bystanders = rng.randint(1 if operation == "add" else 0, min(3, len(layout.places) - 2))
    scene = None
    while scene is None:
        name, background = draw_background(rng, split, resolution, photograph, layout)
        legible = find_legible(background, layout)
        for _ in range(50):
            scene = draw_edit_scene(rng, operation, num_bystanders, part == "unseen_pairs", legible, split, layout)
            if scene is not None:
                break
    old, new, bystanders = scene
    before = bystanders if operation == "add" else [old, *bystanders]
    after = bystanders if operation == "remove" else [new, *bystanders]
    details = {"part": part, "operation": operation, "photograph": name, "unseen": part == "unseen_pairs"}
    details["old"] = None if operation == "add" else asdict(old)
    details["new"] = None if operation == "remove" else asdict(new)
    details["bystanders"] = [asdict(sticker) for sticker in bystanders]
    return {
        "source_image": draw_stickers(background, before),
        "target_image": draw_stickers(background, after),
        "prompt": draw_edit_prompt(rng, operation, old, new),
        "mask": draw_mask([old, new], background.size),
        "task": "edit",
        "details": details,
    }


def draw_canny_map(rng, stickers, size):
    """Draw the outlines of the stickers in white on black."""
    silhouettes = draw_stickers(PILImage.new("L", size), stickers, lambda sticker: 255)
    edges = canny(np.asarray(silhouettes) / 255, sigma=0.7)
    return PILImage.fromarray(edges.astype(np.uint8) * 255).convert("RGB")


def draw_depth_map(rng, stickers, size):
    """Draw a floor that is nearer (brighter) towards the bottom, and in front of it each sticker at its own depth."""
    floor = np.linspace(10, rng.uniform(40, 80), size[1]).round().astype(np.uint8)
    floor = PILImage.fromarray(np.repeat(floor[:, None], size[0], 1))
    return draw_stickers(floor, stickers, lambda sticker: rng.randint(115, 185)).convert("RGB")


def draw_segmentation_map(rng, stickers, size):
    """Draw each sticker on black, in the palette colour of its shape."""
    black = PILImage.new("RGB", size)
    return draw_stickers(black, stickers, lambda sticker: SEGMENTATION_PALETTE[sticker.shape])


def make_translation(rng, task, split, resolution, layout=SQUARE):
    """Make one translation of a condition map into stickers on a plain background: the same dict as `make_edit`."""
    stickers, size = draw_translation_scene(rng, split, layout), layout.get_size(resolution)
    background = rng.choice(list(BACKGROUNDS))
    draw_map = {"canny": draw_canny_map, "depth": draw_depth_map, "segmentation": draw_segmentation_map}[task]
    condition_map = draw_map(rng, stickers, size)
    plain = PILImage.new("RGB", size, BACKGROUNDS[background])
    details = {"part": "seen", "operation": task, "photograph": None, "unseen": False, "background": background}
    return {
        "source_image": condition_map,
        "target_image": draw_stickers(plain, stickers),
        "prompt": draw_caption(rng, stickers, background),
        "mask": PILImage.new("L", size, 255),
        "task": task,
        "details": details | {"stickers": [asdict(sticker) for sticker in stickers]},
    }


def make_sample(seed, split, index, resolution, job=None, shares=SHARES, layouts=(SQUARE,)):
    """Make sample `index` of a split, in the layouts by turns.

    `job` is (operation, part, photograph); if it is None, draw it from `shares`.
    """
    layout = layouts[index % len(layouts)]
    rng = random.Random(f"{seed} {split} {index}")
    if job is None:
        kind = rng.choices(OPERATIONS, shares)[0]
        operation, part, photograph = kind if rng.random() < sum(shares) else rng.choice(TRANSLATIONS), "seen", None
    else:
        operation, part, photograph = job
    if operation in TRANSLATIONS:
        return make_translation(rng, operation, split, resolution, layout)
    return make_edit(rng, operation, split, resolution, part, photograph, layout)


# Files


def plan_split(split, num_samples):
    """List the jobs (operation, part, photograph) of a split. In training they are None: each sample draws its job.

    For training and validation, `num_samples` is the number of samples. For test, it is the number of samples per task
    of the part "seen". The test split also has `num_samples` / 5 samples per operation and held-out photograph, and
    2 · `num_samples` / 5 samples per operation with an unseen pair.
    """
    if split == "train":
        return [None] * num_samples
    seen = [(operation, "seen", None) for operation in (*OPERATIONS, *TRANSLATIONS)]
    if split == "validation":
        return [seen[index % len(seen)] for index in range(num_samples)]
    held_out = [(operation, "held_out", photograph) for photograph in HELD_OUT for operation in OPERATIONS]
    unseen_pairs = [(operation, "unseen_pairs", None) for operation in OPERATIONS]
    return seen * num_samples + held_out * (num_samples // 5) + unseen_pairs * (2 * num_samples // 5)


def encode_png(image):
    """Encode a PIL image as `datasets` stores it, as a lossless PNG with fast, weak compression."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def write_shard(path, seed, split, start, jobs, resolution, shares=SHARES, layouts=(SQUARE,)):
    """Write the samples `start` ... `start + len(jobs) - 1` of a split. Return their number."""
    rows = []
    for index, job in enumerate(jobs, start):
        sample = make_sample(seed, split, index, resolution, job, shares, layouts)
        images = {name: encode_png(sample[name]) for name in ("source_image", "target_image", "mask")}
        rows.append(sample | images | {"details": json.dumps(sample["details"])})
    table = pa.Table.from_pylist(rows, FEATURES.arrow_schema)
    with atomic_path(path) as unfinished:
        pq.write_table(table, unfinished, compression="none", row_group_size=500)
    return len(rows)


def list_missing_shards(arguments):
    """List the arguments of `write_shard` for every missing shard."""
    counts = {"train": arguments.num_train, "validation": arguments.num_validation, "test": arguments.num_test}
    missing = []
    # Validation and test come first, because they are small and useful before training data are complete.
    for split in ("validation", "test", "train"):
        jobs = plan_split(split, counts[split])
        num_shards = math.ceil(len(jobs) / arguments.shard_size)
        for shard in range(num_shards):
            path = arguments.output_dir / f"{split}-{shard:05d}-of-{num_shards:05d}.parquet"
            start = shard * arguments.shard_size
            if not path.exists():
                chosen = jobs[start : start + arguments.shard_size]
                layouts = LAYOUTS if arguments.all_aspect_ratios else (SQUARE,)
                how = arguments.resolution, arguments.shares, layouts
                missing.append((path, arguments.seed, split, start, chosen, *how))
    return missing


@dataclass
class Arguments:
    output_dir: Path
    num_train: int = 200_000
    num_validation: int = field(default=1600, metadata={"help": "total, in equal parts for the eight tasks"})
    num_test: int = field(default=500, metadata={"help": "test samples per task"})
    resolution: int = field(default=128, metadata={"help": "pixels of the longer side"})
    all_aspect_ratios: bool = field(
        default=False, metadata={"help": f"{len(LAYOUTS)} aspect ratios from 1:2 to 2:1 by turns, not only squares"}
    )
    shares: list[float] = field(
        default_factory=lambda: list(SHARES),
        metadata={"help": f"fractions of the training pairs: {', '.join(OPERATIONS)}; the rest are translations"},
    )
    seed: int = 0
    num_workers: int = 2
    shard_size: int = field(default=5000, metadata={"help": "pairs per file"})

    def __post_init__(self):
        # The sum of decimal fractions may exceed 1 by a rounding error.
        is_part = len(self.shares) == len(OPERATIONS) and all(share >= 0 for share in self.shares)
        if not (is_part and 0 < sum(self.shares) <= 1 + 1e-9):
            raise ValueError(
                f"`shares` is {', '.join(map(str, self.shares))}; give {len(OPERATIONS)} fractions of all pairs, none "
                "of them negative, whose sum is above 0 and at most 1."
            )


def main(arguments=None):
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    started, done = time.perf_counter(), 0
    with ProcessPoolExecutor(arguments.num_workers) as pool:
        shards = [pool.submit(write_shard, *shard) for shard in list_missing_shards(arguments)]
        for finished, shard in enumerate(as_completed(shards), 1):
            done += shard.result()
            rate = done / (time.perf_counter() - started)
            print(f"{finished}/{len(shards)} shards, {done} pairs, {rate:.0f} pairs per second", flush=True)


if __name__ == "__main__":
    main()
