"""Train EditAR with Accelerate: the loop, and what it is made of.

`transformers.Trainer` does not fit. It resumes by reading all earlier batches again, takes one optimiser, steps on
gradients that are not finite, and writes checkpoints in place, so that a kill leaves half of one.
"""

import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration, send_to_device
from diffusers.training_utils import EMAModel
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import get_scheduler

from ..pipelines.hub import make_card
from ..pipelines.pipeline_editar import EditARPipeline
from .arguments import TrainingArguments
from .batch import encode_image_tokens
from .checkpoints import check_output_dir, load_checkpoint, save_checkpoint
from .data import EditCollator, check_image_tokens
from .dataset_specs import DatasetSpec, check_held_out, open_dataset
from .distillation import DistillationTeacher
from .logs import LossLog, log_figures, print_banner, print_epochs
from .lora import add_lora
from .nonfinite import NonFiniteGuard
from .optimization import build_muon, build_optimizer, split_hidden_matrices
from .results import VALIDATION_IMAGE, create_repositories, describe_command, save_result
from .rows import BadRowCount, RowReader
from .sharding import callable_parts, whole_parameters
from .step import TrainingStep, draw_dropout
from .streams import MixedRows, build_dataloader, collate_first_rows
from .validation import draw_validation_images


def build_accelerator(args: TrainingArguments) -> Accelerator:
    """Start Accelerate, and refuse before anything is loaded what this launch cannot do.

    Raises:
        ValueError: If `output_dir` holds checkpoints of another run, or if EMA or Muon meet sharded weights.
    """
    check_output_dir(args.output_dir, args.resume_from_checkpoint)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        # Every step has the same number of pairs, also across the end of an epoch.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=args.log_with,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=f"{args.output_dir}/logs"),
    )
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and args.ema_decay is not None:
        raise ValueError("`ema_decay`: a checkpoint of FSDP2 would hold one part of the averaged weights; use DDP.")
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) and args.optimizer == "muon":
        raise ValueError(f"`optimizer` is 'muon', which comes beside AdamW; {kind.value} holds one. Use adamw, or DDP.")
    if accelerator.state.deepspeed_plugin is not None:
        settings = {"train_micro_batch_size_per_gpu": args.batch_size, "gradient_clipping": args.max_grad_norm}
        accelerator.state.deepspeed_plugin.deepspeed_config.update(settings)
    accelerator.init_trackers("editar", config={name: str(value) for name, value in vars(args).items()})
    if args.push_to_hub is not None and accelerator.is_main_process:
        suffixes = [""] if args.ema_decay is None else ["", "-ema"]
        create_repositories([f"{args.push_to_hub}{suffix}" for suffix in suffixes], args.hub_private_repo)
    return accelerator


def load_pipeline(args: TrainingArguments) -> EditARPipeline:
    """Load the pipeline in float32, freeze what is not trained, and add the LoRA adapter if there is one."""
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


