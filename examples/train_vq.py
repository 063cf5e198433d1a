"""Train a VQ model, which turns images into tokens and back.

    accelerate launch examples/train_vq.py --dataset my-pairs --image-columns source_image,target_image \
        --resolution 64 --channel-multipliers 1 2 2 4 --mixed-precision bf16 --output-dir runs/vq

The loss is the sum of the absolute error and the squared error of the pixels, the codebook loss and the commitment
loss. Codes that no image uses any more are moved to latents of the current batch. `vq_model/`, `metrics.jsonl` and the
checkpoints are saved in `--output-dir`.
"""

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from transformers import get_cosine_schedule_with_warmup
from transformers.hf_argparser import HfArg

from editar_hf import EditARVQConfig, EditARVQModel
from editar_hf.pipelines.hub import check_folder_or_hub_id, make_card
from editar_hf.training.arguments import RunArguments, parse_arguments
from editar_hf.training.checkpoints import (
    is_out_of_time,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    start_accelerator,
)
from editar_hf.training.logs import LossLog, log_figures, print_banner
from editar_hf.training.optimization import build_optimizer
from editar_hf.training.results import VALIDATION_IMAGE, create_repositories, describe_command, save_result
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
# Arguments that are passed to `EditARVQConfig`.
SIZES = ("num_embeddings", "embedding_dim", "latent_channels", "base_channels", "channel_multipliers")
SIZES += ("num_res_blocks", "norm_num_groups", "commitment_loss_weight")


@dataclass(kw_only=True)
class Arguments(RunArguments):
    dataset: str = HfArg(help="parquet file, folder of parquet files or images, or Hub id")
    image_columns: str = HfArg(default="image", help="columns that hold images, separated by commas")
    split: str = HfArg(default="train", help="split to train on; slices such as train[:1000] work")
    validation_split: str | None = HfArg(default=None, help="split to evaluate on; default: the last rows of `split`")
    validation_rows: int | None = HfArg(default=None, help="rows to evaluate on; default: a tenth, and at most 256")
    resolution: int = HfArg(default=256, help="pixels per side")

    model: str | None = HfArg(default=None, help="VQ model to start from; it also sets the sizes below")
    freeze_codes: bool = HfArg(default=False, help="train only the image decoder; precomputed tokens stay valid")
    num_embeddings: int = HfArg(default=16384, help="number of codes")
    embedding_dim: int = HfArg(default=8, help="dimension of a code")
    latent_channels: int = HfArg(default=256, help="channels of the latents")
    base_channels: int = HfArg(default=128, help="channels of the first level")
    channel_multipliers: list[int] = field(
        default_factory=lambda: [1, 1, 2, 2, 4],
        metadata={"help": "multiplier of base_channels per level; each level after the first halves both sides"},
    )
    num_res_blocks: int = HfArg(default=2, help="residual blocks per level")
    norm_num_groups: int = HfArg(default=32, help="groups of the norms; base_channels / 16 is much faster on CPUs")
    commitment_loss_weight: float = HfArg(default=0.25, help="weight of the distance from latents to codes")
    squared_error_weight: float = HfArg(default=1.0, help="higher: sharper edges, blurrier texture")

    max_steps: int = HfArg(default=40_000, help="total number of steps")
    learning_rate: float = HfArg(default=4e-4, help="learning rate of AdamW")
    warmup_steps: int = HfArg(default=500, help="steps in which the learning rate rises")
    dead_code_patience: int = HfArg(default=200, help="steps after which an unused code is moved")
    evaluation_steps: int = HfArg(default=1000, help="steps between evaluations")


