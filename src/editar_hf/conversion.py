"""Convert published EditAR files to a pipeline folder, and back.

A published file is a pickle with the weights of one network. The VQ model's weights have the same names in both
formats. The decoder's weights differ in three ways: they have other names; query, key and value are one matrix; and the
two rows of a rotation pair are adjacent. The conversion reads all sizes from the shapes of the tensors, refuses
missing and unexpected keys, and is bit-exact in both directions.
"""

import argparse
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
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
from .pipelines.hub import check_folder_or_hub_id, describe_key_problems
from .pipelines.pipeline_editar import EditARPipeline
from .processing_editar import EditARProcessor


# The published weights on the Hub.
PUBLISHED_TRANSFORMER = {
    "repo_id": "JitengMu/CVPR2025_EditAR_release",
    "filename": "editar_release.pt",
    "repo_type": "dataset",
}
PUBLISHED_VQ_MODEL = {"repo_id": "peizesun/llamagen_t2i", "filename": "vq_ds16_t2i.pt"}
PUBLISHED_TEXT_ENCODER = "google/flan-t5-xl"

# The files that `revert_pipeline` writes.
REVERTED_TRANSFORMER, REVERTED_VQ_MODEL = "editar.pt", "vq.pt"

# The keys under which published files store their weights, in the order in which they are tried.
WEIGHTS_KEYS = ("model", "module", "state_dict")

