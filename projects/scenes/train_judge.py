"""Train the judge of the scenes: a network that names the object in a crop of an image, and its color.

    python projects/scenes/train_judge.py --bank bank --features features.safetensors --output judge.safetensors

The judge is EfficientNet-Lite0 (see `features.py`). Its last stages are fine-tuned on crops of composed pairs that are
blurred, compressed or noisy. With `--vq-model`, half of the crops are of images that the VQ model has encoded and
decoded, because the judge will see such images. Crops of places from which an object was removed, or where one will be
added, show "nothing".

The judge knows every model of the bank and every color on every noun, also those that no editor is shown. Of each
model, one view in eight is held out. The accuracy is measured on these views, on held-out photographs, and written into
the file.
"""

import io
import itertools
import json
import random
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from autocasting import autocast
from compose import Bank, Pair, compose_pair
from features import LAST_STAGES, FeatureNetwork, load_features
from PIL import Image, ImageFilter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import HfArgumentParser, set_seed

from editar_hf import EditARVQModel
from editar_hf.io import atomic_path


# Side of a crop, in longer sides of the object's box; and the fewest pixels.
CROP_MARGIN, SMALLEST_CROP = 1.25, 24
NOTHING = ""
OPERATIONS = ("add", "remove", "replace", "recolor", "move")
# Nouns of the bank that a person may use for the same thing, seen small: the judge need not tell them apart.
KIN = (
    "ambulance, van | armchair, chair | armchair, sofa | bouquet, potted plant | box, briefcase | box, crate | "
    "briefcase, suitcase | bus, van | cake, cupcake | car, police car, taxi | computer, laptop | "
    "computer, television | dollhouse, house | fire engine, truck | hat, top hat | kettle, teapot | "
    "motorcycle, scooter | palm tree, tree | parasol, umbrella | toy train, train"
)
KIN = [set(names.split(", ")) for names in KIN.split(" | ")]
# Stages before this one keep the weights of ImageNet.
FIRST_TRAINED_STAGE = 3
# Not the seed of the samples that are scored.
TEST_SEED = 1000


class Judge(nn.Module):
    """Name the object in the middle of a crop, and its color.

    Args:
        nouns (`Sequence[str]`): Names of objects; "nothing" comes before them, as number 0.
        colors (`Sequence[str]`): Names of colors.
        crop_size (`int`, *optional*, defaults to 64): Pixels a side of the crops it is trained on.
    """

    def __init__(self, nouns: Sequence[str], colors: Sequence[str], crop_size: int = 64):
        super().__init__()
        self.crop_size = crop_size
        self.nouns, self.colors = [NOTHING, *nouns], list(colors)
        self.network = FeatureNetwork(tuple(LAST_STAGES))
        width = sum(self.network.channels)
        self.noun_head = nn.Linear(width, len(self.nouns))
        self.color_head = nn.Linear(width, len(self.colors))

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the logits of nouns `(batch, 1 + nouns)` and of colors `(batch, colors)`.

        Args:
            crops (`torch.Tensor` of shape `(batch, 3, height, width)`): RGB in [-1, 1], from [`cut_crop`].
        """
        pooled = [feature_map.mean((2, 3)) for feature_map in self.network(crops)]
        pooled = torch.cat([F.layer_norm(vector, vector.shape[-1:]) for vector in pooled], dim=1)
        return self.noun_head(pooled), self.color_head(pooled)

    @torch.no_grad()
    def name(self, crops: torch.Tensor) -> list[tuple[str, str]]:
        """Name noun (`""` for nothing) and color of each crop; the color of nothing means nothing.

        The answer is that of a crop and its mirror image together.
        """
        answers = zip(self(crops), self(crops.flip(-1)), strict=True)
        nouns, colors = ((logits + mirrored).argmax(1).tolist() for logits, mirrored in answers)
        return [(self.nouns[noun], self.colors[color]) for noun, color in zip(nouns, colors, strict=True)]


def load_judge(path: str | Path) -> Judge:
    """Load a judge that this script wrote, in eval mode, in float32."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        judge = Judge(*(json.loads(metadata[name]) for name in ("nouns", "colors", "crop_size")))
        judge.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    judge.accuracy = json.loads(metadata["accuracy"])
    return judge.eval().requires_grad_(False)


