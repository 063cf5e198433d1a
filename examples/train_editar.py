"""Train EditAR, or go on training it, on pairs of pictures with an instruction.

    accelerate launch examples/train_editar.py --model editar --dataset my-pairs --output_dir runs/my-editor

`--model` is a pipeline folder or Hub id. `--dataset` is a Hub id (streamed), a folder or pattern of parquet files or of
webdataset tars, or an image folder, with the columns `source_image, target_image, prompt` and, where there are any,
`mask` and `task` (other names by flags); or what `examples/precompute_tokens.py` made of it. `--recipe` names a file
that mixes several such sources, such as `examples/recipes/editar.yaml`. The tokenizer stays frozen, and so does the
text encoder without `--train_text_encoder`. The optimiser's defaults are those of the published training
(arXiv 2501.04699, section 4.1): AdamW, 1e-4, betas 0.9 and 0.95, weight decay 0.05, gradient norm 1, 40,000 steps of
64 pairs.
"""

import itertools
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration, send_to_device
from diffusers.training_utils import EMAModel
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import HfArgumentParser, get_scheduler, set_seed

from editar_hf import EditARPipeline
from editar_hf.pipelines.hub import check_folder_or_hub_id
from editar_hf.training.batch import encode_image_tokens
from editar_hf.training.card import compose_training_card
from editar_hf.training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from editar_hf.training.data import EditCollator, check_image_tokens
from editar_hf.training.dataset_specs import DatasetSpec, check_held_out, load_recipe, open_dataset
from editar_hf.training.distillation import DistillationTeacher
from editar_hf.training.logs import LossLog, log_figures, print_banner, print_epochs
from editar_hf.training.lora import TARGET_MODULES, add_lora
from editar_hf.training.nonfinite import NonFiniteGuard
from editar_hf.training.optimization import build_muon, build_optimizer, split_hidden_matrices
from editar_hf.training.results import check_push_arguments, create_repositories, save_result
from editar_hf.training.rows import BadRowCount, RowReader
from editar_hf.training.sharding import callable_parts, whole_parameters
from editar_hf.training.step import TrainingStep, draw_dropout
from editar_hf.training.streams import MixedRows, build_dataloader, collate_first_rows
from editar_hf.training.validation import draw_validation_pictures


