"""Open data sets of pairs, on the Hub or on disk, and rename their columns; read recipes that mix several data sets.

Images stay encoded here, and `rows.py` decodes them. A broken file is therefore one bad row and does not end the run.
"""

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import yaml
from datasets.data_files import FILES_TO_IGNORE
from transformers.utils import logging

from ..checks import check_choice, check_number
from ..data_files import load_files, name_split
from ..pipelines.hub import check_folder_or_hub_id
from ..processing_editar import TASK_PREFIXES


logger = logging.get_logger(__name__)
PIXEL_COLUMNS = ("source_image", "target_image", "prompt")
TOKEN_COLUMNS = ("source_image_tokens", "target_image_tokens", "prompt")
# `mask` is an image, and `edit_mask` holds a flag for each token. `task` chooses the prefix of the prompt.
# `prompt_embeds` holds precomputed states of the text encoder.
OPTIONAL_COLUMNS = ("mask", "edit_mask", "task", "prompt_embeds")
# How `rows.py` rewrites a row: "canny" computes the source image, "removal" changes the prompt.
REWRITES = ("canny", "removal")
# Suffix of the data files → name of the format in `datasets`.
FILE_KINDS = {"parquet": "parquet", "tar": "webdataset", "jsonl": "json"}
# Metadata key in a parquet file of tokens. Its value names the files or splits that the tokens were computed from, one
# per line.
MADE_FROM_KEY = b"editar_made_from"