# Published name → our name, outside the layers.
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
# Published name → our names, inside `layers.{i}.` and `model.layers.{i}.`. `wqkv` holds three of our matrices.
LAYER_NAMES = {
    "attention.wqkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.wo.weight": ("self_attn.o_proj.weight",),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight",),
    "feed_forward.w3.weight": ("mlp.up_proj.weight",),
    "feed_forward.w2.weight": ("mlp.down_proj.weight",),
    "attention_norm.weight": ("input_layernorm.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
}
# Our matrices whose output rows are rotated in pairs.
ROTATED_NAMES = ("q_proj.weight", "k_proj.weight")
# Weights that a LlamaGen text-to-image decoder lacks. They are initialized at random before the training of EditAR.
NEW_NAMES = ("img_uncond_embedding", "alignment.weight", "alignment.bias")

# Training statistics of the published VQ model, which are not used after training.
CODEBOOK_USAGE_KEY = "quantize.codebook_used"
CODEBOOK_USAGE_SIZE = 65536

# Settings that are constant in the published code and therefore not stored in its files.
TRANSFORMER_CONSTANTS = ("text_rotary", "rope_theta", "rms_norm_eps", "hidden_act")
VQ_CONSTANTS = ("norm_num_groups",)


# Files


def open_checkpoint(path: str | Path) -> Any:
    """Open a pickle without running any code in it. It is memory-mapped if its format allows that.

    Raises:
        ValueError: If the file does not exist or does not open safely.
    """
    if not Path(path).is_file():
        raise ValueError(f"`{path}` is not a file; pass the path of published weights.")
    try:
        # LlamaGen's training script stores its options in the same file, as a `Namespace`, which is safe to open.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        # PyTorch's own message recommends to open the file unsafely, so it is replaced.
        raise ValueError(
            f"`{path}` does not open safely as a checkpoint: it is damaged, cannot be read, has another format (such "
            "as TorchScript), or contains code. Download it again from its authors."
        ) from error


def is_weights(found: Any) -> bool:
    """Return True if an object is a dictionary of named tensors."""
    return isinstance(found, dict) and all(isinstance(tensor, torch.Tensor) for tensor in found.values())


def load_published_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Load the weights of a published file.

    Raises:
        ValueError: If the file does not exist, does not open safely, or holds no weights.
    """
    checkpoint = open_checkpoint(path)
    found = [checkpoint[key] for key in WEIGHTS_KEYS if isinstance(checkpoint, dict) and key in checkpoint]
    if not found or not is_weights(found[0]):
        raise ValueError(
            f"`{path}` holds no weights under any of the keys {', '.join(WEIGHTS_KEYS)}; pass a published file."
        )
    return dict(found[0])


# Sizes


def get_shape(weights: Mapping[str, torch.Tensor], name: str) -> torch.Size:
    """Get the shape of a tensor, from which the caller reads sizes."""
    if name not in weights:
        raise ValueError(
            f"`{name}` is missing, so this is not a published file of that network. Its {len(weights)} tensors begin "
            f"with: {', '.join(list(weights)[:3]) or 'none'}."
        )
    return weights[name].shape


def count_indices(weights: Mapping[str, torch.Tensor], pattern: str) -> int:
    """Count the modules of a list: return 1 + the largest index that `pattern` finds in the names."""
    matches = (re.match(pattern, name) for name in weights)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def read_transformer_config(
    weights: Mapping[str, torch.Tensor], num_attention_heads: int | None = None, grid_size: int | None = None
) -> EditARConfig:
    """Read the decoder's sizes from the shapes of its published tensors.

    Args:
        weights (`dict[str, torch.Tensor]`): Published names and tensors.
        num_attention_heads (`int`, *optional*): Number of heads, which no tensor shows; *defaults to* width / 64, or
            width / 100 if the width is 3200.
        grid_size (`int`, *optional*): Tokens per side. Pass it for a LlamaGen text-to-image decoder, whose tensors do
            not show it, and only for that; the grid of an EditAR decoder is read from its tensors.

    Raises:
        ValueError: If the tensors are not those of a decoder, the heads do not fit its width, or `grid_size` is missing
            for a LlamaGen decoder or given for an EditAR decoder.

    Source: LlamaGen (arXiv 2406.06525), table 1, for the width of heads.
    """
    vocab_size, hidden_size = get_shape(weights, "tok_embeddings.weight")
    num_text_tokens, text_hidden_size = get_shape(weights, "cls_embedding.uncond_embedding")
    sizes = {}
    if "img_uncond_embedding" in weights:
        if grid_size is not None:
            raise ValueError(
                f"`grid_size` is {grid_size}, but this is an EditAR decoder, whose grid is read from the file; leave "
                "`grid_size` out."
            )
        num_image_tokens = len(weights["img_uncond_embedding"])
        grid_size = math.isqrt(num_image_tokens)
        if grid_size**2 != num_image_tokens:
            raise ValueError(
                f"`img_uncond_embedding` has {num_image_tokens} rows, which is not a square number; pass a file of a "
                "decoder with a square grid."
            )
        alignment = weights.get("alignment.weight")
        sizes["distillation_hidden_size"] = None if alignment is None else len(alignment)
    elif grid_size is None:
        raise ValueError(
            "`img_uncond_embedding` is missing, so this is a LlamaGen text-to-image decoder, which cannot edit. To use "
            "it as the start of EditAR's training, pass its number of tokens per side: --grid-size 32 for 512 pixels."
        )
    if num_attention_heads is None:
        num_attention_heads, rest = divmod(hidden_size, 100 if hidden_size == 3200 else 64)
        if rest:
            raise ValueError(
                f"`num_attention_heads` cannot be computed from a width of {hidden_size}; pass --num-attention-heads."
            )
    # A head needs multiples of four numbers: one rotation pair for the row and one for the column.
    elif num_attention_heads < 1 or hidden_size % (4 * num_attention_heads):
        raise ValueError(
            f"`num_attention_heads` is {num_attention_heads}; the width of a head, {hidden_size} / "
            "`num_attention_heads`, must be a multiple of 4."
        )
    return EditARConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=get_shape(weights, "layers.0.feed_forward.w1.weight")[0],
        num_hidden_layers=count_indices(weights, r"layers\.(\d+)\."),
        num_attention_heads=num_attention_heads,
        grid_size=grid_size,
        num_text_tokens=num_text_tokens,
        text_hidden_size=text_hidden_size,
        **sizes,
    )


def read_vq_config(weights: Mapping[str, torch.Tensor]) -> EditARVQConfig:
    """Read the VQ model's sizes from the shapes of its published tensors.

    Raises:
        ValueError: If the tensors are not those of a VQ model.
    """
    num_embeddings, embedding_dim = get_shape(weights, "quantize.embedding.weight")
    base_channels = get_shape(weights, "encoder.conv_in.weight")[0]
    levels = range(count_indices(weights, r"encoder\.conv_blocks\.(\d+)\."))
    channels = [get_shape(weights, f"encoder.conv_blocks.{level}.res.0.conv1.weight")[0] for level in levels]
    return EditARVQConfig(
        num_embeddings=num_embeddings,
        embedding_dim=embedding_dim,
        latent_channels=get_shape(weights, "quant_conv.weight")[1],
        base_channels=base_channels,
        channel_multipliers=tuple(width // base_channels for width in channels),
        num_res_blocks=count_indices(weights, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
    )


# Weights


def map_names(config: EditARConfig) -> dict[str, tuple[str, ...]]:
    """Map the published name of each decoder tensor to our names; one published tensor can hold three of ours."""
    names: dict[str, tuple[str, ...]] = {theirs: (ours,) for theirs, ours in TRANSFORMER_NAMES.items()}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in LAYER_NAMES.items():
            names[f"layers.{layer}.{theirs}"] = tuple(f"model.layers.{layer}.{name}" for name in ours)
    return names


def split_rotation_pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of each head of a projection from rotation pairs (2i, 2i + 1) to (i, i + head_dim / 2)."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def join_rotation_pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo `split_rotation_pairs`."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def check_weights(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Check that weights have exactly the expected names and shapes."""
    found, wanted = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (weights, expected))
    if problems := describe_key_problems(found, wanted):
        raise ValueError(f"The keys of the file do not match the network: {problems}.")