@dataclass
class Arguments:
    model: str = field(metadata={"help": "pipeline folder or Hub id to start from"})
    output_dir: str = field(
        metadata={"help": "for checkpoints, `validation/` pictures and the trained `pipeline/` or `adapter/`"}
    )
    dataset: str | None = field(default=None, metadata={"help": "Hub id, folder or pattern of files"})
    recipe: str | None = field(default=None, metadata={"help": "YAML file that mixes several data sets"})
    streaming: bool = field(default=True, metadata={"help": "read a data set of the Hub while it is downloaded"})
    validation_dataset: str | None = field(default=None, metadata={"help": "like --dataset; its split is `validation`"})
    source_image_column: str = field(default="source_image", metadata={"help": "column of the images to edit"})
    target_image_column: str = field(default="target_image", metadata={"help": "column of the edited images"})
    prompt_column: str = field(default="prompt", metadata={"help": "column of the instructions"})
    mask_column: str = field(default="mask", metadata={"help": "column of the masks, if there is one"})
    task_column: str = field(default="task", metadata={"help": "column of the tasks, if there is one"})
    resolution: int | None = field(default=None, metadata={"help": "pixels per side; default: the model's"})
    resize_mode: str = field(
        default="crop", metadata={"help": "how images get to the resolution: crop (the centre) or stretch"}
    )
    max_bad_rows_fraction: float = field(default=0.05, metadata={"help": "rows that may be unusable, and are skipped"})

    train_text_encoder: bool = field(default=False, metadata={"help": "train the text encoder too"})
    edit_region_weight: float = field(default=1.0, metadata={"help": "weight in the loss of tokens inside the mask"})
    conditioning_dropout: bool = field(default=True, metadata={"help": "drop image or text, 5 %% each and 5 %% both"})
    target_token_dropout: float = field(
        default=0.0, metadata={"help": "share of pairs whose target so far is shown in part as the source's"}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "train a LoRA adapter of this rank, nothing else"})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "the adapter counts alpha / rank times; default 1"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "probability of dropping an input of the adapter"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(TARGET_MODULES), metadata={"help": "names of the linear layers to adapt"}
    )
    lora_modules_to_save: list[str] = field(
        default_factory=list, metadata={"help": "modules to train as a whole, such as text_projection"}
    )
    distillation_model: str | None = field(default=None, metadata={"help": "folder or Hub id of a DINOv2"})
    distillation_loss_weight: float = field(
        default=0.5, metadata={"help": "weight of the distance to the features of the DINOv2"}
    )

    batch_size: int = field(default=64, metadata={"help": "per process"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches per step"})
    max_train_steps: int = field(default=40000, metadata={"help": "steps of the whole run"})
    max_train_minutes: float = field(default=math.inf, metadata={"help": "stop cleanly, with a checkpoint, after this"})
    optimizer: Literal["adamw", "muon"] = field(
        default="adamw",
        metadata={"help": "muon: Muon for hidden matrices, AdamW for the rest; learns much faster from scratch"},
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "AdamW's"})
    muon_learning_rate: float = field(default=1e-3, metadata={"help": "Muon's; steps are as large as AdamW's"})
    lr_scheduler: str = field(default="constant_with_warmup", metadata={"help": "name of a schedule of transformers"})
    lr_warmup_steps: int = field(default=0, metadata={"help": "steps in which the learning rate rises"})
    weight_decay: float = field(default=0.05, metadata={"help": "of matrices"})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's"})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "longer gradients are shortened to this"})
    max_nonfinite_steps: int = field(default=10, metadata={"help": "steps without a finite loss before the run stops"})
    ema_decay: float | None = field(
        default=None, metadata={"help": "also average the weights, by this factor a step, and save `pipeline-ema/`"}
    )
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "compute activations twice, for less memory"})
    compile: bool = field(default=False, metadata={"help": "compile the networks with torch.compile"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager is faster on CPUs, with --compile"})
    num_workers: int = field(default=0, metadata={"help": "processes that read and decode, per training process"})
    seed: int = field(default=0, metadata={"help": "of the order of pairs, dropout and new weights"})

    checkpointing_steps: int = field(default=1000, metadata={"help": "steps between checkpoints"})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "checkpoints that are kept"})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "`latest` or a checkpoint's name"})
    validation_steps: int = field(default=1000, metadata={"help": "steps between validations"})
    num_validation_batches: int = field(default=4, metadata={"help": "batches of pairs held out"})
    num_validation_pictures: int = field(default=6, metadata={"help": "of them as images"})
    logging_steps: int = field(default=20, metadata={"help": "steps between lines of figures"})
    push_to_hub: str | None = field(default=None, metadata={"help": "id of the repository to upload the result to"})
    hub_private_repo: bool = field(default=True, metadata={"help": "make a new repository private"})
    push_steps: int | None = field(
        default=None, metadata={"help": "upload every so many steps, and not at the end only"}
    )
    license: str | None = field(default=None, metadata={"help": "identifier of the weights' licence, for the card"})
    log_with: str | None = field(default=None, metadata={"help": "tensorboard, wandb, ..."})


def build_sources(args: Arguments) -> list[DatasetSpec]:
    """Name what to train on: the sources of a recipe, or one data set with its columns."""
    if (args.dataset is None) == (args.recipe is None):
        raise ValueError("Give `dataset` or `recipe`: one of them, and not both.")
    if args.recipe is not None:
        return load_recipe(args.recipe)
    return [DatasetSpec(args.dataset, columns=name_columns(args), streaming=args.streaming)]


def name_columns(args: Arguments) -> dict[str, str]:
    names = ("source_image", "target_image", "prompt", "mask", "task")
    columns = {name: getattr(args, f"{name}_column") for name in names}
    return {ours: theirs for ours, theirs in columns.items() if ours != theirs}


