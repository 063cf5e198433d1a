"""Command-line arguments of the training scripts."""

import math
import sys
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import HfArgumentParser, SchedulerType
from transformers.hf_argparser import HfArg

from ..checks import check_choice
from ..image_processing_editar import RESIZE_MODES, EditARImageProcessor
from ..pipelines.hub import check_folder_or_hub_id
from ..pipelines.pipeline_editar import EditARPipeline
from .aspects import parse_aspect_ratio
from .dataset_specs import DatasetSpec, load_recipe
from .lora import TARGET_MODULES


COLUMNS = ("source_image", "target_image", "prompt", "mask", "task")


def parse_arguments(dataclass_type: Any) -> Any:
    """Parse the command line into a dataclass. Flags are spelled `--with-hyphens` or `--with_underscores`.

    The metadata of a field lists the old names of its flag as `aliases`. An old name raises a `FutureWarning` that
    gives the new name.
    """
    (arguments,) = HfArgumentParser(dataclass_type).parse_args_into_dataclasses()
    typed = {word.partition("=")[0] for word in sys.argv[1:]}
    for argument in fields(dataclass_type):
        for old in typed.intersection(argument.metadata.get("aliases", ())):
            new = f"--{argument.name.replace('_', '-')}"
            warnings.warn(f"{old} is now called {new}; the next version removes {old}.", FutureWarning, stacklevel=2)
    return arguments


@dataclass(kw_only=True)
class RunArguments:
    """Arguments of every training script; the `help` of each field describes it."""

    output_dir: str = HfArg(help="folder for checkpoints and trained weights")
    batch_size: int = HfArg(default=64, help="samples per batch in each process")
    max_train_minutes: float = HfArg(default=math.inf, help="save a checkpoint and stop after this many minutes")
    max_bad_rows_fraction: float = HfArg(default=0.05, help="fraction of rows that may be unusable")
    weight_decay: float = HfArg(default=0.05, help="weight decay of parameters with two or more dimensions")
    mixed_precision: str = HfArg(default="no", help="no, bf16 or fp16")
    seed: int = HfArg(default=0, help="seed of the sample order, of dropout and of new weights")

    checkpointing_steps: int = HfArg(default=1000, help="steps between checkpoints")
    checkpoints_total_limit: int = HfArg(default=2, help="number of checkpoints to keep")
    resume_from_checkpoint: str | None = HfArg(default=None, help="`latest` or the name of a checkpoint")
    logging_steps: int = HfArg(default=20, help="steps between log lines")
    log_with: str | None = HfArg(default=None, help="tensorboard, wandb, ...")
    push_to_hub: str | None = HfArg(default=None, help="repository id to upload the result to")
    hub_private_repo: bool = HfArg(
        default=True, help="a new repository is private; --no-hub-private-repo makes it public"
    )
    push_steps: int | None = HfArg(default=None, help="steps between uploads; default: only at the end")
    license: str | None = HfArg(default=None, help="license identifier of the weights, for the model card")

    def __post_init__(self) -> None:
        if self.push_steps is not None and self.push_to_hub is None:
            raise ValueError("`push_steps` needs `push_to_hub`; give the id of the repository to upload to.")
        if self.push_to_hub is not None and self.push_to_hub.count("/") != 1:
            raise ValueError(f"`push_to_hub` is {self.push_to_hub!r}; give a full id, `owner/name`.")


@dataclass(kw_only=True)
class PairArguments:
    """Arguments of scripts that read pairs of a source image and a target image."""

    dataset: str | None = HfArg(default=None, help="Hub id, folder or file pattern of the pairs")
    recipe: str | None = HfArg(default=None, help="YAML file that describes several data sets")
    source_image_column: str = HfArg(default="source_image", help="column of the source images")
    target_image_column: str = HfArg(default="target_image", help="column of the target images")
    prompt_column: str = HfArg(default="prompt", help="column of the instructions")
    mask_column: str = HfArg(default="mask", help="column of the masks; may be missing")
    task_column: str = HfArg(default="task", help="column of the tasks; may be missing")
    resolution: int | None = HfArg(default=None, help="pixels per side; default: the resolution of the model")
    resize_mode: str = HfArg(default="crop", help="how images are resized: crop (keep the center) or stretch")

    def describe_dataset(self, dataset: str, split: str, streaming: bool) -> DatasetSpec:
        """Describe a data set whose columns have the names in these arguments."""
        columns = {name: getattr(self, f"{name}_column") for name in COLUMNS}
        columns = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
        return DatasetSpec(dataset, split, columns=columns, streaming=streaming)

    def describe_datasets(self, split: str = "train", streaming: bool = True) -> list[DatasetSpec]:
        """List the data sets to read: the data sets of `recipe`, or `dataset` alone."""
        if self.dataset is not None and self.recipe is None:
            return [self.describe_dataset(self.dataset, split, streaming)]
        if self.recipe is not None and self.dataset is None:
            return load_recipe(self.recipe)
        raise ValueError("Give either `dataset` or `recipe`, and not both.")

    def build_image_processor(self, stride: int, pipeline: EditARPipeline | None = None) -> EditARImageProcessor:
        """Build the image processor for `resolution`, which defaults to the resolution of the pipeline.

        Raises:
            ValueError: If the VQ model or the pipeline does not support the resolution.
        """
        height = width = self.resolution
        try:
            if pipeline is not None:
                height, width = pipeline.resolve_size(height, width)
            size = {"height": height, "width": width}
            return EditARImageProcessor(size=size, resize_mode=self.resize_mode, stride=stride)
        except ValueError as error:
            raise ValueError(f"`resolution` is {self.resolution}: {error}") from error