def list_trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class EditARTrainer:
    """Train a pipeline, whole or with a LoRA adapter.

    A step's dropout depends only on the seed and the step, and the data loader's place is part of each checkpoint. A
    run that is interrupted and resumed is therefore the uninterrupted one, bit for bit.

    Args:
        args (`TrainingArguments`): Settings.
        accelerator (`Accelerator`): From `build_accelerator`.
        pipeline (`EditARPipeline`): From `load_pipeline`. Its weights are trained in place.
        specs (sequence of `DatasetSpec`): Data sets to train on.
        validation_spec (`DatasetSpec`, *optional*): Data set of held-out pairs.

    Raises:
        ValueError: If the data does not fit the model or the arguments.
    """

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        pipeline: EditARPipeline,
        specs: Sequence[DatasetSpec],
        validation_spec: DatasetSpec | None = None,
    ):
        self.args, self.accelerator, self.pipeline = args, accelerator, pipeline
        self.step = 0
        self.validation_loss: float | None = None
        self.collator = self.build_collator()
        self.dataloader, self.held_out, self.num_pairs = self.build_data(specs, validation_spec)
        pipeline.vq_model.to(accelerator.device)
        self.teacher = self.build_teacher()
        module = TrainingStep(
            pipeline.transformer,
            pipeline.text_encoder,
            self.collator.grid,
            args.edit_region_weight,
            args.distillation_loss_weight,
        )
        if args.compile:
            module.compile()
        optimizers = self.build_optimizers(module)
        self.schedulers = [
            get_scheduler(args.lr_scheduler, optimizer, args.lr_warmup_steps, args.max_train_steps)
            for optimizer in optimizers
        ]
        self.module, *self.optimizers = accelerator.prepare(module, *optimizers)
        accelerator.register_for_checkpointing(*self.schedulers)
        self.ema = None
        if args.ema_decay is not None:
            self.ema = EMAModel(list_trained(self.module), decay=args.ema_decay)
            accelerator.register_for_checkpointing(self.ema)
        # DeepSpeed steps during the backward pass, when it is too late to skip the step.
        has_stepped = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.guard = NonFiniteGuard(accelerator, Path(args.output_dir), 0 if has_stepped else args.max_nonfinite_steps)

    # What a run is made of

    def build_collator(self) -> EditCollator:
        args, pipeline = self.args, self.pipeline
        try:
            height, width = pipeline.resolve_size(args.resolution, args.resolution)
        except ValueError as error:
            raise ValueError(f"`resolution` is {args.resolution}: {error}") from error
        stride, text_hidden_size = pipeline.vq_model.config.stride, pipeline.transformer.config.text_hidden_size
        return EditCollator(pipeline.processor, height, width, args.resize_mode, stride, text_hidden_size)

    def build_data(
        self, specs: Sequence[DatasetSpec], validation_spec: DatasetSpec | None
    ) -> tuple[StatefulDataLoader, list[dict], int | None]:
        """Open the data sets. Returns the endless loader, the held-out batches, and the number of pairs if known."""
        args, collator = self.args, self.collator
        if validation_spec is not None:
            check_held_out(specs, validation_spec)
        opened = [self.open_checked(spec) for spec in specs]
        self.check_columns([dataset.column_names for dataset in opened])
        image_processor = self.pipeline.processor.image_processor
        reader = RowReader(image_processor, collator.height, collator.width, args.resize_mode, collator.stride)
        processes = self.accelerator.process_index, self.accelerator.num_processes
        rows = MixedRows(specs, opened, reader, args.max_bad_rows_fraction, args.seed, *processes)
        dataloader = build_dataloader(rows, collator, args.batch_size, args.num_workers)
        held_out = []
        if validation_spec is not None:
            rows, bad_rows = self.open_checked(validation_spec), BadRowCount(args.max_bad_rows_fraction)
            how_many = args.batch_size, args.num_validation_batches
            held_out = collate_first_rows(rows, validation_spec, reader, collator, *how_many, bad_rows)
        is_counted = all(isinstance(dataset, datasets.Dataset) for dataset in opened)
        return dataloader, held_out, sum(map(len, opened)) if is_counted else None

    def open_checked(self, spec: DatasetSpec) -> datasets.Dataset | datasets.IterableDataset:
        """Open a data set, and refuse precomputed tokens that do not fit the model."""
        dataset = open_dataset(spec)
        if isinstance(dataset, datasets.Dataset):
            check_image_tokens(dataset, self.pipeline.transformer.config.vocab_size, *self.collator.grid)
        return dataset

    def check_columns(self, column_names: list[list[str]]):
        """Refuse columns that do not fit the arguments."""
        has_tokens = ["source_image_tokens" in names for names in column_names]
        if any(has_tokens) and not all(has_tokens):
            raise ValueError("`recipe` mixes images with precomputed tokens; compute the tokens of all, or of none.")
        if self.args.train_text_encoder and any("prompt_embeds" in names for names in column_names):
            raise ValueError(
                "`train_text_encoder`: `dataset` holds text states of the untrained encoder; precompute tokens only."
            )
        if self.args.distillation_model is not None:
            if any(has_tokens):
                raise ValueError("`distillation_model` needs images, and `dataset` holds tokens; give the images.")
            if self.pipeline.transformer.config.distillation_hidden_size is None:
                raise ValueError(
                    "`distillation_model` needs a model with a distillation head; `distillation_hidden_size` in its "
                    "configuration is None."
                )

    def build_teacher(self) -> DistillationTeacher | None:
        model = self.args.distillation_model
        if model is None:
            return None
        teacher = DistillationTeacher(model)
        width = teacher.backbone.config.hidden_size
        expected = self.pipeline.transformer.config.distillation_hidden_size
        if width != expected:
            raise ValueError(
                f"`distillation_model` {model!r} has features of width {width}; the model's distillation head predicts "
                f"{expected}."
            )
        return teacher.to(self.accelerator.device)

    def build_optimizers(self, module: nn.Module) -> list[torch.optim.Optimizer]:
        args = self.args
        matrices: list[torch.Tensor] = []
        others = list(module.parameters())
        if args.optimizer == "muon":
            matrices, others = split_hidden_matrices(module)
        adamw = build_optimizer(others, args.learning_rate, (args.adam_beta1, args.adam_beta2), args.weight_decay)
        return [adamw, build_muon(matrices, args.muon_learning_rate, args.weight_decay)] if matrices else [adamw]

    # The loop

    def train(self):
        """Train, from a checkpoint if asked to, until the last step or the time limit, and save a checkpoint."""
        args, start_time = self.args, time.monotonic()
        if args.resume_from_checkpoint is not None:
            self.step = load_checkpoint(self.accelerator, args.output_dir, args.resume_from_checkpoint, self.dataloader)
        self.print_banner()
        positions = 2 * math.prod(self.collator.grid) + self.pipeline.transformer.config.num_text_tokens
        log = LossLog(self.accelerator, positions, args.max_train_steps, self.step)
        batches = enumerate(self.dataloader, start=self.step * args.gradient_accumulation_steps)
        is_last = self.step >= args.max_train_steps
        self.module.train()
        while not is_last:
            self.take_step(list(itertools.islice(batches, args.gradient_accumulation_steps)), log)
            is_last = self.is_out_of_time(start_time) or self.step >= args.max_train_steps
            if self.step == 1 or self.step % args.logging_steps == 0:
                skipped = {"nonfinite_steps": self.guard.num_skipped} if self.guard.num_skipped else {}
                # The first step is logged at once, and also counts in the first means.
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

    def take_step(self, batches: list[tuple[int, dict]], log: LossLog):
        """Step the weights once, on the gradients of all batches."""
        total, inputs = torch.zeros((), device=self.accelerator.device), []
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
            # In fp16 the loss scaler has to see every step, and skips unusable ones itself.
            if is_usable or self.accelerator.scaler is not None:
                optimizer.step()
            optimizer.zero_grad()
        if is_usable and self.ema is not None:
            self.ema.step(list_trained(self.module))
        for scheduler in self.schedulers:
            scheduler.step()
        log.progress_bar.update()

    def prepare_inputs(self, index: int, batch: dict) -> dict:
        """Encode the images of a batch, compute the teacher's features, and draw the dropout."""
        batch = send_to_device(batch, self.accelerator.device)
        features = None if self.teacher is None else self.teacher(batch["target_pixel_values"])
        batch = encode_image_tokens(batch, self.pipeline.vq_model)
        place = index * self.accelerator.num_processes + self.accelerator.process_index
        inputs = draw_dropout(
            batch, self.args.seed, place, self.args.conditioning_dropout, self.args.target_token_dropout
        )
        return {**inputs, "teacher_features": features}

    def is_out_of_time(self, start_time: float) -> bool:
        """Ask whether the time of any process is up, so that all of them stop at the same step."""
        if math.isinf(self.args.max_train_minutes):
            return False
        if time.monotonic() - start_time > 60 * self.args.max_train_minutes:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def print_banner(self):
        """Print what is trained on what, and how long that is."""
        args = self.args
        num_trained = sum(parameter.numel() for parameter in list_trained(self.module))
        num_parameters = sum(parameter.numel() for parameter in self.module.parameters())
        num_held_out = sum(len(batch["input_ids"]) for batch in self.held_out)
        facts = {
            "model": args.model,
            "data": str(args.dataset or args.recipe),
            "pairs": "streamed, their number is unknown" if self.num_pairs is None else f"{self.num_pairs:,}",
            "held out": f"{num_held_out:,} pairs",
            "steps": f"{self.step:,} to {args.max_train_steps:,}",
            "batch": f"{self.samples_per_step:,} pairs: {args.batch_size:,} × {args.gradient_accumulation_steps:,} "
            f"accumulated × {self.accelerator.num_processes:,} processes",
            "trained": f"{num_trained:,} of {num_parameters:,} parameters",
            "device": str(self.accelerator.device),
            "dtype": "float32" if args.mixed_precision == "no" else f"{args.mixed_precision}, weights in float32",
        }
        print_banner(self.accelerator, facts)
        if self.num_pairs is not None:
            print_epochs(
                self.accelerator, "max-train-steps", args.max_train_steps, self.samples_per_step, self.num_pairs
            )

    @property
    def samples_per_step(self) -> int:
        return self.args.batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes

    # Validation and results

    def validate(self):
        """Log the loss on the held-out pairs, and save some of them as rows source | edited | target."""
        self.module.eval()
        batches = [send_to_device(batch, self.accelerator.device) for batch in self.held_out]
        batches = [encode_image_tokens(batch, self.pipeline.vq_model) for batch in batches]
        with torch.no_grad(), self.accelerator.autocast():
            losses = torch.cat([self.module(batch)["token_losses"] for batch in batches])
        self.validation_loss = float(losses.mean())
        log_figures(self.accelerator, {"validation_loss": self.validation_loss}, self.step)
        # Sharded weights need all processes; otherwise one is enough.
        if self.accelerator.is_main_process or self.accelerator.is_fsdp2:
            with self.accelerator.autocast(), callable_parts(self.module):
                size = self.collator.height, self.collator.width
                sheet = draw_validation_images(self.pipeline, batches[0], self.args.num_validation_images, *size)
            if self.accelerator.is_main_process:
                folder = Path(self.args.output_dir) / "validation"
                folder.mkdir(parents=True, exist_ok=True)
                sheet.save(folder / f"step-{self.step:07d}.png")
        self.module.train()

    def save_result(self):
        """Save the trained pipeline or adapter, and the averaged weights beside it if there are any."""
        with whole_parameters(self.module):
            if self.accelerator.is_main_process:
                self.save_weights()
        if self.accelerator.is_main_process and self.ema is not None:
            trained = list_trained(self.module)
            self.ema.store(trained)
            self.ema.copy_to(trained)
            self.save_weights("-ema")
            self.ema.restore(trained)
        self.accelerator.wait_for_everyone()

    def save_weights(self, suffix: str = ""):
        """Save the weights with their card, and upload them if asked to."""
        args, pipeline = self.args, self.pipeline
        kind = "pipeline" if args.lora_rank is None else "adapter"
        folder, repo_id = Path(args.output_dir) / f"{kind}{suffix}", args.push_to_hub and f"{args.push_to_hub}{suffix}"
        save = pipeline.save_pretrained if kind == "pipeline" else pipeline.save_lora_weights
        image = None
        if self.validation_loss is not None:
            image = max((Path(args.output_dir) / "validation").glob("*.png"))
        save_result(folder, save, self.make_card(repo_id or str(folder)), image, repo_id, args.hub_private_repo)

    def make_card(self, name: str) -> str:
        """Make the card of the weights that load under `name`."""
        args, dataset = self.args, self.args.dataset or self.args.recipe
        num_pairs = "" if self.num_pairs is None else f", {self.num_pairs:,} pairs"
        text_encoder = "the text encoder was trained too" if args.train_text_encoder else "so was the text encoder"
        training = (
            f"Trained from `{args.model}` on `{dataset}`{num_pairs}, for {self.step:,} steps of "
            f"{self.samples_per_step:,} pairs. The VQ model was frozen; {text_encoder}. {describe_command()}"
        )
        figures = None
        if self.validation_loss is not None:
            figures = (
                f"Loss on held-out pairs: {self.validation_loss:.4f} nats per token. Some of them, as source, edited "
                f"and target:\n\n![source, edited, target]({VALIDATION_IMAGE})"
            )
        template = "base" if args.lora_rank is None else "adapter"
        return make_card(template, name, dataset, args.model, args.license, training=training, figures=figures)
