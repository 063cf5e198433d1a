"""Count what an adapter of docs/lora-guide.md has learnt and what it has forgotten.

    python projects/stickers/score_frame_lora.py --model projects/stickers/sticker-editor --lora runs/my-lora/adapter

New images come from `examples/make_practice_pairs.py`, with seeds that no pair has. A frame counts if at least 90 % of
its pixels are nearly black. The other edits are test samples of `make_sticker_edits.py`, decoded greedily.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from evaluate_sticker_editor import score_images
from make_sticker_edits import OPERATIONS, make_sample
from PIL import Image
from transformers import HfArgumentParser

from editar_hf import EditARPipeline


sys.path.append(str(Path(__file__).parents[2] / "examples"))

from make_practice_pairs import FRAME, PROMPT, SIDE, draw_pair


@dataclass
class Arguments:
    model: str = "projects/stickers/sticker-editor"
    lora: str | None = field(default=None, metadata={"help": "folder of the adapter; default: none"})
    weight: float = field(default=1.0, metadata={"help": "weight of the adapter"})
    num_new: int = 50
    num_per_operation: int = 16


def is_framed(image: Image.Image) -> bool:
    pixels, width = np.asarray(image), image.width * FRAME // SIDE
    is_frame = np.ones(pixels.shape[:2], dtype=bool)
    is_frame[width:-width, width:-width] = False
    return (pixels[is_frame].max(-1) < 60).mean() >= 0.9


def compute_mean_psnr(images: list[Image.Image], targets: list[Image.Image]) -> float:
    """Compute the mean PSNR in dB."""
    errors = np.stack(images).astype(float) - np.stack(targets).astype(float)
    return float((10 * np.log10(255**2 / np.square(errors).mean((1, 2, 3)))).mean())


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    pipe = EditARPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    if args.lora is not None:
        pipe.load_lora_weights(args.lora, adapter_name="frame")
        pipe.set_adapters("frame", args.weight)
    pairs = [draw_pair(2000 + index) for index in range(args.num_new)]
    sources, targets = ([image.resize((64, 64)) for image in images] for images in zip(*pairs, strict=True))
    generators = [torch.Generator().manual_seed(index) for index in range(args.num_new)]
    framed = pipe(PROMPT, image=sources, generator=generators).images
    through = pipe.decode_image_tokens(pipe.encode_image(targets))
    print(f"new images with a frame: {sum(map(is_framed, framed))} of {args.num_new}")
    print(f"PSNR {compute_mean_psnr(framed, targets):.1f} dB, ceiling {compute_mean_psnr(through, targets):.1f} dB")

    count = args.num_per_operation
    numbered = [(place * count + turn, name) for place, name in enumerate(OPERATIONS) for turn in range(count)]
    samples = [make_sample(0, "test", index, 64, (name, "seen", None)) for index, name in numbered]
    edited = pipe(
        [sample["prompt"] for sample in samples],
        image=[sample["source_image"] for sample in samples],
        do_sample=False,
    ).images
    through = pipe.decode_image_tokens(pipe.encode_image([sample["target_image"] for sample in samples]))
    scores = score_images(samples, edited, through, token_size=8)
    print(f"other edits that are right: {sum(score['done'] for score in scores)} of {len(samples)}")


if __name__ == "__main__":
    main()
