"""Encode a data set of pairs as tokens once, so that training need not do it in every step.

    python examples/precompute_tokens.py --dataset my-pairs --split train --vq-model examples/sticker-editor/vq_model \
        --output-dir my-tokens --resolution 64

The parquet shards hold the tokens of both images, the prompt and the task. `examples/train_editar.py --dataset
my-tokens` trains on them. `--pipeline` in place of `--vq-model` also stores the states of its text encoder, for
training with a frozen text encoder; the states of FLAN-T5-XL take 0.5 MB per pair in bfloat16.

Existing shards are kept, so a second run resumes the first. With `torchrun` or `accelerate launch`, several processes
share the shards. A recipe is encoded one data set at a time: `--recipe examples/recipes/editar.yaml --dataset-name
pipe-add`.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import datasets
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from tqdm import tqdm

from editar_hf import EditARImageProcessor, EditARPipeline, EditARVQModel
from editar_hf.io import atomic_path
from editar_hf.pipelines.hub import check_folder_or_hub_id
from editar_hf.training.arguments import parse_arguments
from editar_hf.training.data import pack_states
from editar_hf.training.dataset_specs import MADE_FROM_KEY, DatasetSpec, list_files, load_recipe, open_dataset
from editar_hf.training.rows import BadRowCount, RowReader


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "folder for the parquet files"})
    resolution: int | None = field(default=None, metadata={"help": "pixels per side; default: the pipeline's"})
    vq_model: str | None = field(default=None, metadata={"help": "folder or Hub id of an EditARVQModel"})
    pipeline: str | None = field(default=None, metadata={"help": "folder or Hub id of a pipeline, for text states"})
    dataset: str | None = field(default=None, metadata={"help": "Hub id, folder or pattern of files"})
    recipe: str | None = field(
        default=None, metadata={"help": "YAML file of data sets, of which `dataset_name` names one"}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "name of a data set of the recipe", "aliases": ["--source"]}
    )
    split: str = field(default="train", metadata={"help": "split to encode"})
    source_image_column: str = field(default="source_image", metadata={"help": "column of the images to edit"})
    target_image_column: str = field(default="target_image", metadata={"help": "column of the edited images"})
    prompt_column: str = field(default="prompt", metadata={"help": "column of the instructions"})
    resize_mode: str = field(
        default="crop", metadata={"help": "how images are resized: crop (keep the centre) or stretch"}
    )
    max_bad_rows_fraction: float = field(default=0.05, metadata={"help": "fraction of rows that may be unusable"})
    batch_size: int = field(default=64, metadata={"help": "pairs encoded at once"})
    shard_size: int = field(default=20000, metadata={"help": "pairs per file"})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "dtype of the networks"})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})


def build_spec(args: Arguments) -> DatasetSpec:
    """Describe the data set to encode, which is downloaded as a whole first."""
    if (args.dataset is None) == (args.recipe is None) or (args.recipe is None) != (args.dataset_name is None):
        raise ValueError("Give `dataset`, or `recipe` and `dataset_name`.")
    if args.recipe is None:
        names = ("source_image", "target_image", "prompt")
        columns = {name: getattr(args, f"{name}_column") for name in names}
        return DatasetSpec(args.dataset, args.split, columns=columns, streaming=False)
    specs = {spec.name: spec for spec in load_recipe(args.recipe)}
    if args.dataset_name not in specs:
        raise ValueError(f"`dataset_name` is {args.dataset_name!r}; {args.recipe} has {', '.join(specs)}.")
    return replace(specs[args.dataset_name], streaming=False)


@dataclass
class Encoder:
    """Encode rows of a data set, in batches, into columns of tokens."""

    spec: DatasetSpec
    vq_model: EditARVQModel
    row_reader: RowReader
    bad_rows: BadRowCount
    batch_size: int
    pipeline: EditARPipeline | None

    def read_rows(self, dataset: datasets.Dataset, start: int) -> Iterator[dict]:
        """Read the usable rows of `dataset`, whose first is row `start` of the data set."""
        read = partial(self.row_reader.read, spec=self.spec)
        return self.bad_rows.read(enumerate(dataset, start), read, self.spec.name)

    def encode_batch(self, rows: list[dict]) -> list[dict]:
        """Encode the two images of each row, and its mask if there is one."""
        pixel_values = self.prepare([row[name] for name in ("source_image", "target_image") for row in rows])
        pixel_values = pixel_values.to(self.vq_model.device, self.vq_model.dtype)
        image_tokens = self.vq_model.encode(pixel_values.contiguous(memory_format=torch.channels_last)).image_tokens
        source, target = image_tokens.tolist()[: len(rows)], image_tokens.tolist()[len(rows) :]
        encoded = [
            {"source_image_tokens": s, "target_image_tokens": t, "prompt": row["prompt"], "task": row["task"]}
            for row, s, t in zip(rows, source, target, strict=True)
        ]
        if "edit_mask" in rows[0]:
            encoded = [{**new, "edit_mask": row["edit_mask"]} for new, row in zip(encoded, rows, strict=True)]
        if self.pipeline is not None:
            states = self.pipeline.encode_prompt([row["prompt"] for row in rows], [row["task"] for row in rows]).cpu()
            encoded = [{**row, "prompt_embeds": pack_states(s)} for row, s in zip(encoded, states, strict=True)]
        return encoded

    def prepare(self, images: list) -> torch.Tensor:
        reader = self.row_reader
        size = {"height": reader.height, "width": reader.width}
        return reader.image_processor(images, size=size, resize_mode=reader.resize_mode).pixel_values

    @torch.no_grad()
    def encode_shard(self, dataset: datasets.Dataset, start: int, path: Path):
        """Write one shard, completely or not at all."""
        rows, encoded = self.read_rows(dataset, start), []
        while batch := list(islice(rows, self.batch_size)):
            encoded += self.encode_batch(batch)
        self.bad_rows.judge()
        table = datasets.Dataset.from_list(encoded).data.table
        # Training refuses to validate on the images that its tokens were computed from.
        spec = self.spec
        dataset = os.path.abspath(spec.dataset) if list_files(spec) else spec.dataset
        made_from = {"dataset": dataset, "config_name": spec.config_name, "split": spec.split}
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), MADE_FROM_KEY: json.dumps(made_from)})
        with atomic_path(path) as unfinished:
            pq.write_table(table, unfinished)


def load_networks(args: Arguments) -> tuple[EditARVQModel, EditARPipeline | None]:
    """Load the VQ model, alone or with its pipeline."""
    if (args.vq_model is None) == (args.pipeline is None):
        raise ValueError("Give `vq_model` or `pipeline`: one of them, and not both.")
    if args.pipeline is None and args.resolution is None:
        raise ValueError("Give `resolution`: a VQ model has none of its own. A pipeline has.")
    name = "vq_model" if args.pipeline is None else "pipeline"
    check_folder_or_hub_id(getattr(args, name), name)
    dtype = getattr(torch, args.dtype)
    if args.pipeline is None:
        pipeline, vq_model = None, EditARVQModel.from_pretrained(args.vq_model, dtype=dtype).to(args.device).eval()
    else:
        pipeline = EditARPipeline.from_pretrained(args.pipeline, dtype=dtype).to(args.device)
        vq_model = pipeline.vq_model
    return vq_model.to(memory_format=torch.channels_last), pipeline


def resolve_size(args: Arguments, vq_model: EditARVQModel, pipeline: EditARPipeline | None) -> tuple[int, int]:
    """Return height and width, and refuse sizes that the networks do not support."""
    stride, resolution = vq_model.config.stride, args.resolution
    if pipeline is not None:
        try:
            return pipeline.resolve_size(resolution, resolution)
        except ValueError as error:
            raise ValueError(f"`resolution` is {resolution}: {error}") from error
    if resolution < stride or resolution % stride:
        raise ValueError(f"`resolution` is {resolution}; it must be a multiple of {stride}, the pixels per token.")
    return resolution, resolution


def check_shards(output_dir: Path, split: str, num_shards: int):
    """Refuse a folder with shards of another size, which would hold some pairs twice."""
    paths = sorted(output_dir.glob(f"{split}-*-of-*.parquet"))
    if others := [path.name for path in paths if not path.stem.endswith(f"-of-{num_shards:05d}")]:
        raise ValueError(
            f"`output_dir` {output_dir} holds {others[0]}, and this data set makes {num_shards} shards of "
            "`shard_size`. Give another folder, or the data set and the size those shards were made with."
        )


def main():
    args = parse_arguments(Arguments)
    spec = build_spec(args)
    # Without an accelerator, accelerate joins processes only when it is told that they are to use the CPU.
    process = PartialState(cpu=not torch.accelerator.is_available())
    vq_model, pipeline = load_networks(args)
    height, width = size = resolve_size(args, vq_model, pipeline)
    dataset = open_dataset(spec)
    image_processor = EditARImageProcessor(size={"height": height, "width": width}, stride=vq_model.config.stride)
    row_reader = RowReader(image_processor, *size, args.resize_mode, vq_model.config.stride)
    bad_rows = BadRowCount(args.max_bad_rows_fraction)
    encoder = Encoder(spec, vq_model, row_reader, bad_rows, args.batch_size, pipeline)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(dataset), args.shard_size)
    check_shards(output_dir, args.split, len(starts))
    own = range(process.process_index, len(starts), process.num_processes)
    for index in tqdm(own, desc="shards", disable=not process.is_main_process):
        path = output_dir / f"{args.split}-{index:05d}-of-{len(starts):05d}.parquet"
        if not path.exists():
            rows = range(starts[index], min(starts[index] + args.shard_size, len(dataset)))
            encoder.encode_shard(dataset.select(rows), rows.start, path)


if __name__ == "__main__":
    main()
