"""The benchmarks as generators of samples, read from what their authors published.

`BENCHMARKS` lists them. `Benchmark(name, source)` checks all samples in one pass; `read()` then yields them as often as
needed. A reader's argument `wanted` names the samples to decode; the others are skipped.

The source of `folder` is any folder of images with a `metadata.jsonl`, whose lines are such as

    {"source_image_file_name": "0-before.png", "prompt": "make the car red", "target_image_file_name": "0-after.png"}

`target_image_file_name`, `mask_file_name` (white where the edit is), `target_prompt` (what the result shows),
`category`, `task` and `id` may be left out or null.
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from reprlib import repr as shorten

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download
from PIL import Image

from ..condition_maps import make_canny_map
from ..image_processing_editar import compute_crop_geometry, prepare_rgb_image
from ..pipelines.edit_region import prepare_mask
from ..pipelines.hub import check_folder_or_hub_id
from ..processing_editar import TASK_PREFIXES
from .processes import show_progress


IMAGES = ("source_image", "target_image", "mask", "labels")
RESOLUTION = 512
# In bytes. File systems take names of 255, and temporary files have longer ones than what they become.
LONGEST_ID = 200


@dataclass
class Sample:
    """One sample of a benchmark.

    Args:
        id (`str`): Its name, and that of its prediction's file.
        prompt (`str`): The instruction or caption, without a task's prefix.
        source_image (`PIL.Image.Image`): The image to edit, or the condition map.
        task (`str`): `"edit"`, `"canny"`, `"depth"` or `"segmentation"`.
        category (`str`): The part of the benchmark it belongs to. Figures are also given by category.
        target_image (`PIL.Image.Image`, *optional*): The true result.
        mask (`PIL.Image.Image` of mode "L", *optional*): 255 where the edit is, 0 elsewhere.
        labels (`PIL.Image.Image` of mode "L", *optional*): The class of every pixel; 255 is ignored.
        target_prompt (`str`, *optional*): What the result should show, for CLIP.
        previous (`str`, *optional*): The sample whose result is edited further, in place of `source_image`.
        is_scored (`bool`): Whether its prediction counts, or is a step on the way.
        details (`dict`): What else its metrics need.
    """

    id: str
    prompt: str
    source_image: Image.Image
    task: str = "edit"
    category: str = "all"
    target_image: Image.Image | None = None
    mask: Image.Image | None = None
    labels: Image.Image | None = None
    target_prompt: str | None = None
    previous: str | None = None
    is_scored: bool = True
    details: dict = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height that its prediction must have, in pixels."""
        return (self.target_image or self.source_image).size


Wanted = Container[str] | None


# What authors share may be broken in any part; errors name the place.

KINDS = {str: "text", list: "a list", dict: "an object", Image.Image: "an image, of a column of images"}


def read_json(path: Path) -> dict:
    """Read a file that holds one JSON object."""
    return parse_json(read_text(path), path)


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`source`: {path} is not UTF-8: {error}.") from error


