"""The adversarial training of a VQ model's decoder half."""

import json

import numpy as np
import pytest
import torch
import train_vq_decoder
from features import load_features
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from train_vq_decoder import Arguments, DecoderTraining, Discriminator, measure

from editar_hf import EditARVQConfig, EditARVQModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A VQ model in bfloat16 and features, both tiny and random."""
    folder = tmp_path_factory.mktemp("scenes")
    save_file(load_features(None).state_dict(), folder / "features.safetensors")
    torch.manual_seed(0)
    config = {"num_embeddings": 64, "latent_channels": 16, "base_channels": 16, "norm_num_groups": 2}
    model = EditARVQModel(EditARVQConfig(**config, channel_multipliers=(1, 1, 1, 2), num_res_blocks=1))
    model.to(torch.bfloat16).save_pretrained(folder / "vq_model")
    return folder


@pytest.fixture
def words(folder, bank_folder):
    words = ["--bank", bank_folder, "--features", folder / "features.safetensors", "--vq_model", folder / "vq_model"]
    words += ["--resolution", 64, "--batch_size", 4, "--first_adversarial_step", 1, "--log_steps", 1]
    return [str(word) for word in [*words, "--device", "cpu", "--workers", 0]]


def load(folder):
    return EditARVQModel.from_pretrained(folder / "vq_model", dtype="auto").state_dict()


def test_only_the_decoder_half_changes_and_a_run_goes_on_exactly(folder, words, tmp_path):
    command = [*words, "--output_dir", str(tmp_path), "--steps", "4", "--save_steps", "3"]
    command += ["--learning_rate", "0.02"]  # above the rounding of bfloat16
    train_vq_decoder.main(command)
    before, after = load(folder), load(tmp_path)
    for name, tensor in after.items():
        is_trained = name.startswith(("decoder.", "post_quant_conv."))
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name]) != is_trained, name
    assert torch.load(tmp_path / "state.pt", weights_only=True)["num_steps"] == 3
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    train_vq_decoder.main(command)  # only the fourth step
    again = load(tmp_path)
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.items())
    assert np.array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), sheet)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "absolute" in line] == [1, 2, 3, 4, 4]
    first, second = (line for line in lines if line.get("event") == "after")
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_the_adversarial_gradient_has_its_share_of_the_whole(folder, words, tmp_path):
    """The gradients of a step with and without it, taken from the first moments of the optimizer."""

    def compute_gradient(**options):
        torch.manual_seed(0)
        model = EditARVQModel.from_pretrained(folder / "vq_model", dtype=torch.float32)
        pairs = dict(zip(words[::2], words[1::2], strict=True))
        paths = {name: pairs[f"--{name}"] for name in ("bank", "features", "vq_model")}
        args = Arguments(**paths, output_dir=tmp_path, device="cpu", **options)
        training = DecoderTraining(args, model.eval(), load_features(None))
        pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
        decoded = []
        model.decoder.register_full_backward_hook(lambda module, inputs, outputs: decoded.append(outputs[0]))
        training.step(pixels, torch.zeros(1, 64, dtype=torch.bool))
        return decoded[0]

    plain = compute_gradient(adversarial_weight=0.5, first_adversarial_step=1)
    assert torch.equal(plain, compute_gradient(adversarial_weight=0.0, first_adversarial_step=0))
    for weight in (0.5, 2.0):
        whole = compute_gradient(adversarial_weight=weight, first_adversarial_step=0)
        assert ((whole - plain).norm() / plain.norm()).item() == pytest.approx(weight, rel=1e-4)


def test_the_discriminator_tells_sharp_images_from_blurred_ones(bank):
    features = load_features(None)
    pairs = train_vq_decoder.Pairs(bank, 0, "train", 64)
    pixels = np.concatenate([pairs[index][0] for index in range(8)])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    sharp, blurred = (features(images) for images in (pixels, F.avg_pool2d(pixels, 3, stride=1, padding=1)))
    torch.manual_seed(0)
    discriminator = Discriminator(features.channels)
    optimizer = torch.optim.Adam(discriminator.parameters(), 3e-3, betas=(0.0, 0.99))
    for _ in range(40):
        real, fake = (discriminator([one[:12] for one in maps]) for maps in (sharp, blurred))
        loss = sum(F.relu(1 - a).mean() + F.relu(1 + b).mean() for a, b in zip(real, fake, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = (discriminator([one[12:] for one in maps])[0].mean(dim=(1, 2, 3)) for maps in (sharp, blurred))
    assert (real > fake).all()  # images that it has not seen
    # Only the direction of a position's features counts.
    judged, enlarged = (discriminator([factor * one for one in sharp]) for factor in (1, 3))
    assert all(torch.allclose(*maps, atol=1e-3) for maps in zip(judged, enlarged, strict=True))


def test_fine_detail_is_that_of_the_originals():
    images = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = load_features(None)
    assert measure(features, images, images)["fine_detail"] == 1
    assert measure(features, images, images)["feature_distance"] == pytest.approx(0, abs=1e-6)
    assert measure(features, images / 2, images)["fine_detail"] == pytest.approx(0.25)
    assert measure(features, F.avg_pool2d(images, 3, 1, 1), images)["fine_detail"] < 0.1


def test_an_odd_number_of_images_is_refused():
    with pytest.raises(ValueError, match="`batch_size` is 3; pass an even number"):
        Arguments(bank="", features="", vq_model="", output_dir="", batch_size=3)
