"""Train EditAR on your own pairs in plain PyTorch. Copy this file and change it.

    python examples/train_minimal.py --model projects/stickers/sticker-editor --dataset my-pairs --output-dir runs/mine

`--dataset` is a Hub id or a folder that `datasets.load_dataset` reads, with the columns `source_image`, `target_image`
and `prompt`. The VQ model and the text encoder stay frozen, and the decoder learns to predict the tokens of the target
image. The trained pipeline is saved in `--output-dir`; load it with `EditARPipeline.from_pretrained`.

`examples/train_editar.py` adds several GPUs, exact resumption, LoRA, validation and the skipping of damaged rows.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from editar_hf import EditARPipeline


@dataclass
class Arguments:
    model: str = field(metadata={"help": "pipeline folder or Hub id to start from"})
    dataset: str = field(metadata={"help": "Hub id or folder of pairs"})
    output_dir: str = field(metadata={"help": "folder for the trained pipeline"})
    batch_size: int = field(default=8, metadata={"help": "pairs per step"})
    num_steps: int = field(default=1000, metadata={"help": "optimizer steps"})
    learning_rate: float = field(default=1e-4, metadata={"help": "learning rate after the warmup"})
    num_warmup_steps: int = field(default=50, metadata={"help": "steps in which the learning rate rises"})
    num_workers: int = field(default=0, metadata={"help": "processes that read images"})
    seed: int = field(default=0, metadata={"help": "seed of the pair order and of dropout"})


def build_dataloader(pipe, dataset, batch_size, num_workers):
    """Yield batches of pixels in [−1, 1] and of token ids of the prompts."""

    def collate(rows):
        return pipe.processor(
            images=[row["source_image"] for row in rows],
            target_images=[row["target_image"] for row in rows],
            text=[row["prompt"] for row in rows],
        )

    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, collate_fn=collate, num_workers=num_workers)


def build_optimizer(model, learning_rate):
    """Build AdamW with the published settings. Parameters with one dimension, such as norms, have no weight decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


@torch.no_grad()
def encode_batch(pipe, batch):
    """Encode images as tokens with the frozen VQ model, and prompts as states with the frozen text encoder."""
    source_image_tokens = pipe.vq_model.encode(batch["source_pixel_values"]).image_tokens
    target_image_tokens = pipe.vq_model.encode(batch["target_pixel_values"]).image_tokens
    prompt_embeds = pipe.text_encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    return source_image_tokens, target_image_tokens, prompt_embeds


def compute_loss(pipe, batch):
    """Compute the mean cross-entropy of the target tokens in nats."""
    source_image_tokens, target_image_tokens, prompt_embeds = encode_batch(pipe, batch)
    # Guidance needs a model that is also trained without its conditions: 5 % of the pairs lose source image and prompt,
    # 5 % lose only the source image, and 5 % lose only the prompt.
    draw = torch.rand(len(prompt_embeds), device=prompt_embeds.device)
    logits = pipe.transformer(
        source_image_tokens=source_image_tokens,
        prompt_embeds=prompt_embeds,
        target_image_tokens=target_image_tokens,
        drop_source=draw < 0.10,
        drop_prompt=(draw < 0.05) | (draw >= 0.95),
    ).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), target_image_tokens.flatten())


def main(arguments=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = EditARPipeline.from_pretrained(args.model, dtype=torch.float32).to(device)
    pipe.vq_model.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    model = pipe.transformer.train()

    dataloader = build_dataloader(pipe, load_dataset(args.dataset, split="train"), args.batch_size, args.num_workers)
    if not len(dataloader):
        raise ValueError(f"`batch_size` is {args.batch_size}; the data set has only {len(dataloader.dataset)} pairs.")
    optimizer = build_optimizer(model, args.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (args.num_warmup_steps + 1))
    )

    step = 0
    while step < args.num_steps:
        for batch in dataloader:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            # Weights and moments stay in float32. On a GPU, matrices are multiplied in bfloat16.
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = compute_loss(pipe, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
            if step == 1 or step % 20 == 0:
                print(f"step {step}: loss {loss.item():.4f}", flush=True)
            if step == args.num_steps:
                break

    model.eval()
    pipe.save_pretrained(args.output_dir)
    print(f"Saved the pipeline to {args.output_dir}.")


if __name__ == "__main__":
    main()
