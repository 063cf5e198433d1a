"""Compose pairs of images with an instruction from the bank: objects on photographs, edited.

    python projects/scenes/compose.py --bank bank --output-dir scenes-test --split test --per-operation 500 --seed 1

writes one parquet file an operation, `test-add.parquet` and so on, with the columns of the package's data sets
(`source_image`, `target_image`, `prompt` without task prefix, `mask` with white where the edit may change, `task`) and
those that scoring needs.

    python projects/scenes/compose.py --bank bank --sheet pairs.png --number 200

draws pairs with their instructions for looking at. In programs:

    bank = Bank.load("bank")
    pair = compose_pair(bank, seed=0, index=17)

A pair depends on the bank and on `seed`, `index`, `split`, `height`, `width` and `operation` alone.
"""

import io
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from bank import Bank, View
from canny_edges import draw_canny_map
from global_edits import GLOBAL_EDITS, WEATHERS, apply_global_edit
from instructions import PLACES, compose_caption, compose_instruction
from PIL import Image
from recoloring import compute_color_distance
from scene import LARGEST_OBJECT, WIDEST_AT_PLACE, Scene, Thing, make_scene, sort_by_depth
from transformers import HfArgumentParser

from editar_hf.training.validation import add_caption, build_contact_sheet


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

# Pairs whose objects change their color by less than this mean difference of RGB are drawn anew.
CLEAR_COLOR_DISTANCE = 46
# Scale of the objects where one has so many others beside it.
CROWDING = (1, 0.7, 0.58)


@dataclass
class Pair:
    """Two images and the instruction that turns the first into the second.

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
            whole image for global edits and maps.
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


def draw_asked_color(scene: Scene, thing: Thing, is_held_out: bool) -> str:
    """Draw a color that differs clearly from the thing's own; one held out for its noun, or else none if possible."""
    colors = scene.list_colors(thing.view.noun)
    scene.rng.shuffle(colors)
    colors.sort(key=lambda color: ((color, thing.view.noun) in scene.bank.held_out_pairs) != is_held_out)
    before = thing.draw_paint(thing.color)
    own = thing.color or thing.view.color
    distances = {}
    for color in colors:
        if color != own:
            distances[color] = compute_color_distance(before, thing.draw_paint(color))
            if distances[color] >= CLEAR_COLOR_DISTANCE:
                return color
    return max(distances, key=distances.get)


def compose_local(
    bank: Bank, rng: random.Random, split: str, height: int, width: int, operation: str, object_scale: float
) -> Pair:
    """Compose an edit of one object."""
    scene = make_scene(bank, rng, split, height, width)
    number = rng.choices((0, 1, 2), (0.45, 0.45, 0.1))[0]
    scene.crowding = CROWDING[number] * object_scale
    asks_held_out = operation == "recolor" and split == "test" and rng.random() < 0.5
    main_view = draw_main_view(scene, operation, asks_held_out)
    main = scene.make_thing(main_view, {"add": 0.35, "recolor": 0.45}.get(operation, 0.3))
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
        color = draw_asked_color(scene, main, asks_held_out)
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
        new_color_pair=(color, new_noun or noun) in bank.held_out_pairs,
        **describe_newness(scene, edited),
    )


def list_present(things: list[Thing]) -> tuple[str, ...]:
    return tuple(thing.view.noun for thing in things)


def describe_newness(scene: Scene, things: list[Thing]) -> dict:
    """Name the photograph, and say which parts of a pair training never shows."""
    return {
        "photograph": scene.photograph.id,
        "new_photograph": scene.photograph.split == "test",
        "new_view": any(thing.view.split != "train" for thing in things),
        "new_model": any(thing.view.split == "test-model" for thing in things),
    }


def draw_main_view(scene: Scene, operation: str, asks_held_out: bool) -> View:
    """Draw a view for the object that is edited; of a noun with a held-out color where one is asked."""
    if asks_held_out:
        models = scene.bank.models
        present = {noun for split in ("test-view", "test-model") for noun in models.get(split, {})}
        nouns = sorted(present & {noun for _, noun in scene.bank.held_out_pairs})
        if nouns:
            return scene.draw_view(scene.rng.choice(nouns))
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
    """Compose an edit of the whole image."""
    edit = rng.choice(tuple(GLOBAL_EDITS))
    has_things = rng.random() < 0.5
    is_place = has_things or (edit in WEATHERS and rng.random() < 0.5)
    scene = make_scene(bank, rng, split, height, width, "place" if is_place else "any")
    things = draw_things(scene, rng.choice((1, 2))) if has_things else []
    source = np.asarray(scene.draw(things))
    ground = scene.ground / height if scene.photograph.kind == "place" else 0.5
    target = apply_global_edit(source, edit, min(max(ground, 0), 1), rng)
    instruction = compose_instruction(rng, bank.nouns, "global", edit=edit)
    return make_whole_pair(scene, things, source, target, instruction, "global", edit)


