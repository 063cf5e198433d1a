"""Train EditAR, or go on training it, on pairs of pictures with an instruction.

    accelerate launch examples/train_editar.py --model editar --dataset my-pairs --output_dir runs/my-editor

`--model` is a pipeline folder or Hub id. `--dataset` is a Hub id, a folder of parquet files or an image folder, with
the columns `source_image, target_image, prompt` and, where there are any, `mask` and `task` (other names by flags); or
what `examples/precompute_tokens.py` made of it. The tokenizer stays frozen, the text encoder too unless
`--train_text_encoder` is given. The optimiser's defaults are those of the published training
(arXiv 2501.04699, section 4.1): AdamW, 1e-4, betas 0.9 and 0.95, weight decay 0.05, gradient norm 1, 40,000 steps of
64 pairs.
"""

import itertools
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import ProjectConfiguration, send_to_device
from transformers import HfArgumentParser, get_scheduler, set_seed

from editar_hf import EditARPipeline
from editar_hf.training.batch import compute_token_loss, draw_conditioning_dropout, encode_image_tokens
from editar_hf.training.checkpoints import load_checkpoint, save_checkpoint
from editar_hf.training.data import EditCollator, load_edit_dataset
from editar_hf.training.distillation import DistillationTeacher, compute_distillation_loss
from editar_hf.training.logs import LossLog, log_figures
from editar_hf.training.optimization import build_optimizer
from editar_hf.training.validation import save_validation_pictures


@dataclass
class Arguments:
    model: str = field(metadata={"help": "pipeline folder or Hub id to start from"})
    dataset: str = field(metadata={"help": "Hub id, folder or pattern of files"})
    output_dir: str = field(metadata={"help": "checkpoints, validation pictures and the trained pipeline go here"})
    validation_dataset: str | None = field(default=None, metadata={"help": "like --dataset; its split is `validation`"})
    source_image_column: str = "source_image"
    target_image_column: str = "target_image"
    prompt_column: str = "prompt"
    mask_column: str = "mask"
    task_column: str = "task"
    resolution: int | None = field(default=None, metadata={"help": "pixels per side; default: the model's"})
    resize_mode: str = "crop"

    train_text_encoder: bool = False
    edit_region_weight: float = field(default=1.0, metadata={"help": "weight in the loss of tokens inside the mask"})
    conditioning_dropout: bool = field(default=True, metadata={"help": "drop image or text, 5 %% each and 5 %% both"})
    distillation_model: str | None = field(default=None, metadata={"help": "folder or Hub id of a DINOv2"})
    distillation_loss_weight: float = 0.5

    batch_size: int = field(default=64, metadata={"help": "per process"})
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 40000
    max_train_minutes: float = field(default=math.inf, metadata={"help": "stop cleanly, with a checkpoint, after this"})
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant_with_warmup"
    lr_warmup_steps: int = 0
    weight_decay: float = 0.05
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    gradient_checkpointing: bool = False
    compile: bool = False
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager is faster on CPUs, with --compile"})
    num_workers: int = 0
    seed: int = 0

    checkpointing_steps: int = 1000
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "`latest` or a checkpoint's name"})
    validation_steps: int = 1000
    num_validation_batches: int = 4
    num_validation_pictures: int = 6
    logging_steps: int = 20
    log_with: str | None = field(default=None, metadata={"help": "tensorboard, wandb, ..."})


def build_collator(args: Arguments, pipeline: EditARPipeline) -> EditCollator:
    size = pipeline.processor.image_processor.size
    height, width = (args.resolution or size.height), (args.resolution or size.width)
    return EditCollator(pipeline.processor, height, width, args.resize_mode, pipeline.vq_model.config.stride)


def build_dataloader(path: str, split: str, args: Arguments, collator: EditCollator) -> torch.utils.data.DataLoader:
    names = ("source_image", "target_image", "prompt", "mask", "task")
    columns = {name: getattr(args, f"{name}_column") for name in names}
    dataset = load_edit_dataset(path, split, {ours: theirs for ours, theirs in columns.items() if ours != theirs})
    is_training = split == "train"
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=args.batch_size,
        shuffle=is_training,
        drop_last=is_training,
        collate_fn=collator,
        num_workers=args.num_workers,
    )


class TrainingStep(torch.nn.Module):
    """One batch to its losses; both trained networks inside, so that one wrapper serves distributed runs."""

    def __init__(self, args: Arguments, pipeline: EditARPipeline, collator: EditCollator):
        super().__init__()
        self.args = args
        self.transformer = pipeline.transformer
        self.text_encoder = pipeline.text_encoder
        self.grid = (collator.height // collator.stride, collator.width // collator.stride)
        self.distils = args.distillation_model is not None

    def forward(self, batch: dict[str, torch.Tensor], drop_source=None, drop_prompt=None, teacher_features=None):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.args.train_text_encoder):
            prompt_embeds = self.text_encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        output = self.transformer(
            source_image_tokens=batch["source_image_tokens"],
            prompt_embeds=prompt_embeds,
            target_image_tokens=batch["target_image_tokens"],
            drop_source=drop_source,
            drop_prompt=drop_prompt,
            grid_height=self.grid[0],
            grid_width=self.grid[1],
            output_distillation_features=teacher_features is not None,
        )
        losses = {
            "token_loss": compute_token_loss(
                output.logits, batch["target_image_tokens"], batch.get("edit_mask"), self.args.edit_region_weight
            )
        }
        losses["loss"] = losses["token_loss"]
        if teacher_features is not None:
            cells = (self.grid[0] // 2, self.grid[1] // 2)
            losses["distillation_loss"] = compute_distillation_loss(
                output.distillation_features, teacher_features, *cells
            )
            losses["loss"] = losses["loss"] + self.args.distillation_loss_weight * losses["distillation_loss"]
        return losses


def prepare_pipeline(args: Arguments) -> EditARPipeline:
    """Load what is trained in float32 and freeze the rest."""
    pipeline = EditARPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipeline.vq_model.requires_grad_(False).eval()
    pipeline.text_encoder.requires_grad_(args.train_text_encoder).train(args.train_text_encoder)
    pipeline.transformer.train()
    pipeline.transformer.set_attn_implementation(args.attn_implementation)
    if args.gradient_checkpointing:
        pipeline.transformer.gradient_checkpointing_enable()
    return pipeline


def build_accelerator(args: Arguments) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.log_with,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=f"{args.output_dir}/logs"),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    accelerator.init_trackers("editar", config={name: str(value) for name, value in vars(args).items()})
    return accelerator


