"""Train a substitute for DINOv2: a tiny `Dinov2Model` that encodes the colour and the shape of stickers in each patch.

    python projects/stickers/train_patch_teacher.py --output-dir runs/patch-teacher

The published DINOv2 weights are a better teacher. With this one, `train_editar.py --distillation-model` can be studied
at the size of the sticker editor, because its features encode what the editor must know. The model is trained only on
training scenes, which are preprocessed as in `train_editar.py`. At the end, its accuracy is computed on validation
scenes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from make_sticker_edits import make_sample
from stickers import COLOURS, SHAPES, draw_template
from torch import nn
from tqdm import tqdm
from transformers import Dinov2Config, Dinov2Model, HfArgumentParser, set_seed

from editar_hf.training.distillation import CROPPED_SIDE, RESIZED_SIDE, prepare_teacher_pixels


# Images have 64×64 pixels. The teacher sees the central 56×56, in 8×8 patches of 7×7 pixels.
RESOLUTION, GRID = 64, 8
VISIBLE = RESOLUTION * CROPPED_SIDE // RESIZED_SIDE
# A patch belongs to the sticker that covers most of it, if this sticker covers at least this fraction of the patch.
SMALLEST_COVERAGE = 0.3


@dataclass
class Arguments:
    output_dir: Path = field(metadata={"help": "folder for the teacher"})
    hidden_size: int = 96
    num_hidden_layers: int = 3
    num_attention_heads: int = 3
    max_steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 1e-3
    num_validation: int = 200
    seed: int = 0


class PatchClassifier(nn.Module):
    """A DINOv2 model with two heads on its patches, colour and shape. The last class of each is "no sticker"."""

    def __init__(self, backbone: Dinov2Model):
        super().__init__()
        self.backbone = backbone
        width = backbone.config.hidden_size
        self.colour_head, self.shape_head = nn.Linear(width, len(COLOURS) + 1), nn.Linear(width, len(SHAPES) + 1)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the logits (batch, patches, classes) of colour and of shape for pixels in [−1, 1]."""
        states = self.backbone(pixel_values=prepare_teacher_pixels(pixel_values)).last_hidden_state[:, 1:]
        return self.colour_head(states), self.shape_head(states)


def label_patches(stickers: list[dict]) -> np.ndarray:
    """Label every patch with the colour and the shape on it, int (2, patches) in raster order."""
    margin = (RESOLUTION - VISIBLE) // 2
    coverages = np.zeros((len(stickers) + 1, GRID, GRID))
    coverages[-1] = SMALLEST_COVERAGE
    for index, sticker in enumerate(stickers):
        visible = draw_template(sticker, (RESOLUTION, RESOLUTION))[margin : margin + VISIBLE, margin : margin + VISIBLE]
        coverages[index] = visible.reshape(GRID, VISIBLE // GRID, GRID, VISIBLE // GRID).mean((1, 3))
    most = coverages.argmax(0).ravel()
    names = {"colour": list(COLOURS), "shape": list(SHAPES)}
    classes = [[*(known.index(sticker[kind]) for sticker in stickers), len(known)] for kind, known in names.items()]
    return np.array(classes)[:, most]


def make_batch(split: str, indices: range, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make images in [−1, 1] (batch, 3, height, width) and the labels of their patches (2, batch, patches)."""
    images, labels = [], []
    for index in indices:
        sample = make_sample(f"teacher {seed}", split, index, RESOLUTION)
        details = sample["details"]
        stickers = details.get("stickers") or [*filter(None, [details["new"]]), *details["bystanders"]]
        images.append(np.asarray(sample["target_image"]))
        labels.append(label_patches(stickers))
    pixel_values = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixel_values, torch.from_numpy(np.stack(labels, 1))


def compute_accuracy(model: PatchClassifier, args: Arguments) -> tuple[float, float]:
    """Compute the accuracy of colour and of shape on the patches of validation scenes that show a sticker."""
    pixel_values, labels = make_batch("validation", range(args.num_validation), args.seed)
    with torch.no_grad():
        found = [logits.argmax(-1) for logits in model(pixel_values)]
    on_sticker = labels[0] < len(COLOURS)
    return tuple((guess == truth)[on_sticker].float().mean().item() for guess, truth in zip(found, labels, strict=True))


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    config = Dinov2Config(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        mlp_ratio=2,
        image_size=CROPPED_SIDE,
        patch_size=CROPPED_SIDE // GRID,
    )
    model = PatchClassifier(Dinov2Model(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.max_steps)
    for step in tqdm(range(args.max_steps), mininterval=5):
        indices = range(step * args.batch_size, (step + 1) * args.batch_size)
        pixel_values, labels = make_batch("train", indices, args.seed)
        logits = model(pixel_values)
        loss = sum(F.cross_entropy(guess.transpose(1, 2), truth) for guess, truth in zip(logits, labels, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    colour, shape = compute_accuracy(model.eval(), args)
    print(f"validation, patches on stickers: colour {colour:.1%}, shape {shape:.1%}")
    model.backbone.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
