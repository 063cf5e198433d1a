"""Create the untrained sticker editor: a pipeline folder with a small T5, a small decoder and a trained VQ model.

    python projects/stickers/create_sticker_editor.py --dataset stickers-tokens --vq-model sticker-vq-model \
        --output-dir sticker-editor-untrained

The text tokenizer is trained on the prompts of the data set. `examples/train_editar.py` trains the editor.
"""

from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser, T5Config, T5EncoderModel, set_seed

from editar_hf import (
    EditARConfig,
    EditARForConditionalGeneration,
    EditARImageProcessor,
    EditARPipeline,
    EditARProcessor,
    EditARVQModel,
)
from editar_hf.processing_editar import apply_task_prefix
from editar_hf.training.dataset_specs import DatasetSpec, open_dataset
from editar_hf.training.tokenizer import train_tokenizer
from editar_hf.training.vq import start_from_codes


TEXT_HEAD_DIM = 64


@dataclass
class Arguments:
    dataset: str = field(metadata={"help": "data set for `train_editar.py`; the tokenizer is trained on its prompts"})
    vq_model: str = field(metadata={"help": "folder or Hub id of the trained VQ model"})
    output_dir: str
    resolution: int = 64
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    text_rotary: str = field(default="identity", metadata={"help": "identity or zero (as published)"})
    num_text_tokens: int = 52
    text_vocab_size: int = 384
    text_hidden_size: int = 256
    text_num_layers: int = 4
    dropout: float = 0.0
    distillation_hidden_size: int | None = field(
        default=None, metadata={"help": "width of the teacher's features, for distillation; default: no distillation"}
    )
    seed: int = 0


def build_text_encoder(args: Arguments, vocab_size: int) -> T5EncoderModel:
    if args.text_hidden_size < TEXT_HEAD_DIM or args.text_hidden_size % TEXT_HEAD_DIM:
        raise ValueError(
            f"`text_hidden_size` is {args.text_hidden_size}; give a multiple of {TEXT_HEAD_DIM}, the width of a head."
        )
    config = T5Config(
        vocab_size=vocab_size,
        d_model=args.text_hidden_size,
        d_kv=TEXT_HEAD_DIM,
        d_ff=2 * args.text_hidden_size,
        num_heads=args.text_hidden_size // TEXT_HEAD_DIM,
        num_layers=args.text_num_layers,
        dropout_rate=args.dropout,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def build_transformer(args: Arguments, vq_model: EditARVQModel) -> EditARForConditionalGeneration:
    config = EditARConfig(
        vocab_size=vq_model.config.num_embeddings,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        grid_size=args.resolution // vq_model.config.stride,
        num_text_tokens=args.num_text_tokens,
        text_hidden_size=args.text_hidden_size,
        text_rotary=args.text_rotary,
        distillation_hidden_size=args.distillation_hidden_size,
        text_dropout=args.dropout,
        residual_dropout=args.dropout,
        mlp_dropout=args.dropout,
    )
    transformer = EditARForConditionalGeneration(config)
    start_from_codes(transformer, vq_model)
    return transformer


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    dataset = open_dataset(DatasetSpec(args.dataset, streaming=False))
    tasks = dataset["task"][:] if "task" in dataset.column_names else "edit"
    tokenizer = train_tokenizer(apply_task_prefix(dataset["prompt"][:], tasks), args.text_vocab_size)
    vq_model = EditARVQModel.from_pretrained(args.vq_model, dtype=torch.float32)
    image_processor = EditARImageProcessor(size=args.resolution, stride=vq_model.config.stride)
    pipeline = EditARPipeline(
        transformer=build_transformer(args, vq_model),
        vq_model=vq_model,
        text_encoder=build_text_encoder(args, len(tokenizer)),
        processor=EditARProcessor(image_processor, tokenizer, args.num_text_tokens),
    )
    pipeline.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
