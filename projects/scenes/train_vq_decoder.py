"""Train the decoder half of a VQ model with an adversarial loss, so that images become sharp.

    python projects/scenes/train_vq_decoder.py --bank bank --features features.safetensors \
        --vq-model examples/scene-editor/vq_model --output-dir vq-decoder

Encoder and codes stay as they are. So images have the same tokens as before, and an editor that was trained with the VQ
model still fits. The discriminator is small, because it judges the feature maps of a frozen EfficientNet-Lite0 and not
pixels. That way, training pays within minutes on a CPU.

`output_dir` receives `state.pt` now and then, from which the same command goes on exactly, `metrics.jsonl`, and at the
end `vq_model/` in the dtype of the given one and a sheet: held-out images, decoded before and after.

Sources: Sauer et al., "Projected GANs Converge Faster", 2021 (arXiv 2111.01007): a discriminator on frozen features;
Esser et al., "Taming Transformers", 2021 (arXiv 2012.09841), equation 7: the weight of the adversarial loss follows the
gradients; Lim and Ye, "Geometric GAN", 2017 (arXiv 1705.02894): the hinge loss; Miyato et al., "Spectral
Normalization", 2018 (arXiv 1802.05957).
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from autocasting import autocast
from bank import Bank
from compose import compose_pair
from features import FeatureNetwork, compute_feature_distance, load_features
from pair_stream import compute_token_mask
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, Dataset
from train import STRIDE, AveragedWeights, Log, compute_pixel_weights
from transformers import HfArgumentParser, set_seed

from editar_hf import EditARImageProcessor, EditARVQModel
from editar_hf.image_processing_editar import compute_psnr
from editar_hf.io import atomic_path
from editar_hf.training.validation import build_contact_sheet
from editar_hf.training.vq import prepare_pixel_values


# Held-out images that are measured, and those that the sheet shows.
NUM_MEASURED, NUM_SHOWN = 128, 24
# The learning rate falls to zero over this last part of the steps.
DECAY = 0.4


@dataclass
class Arguments:
    bank: Path = field(metadata={"help": "folder that build_bank.py made"})
    features: str = field(metadata={"help": "file that features.py made"})
    vq_model: Path = field(metadata={"help": "VQ model to start from"})
    output_dir: Path
    steps: int = 4000
    batch_size: int = field(default=16, metadata={"help": "images of a step, sources and targets"})
    resolution: int = 128
    learning_rate: float = 2e-4
    discriminator_learning_rate: float = 5e-4
    adversarial_weight: float = field(
        default=0.5, metadata={"help": "size of the adversarial gradient, relative to that of the other losses"}
    )
    first_adversarial_step: int = field(
        default=100, metadata={"help": "step from which the decoder has the adversarial loss, too"}
    )
    edit_region_weight: float = field(default=4.0, metadata={"help": "of edited pixels in the other losses"})
    workers: int = field(default=1, metadata={"help": "processes that compose pairs"})
    seed: int = 5
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    log_steps: int = 50
    save_steps: int = 500

    def __post_init__(self):
        if self.batch_size % 2:
            raise ValueError(f"`batch_size` is {self.batch_size}; pass an even number, as a pair has two images.")


class Pairs(Dataset):
    """Pairs of a split, by index: pixels uint8 `(2, height, width, 3)`, and the tokens that the edit may change."""

    def __init__(self, bank: Bank, seed: int, split: str, resolution: int):
        self.bank, self.seed, self.split, self.resolution = bank, seed, split, resolution

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        side = self.resolution
        pair = compose_pair(self.bank, self.seed, index, split=self.split, height=side, width=side)
        return np.stack([pair.source, pair.target]), compute_token_mask(pair.mask, STRIDE)


class Discriminator(nn.Module):
    """Say for each position of feature maps how real the image looks there: above 0 for real.

    Args:
        channels (`tuple[int, ...]`): Channels of the feature maps.
        width (`int`, *optional*, defaults to 64): Channels inside.
    """

    def __init__(self, channels: tuple[int, ...], width: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(number, width, 3, padding=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, width, 1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, 1, 1)),
            )
            for number in channels
        )

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Judge each map, `(batch, channels, height, width)` → `(batch, 1, height, width)`.

        Each position's features are scaled to a mean square of 1.
        """
        scaled = [one * (one.square().mean(1, keepdim=True) + 1e-6).rsqrt() for one in maps]
        return [head(one) for head, one in zip(self.heads, scaled, strict=True)]


