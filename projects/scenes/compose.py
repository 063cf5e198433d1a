"""Compose pairs of pictures with an instruction from the bank: objects on photographs, edited.

    python projects/scenes/compose.py --bank bank --output_dir scenes-test --split test --per_operation 500 --seed 1

writes one parquet file an operation, `test-add.parquet` and so on, with the columns of the package's data sets
(`source_image`, `target_image`, `prompt` without task prefix, `mask` with white where the edit may change, `task`) and
those that scoring needs.

    python projects/scenes/compose.py --bank bank --sheet pairs.png --number 200

draws pairs with their instructions for looking at. In programs:

    bank = Bank.load("bank")
    pair = compose_pair(bank, seed=0, index=17)

A pair depends on the bank and on `seed`, `index`, `split`, `height`, `width` and `operation` alone.
"""

import argparse
import io
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from bank import Bank, Photograph, View
from canny_edges import draw_canny_map
from global_edits import GLOBAL_EDITS, WEATHERS, apply_global_edit
from instructions import PLACES, compose_caption, compose_instruction
from PIL import Image, ImageDraw
from recoloring import COLORS, compute_color_distance, recolor


# Share of each operation among the training pairs.
MIX = {
    "add": 0.16,
    "remove": 0.16,
    "replace": 0.15,
    "recolor": 0.17,
    "move": 0.09,
    "global": 0.17,
    "canny": 0.04,
    "depth": 0.03,
    "segmentation": 0.03,
}
OPERATIONS = tuple(MIX)
MAPS = ("canny", "depth", "segmentation")
SPLITS = ("train", "test")
# Height and width in pixels, multiples of the stride 8.
SHAPES = ((128, 128), (96, 128), (128, 96), (72, 128), (128, 72))

# Lengths as fractions: of the longer side of the picture, of the side itself, of the side itself.
SMALLEST_OBJECT, LARGEST_OBJECT, MARGIN = 22 / 128, 0.8, 0.01
# What is wider than this stands nearly at the same columns on the left, in the middle and on the right.
WIDEST_AT_PLACE = 0.42
SMALLEST_CROP, SMALLEST_SCALE = 0.55, 0.85
LOWEST_GROUND = 0.72
# Share of the training photographs of places that are backdrops.
BACKDROP_SHARE = 0.35
# Pairs whose objects change their color by less than this mean difference of RGB are drawn anew.
CLEAR_COLOR_DISTANCE = 46
# Mean RGB of an object and of the photograph around it differ by more than this in some channel.
SMALLEST_CONTRAST = 26
SHADOW_COLOR = (8, 8, 14)
# Scale of the objects where one has so many others beside it.
CROWDING = (1, 0.88, 0.78)
NUM_TRIES = 24


def make_shadow_template(height: int = 32, width: int = 64) -> Image.Image:
    """Make a soft ellipse of shadow strength: darkest in the middle, where the object stands, 0 at the rim."""
    rows = (np.arange(height) + 0.5) / height * 2 - 1
    columns = (np.arange(width) + 0.5) / width * 2 - 1
    radius = np.sqrt(rows[:, None] ** 2 + columns**2).clip(0, 1)
    return Image.fromarray((170 * (1 - radius**1.5) ** 1.3).round().astype(np.uint8))


SHADOW = make_shadow_template()
IS_ABOVE_ZERO = [0] + [255] * 255
IS_OPAQUE = [0] * 255 + [255]


# ---------------------------------------------------------------------------------------------------------------------
# Scenes


@dataclass
class Pair:
    """Two pictures and the instruction that turns the first into the second.

    Attributes:
        source, target (`np.ndarray`): uint8 (height, width, 3).
        mask (`np.ndarray`): bool (height, width), the pixels that the edit may change, shadows included; all of them
            for global edits and maps.
        instruction (`str`): Without task prefix.
        task (`str`): The package's task: "edit", "canny", "depth" or "segmentation".
        operation (`str`): One of `OPERATIONS`.
        noun (`str`): The object that is added, removed, replaced, recolored or moved; "" for global edits and maps.
        new_noun (`str`): What replaces it, or "".
        color (`str`): The color that is asked, or "".
        source_color (`str`): The color that the object was painted in before the edit, or "".
        edit (`str`): The name of the global edit, or "".
        place (`str`): "left", "middle" or "right" where the instruction names it, or "".
        box (`tuple`): Left, top, right and bottom of the object in the target (source for "remove"), in pixels; the
            whole picture for global edits and maps.
        others (`tuple[str, ...]`): The nouns of all other objects.
        photograph (`str`): Its id.
        new_photograph, new_view, new_model, new_color_pair (`bool`): Whether training shows none of: the photograph;
            an edited object's view; its model; the asked color on this noun.
    """

    source: np.ndarray
    target: np.ndarray
    mask: np.ndarray
    instruction: str
    task: str
    operation: str
    noun: str = ""
    new_noun: str = ""
    color: str = ""
    source_color: str = ""
    edit: str = ""
    place: str = ""
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    others: tuple[str, ...] = ()
    photograph: str = ""
    new_photograph: bool = False
    new_view: bool = False
    new_model: bool = False
    new_color_pair: bool = False


