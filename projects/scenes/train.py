"""Train the scene editor: first its VQ model, then decoder and text encoder, each for a number of minutes.

    bash benchmarks/gpu_slot.sh --stages training --bank bank --editor examples/scene-editor --vq-minutes 0 \
        --editor-minutes 8.5 --slots 300 --compile editor

Processes beside the training compose pairs. Each pair is encoded once and kept as tokens in the device's memory. The
learning rates follow the clock: a stage ends when its minutes are over. `output_dir` receives the pipeline folder in
parts (`pipeline.tar.0`, `.1` …; join them with `cat`), sheets of images and `metrics.jsonl`. Until the first parts are
there, it holds `vq_model/`. Each stage also saves before its end, so a run that is stopped leaves something to go on
from: `--vq-model` and `--editor` go on from what an earlier run left.
"""

import copy
import io
import json
import math
import os
import shutil
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from compose import Bank
from features import compute_feature_distance, load_features
from pair_stream import NUM_VALIDATION_CHUNKS, Chunk, PairStream
from torch import nn
from transformers import AttentionInterface, AutoTokenizer, HfArgumentParser, T5EncoderModel, set_seed

from editar_hf import (
    EditARConfig,
    EditARForConditionalGeneration,
    EditARImageProcessor,
    EditARPipeline,
    EditARProcessor,
    EditARVQConfig,
    EditARVQModel,
)
from editar_hf.image_processing_editar import compute_psnr
from editar_hf.io import atomic_path
from editar_hf.training.optimization import build_muon, build_optimizer, split_hidden_matrices
from editar_hf.training.step import TrainingStep, draw_conditioning_dropout, drop_target_tokens
from editar_hf.training.validation import build_contact_sheet
from editar_hf.training.vq import DeadCodeReviver, draw_codebook, prepare_pixel_values, start_from_codes


# Parts of the packed pipeline, in bytes: small enough for places that take no large file.
PART_SIZE = 15 * 2**20
STRIDE = 8
# Rows and columns of tokens, and how often a pair has them: 1:1, 4:3, 3:4, 3:2, 2:3, 16:9, 9:16, 2:1, 1:2. The layers
# are compiled once for each number of tokens, so a shape and the same shape upright cost one compilation.
SHAPES = {
    (16, 16): 0.5,
    (12, 16): 0.1,
    (16, 12): 0.1,
    (11, 16): 0.08,
    (16, 11): 0.08,
    (9, 16): 0.05,
    (16, 9): 0.05,
    (8, 16): 0.02,
    (16, 8): 0.02,
}
REHEARSED_SHAPES = {(8, 8): 0.7, (6, 8): 0.15, (8, 6): 0.15}
VQ_BATCH = 256
REVIVAL_STEPS = 20
# The text encoder starts from a teacher's states, the decoder from nothing.
TEXT_LEARNING_RATE_FACTOR = 0.3
EMA_DECAY = 0.998
NUM_TEXT_TOKENS = 32
TARGET_TOKEN_DROPOUT = 0.3
# Fractions of a stage's time at which it is saved, before the end. The learning rate of the editor is at 50, 15 and 2 %
# then.
VQ_SAVES = (0.5,)
EDITOR_SAVES = (0.5, 0.75, 0.9)
# Held-out edits that are drawn at the end.
NUM_SHOWN = 32


