"""Compare speed and memory of a training step with a plain training loop, on the same networks and data.

The plain loop encodes source image, target image and prompt one after the other, computes the logits of all positions,
and waits for the loss. Our step encodes both images in one batch, computes only the logits of target positions, and
does not wait for the loss. A third variant reads tokens and text states that `examples/precompute_tokens.py` stores.
Reading and decoding of files is not measured.

    python benchmarks/bench_training.py           # a small decoder on one CPU thread, a few minutes
    python benchmarks/bench_training.py --full    # GPT-XL at 512×512 in bf16, on a GPU

Each measurement runs in a separate process. The variants are measured in turn, in alternating order. The script stops
if their losses differ. Results are written to `results/training.md`, or `results/training-full.md` with `--full`.
"""

import argparse
import json
import statistics

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from report import (
    describe_machine,
    format_range,
    format_ratios,
    format_table,
    measure_matrix_rate,
    measure_peak_memory,
    run_sample,
    take_turns,
    time_call,
    write_result,
)
from transformers import T5Config, T5EncoderModel

from editar_hf import EditARConfig, EditARForConditionalGeneration, EditARVQConfig, EditARVQModel
from editar_hf.training.optimization import build_optimizer
from editar_hf.training.step import TrainingStep, draw_dropout, encode_image_tokens


