"""Tiny networks with random weights for the metrics that ask one, and their processors."""

import plain_metric_models as plain
import torch
from tiny import build_pipeline, redraw_weights
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessorPil,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessorPil,
    ResNetConfig,
    ViTConfig,
    ViTModel,
)

from editar_hf.evaluation.inception import FIDInception
from editar_hf.evaluation.lpips import LPIPS


NUM_LABELS = 7


def build_clip():
    """Build a CLIP of 224 pixels whose tokens are letters, and its processor."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config={**sizes, **ids, "vocab_size": len(words), "max_position_embeddings": 12},
        vision_config={**sizes, "image_size": 224, "patch_size": 56},
        projection_dim=8,
    )
    model = redraw_weights(CLIPModel(config), scale=0.3)
    return model, CLIPProcessor(CLIPImageProcessorPil(), tokenizer)


def build_dino(patch_size=32, layer_norm_eps=1e-6):
    """Build a DINO of 224 pixels."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**sizes, patch_size=patch_size, layer_norm_eps=layer_norm_eps)
    return redraw_weights(ViTModel(config, add_pooling_layer=False), scale=0.3)


def build_depth_model(patch_size=16):
    """Build a depth model of 32 pixels, and its image processor; no place is 0, and the variants of RMSE differ."""
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=patch_size,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    return redraw_weights(DPTForDepthEstimation(config), scale=0.1), DPTImageProcessorPil(
        size={"height": 32, "width": 32}
    )


def build_segmentation_model():
    """Build a mask classifier on a residual network, as the published COCOStuff model is, and its image processor."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=stages)
    decoder = {"model_type": "detr", "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "num_queries": 9}
    decoder |= {"decoder_ffn_dim": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 32, "num_labels": NUM_LABELS}
    config = MaskFormerConfig(backbone_config=backbone, decoder_config=decoder, **sizes)
    processor = MaskFormerImageProcessorPil(size={"height": 64, "width": 64})
    return redraw_weights(MaskFormerForInstanceSegmentation(config), scale=0.5), processor


def draw_weights(compute, num_images):
    """Draw what the public files of LPIPS or FID's Inception hold, for a narrow network."""
    weights = plain.Weights(divisor=16)
    compute(weights, *torch.zeros(num_images, 1, 3, 80, 80))
    return dict(weights)


def build_lpips():
    return LPIPS({name.replace(".", "/"): tensor for name, tensor in draw_weights(plain.compute_lpips, 2).items()})


def build_inception():
    """Build FID's Inception with 128 features."""
    weights = draw_weights(plain.compute_inception_features, 1)
    return FIDInception({name.replace(".", "/"): tensor for name, tensor in weights.items()})


def save_lpips(weights, folder):
    """Save LPIPS as its authors do: the backbone in one file, the heads in another."""
    folder.mkdir()
    heads = {name: tensor for name, tensor in weights.items() if name.startswith("lin")}
    torch.save({name: tensor for name, tensor in weights.items() if name not in heads}, folder / "squeezenet1_1.pth")
    torch.save(heads, folder / "squeeze.pth")


def save_models(folder):
    """Save a tiny editor and tiny models that score, each in a folder by its name."""
    build_pipeline(grid_size=8).save_pretrained(folder / "editar")
    build_dino().save_pretrained(folder / "structure")
    save_lpips(draw_weights(plain.compute_lpips, 2), folder / "lpips")
    torch.save(draw_weights(plain.compute_inception_features, 1), folder / "inception")
    builders = {"clip": build_clip, "depth": build_depth_model, "segmentation": build_segmentation_model}
    for name, build in builders.items():
        for part in build():
            part.save_pretrained(folder / name)
    return folder
