"""Command-line arguments of the training scripts."""

import math
import sys
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import HfArgumentParser

from ..pipelines.hub import check_folder_or_hub_id
from .dataset_specs import DatasetSpec, load_recipe
from .lora import TARGET_MODULES
from .results import check_push_arguments


def parse_arguments(dataclass_type: Any) -> Any:
    """Parse the command line into a dataclass. Flags are spelled `--with-hyphens` or `--with_underscores`.

    Old names of a flag are the `aliases` in its field's metadata; a `FutureWarning` names the new one.
    """
    (arguments,) = HfArgumentParser(dataclass_type).parse_args_into_dataclasses()
    typed = {word.partition("=")[0] for word in sys.argv[1:]}
    for argument in fields(dataclass_type):
        for old in typed.intersection(argument.metadata.get("aliases", ())):
            new = f"--{argument.name.replace('_', '-')}"
            warnings.warn(f"{old} is now called {new}; the next version removes {old}.", FutureWarning, stacklevel=2)
    return arguments


@dataclass
class TrainingArguments:
    """Arguments of `EditARTrainer`; the `help` of each field describes it.

    Source: the optimiser's defaults are those of EditAR (arXiv 2501.04699), section 4.1.
    """

    model: str = field(metadata={"help": "pipeline folder or Hub id to start from"})
    output_dir: str = field(
        metadata={"help": "folder for checkpoints, validation images and the trained `pipeline/` or `adapter/`"}
    )
    dataset: str | None = field(default=None, metadata={"help": "Hub id, folder or pattern of files"})
    recipe: str | None = field(default=None, metadata={"help": "YAML file that mixes several data sets"})
    streaming: bool = field(default=True, metadata={"help": "read a data set of the Hub while it is downloaded"})
    validation_dataset: str | None = field(
        default=None, metadata={"help": "like --dataset; its split `validation` is read"}
    )
    source_image_column: str = field(default="source_image", metadata={"help": "column of the images to edit"})
    target_image_column: str = field(default="target_image", metadata={"help": "column of the edited images"})
    prompt_column: str = field(default="prompt", metadata={"help": "column of the instructions"})
    mask_column: str = field(default="mask", metadata={"help": "column of the masks, if it exists"})
    task_column: str = field(default="task", metadata={"help": "column of the tasks, if it exists"})
    resolution: int | None = field(default=None, metadata={"help": "pixels per side; default: the model's"})
    resize_mode: str = field(
        default="crop", metadata={"help": "how images are resized: crop (keep the centre) or stretch"}
    )
    max_bad_rows_fraction: float = field(default=0.05, metadata={"help": "fraction of rows that may be unusable"})

    train_text_encoder: bool = field(default=False, metadata={"help": "also train the text encoder"})
    edit_region_weight: float = field(default=1.0, metadata={"help": "loss weight of tokens inside the mask"})
    conditioning_dropout: bool = field(
        default=True, metadata={"help": "drop source image or prompt: 5 %% of pairs each, and 5 %% both"}
    )
    target_token_dropout: float = field(
        default=0.0, metadata={"help": "fraction of pairs in which source tokens replace some input target tokens"}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "train only a LoRA adapter of this rank"})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "scale of the adapter times its rank; default: the rank"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout of the adapter's inputs"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(TARGET_MODULES), metadata={"help": "names of the linear layers to adapt"}
    )
    lora_modules_to_save: list[str] = field(
        default_factory=list, metadata={"help": "modules to train in full, such as text_projection"}
    )
    distillation_model: str | None = field(default=None, metadata={"help": "folder or Hub id of a DINOv2"})
    distillation_loss_weight: float = field(
        default=0.5, metadata={"help": "loss weight of the distance to the features of the DINOv2"}
    )

    batch_size: int = field(default=64, metadata={"help": "pairs per batch and process"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches per step"})
    max_train_steps: int = field(default=40000, metadata={"help": "total number of steps"})
    max_train_minutes: float = field(
        default=math.inf, metadata={"help": "save a checkpoint and stop after this many minutes"}
    )
    optimizer: Literal["adamw", "muon"] = field(
        default="adamw",
        metadata={"help": "muon: Muon for hidden matrices, AdamW for the rest; learns much faster from scratch"},
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "learning rate of AdamW"})
    muon_learning_rate: float = field(
        default=1e-3, metadata={"help": "learning rate of Muon, whose steps are as large as AdamW's"}
    )
    lr_scheduler: str = field(default="constant_with_warmup", metadata={"help": "name of a schedule of transformers"})
    lr_warmup_steps: int = field(default=0, metadata={"help": "steps in which the learning rate rises"})
    weight_decay: float = field(default=0.05, metadata={"help": "weight decay of matrices"})
    adam_beta1: float = field(default=0.9, metadata={"help": "first beta of AdamW"})
    adam_beta2: float = field(default=0.95, metadata={"help": "second beta of AdamW"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "norm to which longer gradients are clipped"})
    max_nonfinite_steps: int = field(
        default=10, metadata={"help": "steps without a finite loss or gradient that are skipped before the run stops"}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "also average the weights with this decay per step, and save `pipeline-ema/`"}
    )
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute activations to save memory"})
    compile: bool = field(default=False, metadata={"help": "compile the networks with torch.compile"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager is faster on CPUs, with --compile"})
    num_workers: int = field(default=0, metadata={"help": "processes that read and decode, per training process"})
    seed: int = field(default=0, metadata={"help": "seed of the order of pairs, of dropout and of new weights"})

    checkpointing_steps: int = field(default=1000, metadata={"help": "steps between checkpoints"})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "number of checkpoints to keep"})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "`latest` or the name of a checkpoint"})
    validation_steps: int = field(default=1000, metadata={"help": "steps between validations"})
    num_validation_batches: int = field(default=4, metadata={"help": "batches of held-out pairs"})
    num_validation_images: int = field(
        default=6,
        metadata={
            "help": "held-out pairs that are edited and saved as images",
            "aliases": ["--num_validation_pictures", "--num-validation-pictures"],
        },
    )
    logging_steps: int = field(default=20, metadata={"help": "steps between lines of the log"})
    push_to_hub: str | None = field(default=None, metadata={"help": "repository id to upload the result to"})
    hub_private_repo: bool = field(default=True, metadata={"help": "make a new repository private"})
    push_steps: int | None = field(default=None, metadata={"help": "steps between uploads; default: only at the end"})
    license: str | None = field(default=None, metadata={"help": "identifier of the weights' licence, for the card"})
    log_with: str | None = field(default=None, metadata={"help": "tensorboard, wandb, ..."})

    def __post_init__(self):
        check_folder_or_hub_id(self.model, "model")
        if self.distillation_model is not None:
            check_folder_or_hub_id(self.distillation_model, "distillation_model")
        if self.lora_rank is not None and self.train_text_encoder:
            raise ValueError("`train_text_encoder` and `lora_rank`: an adapter is for the decoder alone; drop one.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` is {self.ema_decay}; it must be between 0 and 1.")
        check_push_arguments(self.push_to_hub, self.push_steps)

    def describe_datasets(self) -> list[DatasetSpec]:
        """List the data sets to train on: those of the recipe, or the one given by its columns."""
        if self.dataset is not None and self.recipe is None:
            return [DatasetSpec(self.dataset, columns=self.columns, streaming=self.streaming)]
        if self.recipe is not None and self.dataset is None:
            return load_recipe(self.recipe)
        raise ValueError("Give `dataset` or `recipe`: one of them, and not both.")

    def describe_validation_dataset(self) -> DatasetSpec | None:
        if self.validation_dataset is None:
            return None
        return DatasetSpec(self.validation_dataset, "validation", columns=self.columns, streaming=self.streaming)

    @property
    def columns(self) -> dict[str, str]:
        """Map our names of columns to those of the data set where they differ."""
        names = ("source_image", "target_image", "prompt", "mask", "task")
        columns = {name: getattr(self, f"{name}_column") for name in names}
        return {ours: theirs for ours, theirs in columns.items() if ours != theirs}
