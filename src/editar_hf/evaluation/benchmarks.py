"""Read the samples of benchmarks from the files that their authors published.

`Benchmark(name, source)` reads and checks all samples once. `read()` then yields the samples, as often as it is called.
`BENCHMARKS` maps names to benchmarks, and a project may add its own. Each benchmark has two functions: one lists the
ids of the samples with their entries in the published files, and one makes a sample from an entry. Samples that are
not wanted are therefore not decoded, and an error can name the sample.

The benchmark `folder` reads any folder of images with a `metadata.jsonl`. A line of this file looks like

    {"source_image_file_name": "0-before.png", "prompt": "make the car red", "target_image_file_name": "0-after.png"}

`target_image_file_name`, `mask_file_name` (white inside the edit), `target_prompt` (a caption of the result),
`category`, `task` and `id` may be missing or null.
"""

import inspect
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download
from PIL import Image

from ..checks import check_choice, check_integer
from ..condition_maps import make_canny_map
from ..image_processing_editar import apply_crop, compute_crop_geometry, prepare_rgb_image
from ..pipelines.edit_region import prepare_mask
from ..pipelines.hub import check_folder_or_hub_id
from ..processing_editar import TASK_PREFIXES
from .processes import show_progress


IMAGES = ("source_image", "target_image", "mask", "labels")
RESOLUTION = 512


@dataclass
class Sample:
    """One sample of a benchmark.

    Args:
        id (`str`): The name of the sample, and of the file of its prediction.
        prompt (`str`): The instruction or caption, without the prefix of the task.
        source_image (`PIL.Image.Image`): The image to edit, or the condition map.
        task (`str`): `"edit"`, `"canny"`, `"depth"` or `"segmentation"`.
        category (`str`): The part of the benchmark that the sample belongs to. Results are also given by category.
        target_image (`PIL.Image.Image`, *optional*): The true result.
        mask (`PIL.Image.Image` of mode "L", *optional*): 255 inside the edit, 0 elsewhere.
        labels (`PIL.Image.Image` of mode "L", *optional*): The class of every pixel; 255 is ignored.
        target_prompt (`str`, *optional*): A caption of the true result, for CLIP.
        previous (`str`, *optional*): Id of an earlier sample. Its prediction is edited in place of `source_image`.
        is_scored (`bool`): Whether the prediction is scored, or only an intermediate result.
        details (`dict`): Further data that metrics need.
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
        """Width and height in pixels that the prediction must have."""
        return (self.target_image or self.source_image).size


Entries = Iterator[tuple[str, Any]]


@contextmanager
def naming(where: str | Path) -> Iterator[None]:
    """Turn any error into a `ValueError` that says where in the benchmark's files it happened."""
    try:
        yield
    except Exception as error:  # decoders raise errors of many classes on broken files
        if str(error).startswith("`source`"):
            raise
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ValueError(f"`source`: {where}: {reason}") from error


def read_json(path: Path) -> dict:
    with naming(path):
        return json.loads(path.read_text(encoding="utf-8-sig"))


def open_image(path: str | Path) -> Image.Image:
    """Open an image as upright RGB."""
    with Image.open(path) as image:
        return prepare_rgb_image(image)


# PIE-Bench. Source: PnPInversion (arXiv 2310.01506) and its evaluation code.

# The ten kinds of edits with their numbers of samples, in the order of `editing_type_id`.
PIE_CATEGORIES = {
    "random": 140,
    **dict.fromkeys(("change object", "add object", "delete object"), 80),
    **dict.fromkeys(("change content", "change pose", "change color", "change material"), 40),
    **dict.fromkeys(("change background", "change style"), 80),
}


def list_pie_bench(source: str) -> Entries:
    yield from read_json(Path(source) / "mapping_file.json").items()


def make_pie_sample(source: str, sample_id: str, entry: dict) -> Sample:
    return Sample(
        id=sample_id,
        prompt=entry["editing_instruction"],
        source_image=open_image(Path(source) / "annotation_images" / entry["image_path"]),
        category=list(PIE_CATEGORIES)[int(entry["editing_type_id"])],
        mask=Image.fromarray(decode_mask(entry["mask"])),
        target_prompt=entry["editing_prompt"].replace("[", "").replace("]", ""),
    )


def decode_mask(runs: list[int]) -> np.ndarray:
    """Decode PIE-Bench's mask, a list start, length, start, length, …, to uint8 (512, 512), 255 inside the edit."""
    mask = np.zeros(RESOLUTION**2, dtype=np.uint8)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        mask[start : start + length] = 255
    mask = mask.reshape(RESOLUTION, RESOLUTION)
    # Parity: the border always counts as edited, because its annotations are unreliable.
    mask[[0, -1], :] = mask[:, [0, -1]] = 255
    return mask


