"""Prepared benchmarks: every source becomes one folder with `samples.parquet` and `task.json`.

`Benchmark(folder)` reads it; so does `datasets.load_dataset("parquet", data_files="folder/samples.parquet")`. What a
sample holds is said by `Sample`; what a benchmark does not have is null. `task.json` says which task it is, how many
samples of which category and size there are, whether that is all of the published benchmark, and a fingerprint of all
its contents.
"""

import hashlib
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..data_files import load_files
from ..processing_editar import TASK_PREFIXES, compute_crop_geometry, prepare_rgb_picture
from .files import write_json


SAMPLES_FILE, INFO_FILE = "samples.parquet", "task.json"
PICTURES = ("source_image", "target_image", "mask", "labels")
ROWS_PER_GROUP = 50
# In bytes. File systems take names of 255, and temporary files have longer ones than what they become.
LONGEST_ID = 200

FEATURES = datasets.Features(
    id=datasets.Value("string"),
    prompt=datasets.Value("string"),
    task=datasets.Value("string"),
    category=datasets.Value("string"),
    source_image=datasets.Image(),
    target_image=datasets.Image(),
    mask=datasets.Image(),
    labels=datasets.Image(),
    target_prompt=datasets.Value("string"),
    previous=datasets.Value("string"),
    is_scored=datasets.Value("bool"),
    details=datasets.Value("string"),
)


@dataclass
class Sample:
    """One sample of a benchmark.

    Args:
        id (`str`): Its name, and that of its prediction's file.
        prompt (`str`): The instruction or caption, without a task's prefix.
        source_image (`PIL.Image.Image`): The picture to edit, or the condition map.
        task (`str`): `"edit"`, `"canny"`, `"depth"` or `"segmentation"`.
        category (`str`): The part of the benchmark it belongs to; figures are also given by category.
        target_image (`PIL.Image.Image`, *optional*): The true result.
        mask (`PIL.Image.Image` of mode "L", *optional*): 255 where the edit is, 0 elsewhere.
        labels (`PIL.Image.Image` of mode "L", *optional*): The class of every pixel; 255 is ignored.
        target_prompt (`str`, *optional*): What the result should show, for CLIP.
        previous (`str`, *optional*): The sample whose result is edited further, in place of `source_image`.
        is_scored (`bool`): Whether its prediction counts, or is a step on the way.
        details (`dict`): What else the scoring of its task needs.
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


class Benchmark:
    """A prepared benchmark: a sequence of samples, which are decoded when they are asked for.

    Args:
        folder (`str` or `Path`): What `write_benchmark` wrote.

    Attributes:
        info (`dict`): What `task.json` says.
        ids (`list[str]`): The samples' ids, in order.

    Raises:
        ValueError: If the folder holds none.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / INFO_FILE).exists():
            raise ValueError(f"`data` {str(folder)!r} has no {INFO_FILE}; make it with `editar-hf evaluate prepare`.")
        self.info = json.loads((self.folder / INFO_FILE).read_text(encoding="utf-8"))
        self.rows = load_files("parquet", [self.folder / SAMPLES_FILE], "train").cast(FEATURES)
        self.ids = self.read_column("id")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        return Sample(**row | {"details": json.loads(row["details"])})

    def read_column(self, name: str) -> list:
        """Read one column without decoding any picture."""
        return self.rows[name][:]


