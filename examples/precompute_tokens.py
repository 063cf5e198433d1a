"""Encode a data set of picture pairs once: parquet shards with the tokens of both images, the prompt and the task.

    python examples/precompute_tokens.py --dataset stickers --split train --vq_model sticker-tokenizer \
        --output_dir stickers-tokens --resolution 64

`examples/train_editar.py --dataset stickers-tokens` then trains without the tokenizer in its loop. Shards that exist
are kept: a second run goes on where the first stopped.
"""

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from editar_hf import EditARImageProcessor, EditARVQModel
from editar_hf.training.data import compute_edit_mask, load_edit_dataset


@dataclass
class Arguments:
    dataset: str = field(metadata={"help": "Hub id, folder or pattern of parquet files"})
    vq_model: str = field(metadata={"help": "folder or Hub id of an EditARVQModel"})
    output_dir: str
    resolution: int = field(metadata={"help": "pixels per side"})
    split: str = "train"
    resize_mode: str = "crop"
    batch_size: int = 64
    shard_size: int = 20000
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16"})
    device: str = "cpu"


def encode_batch(rows: dict, vq_model: EditARVQModel, image_processor: EditARImageProcessor) -> dict:
    """Encode the two pictures of each row, and its mask if there is one."""
    pictures = rows["source_image"] + rows["target_image"]
    pixel_values = image_processor(pictures).pixel_values.to(vq_model.device, vq_model.dtype)
    image_tokens = vq_model.encode(pixel_values.contiguous(memory_format=torch.channels_last)).image_tokens
    source, target = image_tokens.cpu().chunk(2)
    encoded = {"source_image_tokens": source.tolist(), "target_image_tokens": target.tolist(), "prompt": rows["prompt"]}
    encoded["task"] = rows.get("task", ["edit"] * len(source))
    if "mask" in rows:
        masks = image_processor(rows["mask"]).pixel_values
        encoded["edit_mask"] = compute_edit_mask(masks, vq_model.config.stride).tolist()
    return encoded


@torch.no_grad()
def encode_shard(dataset: datasets.Dataset, args: Arguments, vq_model: EditARVQModel, path: Path):
    """Write one shard under a temporary name and rename it."""
    image_processor = EditARImageProcessor(
        size=args.resolution, resize_mode=args.resize_mode, stride=vq_model.config.stride
    )
    batches = dataset.iter(args.batch_size)
    encoded = [encode_batch(rows, vq_model, image_processor) for rows in batches]
    merged = {name: [value for batch in encoded for value in batch[name]] for name in encoded[0]}
    unfinished = path.with_suffix(".unfinished")
    datasets.Dataset.from_dict(merged).to_parquet(str(unfinished))
    unfinished.rename(path)


def check_shards(output_dir: Path, split: str, num_shards: int):
    """Refuse a folder whose shards are of another division: pairs would be in it twice."""
    paths = sorted(output_dir.glob(f"{split}-*-of-*.parquet"))
    if others := [path.name for path in paths if not path.stem.endswith(f"-of-{num_shards:05d}")]:
        raise ValueError(
            f"`output_dir` {output_dir} holds {others[0]}, and this data set makes {num_shards} shards of "
            "`shard_size`. Give another folder, or the data set and the size those shards were made with."
        )


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    dataset = load_edit_dataset(args.dataset, args.split)
    vq_model = EditARVQModel.from_pretrained(args.vq_model, dtype=args.dtype).to(args.device).eval()
    vq_model.to(memory_format=torch.channels_last)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(dataset), args.shard_size)
    check_shards(output_dir, args.split, len(starts))
    for index, start in enumerate(tqdm(starts, desc="shards")):
        path = output_dir / f"{args.split}-{index:05d}-of-{len(starts):05d}.parquet"
        if not path.exists():
            rows = range(start, min(start + args.shard_size, len(dataset)))
            encode_shard(dataset.select(rows), args, vq_model, path)


if __name__ == "__main__":
    main()