@dataclass(kw_only=True)
class TrainingArguments(PairArguments, RunArguments):
    """Arguments of `EditARTrainer`; the `help` of each field describes it.

    Source: the optimizer's defaults are those of EditAR (arXiv 2501.04699), section 4.1.
    """

    model: str = HfArg(help="pipeline folder or Hub id to start from")
    streaming: bool = HfArg(
        default=True, help="a data set of the Hub is read while it is downloaded; --no-streaming downloads it first"
    )
    aspect_ratios: list[str] = field(
        default_factory=list,
        metadata={"help": "width:height, such as 1:1 3:2 2:3; each pair has the nearest one; default: all are squares"},
    )
    validation_dataset: str | None = HfArg(default=None, help="like --dataset; the split `validation` is read")

    train_text_encoder: bool = HfArg(default=False, help="also train the text encoder")
    edit_region_weight: float = HfArg(default=1.0, help="loss weight of tokens inside the mask")
    conditioning_dropout: bool = HfArg(
        default=True,
        help="5 %% of the pairs lose the source image, 5 %% the prompt, and 5 %% both; "
        "--no-conditioning-dropout switches this off",
    )
    target_token_dropout: float = HfArg(
        default=0.0, help="fraction of pairs in which source tokens replace some input target tokens"
    )
    lora_rank: int | None = HfArg(default=None, help="train only a LoRA adapter of this rank")
    lora_alpha: float | None = HfArg(default=None, help="adapter updates are scaled by alpha / rank; default: the rank")
    lora_dropout: float = HfArg(default=0.0, help="dropout of the adapter's inputs")
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(TARGET_MODULES), metadata={"help": "names of the linear layers to adapt"}
    )
    lora_modules_to_save: list[str] = field(
        default_factory=list, metadata={"help": "modules to train in full, such as text_projection"}
    )
    distillation_model: str | None = HfArg(default=None, help="folder or Hub id of a DINOv2 model")
    distillation_loss_weight: float = HfArg(
        default=0.5, help="weight of the distillation loss, the distance to DINOv2 features"
    )

    gradient_accumulation_steps: int = HfArg(default=1, help="batches per optimizer step")
    max_train_steps: int = HfArg(default=40000, help="total number of steps")
    optimizer: Literal["adamw", "muon"] = HfArg(
        default="adamw", help="muon: Muon for hidden matrices, AdamW for the rest; learns much faster from scratch"
    )
    learning_rate: float = HfArg(default=1e-4, help="learning rate of AdamW")
    muon_learning_rate: float = HfArg(default=1e-3, help="learning rate of Muon, on the same scale as AdamW's")
    lr_scheduler: str = HfArg(default="constant_with_warmup", help="name of a learning-rate schedule of transformers")
    lr_warmup_steps: int = HfArg(default=0, help="steps in which the learning rate rises")
    adam_beta1: float = HfArg(default=0.9, help="first beta of AdamW")
    adam_beta2: float = HfArg(default=0.95, help="second beta of AdamW")
    max_grad_norm: float = HfArg(default=1.0, help="gradients with a larger norm are clipped to this norm")
    max_nonfinite_steps: int = HfArg(
        default=10, help="number of steps with a non-finite loss or gradient that are skipped before the run stops"
    )
    ema_decay: float | None = HfArg(
        default=None, help="also keep an average of the weights with this decay per step, saved as `pipeline-ema/`"
    )
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations to save memory")
    compile: bool = HfArg(default=False, help="compile the networks with torch.compile")
    attn_implementation: str = HfArg(default="sdpa", help="eager is faster on CPUs, with --compile")
    num_workers: int = HfArg(default=0, help="worker processes that load data, per training process")

    validation_steps: int = HfArg(default=1000, help="steps between validations")
    num_validation_batches: int = HfArg(default=4, help="batches of held-out pairs")
    num_validation_images: int = HfArg(
        default=6,
        help="held-out pairs that are edited and saved as images",
        aliases=["--num_validation_pictures", "--num-validation-pictures"],
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for ratio in self.aspect_ratios:
            parse_aspect_ratio(ratio)
        check_choice("resize_mode", self.resize_mode, RESIZE_MODES)
        check_choice("lr_scheduler", self.lr_scheduler, [kind.value for kind in SchedulerType])
        check_folder_or_hub_id(self.model, "model")
        if self.distillation_model is not None:
            check_folder_or_hub_id(self.distillation_model, "distillation_model")
        if self.lora_rank is not None and self.train_text_encoder:
            raise ValueError(
                "`train_text_encoder` and `lora_rank` are both set, but an adapter trains the decoder alone; remove "
                "one of them."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` is {self.ema_decay}; it must be between 0 and 1.")

    def describe_validation_dataset(self) -> DatasetSpec | None:
        if self.validation_dataset is None:
            return None
        return self.describe_dataset(self.validation_dataset, "validation", self.streaming)