def parse_json(text: str, path: Path | str, first_line: int = 1) -> dict:
    """Parse a JSON object that starts at a line of a file."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers that are too long and lists that are too deep, too
        line = first_line + getattr(error, "lineno", 1) - 1
        raise ValueError(f"`source`: line {line} of {path} is no JSON: {getattr(error, 'msg', error)}.") from error
    check_entry(content, {}, f"line {first_line} of {path}")
    return content


def check_entry(entry, fields: Mapping[str, type], where: str) -> None:
    """Check that an entry is an object and that its fields are there and have the right types."""
    if not isinstance(entry, dict):
        raise ValueError(f"`source`: {where} is {shorten(entry)}; it must be an object, {{…}}.")
    for name, kind in fields.items():
        if not isinstance(entry.get(name), kind):
            found = f"is {shorten(entry[name])}" if name in entry else "is missing"
            raise ValueError(f"`source`: `{name}` of {where} {found}; it must be {KINDS[kind]}.")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turn any error, as image decoders raise them, into a `ValueError` that says what cannot be read."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"`source`: {what} cannot be read: {error}") from error


def open_image(path: Path, where: str) -> Image.Image:
    """Open an image as upright RGB."""
    with naming(f"the image {path} of {where}"), Image.open(path) as image:
        return prepare_rgb_image(image)


def open_mask(path: Path, source_size: tuple[int, int], where: str) -> Image.Image:
    """Open a mask as the pipeline reads it: mode "L", the size of its source, 255 where the edit is, 0 elsewhere."""
    with naming(f"the image {path} of {where}"), Image.open(path) as mask:
        is_white = prepare_mask(mask, source_size)
        if is_white.any():
            return Image.fromarray(is_white).convert("L")
        # The mask is empty, or its white is too dark, which `check_sample` refuses.
        return prepare_rgb_image(mask, background="black").convert("L")


def check_files(source: str, names: tuple[str, ...], remedy: str) -> None:
    for name in names:
        if not (Path(source) / name).exists():
            raise ValueError(f"`source` {source!r} has no {name}; {remedy}.")


# PIE-Bench. Source: PnPInversion (arXiv 2310.01506) and its evaluation code.

# The ten kinds of edits and how many of each there are, in the order of `editing_type_id`.
PIE_CATEGORIES = {
    "random": 140,
    **dict.fromkeys(("change object", "add object", "delete object"), 80),
    **dict.fromkeys(("change content", "change pose", "change colour", "change material"), 40),
    **dict.fromkeys(("change background", "change style"), 80),
}
PIE_FIELDS = dict.fromkeys(
    ("image_path", "original_prompt", "editing_prompt", "editing_instruction", "editing_type_id"), str
) | {"mask": list}


def read_pie_bench(source: str, wanted: Wanted = None) -> Iterator[Sample]:
    """Read PIE-Bench from its authors' folder."""
    check_files(source, ("mapping_file.json",), "pass the folder that its authors share")
    mapping_file = Path(source) / "mapping_file.json"
    for key, entry in read_json(mapping_file).items():
        if wanted is not None and key not in wanted:
            continue
        check_entry(entry, {}, f"{key} in {mapping_file}")
        if missing := [name for name in PIE_FIELDS if name not in entry]:
            raise ValueError(
                f"`source`: {key} in {mapping_file} has no {', '.join(missing)}. Copies on the Hub lack instructions; "
                "pass the folder that its authors share."
            )
        check_entry(entry, PIE_FIELDS, f"{key} in {mapping_file}")
        if entry["editing_type_id"] not in map(str, range(10)):
            raise ValueError(
                f"`source`: the `editing_type_id` of {key} is {entry['editing_type_id']!r}; it must be 0 to 9."
            )
        image = open_image(Path(source) / "annotation_images" / entry["image_path"], key)
        if image.size != (RESOLUTION, RESOLUTION):
            raise ValueError(f"`source`: the image of {key} has {image.size} pixels; they all have 512×512.")
        yield Sample(
            id=key,
            prompt=entry["editing_instruction"],
            source_image=image,
            category=list(PIE_CATEGORIES)[int(entry["editing_type_id"])],
            mask=Image.fromarray(decode_mask(entry["mask"], key)),
            target_prompt=entry["editing_prompt"].replace("[", "").replace("]", ""),
        )


def decode_mask(runs: list[int], key: str = "a sample") -> np.ndarray:
    """Decode PIE-Bench's start, length, start, length, … to uint8 (512, 512), 255 where the edit is."""
    starts, lengths = runs[::2], runs[1::2]
    is_whole = all(type(value) is int and value >= 0 for value in runs)
    if not is_whole or len(starts) != len(lengths) or max(starts, default=0) >= RESOLUTION**2:
        raise ValueError(f"`source`: the mask of {key} is no list of starts and lengths within 512×512 pixels.")
    mask = np.zeros(RESOLUTION**2, dtype=np.uint8)
    for start, length in zip(starts, lengths, strict=True):
        mask[start : start + length] = 255
    mask = mask.reshape(RESOLUTION, RESOLUTION)
    # Parity: the border always counts as edited; its annotations are unreliable.
    mask[[0, -1], :] = mask[:, [0, -1]] = 255
    return mask


# Depth, canny, segmentation. Source: the evaluation sets of ControlNet++ (arXiv 2404.07987), which EditAR shares.


