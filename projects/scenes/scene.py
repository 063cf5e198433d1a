"""A scene: a cropped photograph with objects that stand on it, and how both are drawn."""

import random
from dataclasses import dataclass, field

import numpy as np
from bank import Bank, Photograph, View
from instructions import PLACES
from PIL import Image
from recoloring import COLORS, recolor


# Lengths as fractions: of the longer side of the image, of the side itself, of the side itself.
SMALLEST_OBJECT, LARGEST_OBJECT, MARGIN = 22 / 128, 0.8, 0.01
# What is wider than this stands nearly at the same columns on the left, in the middle and on the right.
WIDEST_AT_PLACE = 0.5
# Small objects are drawn larger than they are beside large ones: an object of few tokens is smeared by the VQ model.
SIZE_EXPONENT = 0.6
SMALLEST_CROP, SMALLEST_SCALE = 0.55, 0.85
LOWEST_GROUND = 0.72
# Share of the training photographs of places that are backdrops.
BACKDROP_SHARE = 0.35
# Mean RGB of an object and of the photograph around it differ by more than this in some channel.
SMALLEST_CONTRAST = 26
SHADOW_COLOR = (8, 8, 14)
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
    """A photograph, cropped to the image's size, and things on it.

    `ground` is in pixels from the top. `crowding` makes objects smaller where there are several; `widest` limits their
    width, as a fraction of the image's.
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
        longer = size**SIZE_EXPONENT * shorter * (0.75 + 0.35 * nearness) * self.crowding
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
        """Draw the left edge of an object whose center shall lie in a third of the image; "" is anywhere."""
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
        image = self.background.copy()
        for thing in things:
            thing.draw()
            image.paste(SHADOW_COLOR, thing.shadow_box, thing.shadow)
        for thing in sort_by_depth(things):
            image.paste(thing.sprite, (thing.left, thing.top), thing.sprite)
        return image

    def draw_mask(self, changed: list[Thing], others: list[Thing], has_shadows: bool = True) -> np.ndarray:
        """Draw where images may differ that have the same others, and the changed things in one of them only."""
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
    # The ground line stays in the image's upper part where the photograph has enough ground.
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
