"""Convert a trained sticker editor to the folder that is shipped: bfloat16 weights and new defaults for sampling.

    python projects/stickers/ship_sticker_editor.py --model runs/editor/pipeline \
        --output-dir projects/stickers/sticker-editor --guidance-scale 1.5 --temperature 0.3
"""

from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser

from editar_hf import EditARPipeline


@dataclass
class Arguments:
    model: str = field(metadata={"help": "pipeline folder that `train_editar.py` wrote"})
    output_dir: str
    guidance_scale: float = 3.0
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 1000
    top_p: float = 1.0


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    pipeline = EditARPipeline.from_pretrained(args.model, dtype=torch.bfloat16)
    for name in ("guidance_scale", "do_sample", "temperature", "top_k", "top_p"):
        setattr(pipeline.transformer.generation_config, name, getattr(args, name))
    # Remove the local path of the weights on the training machine.
    pipeline.register_to_config(_name_or_path="sticker-editor")
    pipeline.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