def build_collator(args: Arguments, pipeline: EditARPipeline) -> EditCollator:
    try:
        height, width = pipeline.resolve_size(args.resolution, args.resolution)
    except ValueError as error:
        raise ValueError(f"`resolution` is {args.resolution}: {error}") from error
    stride, text_hidden_size = pipeline.vq_model.config.stride, pipeline.transformer.config.text_hidden_size
    return EditCollator(pipeline.processor, height, width, args.resize_mode, stride, text_hidden_size)


def open_checked(source: DatasetSpec, pipeline: EditARPipeline, collator: EditCollator):
    """Open a source, and refuse tokens made in advance that do not fit the model."""
    opened = open_dataset(source)
    if isinstance(opened, datasets.Dataset):
        check_image_tokens(opened, pipeline.transformer.config.vocab_size, *collator.grid)
    return opened


def check_data(args: Arguments, pipeline: EditARPipeline, opened: list):
    """Refuse, before the first step, data that does not fit the arguments."""
    has_tokens = ["source_image_tokens" in dataset.column_names for dataset in opened]
    if any(has_tokens) and not all(has_tokens):
        raise ValueError("`recipe` mixes pictures with tokens made in advance; make tokens of all, or of none.")
    if args.train_text_encoder and any("prompt_embeds" in dataset.column_names for dataset in opened):
        raise ValueError(
            "`train_text_encoder`: `dataset` holds text states of the encoder as it was; make tokens alone."
        )
    if args.distillation_model is not None:
        if any(has_tokens):
            raise ValueError("`distillation_model` looks at pictures, and `dataset` holds tokens; give the pictures.")
        if pipeline.transformer.config.distillation_hidden_size is None:
            raise ValueError(
                "`distillation_model` needs a model with a distillation head; `distillation_hidden_size` in its "
                "configuration is None."
            )


def build_data(
    args: Arguments, accelerator: Accelerator, pipeline: EditARPipeline
) -> tuple[StatefulDataLoader, list[dict], int | None]:
    """Open the data; return the endless loader, the batches held out, and the number of pairs where it is known."""
    sources, collator = build_sources(args), build_collator(args, pipeline)
    held_out_source = None
    if args.validation_dataset is not None:
        held_out_source = DatasetSpec(
            args.validation_dataset, "validation", columns=name_columns(args), streaming=args.streaming
        )
        check_held_out(sources, held_out_source)
    opened = [open_checked(source, pipeline, collator) for source in sources]
    check_data(args, pipeline, opened)
    size = collator.height, collator.width
    reader = RowReader(pipeline.processor.image_processor, *size, args.resize_mode, collator.stride)
    processes = accelerator.process_index, accelerator.num_processes
    rows = MixedRows(sources, opened, reader, args.max_bad_rows_fraction, args.seed, *processes)
    dataloader = build_dataloader(rows, collator, args.batch_size, args.num_workers)
    held_out = []
    if held_out_source is not None:
        rows, bad_rows = open_checked(held_out_source, pipeline, collator), BadRowCount(args.max_bad_rows_fraction)
        how_many = args.batch_size, args.num_validation_batches
        held_out = collate_first_rows(rows, held_out_source, reader, collator, *how_many, bad_rows)
    is_counted = all(isinstance(dataset, datasets.Dataset) for dataset in opened)
    return dataloader, held_out, sum(map(len, opened)) if is_counted else None


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
    )
    if accelerator.state.deepspeed_plugin is not None:
        settings = {"train_micro_batch_size_per_gpu": args.batch_size, "gradient_clipping": args.max_grad_norm}
        accelerator.state.deepspeed_plugin.deepspeed_config.update(settings)
    accelerator.init_trackers("editar", config={name: str(value) for name, value in vars(args).items()})
    return accelerator


