"""Tiny components with random weights, whose tokens and pictures still depend on every input."""

import platform
import shutil

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import T5Config, T5EncoderModel

from editar_hf import (
    EditARConfig,
    EditARForConditionalGeneration,
    EditARImageProcessor,
    EditARPipeline,
    EditARProcessor,
    EditARVQConfig,
    EditARVQModel,
)
from editar_hf.training.tokenizer import train_tokenizer


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler"
)
needs_packing = pytest.mark.skipif(
    platform.machine() != "x86_64" or "fbgemm" not in torch.backends.quantized.supported_engines,
    reason="packed weights need x86-64 with AVX2",
)
NUM_CODES, NUM_TEXT_TOKENS, TEXT_HIDDEN_SIZE, STRIDE = 40, 10, 16, 4


def draw_image(seed, width=16, height=16):
    """Draw a picture of noise, the same for the same seed."""
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_pairs(path, num_rows=4, side=16, columns=("source_image", "target_image", "prompt"), **texts):
    """Write pairs to a parquet file, under the given column names; pair k of any file is the same."""
    source, target, prompt = columns
    texts = {prompt: [f"prompt {k}" for k in range(num_rows)]} | texts
    rows = {source: [draw_image(k, side, side) for k in range(num_rows)], **texts}
    rows[target] = [draw_image(100 + k, side, side) for k in range(num_rows)]
    images = dict.fromkeys((source, target), datasets.Image())
    features = datasets.Features({**dict.fromkeys(texts, datasets.Value("string")), **images})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def are_near(first, second):
    """Tell whether two pictures are the same up to a step of rounding, as those of batches of other sizes are."""
    return np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max() <= 1


def redraw_weights(model, scale, seed=0):
    """Draw every weight and null embedding anew: a fresh head is zero, and fresh norms are all ones."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        draw = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1 + 0.3 * draw if tensor.ndim == 1 else scale * draw)
    return model.eval()


def build_transformer(grid_size=4, num_text_tokens=NUM_TEXT_TOKENS, text_rotary="identity"):
    config = EditARConfig(
        vocab_size=NUM_CODES,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        grid_size=grid_size,
        num_text_tokens=num_text_tokens,
        text_hidden_size=TEXT_HIDDEN_SIZE,
        text_rotary=text_rotary,
        distillation_hidden_size=None,
    )
    return redraw_weights(EditARForConditionalGeneration(config), scale=0.3)


def build_vq_model():
    config = EditARVQConfig(
        num_embeddings=NUM_CODES,
        embedding_dim=4,
        latent_channels=8,
        base_channels=8,
        channel_multipliers=(1, 1, 1),
        num_res_blocks=1,
        norm_num_groups=4,
    )
    torch.manual_seed(0)
    return EditARVQModel(config).eval()


def build_text_encoder(vocab_size):
    config = T5Config(
        vocab_size=vocab_size,
        d_model=TEXT_HIDDEN_SIZE,
        d_kv=8,
        d_ff=16,
        num_heads=2,
        num_layers=1,
        feed_forward_proj="gated-gelu",
    )
    return redraw_weights(T5EncoderModel(config), scale=0.5)


def build_processor(grid_size=4, num_text_tokens=NUM_TEXT_TOKENS):
    tokenizer = train_tokenizer(["make the red circle blue", "remove the green square"] * 50, vocab_size=140)
    image_processor = EditARImageProcessor(size=grid_size * STRIDE, stride=STRIDE)
    return EditARProcessor(image_processor, tokenizer, num_text_tokens)


def build_pipeline(grid_size=4, num_text_tokens=NUM_TEXT_TOKENS):
    """Build a pipeline that works at 16×16 pixels, 4×4 tokens; everything about it is the same each time."""
    processor = build_processor(grid_size, num_text_tokens)
    pipeline = EditARPipeline(
        transformer=build_transformer(grid_size, num_text_tokens),
        vq_model=build_vq_model(),
        text_encoder=build_text_encoder(len(processor.tokenizer)),
        processor=processor,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def teach_to_keep(pipeline, images, prompts, num_steps=100):
    """Train the decoder until it is sure that the tokens of images stay, except those of the first row.

    With the threshold of 1 nat, the first rows may change then, and the last ones not.
    """
    pixel_values = pipeline.prepare_pixel_values(images, None, None, "stretch")
    rows, columns = pipeline.compute_grid(*pixel_values.shape[-2:])
    source = pipeline.encode_pixel_values(pixel_values)
    tokens = source.repeat_interleave(len(prompts), dim=0)
    prompt_embeds = pipeline.encode_prompt(prompts).repeat(len(source), 1, 1)
    inputs = {"source_image_tokens": tokens, "prompt_embeds": prompt_embeds, "target_image_tokens": tokens}
    optimizer = torch.optim.Adam(pipeline.transformer.parameters(), lr=1e-2)
    for _ in range(num_steps):
        logits = pipeline.transformer(**inputs, grid_height=rows, grid_width=columns).logits
        loss = F.cross_entropy(logits[:, columns:].transpose(1, 2), tokens[:, columns:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
