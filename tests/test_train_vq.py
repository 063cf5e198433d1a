"""The training of a VQ model: its pieces against formulas, and the real script run on a handful of pictures."""

import json
import math
import shutil
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scripts import run_script
from skimage.metrics import peak_signal_noise_ratio
from torch import nn

from editar_hf import EditARVQConfig, EditARVQModel
from editar_hf.image_processing_editar import compute_psnr
from editar_hf.training.rows import BadRowCount
from editar_hf.training.vq import (
    DeadCodeReviver,
    compute_perplexity,
    decode_images,
    draw_batches,
    draw_codebook,
    evaluate_vq_model,
    load_images,
    prepare_pixel_values,
)


SIZES = {"num_embeddings": 32, "embedding_dim": 4, "latent_channels": 8, "base_channels": 8}
SIZES |= {"channel_multipliers": [1, 2, 2], "num_res_blocks": 1, "norm_num_groups": 2}
OPTIONS = {"image_columns": "source_image,target_image", "resolution": 16, "batch_size": 8}
OPTIONS |= {"learning_rate": 5e-3, "warmup_steps": 2, "logging_steps": 5, "evaluation_steps": 10, "max_steps": 20}
OPTIONS |= {"checkpointing_steps": 10, "dead_code_patience": 8, "seed": 3}


