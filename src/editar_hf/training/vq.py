"""The parts of VQ-model training: load images into memory, initialize and repair the codebook, compute metrics."""

import tempfile
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

from ..image_processing_editar import EditARImageProcessor, compute_crop_geometry, compute_psnr
from ..modeling_editar import EditARForConditionalGeneration
from ..modeling_editar_vq import EditARVQModel, compute_nearest_codes
from .dataset_specs import DatasetSpec, load_split
from .rows import BadRowCount, decode_image
from .validation import build_contact_sheet


def load_images(name: str, split: str, image_columns: Sequence[str]) -> datasets.Dataset:
    """Load the image columns of a data set.

    Args:
        name (`str`): A parquet file, a folder of parquet files or images, or a Hub id.
        split (`str`): Split, in the slicing syntax of `datasets` (`"train"`, `"train[:10000]"`).
        image_columns (sequence of `str`): Columns that hold images.

    Raises:
        ValueError: If a column does not exist.
    """
    dataset = load_split(DatasetSpec(name, split, streaming=False))
    missing = [column for column in image_columns if column not in dataset.column_names]
    if missing:
        raise ValueError(f"`image_columns` names {missing}, but {name!r} has {dataset.column_names}.")
    dataset = dataset.select_columns(list(image_columns))
    # Images stay encoded, so a broken file is one bad row and does not end the run.
    images = [name for name in image_columns if isinstance(dataset.features[name], datasets.Image)]
    features = dataset.features.copy() | dict.fromkeys(images, datasets.Image(decode=False))
    return dataset.cast(datasets.Features(features))


def decode_images(dataset: datasets.Dataset, resolution: int, folder: str | Path, bad_rows: BadRowCount) -> np.ndarray:
    """Decode the images of all columns once, to uint8 pixels (images, resolution, resolution, 3).

    The pixels are in a temporary file in `folder` that is mapped into memory, so they may exceed the RAM. Each image is
    cropped to its center, and transparent pixels become white. A row with an image that cannot be used is skipped and
    counted.

    Raises:
        ValueError: If too many rows cannot be used.
    """

    def prepare(row: dict) -> list[np.ndarray]:
        images = [decode_image(value, name) for name, value in row.items()]
        for image in images:
            compute_crop_geometry(image.height, image.width, resolution, resolution)  # raises if it is too thin
        size = resolution, resolution
        return [np.asarray(ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)) for image in images]

    shape = (len(dataset) * len(dataset.column_names), resolution, resolution, 3)
    with tempfile.TemporaryFile(dir=folder) as file:
        pixels = np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
    num_images = 0
    for images in bad_rows.read(enumerate(dataset), prepare, "images"):
        pixels[num_images : num_images + len(images)] = np.stack(images)
        num_images += len(images)
    bad_rows.judge()
    return pixels[:num_images]