def load_pixels(args):
    """Load the pixels of training images and held-out images as uint8."""
    columns = args.image_columns.split(",")
    training = load_images(args.dataset, args.split, columns)
    if args.validation_split is not None:
        held_out = load_images(args.dataset, args.validation_split, columns)
        held_out = held_out.select(range(min(args.validation_rows or 256, len(held_out))))
    else:
        num_held_out = args.validation_rows or min(256, max(1, len(training) // 10))
        if num_held_out >= len(training):
            raise ValueError(f"`validation_rows` is {num_held_out}, but the data set has {len(training)} rows.")
        held_out = training.select(range(len(training) - num_held_out, len(training)))
        training = training.select(range(len(training) - num_held_out))
    return [
        decode_images(part, args.resolution, args.output_dir, BadRowCount(args.max_bad_rows_fraction))
        for part in (training, held_out)
    ]


def build_vq_model(args):
    """Load the VQ model to start from, or build a new one."""
    if args.model is not None:
        vq_model = EditARVQModel.from_pretrained(args.model, dtype=torch.float32)
    else:
        vq_model = EditARVQModel(EditARVQConfig(**{name: getattr(args, name) for name in SIZES}))
    if args.freeze_codes:
        for part in (vq_model.encoder, vq_model.quant_conv, vq_model.quantize):
            part.requires_grad_(False)
    return vq_model


def evaluate(accelerator, args, vq_model, held_out, step):
    """Compute, log and return the metrics of the held-out images."""
    vq_model.eval()
    with accelerator.autocast():
        figures = evaluate_vq_model(vq_model, held_out, args.batch_size)
    vq_model.train()
    log_figures(accelerator, figures, step)
    return figures


def save(accelerator, args, vq_model, num_images, held_out, step):
    """Evaluate the VQ model, save it with its model card and an image, and upload it if `args` say so."""
    figures = evaluate(accelerator, args, vq_model, held_out, step)
    if not accelerator.is_main_process:
        return
    image = Path(args.output_dir) / VALIDATION_IMAGE
    save_reconstructions(vq_model, held_out[:8], image)
    start = "" if args.model is None else f" from `{args.model}`"
    training = (
        f"Trained{start} on {num_images:,} images of `{args.dataset}`, for {step:,} steps of "
        f"{args.batch_size * accelerator.num_processes:,}, at {args.resolution} × {args.resolution} pixels. "
        f"{describe_command()}"
    )
    results = (
        f"On {len(held_out):,} held-out images: PSNR {figures['psnr']:.2f} dB; {figures['code_usage']:.1%} of the "
        f"codes used, with a perplexity of {figures['perplexity']:,.0f}. Some images and their reconstructions:\n\n"
        f"![images and reconstructions]({VALIDATION_IMAGE})"
    )
    card = partial(
        make_card,
        "vq_model",
        dataset=args.dataset,
        base_model=args.model,
        license=args.license,
        metrics={name: round(value, 4) for name, value in figures.items()},
        training=training,
        figures=results,
        stride=vq_model.config.stride,
        num_codes=vq_model.config.num_embeddings,
        resolution=args.resolution,
    )
    save_result(args, "vq_model", vq_model.save_pretrained, card, image)


def train(accelerator, args, vq_model, pixels, held_out):
    """Train until the last step or the time limit. Return the step that was reached."""
    start_time, batch_size = time.monotonic(), args.batch_size * accelerator.num_processes
    optimizer = build_optimizer(vq_model.parameters(), args.learning_rate, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(vq_model, optimizer)
    # The scheduler is not prepared, because Accelerate would step it once per process.
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, args.max_steps)
    reviver = DeadCodeReviver(vq_model.quantize.embedding, args.dead_code_patience)
    accelerator.register_for_checkpointing(scheduler, reviver)
    step, num_revived = 0, 0
    if args.resume_from_checkpoint is not None:
        step = load_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
    batches = draw_batches(len(pixels), batch_size, args.seed, first_step=step)
    facts = {"data": args.dataset, "held out": f"{len(held_out):,} images"}
    print_banner(accelerator, facts, vq_model, step, args.max_steps, batch_size, len(pixels))
    log = LossLog(accelerator, args.max_steps, step)
    tokens_per_image = (args.resolution // vq_model.config.stride) ** 2
    model.train()
    is_last = step >= args.max_steps
    while not is_last:
        indices = next(batches)[accelerator.process_index :: accelerator.num_processes]
        pixel_values = prepare_pixel_values(pixels[indices], accelerator.device)
        outputs = model(pixel_values)
        # `outputs.loss` already contains the squared error once.
        squared_error = F.mse_loss(outputs.reconstruction.float(), pixel_values)
        accelerator.backward(outputs.loss + (args.squared_error_weight - 1) * squared_error)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        log.add({name: outputs[name] for name in LOSSES}, args.batch_size, tokens_per_image)
        if not args.freeze_codes:
            tokens, latents = accelerator.gather((outputs.image_tokens, outputs.latents.detach().flatten(0, 1)))
            num_revived += reviver.step(tokens, latents, optimizer, torch.Generator().manual_seed(args.seed + step))
        log.progress_bar.update()

        is_last = is_out_of_time(accelerator, start_time, args.max_train_minutes) or step >= args.max_steps
        is_logged = step % args.logging_steps == 0
        if step == 1 or is_logged:
            log.log(step, scheduler.get_last_lr()[0], clear=is_logged, revived_codes=num_revived)
            num_revived = 0 if is_logged else num_revived
        if args.push_steps is not None and step % args.push_steps == 0 and not is_last:
            save(accelerator, args, vq_model, len(pixels), held_out, step)
        elif step % args.evaluation_steps == 0 and not is_last:
            evaluate(accelerator, args, vq_model, held_out, step)
        if step % args.checkpointing_steps == 0 or is_last:
            save_checkpoint(accelerator, args.output_dir, step, args.checkpoints_total_limit)
    return step


def main():
    args = parse_arguments(Arguments)
    if args.model is not None:
        check_folder_or_hub_id(args.model, "model")
    accelerator = start_accelerator(args)
    create_repositories(accelerator, args, "")
    set_seed(args.seed)
    vq_model = build_vq_model(args).to(accelerator.device, memory_format=torch.channels_last)
    pixels, held_out = load_pixels(args)
    if not list_checkpoints(args.output_dir) and args.model is None:
        batches = draw_batches(len(pixels), args.batch_size, args.seed)
        with accelerator.autocast():
            init_codebook(vq_model, pixels, batches, torch.Generator().manual_seed(args.seed))
    step = train(accelerator, args, vq_model, pixels, held_out)
    save(accelerator, args, vq_model, len(pixels), held_out, step)
    accelerator.end_training()


if __name__ == "__main__":
    main()
