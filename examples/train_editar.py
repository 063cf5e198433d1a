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
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import datasets
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, send_to_device
from transformers import HfArgumentParser, get_scheduler, set_seed

from editar_hf import EditARPipeline
from editar_hf.model_card import CARD_FILE
from editar_hf.training.batch import (
    compute_token_loss,
    draw_conditioning_dropout,
    drop_target_tokens,
    encode_image_tokens,
)
from editar_hf.training.card import compose_training_card
from editar_hf.training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from editar_hf.training.data import EditCollator, check_image_tokens, load_edit_dataset
from editar_hf.training.distillation import DistillationTeacher, compute_distillation_loss
from editar_hf.training.logs import LossLog, log_figures
from editar_hf.training.lora import TARGET_MODULES, add_lora
from editar_hf.training.optimization import build_muon, build_optimizer, split_hidden_matrices
from editar_hf.training.validation import save_validation_pictures


@dataclass
class Arguments:
    model: str = field(metadata={"help": "pipeline folder or Hub id to start from"})
    dataset: str = field(metadata={"help": "Hub id, folder or pattern of files"})
    output_dir: str = field(
        metadata={"help": "for checkpoints, `validation/` pictures and the trained `pipeline/` or `adapter/`"}
    )
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
    target_token_dropout: float = field(
        default=0.0, metadata={"help": "share of pairs whose target so far is shown in part as the source's"}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "train a LoRA adapter of this rank, nothing else"})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "the adapter counts alpha / rank times; default 1"}
    )
    lora_dropout: float = 0.0
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(TARGET_MODULES), metadata={"help": "names of the linear layers to adapt"}
    )
    lora_modules_to_save: list[str] = field(
        default_factory=list, metadata={"help": "modules to train as a whole, such as text_projection"}
    )
    distillation_model: str | None = field(default=None, metadata={"help": "folder or Hub id of a DINOv2"})
    distillation_loss_weight: float = 0.5

    batch_size: int = field(default=64, metadata={"help": "per process"})
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 40000
    max_train_minutes: float = field(default=math.inf, metadata={"help": "stop cleanly, with a checkpoint, after this"})
    optimizer: Literal["adamw", "muon"] = field(
        default="adamw",
        metadata={"help": "muon: Muon for hidden matrices, AdamW for the rest; learns much faster from scratch"},
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "AdamW's"})
    muon_learning_rate: float = field(default=1e-3, metadata={"help": "Muon's; steps are as large as AdamW's"})
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


def load_pairs(args: Arguments) -> dict[str, datasets.Dataset]:
    """Load the data to train on as `"train"`, and what is held out, if anything, as `"validation"`."""
    names = ("source_image", "target_image", "prompt", "mask", "task")
    columns = {name: getattr(args, f"{name}_column") for name in names}
    columns = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    pairs = {"train": load_edit_dataset(args.dataset, "train", columns)}
    if args.validation_dataset is not None:
        pairs["validation"] = load_edit_dataset(args.validation_dataset, "validation", columns)
    return pairs


def build_collator(args: Arguments, pipeline: EditARPipeline) -> EditCollator:
    try:
        height, width = pipeline.resolve_size(args.resolution, args.resolution)
    except ValueError as error:
        raise ValueError(f"`resolution` is {args.resolution}: {error}") from error
    return EditCollator(pipeline.processor, height, width, args.resize_mode, pipeline.vq_model.config.stride)


def check_inputs(args: Arguments, pipeline: EditARPipeline, collator: EditCollator, pairs, num_processes: int):
    """Refuse, before the first step, what does not fit together."""
    vocab_size, stride = pipeline.transformer.config.vocab_size, collator.stride
    for dataset in pairs.values():
        check_image_tokens(dataset, vocab_size, collator.height // stride, collator.width // stride)
    if len(pairs["train"]) < args.batch_size * num_processes:
        raise ValueError(
            f"`batch_size` is {args.batch_size} for {num_processes} processes; `dataset` has {len(pairs['train'])} "
            "rows. Make the batch smaller."
        )
    if args.distillation_model is not None:
        if "source_image_tokens" in pairs["train"].column_names:
            raise ValueError("`distillation_model` looks at pictures, and `dataset` holds tokens; give the pictures.")
        if pipeline.transformer.config.distillation_hidden_size is None:
            raise ValueError(
                "`distillation_model` needs a model with a distillation head; `distillation_hidden_size` in its "
                "configuration is None."
            )


def build_dataloader(dataset, args, collator: EditCollator, is_training: bool) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=args.batch_size,
        shuffle=is_training,
        drop_last=is_training,
        collate_fn=collator,
        num_workers=args.num_workers,
        # A data loader draws a number whenever it starts. Were it from the generator that dropout draws from, a run
        # that is resumed in the middle of an epoch would not be the uninterrupted one.
        generator=torch.Generator().manual_seed(args.seed),
    )


