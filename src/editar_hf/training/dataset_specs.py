"""Open data sets of pairs, on the Hub or on disk, under our column names; and read recipes that mix several of them.

Images stay encoded here and `rows.py` decodes them. A broken file is then one bad row, and does not end the run.
"""

import codecs
import contextlib
import glob
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import yaml
from datasets.data_files import FILES_TO_IGNORE
from transformers.utils import logging

from ..checks import check_flag, check_number, check_texts
from ..data_files import load_files, name_split
from ..pipelines.hub import check_folder_or_hub_id
from ..processing_editar import TASK_PREFIXES


logger = logging.get_logger(__name__)
PIXEL_COLUMNS = ("source_image", "target_image", "prompt")
TOKEN_COLUMNS = ("source_image_tokens", "target_image_tokens", "prompt")
# `mask` is an image and `edit_mask` holds a flag for each token. `task` chooses the prefix of the prompt.
# `prompt_embeds` holds precomputed text states.
OPTIONAL_COLUMNS = ("mask", "edit_mask", "task", "prompt_embeds")
# How `rows.py` rewrites a row, and the column that it computes.
REWRITES: dict[str, str | None] = {"canny": "source_image", "removal": None}
# Suffixes of the files that data sets are read from, and what `datasets` calls these formats.
FILE_KINDS = {"parquet": "parquet", "tar": "webdataset", "jsonl": "json"}
# Metadata key of a parquet file of tokens that says which data set they were computed from.
MADE_FROM_KEY = b"editar_made_from"


@dataclass
class DatasetSpec:
    """Describe a data set of pairs and how to read it.

    The published PIPE pairs, read backwards:

    ```python
    DatasetSpec(
        "paint-by-inpaint/PIPE",
        columns={"source_image": "target_img", "target_image": "source_img", "prompt": "Instruction_VLM-LLM"},
        rewrite="removal",
        probability=0.125,
    )
    ```

    Args:
        dataset (`str`): Hub id; a folder or a pattern of parquet files or of webdataset tars; a pattern of JSON-lines
            files; or an image folder with `metadata.jsonl`.
        split (`str`): Its split. In a folder, the files whose names start with the split's name are read. An image
            folder may have a folder for each split.
        config_name (`str`, *optional*): The configuration of a data set on the Hub.
        name (`str`, *optional*): Its name in logs; defaults to `dataset`.
        probability (`float`): How often rows are drawn from it, relative to the other data sets of a recipe.
        columns (`Mapping`): Maps our column names to those of the data set where they differ. A list names
            alternatives, of which the first that exists is read.
        task (`str`, *optional*): The task of every row; defaults to the column `task`, or else to `"edit"`.
        rewrite (`str`, *optional*): `"canny"` computes the source image from the edges of the target image.
            `"removal"` turns an instruction "add …" into "Remove …".
        image_folder (`str`, *optional*): The folder that paths in image columns start from.
        streaming (`bool`): Whether to read a data set of the Hub while it is downloaded, and tars without unpacking.

    Raises:
        ValueError: If there is no data set, the probability is not positive, or the task or rewrite is unknown.
    """

    dataset: str
    split: str = "train"
    config_name: str | None = None
    name: str = ""
    probability: float = 1.0
    columns: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    task: str | None = None
    rewrite: str | None = None
    image_folder: str | None = None
    streaming: bool = True

    def __post_init__(self):
        for name in ("dataset", "split", "config_name", "name", "image_folder"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name in ("dataset", "split")):
                raise ValueError(f"`{name}` is {value!r:.80}; give a string.")
        if not self.dataset:
            raise ValueError("`dataset` is empty; give a Hub id, a folder or a pattern of files.")
        self.name = self.name or self.dataset
        if check_number("probability", self.probability) <= 0:
            raise ValueError(f"`probability` of {self.name!r} is {self.probability}; it must be positive.")
        if self.task is not None and not (isinstance(self.task, str) and self.task in TASK_PREFIXES):
            raise ValueError(f"`task` of {self.name!r} is {self.task!r}; the tasks are {', '.join(TASK_PREFIXES)}.")
        if self.rewrite is not None and not (isinstance(self.rewrite, str) and self.rewrite in REWRITES):
            raise ValueError(f"`rewrite` of {self.name!r} is {self.rewrite!r}; there are {', '.join(REWRITES)}.")
        check_flag("streaming", self.streaming)
        if not isinstance(self.columns, Mapping):
            raise ValueError(f"`columns` of {self.name!r} is {self.columns!r:.80}; map our names to theirs.")
        for ours, theirs in self.columns.items():
            check_texts(f"columns[{ours!r}]", theirs)