def read_rows(
    source: str, split: str, columns: Mapping[str, type], wanted: Wanted = None
) -> Iterator[tuple[str, dict]]:
    """Read a split of a folder of parquet files or of a data set on the Hub: (id, row)."""
    check_folder_or_hub_id(source, "source")
    folder = Path(source)
    if not folder.exists():
        folder = Path(snapshot_download(source, repo_type="dataset", allow_patterns=f"*{split}*.parquet"))
    files = sorted(folder.rglob(f"{split}*.parquet"))
    if not files:
        raise ValueError(f"`source` {source!r} has no parquet file whose name starts with {split!r}.")
    index = -1
    for path in files:
        with open_parquet(path) as file:
            names = file.schema_arrow.names
            if missing := sorted(set(columns) - set(names)):
                raise ValueError(f"`source` {source!r} lacks {', '.join(missing)}; it has {', '.join(names)}.")
            for batch in file.iter_batches(batch_size=16):
                for row in batch.to_pylist():
                    index += 1
                    if wanted is not None and f"{index:05}" not in wanted:
                        continue
                    with naming(f"row {index} of {source}"):
                        row |= {name: decode_image(row[name]) for name in columns if columns[name] is Image.Image}
                    check_entry(row, columns, f"row {index}")
                    yield f"{index:05}", row


def open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise ValueError(f"`source`: {path} is no whole parquet file; download it again. {error}") from error


def decode_image(stored) -> Image.Image | None:
    """Decode an image that `datasets` stored as bytes or a path, as it lies in the file."""
    if not isinstance(stored, dict):
        return stored
    image = Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"])
    image.load()
    return image


def crop(image: Image.Image, resolution: int, resampling=Image.Resampling.LANCZOS) -> Image.Image:
    """Resize the shortest side of an image or of labels, then crop the centre.

    Source: the image preparation of EditAR (arXiv 2501.04699).
    """
    image = image if resampling == Image.Resampling.NEAREST else prepare_rgb_image(image)
    found = compute_crop_geometry(image.height, image.width, resolution, resolution)
    resized = image.resize((found.resized_width, found.resized_height), resampling)
    return resized.crop((found.left, found.top, found.left + resolution, found.top + resolution))


def read_depth(source: str, wanted: Wanted = None, resolution: int = RESOLUTION) -> Iterator[Sample]:
    """Read images, their depth maps and captions."""
    columns = {"image": Image.Image, "control_depth": Image.Image, "text": str}
    for sample_id, row in read_rows(source, "validation", columns, wanted):
        source_image, target = (crop(row[name], resolution) for name in ("control_depth", "image"))
        yield Sample(sample_id, row["text"], source_image, "depth", target_image=target)


def read_canny(source: str, wanted: Wanted = None, resolution: int = RESOLUTION) -> Iterator[Sample]:
    """Read images and captions, and find the images' edges."""
    for sample_id, row in read_rows(source, "validation", {"image": Image.Image, "text": str}, wanted):
        target = crop(row["image"], resolution)
        yield Sample(sample_id, row["text"], make_canny_map(target), "canny", target_image=target)


def read_segmentation(source: str, wanted: Wanted = None, resolution: int = RESOLUTION) -> Iterator[Sample]:
    """Read images, their coloured segmentation maps, captions, and the class of every pixel."""
    columns = {"image": Image.Image, "control_seg": Image.Image, "panoptic_seg_map": Image.Image}
    for sample_id, row in read_rows(source, "validation", columns, wanted):
        # The colours of `control_seg` are those of a palette of 133 and do not tell the 171 classes apart.
        labels = read_labels(row["panoptic_seg_map"], int(sample_id))
        caption = "detailed_prompt" if row.get("detailed_prompt") else "prompt"
        check_entry(row, {caption: str}, f"row {int(sample_id)}")
        yield Sample(
            sample_id,
            row[caption],
            crop(row["control_seg"], resolution),
            "segmentation",
            target_image=crop(row["image"], resolution),
            labels=crop(labels, resolution, Image.Resampling.NEAREST),
        )