@dataclass
class Arguments:
    bank: Path = field(metadata={"help": "folder that build_bank.py wrote"})
    output_dir: Path
    text_encoder: Path | None = field(
        default=None, metadata={"help": "folder that train_text_encoder.py wrote; needed without `--editor`"}
    )
    features: Path | None = field(
        default=None, metadata={"help": "file that features.py wrote; needed to train the VQ model"}
    )
    vq_minutes: float = 2.5
    editor_minutes: float = 5.0
    vq_model: Path | None = field(
        default=None, metadata={"help": "VQ model to go on from; with 0 minutes it is used as it is"}
    )
    editor: Path | None = field(default=None, metadata={"help": "pipeline folder to go on from, its VQ model included"})
    workers: int = field(default=max(1, (os.cpu_count() or 2) - 1), metadata={"help": "processes that compose pairs"})
    slots: int = field(default=100, metadata={"help": "chunks of pairs that wait for the device at most"})
    vq_chunks: int = field(default=600, metadata={"help": "chunks of pairs that train the VQ model"})
    chunk_size: int = field(default=256, metadata={"help": "pairs of a chunk"})
    batch_size: int = field(default=512, metadata={"help": "pairs of a step of the decoder"})
    most_pairs: int = field(default=800_000, metadata={"help": "pairs that are composed for the decoder"})
    hidden_size: int = 256
    layers: int = 8
    muon_learning_rate: float = 3e-3
    learning_rate: float = 1e-3
    edit_region_weight: float = 6.0
    feature_weight: float = field(default=1.0, metadata={"help": "of the VQ model's feature loss"})
    squared_error_weight: float = field(default=5.0, metadata={"help": "of the VQ model's squared error"})
    vq_edit_region_weight: float = field(default=4.0, metadata={"help": "of edited pixels in the VQ model's loss"})
    agreement_weight: float = field(default=1.0, metadata={"help": "of equal latents where nothing changes"})
    guidance_scale: float = field(default=1.5, metadata={"help": "written into the pipeline"})
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    compile: list[str] = field(
        default_factory=list,
        metadata={
            "help": "what to compile; it takes more than a minute of a stage's time",
            "choices": ("vq_model", "editor"),
        },
    )
    log_steps: int = field(default=50, metadata={"help": "steps between lines of figures"})
    rehearse: bool = field(default=False, metadata={"help": "64 × 64 pixels, small networks, small batches"})

    def __post_init__(self):
        if self.editor and self.vq_minutes:
            raise ValueError("`editor` holds for the VQ model that it was trained with; give `--vq-minutes 0`.")
        if not (self.vq_minutes or self.vq_model or self.editor):
            raise ValueError("`vq_minutes` is 0; give `--vq-model` or `--editor`, whose VQ model is used.")
        if not (self.text_encoder or self.editor):
            raise ValueError(
                "`text_encoder` is None; give `--text-encoder` with the folder that train_text_encoder.py wrote, or "
                "`--editor` with a pipeline folder."
            )
        if self.vq_minutes and not self.features:
            raise ValueError(
                f"`features` is None, but the VQ model is trained for {self.vq_minutes:g} minutes; give `--features` "
                "with the file that features.py wrote, or `--vq-minutes 0`."
            )
        unread = {"text_encoder": "--editor", "vq_model": "--editor"} if self.editor else {}
        if not self.vq_minutes:
            unread["features"] = "--vq-minutes 0"
        for name, option in unread.items():
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"`{name}` is {value}, but with `{option}` it is not read; leave it out.")
        self.shapes = REHEARSED_SHAPES if self.rehearse else SHAPES
        if self.rehearse:
            self.slots, self.chunk_size, self.batch_size, self.vq_chunks = 8, 32, 32, 64
            self.hidden_size, self.layers, self.log_steps = 128, 4, 10


class Clock:
    """How much of a stage's time is over, the learning rate that belongs to it, and when to save.

    `saves` are fractions of the time, in order.
    """

    def __init__(self, minutes: float, saves: Sequence[float], warmup_steps: int = 100):
        self.start, self.seconds, self.warmup_steps = time.monotonic(), 60 * minutes, warmup_steps
        self.saves = list(saves)

    @property
    def progress(self) -> float:
        return (time.monotonic() - self.start) / self.seconds

    def is_save_due(self) -> bool:
        """Return whether one more of `saves` is over, but not yet the whole time. It is true once for each."""
        is_due = bool(self.saves) and self.saves[0] < self.progress < 1
        if is_due:
            self.saves.pop(0)
        return is_due

    def set_learning_rates(self, optimizers, step: int):
        """Warm up over steps, then fall to zero over the time that is left, in half a cosine."""
        factor = min(1.0, (step + 1) / self.warmup_steps) * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group.setdefault("initial_lr", group["lr"])