def draw_picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (16, 16), tuple(rng.integers(256, size=3).tolist()))
    corner = rng.integers(2, 6, size=2).tolist()
    box = (*corner, corner[0] + 8, corner[1] + 8)
    ImageDraw.Draw(picture).ellipse(box, fill=tuple(rng.integers(256, size=3).tolist()))
    return picture


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    """Options of the script, with a data set of twelve rows of two columns of pictures and one of text."""
    rows = {
        "source_image": [draw_picture(seed) for seed in range(12)],
        "target_image": [draw_picture(seed + 100) for seed in range(12)],
        "prompt": ["make it blue"] * 12,
    }
    path = tmp_path_factory.mktemp("pictures") / "pictures.parquet"
    features = dict.fromkeys(("source_image", "target_image"), datasets.Image())
    features = datasets.Features({**features, "prompt": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return SIZES | OPTIONS | {"dataset": path}


@pytest.fixture(scope="module")
def train(options):
    return lambda folder, *words, **more: run_script("train_vq.py", *words, output_dir=folder, **(options | more))


@pytest.fixture(scope="module")
def straight_run(train, tmp_path_factory) -> Path:
    """A run of twenty steps without interruption."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(folder)
    return folder


def test_script_lowers_the_loss_and_writes_a_vq_model_that_loads(straight_run):
    metrics = [json.loads(line) for line in (straight_run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line and line["step"] > 1]
    assert [line["step"] for line in metrics if "loss" in line] == [1, 5, 10, 15, 20]
    assert losses[-1] < 0.9 * losses[0]
    names = {"checkpoint-10", "checkpoint-20", "metrics.jsonl", "validation.png", "vq_model"}
    assert {path.name for path in straight_run.iterdir()} == names
    model = EditARVQModel.from_pretrained(straight_run / "vq_model")
    assert {name: getattr(model.config, name) for name in SIZES} == SIZES
    # The last row was held out.
    pixels = [np.asarray(draw_picture(seed)) for seed in (11, 111)]
    reported = next(line for line in reversed(metrics) if "psnr" in line)
    expected = {name: reported[name] for name in ("psnr", "code_usage", "perplexity")}
    assert evaluate_vq_model(model.eval(), np.stack(pixels), 8) == pytest.approx(expected, rel=1e-3)


def test_interrupted_run_resumes_to_the_same_vq_model(straight_run, train, tmp_path):
    """A time limit of zero minutes stops each launch after one step: the schedule and the order of pictures go on."""
    shutil.copytree(straight_run / "checkpoint-10", tmp_path / "checkpoint-10")
    train(tmp_path, resume_from_checkpoint="latest", max_train_minutes=0)
    assert (tmp_path / "checkpoint-11").is_dir()
    train(tmp_path, resume_from_checkpoint="latest")
    straight = EditARVQModel.from_pretrained(straight_run / "vq_model").state_dict()
    for name, tensor in EditARVQModel.from_pretrained(tmp_path / "vq_model").state_dict().items():
        torch.testing.assert_close(tensor, straight[name], rtol=1e-5, atol=1e-6, msg=name)


def test_frozen_codes_stay_while_the_decoding_half_learns(straight_run, train, tmp_path):
    """From a trained VQ model, whose sizes hold: those on the command line are others."""
    start = straight_run / "vq_model"
    train(tmp_path, "--freeze_codes", model=start, max_steps=5, base_channels=16)
    start = EditARVQModel.from_pretrained(start).state_dict()
    tuned = EditARVQModel.from_pretrained(tmp_path / "vq_model").state_dict()
    changed = {name for name, tensor in start.items() if not torch.equal(tensor, tuned[name])}
    assert {name.split(".")[0] for name in changed} == {"decoder", "post_quant_conv"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": "{run}"}, "pass `--resume-from-checkpoint latest`"),
        ({"image_columns": "photo"}, r"\['photo'\].*source_image"),
        ({"validation_rows": 12}, "`validation_rows` is 12, but the data set has 12 rows"),
        ({"model": "nowhere/at/all"}, "`model` is 'nowhere/at/all'"),
        ({"push_steps": 5}, "`push_steps` needs `push_to_hub`"),
        ({"push_to_hub": "my-vq-model"}, "`push_to_hub` is 'my-vq-model'; give a full id"),
    ],
)
def test_script_refuses(changes, message, straight_run, options, tmp_path, run_here):
    changes = {name: straight_run if value == "{run}" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        run_here("train_vq.py", **(options | {"output_dir": tmp_path / "run"} | changes))


def decode(dataset, folder, max_fraction=0.0):
    return decode_images(dataset, 16, folder, BadRowCount(max_fraction)).tolist()


@pytest.mark.parametrize("name", ["pairs", "pairs[1]", "pairs*", "pairs?"])
def test_folder_of_pictures_loads_whose_name_is_no_pattern(name, tmp_path):
    for folder, seeds in ((name, range(3)), ("pairs1", range(5))):
        (tmp_path / folder).mkdir()
        for seed in seeds:
            draw_picture(seed).save(tmp_path / folder / f"{seed}.png")
    pixels = decode(load_images(str(tmp_path / name), "train", ["image"]), tmp_path)
    assert sorted(pixels) == sorted(np.asarray(draw_picture(seed)).tolist() for seed in range(3))


def test_pictures_that_cannot_be_used_are_skipped_and_counted(tmp_path):
    good = [draw_picture(0), Image.new("RGB", (2000, 1))]
    for k, image in enumerate(good):
        image.save(tmp_path / f"{k}.png")
    good, thin = ({"bytes": (tmp_path / f"{k}.png").read_bytes(), "path": None} for k in range(2))
    rows = {"image": [good, {"bytes": b"no picture", "path": None}, good, thin, None, good]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    dataset = load_images(str(tmp_path), "train", ["image"])
    assert decode(dataset, tmp_path, 0.5) == [np.asarray(draw_picture(0)).tolist()] * 3
    with pytest.raises(ValueError, match=r"3 of 6 rows .* row 1: `image` does not decode"):
        decode(dataset, tmp_path, 0.4)


def test_pictures_are_cut_to_the_center_and_transparency_is_white(tmp_path):
    wide = Image.fromarray(np.repeat(np.arange(24, dtype=np.uint8)[None] * 10, 16, axis=0)).convert("RGB")
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    features = datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": [wide, clear]}, features=features)
    pixels = np.array(decode(dataset, tmp_path))
    assert pixels[0, 3, :, 1].tolist() == list(range(40, 200, 10))
    assert (pixels[1] == 255).all()
    assert not list(tmp_path.iterdir())


def test_pixel_values_run_from_minus_one_to_one():
    pixels = np.zeros((1, 2, 4, 3), dtype=np.uint8)
    pixels[0, 1, 2, 0] = 255
    pixel_values = prepare_pixel_values(pixels, torch.device("cpu"))
    assert pixel_values.shape == (1, 3, 2, 4)
    assert pixel_values[0, 0, 1, 2] == 1
    assert pixel_values.sum() == 1 - 23


def test_batches_cover_every_epoch_and_can_be_entered_anywhere():
    batches = list(islice(draw_batches(11, 3, seed=5), 7))
    epochs = [np.concatenate(batches[:3]), np.concatenate(batches[3:6])]
    assert all(len(set(epoch.tolist())) == 9 for epoch in epochs)
    assert not np.array_equal(*epochs)
    for step in range(7):
        assert np.array_equal(next(draw_batches(11, 3, seed=5, first_step=step)), batches[step])
    with pytest.raises(ValueError, match="`batch_size`"):
        next(draw_batches(2, 3, seed=0))


def test_codebook_finds_well_separated_clusters():
    generator = torch.Generator().manual_seed(0)
    centers = torch.eye(8)
    latents = centers.repeat_interleave(50, 0) + 0.1 * torch.randn(400, 8, generator=generator)
    latents = F.normalize(latents, dim=-1)
    codes = draw_codebook(latents, 32, generator)
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(32))
    guess = draw_codebook(latents, 32, generator, num_iterations=0)
    # Clusters of several latents lie nearer to their members than latents picked at random do.
    spread, first_spread = (1 - (latents @ rows.T).amax(1).mean() for rows in (codes, guess))
    assert spread < 0.8 * first_spread
    with pytest.raises(ValueError, match="`latents`"):
        draw_codebook(latents, 401, generator)


def test_code_unused_for_its_patience_moves_to_a_latent_and_forgets_its_moments():
    embedding = nn.Embedding(3, 2)
    optimizer = torch.optim.AdamW(embedding.parameters(), lr=0.1)
    embedding.weight.sum().backward()
    optimizer.step()
    before = embedding.weight.detach().clone()
    reviver = DeadCodeReviver(embedding, patience=2)
    latents = torch.tensor([[0.6, 0.8]])
    for tokens, revived in (([0, 1], 0), ([0, 2], 0), ([0, 2], 1), ([0, 2], 0)):
        assert reviver.step(torch.tensor(tokens), latents, optimizer, torch.Generator()) == revived
    assert torch.equal(embedding.weight[[0, 2]], before[[0, 2]])
    assert torch.equal(embedding.weight[1], latents[0])
    moments = optimizer.state[embedding.weight]
    assert (moments["exp_avg"].abs().sum(-1) > 0).tolist() == [True, False, True]
    assert (moments["exp_avg_sq"].sum(-1) > 0).tolist() == [True, False, True]


def test_psnr_is_scikit_images_of_clamped_pixels():
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    reconstruction = pixel_values + torch.randn(2, 3, 8, 8, generator=generator)
    expected = [
        peak_signal_noise_ratio(truth.numpy(), picture.clamp(-1, 1).numpy(), data_range=2)
        for truth, picture in zip(pixel_values, reconstruction, strict=True)
    ]
    assert compute_psnr(reconstruction, pixel_values).tolist() == pytest.approx(expected, rel=1e-5)


def test_perplexity_counts_equally_used_codes():
    assert compute_perplexity(torch.tensor([3, 3, 0, 3])) == pytest.approx(3)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert compute_perplexity(torch.tensor([3, 1])) == pytest.approx(math.exp(entropy))


def test_measured_usage_is_the_fraction_of_codes_seen():
    torch.manual_seed(0)
    model = EditARVQModel(EditARVQConfig(**SIZES)).eval()
    pixels = np.stack([np.asarray(draw_picture(seed)) for seed in range(5)])
    metrics = evaluate_vq_model(model, pixels, batch_size=2)
    tokens = model.encode(prepare_pixel_values(pixels, torch.device("cpu"))).image_tokens
    assert metrics["code_usage"] == pytest.approx(tokens.unique().numel() / 32)