def make_whole_pair(scene: Scene, things: list[Thing], source, target, instruction, operation, edit="") -> Pair:
    """Make the pair of an edit of the whole image."""
    return Pair(
        source,
        target,
        np.ones((scene.height, scene.width), bool),
        instruction,
        operation if operation in MAPS else "edit",
        operation,
        edit=edit,
        box=(0, 0, scene.width, scene.height),
        others=list_present(things),
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
    """Compose a map and the image that it shows."""
    has_things = operation != "canny" or rng.random() < 0.6
    scene = make_scene(bank, rng, split, height, width, "place" if has_things else "any")
    things = draw_things(scene, rng.choice((1, 2, 3))) if has_things else []
    target = np.asarray(scene.draw(things))
    if operation == "canny":
        source = draw_canny_map(target)
    else:
        source = (draw_depth_map if operation == "depth" else draw_segmentation_map)(scene, things)
    named = [(thing.view.noun, thing.color) for thing in things]
    caption = compose_caption(rng, bank.nouns, named, scene.photograph.kind == "place")
    return make_whole_pair(scene, things, source, target, caption, operation)


def compose_pair(
    bank: Bank,
    seed: int,
    index: int,
    split: str = "train",
    height: int = 128,
    width: int = 128,
    operation: str | None = None,
    object_scale: float = 1.0,
) -> Pair:
    """Compose pair `index` of a split.

    Args:
        bank (`Bank`): The objects and photographs.
        seed (`int`), index (`int`): What the pair is drawn from.
        split (`str`): "train" or "test"; "test" takes other photographs, and other views and models of objects.
        height, width (`int`): Size in pixels.
        operation (`str`, *optional*): One of `OPERATIONS`; drawn from `MIX` where left out.
        object_scale (`float`): What the sides of objects are multiplied by, in edits of objects.

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
    return compose_local(bank, rng, split, height, width, operation, object_scale)


def list_instructions(bank: Bank, number: int, seed: int = 0) -> list[tuple[str, str]]:
    """List (instruction, task) as training draws them, without drawing images."""
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


# Files


def make_row(pair: Pair, index: int) -> dict:
    """Make the row of a pair in the package's data-set format."""
    fields = dict(pair.__dict__)
    row = {}
    for name, column in (("source", "source_image"), ("target", "target_image"), ("mask", "mask")):
        buffer = io.BytesIO()
        Image.fromarray(fields.pop(name)).convert("L" if name == "mask" else "RGB").save(buffer, "PNG")
        row[column] = {"bytes": buffer.getvalue(), "path": None}
    return {**row, "prompt": fields.pop("instruction"), **fields, "index": index}


def write_pairs(bank: Bank, output_dir: Path, split: str, per_operation: int, seed: int, height: int, width: int):
    """Write `per_operation` pairs of every operation, one parquet file each."""
    import datasets
    import pyarrow as pa

    kinds = {name: datasets.Image() for name in ("source_image", "target_image", "mask")}
    # A list may be empty in every row of a file.
    kinds["others"] = datasets.List(datasets.Value("string"))
    output_dir.mkdir(parents=True, exist_ok=True)
    for operation in OPERATIONS:
        started = time.perf_counter()
        rows = [
            make_row(compose_pair(bank, seed, index, split, height, width, operation), index)
            for index in range(per_operation)
        ]
        path = output_dir / f"{split}-{operation}.parquet"
        table = pa.Table.from_pylist(rows)
        features = datasets.Features.from_arrow_schema(table.schema) | kinds
        pq.write_table(table.cast(datasets.Features(features).arrow_schema), path, row_group_size=100)
        print(f"{path}: {len(rows)} pairs in {time.perf_counter() - started:.1f} s", flush=True)


def draw_sheet(pairs: list[Pair], columns: int = 5) -> Image.Image:
    """Draw pairs, each under its instruction."""
    cells = []
    for number, pair in enumerate(pairs):
        images = build_contact_sheet([[Image.fromarray(pixels) for pixels in (pair.source, pair.target)]], gap=1)
        cells.append(add_caption(images, f"{number}: {pair.instruction}"))
    return build_contact_sheet([cells[start : start + columns] for start in range(0, len(cells), columns)])


@dataclass
class Arguments:
    bank: Path = field(metadata={"help": "folder that build_bank.py made"})
    output_dir: Path | None = field(default=None, metadata={"help": "folder for the parquet files"})
    split: str = field(default="test", metadata={"choices": SPLITS})
    per_operation: int = field(default=500, metadata={"help": "pairs of each operation"})
    seed: int = 1
    height: int = field(default=128, metadata={"help": "pixels"})
    width: int = field(default=128, metadata={"help": "pixels"})
    sheet: Path | None = field(default=None, metadata={"help": "sheet of pairs to look at"})
    number: int = field(default=200, metadata={"help": "pairs on the sheet"})
    operation: str | None = field(default=None, metadata={"help": "the only operation on the sheet"})


def main(arguments=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    bank, size = Bank.load(args.bank), (args.height, args.width)
    if args.sheet:
        pairs = [
            compose_pair(bank, args.seed, index, args.split, *size, args.operation) for index in range(args.number)
        ]
        draw_sheet(pairs).save(args.sheet)
    if args.output_dir:
        write_pairs(bank, args.output_dir, args.split, args.per_operation, args.seed, *size)


if __name__ == "__main__":
    main()