def read_labels(image: Image.Image, index: int) -> Image.Image:
    """Read a map of classes as mode "L"; the class of a pixel with a palette is its index, whatever its colour."""
    classes = np.asarray(image)
    if classes.ndim != 2 or classes.dtype.kind not in "iu":
        raise ValueError(
            f"`panoptic_seg_map` of row {index} has the mode {image.mode!r}; pass an image whose pixels are the "
            'numbers of their classes, of mode "L", "P" or "I": colours do not tell the classes.'
        )
    if strange := sorted(set(np.unique(classes).tolist()).difference({*range(171), 255})):
        raise ValueError(f"`panoptic_seg_map` of row {index} has the classes {strange}; they are 0 to 170, and 255.")
    return Image.fromarray(classes.astype(np.uint8))


# MagicBrush. Source: arXiv 2306.10012 and its evaluation code.


def read_magicbrush(source: str, wanted: Wanted = None, is_multi_turn: bool = False) -> Iterator[Sample]:
    """Read MagicBrush's unzipped test set: every turn from its true source.

    With `is_multi_turn`, a turn edits the result of the turn before, and only the last turn of a session counts.
    """
    remedy = "pass the folder of MagicBrush's unzipped test set"
    check_files(source, ("edit_sessions.json", "local_descriptions.json", "images"), remedy)
    folder = Path(source)
    sessions_file, captions_file = folder / "edit_sessions.json", folder / "local_descriptions.json"
    sessions, captions = read_json(sessions_file), read_json(captions_file)
    check_entry(sessions, dict.fromkeys(sessions, list), f"{sessions_file}")
    check_entry(captions, dict.fromkeys(sessions, dict), f"{captions_file}")
    turns = [(session, number, turn) for session in sessions for number, turn in enumerate(sessions[session], 1)]
    for session, number, turn in turns:
        sample_id, images = f"{session}-{number}", folder / "images" / session
        if wanted is not None and sample_id not in wanted:
            continue
        check_entry(turn, {"input": str, "output": str, "instruction": str}, f"{sample_id} in {sessions_file}")
        check_entry(captions[session], {turn["output"]: str}, f"{session} in {captions_file}")
        target, image = (open_image(images / turn[name], sample_id) for name in ("output", "input"))
        yield Sample(
            id=sample_id,
            prompt=turn["instruction"],
            # The evaluation code resizes predictions to the size of the truth, so the source is resized to it first.
            source_image=image if image.size == target.size else image.resize(target.size, Image.Resampling.BICUBIC),
            category=f"turn {number}",
            target_image=target,
            target_prompt=captions[session][turn["output"]],
            previous=f"{session}-{number - 1}" if is_multi_turn and number > 1 else None,
            is_scored=not is_multi_turn or number == len(sessions[session]),
        )


# Any folder


def read_folder(source: str, wanted: Wanted = None) -> Iterator[Sample]:
    """Read the samples that `metadata.jsonl` lists."""
    check_files(source, ("metadata.jsonl",), "its lines name images and prompts")
    path = Path(source) / "metadata.jsonl"
    words = ("id", "prompt", "target_prompt", "category", "task")
    known = {*words, *(f"{name}_file_name" for name in IMAGES[:3])}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        entry, where = parse_json(line, path, number), f"line {number} of {path}"
        if not entry.keys() <= known:
            raise ValueError(f"`source`: {where} has {', '.join(entry)}; there are {', '.join(known)}.")
        entry = {"id": f"{number:05}"} | {name: value for name, value in entry.items() if value is not None}
        check_entry(entry, {"source_image_file_name": str, "prompt": str} | dict.fromkeys(entry, str), where)
        if wanted is not None and entry["id"] not in wanted:
            continue
        files = {name: Path(source) / entry[key] for name in IMAGES[:3] if (key := f"{name}_file_name") in entry}
        mask = files.pop("mask", None)
        images = {name: open_image(file, where) for name, file in files.items()}
        if mask is not None:
            images["mask"] = open_mask(mask, images["source_image"].size, where)
        yield Sample(**{name: entry[name] for name in words if name in entry}, **images)