@dataclass
class Run:
    """What a training run consists of, and the loop over it."""

    args: Arguments
    accelerator: Accelerator
    pipeline: EditARPipeline
    module: TrainingStep
    teacher: DistillationTeacher | None
    optimizers: list
    schedulers: list
    dataloader: StatefulDataLoader
    held_out: list[dict]
    ema: EMAModel | None
    guard: NonFiniteGuard
    num_pairs: int | None
    step: int = 0
    validation_loss: float | None = None

    def train(self):
        """Run optimiser steps until the last one or the end of the time allowed, and leave a checkpoint."""
        args, start_time = self.args, time.monotonic()
        self.print_banner()
        log = LossLog(self.accelerator, self.count_positions(), args.max_train_steps, self.step)
        batches = enumerate(self.dataloader, start=self.step * args.gradient_accumulation_steps)
        is_last = self.step >= args.max_train_steps
        self.module.train()
        while not is_last:
            self.take_step(list(itertools.islice(batches, args.gradient_accumulation_steps)), log)
            is_last = self.is_out_of_time(start_time) or self.step >= args.max_train_steps
            if self.step == 1 or self.step % args.logging_steps == 0:
                skipped = {"nonfinite_steps": self.guard.num_skipped} if self.guard.num_skipped else {}
                # The first step is logged at once, and counts in the first means too.
                write = log.flush if self.step % args.logging_steps == 0 else log.log
                write(self.step, self.schedulers[0].get_last_lr()[0], **skipped)
            if self.step % args.checkpointing_steps == 0 or is_last:
                save_checkpoint(
                    self.accelerator, args.output_dir, self.step, args.checkpoints_total_limit, self.dataloader
                )
            if self.held_out and self.step % args.validation_steps == 0:
                self.validate()
            if args.push_steps is not None and self.step % args.push_steps == 0 and not is_last:
                self.save_result()

    def print_banner(self):
        """Say what is trained on what, and how long that is."""
        args, num_processes = self.args, self.accelerator.num_processes
        samples_per_step = args.batch_size * args.gradient_accumulation_steps * num_processes
        num_trained = sum(parameter.numel() for parameter in list_trained(self.module))
        num_parameters = sum(parameter.numel() for parameter in self.module.parameters())
        num_held_out = sum(len(batch["input_ids"]) for batch in self.held_out)
        precision = "float32" if args.mixed_precision == "no" else f"{args.mixed_precision}, weights in float32"
        facts = {
            "model": args.model,
            "data": args.dataset or args.recipe,
            "pairs": "streamed, their number is unknown" if self.num_pairs is None else f"{self.num_pairs:,}",
            "held out": f"{num_held_out:,} pairs",
            "steps": f"{self.step:,} to {args.max_train_steps:,}",
            "batch": f"{samples_per_step:,} pairs: {args.batch_size:,} × {args.gradient_accumulation_steps:,} "
            f"accumulated × {num_processes:,} processes",
            "trained": f"{num_trained:,} of {num_parameters:,} parameters",
            "device": str(self.accelerator.device),
            "dtype": precision,
        }
        print_banner(self.accelerator, facts)
        if self.num_pairs is not None:
            print_epochs(self.accelerator, "max_train_steps", args.max_train_steps, samples_per_step, self.num_pairs)

    def take_step(self, batches: list[tuple[int, dict]], log: LossLog):
        """Step the weights once, on the gradients of all batches."""
        total, inputs = 0.0, []
        for index, batch in batches:
            groups = batch.pop("groups")
            inputs.append(self.prepare_inputs(index, batch))
            with self.accelerator.accumulate(self.module):
                losses = self.module(**inputs[-1])
                self.accelerator.backward(losses["loss"])
            log.add(losses, self.args.batch_size, **groups)
            total = total + losses["loss"].detach()
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.args.max_grad_norm)
        self.step += 1
        is_usable = self.guard.admits(total, norm)
        if not is_usable:
            self.guard.skip(self.step, inputs)
        for optimizer in self.optimizers:
            # In fp16 the loss scaler has to see every step; one that is not usable it skips by itself.
            if is_usable or self.accelerator.scaler is not None:
                optimizer.step()
            optimizer.zero_grad()
        if is_usable and self.ema is not None:
            self.ema.step(list_trained(self.module))
        for scheduler in self.schedulers:
            scheduler.step()
        log.progress_bar.update()

    def prepare_inputs(self, index: int, batch: dict) -> dict:
        """Encode a batch's pictures, ask the teacher what it sees, and draw what is dropped."""
        batch = send_to_device(batch, self.accelerator.device)
        features = None if self.teacher is None else self.teacher(batch["target_pixel_values"])
        batch = encode_image_tokens(batch, self.pipeline.vq_model)
        place = index * self.accelerator.num_processes + self.accelerator.process_index
        inputs = draw_dropout(
            batch, self.args.seed, place, self.args.conditioning_dropout, self.args.target_token_dropout
        )
        return {**inputs, "teacher_features": features}

    def count_positions(self) -> int:
        """Count the positions the decoder sees of a pair."""
        collator = self.dataloader.collate_fn
        return 2 * math.prod(collator.grid) + self.pipeline.transformer.config.num_text_tokens

    def is_out_of_time(self, start_time: float) -> bool:
        """Ask whether the time of any process is up, so that all of them stop at the same step."""
        if math.isinf(self.args.max_train_minutes):
            return False
        if time.monotonic() - start_time > 60 * self.args.max_train_minutes:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def validate(self):
        """Log the loss on held-out pairs and save a few of them as source | edited | target."""
        self.module.eval()
        batches = [send_to_device(batch, self.accelerator.device) for batch in self.held_out]
        batches = [encode_image_tokens(batch, self.pipeline.vq_model) for batch in batches]
        with torch.no_grad(), self.accelerator.autocast():
            losses = torch.cat([self.module(batch)["token_losses"] for batch in batches])
        self.validation_loss = losses.mean().item()
        log_figures(self.accelerator, {"validation_loss": self.validation_loss}, self.step)
        # Where the weights lie in parts, every process has to ask for them; elsewhere one is enough.
        if self.accelerator.is_main_process or self.accelerator.is_fsdp2:
            self.save_pictures(batches[0])
        self.module.train()

    def save_pictures(self, batch: dict):
        """Save the first pairs of a batch as rows source | edited | target, through the pipeline that users call."""
        collator = self.dataloader.collate_fn
        with self.accelerator.autocast(), callable_parts(self.module):
            sheet = draw_validation_pictures(
                self.pipeline, batch, self.args.num_validation_pictures, collator.height, collator.width
            )
        if self.accelerator.is_main_process:
            folder = Path(self.args.output_dir) / "validation"
            folder.mkdir(parents=True, exist_ok=True)
            sheet.save(folder / f"step-{self.step:07d}.png")

    def save_result(self):
        """Save the trained pipeline or adapter; and once more with the averaged weights, if there are any."""
        kind = "pipeline" if self.args.lora_rank is None else "adapter"
        with whole_parameters(self.module):
            if self.accelerator.is_main_process:
                self.save_weights(kind)
        if self.accelerator.is_main_process and self.ema is not None:
            trained = list_trained(self.module)
            self.ema.store(trained)
            self.ema.copy_to(trained)
            self.save_weights(kind, "-ema")
            self.ema.restore(trained)
        self.accelerator.wait_for_everyone()

    def save_weights(self, kind: str, suffix: str = ""):
        """Save the weights and their card beside their place, put both there, and upload them if that was asked for."""
        args = self.args
        folder, repo_id = Path(args.output_dir) / f"{kind}{suffix}", args.push_to_hub and f"{args.push_to_hub}{suffix}"
        save = self.pipeline.save_lora_weights if kind == "adapter" else self.pipeline.save_pretrained
        card = self.compose_card(repo_id or str(folder), is_adapter=kind == "adapter")
        has_picture = self.validation_loss is not None
        picture = max((Path(args.output_dir) / "validation").glob("*.png")) if has_picture else None
        save_result(folder, save, card, picture, repo_id, args.hub_private_repo)

    def compose_card(self, name: str, is_adapter: bool) -> str:
        args = self.args
        num_batches = args.gradient_accumulation_steps * self.accelerator.num_processes
        return compose_training_card(
            name=name,
            base_model=args.model,
            dataset=args.dataset or args.recipe,
            num_pairs=self.num_pairs,
            num_steps=self.step,
            num_samples_per_step=args.batch_size * num_batches,
            trained_text_encoder=args.train_text_encoder,
            command=("accelerate", "launch", *sys.argv),
            is_adapter=is_adapter,
            validation_loss=self.validation_loss,
            license=args.license,
        )