def iterate_batches(accelerator: Accelerator, dataloader, first_batch: int):
    """Yield (index, batch) for ever, epoch after epoch, going on where `first_batch` batches have been seen."""
    epoch, skipped = divmod(first_batch, len(dataloader))
    for index in itertools.count(first_batch):
        if index == first_batch or index % len(dataloader) == 0:
            dataloader.set_epoch(epoch)
            batches = iter(accelerator.skip_first_batches(dataloader, skipped))
            epoch, skipped = epoch + 1, 0
        yield index, next(batches)


def prepare_inputs(args, accelerator, pipeline, teacher, index: int, batch: dict) -> dict:
    """Encode a batch's pictures, draw its dropped conditions, and ask the teacher what it sees."""
    inputs = {"teacher_features": None if teacher is None else teacher(batch["target_pixel_values"])}
    inputs["batch"] = encode_image_tokens(batch, pipeline.vq_model)
    if args.conditioning_dropout:
        # Seeded by the batch's place in the run, so that a resumed run draws what an uninterrupted one would.
        place = index * accelerator.num_processes + accelerator.process_index
        generator = torch.Generator().manual_seed((args.seed << 40) + place)
        drops = draw_conditioning_dropout(len(batch["input_ids"]), generator)
        inputs["drop_source"], inputs["drop_prompt"] = (drop.to(accelerator.device) for drop in drops)
    return inputs


def train(args, accelerator, pipeline, module, teacher, optimizer, scheduler, dataloader, validation, step):
    """Run optimiser steps until the last one or the end of the time allowed; then leave a checkpoint."""
    start_time, log = time.monotonic(), LossLog(accelerator, args.logging_steps)
    for index, batch in iterate_batches(accelerator, dataloader, step * args.gradient_accumulation_steps):
        if step >= args.max_train_steps or time.monotonic() - start_time > 60 * args.max_train_minutes:
            break
        with accelerator.accumulate(module):
            losses = module(**prepare_inputs(args, accelerator, pipeline, teacher, index, batch))
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(module.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        scheduler.step()
        step += 1
        log.add(losses, step, args.batch_size * args.gradient_accumulation_steps, scheduler.get_last_lr()[0])
        if step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, args.output_dir, step, args.checkpoints_total_limit)
        if validation is not None and step % args.validation_steps == 0:
            validate(args, accelerator, pipeline, module, validation, step)
    save_checkpoint(accelerator, args.output_dir, step, args.checkpoints_total_limit)


def validate(args, accelerator, pipeline, module, validation, step):
    """Log the loss on held-out pairs and save a few of them as source | edited | target."""
    module.eval()
    batches = [
        send_to_device(batch, accelerator.device) for batch in itertools.islice(validation, args.num_validation_batches)
    ]
    batches = [encode_image_tokens(batch, pipeline.vq_model) for batch in batches]
    with torch.no_grad(), accelerator.autocast():
        losses = [module(batch)["token_loss"].item() for batch in batches]
    log_figures(accelerator, {"validation_loss": sum(losses) / len(losses)}, step)
    if accelerator.is_main_process:
        with accelerator.autocast():
            save_validation_pictures(pipeline, batches[0], args.num_validation_pictures, Path(args.output_dir), step)
    module.train()


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    accelerator = build_accelerator(args)
    set_seed(args.seed)
    pipeline = prepare_pipeline(args)
    collator = build_collator(args, pipeline)
    teacher = None
    if args.distillation_model is not None:
        teacher = DistillationTeacher(args.distillation_model).to(accelerator.device)
    pipeline.vq_model.to(accelerator.device)
    module = TrainingStep(args, pipeline, collator)
    if args.compile:
        module.compile()
    optimizer = build_optimizer(
        module.parameters(), args.learning_rate, (args.adam_beta1, args.adam_beta2), args.weight_decay
    )
    scheduler = get_scheduler(args.lr_scheduler, optimizer, args.lr_warmup_steps, args.max_train_steps)
    dataloader = build_dataloader(args.dataset, "train", args, collator)
    module, optimizer, dataloader = accelerator.prepare(module, optimizer, dataloader)
    accelerator.register_for_checkpointing(scheduler)
    validation = None
    if args.validation_dataset is not None:
        validation = build_dataloader(args.validation_dataset, "validation", args, collator)
    step = 0
    if args.resume_from_checkpoint is not None:
        step = load_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
    train(args, accelerator, pipeline, module, teacher, optimizer, scheduler, dataloader, validation, step)
    if accelerator.is_main_process:
        pipeline.save_pretrained(Path(args.output_dir) / "pipeline")
    accelerator.end_training()


if __name__ == "__main__":
    main()