def prepare_pixel_values(pixels: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Convert uint8 pixels (batch_size, height, width, 3) to float32 (batch_size, 3, height, width) in [−1, 1].

    The memory format is channels-last.
    """
    return torch.as_tensor(pixels, device=device).permute(0, 3, 1, 2) / 127.5 - 1


def draw_batches(num_samples: int, batch_size: int, seed: int, first_step: int = 0) -> Iterator[np.ndarray]:
    """Yield batches of sample indices without end. Each epoch has a new order.

    The batch of step k depends only on the seed and k, so a resumed run reads the same batches.

    Raises:
        ValueError: If there are fewer samples than `batch_size`.
    """
    steps_per_epoch = num_samples // batch_size
    if not steps_per_epoch:
        raise ValueError(f"`batch_size` is {batch_size}, but there are only {num_samples} images; make it smaller.")
    first_epoch, first_batch = divmod(first_step, steps_per_epoch)
    for epoch in count(first_epoch):
        order = np.random.default_rng((seed, epoch)).permutation(num_samples)
        for batch in range(first_batch if epoch == first_epoch else 0, steps_per_epoch):
            # Sorted, so that images that are adjacent on disk are read together.
            yield np.sort(order[batch * batch_size : (batch + 1) * batch_size])


def draw_codebook(
    latents: torch.Tensor, num_codes: int, generator: torch.Generator, num_iterations: int = 10
) -> torch.Tensor:
    """Compute codes (num_codes, dim) of latents (positions, dim) by spherical k-means. An empty cluster keeps its code.

    Raises:
        ValueError: If there are fewer latents than codes.
    """
    if len(latents) < num_codes:
        raise ValueError(f"`latents` holds {len(latents)} vectors, fewer than the {num_codes} codes to draw.")
    codes = latents[torch.randperm(len(latents), generator=generator)[:num_codes].to(latents.device)]
    for _ in range(num_iterations):
        nearest = compute_nearest_codes(latents, codes)
        sums = torch.zeros_like(codes).index_add_(0, nearest, latents)
        filled = torch.bincount(nearest, minlength=num_codes) > 0
        codes = torch.where(filled[:, None], F.normalize(sums, dim=-1), codes)
    return codes


@torch.no_grad()
def init_codebook(
    model: EditARVQModel, pixels: np.ndarray, batches: Iterator[np.ndarray], generator: torch.Generator
) -> None:
    """Initialize the codebook with cluster centers of the latents of the untrained encoder.

    At least four latents per code are clustered.
    """
    num_codes, latents, num_latents = model.config.num_embeddings, [], 0
    while num_latents < 4 * num_codes:
        pixel_values = prepare_pixel_values(pixels[next(batches)], model.device)
        latents.append(model.encode(pixel_values).latents.flatten(0, 1))
        num_latents += len(latents[-1])
    model.quantize.embedding.weight.copy_(draw_codebook(torch.cat(latents), num_codes, generator))


@torch.no_grad()
def start_from_codes(transformer: EditARForConditionalGeneration, vq_model: EditARVQModel) -> None:
    """Initialize token embeddings and output head from the codes, so that similar tokens have similar embeddings.

    Both are initialized with the same matrix. The decoder can then copy tokens by attention alone, and most tokens of
    an edit are copies.
    """
    codes = F.normalize(vq_model.quantize.embedding.weight, dim=-1)
    projected = codes @ torch.randn(codes.shape[1], transformer.config.hidden_size)
    # Noise separates each code from its nearest neighbors.
    embeds = transformer.config.initializer_range * (projected + 0.3 * torch.randn_like(projected))
    transformer.model.embed_tokens.weight.copy_(embeds)
    transformer.lm_head.weight.copy_(embeds)


class DeadCodeReviver:
    """Move codes that no image has used for `patience` steps to latents of the current batch.

    Source: Jukebox (arXiv 2005.00341), section 3.1, random restarts.
    """

    def __init__(self, embedding: nn.Embedding, patience: int):
        self.embedding = embedding
        self.patience = patience
        self.steps_unused = torch.zeros(embedding.num_embeddings, dtype=torch.long, device=embedding.weight.device)

    @torch.no_grad()
    def step(
        self,
        image_tokens: torch.Tensor,
        latents: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> int:
        """Count a step and move dead codes. Returns the number of moved codes.

        Args:
            image_tokens (`torch.LongTensor`): Codes that all processes used in this step.
            latents (`torch.Tensor` of shape `(positions, embedding_dim)`): Latents of all processes in this step.
            optimizer (`torch.optim.Optimizer`): Optimizer whose moments of the moved codes are set to zero.
            generator (`torch.Generator`): Generator with the same state in every process, so that all processes move
                the same codes.
        """
        self.steps_unused += 1
        self.steps_unused[image_tokens.flatten()] = 0
        dead = (self.steps_unused >= self.patience).nonzero().flatten()[: len(latents)]
        chosen = torch.randperm(len(latents), generator=generator)[: len(dead)].to(latents.device)
        self.embedding.weight[dead] = latents[chosen].to(self.embedding.weight.dtype)
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[self.embedding.weight][name][dead] = 0
        self.steps_unused[dead] = 0
        return len(dead)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"steps_unused": self.steps_unused}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        self.steps_unused.copy_(state_dict["steps_unused"])


def compute_perplexity(token_counts: torch.Tensor) -> float:
    """Compute the exponential of the entropy (nats) of code frequencies, between 1 and the number of codes."""
    return torch.distributions.Categorical(token_counts.double()).entropy().exp().item()


@torch.no_grad()
def evaluate_vq_model(model: EditARVQModel, pixels: np.ndarray, batch_size: int) -> dict[str, float]:
    """Reconstruct images. Returns the mean PSNR in dB, the fraction of codes used, and the perplexity of the codes."""
    token_counts = torch.zeros(model.config.num_embeddings, dtype=torch.long, device=model.device)
    psnrs = []
    for start in range(0, len(pixels), batch_size):
        pixel_values = prepare_pixel_values(pixels[start : start + batch_size], model.device)
        image_tokens = model.encode(pixel_values).image_tokens
        grid_height, grid_width = (side // model.config.stride for side in pixel_values.shape[-2:])
        psnrs.append(compute_psnr(model.decode(image_tokens, grid_height, grid_width), pixel_values))
        token_counts += torch.bincount(image_tokens.flatten(), minlength=len(token_counts))
    return {
        "psnr": torch.cat(psnrs).mean().item(),
        "code_usage": (token_counts > 0).double().mean().item(),
        "perplexity": compute_perplexity(token_counts),
    }


@torch.no_grad()
def save_reconstructions(model: EditARVQModel, pixels: np.ndarray, path: str | Path) -> None:
    """Save a sheet with a row of images, uint8 (images, height, width, 3), and a row of their reconstructions."""
    pixel_values = prepare_pixel_values(pixels, model.device)
    grid = [side // model.config.stride for side in pixel_values.shape[-2:]]
    decoded = model.decode(model.encode(pixel_values).image_tokens, *grid)
    rows = [[Image.fromarray(image) for image in pixels], EditARImageProcessor().postprocess(decoded)]
    build_contact_sheet(rows).save(path)
