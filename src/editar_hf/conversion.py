"""Published EditAR files ↔ this package.

A published file is a pickle with the weights of one network under other names: the decoder's query, key and value
projections fused, its heads' rotation pairs side by side; the tokenizer's as here. Sizes are read off the tensors,
every key is accounted for, and both directions are exact: converting back gives the same bits. The file reads
bottom-up: weights of one network → one network → a pipeline and its folder.
"""

import argparse
import math
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import PreTrainedConfig, T5Config, T5EncoderModel, T5Tokenizer

from .configuration_editar import EditARConfig, EditARVQConfig
from .image_processing_editar import EditARImageProcessor
from .io import atomic_path
from .modeling_editar import EditARForConditionalGeneration
from .modeling_editar_vq import EditARVQModel
from .pipelines.hub import check_folder_or_hub_id, describe_key_problems, make_card
from .pipelines.pipeline_editar import EditARPipeline
from .processing_editar import EditARProcessor


# Where the published weights are on the Hub.
PUBLISHED_TRANSFORMER = {
    "repo_id": "JitengMu/CVPR2025_EditAR_release",
    "filename": "editar_release.pt",
    "repo_type": "dataset",
}
PUBLISHED_VQ_MODEL = {"repo_id": "peizesun/llamagen_t2i", "filename": "vq_ds16_t2i.pt"}
PUBLISHED_TEXT_ENCODER = "google/flan-t5-xl"
INTRODUCTION = """\
Edits images by instruction, one token after the other. These are published weights of EditAR
([arXiv 2501.04699](https://arxiv.org/abs/2501.04699)), its VQ tokenizer
([LlamaGen, arXiv 2406.06525](https://arxiv.org/abs/2406.06525)) and its text encoder, converted with
`editar-hf convert`; nothing was trained on the way."""
START_INTRODUCTION = """\
A start for training EditAR ([arXiv 2501.04699](https://arxiv.org/abs/2501.04699)), which cannot edit yet: the
text-to-image decoder of [LlamaGen (arXiv 2406.06525)](https://arxiv.org/abs/2406.06525), its VQ tokenizer and its text
encoder, converted with `editar-hf convert`. New, and drawn at random, are {new_parts}."""

# What converting back writes.
REVERTED_TRANSFORMER, REVERTED_VQ_MODEL = "editar.pt", "vq.pt"

# Where the published files keep their weights, in the order of looking.
WEIGHTS_KEYS = ("model", "module", "state_dict")