WAYS = {"plain": "plain loop", "images": "ours, from images", "tokens": "ours, from tokens and text states"}
NO_DROPOUT = {"text_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0, "distillation_hidden_size": None}
# In a step, VQ model and text encoder take about the same fraction of the time as at the published size.
SMALL = {
    "transformer": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "grid_size": 16},
    "vq_model": {"base_channels": 32, "norm_num_groups": 2},
    "text_encoder": {"d_model": 2048, "d_kv": 64, "d_ff": 1024, "num_layers": 1, "num_heads": 8},
    "batch_size": 2,
    "steps": (1, 3),
}
# Source of the text encoder's sizes: the configuration of google/flan-t5-xl.
FULL = {
    "transformer": EditARConfig.from_preset("GPT-XL").to_dict(),
    "vq_model": {},
    "text_encoder": {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "batch_size": 16,
    "steps": (5, 20),
}


def build_networks(sizes: dict) -> tuple[EditARForConditionalGeneration, EditARVQModel, T5EncoderModel]:
    """Build the three networks with random weights, the same in every process. The head is random too."""
    torch.manual_seed(0)
    transformer = EditARForConditionalGeneration(EditARConfig(**{**sizes["transformer"], **NO_DROPOUT}))
    torch.nn.init.normal_(transformer.lm_head.weight, std=0.02)
    vq_model = EditARVQModel(EditARVQConfig(**sizes["vq_model"])).eval().requires_grad_(False)
    config = T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", dropout_rate=0.0, **sizes["text_encoder"])
    return transformer, vq_model, T5EncoderModel(config).requires_grad_(False)


def draw_batch(sizes: dict, transformer: EditARForConditionalGeneration, stride: int, place: int) -> dict:
    """Draw a batch of smooth images and prompts."""
    generator = torch.Generator().manual_seed(place)
    side, batch_size = transformer.config.grid_size * stride, sizes["batch_size"]
    coarse = torch.rand(2 * batch_size, 3, 8, 8, generator=generator) * 2 - 1
    source, target = F.interpolate(coarse, (side, side), mode="bilinear").chunk(2)
    ids = torch.randint(2, 32100, (batch_size, transformer.config.num_text_tokens), generator=generator)
    images = {"source_pixel_values": source, "target_pixel_values": target}
    return {**images, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def compute_plain_loss(transformer, vq_model, text_encoder, batch: dict, drop_source, drop_prompt) -> torch.Tensor:
    """Compute the loss as a plain, unoptimized training loop does."""
    with torch.no_grad():
        source, target = (vq_model.encode(batch[f"{name}_pixel_values"]).image_tokens for name in ("source", "target"))
        prompt_embeds = text_encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    states = transformer.model(source, prompt_embeds, target[:, :-1], drop_source, drop_prompt).last_hidden_state
    logits = transformer.lm_head(states).float()
    return F.cross_entropy(logits[:, -target.shape[1] :].flatten(0, 1), target.flatten())


def measure_way(way: str, is_full: bool) -> dict:
    """Train a few steps in this process. Return the losses, the seconds per step, and the peak memory."""
    sizes = FULL if is_full else SMALL
    if not is_full:
        torch.set_num_threads(1)
    accelerator = Accelerator(cpu=not is_full, mixed_precision="bf16" if is_full else "no")
    transformer, vq_model, text_encoder = build_networks(sizes)
    vq_model.to(accelerator.device)
    module = TrainingStep(transformer, text_encoder, (transformer.config.grid_size,) * 2)
    if is_full and way != "plain":
        module.compile()
    module, optimizer = accelerator.prepare(module, build_optimizer(module.parameters()))
    module.train()
    num_warm, num_timed = sizes["steps"]
    batches = [draw_batch(sizes, transformer, vq_model.config.stride, place) for place in range(num_warm + num_timed)]
    batches = [{name: tensor.to(accelerator.device) for name, tensor in batch.items()} for batch in batches]
    if way == "tokens":
        batches = [encode_image_tokens(batch, vq_model) for batch in batches]
        with torch.no_grad(), accelerator.autocast():
            batches = [{**batch, "prompt_embeds": module.encode_prompts(batch)} for batch in batches]
    losses = []

    def take_step(place: int, batch: dict):
        if way == "plain":
            drops = {name: draw_dropout(batch, 0, place)[name] for name in ("drop_source", "drop_prompt")}
            with accelerator.autocast():
                loss = compute_plain_loss(transformer, vq_model, text_encoder, batch, **drops)
        else:
            loss = module(**draw_dropout(encode_image_tokens(batch, vq_model), 0, place))["loss"]
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() if way == "plain" else loss.detach())

    for place in range(num_warm):
        take_step(place, batches[place])
    device, timed = accelerator.device.type, range(num_warm, num_warm + num_timed)
    seconds, _ = time_call(lambda: [take_step(place, batches[place]) for place in timed], device)
    matrices = (torch.bfloat16, 8192) if is_full else (torch.float32, 2048)
    return {
        "losses": [float(loss) for loss in losses],
        "seconds": seconds / num_timed,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if is_full else measure_peak_memory(),
        "flops_per_second": measure_matrix_rate(device, *matrices),
    }


def count_operations(config: EditARConfig) -> float:
    """Count the operations of a training sample. The backward pass has twice as many as the forward pass.

    GPT-XL at 512×512 needs 10.94e12 operations in total.
    """
    num_positions = 2 * config.num_image_tokens + config.num_text_tokens - 1
    matrices = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    layers = 2 * config.num_hidden_layers * matrices * num_positions
    # Attention is causal: half of all pairs of positions, once for the attention scores and once for the values.
    attention = 2 * config.num_hidden_layers * config.hidden_size * num_positions**2
    head = 2 * config.hidden_size * config.vocab_size * config.num_image_tokens
    return 3 * (layers + attention + head)


def check_parity(samples: dict[str, list[dict]], tolerance: float):
    """Stop if the losses of the variants differ, because then they do not compute the same thing."""
    for way, measured in samples.items():
        for loss, expected in zip(measured[0]["losses"], samples["plain"][0]["losses"], strict=True):
            if abs(loss - expected) > tolerance * expected:
                raise SystemExit(f"{WAYS[way]}: a loss is {loss}, but {expected} in the plain loop.")


def compose_report(samples: dict[str, list[dict]], is_full: bool, machine: str) -> str:
    """Compose the report in Markdown: medians, and ratios to the plain loop of the same round."""
    sizes = FULL if is_full else SMALL
    config = EditARConfig(**{**sizes["transformer"], **NO_DROPOUT})
    operations = sizes["batch_size"] * count_operations(config)
    side = config.grid_size * EditARVQConfig(**sizes["vq_model"]).stride
    rows = []
    for way, measured in samples.items():
        seconds, plain = ([sample["seconds"] for sample in run] for run in (measured, samples["plain"]))
        speeds = format_range([sizes["batch_size"] / second for second in seconds], ".3g")
        share = statistics.median(operations / s["seconds"] / s["flops_per_second"] for s in measured)
        memory = max(sample["memory_gib"] for sample in measured)
        rows.append([WAYS[way], speeds, format_ratios(plain, seconds), f"{share:.0%}", f"{memory:.1f} GiB"])
    header = ["way", "samples/s", "against the plain loop", "share of the matrix rate", "peak memory"]
    parts = [
        f"# Training step, {'GPT-XL' if is_full else 'a small decoder'} at {side}×{side}",
        machine,
        f"Decoder of {config.num_hidden_layers} layers, width {config.hidden_size}; batches of {sizes['batch_size']}; "
        f"{'bf16, all but the plain loop compiled' if is_full else 'fp32, eager, one thread'}. Samples per second are "
        f"measured by {'wall-clock time' if is_full else 'processor time'}: median (least – most) of "
        f"{len(samples['plain'])} processes, in turn. The losses of all steps agree. The share is relative to the rate "
        "of a large matrix product in the same process, and counts only operations of the decoder. Made by "
        f"`python benchmarks/bench_training.py{' --full' if is_full else ''}`.",
        format_table(header, rows),
    ]
    return "\n\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the published size, on a GPU")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--way", choices=WAYS, help="measure one variant in this process, and print JSON")
    args = parser.parse_args()
    if args.full and not torch.cuda.is_available():
        raise SystemExit("`--full` needs a GPU.")
    if args.way:
        print(json.dumps(measure_way(args.way, args.full)))
        return
    machine, samples = describe_machine(), {way: [] for way in WAYS}
    for way in take_turns(WAYS, args.rounds):
        words = ["--way", way, *(["--full"] if args.full else [])]
        samples[way].append(run_sample(__file__, *words, is_one_thread=not args.full))
        print(f"{WAYS[way]}: {samples[way][-1]}", flush=True)
    check_parity(samples, tolerance=0.02 if args.full else 1e-4)
    write_result(f"training{'-full' if args.full else ''}", compose_report(samples, args.full, machine))


if __name__ == "__main__":
    main()