@dataclass
class DatasetSpec:
    """Describe a data set of pairs and how to read it.

    This example reads the published PIPE pairs backwards:

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
        split (`str`): The split to read. In a folder, files whose names start with the name of the split are read. An
            image folder may have a subfolder for each split.
        config_name (`str`, *optional*): The configuration of a data set on the Hub.
        name (`str`, *optional*): The name of the data set in logs; defaults to `dataset`.
        probability (`float`): How often rows are drawn from this data set, relative to the others of a recipe.
        columns (`Mapping`): Maps our column names to the column names of the data set where the two differ. If the
            value is a list, the first column that exists is read.
        task (`str`, *optional*): The task of every row; defaults to the column `task`, or else to `"edit"`.
        rewrite (`str`, *optional*): `"canny"` computes the source image from the edges of the target image.
            `"removal"` turns an instruction "add …" into "Remove …".
        image_folder (`str`, *optional*): The folder that paths in image columns are relative to.
        streaming (`bool`): Whether to read a data set of the Hub during its download, and tars without unpacking.

    Raises:
        ValueError: If `dataset` is empty, `probability` is not positive, or `task` or `rewrite` is unknown.
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

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ValueError("`dataset` is empty; give a Hub id, a folder or a pattern of files.")
        self.name = self.name or self.dataset
        if check_number("probability", self.probability) <= 0:
            raise ValueError(f"`probability` of {self.name!r} is {self.probability}; it must be positive.")
        if self.task is not None:
            check_choice("task", self.task, TASK_PREFIXES)
        if self.rewrite is not None:
            check_choice("rewrite", self.rewrite, REWRITES)


def load_recipe(path: str | Path) -> list[DatasetSpec]:
    """Read a recipe: a YAML file with a list `datasets`, whose items have the fields of `DatasetSpec`.

    Raises:
        ValueError: If the file does not load or is not a recipe.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if "sources" in recipe:
            logger.warning(f"`recipe` {str(path)!r}: rename `sources` to `datasets`; the next version drops `sources`.")
            recipe["datasets"] = recipe["sources"]
        specs = [DatasetSpec(**item) for item in recipe["datasets"]]
    except (OSError, RecursionError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        names = ", ".join(item.name for item in fields(DatasetSpec))
        raise ValueError(
            f"`recipe` {str(path)!r} does not load: {error}. It needs a list `datasets`. Each item needs the field "
            f"`dataset`; the possible fields are {names}."
        ) from error
    if not specs:
        raise ValueError(f"`recipe` {str(path)!r} lists no `datasets`.")
    return specs


def open_dataset(spec: DatasetSpec) -> datasets.Dataset | datasets.IterableDataset:
    """Open a data set, keep only the columns that training reads, and give them our names. Images stay encoded.

    Raises:
        ValueError: If no data is found, or if a column is missing; the message then lists the columns that exist.
    """
    dataset = load_split(spec)
    if isinstance(dataset, datasets.IterableDataset) and dataset.column_names is None:
        dataset = dataset.cast(datasets.Features.from_dict(next(iter(dataset.take(1)))))
    theirs = find_columns(spec, dataset.column_names)
    dataset = dataset.select_columns(list(dict.fromkeys(theirs.values())))
    for name in dataset.column_names:
        if isinstance(dataset.features[name], datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    # Two steps, because a streamed data set refuses to rename a column to the current name of another column.
    steps = {name: f"{name} → {ours}" for ours, name in theirs.items() if name != ours}
    if steps:
        dataset = dataset.rename_columns(steps)
        dataset = dataset.rename_columns({step: step.rpartition(" → ")[2] for step in steps.values()})
    return dataset


def find_columns(spec: DatasetSpec, present: Sequence[str]) -> dict[str, str]:
    """Map our column names to the column names of the data set."""
    wanted = TOKEN_COLUMNS if "source_image_tokens" in present else PIXEL_COLUMNS
    wanted = tuple(name for name in wanted if not (spec.rewrite == "canny" and name == "source_image"))
    found, missing = {}, []
    for ours in dict.fromkeys((*wanted, *OPTIONAL_COLUMNS, *spec.columns)):
        theirs = spec.columns.get(ours, ours)
        theirs = [theirs] if isinstance(theirs, str) else theirs
        if name := next((name for name in theirs if name in present), None):
            found[ours] = name
        elif ours in wanted or ours in spec.columns:  # `columns` makes an optional column required
            missing.append(" or ".join(theirs))
    if missing:
        raise ValueError(
            f"`dataset` {spec.dataset!r} lacks {', '.join(missing)}; it has {', '.join(present)}. Give the names of "
            "the columns that hold source image, target image and prompt."
        )
    return found


def load_split(spec: DatasetSpec) -> datasets.Dataset | datasets.IterableDataset:
    """Load a split with all its columns. A `ValueError` says which split did not load and why."""
    path, split, streaming = spec.dataset, spec.split, spec.streaming
    files = list_files(spec)
    if not files:
        check_folder_or_hub_id(path, "dataset")
    try:
        if not files:
            return datasets.load_dataset(path, spec.config_name, split=split, streaming=streaming)
        if not find_files(path, name_split(split)):
            return load_files("imagefolder", files, split)
        kind = files[0].rpartition(".")[2]
        return load_files(FILE_KINDS[kind], files, split, streaming and kind == "tar")
    except Exception as error:  # the readers of `datasets` raise errors of many classes
        cause = error.__cause__
        details = "" if cause is None else f" ({type(cause).__name__}: {cause})"
        raise ValueError(
            f"`dataset` {path!r} does not load: {error}{details}. Give a Hub id, a folder of parquet files or images, "
            f"or a pattern of files, that has the split {split!r}."
        ) from error


def list_files(spec: DatasetSpec) -> list[str]:
    """List the local files of a data set in reading order. The list is empty for a data set on the Hub.

    Raises:
        ValueError: If a folder or a pattern has no file of the split.
    """
    path, split = spec.dataset, name_split(spec.split)
    files = find_files(path, split)
    if not files and os.path.isdir(path):
        others = sorted(file.name for kind in ("parquet", "tar") for file in Path(path).glob(f"*.{kind}"))
        found = [] if others else sorted(glob.glob(f"{glob.escape(find_image_folder(path, split))}/**", recursive=True))
        files = [file for file in found if os.path.isfile(file) and os.path.basename(file) not in FILES_TO_IGNORE]
        if not files:
            raise ValueError(
                f"`dataset` {path!r} has no images, and no parquet or tar file whose name starts with {split!r}; it "
                f"has {', '.join(others[:5]) or 'none at all'}. Rename the files, or give a pattern such as "
                "`folder/*.parquet`."
            )
    elif not files and ("*" in path or path.endswith(tuple(f".{kind}" for kind in FILE_KINDS))):
        raise ValueError(f"`dataset` is {path!r}; no {' or '.join(FILE_KINDS)} file matches it.")
    return files


def find_files(path: str, split: str) -> list[str]:
    """Find the files of `path`, which is a file, a pattern, or a folder with parquet or tar files of the split."""
    folder = Path(path)
    if not folder.is_dir():
        # Brackets and stars in the names of existing folders are not part of the pattern.
        present = next(parent for parent in (folder, *folder.parents) if parent.exists())
        pattern = Path(glob.escape(str(present)), *folder.parts[len(present.parts) :])
        return sorted(file for file in glob.glob(str(pattern)) if file.rpartition(".")[2] in FILE_KINDS)
    split = glob.escape(split)
    kinds = (sorted(glob.glob(f"{glob.escape(path)}/{split}*.{kind}")) for kind in ("parquet", "tar"))
    return next((files for files in kinds if files), [])


def find_image_folder(path: str, split: str) -> str:
    """Find the image folder of a split: the subfolder of `path` with the name of the split, or else `path`."""
    folder = os.path.join(path, split)
    return folder if os.path.isdir(folder) else path


# Held-out pairs


def check_held_out(training: Sequence[DatasetSpec], validation: DatasetSpec) -> None:
    """Refuse to validate on training data: on the same files or split, or on the images behind training tokens.

    Raises:
        ValueError: If training also reads a file or a split of `validation`.
    """
    trained_on = [Path(place) for spec in training for place in (*list_places(spec), *list_origins(spec))]
    for place in map(Path, list_places(validation)):
        if any(place.is_relative_to(other) or other.is_relative_to(place) for other in trained_on):
            raise ValueError(
                f"`validation_dataset` {validation.dataset!r} contains training data, such as {place}. Hold out some "
                "pairs: either use two subfolders `train` and `validation`, each with its own `metadata.jsonl`, or "
                "two files whose names start with `train` and `validation`."
            )


def list_places(spec: DatasetSpec) -> list[str]:
    """List where a data set is read from: its files, its image folder, or its split on the Hub."""
    split = name_split(spec.split)
    if files := find_files(spec.dataset, split):
        return [os.path.realpath(file) for file in files]
    if os.path.isdir(spec.dataset):
        return [os.path.realpath(find_image_folder(spec.dataset, split))]
    return [", ".join(filter(None, (spec.dataset, spec.config_name, split)))]


def list_origins(spec: DatasetSpec) -> list[str]:
    """List the files or splits that the tokens of a data set were computed from, if its files record them."""
    origins = set()
    for file in find_files(spec.dataset, name_split(spec.split)):
        if file.endswith(".parquet"):
            metadata = pq.read_schema(file).metadata or {}
            origins.update(metadata.get(MADE_FROM_KEY, b"").decode().splitlines())
    return sorted(origins)