@dataclass(frozen=True)
class Kind:
    """A benchmark before it is read.

    Args:
        summary (`str`): What it is.
        read (`Callable`): Yields its samples from a source; raises `ValueError` if that is not as published.
        metrics (tuple of `str`): Its table's columns, keys of `table.METRICS`. The first ranks samples in reports.
        trade_off (tuple of two `str`): What guidance plots show: how much is kept, and how well it is edited.
        default_source (`str`, *optional*): The Hub id it is published under.
        expected (mapping or `int`, *optional*): How many samples it has as published, by category or in all.
        has_resolution (`bool`): Whether `read` takes a `resolution`.
        models (mapping): Networks of its published figures, where they are not the default ones.
        takes_any_size (`bool`): Whether predictions of another size than the sample are scored too.
    """

    summary: str
    read: Callable[..., Iterator[Sample]]
    metrics: tuple[str, ...]
    trade_off: tuple[str, str] = ("l1", "clip_t")
    default_source: str | None = None
    expected: Mapping[str, int] | int | None = None
    has_resolution: bool = False
    models: Mapping[str, str] = field(default_factory=dict)
    takes_any_size: bool = False


MAGICBRUSH = {
    "metrics": ("l1", "l2", "clip_i", "dino", "clip_t"),
    "expected": 1053,
    "models": {"clip": "openai/clip-vit-base-patch32"},
    "takes_any_size": True,
}
DEPTH_EVAL = {"default_source": "limingcv/MultiGen-20M_depth_eval", "expected": 5000, "has_resolution": True}
BENCHMARKS = {
    "pie-bench": Kind(
        "PIE-Bench: 700 edits with masks; a folder with mapping_file.json and annotation_images/",
        read_pie_bench,
        (
            *("structure_distance", "psnr_unedited", "lpips_unedited", "mse_unedited", "ssim_unedited"),
            *("clip_whole", "clip_edited"),
        ),
        ("structure_distance", "clip_whole"),
        expected=PIE_CATEGORIES,
    ),
    "depth": Kind("images from depth maps", read_depth, ("depth_rmse", "fid"), ("depth_rmse", "fid"), **DEPTH_EVAL),
    "canny": Kind(
        "images from canny edges, those of the depth benchmark's images",
        read_canny,
        ("edge_f1", "edge_ms_ssim", "edge_psnr", "fid"),
        ("edge_f1", "fid"),
        **DEPTH_EVAL,
    ),
    "segmentation": Kind(
        "images from COCOStuff segmentation maps",
        read_segmentation,
        ("mean_iou", "fid"),
        ("mean_iou", "fid"),
        **DEPTH_EVAL | {"default_source": "limingcv/Captioned_COCOStuff"},
    ),
    "magicbrush": Kind(
        "MagicBrush's test set, each turn from the true image; its unzipped folder", read_magicbrush, **MAGICBRUSH
    ),
    "magicbrush-multi-turn": Kind(
        "MagicBrush's test set, each turn from the turn before, of which the last counts; its unzipped folder",
        partial(read_magicbrush, is_multi_turn=True),
        **MAGICBRUSH,
    ),
    "folder": Kind(
        "any folder of images with metadata.jsonl",
        read_folder,
        ("l1", "l2", "psnr", "ssim", "psnr_unedited", "ssim_unedited"),
        ("psnr_unedited", "l1"),
    ),
}