class TrainingStep(torch.nn.Module):
    """One batch to its losses; both trained networks inside, so that one wrapper serves distributed runs."""

    def __init__(self, args: Arguments, pipeline: EditARPipeline, collator: EditCollator):
        super().__init__()
        self.args = args
        self.transformer = pipeline.transformer
        self.text_encoder = pipeline.text_encoder
        self.grid = (collator.height // collator.stride, collator.width // collator.stride)

    def train(self, mode: bool = True):
        """Switch to training; a text encoder that is not trained along stays without dropout."""
        super().train(mode)
        self.text_encoder.train(mode and self.args.train_text_encoder)
        return self

    def forward(self, batch: dict[str, torch.Tensor], drop_source=None, drop_prompt=None, teacher_features=None):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.args.train_text_encoder):
            prompt_embeds = self.text_encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        output = self.transformer(
            source_image_tokens=batch["source_image_tokens"],
            prompt_embeds=prompt_embeds,
            target_image_tokens=batch.get("shown_image_tokens", batch["target_image_tokens"]),
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
    pipeline.text_encoder.requires_grad_(args.train_text_encoder)
    if args.lora_rank is not None:
        add_lora(
            pipeline.transformer,
            args.model,
            args.lora_rank,
            args.lora_alpha,
            args.lora_dropout,
            args.lora_target_modules,
            args.lora_modules_to_save,
        )
    pipeline.transformer.set_attn_implementation(args.attn_implementation)
    if args.distillation_model is None and pipeline.transformer.distillation_head is not None:
        # Distributed runs stop at parameters that get no gradient.
        pipeline.transformer.distillation_head.requires_grad_(False)
    if args.gradient_checkpointing:
        pipeline.transformer.gradient_checkpointing_enable()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_teacher(args: Arguments, pipeline: EditARPipeline, device: torch.device) -> DistillationTeacher | None:
    if args.distillation_model is None:
        return None
    teacher = DistillationTeacher(args.distillation_model)
    width, expected = teacher.backbone.config.hidden_size, pipeline.transformer.config.distillation_hidden_size
    if width != expected:
        raise ValueError(
            f"`distillation_model` {args.distillation_model!r} has features of width {width}; the model's distillation "
            f"head predicts {expected}."
        )
    return teacher.to(device)


def build_optimizers(args: Arguments, module: torch.nn.Module) -> list[torch.optim.Optimizer]:
    matrices, others = [], list(module.parameters())
    if args.optimizer == "muon":
        matrices, others = split_hidden_matrices(module)
    adamw = build_optimizer(others, args.learning_rate, (args.adam_beta1, args.adam_beta2), args.weight_decay)
    return [adamw, build_muon(matrices, args.muon_learning_rate, args.weight_decay)] if matrices else [adamw]


def build_accelerator(args: Arguments) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        # Also across the end of an epoch: every step has the same number of pairs.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
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
    """Encode a batch's pictures, draw what is dropped of it, and ask the teacher what it sees."""
    inputs = {"teacher_features": None if teacher is None else teacher(batch["target_pixel_values"])}
    inputs["batch"] = encode_image_tokens(batch, pipeline.vq_model)
    # Seeded by the batch's place in the run, so that a resumed run draws what an uninterrupted one would. The generator
    # knows the seed's low 32 bits alone; the prime keeps two seeds apart for a million batches.
    place = index * accelerator.num_processes + accelerator.process_index
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + place)
    if args.conditioning_dropout:
        drops = draw_conditioning_dropout(len(batch["input_ids"]), generator)
        inputs["drop_source"], inputs["drop_prompt"] = (drop.to(accelerator.device) for drop in drops)
    if args.target_token_dropout:
        tokens = (inputs["batch"][f"{name}_image_tokens"] for name in ("target", "source"))
        shown = drop_target_tokens(*tokens, args.target_token_dropout, generator)
        inputs["batch"] = {**inputs["batch"], "shown_image_tokens": shown}
    return inputs