@dataclass
class Thing:
    """An object in a scene: a view, painted in `color` unless "", at a place in pixels.

    `gains` multiply its RGB, as the light of the photograph does; `sprite` and `shadow` are drawn once.
    """

    view: View
    color: str = ""
    is_mirrored: bool = False
    left: int = 0
    top: int = 0
    width: int = 0
    height: int = 0
    gains: tuple[float, float, float] = (1, 1, 1)
    sprite: Image.Image | None = field(default=None, repr=False)
    shadow: Image.Image | None = field(default=None, repr=False)

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.left, self.top, self.left + self.width, self.top + self.height

    @property
    def foot(self) -> int:
        return self.top + self.height

    @property
    def center(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.top + self.height / 2

    def moved(self, **changes) -> "Thing":
        """Copy the thing with changes, what is drawn included where only the place changes."""
        return Thing(**(self.__dict__ | changes))

    def draw(self):
        """Draw the sprite (RGBA) and the shadow (L)."""
        if self.sprite is None:
            self.sprite = apply_gains(self.draw_paint(self.color), self.gains)
            left, right = self.view.foot
            width = max(6, round((right - left) * self.width * 1.35))
            self.shadow = SHADOW.resize((width, max(3, round(width * 0.26))), Image.Resampling.BILINEAR)

    def draw_paint(self, color: str) -> Image.Image:
        """Draw the object in a color, or in its own, in plain light."""
        image = self.view.image.resize((self.width, self.height), Image.Resampling.HAMMING).convert("RGBA")
        if self.is_mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return recolor(image, color) if color else image

    def draw_depth(self) -> Image.Image:
        """Draw the depth (L) at the thing's size: bank depth, or the middle of the range for a flat object."""
        if self.view.depth is None:
            return Image.new("L", (self.width, self.height), 128)
        depth = self.view.depth.resize((self.width, self.height), Image.Resampling.NEAREST)
        return depth.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.is_mirrored else depth

    @property
    def shadow_box(self) -> tuple[int, int, int, int]:
        left, right = self.view.foot
        middle = 1 - (left + right) / 2 if self.is_mirrored else (left + right) / 2
        width, height = self.shadow.size
        left = round(self.left + middle * self.width - width / 2)
        # Most of the ellipse lies behind the object's lowest point, as its foot does.
        top = round(self.foot - 0.68 * height)
        return left, top, left + width, top + height


def apply_gains(sprite: Image.Image, gains: tuple[float, float, float]) -> Image.Image:
    """Multiply the RGB of an RGBA sprite."""
    tables = [[min(255, round(level * gain)) for level in range(256)] for gain in gains]
    return sprite.point([*tables[0], *tables[1], *tables[2], *range(256)])


@dataclass
class Scene:
    """A photograph, cropped to the picture's size, and things on it.

    `ground` is in pixels from the top. `crowding` makes objects smaller where there are several; `widest` limits their
    width, as a fraction of the picture's.
    """

    bank: Bank
    rng: random.Random
    split: str
    background: Image.Image
    ground: float
    photograph: Photograph
    crowding: float = 1.0
    widest: float = LARGEST_OBJECT

    @property
    def width(self) -> int:
        return self.background.width

    @property
    def height(self) -> int:
        return self.background.height

    # What stands in the scene

    def draw_view(self, noun: str | None = None, avoid: tuple[str, ...] = (), is_painted: bool = False) -> View:
        """Draw a view of a noun, or of any whose names differ from those of `avoid`; models come before views.

        In "test", half the views are new views of models that training shows, half are of new models.
        """
        groups = ["train"]
        if self.split == "test":
            groups = ["test-view", "test-model"] if self.rng.random() < 0.5 else ["test-model", "test-view"]
        for group in groups:
            models = self.bank.models.get(group, {})
            names, weights = self.bank.list_nouns(group, is_painted)
            for _ in range(NUM_TRIES if names else 0):
                name = noun or self.rng.choices(names, cum_weights=weights)[0]
                if name in models and all(self.bank.are_distinct(name, other) for other in avoid):
                    return self.rng.choice(self.rng.choice(list(models[name].values())))
        raise ValueError(f"`bank` has no object for the split {self.split!r}, other than {', '.join(avoid) or noun}.")

    def is_allowed(self, color: str, noun: str) -> bool:
        """Say whether this split may show a color on a noun."""
        return self.split == "test" or (color, noun) not in self.bank.held_out_pairs

    def list_colors(self, noun: str) -> list[str]:
        return [color for color in self.bank.colors if self.is_allowed(color, noun)]

    def make_thing(self, view: View, paint_chance: float) -> Thing:
        """Make a thing of a view, sometimes painted; always where its own color is held out for its noun."""
        is_paintable = self.bank.nouns[view.noun]["recolor"]
        is_painted = is_paintable and self.rng.random() < paint_chance
        if is_paintable and not self.is_allowed(view.color, view.noun):
            is_painted = True
        color = self.rng.choice(self.list_colors(view.noun)) if is_painted else ""
        return Thing(view, color, is_mirrored=self.rng.random() < 0.5)

    # Where it stands

    def draw_foot(self) -> int:
        """Draw the row that an object stands on, below the ground line."""
        lowest = self.height * 0.975
        highest = min(max(self.ground + 0.05 * self.height, 0.4 * self.height), 0.93 * self.height)
        return round(self.rng.uniform(highest, lowest))

    def set_size(self, thing: Thing, foot: int, size: float | None = None) -> Thing:
        """Give a thing the size of its noun at a place: what stands lower is nearer, and larger."""
        rng, shorter = self.rng, min(self.height, self.width)
        if size is None:
            size = self.bank.nouns[thing.view.noun]["size"] * rng.uniform(0.85, 1.15)
        horizon = max(self.ground, 0.3 * self.height)
        nearness = min(max((foot - horizon) / (0.975 * self.height - horizon + 1), 0), 1)
        longer = size * shorter * (0.75 + 0.35 * nearness) * self.crowding
        longer = max(longer, SMALLEST_OBJECT * max(self.height, self.width))
        view_width, view_height = thing.view.image.size
        scale = min(
            longer / max(view_width, view_height),
            self.widest * self.width / view_width,
            LARGEST_OBJECT * self.height / view_height,
            (foot - 1) / view_height,
        )
        thing.width, thing.height = max(3, round(view_width * scale)), max(3, round(view_height * scale))
        thing.top = foot - thing.height
        return thing

    def draw_left(self, width: int, place: str = "") -> int:
        """Draw the left edge of an object whose center shall lie in a third of the picture; "" is anywhere."""
        margin = round(MARGIN * self.width)
        highest = self.width - margin - width
        if not place:
            return self.rng.randint(margin, highest)
        center = (PLACES.index(place) + 0.5 + self.rng.uniform(-0.22, 0.22)) * self.width / 3
        return min(max(round(center - width / 2), margin), highest)

    def place_thing(self, thing: Thing, taken: list[Thing], place: str = "", beside: Thing | None = None) -> bool:
        """Find a free place for a thing, which gets its size and light there; False where there is none."""
        may_overlap = self.rng.random() < 0.15
        for _ in range(NUM_TRIES):
            foot = self.draw_foot()
            if beside:
                foot = min(max(beside.foot + self.rng.randint(-3, 3), 8), self.height - 1)
            self.set_size(thing, foot)
            if beside:
                gap = self.rng.randint(1, max(2, self.width // 16))
                left = beside.left - gap - thing.width if self.rng.random() < 0.5 else beside.left + beside.width + gap
                if not 0 <= left <= self.width - thing.width:
                    continue
            else:
                left = self.draw_left(thing.width, place)
            thing.left = left
            if all(is_free(thing, other, may_overlap) for other in taken) and self.match_light(thing):
                return True
        return False

    def match_light(self, thing: Thing) -> bool:
        """Bring a thing's brightness and warmth a part of the way to those of the photograph around it.

        Returns whether it still stands out there, as a black cat does not at night.
        """
        left, top, right, bottom = thing.box
        box = (max(left, 0), max(top, 0), min(right, self.width), min(bottom, self.height))
        mean = np.asarray(self.background.resize((1, 1), Image.Resampling.BOX, box), np.float32)[0, 0] + 8
        level = float(mean.mean())
        brightness = min(max((level / 120) ** 0.28, 0.74), 1.12)
        thing.gains = tuple(float(brightness * min(max((channel / level) ** 0.15, 0.9), 1.1)) for channel in mean)
        thing.sprite = thing.shadow = None
        color = COLORS[thing.color][0] if thing.color else thing.view.mean
        return any(
            abs(level * gain - around) > SMALLEST_CONTRAST
            for level, gain, around in zip(color, thing.gains, mean, strict=True)
        )

    # How it looks

    def draw(self, things: list[Thing]) -> Image.Image:
        """Draw things on the photograph: all shadows first, then what stands farther back before what is near."""
        picture = self.background.copy()
        for thing in things:
            thing.draw()
            picture.paste(SHADOW_COLOR, thing.shadow_box, thing.shadow)
        for thing in sort_by_depth(things):
            picture.paste(thing.sprite, (thing.left, thing.top), thing.sprite)
        return picture

    def draw_mask(self, changed: list[Thing], others: list[Thing], has_shadows: bool = True) -> np.ndarray:
        """Draw where pictures may differ that have the same others, and the changed things in one of them only."""
        mask = Image.new("L", self.background.size)
        for thing in changed if has_shadows else ():
            mask.paste(255, thing.shadow_box, thing.shadow.point(IS_ABOVE_ZERO))

        def paste(thing, value, table):
            thing.draw()
            mask.paste(value, thing.box, thing.sprite.getchannel("A").point(table))

        for thing in others:
            paste(thing, 0, IS_OPAQUE)
        for thing in changed:
            paste(thing, 255, IS_ABOVE_ZERO)
        for thing in others:
            if all(thing.foot > one.foot for one in changed):
                paste(thing, 0, IS_OPAQUE)
        return np.asarray(mask) > 0


def sort_by_depth(things: list[Thing]) -> list[Thing]:
    return sorted(things, key=lambda thing: thing.foot)


def is_free(one: Thing, other: Thing, may_overlap: bool) -> bool:
    """Say whether two things are apart; those that may overlap hide less than a third, and not the center."""
    width = min(one.box[2], other.box[2]) - max(one.box[0], other.box[0])
    height = min(one.box[3], other.box[3]) - max(one.box[1], other.box[1])
    if width <= 0 or height <= 0:
        return True
    if not may_overlap or abs(one.foot - other.foot) < 3:
        return False
    hidden = width * height / min(one.width * one.height, other.width * other.height)
    return hidden < 0.33 and not contains(one, other.center) and not contains(other, one.center)


def contains(thing: Thing, point: tuple[float, float]) -> bool:
    left, top, right, bottom = thing.box
    return left - 1 <= point[0] <= right + 1 and top - 1 <= point[1] <= bottom + 1


# ---------------------------------------------------------------------------------------------------------------------
# Photographs


def draw_photograph(bank: Bank, rng: random.Random, split: str, kind: str) -> Photograph:
    kinds = bank.backgrounds.get(split, {})
    if kind == "place" and split == "train" and "backdrop" in kinds and rng.random() < BACKDROP_SHARE:
        kind = "backdrop"
    photographs = kinds.get(kind)
    if not photographs:
        raise ValueError(f"`bank` has no photograph of kind {kind!r} for the split {split!r}; add some.")
    return rng.choice(photographs)


def make_scene(bank: Bank, rng: random.Random, split: str, height: int, width: int, kind: str = "place") -> Scene:
    """Make a scene without things: a random crop of a photograph, often mirrored, its light slightly changed."""
    photograph = draw_photograph(bank, rng, split, kind)
    full_width, full_height = photograph.image.size
    scale = min(full_width / width, full_height / height)
    # Small photographs are enlarged a little at most.
    scale *= rng.uniform(min(max(SMALLEST_CROP, SMALLEST_SCALE / scale), 1), 1)
    crop_width, crop_height = scale * width, scale * height
    left = rng.uniform(0, full_width - crop_width)
    # The ground line stays in the picture's upper part where the photograph has enough ground.
    lowest_top = full_height - crop_height
    highest_top = min(max(photograph.ground * full_height - LOWEST_GROUND * crop_height, 0), lowest_top)
    top = rng.uniform(highest_top if kind == "place" else 0, lowest_top)
    box = (left, top, left + crop_width, top + crop_height)
    image = photograph.image.resize((width, height), Image.Resampling.BICUBIC, box, reducing_gap=1.5)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    ground = (photograph.ground * full_height - top) / crop_height * height
    return Scene(bank, rng, split, change_light(image, rng), ground, photograph)


def change_light(image: Image.Image, rng: random.Random) -> Image.Image:
    """Change brightness, contrast and warmth a little."""
    contrast, brightness, warmth = rng.uniform(0.88, 1.12), rng.uniform(0.88, 1.1), rng.uniform(-0.05, 0.05)
    levels = (np.arange(256) - 128) * contrast + 128
    tables = [levels * brightness * (1 + gain) for gain in (warmth, 0, -warmth)]
    return image.point(np.concatenate(tables).round().clip(0, 255).astype(int).tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Operations


def place_others(scene: Scene, taken: list[Thing], number: int, avoid: tuple[str, ...]) -> list[Thing]:
    """Place up to `number` other objects where `taken` leaves room, with names unlike those of `avoid`."""
    others = []
    for _ in range(number):
        avoided = (*avoid, *list_present(others))
        other = scene.make_thing(scene.draw_view(avoid=avoided), paint_chance=0.3)
        if scene.place_thing(other, [*taken, *others]):
            others.append(other)
    return others


def draw_number_of_others(rng: random.Random) -> int:
    return rng.choices((0, 1, 2), (0.45, 0.45, 0.1))[0]


def draw_asked_color(scene: Scene, thing: Thing) -> str:
    """Draw a color that differs clearly from the thing's own; held out for its noun in half of the tests."""
    colors = scene.list_colors(thing.view.noun)
    scene.rng.shuffle(colors)
    if scene.split == "test":
        is_held_out_first = scene.rng.random() < 0.5
        colors.sort(key=lambda color: ((color, thing.view.noun) in scene.bank.held_out_pairs) != is_held_out_first)
    before = thing.draw_paint(thing.color)
    own = thing.color or thing.view.color
    distances = {}
    for color in colors:
        if color != own:
            distances[color] = compute_color_distance(before, thing.draw_paint(color))
            if distances[color] >= CLEAR_COLOR_DISTANCE:
                return color
    return max(distances, key=distances.get)


def compose_local(bank: Bank, rng: random.Random, split: str, height: int, width: int, operation: str) -> Pair:
    """Compose an edit of one object."""
    scene = make_scene(bank, rng, split, height, width)
    number = draw_number_of_others(rng)
    scene.crowding = CROWDING[number]
    main = scene.make_thing(draw_main_view(scene, operation), {"add": 0.35, "recolor": 0.45}.get(operation, 0.3))
    noun = main.view.noun
    place = rng.choice(PLACES) if operation == "move" or (operation == "add" and rng.random() < 0.55) else ""
    scene.widest = WIDEST_AT_PLACE if place else LARGEST_OBJECT
    scene.place_thing(main, [], place)

    # What stands there before and after the edit.
    before, after = main, main
    new_noun = color = beside = ""
    avoid = (noun,)
    if operation == "add":
        before, color = None, main.color
    elif operation == "remove":
        after = None
    elif operation == "recolor":
        color = draw_asked_color(scene, main)
        after = main.moved(color=color, sprite=None, shadow=None)
    elif operation == "replace":
        after = scene.make_thing(scene.draw_view(avoid=avoid), 0.25)
        stand_on_same_point(scene, after, main)
        new_noun, color = after.view.noun, after.color
        avoid = (noun, new_noun)
    elif operation == "move":
        # The object came from another third of the same row.
        origin = rng.choice([name for name in PLACES if name != place])
        before = main.moved(left=scene.draw_left(main.width, origin))
    edited = [thing for thing in (before, after) if thing]

    others = []
    if operation == "add" and not place and number and rng.random() < 0.4:
        neighbor = scene.make_thing(scene.draw_view(avoid=avoid), paint_chance=0.2)
        if scene.place_thing(neighbor, [main], beside=main):
            others, beside = [neighbor], neighbor.view.noun
    others += place_others(scene, [*edited, *others], number - len(others), (*avoid, *list_present(others)))

    source_color = before.color if before else ""
    return Pair(
        source=np.asarray(scene.draw(([before] if before else []) + others)),
        target=np.asarray(scene.draw(([after] if after else []) + others)),
        mask=scene.draw_mask(edited, others, has_shadows=operation != "recolor"),
        instruction=compose_instruction(
            rng,
            bank.nouns,
            operation,
            noun,
            new_noun=new_noun,
            color=color,
            source_color=source_color if rng.random() < 0.6 else "",
            place=place,
            beside=beside,
        ),
        task="edit",
        operation=operation,
        noun=noun,
        new_noun=new_noun,
        color=color,
        source_color=source_color,
        place=place,
        box=edited[-1].box,
        others=list_present(others),
        photograph=scene.photograph.id,
        new_color_pair=(color, new_noun or noun) in bank.held_out_pairs,
        **describe_newness(scene, edited),
    )


def list_present(things: list[Thing]) -> tuple[str, ...]:
    return tuple(thing.view.noun for thing in things)


def describe_newness(scene: Scene, things: list[Thing]) -> dict[str, bool]:
    """Say which parts of a pair training never shows."""
    return {
        "new_photograph": scene.photograph.split == "test",
        "new_view": any(thing.view.split != "train" for thing in things),
        "new_model": any(thing.view.split == "test-model" for thing in things),
    }


def draw_main_view(scene: Scene, operation: str) -> View:
    """Draw a view for the object that is edited; for half of the recolored ones in "test", of a noun held out."""
    bank, rng = scene.bank, scene.rng
    if operation == "recolor" and scene.split == "test" and rng.random() < 0.5:
        present = {noun for split in ("test-view", "test-model") for noun in bank.models.get(split, {})}
        nouns = sorted(present & {noun for _, noun in bank.held_out_pairs})
        if nouns:
            return scene.draw_view(rng.choice(nouns))
    return scene.draw_view(is_painted=operation == "recolor")


def stand_on_same_point(scene: Scene, new: Thing, old: Thing):
    """Put a thing where another stands, with a size between its own there and the other's."""
    scene.set_size(new, old.foot)
    scale = (max(old.width, old.height) / max(new.width, new.height)) ** 0.4
    middle = old.left + old.width / 2
    # Near the border it may move inwards by a quarter of its width.
    reach = 3 * min(middle, scene.width - middle)
    scale = min(
        scale,
        LARGEST_OBJECT * scene.width / new.width,
        LARGEST_OBJECT * scene.height / new.height,
        (old.foot - 1) / new.height,
        reach / new.width,
    )
    new.width, new.height = max(3, int(new.width * scale)), max(3, int(new.height * scale))
    new.left = min(max(round(middle - new.width / 2), 0), scene.width - new.width)
    new.top = old.foot - new.height
    scene.match_light(new)


def draw_things(scene: Scene, number: int) -> list[Thing]:
    """Place one or more objects on a scene."""
    scene.crowding = CROWDING[number - 1]
    first = scene.make_thing(scene.draw_view(), paint_chance=0.4)
    scene.place_thing(first, [])
    return [first, *place_others(scene, [first], number - 1, (first.view.noun,))]


def compose_global(bank: Bank, rng: random.Random, split: str, height: int, width: int) -> Pair:
    """Compose an edit of the whole picture."""
    edit = rng.choice(tuple(GLOBAL_EDITS))
    has_things = rng.random() < 0.5
    is_place = has_things or (edit in WEATHERS and rng.random() < 0.5)
    scene = make_scene(bank, rng, split, height, width, "place" if is_place else "any")
    things = draw_things(scene, rng.choice((1, 2))) if has_things else []
    source = np.asarray(scene.draw(things))
    ground = scene.ground / height if scene.photograph.kind == "place" else 0.5
    return Pair(
        source,
        apply_global_edit(source, edit, min(max(ground, 0), 1), rng),
        np.ones((height, width), bool),
        compose_instruction(rng, bank.nouns, "global", edit=edit),
        "edit",
        "global",
        edit=edit,
        box=(0, 0, width, height),
        others=list_present(things),
        photograph=scene.photograph.id,
        **describe_newness(scene, things),
    )


def draw_depth_map(scene: Scene, things: list[Thing]) -> np.ndarray:
    """Draw nearness: a dark sky, a ground that comes nearer downwards, and the objects on it.

    As in the package's maps, the nearest point is white and the farthest black.
    """
    rows = np.arange(scene.height)
    ground = min(max(scene.ground, 0.0), 0.95 * scene.height)
    plane = 20 + 150 * ((rows - ground) / (scene.height - ground)).clip(0, 1)
    nearness = np.repeat(np.where(rows < ground, 0, plane)[:, None], scene.width, 1)
    for thing in sort_by_depth(things):
        thing.draw()
        is_inside = np.asarray(thing.sprite.getchannel("A")) > 127
        base = float(plane[min(thing.foot, scene.height - 1)])
        region = nearness[thing.top : thing.foot, thing.left : thing.left + thing.width]
        region[is_inside] = base + (np.asarray(thing.draw_depth(), np.float32)[is_inside] - 128) / 255 * 60
    spread = (nearness - nearness.min()) / max(nearness.max() - nearness.min(), 1e-6)
    return np.repeat((spread * 255).round().astype(np.uint8)[:, :, None], 3, axis=2)


def draw_segmentation_map(scene: Scene, things: list[Thing]) -> np.ndarray:
    """Draw each object in the color of its noun, on black."""
    labels = np.zeros((scene.height, scene.width), np.int64)
    for thing in sort_by_depth(things):
        thing.draw()
        is_inside = np.asarray(thing.sprite.getchannel("A")) > 127
        region = labels[thing.top : thing.foot, thing.left : thing.left + thing.width]
        region[is_inside] = scene.bank.segmentation_labels[thing.view.noun]
    return scene.bank.segmentation_palette[labels]


def compose_map(bank: Bank, rng: random.Random, split: str, height: int, width: int, operation: str) -> Pair:
    """Compose a map and the picture that it shows."""
    has_things = operation != "canny" or rng.random() < 0.6
    scene = make_scene(bank, rng, split, height, width, "place" if has_things else "any")
    things = draw_things(scene, rng.choice((1, 2, 3))) if has_things else []
    target = np.asarray(scene.draw(things))
    if operation == "canny":
        source = draw_canny_map(target)
    else:
        source = (draw_depth_map if operation == "depth" else draw_segmentation_map)(scene, things)
    named = [(thing.view.noun, thing.color) for thing in things]
    return Pair(
        source,
        target,
        np.ones((height, width), bool),
        compose_caption(rng, bank.nouns, named, scene.photograph.kind == "place"),
        operation,
        operation,
        box=(0, 0, width, height),
        others=list_present(things),
        photograph=scene.photograph.id,
        **describe_newness(scene, things),
    )


def compose_pair(
    bank: Bank,
    seed: int,
    index: int,
    split: str = "train",
    height: int = 128,
    width: int = 128,
    operation: str | None = None,
) -> Pair:
    """Compose pair `index` of a split.

    Args:
        bank (`Bank`): The objects and photographs.
        seed (`int`), index (`int`): What the pair is drawn from.
        split (`str`): "train" or "test"; "test" takes other photographs, and other views and models of objects.
        height, width (`int`): Size in pixels.
        operation (`str`, *optional*): One of `OPERATIONS`; drawn from `MIX` where left out.

    Raises:
        ValueError: If the split or the operation is unknown, or the bank has too little for the split.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}; choose one of {', '.join(SPLITS)}.")
    if operation is not None and operation not in MIX:
        raise ValueError(f"`operation` is {operation!r}; choose one of {', '.join(MIX)}.")
    rng = random.Random(f"{seed} {index} {split} {height} {width} {operation}")
    operation = operation or rng.choices(OPERATIONS, tuple(MIX.values()))[0]
    if operation == "global":
        return compose_global(bank, rng, split, height, width)
    if operation in MAPS:
        return compose_map(bank, rng, split, height, width, operation)
    return compose_local(bank, rng, split, height, width, operation)


def list_instructions(bank: Bank, number: int, seed: int = 0) -> list[tuple[str, str]]:
    """List (instruction, task) as training draws them, without drawing pictures."""
    rng = random.Random(f"{seed} instructions")
    nouns, colors = list(bank.nouns), [*bank.colors, ""]
    texts = []
    for operation in rng.choices(OPERATIONS, tuple(MIX.values()), k=number):
        noun, new_noun, third = rng.sample(nouns, 3) if len(nouns) > 2 else (nouns * 3)[:3]
        color, source_color = rng.choice(colors), rng.choice((*bank.colors, *[""] * len(bank.colors)))
        if operation in MAPS:
            named = [(name, rng.choice(colors)) for name in (noun, new_noun, third)][: rng.randint(0, 3)]
            texts.append((compose_caption(rng, bank.nouns, named, rng.random() < 0.7), operation))
            continue
        words = {
            "add": {"color": color, **rng.choice(({}, {"place": rng.choice(PLACES)}, {"beside": third}))},
            "remove": {"source_color": source_color},
            "replace": {"source_color": source_color, "new_noun": new_noun, "color": color},
            "recolor": {"source_color": source_color, "color": rng.choice(bank.colors)},
            "move": {"source_color": source_color, "place": rng.choice(PLACES)},
            "global": {"edit": rng.choice(tuple(GLOBAL_EDITS))},
        }[operation]
        texts.append((compose_instruction(rng, bank.nouns, operation, noun, **words), "edit"))
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# Files


def encode_png(pixels: np.ndarray) -> dict:
    """Encode uint8 or bool pixels as `datasets` stores them."""
    pixels = pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def make_row(pair: Pair, index: int) -> dict:
    """Make the row of a pair in the package's data-set format."""
    fields = dict(pair.__dict__)
    images = {"source_image": fields.pop("source"), "target_image": fields.pop("target"), "mask": fields.pop("mask")}
    return {
        **{name: encode_png(pixels) for name, pixels in images.items()},
        "prompt": fields.pop("instruction"),
        **fields,
        "box": list(pair.box),
        "others": list(pair.others),
        "index": index,
    }


def write_pairs(bank: Bank, output_dir: Path, split: str, per_operation: int, seed: int, height: int, width: int):
    """Write `per_operation` pairs of every operation, one parquet file each."""
    import pyarrow as pa
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    kinds = {name: ImageFeature() for name in ("source_image", "target_image", "mask")}
    kinds |= {name: Value("bool") for name in ("new_photograph", "new_view", "new_model", "new_color_pair")}
    kinds |= {"box": List(Value("int32")), "others": List(Value("string")), "index": Value("int64")}
    output_dir.mkdir(parents=True, exist_ok=True)
    for operation in OPERATIONS:
        started = time.perf_counter()
        rows = [
            make_row(compose_pair(bank, seed, index, split, height, width, operation), index)
            for index in range(per_operation)
        ]
        features = Features({name: kinds.get(name, Value("string")) for name in rows[0]})
        path = output_dir / f"{split}-{operation.replace(' ', '-')}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, features.arrow_schema), path, row_group_size=100)
        print(f"{path}: {len(rows)} pairs in {time.perf_counter() - started:.1f} s", flush=True)


def draw_sheet(pairs: list[Pair], columns: int = 5, side: int = 128, text_height: int = 13) -> Image.Image:
    """Draw pairs beside each other, each under its instruction."""
    cell_width, cell_height = 2 * side + 6, side + text_height + 2
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    drawing = ImageDraw.Draw(sheet)
    for number, pair in enumerate(pairs):
        left, top = number % columns * cell_width, number // columns * cell_height
        drawing.text((left + 1, top), f"{number}: {pair.instruction}", fill="black")
        for offset, pixels in ((0, pair.source), (side + 1, pair.target)):
            image = Image.fromarray(pixels)
            image.thumbnail((side, side))
            sheet.paste(image, (left + offset, top + text_height))
    return sheet


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path, required=True, help="folder that build_bank.py made")
    parser.add_argument("--output_dir", "--output-dir", type=Path, help="folder for the parquet files")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--per_operation", "--per-operation", type=int, default=500, help="pairs of each operation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--height", type=int, default=128, help="pixels")
    parser.add_argument("--width", type=int, default=128, help="pixels")
    parser.add_argument("--sheet", type=Path, help="picture of pairs to look at")
    parser.add_argument("--number", type=int, default=200, help="pairs on the sheet")
    parser.add_argument("--operation", choices=OPERATIONS, help="the only operation on the sheet")
    arguments = parser.parse_args(arguments)
    if not arguments.output_dir and not arguments.sheet:
        parser.error("nothing to do; give --output_dir or --sheet.")
    return arguments


def main(arguments=None):
    arguments = parse_arguments(arguments)
    bank = Bank.load(arguments.bank)
    size = (arguments.height, arguments.width)
    if arguments.sheet:
        pairs = [
            compose_pair(bank, arguments.seed, index, arguments.split, *size, arguments.operation)
            for index in range(arguments.number)
        ]
        draw_sheet(pairs, side=max(size)).save(arguments.sheet)
    if arguments.output_dir:
        write_pairs(bank, arguments.output_dir, arguments.split, arguments.per_operation, arguments.seed, *size)


if __name__ == "__main__":
    main()