def write_benchmark(
    samples: Iterable[Sample],
    output_dir: str | Path,
    task: str,
    source: str,
    expected: Mapping[str, int] | int | None = None,
    allow_partial: bool = False,
) -> None:
    """Write samples as a folder, under a temporary name until it is whole.

    Args:
        samples (iterable of `Sample`): The samples, in their order.
        output_dir (`str` or `Path`): The new folder.
        task (`str`): The task's name.
        source (`str`): Where they come from.
        expected (mapping or `int`, *optional*): How many samples the published benchmark has, by category or in all.
        allow_partial (`bool`): Whether other numbers will do.

    Raises:
        ValueError: If a sample is not what it should be, or there are not as many as expected.
    """
    output_dir = Path(output_dir)
    unfinished = output_dir.with_name(f".unfinished-{output_dir.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        info = {"task": task, "source": source, **write_rows(samples, unfinished / SAMPLES_FILE)}
        found = info["categories"] if isinstance(expected, Mapping) else info["num_samples"]
        info |= {"expected": expected, "is_complete": expected is None or found == expected}
        if not info["is_complete"] and not allow_partial:
            raise ValueError(
                f"`source` has {found} samples; the published benchmark has {expected}. A part of it is prepared with "
                "`allow_partial`, and reports then say so."
            )
        write_json(unfinished / INFO_FILE, info)
        unfinished.rename(output_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_new(output_dir: str | Path) -> None:
    """Refuse a folder that is already there."""
    if Path(output_dir).exists():
        raise ValueError(f"`output_dir` {str(output_dir)!r} exists; name a new folder, or delete that one.")


def write_rows(samples: Iterable[Sample], path: Path) -> dict:
    """Check and write samples as one parquet file, a few at a time; return their counts and their fingerprint."""
    ids, categories, sizes, digest = set(), Counter(), Counter(), hashlib.sha256()
    with pq.ParquetWriter(path, FEATURES.arrow_schema) as writer:
        samples = iter(samples)
        while group := list(islice(samples, ROWS_PER_GROUP)):
            for sample in group:
                check_sample(sample, ids)
                ids.add(sample.id)
                categories[sample.category] += 1
                sizes["{}×{}".format(*sample.size)] += 1
                update_digest(digest, sample)
            rows = [encode_row(sample) for sample in group]
            writer.write_table(pa.Table.from_pylist(rows, FEATURES.arrow_schema))
    if not ids:
        raise ValueError("`source` has no samples.")
    return {
        "num_samples": len(ids),
        "categories": dict(categories),
        "sizes": dict(sizes),
        "fingerprint": f"sha256:{digest.hexdigest()}",
    }


def check_sample(sample: Sample, earlier_ids: set[str]) -> None:
    """Refuse a sample that could not be generated, saved or scored."""
    is_name = re.fullmatch(r"\w[\w.-]*", sample.id) and len(sample.id.encode()) <= LONGEST_ID
    if not is_name or sample.id in earlier_ids:
        raise ValueError(
            f"`id` is {sample.id!r}; give each sample one of its own, of letters, digits, dots and dashes, at most "
            f"{LONGEST_ID}: its prediction's file is named by it."
        )
    if sample.task not in TASK_PREFIXES:
        raise ValueError(f"`task` of {sample.id} is {sample.task!r}; the tasks are {', '.join(TASK_PREFIXES)}.")
    if sample.previous is not None and sample.previous not in earlier_ids:
        raise ValueError(f"`previous` of {sample.id} is {sample.previous!r}, which is no earlier sample.")
    if not sample.prompt.strip():
        raise ValueError(f"`prompt` of {sample.id} is empty.")
    for name in PICTURES:
        picture = getattr(sample, name)
        if picture is not None and picture.size != sample.size:
            width, height = sample.size
            raise ValueError(f"`{name}` of {sample.id} has {picture.size} pixels; its result has {width}×{height}.")
    if sample.mask is not None and 0 < (highest := sample.mask.getextrema()[1]) < 128:
        raise ValueError(
            f"`mask` of {sample.id} has no pixel above {highest}; it is 255 (white) where the edit is and 0 elsewhere."
        )


def update_digest(digest, sample: Sample) -> None:
    """Add all that a sample holds, pictures as pixels, to a fingerprint."""
    words = {name: value for name, value in vars(sample).items() if name not in PICTURES}
    digest.update(json.dumps(words, sort_keys=True).encode())
    for name in PICTURES:
        if (picture := getattr(sample, name)) is not None:
            digest.update(f"{name} {picture.mode} {picture.size}".encode() + picture.tobytes())


def encode_row(sample: Sample) -> dict:
    """Encode a sample as `datasets` stores it: pictures lossless."""
    row = {name: getattr(sample, name) for name in FEATURES}
    for name in PICTURES:
        if row[name] is not None:
            buffer = io.BytesIO()
            row[name].save(buffer, "PNG")
            row[name] = {"bytes": buffer.getvalue(), "path": None}
    return row | {"details": json.dumps(sample.details, sort_keys=True)}


def crop_picture(picture: Image.Image, resolution: int) -> Image.Image:
    """Bring a picture to a square: transparency over white, shortest side by Lanczos, centre crop.

    Source: the image preparation of EditAR (arXiv 2501.04699).
    """
    return _crop(prepare_rgb_picture(picture), resolution, Image.Resampling.LANCZOS)


def crop_labels(labels: Image.Image, resolution: int) -> Image.Image:
    """Bring a map of classes, of mode "L", to the square that `crop_picture` makes, without mixing classes."""
    return _crop(labels, resolution, Image.Resampling.NEAREST)


def _crop(picture: Image.Image, resolution: int, resampling: Image.Resampling) -> Image.Image:
    crop = compute_crop_geometry(picture.height, picture.width, resolution, resolution)
    resized = picture.resize((crop.resized_width, crop.resized_height), resampling)
    return resized.crop((crop.left, crop.top, crop.left + resolution, crop.top + resolution))