def list_trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def check_arguments(args: Arguments):
    """Refuse, before anything is loaded, what cannot be."""
    check_folder_or_hub_id(args.model, "model")
    if args.distillation_model is not None:
        check_folder_or_hub_id(args.distillation_model, "distillation_model")
    checkpoints = list_checkpoints(args.output_dir)
    if checkpoints and args.resume_from_checkpoint is None:
        raise ValueError(
            f"`output_dir` {args.output_dir} holds {checkpoints[-1].name}; pass `--resume_from_checkpoint latest` to "
            "go on from it, or another folder."
        )
    if args.lora_rank is not None and args.train_text_encoder:
        raise ValueError("`train_text_encoder` and `lora_rank`: an adapter holds the decoder's part alone; drop one.")
    check_push_arguments(args.push_to_hub, args.push_steps)
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        raise ValueError(f"`ema_decay` is {args.ema_decay}; it must be between 0 and 1.")


def check_distribution(args: Arguments, accelerator: Accelerator):
    """Refuse what does not work with weights or optimisers in parts."""
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and args.ema_decay is not None:
        raise ValueError("`ema_decay`: a checkpoint of FSDP2 would hold one part of the averaged weights; use DDP.")
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) and args.optimizer == "muon":
        raise ValueError(f"`optimizer` is 'muon', which comes beside AdamW; {kind.value} holds one. Use adamw, or DDP.")


