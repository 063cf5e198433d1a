"""Open data sets of pairs, on the Hub or on disk, under our column names; and read recipes that mix several of them.

Images stay encoded here and `rows.py` decodes them. A broken file is then one bad row, and does not end the run.
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
# `mask` is an image and `edit_mask` holds a flag for each token. `task` chooses the prefix of the prompt.
# `prompt_embeds` holds precomputed text states.
OPTIONAL_COLUMNS = ("mask", "edit_mask", "task", "prompt_embeds")
# How `rows.py` rewrites a row: "canny" computes the source image.
REWRITES = ("canny", "removal")
# Suffixes of the files that data sets are read from, and what `datasets` calls these formats.
FILE_KINDS = {"parquet": "parquet", "tar": "webdataset", "jsonl": "json"}
# Metadata key of a parquet file of tokens that names what they were computed from, one place per line.
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
        ValueError: If the file is not such a recipe.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if "sources" in recipe:
            logger.warning(f"`recipe` {str(path)!r}: rename `sources` to `datasets`; the next version reads only that.")
            recipe["datasets"] = recipe["sources"]
        specs = [DatasetSpec(**item) for item in recipe["datasets"]]
    except (OSError, RecursionError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        names = ", ".join(item.name for item in fields(DatasetSpec))
        raise ValueError(
            f"`recipe` {str(path)!r} does not load: {error}. It needs a list `datasets`, whose items have `dataset` "
            f"and any of {names}."
        ) from error
    if not specs:
        raise ValueError(f"`recipe` {str(path)!r} lists no `datasets`.")
    return specs


def open_dataset(spec: DatasetSpec) -> datasets.Dataset | datasets.IterableDataset:
    """Open a data set with the columns that training reads, under our names and with its images still encoded.

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
    # In two steps: a stream refuses to give a column a name that another column has now.
    steps = {name: f"{name} → {ours}" for ours, name in theirs.items() if name != ours}
    if steps:
        dataset = dataset.rename_columns(steps)
        dataset = dataset.rename_columns({step: step.rpartition(" → ")[2] for step in steps.values()})
    return dataset


def find_columns(spec: DatasetSpec, present: Sequence[str]) -> dict[str, str]:
    """Map our column names to those of the data set's columns."""
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
            f"`dataset` {spec.dataset!r} lacks {', '.join(missing)}; it has {', '.join(present)}. Name the columns "
            "that hold source image, target image and prompt."
        )
    return found


def load_split(spec: DatasetSpec) -> datasets.Dataset | datasets.IterableDataset:
    """Load a split with all its columns; a `ValueError` says what was not found and why."""
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
    except Exception as error:  # `datasets` passes on what its many readers raise
        cause = error.__cause__ or error
        raise ValueError(
            f"`dataset` {path!r} does not load: {error} ({type(cause).__name__}: {cause}). Give a Hub id, a folder of "
            f"parquet files or images, or a pattern of files, that has the split {split!r}."
        ) from error


def list_files(spec: DatasetSpec) -> list[str]:
    """List the local files that a data set is read from, in their order. The list is empty for a data set on the Hub.

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


def find_image_folder(path: str, split: str) -> str:
    """Find the folder of a split's images: one of the split's name inside `path`, or else `path`."""
    folder = os.path.join(path, split)
    return folder if os.path.isdir(folder) else path


# Held-out pairs


def check_held_out(training: Sequence[DatasetSpec], validation: DatasetSpec) -> None:
    """Refuse validation on training data: the same files or split, or images that training tokens were computed from.

    Raises:
        ValueError: If training reads a file or split of `validation` too.
    """
    trained_on = [Path(place) for spec in training for place in (*list_places(spec), *list_origins(spec))]
    for place in map(Path, list_places(validation)):
        if any(place.is_relative_to(other) or other.is_relative_to(place) for other in trained_on):
            raise ValueError(
                f"`validation_dataset` {validation.dataset!r} holds what is trained on, such as {place}; no pair would "
                "be held out. Move some pairs into a folder `validation` beside a folder `train`, each with its "
                "`metadata.jsonl`, or into files whose names start so."
            )


def list_places(spec: DatasetSpec) -> list[str]:
    """List the files, or name the folder of images or the split on the Hub, that a data set is read from."""
    split = name_split(spec.split)
    if files := find_files(spec.dataset, split):
        return [os.path.realpath(file) for file in files]
    if os.path.isdir(spec.dataset):
        return [os.path.realpath(find_image_folder(spec.dataset, split))]
    return [", ".join(filter(None, (spec.dataset, spec.config_name, split)))]


def list_origins(spec: DatasetSpec) -> list[str]:
    """List what the tokens of a data set were computed from, if its files say so."""
    origins = set()
    for file in find_files(spec.dataset, name_split(spec.split)):
        if file.endswith(".parquet"):
            metadata = pq.read_schema(file).metadata or {}
            origins.update(metadata.get(MADE_FROM_KEY, b"").decode().splitlines())
    return sorted(origins)