def convert_transformer(
    weights: Mapping[str, torch.Tensor],
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
    grid_size: int | None = None,
) -> EditARForConditionalGeneration:
    """Build the decoder from published weights. Tensors that need no change share memory with the given weights.

    Args:
        weights (`dict[str, torch.Tensor]`): Published names and tensors of EditAR, or of LlamaGen's text-to-image
            decoder. Weights that the LlamaGen decoder lacks are initialized at random.
        num_attention_heads, grid_size (`int`, *optional*): See `read_transformer_config`.
        dtype (`torch.dtype`, *optional*): *Defaults to* that of the file.

    Raises:
        ValueError: If keys are missing, unexpected or have the wrong shape; the message lists them.
    """
    with torch.device("meta"):
        model = EditARForConditionalGeneration(read_transformer_config(weights, num_attention_heads, grid_size))
    is_start = "img_uncond_embedding" not in weights
    expected = revert_transformer_weights(model)
    check_weights(weights, {name: t for name, t in expected.items() if not (is_start and name in NEW_NAMES)})
    converted, names = {}, map_names(model.config)
    for theirs, weight in weights.items():
        for name, part in zip(names[theirs], weight.to(dtype).chunk(len(names[theirs])), strict=True):
            is_rotated = name.endswith(ROTATED_NAMES)
            converted[name] = split_rotation_pairs(part, model.config.head_dim) if is_rotated else part
    model.load_state_dict(converted, assign=True, strict=not is_start)
    if is_start:
        draw_new_parts(model)
    return model.eval()


def draw_new_parts(model: EditARForConditionalGeneration) -> None:
    """Initialize the weights that a LlamaGen text-to-image decoder lacks as in a new model; keep all others."""
    dtype = model.lm_head.weight.dtype
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = tensor.device.type != "meta"
    null_image_embeds = model.model.null_image_embeds
    model.model.null_image_embeds = nn.Buffer(torch.empty_like(null_image_embeds, device="cpu", dtype=dtype))
    assert model.distillation_head is not None  # `read_transformer_config` gives a LlamaGen decoder the default head.
    model.distillation_head.to_empty(device="cpu").to(dtype)
    model.initialize_weights()