# Depth, canny, segmentation. Source: the evaluation sets of ControlNet++ (arXiv 2404.07987), which EditAR also uses.


def list_rows(source: str, split: str = "validation") -> Entries:
    """List the rows of a split, from a folder of parquet files or a data set on the Hub."""
    check_folder_or_hub_id(source, "source")
    folder = Path(source)
    if not folder.exists():
        folder = Path(snapshot_download(source, repo_type="dataset", allow_patterns=f"*{split}*.parquet"))
    files, numbers = sorted(folder.rglob(f"{split}*.parquet")), count()
    if not files:
        raise ValueError(f"`source` {source!r} has no parquet file whose name starts with {split!r}.")
    for path in files:
        with naming(path), pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=16):
                for row in batch.to_pylist():
                    yield f"{next(numbers):05}", row


def decode_image(stored: dict) -> Image.Image:
    """Open an image that `datasets` stored as bytes or as a path, without converting it."""
    return Image.open(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"]))


def crop(image: Image.Image, resolution: int, resampling: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """Resize an image so that its shortest side has `resolution` pixels, then crop the center.

    Source: the image preparation of EditAR (arXiv 2501.04699).
    """
    geometry = compute_crop_geometry(image.height, image.width, resolution, resolution)
    return apply_crop(image, geometry, resolution, resolution, resampling)


def make_translation(task: str, source: str, sample_id: str, row: dict, resolution: int = RESOLUTION) -> Sample:
    def prepare(name: str) -> Image.Image:
        return crop(prepare_rgb_image(decode_image(row[name])), resolution)

    target, labels = prepare("image"), None
    if task == "canny":
        condition_map = make_canny_map(target)
    elif task == "depth":
        condition_map = prepare("control_depth")
    else:
        # The colors of `control_seg` come from a palette of 133 colors, so they do not identify the 171 classes.
        condition_map = prepare("control_seg")
        labels = crop(read_labels(decode_image(row["panoptic_seg_map"])), resolution, Image.Resampling.NEAREST)
    prompt = row["text"] if task != "segmentation" else row.get("detailed_prompt") or row["prompt"]
    return Sample(sample_id, prompt, condition_map, task, target_image=target, labels=labels)


def read_labels(image: Image.Image) -> Image.Image:
    """Read a label map as mode "L". In an image with a palette, the class of a pixel is its index in the palette."""
    classes = np.asarray(image)
    if classes.ndim != 2 or not set(np.unique(classes).tolist()) <= {*range(171), 255}:
        raise ValueError(
            f"`panoptic_seg_map` has the mode {image.mode!r} and values up to {classes.max()}; pass a label map whose "
            "pixels are class numbers from 0 to 170, or 255 for ignored pixels, and not colors."
        )
    return Image.fromarray(classes.astype(np.uint8))


# MagicBrush. Source: arXiv 2306.10012 and its evaluation code.


def list_turns(source: str) -> Entries:
    """List the turns of MagicBrush's unzipped test set. An entry holds the session of a turn and its captions."""
    captions = read_json(Path(source) / "local_descriptions.json")
    for session, turns in read_json(Path(source) / "edit_sessions.json").items():
        for number in range(1, len(turns) + 1):
            yield f"{session}-{number}", (session, number, turns, captions.get(session, {}))


def make_turn(source: str, sample_id: str, entry: tuple[str, int, list, dict]) -> Sample:
    """Make the sample of a turn whose source image is the true image before the turn."""
    session, number, turns, captions = entry
    turn = turns[number - 1]
    image, target = (open_image(Path(source) / "images" / session / turn[name]) for name in ("input", "output"))
    return Sample(
        id=sample_id,
        prompt=turn["instruction"],
        # MagicBrush's evaluation resizes predictions to the size of the target image, so the source image is resized
        # to this size first.
        source_image=image if image.size == target.size else image.resize(target.size, Image.Resampling.BICUBIC),
        category=f"turn {number}",
        target_image=target,
        target_prompt=captions[turn["output"]],
    )


def make_chained_turn(source: str, sample_id: str, entry: tuple[str, int, list, dict]) -> Sample:
    """Make the sample of a turn that edits the prediction of the turn before. Only the last turn is scored."""
    session, number, turns, _ = entry
    previous = f"{session}-{number - 1}" if number > 1 else None
    return replace(make_turn(source, sample_id, entry), previous=previous, is_scored=number == len(turns))


# Any folder


def list_lines(source: str) -> Entries:
    path = Path(source) / "metadata.jsonl"
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            with naming(f"line {number} of {path}"):
                entry = {name: value for name, value in json.loads(line).items() if value is not None}
            yield entry.setdefault("id", f"{number:05}"), entry


def make_folder_sample(source: str, sample_id: str, entry: dict) -> Sample:
    fields: dict[str, Any] = {}
    for name, value in entry.items():
        field, is_file, _ = name.partition("_file_name")
        fields[field] = Path(source) / value if is_file else value
    for name in fields.keys() & {"source_image", "target_image"}:
        fields[name] = open_image(fields[name])
    if "mask" in fields:
        fields["mask"] = open_mask(fields["mask"], fields["source_image"].size)
    return Sample(**fields)


def open_mask(path: Path, source_size: tuple[int, int]) -> Image.Image:
    """Open a mask as the pipeline does: mode "L", the size of the source image, 255 inside the edit, 0 elsewhere."""
    with Image.open(path) as mask:
        is_white = prepare_mask(mask, source_size)
        highest = prepare_rgb_image(mask, background="black").convert("L").getextrema()[1]
    if highest and not is_white.any():
        raise ValueError(f"the mask has no pixel above {highest}; it must be 255 (white) inside the edit, 0 elsewhere.")
    return Image.fromarray(is_white).convert("L")


@dataclass(frozen=True)
class Kind:
    """The definition of a benchmark: how to read it and how to score it.

    Args:
        summary (`str`): One line about the benchmark and its files.
        list_entries (`Callable`): Yields the id and the entry of each sample, given a folder or Hub id.
        make_sample (`Callable`): Makes a sample from the folder or Hub id, the id of the sample and its entry.
        metrics (tuple of `str`): Default metrics, keys of `table.METRICS`. Reports rank samples by the first of them.
        trade_off (tuple of two `str`): The metrics that guidance plots show: one of preservation, one of edit quality.
        default_source (`str`, *optional*): The Hub id of the published benchmark.
        expected (mapping or `int`, *optional*): Number of samples of the published benchmark, by category or in total.
        models (mapping): Networks of the published results, where they differ from `features.DEFAULT_MODELS`.
        takes_any_size (`bool`): Whether predictions whose size differs from the sample's are scored too.
    """

    summary: str
    list_entries: Callable[[str], Entries]
    make_sample: Callable[..., Sample]
    metrics: tuple[str, ...]
    trade_off: tuple[str, str]
    default_source: str | None = None
    expected: Mapping[str, int] | int | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    takes_any_size: bool = False

    def read_samples(self, source: str, wanted: Container[str] | None = None, **options: Any) -> Iterator[Sample]:
        """Read all samples, or only the samples whose ids are in `wanted`."""
        with naming(source):
            for sample_id, entry in self.list_entries(source):
                if wanted is None or sample_id in wanted:
                    with naming(f"sample {sample_id}"):
                        sample = self.make_sample(source, sample_id, entry, **options)
                        check_sample(sample)
                    yield sample


def check_sample(sample: Sample) -> None:
    """Check that a sample can be generated, saved and scored."""
    for name in ("id", "prompt", "task", "category"):
        if not isinstance(value := getattr(sample, name), str) or not value.strip():
            raise ValueError(f"`{name}` is {value!r}; it must be text.")
    # File names may have 255 bytes, and the temporary file of a prediction has a longer name than the prediction.
    if not re.fullmatch(r"\w[\w.-]*", sample.id) or len(sample.id.encode()) > 200:
        raise ValueError(
            f"`id` is {sample.id!r}, but it names the prediction's file: use letters, digits, dots and dashes, at most "
            "200 bytes."
        )
    check_choice("task", sample.task, TASK_PREFIXES)
    for name in IMAGES:
        image = getattr(sample, name)
        if image is not None and image.size != sample.size:
            raise ValueError(f"`{name}` has {image.size} pixels, but the result has {sample.size}; resize it.")


DEPTH_EVAL, COCO = "limingcv/MultiGen-20M_depth_eval", "limingcv/Captioned_COCOStuff"
MAGICBRUSH: dict[str, Any] = {
    "metrics": ("l1", "l2", "clip_i", "dino", "clip_t"),
    "trade_off": ("l1", "clip_t"),
    "expected": 1053,
    "models": {"clip": "openai/clip-vit-base-patch32"},
    "takes_any_size": True,
}
BENCHMARKS = {
    "pie-bench": Kind(
        "PIE-Bench: 700 edits with masks; a folder with mapping_file.json and annotation_images/",
        list_pie_bench,
        make_pie_sample,
        metrics=(
            *("structure_distance", "psnr_unedited", "lpips_unedited", "mse_unedited", "ssim_unedited"),
            *("clip_whole", "clip_edited"),
        ),
        trade_off=("structure_distance", "clip_whole"),
        expected=PIE_CATEGORIES,
    ),
    "depth": Kind(
        "images from depth maps",
        list_rows,
        partial(make_translation, "depth"),
        metrics=("depth_rmse", "fid"),
        trade_off=("depth_rmse", "fid"),
        default_source=DEPTH_EVAL,
        expected=5000,
    ),
    "canny": Kind(
        "images from canny edges, which are computed from the images of the depth benchmark",
        list_rows,
        partial(make_translation, "canny"),
        metrics=("edge_f1", "edge_ms_ssim", "edge_psnr", "fid"),
        trade_off=("edge_f1", "fid"),
        default_source=DEPTH_EVAL,
        expected=5000,
    ),
    "segmentation": Kind(
        "images from COCOStuff segmentation maps",
        list_rows,
        partial(make_translation, "segmentation"),
        metrics=("mean_iou", "fid"),
        trade_off=("mean_iou", "fid"),
        default_source=COCO,
        expected=5000,
    ),
    "magicbrush": Kind(
        "MagicBrush's test set, each turn edits the true image before it; a folder, the unzipped test set",
        list_turns,
        make_turn,
        **MAGICBRUSH,
    ),
    "magicbrush-multi-turn": Kind(
        "MagicBrush's test set, each turn edits the result of the turn before, and the last turn is scored; a folder, "
        "the unzipped test set",
        list_turns,
        make_chained_turn,
        **MAGICBRUSH,
    ),
    "folder": Kind(
        "any folder of images with metadata.jsonl",
        list_lines,
        make_folder_sample,
        metrics=("l1", "l2", "psnr", "ssim", "psnr_unedited", "ssim_unedited"),
        trade_off=("psnr_unedited", "l1"),
    ),
}


class Benchmark:
    """A benchmark whose samples have all been read and checked once.

    Args:
        name (`str`): A key of `BENCHMARKS`.
        source (`str`, *optional*): Folder or Hub id; defaults to the Hub id of the published benchmark.
        allow_partial (`bool`, *optional*, defaults to `False`): Accept a part of the benchmark. Reports mention it.
        resolution (`int`, *optional*): Side in pixels of the images of depth, canny and segmentation; defaults to 512.

    Attributes:
        chains (`list[list[str]]`): The ids of the samples, in order. A chain holds a sample, and after it the samples
            that edit its result further.
        categories (`dict`): Id of each sample → its category.
        scored (`list[str]`): The ids of the samples whose predictions are scored.
        lacking (`dict`): Name of an image, such as `"mask"` → id of the first sample without this image.
        info (`dict`): Facts about the benchmark for `metrics.json`.

    Raises:
        ValueError: If the files are not the published benchmark.
    """

    def __init__(
        self, name: str, source: str | Path | None = None, allow_partial: bool = False, resolution: int | None = None
    ):
        check_choice("benchmark", name, BENCHMARKS)
        self.name, self.kind = name, BENCHMARKS[name]
        self.options = {} if resolution is None else {"resolution": check_integer("resolution", resolution)}
        if self.options and "resolution" not in inspect.signature(self.kind.make_sample).parameters:
            raise ValueError(
                f"`resolution` is {resolution}, but the benchmark {name} has no such option; leave it out."
            )
        source = source or self.kind.default_source
        if source is None:
            raise ValueError(f"`source` is missing; give the folder of the benchmark {name}: {self.kind.summary}.")
        self.source = str(Path(source).resolve()) if Path(source).exists() else str(source)
        self.chains: list[list[str]] = []
        self.categories: dict[str, str] = {}
        self.scored: list[str] = []
        self.lacking: dict[str, str] = {}
        sizes: Counter[str] = Counter()
        for sample in show_progress(self.read(), desc=f"reading {name}"):
            if sample.id in self.categories:
                raise ValueError(f"`source`: two samples have the `id` {sample.id!r}; give each sample its own `id`.")
            if sample.previous is None:
                self.chains.append([])
            elif not self.chains or sample.previous not in self.chains[-1]:
                raise ValueError(
                    f"`source`: `previous` of {sample.id} is {sample.previous!r}; name an earlier sample of its chain."
                )
            self.chains[-1].append(sample.id)
            self.categories[sample.id] = sample.category
            self.scored += [sample.id] * sample.is_scored
            for missing in (image for image in IMAGES if getattr(sample, image) is None):
                self.lacking.setdefault(missing, sample.id)
            sizes["{}×{}".format(*sample.size)] += 1
        if not self.categories:
            raise ValueError("`source` has no samples.")
        expected = self.kind.expected
        found = dict(Counter(self.categories.values())) if isinstance(expected, Mapping) else len(self.categories)
        is_complete = expected is None or found == expected
        if not is_complete and not allow_partial:
            raise ValueError(
                f"`source` has {found} samples; the published benchmark has {expected}. To use only a part of it, pass "
                "`allow_partial`; reports mention this."
            )
        self.info = {"benchmark": name, "num_samples": len(self.categories), "is_complete": is_complete, "sizes": sizes}

    def read(self, wanted: Container[str] | None = None) -> Iterator[Sample]:
        """Read all samples, or only the samples whose ids are in `wanted`."""
        return self.kind.read_samples(self.source, wanted, **self.options)
