"""Train EditAR with Accelerate.

`transformers.Trainer` is not used for four reasons. On resumption it reads all earlier batches again. It takes only one
optimizer. It updates the weights even if gradients are not finite. It writes checkpoints in place, so a run that is
killed can leave a partial checkpoint.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, send_to_device
from diffusers.training_utils import EMAModel
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import get_scheduler
from transformers.utils import logging

from ..pipelines.dtypes import has_cpu_instructions
from ..pipelines.hub import make_card
from ..pipelines.pipeline_editar import EditARPipeline
from ..processing_editar import EditARProcessor
from .arguments import TrainingArguments
from .aspects import AspectReader, BucketedRows
from .checkpoints import is_out_of_time, load_checkpoint, save_checkpoint, start_accelerator
from .dataset_specs import DatasetSpec, check_held_out, open_dataset
from .distillation import DistillationTeacher
from .logs import LossLog, log_figures, print_banner
from .lora import add_lora
from .optimization import NonFiniteGuard, build_muon, build_optimizer, split_hidden_matrices
from .results import VALIDATION_IMAGE, create_repositories, describe_command, save_result
from .rows import BadRowCount, RowReader, collate_rows
from .sharding import callable_parts, whole_parameters
from .step import TrainingStep, draw_dropout, encode_image_tokens
from .streams import MixedRows, build_dataloader
from .validation import draw_validation_images


logger = logging.get_logger(__name__)


def build_accelerator(args: TrainingArguments) -> Accelerator:
    """Start Accelerate. Refuse combinations of options that do not work, before any weight is loaded.

    Raises:
        ValueError: If `output_dir` holds checkpoints of another run, or if EMA or Muon is combined with sharding.
    """
    # Every step has the same number of pairs, also at the end of an epoch.
    accumulation = GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False)
    accelerator = start_accelerator(args, gradient_accumulation_plugin=accumulation)
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and args.ema_decay is not None:
        raise ValueError("`ema_decay`: an FSDP2 checkpoint would hold only one shard of the averaged weights; use DDP.")
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) and args.optimizer == "muon":
        raise ValueError(
            f"`optimizer` is 'muon', which uses AdamW as a second optimizer, but {kind.value} supports only one. Use "
            "adamw, or DDP."
        )
    if accelerator.state.deepspeed_plugin is not None:
        settings = {"train_micro_batch_size_per_gpu": args.batch_size, "gradient_clipping": args.max_grad_norm}
        accelerator.state.deepspeed_plugin.deepspeed_config.update(settings)
    create_repositories(accelerator, args, *([""] if args.ema_decay is None else ["", "-ema"]))
    return accelerator


def load_pipeline(args: TrainingArguments) -> EditARPipeline:
    """Load the pipeline in float32, freeze the networks that are not trained, and add a LoRA adapter if asked to."""
    pipeline = EditARPipeline.from_pretrained(args.model, dtype=torch.float32)
    transformer = pipeline.transformer
    pipeline.vq_model.requires_grad_(False).eval()
    pipeline.text_encoder.requires_grad_(args.train_text_encoder)
    if args.lora_rank is not None:
        modules = args.lora_target_modules, args.lora_modules_to_save
        add_lora(transformer, args.model, args.lora_rank, args.lora_alpha, args.lora_dropout, *modules)
    transformer.set_attn_implementation(args.attn_implementation)
    if args.distillation_model is None and transformer.distillation_head is not None:
        # A distributed run stops with an error if a trained parameter gets no gradient.
        transformer.distillation_head.requires_grad_(False)
    if args.gradient_checkpointing:
        transformer.gradient_checkpointing_enable()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def list_trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class EditARTrainer:
    """Train a pipeline, either in full or with a LoRA adapter.

    The dropout of a step depends only on the seed and the step, and each checkpoint holds the position of the data
    loader. A run that is interrupted and resumed therefore gives exactly the weights of an uninterrupted run.

    Args:
        args (`TrainingArguments`): Arguments of the run.
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
        image_processor = args.build_image_processor(pipeline.vq_model.config.stride, pipeline)
        self.grid = pipeline.compute_grid(image_processor.size.height, image_processor.size.width)
        text = pipeline.processor.tokenizer, pipeline.processor.num_text_tokens
        self.processor = EditARProcessor(image_processor, *text)
        self.dataloader, self.held_out, self.num_pairs = self.build_data(specs, validation_spec)
        self.samples_per_step = args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        pipeline.vq_model.to(accelerator.device)
        self.teacher = self.build_teacher()
        weights = args.edit_region_weight, args.distillation_loss_weight
        module = TrainingStep(pipeline.transformer, pipeline.text_encoder, self.grid, *weights)
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
        # DeepSpeed updates the weights inside the backward pass, so the step can no longer be skipped.
        has_stepped = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.guard = NonFiniteGuard(accelerator, Path(args.output_dir), 0 if has_stepped else args.max_nonfinite_steps)

    # Data, teacher and optimizers

    def build_data(
        self, specs: Sequence[DatasetSpec], validation_spec: DatasetSpec | None
    ) -> tuple[StatefulDataLoader, list[dict], int | None]:
        """Open the data sets. Return the endless loader, the held-out batches, and the number of pairs if known."""
        args, config = self.args, self.pipeline.transformer.config
        opened = [open_dataset(spec) for spec in specs]
        self.check_columns([dataset.column_names for dataset in opened])
        states_shape = self.processor.num_text_tokens, config.text_hidden_size
        reader: Any = RowReader(self.processor.image_processor, config.vocab_size, states_shape)
        collate = partial(collate_rows, processor=self.processor)
        build_rows: Callable = MixedRows
        if args.aspect_ratios:
            reader = AspectReader(args.aspect_ratios, reader)
            self.pipeline.processor.image_processor.aspect = "source"  # saved with the pipeline
            build_rows = partial(BucketedRows, args.batch_size)
        processes = self.accelerator.process_index, self.accelerator.num_processes
        rows = build_rows(specs, opened, reader, BadRowCount(args.max_bad_rows_fraction), args.seed, *processes)
        dataloader = build_dataloader(rows, collate, args.batch_size, args.num_workers)
        held_out = []
        if validation_spec is not None:
            dataset, bad_rows = open_dataset(validation_spec), BadRowCount(args.max_bad_rows_fraction)
            check_held_out(specs, validation_spec)
            read = partial(reader.read, spec=validation_spec)
            usable = bad_rows.read(enumerate(dataset), read, validation_spec.name)
            first = list(itertools.islice(usable, args.batch_size * args.num_validation_batches))
            bad_rows.judge()
            for size in dict.fromkeys(row["size"] for row in first):
                same = [row for row in first if row["size"] == size]
                held_out += [collate(same[k : k + args.batch_size]) for k in range(0, len(same), args.batch_size)]
        is_counted = all(isinstance(dataset, datasets.Dataset) for dataset in opened)
        return dataloader, held_out, sum(map(len, opened)) if is_counted else None

    def check_columns(self, column_names: list[list[str]]) -> None:
        """Check that the columns of the data sets fit the arguments."""
        for column in ("source_image_tokens", "prompt_embeds"):
            if len({column in names for names in column_names}) > 1:
                raise ValueError(
                    f"`recipe`: only some data sets have precomputed `{column}`; precompute it for all, or for none."
                )
        if self.args.train_text_encoder and "prompt_embeds" in column_names[0]:
            raise ValueError(
                "`train_text_encoder`: `dataset` holds precomputed text states, which do not change with the text "
                "encoder; precompute image tokens only."
            )
        if self.args.distillation_model is not None and "source_image_tokens" in column_names[0]:
            raise ValueError("`distillation_model` needs images, but `dataset` holds tokens; give the images.")

    def build_teacher(self) -> DistillationTeacher | None:
        model, expected = self.args.distillation_model, self.pipeline.transformer.config.distillation_hidden_size
        if model is None:
            return None
        teacher = DistillationTeacher(model).to(self.accelerator.device)
        width = teacher.backbone.config.hidden_size
        if width != expected:
            raise ValueError(
                f"`distillation_model` {model!r} has features of width {width}, but `distillation_hidden_size` in the "
                f"configuration of the decoder is {expected}; choose models in which the two are equal."
            )
        return teacher

    def build_optimizers(self, module: nn.Module) -> list[torch.optim.Optimizer]:
        args = self.args
        betas = args.adam_beta1, args.adam_beta2
        if args.optimizer == "adamw":
            return [build_optimizer(module.parameters(), args.learning_rate, betas, args.weight_decay)]
        if self.accelerator.device.type == "cpu" and not has_cpu_instructions(torch.bfloat16):
            logger.warning(
                "`optimizer` is 'muon', which computes in bfloat16. This CPU has no instructions for bfloat16, so "
                "steps are many times slower than with 'adamw'."
            )
        matrices, others = split_hidden_matrices(module)
        adamw = build_optimizer(others, args.learning_rate, betas, args.weight_decay)
        return [adamw, build_muon(matrices, args.muon_learning_rate, args.weight_decay)]

    # The loop

    def train(self) -> None:
        """Train until the last step or the time limit, and save a checkpoint. Resume first if the arguments say so."""
        args, accelerator, start_time = self.args, self.accelerator, time.monotonic()
        if args.resume_from_checkpoint is not None:
            self.step = load_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint, self.dataloader)
        num_held_out = sum(len(batch["input_ids"]) for batch in self.held_out)
        facts = {"model": args.model, "data": args.dataset or args.recipe, "held out": f"{num_held_out:,} samples"}
        steps = self.step, args.max_train_steps
        print_banner(accelerator, facts, self.module, *steps, self.samples_per_step, self.num_pairs)
        log = LossLog(accelerator, args.max_train_steps, self.step)
        batches = enumerate(self.dataloader, start=self.step * args.gradient_accumulation_steps)
        is_last = self.step >= args.max_train_steps
        self.module.train()
        while not is_last:
            self.take_step(list(itertools.islice(batches, args.gradient_accumulation_steps)), log)
            is_out = is_out_of_time(accelerator, start_time, args.max_train_minutes)
            is_last = is_out or self.step >= args.max_train_steps
            is_logged = self.step % args.logging_steps == 0
            if self.step == 1 or is_logged:
                skipped = {"nonfinite_steps": self.guard.num_skipped} if self.guard.num_skipped else {}
                # The first step is logged at once, and it is also part of the first means.
                log.log(self.step, self.schedulers[0].get_last_lr()[0], clear=is_logged, **skipped)
            if self.step % args.checkpointing_steps == 0 or is_last:
                limit = args.checkpoints_total_limit
                save_checkpoint(accelerator, args.output_dir, self.step, limit, self.dataloader)
            if self.held_out and self.step % args.validation_steps == 0:
                self.validate()
            if args.push_steps is not None and self.step % args.push_steps == 0 and not is_last:
                self.save_result()

    def take_step(self, batches: list[tuple[int, dict]], log: LossLog) -> None:
        """Update the weights once, with the gradients of all batches."""
        total, inputs = torch.zeros((), device=self.accelerator.device), []
        for index, batch in batches:
            groups = batch.pop("groups")
            inputs.append(self.prepare_inputs(index, batch))
            with self.accelerator.accumulate(self.module):
                losses = self.module(**inputs[-1])
                self.accelerator.backward(losses["loss"])
            num_tokens = 2 * math.prod(batch["grid"]) + self.pipeline.transformer.config.num_text_tokens
            log.add(losses, self.args.batch_size, num_tokens, **groups)
            total = total + losses["loss"].detach()
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.args.max_grad_norm)
        self.step += 1
        is_usable = self.guard.admits(total, norm)
        if not is_usable:
            self.guard.skip(self.step, inputs)
        for optimizer in self.optimizers:
            # In fp16 the loss scaler must see every step. It skips the steps that cannot be used.
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
        dropouts = self.args.conditioning_dropout, self.args.target_token_dropout
        return {**draw_dropout(batch, self.args.seed, place, *dropouts), "teacher_features": features}

    # Validation and results

    def validate(self) -> None:
        """Log the loss on the held-out pairs, and save an image of some pairs as rows source | edited | target."""
        self.module.eval()
        batches = [{name: value for name, value in batch.items() if name != "groups"} for batch in self.held_out]
        batches = [send_to_device(batch, self.accelerator.device) for batch in batches]
        batches = [encode_image_tokens(batch, self.pipeline.vq_model) for batch in batches]
        with torch.no_grad(), self.accelerator.autocast():
            losses = torch.cat([self.module(batch)["token_losses"] for batch in batches])
        self.validation_loss = float(losses.mean())
        log_figures(self.accelerator, {"validation_loss": self.validation_loss}, self.step)
        # With sharded weights, all processes must take part; otherwise one is enough.
        if self.accelerator.is_main_process or self.accelerator.is_fsdp2:
            with self.accelerator.autocast(), callable_parts(self.module):
                sheet = draw_validation_images(self.pipeline, batches[0], self.args.num_validation_images)
            if self.accelerator.is_main_process:
                folder = Path(self.args.output_dir) / "validation"
                folder.mkdir(parents=True, exist_ok=True)
                sheet.save(folder / f"step-{self.step:07d}.png")
        self.module.train()

    def save_result(self) -> None:
        """Save the trained pipeline or adapter, and also the averaged weights if there are any."""
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

    def save_weights(self, suffix: str = "") -> None:
        """Save the weights with their model card, and upload them if the arguments say so."""
        name, save = "pipeline", self.pipeline.save_pretrained
        if self.args.lora_rank is not None:
            name, save = "adapter", self.pipeline.save_lora_weights
        images = (Path(self.args.output_dir) / "validation").glob("*.png")
        image = None if self.validation_loss is None else max(images)
        save_result(self.args, name, save, self.make_card, image, suffix)

    def make_card(self, name: str) -> str:
        """Make the model card of weights that are loaded as `name`, a folder or a Hub id."""
        args, dataset = self.args, self.args.dataset or self.args.recipe
        num_pairs = "" if self.num_pairs is None else f", {self.num_pairs:,} pairs"
        frozen = "VQ model and the text encoder were frozen"
        if args.train_text_encoder:
            frozen = "VQ model was frozen, and the text encoder was trained too"
        training = (
            f"Trained from `{args.model}` on `{dataset}`{num_pairs}, for {self.step:,} steps of "
            f"{self.samples_per_step:,} pairs. The {frozen}. {describe_command()}"
        )
        if args.aspect_ratios and args.lora_rank is not None:
            # An adapter does not hold the image processor, whose `aspect` a trained pipeline has set.
            training = (
                f'Trained at the aspect ratios {", ".join(args.aspect_ratios)}. Pass `aspect="source"` to the '
                f"pipeline, so that it edits images at their own proportions. {training}"
            )
        figures, metrics = None, None
        if self.validation_loss is not None:
            metrics = {"loss": round(self.validation_loss, 4)}
            figures = (
                f"Loss on held-out pairs: {self.validation_loss:.4f} nats per token. Some of these pairs, as rows "
                f"source | edited | target:\n\n![source, edited, target]({VALIDATION_IMAGE})"
            )
        template = "base" if args.lora_rank is None else "adapter"
        sections = {"training": training, "figures": figures}
        return make_card(template, name, dataset, args.model, args.license, metrics, **sections)