def revert_transformer_weights(model: EditARForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Rename and join the decoder's weights as in a published file. On the meta device, this gives only the shapes."""
    own, published = model.state_dict(), {}
    for theirs, names in map_names(model.config).items():
        parts = [
            join_rotation_pairs(own[name], model.config.head_dim) if name.endswith(ROTATED_NAMES) else own[name]
            for name in names
            if name in own
        ]
        if parts:
            published[theirs] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return published


def convert_vq_model(weights: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> EditARVQModel:
    """Build the VQ model from published weights.

    Raises:
        ValueError: If keys are missing, unexpected or have the wrong shape; the message lists them.
    """
    weights = {name: weight for name, weight in weights.items() if name != CODEBOOK_USAGE_KEY}
    with torch.device("meta"):
        model = EditARVQModel(read_vq_config(weights))
    check_weights(weights, model.state_dict())
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    return model.eval()


def revert_vq_weights(model: EditARVQModel) -> dict[str, torch.Tensor]:
    """Return the VQ model's weights as in a published file. All usage statistics are zero."""
    return {**model.state_dict(), CODEBOOK_USAGE_KEY: torch.zeros(CODEBOOK_USAGE_SIZE)}


# Pipelines


def convert_pipeline(
    transformer: str | Path | None = None,
    vq_model: str | Path | None = None,
    text_encoder: str | Path | None = None,
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
    grid_size: int | None = None,
) -> EditARPipeline:
    """Build a pipeline from published files. Files that are not given are downloaded from the Hub.

    Args:
        transformer (`str` or `Path`, *optional*): File of the EditAR decoder.
        vq_model (`str` or `Path`, *optional*): File of the VQ model.
        text_encoder (`str` or `Path`, *optional*): Hub id or folder of a T5 model; only its encoder is kept.
        num_attention_heads, grid_size (`int`, *optional*): See `read_transformer_config`.
        dtype (`torch.dtype`, *optional*): *Defaults to* the dtypes of the files.

    Raises:
        ValueError: If a file is not of its network, or the three networks do not fit together.
    """
    text_encoder = PUBLISHED_TEXT_ENCODER if text_encoder is None else text_encoder
    check_folder_or_hub_id(text_encoder, "text_encoder")
    transformer = hf_hub_download(**PUBLISHED_TRANSFORMER) if transformer is None else transformer
    decoder = convert_transformer(load_published_weights(transformer), num_attention_heads, dtype, grid_size)
    vq_model = hf_hub_download(**PUBLISHED_VQ_MODEL) if vq_model is None else vq_model
    vq = convert_vq_model(load_published_weights(vq_model), dtype)
    if decoder.config.vocab_size != vq.config.num_embeddings:
        raise ValueError(
            f"`vq_model` has {vq.config.num_embeddings} codes and `transformer` predicts {decoder.config.vocab_size}; "
            "pass the VQ model that the decoder was trained with."
        )
    text_width = T5Config.from_pretrained(text_encoder).d_model
    if decoder.config.text_hidden_size != text_width:
        raise ValueError(
            f"`text_encoder` has states of width {text_width} and `transformer` needs width "
            f"{decoder.config.text_hidden_size}; pass the text encoder that the decoder was trained with."
        )
    encoder, report = T5EncoderModel.from_pretrained(text_encoder, dtype=dtype or "auto", output_loading_info=True)
    if missing := report["missing_keys"]:
        raise ValueError(f"`{text_encoder}` is not a T5 encoder; it lacks {', '.join(sorted(missing))}.")
    stride = vq.config.stride
    image_processor = EditARImageProcessor(size=decoder.config.grid_size * stride, stride=stride)
    tokenizer = T5Tokenizer.from_pretrained(text_encoder)
    processor = EditARProcessor(image_processor, tokenizer, num_text_tokens=decoder.config.num_text_tokens)
    return EditARPipeline(transformer=decoder, vq_model=vq, text_encoder=encoder.eval(), processor=processor)


def revert_pipeline(model: str | Path, output_dir: str | Path) -> None:
    """Write the decoder and the VQ model of a pipeline folder as `editar.pt` and `vq.pt`, in the published formats.

    Raises:
        ValueError: If `model` is not a pipeline, has settings that the published formats cannot store, or one of the
            two files already exists.
    """
    output_dir = Path(output_dir)
    check_folder_or_hub_id(model, "model")
    for name in (REVERTED_TRANSFORMER, REVERTED_VQ_MODEL):
        if (output_dir / name).exists():
            raise ValueError(f"`output_dir` is {output_dir}, which already holds {name}; pass another folder.")
    pipeline = EditARPipeline.from_pretrained(model, dtype="auto", text_encoder=None, processor=None)
    check_constants(pipeline.transformer.config, TRANSFORMER_CONSTANTS)
    check_constants(pipeline.vq_model.config, VQ_CONSTANTS)
    for name, weights in (
        (REVERTED_TRANSFORMER, revert_transformer_weights(pipeline.transformer)),
        (REVERTED_VQ_MODEL, revert_vq_weights(pipeline.vq_model)),
    ):
        with atomic_path(output_dir / name) as unfinished:
            torch.save({WEIGHTS_KEYS[0]: weights}, unfinished)


def check_constants(config: PreTrainedConfig, names: tuple[str, ...]) -> None:
    """Check the settings that the published format cannot store: they must be those of the published networks."""
    published = type(config)()
    for name in names:
        if getattr(config, name) != getattr(published, name):
            raise ValueError(
                f"`{name}` is {getattr(config, name)!r}. Published files do not store `{name}`, and the published code "
                f"always uses {getattr(published, name)!r} (see `{type(config).__name__}`): it would load these "
                "weights without an error and make wrong images. Share this model as a pipeline folder instead."
            )
