"""Add a LoRA adapter to a frozen decoder."""

from collections.abc import Sequence

from peft import LoraConfig

from ..modeling_editar import EditARForConditionalGeneration
from ..pipelines.lora import attach_adapter


ADAPTER_NAME = "default"
# All matrices of a layer: on few pairs, fine-tuning the feed-forward matrices helps too.
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(
    transformer: EditARForConditionalGeneration,
    base_model: str,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] = TARGET_MODULES,
    modules_to_save: Sequence[str] = (),
) -> None:
    """Freeze a decoder and add an adapter. Before training, the adapter does not change the output.

    Args:
        transformer (`EditARForConditionalGeneration`): The decoder.
        base_model (`str`): Folder or Hub id of the model that the adapter is for.
        rank (`int`): Rank of the updates.
        alpha (`float`, *optional*): The updates are scaled by `alpha / rank`; defaults to `rank`, a scale of 1.
        dropout (`float`): Dropout of the adapter's inputs.
        target_modules (sequence of `str`): Names of the linear layers to adapt.
        modules_to_save (sequence of `str`): Names of modules to train in full, such as `"text_projection"`.

    Raises:
        ValueError: If the rank is not positive, or if the decoder has no module with one of the names.

    Source: LoRA (arXiv 2106.09685), section 4.1.
    """
    known = {path.rpartition(".")[2] for path, _ in transformer.named_modules()}
    for argument, names in (("target_modules", target_modules), ("modules_to_save", modules_to_save)):
        if unknown := [name for name in names if name not in known]:
            listed = ", ".join(sorted(name for name in known if name and not name.isdecimal()))
            raise ValueError(f"`{argument}` names {', '.join(unknown)}; the decoder has {listed}.")
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        modules_to_save=list(modules_to_save) or None,
        base_model_name_or_path=base_model,
    )
    transformer.requires_grad_(False)
    attach_adapter(transformer, config, ADAPTER_NAME)