class AveragedWeights:
    """A running average of weights: over the last tenth of the steps so far, at most over about 500 steps."""

    def __init__(self, parameters):
        self.parameters = [parameter.detach() for parameter in parameters]
        self.averages, self.num_steps = [parameter.clone() for parameter in self.parameters], 0

    def update(self):
        self.num_steps += 1
        torch._foreach_lerp_(self.averages, self.parameters, max(1 - EMA_DECAY, 10 / (self.num_steps + 9)))

    @torch.no_grad()
    def copy_to(self, parameters):
        for parameter, average in zip(parameters, self.averages, strict=True):
            parameter.copy_(average)


class Log:
    """Print figures and append them to `metrics.jsonl`."""

    def __init__(self, folder: Path):
        self.path, self.start = folder / "metrics.jsonl", time.monotonic()

    def write(self, **figures):
        line = {"seconds": round(time.monotonic() - self.start, 1), **figures}
        line = json.dumps({name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in line.items()})
        print(line, flush=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def attend_causally(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attend causally without a mask: no training sequence is padded, and a mask would cost the fast kernels."""
    output = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("causal", attend_causally)


# Stage 1: the VQ model


def build_vq_model(rehearse: bool) -> EditARVQModel:
    """Build the untrained VQ model: stride 8, 4,096 codes of 8 numbers."""
    return EditARVQModel(
        EditARVQConfig(
            num_embeddings=512 if rehearse else 4096,
            latent_channels=64,
            base_channels=16 if rehearse else 32,
            channel_multipliers=(1, 2, 2, 4),
            num_res_blocks=1,
            norm_num_groups=2,
        )
    )


def compute_pixel_weights(is_edited: torch.BoolTensor, height: int, width: int, weight: float) -> torch.Tensor:
    """Compute the weights of pixels `(pairs, 1, height, width)`: edited tokens count `weight` times; the mean is 1."""
    grid = (height // STRIDE, width // STRIDE)
    weights = torch.where(is_edited, weight, 1.0).unflatten(1, grid)[:, None]
    weights = weights / weights.mean(dim=(2, 3), keepdim=True)
    return F.interpolate(weights, scale_factor=STRIDE, mode="nearest")


def compute_vq_losses(args, model, features, pixel_values, is_edited):
    """Compute the loss of a batch of images, sources before targets, its parts, and the model's output.

    Errors count more where a pair differs: objects are a small part of an image, and an edit is judged by them.

    Tokens that an edit leaves alone should be the same before and after, so that the editor can copy them. The encoder
    sees the whole image, so a part of the loss must ask for this: `agreement` compares the latents of these tokens.

    Args:
        pixel_values (`torch.Tensor` of shape `(2 * pairs, 3, height, width)`): Pixels in [-1, 1].
        is_edited (`torch.BoolTensor` of shape `(pairs, tokens)`): Tokens that the edit may change.
    """
    output = model(pixel_values)
    with torch.no_grad():
        wanted = features(pixel_values)
    error = output.reconstruction.float() - pixel_values
    weights = compute_pixel_weights(is_edited, *pixel_values.shape[2:], args.vq_edit_region_weight).repeat(2, 1, 1, 1)
    before, after = output.latents.chunk(2)
    distances = (before - after).square().mean(dim=-1)
    parts = {
        "absolute": (weights * error.abs()).mean(),
        "squared": (weights * error.square()).mean(),
        "features": compute_feature_distance(features(output.reconstruction), wanted, weights).mean(),
        "codebook": output.codebook_loss,
        "commitment": output.commitment_loss,
        "agreement": (distances * ~is_edited).sum() / (~is_edited).sum().clamp(min=1),
    }
    loss = parts["absolute"] + args.squared_error_weight * parts["squared"] + args.feature_weight * parts["features"]
    loss = loss + parts["codebook"] + model.config.commitment_loss_weight * parts["commitment"]
    loss = loss + args.agreement_weight * parts["agreement"]
    return loss, parts, output


def load_chunk(chunk: Chunk, device) -> dict[str, torch.Tensor]:
    """Copy a chunk's arrays to the device."""
    names = ("sources", "targets", "edit_mask", "input_ids")
    arrays = (chunk.sources, chunk.targets, chunk.edit_masks, chunk.input_ids)
    return {name: torch.tensor(array, device=device) for name, array in zip(names, arrays, strict=True)}


def draw_rows(
    chunks: list[dict[str, torch.Tensor]], num_rows: int, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Draw rows of chunks of one shape, a quarter of a chunk at a time."""
    size = len(chunks[0]["edit_mask"])
    parts, part_size = [], min(num_rows, size // 4)
    for _ in range(num_rows // part_size):
        chunk = chunks[rng.integers(len(chunks))]
        # Drawn on the device: copying the places there would wait for it.
        places = torch.randperm(size, device=chunk["edit_mask"].device)[:part_size]
        parts.append({name: tensor[places] for name, tensor in chunk.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class ImagePool:
    """The pairs that the VQ model is trained on, on the device: square ones, and those held out."""

    def __init__(self, stream: PairStream, device, most_chunks: int):
        self.stream, self.device, self.most_chunks = stream, device, most_chunks
        self.chunks, self.square, self.held_out = [], [], []

    def update(self, timeout: float | None = None):
        """Take in what the stream has ready, waiting for at most `timeout` seconds for the first."""
        while len(self.chunks) < self.most_chunks and (chunk := self.stream.take(timeout)) is not None:
            timeout = None
            rows = load_chunk(chunk, self.device)
            self.stream.release(chunk)
            self.chunks.append((rows, chunk.is_validation))
            if chunk.is_validation:
                self.held_out.append(rows)
            elif rows["sources"].shape[1:3] == self.stream.shapes[0]:
                self.square.append(rows)

    def wait(self, num_square: int):
        """Wait for so many square chunks, and for those held out."""
        while len(self.square) < num_square or len(self.held_out) < NUM_VALIDATION_CHUNKS:
            self.update(timeout=1.0)

    def draw(self, num_pairs: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw pairs: their pixels in [-1, 1], sources before targets, and the tokens that may change."""
        rows = draw_rows(self.square, num_pairs, rng)
        pixels = torch.cat([rows["sources"], rows["targets"]])
        return prepare_pixel_values(pixels, pixels.device), rows["edit_mask"]


def train_vq_model(args, pool: ImagePool, log: Log):
    """Train the VQ model for `args.vq_minutes`; save it half-way and at the end."""
    device, rng = torch.device(args.device), np.random.default_rng(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    clock = Clock(args.vq_minutes, VQ_SAVES)
    if args.vq_model:
        model = EditARVQModel.from_pretrained(args.vq_model, dtype=torch.float32)
    else:
        model = build_vq_model(args.rehearse)
    model.to(device, memory_format=torch.channels_last).train()
    features = load_features(args.features).to(device, memory_format=torch.channels_last)
    num_pairs = min(VQ_BATCH // 2, args.chunk_size)
    pool.wait(num_square=8)
    log.write(stage="vq_model", event="first chunks")

    if not args.vq_model:
        with torch.no_grad():
            latents = [model.encode(pool.draw(num_pairs, rng)[0]).latents.flatten(0, 1) for _ in range(4)]
            codes = draw_codebook(torch.cat(latents), model.config.num_embeddings, generator)
            model.quantize.embedding.weight.copy_(codes)
    average = AveragedWeights(model.parameters())
    optimizer = build_optimizer(model.parameters(), args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    # It looks for codes out of use once in `REVIVAL_STEPS` steps: each look waits for the device.
    reviver = DeadCodeReviver(model.quantize.embedding, patience=5)
    used_tokens = []
    if "vq_model" in args.compile:
        for part in (model.encoder, model.decoder):
            part.compile(dynamic=False)

    step = 0
    while clock.progress < 1:
        pool.update()
        clock.set_learning_rates([optimizer], step)
        pixel_values, is_edited = pool.draw(num_pairs, rng)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, parts, output = compute_vq_losses(args, model, features, pixel_values, is_edited)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update()
        step += 1
        used_tokens.append(output.image_tokens)
        if step % REVIVAL_STEPS == 0:
            # Codes are not moved any more once the rest has to settle.
            if clock.progress < 0.7:
                latents = output.latents.detach().flatten(0, 1)
                reviver.step(torch.cat(used_tokens), latents, optimizer, generator)
            used_tokens.clear()
        if step % args.log_steps == 0:
            log.write(stage="vq_model", step=step, **{name: value.item() for name, value in parts.items()})
        if clock.is_save_due():
            save_vq_model(model, average, args.output_dir)
    log.write(stage="vq_model", event="end", step=step, chunks=len(pool.chunks))
    save_vq_model(model, average, args.output_dir)


def save_vq_model(model: EditARVQModel, average: AveragedWeights, folder: Path):
    """Save the averages of the weights to `vq_model/`, with the codes as they are."""
    names = [name for name, _ in model.named_parameters()]
    weights = model.state_dict() | dict(zip(names, average.averages, strict=True))
    # An average over moved codes would lie between places.
    weights["quantize.embedding.weight"] = model.quantize.embedding.weight.detach()
    with atomic_path(folder / "vq_model") as unfinished:
        model.save_pretrained(unfinished, state_dict=weights)


@torch.no_grad()
def evaluate_vq_model(model: EditARVQModel, rows: dict[str, torch.Tensor], folder: Path, log: Log):
    """Measure the VQ model on held-out pairs, and save a sheet of their targets above the reconstructions."""
    sources, targets = (prepare_pixel_values(rows[name], model.device) for name in ("sources", "targets"))
    grid = [side // STRIDE for side in targets.shape[-2:]]
    image_tokens = model.encode(targets).image_tokens
    decoded = model.decode(image_tokens, *grid)
    is_edited = compute_pixel_weights(rows["edit_mask"], *targets.shape[2:], weight=2.0) > 1
    error = (decoded.clamp(-1, 1) - targets) / 2
    is_same = model.encode(sources).image_tokens == image_tokens
    log.write(
        stage="vq_model",
        event="held out",
        psnr=compute_psnr(decoded, targets).mean().item(),
        psnr_edited=-10 * error.square().mean(dim=1, keepdim=True)[is_edited].mean().log10().item(),
        codes_used=len(image_tokens.unique()) / model.config.num_embeddings,
        kept_tokens_equal=is_same[~rows["edit_mask"]].float().mean().item(),
    )
    images = [EditARImageProcessor().postprocess(batch[:32]) for batch in (targets, decoded)]
    sheet = [row[start : start + 8] for start in range(0, len(images[0]), 8) for row in images]
    build_contact_sheet(sheet).save(folder / "vq_model.png")


# Stage 2: decoder and text encoder


class TokenPool:
    """The tokens of all chunks so far, on the device, by shape in pixels.

    A thread encodes chunks as they are ready, on a CUDA stream of its own, so that training does not wait for them.
    """

    def __init__(self, vq_model: EditARVQModel, stream: PairStream, most_pairs: int):
        self.vq_model, self.stream, self.most_pairs = vq_model, stream, most_pairs
        self.chunks = {shape: [] for shape in stream.shapes}
        self.held_out, self.error, self.is_closed = [], None, False
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            side = torch.cuda.Stream() if self.vq_model.device.type == "cuda" else None
            while not self.is_closed and self.num_pairs < self.most_pairs:
                chunk = self.stream.take(timeout=0.2)
                if chunk is not None:
                    with torch.cuda.stream(side):
                        self.add(load_chunk(chunk, self.vq_model.device), chunk.is_validation)
                    self.stream.release(chunk)
        except Exception as error:
            self.error = error

    def wait_for(self, num_pairs: int):
        """Wait until there are so many pairs, and those held out."""
        while self.error is None and (self.num_pairs < num_pairs or len(self.held_out) < NUM_VALIDATION_CHUNKS):
            time.sleep(0.1)
        self.check()

    def check(self):
        if self.error is not None:
            raise RuntimeError("Encoding pairs failed.") from self.error

    def close(self):
        self.is_closed = True
        self.thread.join()

    @torch.no_grad()
    def add(self, rows: dict[str, torch.Tensor], is_validation: bool):
        """Encode the images of a chunk and keep the rest of it."""
        device = self.vq_model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            source, target = (
                self.vq_model.encode(prepare_pixel_values(rows[name], device)).image_tokens.short()
                for name in ("sources", "targets")
            )
        batch = {"source_image_tokens": source, "target_image_tokens": target}
        batch |= {name: rows[name] for name in ("edit_mask", "input_ids")}
        if device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        if is_validation:
            self.held_out.append(batch)
        else:
            self.chunks[rows["sources"].shape[1:3]].append(batch)

    @property
    def num_pairs(self) -> int:
        return sum(len(chunks) for chunks in self.chunks.values()) * self.stream.chunk_size

    def draw(self, batch_size: int, rng: np.random.Generator) -> tuple[tuple[int, int], dict[str, torch.Tensor]]:
        """Draw a batch of one shape, shapes by their share of the pairs."""
        self.check()
        counts = np.array([len(chunks) for chunks in self.chunks.values()], dtype=float)
        shape = list(self.chunks)[rng.choice(len(counts), p=counts / counts.sum())]
        return shape, prepare_batch(draw_rows(self.chunks[shape], batch_size, rng))


def prepare_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Widen the tokens, and mark the positions that hold the prompt."""
    batch = {name: tensor if name == "edit_mask" else tensor.long() for name, tensor in batch.items()}
    return batch | {"attention_mask": (batch["input_ids"] != 0).long()}


def build_transformer(args, vq_model: EditARVQModel, text_hidden_size: int) -> EditARForConditionalGeneration:
    """Build the untrained decoder; token embeddings and output head start from the directions of the codes."""
    config = EditARConfig(
        vocab_size=vq_model.config.num_embeddings,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        grid_size=next(iter(args.shapes))[0],
        num_text_tokens=NUM_TEXT_TOKENS,
        text_hidden_size=text_hidden_size,
        text_rotary="identity",
        distillation_hidden_size=None,
        text_dropout=0.0,
        residual_dropout=0.0,
        mlp_dropout=0.0,
    )
    transformer = EditARForConditionalGeneration(config)
    start_from_codes(transformer, vq_model)
    return transformer


def build_pipeline(args, vq_model: EditARVQModel, processor: EditARProcessor) -> EditARPipeline:
    """Put the pipeline together: from the one to go on from, or with an untrained decoder; float32, on the CPU."""
    if args.editor:
        return EditARPipeline.from_pretrained(args.editor, dtype=torch.float32)
    text_encoder = T5EncoderModel.from_pretrained(args.text_encoder, dtype=torch.float32)
    transformer = build_transformer(args, vq_model, text_encoder.config.d_model)
    pipeline = EditARPipeline(
        transformer=transformer, vq_model=vq_model, text_encoder=text_encoder, processor=processor
    )
    defaults = {"guidance_scale": args.guidance_scale, "do_sample": True, "temperature": 0.3}
    transformer.generation_config.update(**defaults)
    return pipeline


def build_optimizers(args, transformer: nn.Module, text_encoder: nn.Module) -> list[torch.optim.Optimizer]:
    """Build Muon for hidden matrices and AdamW for the rest, of each network."""
    optimizers = []
    for module, factor in ((transformer, 1.0), (text_encoder, TEXT_LEARNING_RATE_FACTOR)):
        matrices, others = split_hidden_matrices(module)
        optimizers.append(build_muon(matrices, factor * args.muon_learning_rate, weight_decay=0.01))
        optimizers.append(build_optimizer(others, factor * args.learning_rate, weight_decay=0.01))
    return optimizers


def compile_ahead(steps: dict[tuple[int, int], TrainingStep], batch_size: int, device, log: Log):
    """Compile for every shape, on made-up tokens, while no other thread uses the device: beside one it took minutes."""
    for (height, width), step in steps.items():
        num_tokens = height * width // STRIDE**2
        batch = {f"{name}_image_tokens": torch.zeros(batch_size, num_tokens, dtype=torch.long, device=device)
                 for name in ("source", "target")}  # fmt: skip
        batch["edit_mask"] = torch.zeros(batch_size, num_tokens, dtype=torch.bool, device=device)
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.ones(batch_size, NUM_TEXT_TOKENS, dtype=torch.long, device=device)
        dropped = torch.zeros(batch_size, dtype=torch.bool, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = step(batch, dropped, dropped)["loss"]
        loss.backward()
        step.zero_grad()
        log.write(stage="editor", event="compiled", height=height, width=width)


def train_editor(args, pipeline: EditARPipeline, pool: TokenPool, log: Log) -> EditARPipeline:
    """Train decoder and text encoder for `args.editor_minutes`; return a bfloat16 pipeline of the averaged weights."""
    device, rng = torch.device(args.device), np.random.default_rng(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    shipped = copy.deepcopy(pipeline.components)
    for name in ("transformer", "text_encoder", "vq_model"):
        shipped[name].to("cpu", torch.bfloat16)
    shipped = EditARPipeline(**shipped)
    shipped.register_to_config(_name_or_path="scene-editor")

    transformer, text_encoder = pipeline.transformer.to(device).train(), pipeline.text_encoder.to(device).train()
    transformer.set_attn_implementation("causal")
    if "editor" in args.compile:
        for layer in transformer.model.layers:
            layer.compile(dynamic=False)
    steps = {
        shape: TrainingStep(
            transformer, text_encoder, [side // STRIDE for side in shape], edit_region_weight=args.edit_region_weight
        )
        for shape in pool.chunks
    }
    clock = Clock(args.editor_minutes, EDITOR_SAVES)
    if "editor" in args.compile:
        compile_ahead(steps, args.batch_size, device, log)
    optimizers = build_optimizers(args, transformer, text_encoder)
    parameters = [*transformer.parameters(), *text_encoder.parameters()]
    average = AveragedWeights(parameters)
    pool.thread.start()
    pool.wait_for(4 * args.batch_size)
    log.write(stage="editor", event="first tokens", pairs=pool.num_pairs)

    step = 0
    while clock.progress < 1:
        clock.set_learning_rates(optimizers, step)
        shape, batch = pool.draw(args.batch_size, rng)
        drop_source, drop_prompt = draw_conditioning_dropout(len(batch["input_ids"]), generator)
        tokens = (batch[f"{name}_image_tokens"] for name in ("target", "source"))
        batch["shown_image_tokens"] = drop_target_tokens(*tokens, TARGET_TOKEN_DROPOUT, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = steps[shape](batch, drop_source, drop_prompt)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update()
        step += 1
        if step % args.log_steps == 0:
            log.write(stage="editor", step=step, loss=losses["token_loss"].item(), pairs=pool.num_pairs)
        if clock.is_save_due():
            save_pipeline(args, shipped, average)
    log.write(stage="editor", event="end", step=step, pairs=pool.num_pairs)
    save_pipeline(args, shipped, average)
    return shipped


def save_pipeline(args, shipped: EditARPipeline, average: AveragedWeights):
    """Fill the averages into the pipeline that is shipped, and save it as `pipeline.tar.0`, `.1` …

    Delete the `vq_model/` that this run trained: the pipeline holds it.
    """
    average.copy_to([*shipped.transformer.parameters(), *shipped.text_encoder.parameters()])
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as place, tarfile.open(fileobj=packed, mode="w") as archive:
        shipped.save_pretrained(place, max_shard_size="14MB")
        archive.add(place, arcname="pipeline")
    content = packed.getvalue()
    # All parts are written before the first one replaces an older one.
    with ExitStack() as stack:
        for number, start in enumerate(range(0, len(content), PART_SIZE)):
            unfinished = stack.enter_context(atomic_path(args.output_dir / f"pipeline.tar.{number}"))
            unfinished.write_bytes(content[start : start + PART_SIZE])
    if args.vq_minutes:
        shutil.rmtree(args.output_dir / "vq_model", ignore_errors=True)


@torch.no_grad()
def evaluate_editor(args, pipeline: EditARPipeline, pool: TokenPool, log: Log):
    """Measure the loss on held-out pairs, and save a sheet of sources, edits and targets, three rows each.

    Loss and prompts of the sheet go to the log.
    """
    device = torch.device(args.device)
    pipeline.to(device)
    step = TrainingStep(pipeline.transformer, pipeline.text_encoder, next(iter(args.shapes))).eval()
    batches = [prepare_batch(batch) for batch in pool.held_out]
    losses = torch.cat([step(batch)["token_losses"] for batch in batches])
    batch = {name: tensor[:NUM_SHOWN] for name, tensor in batches[0].items()}
    prompts = pipeline.processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    log.write(stage="editor", event="held out", loss=losses.mean().item(), prompts=prompts)
    states = pipeline.text_encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    source, target = batch["source_image_tokens"], batch["target_image_tokens"]
    generators = [torch.Generator().manual_seed(place) for place in range(len(source))]
    edited = pipeline(prompt_embeds=states, source_image_tokens=source, generator=generators).images
    postprocess = pipeline.processor.image_processor.postprocess
    shown = [postprocess(pipeline.vq_model.decode(tokens)) for tokens in (source, target)]
    rows = []
    for start in range(0, len(prompts), 8):
        rows += [images[start : start + 8] for images in (shown[0], edited, shown[1])]
    build_contact_sheet(rows).save(args.output_dir / "editor.png")


def main(arguments=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    set_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    log = Log(args.output_dir)
    size = STRIDE * next(iter(args.shapes))[0]
    processor = EditARProcessor(
        EditARImageProcessor(size=size, stride=STRIDE),
        AutoTokenizer.from_pretrained((args.editor / "processor") if args.editor else args.text_encoder),
        NUM_TEXT_TOKENS,
    )
    bank = Bank.load(args.bank)
    log.write(event="bank")
    stream = PairStream(
        bank,
        processor,
        [(STRIDE * rows, STRIDE * columns) for rows, columns in args.shapes],
        list(args.shapes.values()),
        STRIDE,
        args.chunk_size,
        args.slots,
        args.workers,
        args.seed,
    )
    tokens = None
    try:
        pool = ImagePool(stream, torch.device(args.device), args.vq_chunks)
        vq_folder = args.editor / "vq_model" if args.editor else args.vq_model
        if args.vq_minutes:
            train_vq_model(args, pool, log)
            vq_folder = args.output_dir / "vq_model"
        vq_model = EditARVQModel.from_pretrained(vq_folder, dtype=torch.float32)
        vq_model.to(args.device, memory_format=torch.channels_last).eval()
        pool.wait(num_square=1)
        evaluate_vq_model(vq_model, pool.held_out[0], args.output_dir, log)
        if not args.editor_minutes:
            return
        pipeline = build_pipeline(args, vq_model.cpu(), processor)
        tokens = TokenPool(vq_model.to(args.device), stream, args.most_pairs)
        while pool.chunks:
            tokens.add(*pool.chunks.pop())
        shipped = train_editor(args, pipeline, tokens, log)
        evaluate_editor(args, shipped, tokens, log)
    finally:
        if tokens is not None:
            tokens.close()
        stream.close()


if __name__ == "__main__":
    main()
