"""Encode a data set of pairs as tokens once, so that training does not encode images in every step.

    python examples/precompute_tokens.py --dataset my-pairs --split train --output-dir my-tokens \
        --vq-model projects/stickers/sticker-editor/vq_model --resolution 64

The parquet shards hold the tokens of both images, the prompt and the task. To train on them, run
`examples/train_editar.py --dataset my-tokens`. For training with a frozen text encoder, pass `--pipeline` in place of
`--vq-model`: the shards then also hold the states of its text encoder. The states of FLAN-T5-XL take 0.5 MB per pair in
bfloat16.

Existing shards are kept, so a second run resumes the first. With `torchrun` or `accelerate launch`, several processes
divide the shards among them. A recipe is encoded one data set at a time: `--recipe examples/recipes/editar.yaml
--dataset-name pipe-add`.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import datasets
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from editar_hf import EditARPipeline, EditARVQModel
from editar_hf.io import atomic_path
from editar_hf.pipelines.hub import check_folder_or_hub_id
from editar_hf.training.arguments import PairArguments, parse_arguments
from editar_hf.training.dataset_specs import MADE_FROM_KEY, list_places, open_dataset
from editar_hf.training.rows import BadRowCount, RowReader, pack_states


@dataclass(kw_only=True)
class Arguments(PairArguments):
    output_dir: str = HfArg(help="folder for the parquet files")
    vq_model: str | None = HfArg(default=None, help="folder or Hub id of an EditARVQModel")
    pipeline: str | None = HfArg(default=None, help="folder or Hub id of a pipeline; also stores text states")
    dataset_name: str | None = HfArg(default=None, help="name of a data set of the recipe", aliases=["--source"])
    split: str = HfArg(default="train", help="split to encode")
    max_bad_rows_fraction: float = HfArg(default=0.05, help="fraction of rows that may be unusable")
    batch_size: int = HfArg(default=64, help="pairs encoded at once")
    shard_size: int = HfArg(default=20000, help="pairs per file")
    dtype: Literal["float32", "bfloat16"] = HfArg(default="float32", help="dtype of the networks")
    device: str = HfArg(default="cpu", help="cpu, cuda, ...")


def describe_dataset(args):
    """Describe the data set to encode. It is not streamed, but downloaded before it is encoded."""
    specs = {spec.name: spec for spec in args.describe_datasets(args.split, streaming=False)}
    name = args.dataset_name or next(iter(specs))
    if name not in specs or (args.dataset_name is None and len(specs) > 1):
        raise ValueError(f"`dataset_name` is {args.dataset_name!r}; choose one of {', '.join(specs)}.")
    return replace(specs[name], streaming=False)


def load_networks(args):
    """Load the VQ model, and its pipeline if `args` name one."""
    if (args.vq_model is None) == (args.pipeline is None):
        raise ValueError("Give either `vq_model` or `pipeline`, and not both.")
    name = "vq_model" if args.pipeline is None else "pipeline"
    check_folder_or_hub_id(getattr(args, name), name)
    dtype = getattr(torch, args.dtype)
    if args.pipeline is None:
        pipeline, vq_model = None, EditARVQModel.from_pretrained(args.vq_model, dtype=dtype).to(args.device).eval()
    else:
        pipeline = EditARPipeline.from_pretrained(args.pipeline, dtype=dtype).to(args.device)
        vq_model = pipeline.vq_model
    return vq_model.to(memory_format=torch.channels_last), pipeline


@torch.no_grad()
def encode_batch(rows, image_processor, vq_model, pipeline):
    """Encode the two images of each row, and its prompt if there is a pipeline."""
    images = [row[name] for name in ("source_image", "target_image") for row in rows]
    pixel_values = image_processor(images).pixel_values.to(vq_model.device, vq_model.dtype)
    image_tokens = vq_model.encode(pixel_values.contiguous(memory_format=torch.channels_last)).image_tokens
    columns = {
        "source_image_tokens": image_tokens[: len(rows)].tolist(),
        "target_image_tokens": image_tokens[len(rows) :].tolist(),
        "prompt": [row["prompt"] for row in rows],
        "task": [row["task"] for row in rows],
    }
    if "edit_mask" in rows[0]:
        columns["edit_mask"] = [row["edit_mask"].tolist() for row in rows]
    if pipeline is not None:
        states = pipeline.encode_prompt(columns["prompt"], columns["task"]).cpu()
        columns["prompt_embeds"] = [pack_states(state) for state in states]
    return datasets.Dataset.from_dict(columns)


def write_shard(path, batches, spec):
    """Write one shard, completely or not at all."""
    table = datasets.concatenate_datasets(batches).data.table
    # Training refuses to validate on the images that its tokens were computed from.
    made_from = {MADE_FROM_KEY: "\n".join(list_places(spec))}
    with atomic_path(path) as unfinished:
        pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **made_from}), unfinished)


def main():
    args = parse_arguments(Arguments)
    spec = describe_dataset(args)
    # Without an accelerator, Accelerate connects the processes only if it is told to use the CPU.
    process = PartialState(cpu=not torch.accelerator.is_available())
    vq_model, pipeline = load_networks(args)
    image_processor = args.build_image_processor(vq_model.config.stride, pipeline)
    dataset = open_dataset(spec)
    read, bad_rows = partial(RowReader(image_processor).read, spec=spec), BadRowCount(args.max_bad_rows_fraction)
    starts = range(0, len(dataset), args.shard_size)
    for other in Path(args.output_dir).glob(f"{args.split}-*-of-*.parquet"):
        if not other.stem.endswith(f"-of-{len(starts):05d}"):
            raise ValueError(
                f"`output_dir` {args.output_dir} holds {other.name}, but this data set makes {len(starts)} shards of "
                "`shard_size`. Give another folder, or the same data set and `shard_size` as for the existing shards."
            )
    own = range(process.process_index, len(starts), process.num_processes)
    for index in tqdm(own, desc="shards", disable=not process.is_main_process):
        path = Path(args.output_dir) / f"{args.split}-{index:05d}-of-{len(starts):05d}.parquet"
        if not path.exists():
            rows = range(starts[index], min(starts[index] + args.shard_size, len(dataset)))
            usable = bad_rows.read(enumerate(dataset.select(rows), rows.start), read, spec.name)
            batches = []
            while batch := list(islice(usable, args.batch_size)):
                batches.append(encode_batch(batch, image_processor, vq_model, pipeline))
            bad_rows.judge()
            write_shard(path, batches, spec)


if __name__ == "__main__":
    main()
