"""Read a bank of objects and photographs, as build_bank.py makes it, into memory."""

import io
import json
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from recoloring import name_color


# Photographs of these folders show buildings without free ground. Objects may stand on their lower border too:
# in training, which needs many backgrounds to learn what lies behind an object.
BACKDROPS = ("/monuments/", "/explore_monuments/", "/renewable/")
IS_ABOVE_HALF = [0] * 128 + [255] * 128


@dataclass
class View:
    """One view of an object.

    Attributes:
        image (`PIL.Image.Image`): Pixels with premultiplied alpha (mode "RGBa"), which resize without fringes.
        depth (`PIL.Image.Image`, *optional*): 255 at the object's nearest point, 1 at its farthest, 0 outside.
        foot (`tuple[float, float]`): Left and right end of what touches the ground, as fractions of the width.
        mean (`tuple[float, float, float]`): Its mean RGB, in [0, 255].
        color (`str`): The name of that color.
    """

    id: str
    noun: str
    model: str
    split: str
    image: Image.Image
    depth: Image.Image | None
    foot: tuple[float, float]
    mean: tuple[float, float, float]
    color: str


@dataclass
class Photograph:
    """A photograph; `ground` is where its ground begins, as a fraction of the height from the top."""

    id: str
    kind: str
    split: str
    ground: float
    image: Image.Image


class Bank:
    """Objects and photographs, decoded once: processes that are forked later share them.

    Attributes:
        nouns (`dict`): The table of nouns of `bank.json`.
        colors (`list[str]`): Names of the colors.
        held_out_pairs (`set[tuple[str, str]]`): (color, noun) that training never shows.
        views (`list[View]`), photographs (`list[Photograph]`).
    """

    def __init__(self, nouns, colors, held_out_pairs, views, photographs):
        self.nouns, self.colors = nouns, list(colors)
        self.held_out_pairs = {(color, noun) for color, noun in held_out_pairs}
        self.views, self.photographs = views, photographs
        # split → noun → model → views
        self.models: dict[str, dict[str, dict[str, list[View]]]] = {}
        for view in views:
            models = self.models.setdefault(view.split, {}).setdefault(view.noun, {})
            models.setdefault(view.model, []).append(view)
        # split → kind → photographs
        self.backgrounds: dict[str, dict[str, list[Photograph]]] = {}
        for photograph in photographs:
            kinds = self.backgrounds.setdefault(photograph.split, {})
            is_backdrop = photograph.kind == "other" and any(part in photograph.id for part in BACKDROPS)
            for kind in (photograph.kind, "any", *(["backdrop"] if is_backdrop else [])):
                kinds.setdefault(kind, []).append(photograph)
        self.names = {noun: frozenset({noun, *entry["synonyms"]}) for noun, entry in nouns.items()}
        self.segmentation_labels = {noun: label for label, noun in enumerate(sorted(nouns), 1)}

    @classmethod
    def load(cls, folder: str | Path) -> "Bank":
        """Load and decode the bank in a folder (`objects.parquet`, `photographs.parquet`, `bank.json`)."""
        folder = Path(folder)
        if missing := [
            name for name in ("bank.json", "objects.parquet", "photographs.parquet") if not (folder / name).is_file()
        ]:
            raise ValueError(f"`bank` {str(folder)!r} lacks {', '.join(missing)}; make one with build_bank.py.")
        tables = json.loads((folder / "bank.json").read_text(encoding="utf-8"))
        views = []
        for row in pq.read_table(folder / "objects.parquet").to_pylist():
            image = Image.open(io.BytesIO(row["image"])).convert("RGBA").convert("RGBa")
            depth = row["depth"] and Image.open(io.BytesIO(row["depth"])).convert("L")
            foot, mean = measure_foot(image.getchannel("a")), compute_mean_color(image)
            identity = (row["id"], row["noun"], row["model"], row["split"])
            views.append(View(*identity, image, depth, foot, mean, name_color(mean)))
        photographs = []
        for row in pq.read_table(folder / "photographs.parquet").to_pylist():
            image = Image.open(io.BytesIO(row["image"])).convert("RGB")
            ground = row["ground"] if row["ground"] is not None and row["ground"] == row["ground"] else 0.6
            photographs.append(Photograph(row["id"], row["kind"], row["split"], ground, image))
        return cls(tables["nouns"], tables["colors"], tables["held_out_pairs"], views, photographs)

    @cached_property
    def segmentation_palette(self) -> np.ndarray:
        """The package's palette: one color a noun, in alphabetical order, after black."""
        from editar_hf.condition_maps import compute_palette

        return compute_palette(len(self.nouns) + 1)

    @cache  # noqa: B019 - a bank lives as long as the process
    def list_nouns(self, group: str, is_painted: bool) -> tuple[list[str], list[int]]:
        """List the nouns of a group of views, all or those that can be painted, with cumulative weights.

        A noun with several models is drawn up to four times as often as one with a single emoji.
        """
        nouns = self.models.get(group, {})
        names = [noun for noun in nouns if self.nouns[noun]["recolor"] or not is_painted]
        weights = [min(4, max(len(nouns[noun]), sum(map(len, nouns[noun].values())) // 6)) for noun in names]
        return names, list(accumulate(weights))

    def are_distinct(self, one: str, other: str) -> bool:
        """Say whether no name of a noun contains a name of the other ("ball" is in "soccer ball")."""
        return not any(f" {a} " in f" {b} " or f" {b} " in f" {a} " for a in self.names[one] for b in self.names[other])


def measure_foot(alpha: Image.Image) -> tuple[float, float]:
    """Measure where the lowest eighth of an object begins and ends, as fractions of its width."""
    width, height = alpha.size
    lowest = alpha.crop((0, height - max(1, height // 8), width, height)).point(IS_ABOVE_HALF).getbbox()
    return (lowest[0] / width, lowest[2] / width) if lowest else (0.2, 0.8)


def compute_mean_color(image: Image.Image) -> tuple[float, float, float]:
    """Compute the mean RGB, in [0, 255], of an image with premultiplied alpha."""
    *rgb, alpha = np.asarray(image, np.float32).mean((0, 1))
    return tuple(float(min(channel / max(alpha, 1) * 255, 255)) for channel in rgb)