# Published name → ours, outside the layers.
TRANSFORMER_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "cls_embedding.cap_proj.fc1.weight": "model.text_projection.fc1.weight",
    "cls_embedding.cap_proj.fc2.weight": "model.text_projection.fc2.weight",
    "cls_embedding.uncond_embedding": "model.null_prompt_embeds",
    "img_uncond_embedding": "model.null_image_embeds",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "alignment.weight": "distillation_head.weight",
    "alignment.bias": "distillation_head.bias",
}
# What a LlamaGen text-to-image decoder lacks, and what that is: the training of EditAR begins with these drawn anew.
NEW_PARTS = {
    "img_uncond_embedding": "the null image embedding",
    "alignment.weight": "the distillation head",
    "alignment.bias": "the distillation head",
}
# Published name → ours, inside `layers.{i}.` and `model.layers.{i}.`.
LAYER_NAMES = {
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
FUSED_NAME = "attention.wqkv.weight"

# What every decoder file must hold for its sizes to be read.
TRANSFORMER_SIZE_KEYS = (
    "tok_embeddings.weight",
    "cls_embedding.cap_proj.fc1.weight",
    "cls_embedding.uncond_embedding",
    "layers.0.feed_forward.w1.weight",
)
VQ_SIZE_KEYS = ("quantize.embedding.weight", "quant_conv.weight", "encoder.conv_in.weight")

# Training statistics of the published tokenizer, of no use to anyone else.
CODEBOOK_USAGE_KEY = "quantize.codebook_used"
CODEBOOK_USAGE_SIZE = 65536

# What the published formats take for granted and therefore cannot carry.
TRANSFORMER_CONSTANTS = ("text_rotary", "rope_theta", "rms_norm_eps", "hidden_act")
VQ_CONSTANTS = ("norm_num_groups",)


def open_checkpoint(path: str | Path) -> Any:
    """Open a pickle without running any code in it, memory-mapped where the format allows.

    Raises:
        ValueError: If the file is absent or does not open safely.
    """
    if not Path(path).is_file():
        raise ValueError(f"`{path}` is not a file; give the path of published weights.")
    try:
        # LlamaGen's training script stores its options beside the weights: a bag of values, safe to open.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        # PyTorch's own message advises to open the file unsafely.
        raise ValueError(
            f"`{path}` does not open safely as a checkpoint: it is damaged, unreadable, of another kind (a TorchScript "
            "program, for one), or holds code. Download it anew from its authors."
        ) from error


def is_weights(found: Any) -> bool:
    """Tell whether what a checkpoint holds is named tensors."""
    return isinstance(found, dict) and all(isinstance(tensor, torch.Tensor) for tensor in found.values())


def load_published_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Load the weights of a published file.

    Raises:
        ValueError: If the file is absent, does not open safely, or holds no weights.
    """
    checkpoint = open_checkpoint(path)
    found = [checkpoint[key] for key in WEIGHTS_KEYS if isinstance(checkpoint, dict) and key in checkpoint]
    if not found or not is_weights(found[0]):
        raise ValueError(f"`{path}` holds no weights under any of {', '.join(WEIGHTS_KEYS)}; is it a published file?")
    return dict(found[0])


def read_transformer_config(
    weights: dict[str, torch.Tensor], num_attention_heads: int | None = None, grid_size: int | None = None
) -> EditARConfig:
    """Read the decoder's sizes off its published tensors.

    Args:
        weights (`dict[str, torch.Tensor]`): Published names and tensors.
        num_attention_heads (`int`, *optional*): The one size that no tensor shows; by default heads are 64 wide, and
            100 in a decoder of width 3200.
        grid_size (`int`, *optional*): Tokens a side of a LlamaGen text-to-image decoder, which none of its tensors
            shows; an EditAR decoder's do.

    Raises:
        ValueError: If the tensors are not a decoder's, the heads do not fit, or the grid is unknown or known twice.

    Source: LlamaGen (arXiv 2406.06525), table 1, for the width of heads.
    """
    check_size_keys(weights, TRANSFORMER_SIZE_KEYS, "an EditAR decoder")
    vocab_size, hidden_size = weights["tok_embeddings.weight"].shape
    num_text_tokens, text_hidden_size = weights["cls_embedding.uncond_embedding"].shape
    if "img_uncond_embedding" in weights:
        if grid_size is not None:
            raise ValueError("`grid_size` goes with a LlamaGen text-to-image decoder; this EditAR file says its own.")
        grid_size = read_grid_size(weights["img_uncond_embedding"])
    elif grid_size is None:
        raise ValueError(
            "`img_uncond_embedding` is missing: this is a LlamaGen text-to-image decoder, which cannot edit. To start "
            "EditAR's training from it, say how many tokens a side it was trained for: --grid-size 32 for 512 pixels."
        )
    if num_attention_heads is None:
        head_dim = 100 if hidden_size == 3200 else 64
        if hidden_size % head_dim:
            raise ValueError(
                f"`num_attention_heads` does not follow from a width of {hidden_size}; give --num-attention-heads."
            )
        num_attention_heads = hidden_size // head_dim
    # Four numbers a head: a rotation pair for the row and one for the column.
    elif num_attention_heads < 1 or hidden_size % (4 * num_attention_heads):
        raise ValueError(
            f"`num_attention_heads` is {num_attention_heads}; heads must split a width of {hidden_size} into multiples "
            "of 4."
        )
    features = {}
    if "img_uncond_embedding" in weights:
        alignment = weights.get("alignment.weight")
        features["distillation_hidden_size"] = None if alignment is None else alignment.shape[0]
    return EditARConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=weights["layers.0.feed_forward.w1.weight"].shape[0],
        num_hidden_layers=count_indices(weights, r"layers\.(\d+)\."),
        num_attention_heads=num_attention_heads,
        grid_size=grid_size,
        num_text_tokens=num_text_tokens,
        text_hidden_size=text_hidden_size,
        **features,
    )


def read_grid_size(null_image_embedding: torch.Tensor) -> int:
    """Read the tokens a side off the null image, which has a row for each token."""
    grid_size = math.isqrt(len(null_image_embedding))
    if grid_size**2 != len(null_image_embedding):
        raise ValueError(f"`img_uncond_embedding` has {len(null_image_embedding)} rows; a square grid was expected.")
    return grid_size


def read_vq_config(weights: dict[str, torch.Tensor]) -> EditARVQConfig:
    """Read the tokenizer's sizes off its published tensors.

    Raises:
        ValueError: If the tensors are not a VQ tokenizer's.
    """
    check_size_keys(weights, VQ_SIZE_KEYS, "a VQ tokenizer")
    num_embeddings, embedding_dim = weights["quantize.embedding.weight"].shape
    base_channels = weights["encoder.conv_in.weight"].shape[0]
    num_levels = count_indices(weights, r"encoder\.conv_blocks\.(\d+)\.")
    level_keys = [f"encoder.conv_blocks.{level}.res.0.conv1.weight" for level in range(num_levels)]
    check_size_keys(weights, level_keys, "a VQ tokenizer")
    return EditARVQConfig(
        num_embeddings=num_embeddings,
        embedding_dim=embedding_dim,
        latent_channels=weights["quant_conv.weight"].shape[1],
        base_channels=base_channels,
        channel_multipliers=tuple(weights[key].shape[0] // base_channels for key in level_keys),
        num_res_blocks=count_indices(weights, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
    )


def convert_transformer(
    weights: dict[str, torch.Tensor],
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
    grid_size: int | None = None,
) -> EditARForConditionalGeneration:
    """Build the decoder that published weights describe, on their memory where nothing changes.

    Args:
        weights (`dict[str, torch.Tensor]`): Published names and tensors, of EditAR or of LlamaGen's text-to-image
            decoder; what this one lacks is drawn anew.
        num_attention_heads, grid_size (`int`, *optional*): See `read_transformer_config`.
        dtype (`torch.dtype`, *optional*): Default: as in the file.

    Raises:
        ValueError: If keys are missing, unexpected or wrongly shaped; the message lists them.
    """
    with torch.device("meta"):
        model = EditARForConditionalGeneration(read_transformer_config(weights, num_attention_heads, grid_size))
    is_start = "img_uncond_embedding" not in weights
    expected = revert_transformer_weights(model)
    check_weights(weights, {name: t for name, t in expected.items() if not (is_start and name in NEW_PARTS)})
    converted = {}
    for name, weight in weights.items():
        converted.update(convert_transformer_weight(name, weight.to(dtype), model.config.head_dim))
    model.load_state_dict(converted, assign=True, strict=not is_start)
    if is_start:
        draw_new_parts(model)
    return model.eval()


def draw_new_parts(model: EditARForConditionalGeneration) -> None:
    """Draw what a LlamaGen text-to-image decoder lacks, as in a new model; what is there stays."""
    dtype = model.lm_head.weight.dtype
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = tensor.device.type != "meta"
    null_image_embeds = model.model.null_image_embeds
    model.model.null_image_embeds = nn.Buffer(torch.empty_like(null_image_embeds, device="cpu", dtype=dtype))
    assert model.distillation_head is not None  # A start has the default configuration.
    model.distillation_head.to_empty(device="cpu").to(dtype)
    model.initialize_weights()


def convert_transformer_weight(name: str, weight: torch.Tensor, head_dim: int) -> dict[str, torch.Tensor]:
    """Convert one published tensor of the decoder to one of ours, or to three."""
    if name in TRANSFORMER_NAMES:
        return {TRANSFORMER_NAMES[name]: weight}
    _, index, name = name.split(".", maxsplit=2)
    layer = f"layers.{index}"
    if name in LAYER_NAMES:
        return {f"model.{layer}.{LAYER_NAMES[name]}": weight}
    query, key, value = weight.chunk(3)
    return {
        f"model.{layer}.self_attn.q_proj.weight": split_rotation_pairs(query, head_dim),
        f"model.{layer}.self_attn.k_proj.weight": split_rotation_pairs(key, head_dim),
        f"model.{layer}.self_attn.v_proj.weight": value,
    }


def revert_transformer_weights(model: EditARForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Rename and fuse the decoder's weights as they are published; on the meta device, this gives shapes alone."""
    own = model.state_dict()
    published = {theirs: own[ours] for theirs, ours in TRANSFORMER_NAMES.items() if ours in own}
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in LAYER_NAMES.items():
            published[f"layers.{layer}.{theirs}"] = own[f"model.layers.{layer}.{ours}"]
        query, key, value = (own[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv")
        query, key = (join_rotation_pairs(rows, model.config.head_dim) for rows in (query, key))
        published[f"layers.{layer}.{FUSED_NAME}"] = torch.cat([query, key, value])
    return published


def split_rotation_pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder a projection's rows, head by head, from adjacent rotation pairs (2i, 2i + 1) to (i, i + head_dim / 2)."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def join_rotation_pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo `split_rotation_pairs`."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def convert_vq_model(weights: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> EditARVQModel:
    """Build the tokenizer that published weights describe.

    Raises:
        ValueError: If keys are missing, unexpected or wrongly shaped; the message lists them.
    """
    weights = {name: weight for name, weight in weights.items() if name != CODEBOOK_USAGE_KEY}
    with torch.device("meta"):
        model = EditARVQModel(read_vq_config(weights))
    check_weights(weights, model.state_dict())
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    return model.eval()


def revert_vq_weights(model: EditARVQModel) -> dict[str, torch.Tensor]:
    """Give the tokenizer's weights as they are published, with usage statistics of zero."""
    return {**model.state_dict(), CODEBOOK_USAGE_KEY: torch.zeros(CODEBOOK_USAGE_SIZE)}


def count_indices(weights: dict[str, torch.Tensor], pattern: str) -> int:
    """Count the modules of a list: one more than the largest index that `pattern` finds in a name."""
    matches = (re.match(pattern, name) for name in weights)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def check_size_keys(weights: dict[str, torch.Tensor], keys: Iterable[str], kind: str) -> None:
    """Refuse weights that lack the tensors from which sizes are read."""
    missing = [key for key in keys if key not in weights]
    if missing:
        raise ValueError(
            f"This is not {kind}: {', '.join(missing)} missing. The file holds {len(weights)} tensors, the first of "
            f"them {', '.join(list(weights)[:3]) or 'absent'}."
        )


def check_weights(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Refuse weights whose names and shapes are not exactly the expected ones."""
    found, wanted = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (weights, expected))
    if problems := describe_key_problems(found, wanted):
        raise ValueError(f"The file's keys do not fit its sizes: {problems}.")


def check_format_constants(config: PreTrainedConfig, names: tuple[str, ...]) -> None:
    """Refuse a network that differs from the published ones in what their format cannot say."""
    published = type(config)()
    for name in names:
        if getattr(config, name) != getattr(published, name):
            raise ValueError(
                f"`{name}` is {getattr(config, name)!r}. Published files store weights alone, and the published code "
                f"always computes with {getattr(published, name)!r} (see `{type(config).__name__}`): it would load "
                "these weights without an error and make other images. Share this model as a pipeline folder instead."
            )


def convert_text_encoder(source: str | Path, dtype: torch.dtype | None = None) -> tuple[T5EncoderModel, T5Tokenizer]:
    """Load the encoder half of a T5, and its tokenizer, from a Hub id or a folder.

    Raises:
        ValueError: If the source lacks weights of a T5 encoder.
        OSError: If there is no such repository or folder.
    """
    model, report = T5EncoderModel.from_pretrained(source, dtype=dtype or "auto", output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"`{source}` is not a T5 encoder: it lacks {', '.join(report['missing_keys'])}.")
    return model.eval(), T5Tokenizer.from_pretrained(source)


def convert_pipeline(
    transformer: str | Path | None = None,
    vq_model: str | Path | None = None,
    text_encoder: str | Path | None = None,
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
    grid_size: int | None = None,
) -> EditARPipeline:
    """Build a pipeline from published files; what is left out is downloaded from the Hub.

    Args:
        transformer (`str` or `Path`, *optional*): File of the EditAR decoder.
        vq_model (`str` or `Path`, *optional*): File of the VQ tokenizer.
        text_encoder (`str` or `Path`, *optional*): Hub id or folder of a T5; only its encoder is kept.
        num_attention_heads, grid_size (`int`, *optional*): See `read_transformer_config`.
        dtype (`torch.dtype`, *optional*): Default: as in the files.

    Raises:
        ValueError: If a file is not what it should be, or the three do not fit together.
    """
    if text_encoder is not None:
        check_folder_or_hub_id(text_encoder, "text_encoder")
    transformer = transformer or hf_hub_download(**PUBLISHED_TRANSFORMER)
    decoder = convert_transformer(load_published_weights(transformer), num_attention_heads, dtype, grid_size)
    vq_model = vq_model or hf_hub_download(**PUBLISHED_VQ_MODEL)
    image_tokenizer = convert_vq_model(load_published_weights(vq_model), dtype)
    text_encoder = text_encoder or PUBLISHED_TEXT_ENCODER
    check_parts(decoder.config, image_tokenizer.config, T5Config.from_pretrained(text_encoder))
    encoder, tokenizer = convert_text_encoder(text_encoder, dtype)
    stride = image_tokenizer.config.stride
    image_processor = EditARImageProcessor(size=decoder.config.grid_size * stride, stride=stride)
    processor = EditARProcessor(image_processor, tokenizer, num_text_tokens=decoder.config.num_text_tokens)
    return EditARPipeline(transformer=decoder, vq_model=image_tokenizer, text_encoder=encoder, processor=processor)


def check_parts(transformer: EditARConfig, vq_model: EditARVQConfig, text_encoder: T5Config) -> None:
    """Refuse networks that were not made for each other."""
    if transformer.vocab_size != vq_model.num_embeddings:
        raise ValueError(
            f"`vq_model` has {vq_model.num_embeddings} codes and `transformer` predicts {transformer.vocab_size}; give "
            "the tokenizer that the decoder was trained with."
        )
    if transformer.text_hidden_size != text_encoder.d_model:
        raise ValueError(
            f"`text_encoder` has states of width {text_encoder.d_model} and `transformer` reads "
            f"{transformer.text_hidden_size}; give the text encoder that the decoder was trained with."
        )


def revert_pipeline(model: str | Path, output_dir: str | Path) -> None:
    """Write the decoder and the tokenizer of a pipeline folder as `editar.pt` and `vq.pt`, in the published formats.

    Raises:
        ValueError: If `model` is missing or a folder without a pipeline, cannot be said in the published formats, or a
            file is already there.
    """
    output_dir = Path(output_dir)
    check_folder_or_hub_id(model, "model")
    if Path(model).is_dir() and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"`model` is {model}, a folder without `model_index.json`; give a pipeline folder.")
    for name in (REVERTED_TRANSFORMER, REVERTED_VQ_MODEL):
        if (output_dir / name).exists():
            raise ValueError(f"`output_dir` already holds {name}; give another folder.")
    try:
        config = EditARConfig.from_pretrained(model, subfolder="transformer")
    except OSError as error:  # which need not name the model
        raise OSError(f"`model` is {model}, of which no configuration loads: {error}") from error
    check_format_constants(config, TRANSFORMER_CONSTANTS)
    check_format_constants(EditARVQConfig.from_pretrained(model, subfolder="vq_model"), VQ_CONSTANTS)
    transformer = EditARForConditionalGeneration.from_pretrained(model, subfolder="transformer", dtype="auto")
    vq_model = EditARVQModel.from_pretrained(model, subfolder="vq_model", dtype="auto")
    for name, weights in (
        (REVERTED_TRANSFORMER, revert_transformer_weights(transformer)),
        (REVERTED_VQ_MODEL, revert_vq_weights(vq_model)),
    ):
        with atomic_path(output_dir / name) as unfinished:
            torch.save({WEIGHTS_KEYS[0]: weights}, unfinished)


def describe_sources(
    transformer: str | Path | None, vq_model: str | Path | None, text_encoder: str | Path | None
) -> dict[str, str]:
    """Name what a pipeline was converted from: Hub addresses in full, of local files and folders the name alone."""
    sources = {"decoder": (transformer, PUBLISHED_TRANSFORMER), "VQ tokenizer": (vq_model, PUBLISHED_VQ_MODEL)}
    described = {
        part: f"{published['repo_id']}, {published['filename']}" if path is None else Path(path).name
        for part, (path, published) in sources.items()
    }
    text_encoder = text_encoder or PUBLISHED_TEXT_ENCODER
    is_folder = Path(text_encoder).is_dir()
    return {**described, "text encoder": Path(text_encoder).name if is_folder else str(text_encoder)}


def describe_new_parts() -> str:
    """Name what a start for training has that no file did."""
    return " and ".join(dict.fromkeys(NEW_PARTS.values()))


def compose_card(
    name: str, sources: dict[str, str], self_check: str, license: str | None, is_start: bool = False
) -> str:
    """Write the model card of converted weights, whose licence is what the caller states and nothing else.

    Args:
        name (`str`): Hub id or folder in the snippet.
        sources (`dict[str, str]`): What each part was converted from.
        self_check (`str`): The figures, as Markdown.
        license (`str`, *optional*): Identifier of the weights' licence; without it the card names none.
        is_start (`bool`): Whether the decoder is LlamaGen's and training has yet to begin.
    """
    introduction = START_INTRODUCTION.format(new_parts=describe_new_parts()) if is_start else INTRODUCTION
    listed = "\n".join(f"* {part}: {source}" for part, source in sources.items())
    facts = {"description": introduction, "sources": listed, "self_check": self_check}
    return make_card("converted", name, license=license, **facts)


def check_output_dir(output_dir: Path) -> None:
    """Refuse a folder that already holds something."""
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"`output_dir` is {output_dir}, which already holds something; give a new folder.")


def save_pipeline(pipeline: EditARPipeline, output_dir: str | Path, card: str) -> None:
    """Write a pipeline folder with its card, complete or not at all.

    Raises:
        ValueError: If the folder already holds something.
    """
    check_output_dir(Path(output_dir))
    with atomic_path(output_dir) as unfinished:
        pipeline.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