def build_run(args: Arguments, accelerator: Accelerator) -> Run:
    """Load, check and prepare everything."""
    pipeline = prepare_pipeline(args)
    dataloader, held_out, num_pairs = build_data(args, accelerator, pipeline)
    pipeline.vq_model.to(accelerator.device)
    teacher = build_teacher(args, pipeline, accelerator.device)
    module = TrainingStep(
        pipeline.transformer,
        pipeline.text_encoder,
        dataloader.collate_fn.grid,
        args.edit_region_weight,
        args.distillation_loss_weight,
    )
    if args.compile:
        module.compile()
    optimizers = build_optimizers(args, module)
    schedulers = [
        get_scheduler(args.lr_scheduler, optimizer, args.lr_warmup_steps, args.max_train_steps)
        for optimizer in optimizers
    ]
    module, *optimizers = accelerator.prepare(module, *optimizers)
    accelerator.register_for_checkpointing(*schedulers)
    ema = None
    if args.ema_decay is not None:
        ema = EMAModel(list_trained(module), decay=args.ema_decay)
        accelerator.register_for_checkpointing(ema)
    # DeepSpeed steps while it goes backward: there is nothing left to skip.
    has_stepped = accelerator.distributed_type == DistributedType.DEEPSPEED
    guard = NonFiniteGuard(accelerator, Path(args.output_dir), 0 if has_stepped else args.max_nonfinite_steps)
    parts = (module, teacher, optimizers, schedulers, dataloader, held_out, ema, guard, num_pairs)
    return Run(args, accelerator, pipeline, *parts)


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    check_arguments(args)
    accelerator = build_accelerator(args)
    check_distribution(args, accelerator)
    if args.push_to_hub is not None and accelerator.is_main_process:
        suffixes = [""] if args.ema_decay is None else ["", "-ema"]
        create_repositories([f"{args.push_to_hub}{suffix}" for suffix in suffixes], args.hub_private_repo)
    set_seed(args.seed)
    run = build_run(args, accelerator)
    if args.resume_from_checkpoint is not None:
        run.step = load_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint, run.dataloader)
    run.train()
    run.save_result()
    accelerator.end_training()


if __name__ == "__main__":
    main()