def save_judge(judge: Judge, accuracy: dict, path: Path):
    metadata = {
        "nouns": json.dumps(judge.nouns[1:]),
        "colors": json.dumps(judge.colors),
        "crop_size": json.dumps(judge.crop_size),
        "accuracy": json.dumps(accuracy),
    }
    weights = {name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()}
    with atomic_path(path) as unfinished:
        save_file(weights, unfinished, metadata)


def are_kin(one: str, other: str) -> bool:
    """Say whether two nouns are the same, or may name the same thing."""
    return one == other or any(one in names and other in names for names in KIN)


# Crops


def cut_crop(pixels: np.ndarray, box: Sequence[float], size: int) -> Image.Image:
    """Cut a square around a box out of an image and bring it to `size` pixels.

    The square is shifted inside the image, and is at most as large as its shorter side.

    Args:
        pixels (`np.ndarray` of shape `(height, width, 3)`): uint8.
        box (`Sequence[float]`): Left, top, right and bottom, in pixels.
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = box
    side = max(CROP_MARGIN * max(right - left, bottom - top), SMALLEST_CROP)
    side = min(side, height, width)
    left = min(max((left + right - side) / 2, 0), width - side)
    top = min(max((top + bottom - side) / 2, 0), height - side)
    square = (left, top, left + side, top + side)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, square)


def decode_image(encoded: bytes, mode: str = "RGB") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert(mode))


def stack_crops(crops: Sequence[Image.Image]) -> torch.Tensor:
    """Stack crops as `(batch, 3, size, size)`, float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def degrade(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Blur, compress or add noise to an image, as strongly as a VQ model may; a fifth of all stay as they are."""
    if rng.random() < 0.2:
        return pixels
    image = Image.fromarray(pixels)
    if rng.random() < 0.6:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.3)))
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(15, 80))
        image = Image.open(buffer).convert("RGB")
    if rng.random() < 0.3:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 10), pixels.shape)
        image = Image.fromarray((np.asarray(image) + noise).round().clip(0, 255).astype(np.uint8))
    return np.asarray(image)


@dataclass
class Example:
    """An image, a box in it, and what stands there: a noun or `""`, and the color it was painted in, if any."""

    pixels: np.ndarray
    box: tuple[float, float, float, float]
    noun: str
    color: str = ""

    def shift(self, rng: random.Random) -> "Example":
        """Shift the sides of the box by up to 8 % of the longer one."""
        reach = 0.08 * max(self.box[2] - self.box[0], self.box[3] - self.box[1])
        return replace(self, box=tuple(side + rng.uniform(-reach, reach) for side in self.box))

    def degrade(self, rng: random.Random) -> "Example":
        """Degrade the image and shift the box a little."""
        pixels = degrade(self.pixels, rng)
        return replace(self.shift(rng), pixels=pixels)


def list_examples(pair: Pair) -> list[Example]:
    """List what a pair shows at its box, before and after the edit."""
    box, noun, source_color = pair.box, pair.noun, pair.source_color
    return {
        "add": [Example(pair.source, box, NOTHING), Example(pair.target, box, noun, pair.color)],
        "remove": [Example(pair.source, box, noun, source_color), Example(pair.target, box, NOTHING)],
        "replace": [Example(pair.target, box, pair.new_noun, pair.color)],
        "recolor": [Example(pair.source, box, noun, source_color), Example(pair.target, box, noun, pair.color)],
        "move": [Example(pair.target, box, noun, source_color)],
    }[pair.operation]


class Examples(Dataset):
    """Crops of pairs with their labels: item `index` is what pair `index` shows.

    Args:
        judge (`Judge`): Numbers nouns and colors, and says how large crops are.
        bank (`Bank`): Objects and photographs.
        split (`str`), seed (`int`), number (`int`): Which pairs.
        is_varied (`bool`): Whether images are degraded and boxes slightly shifted.
    """

    def __init__(self, judge: Judge, bank: Bank, split: str, seed: int, number: int, is_varied: bool):
        self.noun_labels = {noun: label for label, noun in enumerate(judge.nouns)}
        # A color that is not known is −1: no loss looks at it.
        self.color_labels = {color: label for label, color in enumerate(judge.colors)} | {"": -1}
        self.crop_size = judge.crop_size
        self.bank, self.split, self.seed, self.number, self.is_varied = bank, split, seed, number, is_varied

    def __len__(self) -> int:
        return self.number

    def compose(self, index: int) -> list[Example]:
        operation = OPERATIONS[index % len(OPERATIONS)]
        return list_examples(compose_pair(self.bank, self.seed, index, self.split, operation=operation))

    def vary(self, index: int) -> list[Example]:
        rng = random.Random(f"{self.seed} {index}")
        return [example.degrade(rng) if self.is_varied else example for example in self.compose(index)]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        examples = self.vary(index)
        return {
            "crops": stack_crops([cut_crop(example.pixels, example.box, self.crop_size) for example in examples]),
            "nouns": torch.tensor([self.noun_labels[example.noun] for example in examples]),
            "colors": torch.tensor([self.color_labels[example.color] for example in examples]),
        }

    def load(self, batch_size: int, num_workers: int = 0, shuffle: bool = False) -> DataLoader:
        """Load batches of what `batch_size` pairs show."""
        return DataLoader(self, batch_size, shuffle, collate_fn=join_items, num_workers=num_workers)


class PassedExamples(Examples):
    """The same with images that have passed through a VQ model once; boxes are shifted differently each time."""

    @torch.no_grad()
    def pass_images(self, vq_model: EditARVQModel, batch_size: int) -> "PassedExamples":
        """Compose all pairs and pass their images through the VQ model."""
        self.kept = []
        for start in range(0, self.number, batch_size):
            composed = [self.compose(index) for index in range(start, min(start + batch_size, self.number))]
            pixels = stack_crops([example.pixels for examples in composed for example in examples])
            with autocast(vq_model.device):
                passed = vq_model(pixels.to(vq_model.device)).reconstruction
            passed = ((passed.float().permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
            images = iter(passed.numpy())
            self.kept += [[replace(example, pixels=next(images)) for example in examples] for examples in composed]
        return self

    def vary(self, index: int) -> list[Example]:
        rng = random.Random(int(torch.randint(2**31, ())))
        return [example.shift(rng) if self.is_varied else example for example in self.kept[index]]


def join_items(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([item[name] for item in items]) for name in items[0]}


def split_views(bank: Bank) -> Bank:
    """Split the views of a bank anew, for the judge: one in eight is held out, whatever the model; no color is."""
    numbers = Counter()
    views = []
    for view in sorted(bank.views, key=lambda view: zlib.crc32(view.id.encode())):
        numbers[view.model] += 1
        # A model's first view in this order is training's: emoji have no other.
        views.append(replace(view, split="test-view" if numbers[view.model] % 8 == 2 else "train"))
    return Bank(bank.nouns, bank.colors, [], views, bank.photographs)


# Training


def choose_trained(judge: Judge) -> list[nn.Parameter]:
    """Freeze the first stages; return what is trained."""
    judge.requires_grad_(False)
    trained = [*judge.network.stages[FIRST_TRAINED_STAGE:].parameters()]
    trained += [*judge.noun_head.parameters(), *judge.color_head.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


def alternate(composed: DataLoader, passed: DataLoader | None) -> Iterator[dict[str, torch.Tensor]]:
    """Yield all batches of `composed`; behind each of them one of `passed`, which begins anew when it ends."""
    again = itertools.chain.from_iterable(itertools.repeat(passed or []))
    for batch in composed:
        yield batch
        if passed is not None:
            yield next(again)


def train(judge: Judge, composed: DataLoader, passed: DataLoader | None, learning_rate: float) -> list[float]:
    """Train the judge on one pass through `composed`, in turn with `passed`; return the loss of each step."""
    device = judge.noun_head.weight.device
    trained = choose_trained(judge)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)
    num_steps = len(composed) * (1 if passed is None else 2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps + 1, pct_start=0.1)
    losses, started, num_crops = [], time.perf_counter(), 0
    for step, batch in enumerate(alternate(composed, passed), 1):
        crops, nouns, colors = (batch[name].to(device) for name in ("crops", "nouns", "colors"))
        # On a CPU the backward pass of depthwise convolutions is slower in bfloat16.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            noun_logits, color_logits = judge(crops.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(noun_logits.float(), nouns, label_smoothing=0.05)
        if (colors >= 0).any():
            loss = loss + F.cross_entropy(color_logits.float(), colors, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        num_crops += len(crops)
        if step % 50 == 0 or step == num_steps:
            speed = num_crops / (time.perf_counter() - started)
            print(f"step {step}: loss {np.mean(losses[-50:]):.3f}, {speed:.0f} crops/s", flush=True)
    return losses


def measure_accuracy(judge: Judge, batches: DataLoader) -> dict:
    """Measure the share of right answers.

    Returns:
        `dict`: `noun` (objects and nothing), `kin` (the same, but kin is right), `object`, `nothing`, `color` (of
        painted objects), and `confused`, the most frequent confusions with their numbers.
    """
    device = judge.noun_head.weight.device
    marks, confused = defaultdict(list), Counter()
    for batch in batches:
        names = judge.name(batch["crops"].to(device))
        labels = zip(batch["nouns"].tolist(), batch["colors"].tolist(), strict=True)
        for (noun_label, color_label), (noun, color) in zip(labels, names, strict=True):
            is_right = noun == judge.nouns[noun_label]
            for kind in ("noun", "object" if noun_label else "nothing"):
                marks[kind].append(is_right)
            marks["kin"].append(are_kin(noun, judge.nouns[noun_label]))
            if color_label >= 0:
                marks["color"].append(color == judge.colors[color_label])
            if not is_right:
                confused[f"{judge.nouns[noun_label] or 'nothing'} as {noun or 'nothing'}"] += 1
    accuracy = {kind: round(float(np.mean(values)), 4) for kind, values in sorted(marks.items())}
    return accuracy | {"confused": dict(confused.most_common(20))}


@dataclass
class Arguments:
    bank: str = field(metadata={"help": "folder that build_bank.py made"})
    features: str = field(metadata={"help": "file that features.py made"})
    output: str = field(metadata={"help": "safetensors file to write"})
    start: str | None = field(default=None, metadata={"help": "judge of the same bank to go on from"})
    crop_size: int = field(default=96, metadata={"help": "pixels a side; 64 is faster and worse"})
    num_pairs: int = field(default=40_000, metadata={"help": "pairs to train on"})
    vq_model: str | None = field(default=None, metadata={"help": "VQ model whose images are learned as well"})
    num_passed: int = field(default=5000, metadata={"help": "pairs that are passed through the VQ model"})
    num_test: int = field(default=1000, metadata={"help": "pairs of the test split to measure on"})
    batch_size: int = field(default=40, metadata={"help": "pairs; each shows one or two examples"})
    learning_rate: float = 2e-3
    num_workers: int = field(default=0, metadata={"help": "processes that compose pairs"})
    device: str = "cpu"
    seed: int = 0


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    bank = split_views(Bank.load(args.bank))
    judge = Judge(sorted(bank.nouns), bank.colors, args.crop_size)
    judge.network.load_state_dict(load_features(args.features, judge.network.strides).state_dict())
    if args.start is not None:
        judge.load_state_dict(load_judge(args.start).state_dict())
    judge.to(args.device, memory_format=torch.channels_last)
    train_split = (judge, bank, "train", args.seed)
    passed = vq_model = None
    if args.vq_model is not None:
        vq_model = EditARVQModel.from_pretrained(args.vq_model, dtype=torch.float32).to(args.device)
        examples = PassedExamples(*train_split, args.num_passed, is_varied=True)
        passed = examples.pass_images(vq_model, args.batch_size).load(args.batch_size, shuffle=True)
    composed = Examples(*train_split, args.num_pairs, is_varied=True).load(args.batch_size, args.num_workers)
    train(judge, composed, passed, args.learning_rate)
    judge.eval()
    test_split = (judge, bank, "test", TEST_SEED, args.num_test)
    accuracy = {}
    for name, is_varied in (("plain", False), ("degraded", True)):
        batches = Examples(*test_split, is_varied).load(args.batch_size, args.num_workers)
        accuracy[name] = measure_accuracy(judge, batches)
    if vq_model is not None:
        examples = PassedExamples(*test_split, is_varied=False).pass_images(vq_model, args.batch_size)
        accuracy["passed"] = measure_accuracy(judge, examples.load(args.batch_size))
    save_judge(judge, accuracy, Path(args.output))
    print(json.dumps(accuracy, indent=1))


if __name__ == "__main__":
    main()