class Benchmark:
    """A benchmark whose samples have all been read and checked once.

    Args:
        name (`str`): A key of `BENCHMARKS`.
        source (`str`, *optional*): Folder or Hub id; defaults to the Hub id it is published under.
        allow_partial (`bool`, *optional*, defaults to `False`): Accept a part of the benchmark. Reports then say so.
        resolution (`int`, *optional*): Side in pixels of the images of depth, canny and segmentation; defaults to 512.

    Attributes:
        ids (`list[str]`): The samples' ids, in order. `categories`, `previous` and `is_scored` belong to them.
        lacking (`dict`): The ids of the samples that have no `mask`, and those that have no `target_image`.
        info (`dict`): What the benchmark is, with a fingerprint of all its contents.

    Raises:
        ValueError: If the source is not the published benchmark.
    """

    def __init__(
        self, name: str, source: str | Path | None = None, allow_partial: bool = False, resolution: int | None = None
    ):
        if name not in BENCHMARKS:
            raise ValueError(f"`benchmark` is {name!r}; choose one of {', '.join(BENCHMARKS)}.")
        self.name, self.kind = name, BENCHMARKS[name]
        if resolution is not None and not self.kind.has_resolution:
            raise ValueError(f"`resolution` is {resolution}; the benchmark {name} has no such option.")
        if resolution is not None and resolution < 1:
            raise ValueError(f"`resolution` is {resolution}; it must be at least 1 pixel.")
        source = source or self.kind.default_source
        if source is None:
            raise ValueError(f"`source` is missing; the benchmark {name} is read from a folder: {self.kind.summary}.")
        self.source = str(Path(source).resolve()) if Path(source).exists() else str(source)
        self.options = {} if resolution is None else {"resolution": resolution}
        self.ids, self.categories, self.previous, self.is_scored = [], [], [], []
        self.lacking = {"mask": [], "target_image": []}
        self.sizes, digest = Counter(), hashlib.sha256()
        for sample in show_progress(self.read(), desc=f"reading {name}"):
            check_sample(sample, self.ids)
            self.ids.append(sample.id)
            self.categories.append(sample.category)
            self.previous.append(sample.previous)
            self.is_scored.append(sample.is_scored)
            self.sizes["{}×{}".format(*sample.size)] += 1
            for missing in (missing for missing in self.lacking if getattr(sample, missing) is None):
                self.lacking[missing].append(sample.id)
            words = {name: value for name, value in vars(sample).items() if name not in IMAGES}
            digest.update(json.dumps(words, sort_keys=True).encode())
            for image_name in IMAGES:
                if (image := getattr(sample, image_name)) is not None:
                    digest.update(f"{image_name} {image.mode} {image.size}".encode() + image.tobytes())
        if not self.ids:
            raise ValueError("`source` has no samples.")
        expected = self.kind.expected
        found = dict(Counter(self.categories)) if isinstance(expected, Mapping) else len(self.ids)
        is_complete = expected is None or found == expected
        if not is_complete and not allow_partial:
            raise ValueError(
                f"`source` has {found} samples; the published benchmark has {expected}. To use a part of it, pass "
                "`allow_partial`; reports then say so."
            )
        self.info = {"benchmark": name, "num_samples": len(self.ids), "is_complete": is_complete}
        self.info["fingerprint"] = f"sha256:{digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, wanted: Wanted = None) -> Iterator[Sample]:
        """Read the samples, or those whose ids are in `wanted`."""
        return self.kind.read(self.source, wanted, **self.options)


def check_sample(sample: Sample, earlier_ids: Container[str]) -> None:
    """Check that a sample can be generated, saved and scored."""
    is_name = re.fullmatch(r"\w[\w.-]*", sample.id) and len(sample.id.encode()) <= LONGEST_ID
    if not is_name or sample.id in earlier_ids:
        raise ValueError(
            f"`id` is {sample.id!r}; give each sample one of its own, of letters, digits, dots and dashes, at most "
            f"{LONGEST_ID} bytes: its prediction's file is named by it."
        )
    if sample.task not in TASK_PREFIXES:
        raise ValueError(f"`task` of {sample.id} is {sample.task!r}; the tasks are {', '.join(TASK_PREFIXES)}.")
    if sample.previous is not None and sample.previous not in earlier_ids:
        raise ValueError(f"`previous` of {sample.id} is {sample.previous!r}, which is no earlier sample.")
    if not sample.prompt.strip():
        raise ValueError(f"`prompt` of {sample.id} is empty.")
    for name in IMAGES:
        image = getattr(sample, name)
        if image is not None and image.size != sample.size:
            width, height = sample.size
            raise ValueError(f"`{name}` of {sample.id} has {image.size} pixels; its result has {width}×{height}.")
    if sample.mask is not None and 0 < (highest := sample.mask.getextrema()[1]) < 128:
        raise ValueError(
            f"`mask` of {sample.id} has no pixel above {highest}; it is 255 (white) where the edit is and 0 elsewhere."
        )