def is_out_of_time(args, accelerator: Accelerator, start_time: float) -> bool:
    """Ask whether the time of any process is up, so that all of them stop at the same step."""
    if math.isinf(args.max_train_minutes):
        return False
    if time.monotonic() - start_time > 60 * args.max_train_minutes:
        accelerator.set_trigger()
    return accelerator.check_trigger()


def train(args, accelerator, pipeline, module, teacher, optimizers, schedulers, dataloader, validation, step) -> int:
    """Run optimiser steps until the last one or the end of the time allowed, leave a checkpoint, return the step."""
    start_time, log = time.monotonic(), LossLog(accelerator)
    batches = iterate_batches(accelerator, dataloader, step * args.gradient_accumulation_steps)
    is_last = step >= args.max_train_steps
    module.train()
    while not is_last:
        for index, batch in itertools.islice(batches, args.gradient_accumulation_steps):
            with accelerator.accumulate(module):
                losses = module(**prepare_inputs(args, accelerator, pipeline, teacher, index, batch))
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(module.parameters(), args.max_grad_norm)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            log.add(losses, args.batch_size)
        for scheduler in schedulers:
            scheduler.step()
        step += 1
        is_last = is_out_of_time(args, accelerator, start_time) or step >= args.max_train_steps
        if step % args.logging_steps == 0:
            log.flush(step, schedulers[0].get_last_lr()[0])
        if step % args.checkpointing_steps == 0 or is_last:
            save_checkpoint(accelerator, args.output_dir, step, args.checkpoints_total_limit)
        if validation is not None and step % args.validation_steps == 0:
            validate(args, accelerator, pipeline, module, validation, step)
    return step


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
            size = validation.collate_fn.height, validation.collate_fn.width
            save_validation_pictures(
                pipeline, batches[0], args.num_validation_pictures, Path(args.output_dir), step, *size
            )
    module.train()


def save_result(args, accelerator, pipeline, num_pairs: int, step: int):
    """Save the trained pipeline, or the adapter, and its card beside their place, then put both there."""
    is_adapter = args.lora_rank is not None
    folder = Path(args.output_dir) / ("adapter" if is_adapter else "pipeline")
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    (pipeline.save_lora_weights if is_adapter else pipeline.save_pretrained)(unfinished)
    card = compose_training_card(
        name=str(folder),
        base_model=args.model,
        dataset=args.dataset,
        num_pairs=num_pairs,
        num_steps=step,
        num_samples_per_step=args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes,
        trained_text_encoder=args.train_text_encoder,
        command=("accelerate", "launch", *sys.argv),
        is_adapter=is_adapter,
    )
    (unfinished / CARD_FILE).write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    checkpoints = list_checkpoints(args.output_dir)
    if checkpoints and args.resume_from_checkpoint is None:
        raise ValueError(
            f"`output_dir` {args.output_dir} holds {checkpoints[-1].name}; pass `--resume_from_checkpoint latest` to "
            "go on from it, or another folder."
        )
    if args.lora_rank is not None and args.train_text_encoder:
        raise ValueError("`train_text_encoder` and `lora_rank`: an adapter holds the decoder's part alone; drop one.")
    pairs = load_pairs(args)
    accelerator = build_accelerator(args)
    set_seed(args.seed)
    pipeline = prepare_pipeline(args)
    collator = build_collator(args, pipeline)
    check_inputs(args, pipeline, collator, pairs, accelerator.num_processes)
    pipeline.vq_model.to(accelerator.device)
    teacher = build_teacher(args, pipeline, accelerator.device)
    module = TrainingStep(args, pipeline, collator)
    if args.compile:
        module.compile()
    optimizers = build_optimizers(args, module)
    schedulers = [
        get_scheduler(args.lr_scheduler, optimizer, args.lr_warmup_steps, args.max_train_steps)
        for optimizer in optimizers
    ]
    dataloader = build_dataloader(pairs["train"], args, collator, is_training=True)
    validation = None
    if "validation" in pairs:
        validation = build_dataloader(pairs["validation"], args, collator, is_training=False)
    module, dataloader, *optimizers = accelerator.prepare(module, dataloader, *optimizers)
    accelerator.register_for_checkpointing(*schedulers)
    step = 0
    if args.resume_from_checkpoint is not None:
        step = load_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
    step = train(args, accelerator, pipeline, module, teacher, optimizers, schedulers, dataloader, validation, step)
    if accelerator.is_main_process:
        save_result(args, accelerator, pipeline, len(pairs["train"]), step)
    accelerator.end_training()


if __name__ == "__main__":
    main()
