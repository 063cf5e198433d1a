"""Train a VQ model, which turns images into tokens and back.

    accelerate launch examples/train_vq.py --dataset my-pairs --image-columns source_image,target_image \
        --resolution 64 --channel-multipliers 1 2 2 4 --mixed-precision bf16 --output-dir runs/vq

The loss is the model's own: absolute and squared error of the pixels, codebook and commitment. Codes that no image uses
any more are moved to latents of the current batch. `--output-dir` receives `vq_model/`, `metrics.jsonl` and
checkpoints.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from editar_hf import EditARVQConfig, EditARVQModel
from editar_hf.pipelines.hub import check_folder_or_hub_id, make_card
from editar_hf.training.arguments import parse_arguments
from editar_hf.training.checkpoints import check_output_dir, list_checkpoints, load_checkpoint, save_checkpoint
from editar_hf.training.logs import print_banner, print_epochs
from editar_hf.training.optimization import build_optimizer
from editar_hf.training.results import (
    VALIDATION_IMAGE,
    check_push_arguments,
    create_repositories,
    describe_command,
    save_result,
)
from editar_hf.training.rows import BadRowCount
from editar_hf.training.vq import (
    DeadCodeReviver,
    decode_images,
    draw_batches,
    evaluate_vq_model,
    init_codebook,
    load_images,
    prepare_pixel_values,
    save_reconstructions,
)


LOSSES = ("loss", "reconstruction_loss", "codebook_loss", "commitment_loss")
NUM_IMAGES_SHOWN = 8


@dataclass
class Arguments:
    dataset: str = field(metadata={"help": "parquet file, folder of parquet files or images, or Hub id"})
    output_dir: Path = field(metadata={"help": "folder for `vq_model/`, its metrics and its checkpoints"})
    image_columns: str = field(default="image", metadata={"help": "columns that hold images, separated by commas"})
    split: str = field(default="train", metadata={"help": "split to train on; slices such as train[:1000] work"})
    validation_split: str | None = field(
        default=None, metadata={"help": "split to evaluate on; default: the last `validation_rows` of `split`"}
    )
    validation_rows: int = field(default=256, metadata={"help": "number of rows to evaluate on"})
    resolution: int = field(default=256, metadata={"help": "pixels per side"})
    max_bad_rows_fraction: float = field(default=0.05, metadata={"help": "fraction of rows that may be unusable"})

    model: str | None = field(
        default=None, metadata={"help": "folder or Hub id of a VQ model to start from; the sizes below do not apply"}
    )
    freeze_codes: bool = field(
        default=False, metadata={"help": "train only the image decoder, so that precomputed tokens stay valid"}
    )
    num_embeddings: int = field(default=16384, metadata={"help": "number of codes"})
    embedding_dim: int = field(default=8, metadata={"help": "dimension of a code"})
    latent_channels: int = field(default=256, metadata={"help": "channels of the latents"})
    base_channels: int = field(default=128, metadata={"help": "channels of the first level"})
    channel_multipliers: list[int] = field(
        default_factory=lambda: [1, 1, 2, 2, 4],
        metadata={"help": "multiplier of base_channels per level; all but the first halve the sides"},
    )
    num_res_blocks: int = field(default=2, metadata={"help": "residual blocks per level"})
    norm_num_groups: int = field(
        default=32, metadata={"help": "groups of the norms; base_channels / 16 is several times faster on CPUs"}
    )
    commitment_loss_weight: float = field(
        default=0.25, metadata={"help": "weight of the distance from latents to codes"}
    )
    squared_error_weight: float = field(
        default=1.0, metadata={"help": "more keeps contrasting shapes sharp, but blurs faint texture"}
    )

    batch_size: int = field(default=64, metadata={"help": "images per step and process"})
    max_steps: int = field(default=40_000, metadata={"help": "total number of steps"})
    max_train_minutes: float | None = field(
        default=None, metadata={"help": "save a checkpoint and stop after this many minutes"}
    )
    learning_rate: float = field(default=4e-4, metadata={"help": "learning rate of AdamW"})
    warmup_steps: int = field(default=500, metadata={"help": "steps in which the learning rate rises"})
    weight_decay: float = field(default=0.05, metadata={"help": "weight decay of matrices"})
    dead_code_patience: int = field(default=200, metadata={"help": "steps after which an unused code is moved"})
    mixed_precision: str = field(default="no", metadata={"help": "no, fp16 or bf16"})
    seed: int = field(default=0, metadata={"help": "seed of the order of images and of new weights"})

    logging_steps: int = field(default=50, metadata={"help": "steps between lines of the log"})
    evaluation_steps: int = field(default=1000, metadata={"help": "steps between evaluations"})
    checkpointing_steps: int = field(default=1000, metadata={"help": "steps between checkpoints"})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "number of checkpoints to keep"})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "`latest` or the name of a checkpoint"},
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "repository id to upload the VQ model to"})
    hub_private_repo: bool = field(default=True, metadata={"help": "make a new repository private"})
    push_steps: int | None = field(default=None, metadata={"help": "steps between uploads; default: only at the end"})
    license: str | None = field(default=None, metadata={"help": "identifier of the weights' licence, for the card"})


def load_pixels(args: Arguments):
    """Load training and validation pixels, uint8."""
    columns = args.image_columns.split(",")
    training = load_images(args.dataset, args.split, columns)
    if args.validation_split is None:
        num_training = len(training) - args.validation_rows
        if num_training < 1:
            raise ValueError(f"`validation_rows` is {args.validation_rows}, but the data set has {len(training)} rows.")
        validation = training.select(range(num_training, len(training)))
        training = training.select(range(num_training))
    else:
        validation = load_images(args.dataset, args.validation_split, columns)
        validation = validation.select(range(min(args.validation_rows, len(validation))))
    return tuple(
        decode_images(part, args.resolution, args.output_dir, BadRowCount(args.max_bad_rows_fraction))
        for part in (training, validation)
    )


def build_vq_model(args: Arguments) -> EditARVQModel:
    """Load the VQ model to start from, or build a new one."""
    if args.model is not None:
        model = EditARVQModel.from_pretrained(args.model, dtype=torch.float32)
    else:
        names = ("num_embeddings", "embedding_dim", "latent_channels", "base_channels", "channel_multipliers")
        names += ("num_res_blocks", "norm_num_groups", "commitment_loss_weight")
        model = EditARVQModel(EditARVQConfig(**{name: getattr(args, name) for name in names}))
    if args.freeze_codes:
        for part in (model.encoder, model.quant_conv, model.quantize):
            part.requires_grad_(False)
    return model


def save_vq_model(accelerator: Accelerator, args: Arguments, vq_model: EditARVQModel, step: int, pixels, held_out):
    """Evaluate the VQ model, save it with its card and an image, and upload it if asked to."""
    figures = evaluate(accelerator, args, vq_model, held_out, step)
    if not accelerator.is_main_process:
        return
    folder, image = args.output_dir / "vq_model", args.output_dir / VALIDATION_IMAGE
    save_reconstructions(vq_model, held_out[:NUM_IMAGES_SHOWN], image)
    start = "" if args.model is None else f" from `{args.model}`"
    training = (
        f"Trained{start} on {len(pixels):,} images of `{args.dataset}`, for {step:,} steps of "
        f"{args.batch_size * accelerator.num_processes:,}, at {args.resolution} × {args.resolution} pixels. "
        f"{describe_command()}"
    )
    results = (
        f"On {len(held_out):,} held-out images: PSNR {figures['psnr']:.2f} dB; {figures['code_usage']:.1%} of the "
        f"codes used, with a perplexity of {figures['perplexity']:,.0f}. Some of them, above their reconstructions:\n\n"
        f"![images and reconstructions]({VALIDATION_IMAGE})"
    )
    card = make_card(
        "tokenizer",
        args.push_to_hub or str(folder),
        args.dataset,
        args.model,
        args.license,
        training=training,
        figures=results,
        stride=vq_model.config.stride,
        num_codes=vq_model.config.num_embeddings,
        resolution=args.resolution,
    )
    save_result(folder, vq_model.save_pretrained, card, image, args.push_to_hub, args.hub_private_repo)


def log_metrics(accelerator: Accelerator, output_dir: Path, metrics: dict):
    """Print one line of metrics and append it to `metrics.jsonl`."""
    if accelerator.is_main_process:
        line = json.dumps({name: float(f"{value:.5g}") for name, value in metrics.items()})
        # Above a progress bar, if there is one.
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
        with open(output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")


def print_run(accelerator: Accelerator, args: Arguments, vq_model: EditARVQModel, pixels, held_out, step: int):
    """Print what is trained on what, and how long that is."""
    parameters, samples_per_step = list(vq_model.parameters()), args.batch_size * accelerator.num_processes
    num_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    facts = {
        "images": f"{len(pixels):,}, {args.dataset}; {args.resolution} × {args.resolution} pixels",
        "held out": f"{len(held_out):,} images",
        "steps": f"{step:,} to {args.max_steps:,}",
        "batch": f"{samples_per_step:,} images: {args.batch_size:,} × {accelerator.num_processes:,} processes",
        "trained": f"{num_trained:,} of {sum(parameter.numel() for parameter in parameters):,} parameters",
        "device": str(accelerator.device),
        "dtype": "float32" if args.mixed_precision == "no" else f"{args.mixed_precision}, weights in float32",
    }
    print_banner(accelerator, facts)
    print_epochs(accelerator, "max-steps", args.max_steps, samples_per_step, len(pixels))


def train(accelerator: Accelerator, args: Arguments, model, optimizer, pixels, validation_pixels):
    """Train until `max_steps` or the time limit. Returns the step reached, earlier launches included."""
    # Not prepared: accelerate would step it once per process.
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, args.max_steps)
    vq_model = accelerator.unwrap_model(model)
    reviver = DeadCodeReviver(vq_model.quantize.embedding, args.dead_code_patience)
    accelerator.register_for_checkpointing(scheduler, reviver)
    step = 0
    if args.resume_from_checkpoint is not None:
        step = load_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
    batches = draw_batches(len(pixels), args.batch_size * accelerator.num_processes, args.seed, first_step=step)
    start = logged = time.monotonic()
    sums, num_summed, num_revived = torch.zeros(len(LOSSES), device=accelerator.device), 0, 0
    print_run(accelerator, args, vq_model, pixels, validation_pixels, step)
    # None hides the bar if the output is not a terminal.
    is_hidden = None if accelerator.is_main_process else True
    bar = tqdm(total=args.max_steps, initial=step, desc="steps", disable=is_hidden)
    model.train()
    while step < args.max_steps:
        indices = next(batches)[accelerator.process_index :: accelerator.num_processes]
        pixel_values = prepare_pixel_values(pixels[indices], accelerator.device)
        outputs = model(pixel_values)
        # The model's own loss counts the squared error once.
        squared_error = F.mse_loss(outputs.reconstruction.float(), pixel_values)
        accelerator.backward(outputs.loss + (args.squared_error_weight - 1) * squared_error)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        sums += torch.stack([outputs[name].detach() for name in LOSSES])
        if not args.freeze_codes:
            tokens, latents = accelerator.gather((outputs.image_tokens, outputs.latents.detach().flatten(0, 1)))
            num_revived += reviver.step(tokens, latents, optimizer, torch.Generator().manual_seed(args.seed + step))

        bar.update()
        num_summed += 1
        if step == 1 or step % args.logging_steps == 0:
            metrics = dict(zip(LOSSES, (sums / num_summed).tolist(), strict=True))
            speed = num_summed * args.batch_size * accelerator.num_processes / (time.monotonic() - logged)
            metrics |= {"learning_rate": scheduler.get_last_lr()[0], "revived_codes": num_revived}
            log_metrics(accelerator, args.output_dir, {"step": step, **metrics, "images_per_second": speed})
        if step % args.logging_steps == 0:
            sums, num_summed, num_revived, logged = torch.zeros_like(sums), 0, 0, time.monotonic()
        if args.max_train_minutes is not None and time.monotonic() - start > 60 * args.max_train_minutes:
            accelerator.set_trigger()
        out_of_time = accelerator.check_trigger()
        is_last = out_of_time or step == args.max_steps
        if args.push_steps is not None and step % args.push_steps == 0 and not is_last:
            save_vq_model(accelerator, args, vq_model, step, pixels, validation_pixels)
        elif step % args.evaluation_steps == 0 and not is_last:
            evaluate(accelerator, args, vq_model, validation_pixels, step)
        if step % args.checkpointing_steps == 0 or is_last:
            save_checkpoint(accelerator, args.output_dir, step, args.checkpoints_total_limit)
        if out_of_time:
            break
    return step


def evaluate(accelerator: Accelerator, args: Arguments, vq_model: EditARVQModel, pixels, step: int) -> dict:
    """Compute, log and return the metrics of the held-out images."""
    vq_model.eval()
    with accelerator.autocast():
        metrics = evaluate_vq_model(vq_model, pixels, args.batch_size)
    vq_model.train()
    log_metrics(accelerator, args.output_dir, {"step": step, **metrics})
    return metrics


def main():
    args = parse_arguments(Arguments)
    check_output_dir(args.output_dir, args.resume_from_checkpoint)
    check_push_arguments(args.push_to_hub, args.push_steps)
    if args.model is not None:
        check_folder_or_hub_id(args.model, "model")
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if args.push_to_hub is not None and accelerator.is_main_process:
        create_repositories([args.push_to_hub], args.hub_private_repo)
    set_seed(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model = build_vq_model(args).to(accelerator.device, memory_format=torch.channels_last)
    pixels, validation_pixels = load_pixels(args)
    if not list_checkpoints(args.output_dir) and args.model is None:
        batches = draw_batches(len(pixels), args.batch_size, args.seed)
        with accelerator.autocast():
            init_codebook(model, pixels, batches, torch.Generator().manual_seed(args.seed))
    optimizer = build_optimizer(model.parameters(), args.learning_rate, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    step = train(accelerator, args, model, optimizer, pixels, validation_pixels)
    save_vq_model(accelerator, args, accelerator.unwrap_model(model), step, pixels, validation_pixels)
    accelerator.end_training()


if __name__ == "__main__":
    main()