class DecoderTraining:
    """The decoder half of a VQ model, the discriminator, their optimizers and the averaged weights.

    Args:
        args (`Arguments`): The settings.
        vq_model (`EditARVQModel`): Its decoder half is trained in place.
        features (`FeatureNetwork`): For both losses.
    """

    def __init__(self, args: Arguments, vq_model: EditARVQModel, features: FeatureNetwork):
        self.args, self.vq_model, self.features = args, vq_model, features
        self.discriminator = Discriminator(features.channels).to(args.device, memory_format=torch.channels_last)
        vq_model.requires_grad_(False)
        self.parameters = [*vq_model.post_quant_conv.parameters(), *vq_model.decoder.parameters()]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.average = AveragedWeights(self.parameters)
        self.optimizer = torch.optim.Adam(self.parameters, args.learning_rate, betas=(0.5, 0.99))
        self.discriminator_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), args.discriminator_learning_rate, betas=(0.0, 0.99)
        )
        self.num_steps = 0

    def step(self, pixel_values: torch.Tensor, is_edited: torch.Tensor) -> dict[str, torch.Tensor]:
        """Train on a batch. Return the parts of the loss.

        Args:
            pixel_values (`torch.Tensor` of shape `(2 * pairs, 3, height, width)`): In [-1, 1], sources before targets.
            is_edited (`torch.BoolTensor` of shape `(pairs, tokens)`): Tokens that the edit may change.
        """
        args = self.args
        height, width = pixel_values.shape[2:]
        left = (args.steps - self.num_steps) / (DECAY * args.steps)
        self.optimizer.param_groups[0]["lr"] = args.learning_rate * min(1.0, left)
        weights = compute_pixel_weights(is_edited, height, width, args.edit_region_weight).repeat(2, 1, 1, 1)
        with autocast(self.args.device):
            with torch.no_grad():
                image_tokens = self.vq_model.encode(pixel_values).image_tokens
                real_maps = self.features(pixel_values)
            decoded = self.vq_model.decode(image_tokens, height // STRIDE, width // STRIDE)
            # The gradients of the losses meet at the pixels, so the decoder runs back once.
            pixels = decoded.detach().float().requires_grad_(True)
            maps = self.features(pixels)
            error = pixels - pixel_values
            parts = {
                "absolute": (weights * error.abs()).mean(),
                "squared": (weights * error.square()).mean(),
                "features": compute_feature_distance(maps, real_maps, weights).mean(),
            }
            real, fake = (self.discriminator(list(m)) for m in (real_maps, [one.detach() for one in maps]))
            parts["discriminator"] = torch.stack(
                [F.relu(1 - a).mean() + F.relu(1 + b).mean() for a, b in zip(real, fake, strict=True)]
            ).mean()
        (gradient,) = torch.autograd.grad(
            parts["absolute"] + parts["squared"] + parts["features"], pixels, retain_graph=True
        )
        self.discriminator_optimizer.zero_grad()
        parts["discriminator"].backward()
        self.discriminator_optimizer.step()
        if self.num_steps >= args.first_adversarial_step:
            with autocast(self.args.device):
                adversarial = -torch.stack([one.mean() for one in self.discriminator(maps)]).mean()
            (adversarial_gradient,) = torch.autograd.grad(adversarial, pixels)
            scale = gradient.norm() / adversarial_gradient.norm().clamp(min=1e-12)
            gradient = gradient + args.adversarial_weight * scale * adversarial_gradient
        self.optimizer.zero_grad()
        decoded.backward(gradient.to(decoded.dtype))
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.average.update()
        self.num_steps += 1
        return parts

    def state_dict(self) -> dict:
        names = ("vq_model", "discriminator", "optimizer", "discriminator_optimizer")
        state = {name: getattr(self, name).state_dict() for name in names}
        return state | {"averages": self.average.averages, "num_steps": self.num_steps}

    def load_state_dict(self, state: dict):
        for name in ("vq_model", "discriminator", "optimizer", "discriminator_optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.average.averages = [one.to(self.args.device) for one in state["averages"]]
        self.average.num_steps = self.num_steps = state["num_steps"]


@torch.no_grad()
def decode_held_out(vq_model: EditARVQModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Pass images through the VQ model, a few at a time; pixels in [-1, 1]."""
    grid = [side // STRIDE for side in pixel_values.shape[2:]]
    tokens = [vq_model.encode(batch).image_tokens for batch in pixel_values.split(16)]
    return torch.cat([vq_model.decode(batch, *grid) for batch in tokens]).clamp(-1, 1)


@torch.no_grad()
def measure(features: FeatureNetwork, decoded: torch.Tensor, pixel_values: torch.Tensor) -> dict[str, float]:
    """Measure decoded images: PSNR in dB, distance of the features, and how much fine detail they have.

    `fine_detail` is the mean square of the second differences along rows, relative to that of the originals: 1 for
    images as sharp as these. It does not depend on the network that training uses.
    """
    pairs = zip(decoded.split(16), pixel_values.split(16), strict=True)
    distances = [compute_feature_distance(features(one), features(other)) for one, other in pairs]
    energies = [images.diff(n=2, dim=3).square().mean().item() for images in (decoded, pixel_values)]
    return {
        "psnr": compute_psnr(decoded, pixel_values).mean().item(),
        "feature_distance": torch.cat(distances).mean().item(),
        "fine_detail": energies[0] / energies[1],
    }


def main(arguments=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    set_seed(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    log = Log(args.output_dir)
    bank = Bank.load(args.bank)
    vq_model = EditARVQModel.from_pretrained(args.vq_model, dtype="auto").eval()
    dtype = vq_model.dtype
    vq_model.to(args.device, torch.float32, memory_format=torch.channels_last)
    features = load_features(args.features).to(args.device, memory_format=torch.channels_last)
    test_pairs = Pairs(bank, args.seed, "test", args.resolution)
    targets = np.stack([test_pairs[index][0][1] for index in range(NUM_MEASURED)])
    held_out = prepare_pixel_values(targets, torch.device(args.device))
    before = decode_held_out(vq_model, held_out)
    log.write(event="before", **measure(features, before, held_out))

    training = DecoderTraining(args, vq_model, features)
    state_path = args.output_dir / "state.pt"
    if state_path.exists():
        training.load_state_dict(torch.load(state_path, map_location=args.device, weights_only=True))
    num_pairs = args.batch_size // 2
    indices = range(training.num_steps * num_pairs, args.steps * num_pairs)
    pairs = Pairs(bank, args.seed, "train", args.resolution)
    for pixels, is_edited in DataLoader(pairs, num_pairs, sampler=indices, num_workers=args.workers):
        pixel_values = prepare_pixel_values(pixels.transpose(0, 1).flatten(0, 1), torch.device(args.device))
        parts = training.step(pixel_values, is_edited.to(args.device))
        if training.num_steps % args.log_steps == 0:
            log.write(step=training.num_steps, **{name: value.item() for name, value in parts.items()})
        if training.num_steps % args.save_steps == 0:
            with atomic_path(state_path) as unfinished:
                torch.save(training.state_dict(), unfinished)

    training.average.copy_to(training.parameters)
    after = decode_held_out(vq_model, held_out)
    log.write(event="after", step=training.num_steps, **measure(features, after, held_out))
    vq_model.to(dtype).save_pretrained(args.output_dir / "vq_model")
    shown = [EditARImageProcessor().postprocess(one[:NUM_SHOWN]) for one in (held_out, before, after)]
    sheet = [row[start : start + 8] for start in range(0, NUM_SHOWN, 8) for row in shown]
    build_contact_sheet(sheet).save(args.output_dir / "sheet.png")


if __name__ == "__main__":
    main()