def load_recipe(path: str | Path) -> list[DatasetSpec]:
    """Read a recipe: a YAML file with a list `datasets`, whose items have the fields of `DatasetSpec`.

    Raises:
        ValueError: If the file is not such a recipe.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"`recipe` {str(path)!r} does not load: {error}") from error
    if isinstance(recipe, dict) and "sources" in recipe:
        logger.warning(f"`recipe` {str(path)!r}: rename `sources` to `datasets`; the next version does not read it.")
        recipe = {"datasets": recipe["sources"]} | recipe
    items = recipe.get("datasets") if isinstance(recipe, dict) else None
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"`recipe` {str(path)!r} has no list `datasets`, whose items have `dataset` and other fields.")
    known = [item.name for item in fields(DatasetSpec)]
    if unknown := sorted({str(name) for item in items for name in item} - set(known)):
        raise ValueError(f"`recipe` {str(path)!r} names {', '.join(unknown)}; a data set has {', '.join(known)}.")
    if not all("dataset" in item for item in items):
        raise ValueError(f"`recipe` {str(path)!r} has a data set without the field `dataset`.")
    try:
        return [DatasetSpec(**item) for item in items]
    except ValueError as error:
        raise ValueError(f"`recipe` {str(path)!r}: {error}") from error


def open_dataset(spec: DatasetSpec) -> datasets.Dataset | datasets.IterableDataset:
    """Open a data set with the columns that training reads, under our names and with its images still encoded.

    Returns:
        An `IterableDataset` if the data set is streamed from the Hub or from tars, and else a `Dataset`.

    Raises:
        ValueError: If nothing is found or a column is missing. The message lists the columns that exist.
    """
    dataset = load_split(spec)
    if isinstance(dataset, datasets.IterableDataset) and dataset.column_names is None:
        dataset = dataset.cast(datasets.Features.from_dict(next(iter(dataset.take(1)))))
    theirs = find_columns(spec, dataset.column_names)
    dataset = dataset.select_columns(list(dict.fromkeys(theirs.values())))
    for name in dataset.column_names:
        if isinstance(dataset.features[name], datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return rename_columns(dataset, {name: ours for ours, name in theirs.items()})


def rename_columns(
    dataset: datasets.Dataset | datasets.IterableDataset, names: Mapping[str, str]
) -> datasets.Dataset | datasets.IterableDataset:
    """Rename columns, also to names that other columns have now, which streams refuse to do in one step."""
    names = {theirs: ours for theirs, ours in names.items() if theirs != ours}
    if not names:
        return dataset
    steps = {theirs: f"{theirs} → {ours}" for theirs, ours in names.items()}
    return dataset.rename_columns(steps).rename_columns({steps[theirs]: ours for theirs, ours in names.items()})


def find_columns(spec: DatasetSpec, present: Sequence[str]) -> dict[str, str]:
    """Map our column names to those of the data set's columns."""
    wanted = TOKEN_COLUMNS if "source_image_tokens" in present else PIXEL_COLUMNS
    wanted = tuple(name for name in wanted if name != REWRITES.get(spec.rewrite or ""))
    names = {ours: spec.columns.get(ours, ours) for ours in (*wanted, *OPTIONAL_COLUMNS)}
    names = {ours: [theirs] if isinstance(theirs, str) else list(theirs) for ours, theirs in names.items()}
    found = {ours: next((name for name in theirs if name in present), None) for ours, theirs in names.items()}
    # An optional column is required once `columns` names it.
    missing = [ours for ours in dict.fromkeys((*wanted, *spec.columns)) if found.get(ours) is None]
    if missing:
        raise ValueError(
            f"`dataset` {spec.dataset!r} lacks {', '.join(' or '.join(names.get(m, [m])) for m in missing)}; it has "
            f"{', '.join(present)}. Name the columns that hold source image, target image and prompt."
        )
    return {ours: theirs for ours, theirs in found.items() if theirs is not None}


def load_split(spec: DatasetSpec) -> datasets.Dataset | datasets.IterableDataset:
    """Load a split with all its columns; a `ValueError` says what was not found and why."""
    path, split, streaming = spec.dataset, spec.split, spec.streaming
    files = list_files(spec)
    if not files:
        check_folder_or_hub_id(path, "dataset")
    check_lines(files)
    try:
        if not files:
            return datasets.load_dataset(path, spec.config_name, split=split, streaming=streaming)
        if not find_files(path, name_split(split)):
            return load_files("imagefolder", files, split)
        kind = files[0].rpartition(".")[2]
        return load_files(FILE_KINDS[kind], files, split, streaming and kind == "tar")
    except Exception as error:  # `datasets` passes on what its many readers raise
        raise ValueError(
            f"`dataset` {path!r} does not load: {describe_error(error)} Give a Hub id, a folder of parquet files or "
            f"images, or a pattern of files, that has the split {split!r}."
        ) from error


def check_lines(files: Sequence[str]) -> None:
    """Refuse JSON lines that are no objects: on a line `null`, pyarrow ends the process."""
    for file in files:
        if file.endswith(".jsonl"):
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip().removeprefix(codecs.BOM_UTF8).startswith(b"{") and line.strip():
                        raise ValueError(f"`dataset`: {file}, line {number} is {line[:40]!r}, which is no JSON object.")


def describe_error(error: BaseException) -> str:
    """Describe an error with its first cause, which errors of `datasets` do not repeat."""
    first = error.__cause__ or error.__context__ or error
    while first.__cause__ is not None:
        first = first.__cause__
    cause = "" if first is error else f" ({type(first).__name__}: {first})"
    return f"{str(error) or type(error).__name__}{cause}"


def list_files(spec: DatasetSpec) -> list[str]:
    """List the local files that a data set is read from, in their order. The list is empty for a data set on the Hub.

    Raises:
        ValueError: If a folder or a pattern has no file of the split.
    """
    path, split = spec.dataset, name_split(spec.split)
    if files := find_files(path, split):
        return files
    folder = Path(path)
    if not folder.is_dir():
        if "*" in path or path.endswith(tuple(f".{kind}" for kind in FILE_KINDS)):
            raise ValueError(f"`dataset` is {path!r}; no {' or '.join(FILE_KINDS)} file matches it.")
        return []
    others = sorted(file.name for kind in ("parquet", "tar") for file in folder.glob(f"*.{kind}"))
    if others:
        raise ValueError(
            f"`dataset` {path!r} has no file whose name starts with {split!r}; it has {', '.join(others[:5])}. Rename "
            "the files, or give a pattern such as `folder/*.parquet`."
        )
    root = folder / split if (folder / split).is_dir() else folder
    found = sorted(glob.glob(f"{glob.escape(str(root))}/**", recursive=True))
    files = [file for file in found if os.path.isfile(file) and os.path.basename(file) not in FILES_TO_IGNORE]
    if not files:
        raise ValueError(
            f"`dataset` {path!r} does not load: it is an empty folder. Give a Hub id, a folder of parquet files or "
            f"images, or a pattern of files, that has the split {split!r}."
        )
    return files


def find_files(path: str, split: str) -> list[str]:
    """Find the files that `path` names: a file, a pattern, or a folder's parquet or tar files of this split."""
    folder = Path(path)
    if not folder.is_dir():
        # Brackets and stars in the part that exists are no pattern.
        present = next(parent for parent in (folder, *folder.parents) if parent.exists())
        pattern = Path(glob.escape(str(present)), *folder.parts[len(present.parts) :])
        return sorted(file for file in glob.glob(str(pattern)) if file.rpartition(".")[2] in FILE_KINDS)
    split = glob.escape(split)
    kinds = (sorted(glob.glob(f"{glob.escape(path)}/{split}*.{kind}")) for kind in ("parquet", "tar"))
    return next((files for files in kinds if files), [])


def check_held_out(training: Sequence[DatasetSpec], validation: DatasetSpec) -> None:
    """Refuse validation on training data: the same files or split, or images that training tokens were computed from.

    Raises:
        ValueError: If training reads a file or split of `validation` too.
    """
    trained_on = {place for spec in training for place in list_origins(spec)}
    if shared := [place for place in list_places(validation) if place in trained_on]:
        raise ValueError(
            f"`validation_dataset` {validation.dataset!r} holds what is trained on, such as {shared[0]}; no pair would "
            "be held out. Move some pairs into a folder `validation` beside a folder `train`, each with its "
            "`metadata.jsonl`, or into files whose names start so."
        )


def list_places(spec: DatasetSpec) -> list[str]:
    """List the files that a data set is read from, or name its split on the Hub."""
    files = [os.path.realpath(file) for file in list_files(spec)]
    return files or [", ".join(filter(None, (spec.dataset, spec.config_name, name_split(spec.split))))]


def list_origins(spec: DatasetSpec) -> list[str]:
    """List where a data set is read from, and what its tokens were computed from if its files say so."""
    places = list_places(spec)
    made_from: set[bytes] = set()
    for file in places:
        if file.endswith(".parquet"):
            with contextlib.suppress(ValueError):  # `open_dataset` says what is wrong with the file
                metadata = pq.read_schema(file).metadata or {}
                made_from |= {metadata[MADE_FROM_KEY]} if MADE_FROM_KEY in metadata else set()
    for content in made_from:
        with contextlib.suppress(ValueError):  # the images may have been moved since
            places += list_places(DatasetSpec(**json.loads(content)))
    return places
