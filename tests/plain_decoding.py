"""The plain loop of decoding, the oracle for every other way of decoding.

The whole sequence runs anew at every position, one call per guidance branch, without a cache; noise and filters are in
Python's own numbers. It shares no code with the package's loop.
"""

import math

import numpy as np
import torch
from tiny import NUM_CODES, NUM_TEXT_TOKENS, TEXT_HIDDEN_SIZE


def hash_noise(seed, position, code):
    """Gumbel noise in Python's own integers and floats."""

    def mix(x):
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32
        x ^= x >> 15
        x = x * 0xD35A2D97 % 2**32
        return x ^ x >> 15

    low, high = seed % 2**32, seed >> 32
    first = mix(mix(mix(0x9E3779B9 ^ low) ^ high) ^ position)
    second = mix(mix(mix(0x6A09E667 ^ high) ^ low) ^ position)
    u = ((mix(mix(code ^ first) ^ second) >> 9) + 0.5) / 2**23
    return -math.log(-math.log(u))


def compute_naive_logits(model, source, prompt, drop_source, drop_prompt, tokens, height, width):
    """Logits after `tokens` from one uncached forward over the whole sequence of one image."""
    if source is None:
        source, drop_source = torch.zeros(height * width, dtype=torch.long), True
    output = model(
        source_image_tokens=source[None],
        prompt_embeds=prompt[None],
        target_image_tokens=torch.tensor([tokens]) if tokens else None,
        drop_source=torch.tensor([drop_source]),
        drop_prompt=torch.tensor([drop_prompt]),
        grid_height=height,
        grid_width=width,
    )
    return output.logits[0, -1].double().numpy()


def filter_naively(logits, temperature, top_k, top_p):
    """Scale by temperature, then set to −inf what top-k and top-p leave out."""
    logits = logits / temperature
    if 0 < top_k < len(logits):
        logits = np.where(logits >= np.sort(logits)[-top_k], logits, -np.inf)
    order = np.argsort(-logits)
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    before = np.cumsum(probabilities[order]) - probabilities[order]
    filtered = np.full(len(logits), -np.inf)
    kept = order[before < top_p]
    filtered[kept] = logits[kept]
    return filtered


@torch.no_grad()
def decode_naively(
    model,
    source,
    prompt,
    seed=None,
    guidance_scale=3.0,
    image_guidance_scale=None,
    negative=None,
    temperature=1.0,
    top_k=1000,
    top_p=1.0,
    grid_height=None,
    grid_width=None,
    edit_mask=None,
):
    """Decode one image; sampling if there is a seed. Outside the edit mask the source's token is taken as it is."""
    height, width = grid_height or model.config.grid_size, grid_width or model.config.grid_size
    tokens = []
    for position in range(height * width):
        if edit_mask is not None and not edit_mask[position]:
            tokens.append(int(source[position]))
            continue
        state = (tokens, height, width)
        unprompted = (prompt, True) if negative is None else (negative, False)
        both = compute_naive_logits(model, source, prompt, False, False, *state)
        image = compute_naive_logits(model, source, unprompted[0], False, unprompted[1], *state)
        if image_guidance_scale is None:
            logits = image + guidance_scale * (both - image)
        else:
            nothing = compute_naive_logits(model, source, unprompted[0], True, unprompted[1], *state)
            logits = nothing + image_guidance_scale * (image - nothing) + guidance_scale * (both - image)
        if seed is not None:
            noise = np.array([hash_noise(seed, position, code) for code in range(len(logits))])
            logits = filter_naively(logits, temperature, top_k, top_p) + noise
        tokens.append(int(logits.argmax()))
    return tokens


def decode_plainly(
    model,
    source_image_tokens,
    prompt_embeds,
    do_sample=True,
    seeds=(1, 2),
    negative_prompt_embeds=None,
    edit_mask=None,
    **settings,
):
    """Decode image after image, with the arguments of `generate` and the seeds of a generator for each image."""

    def select(tensor, row):
        return None if tensor is None else tensor[row]

    rows = []
    for row, (prompt, generator) in enumerate(zip(prompt_embeds, seed_generators(*seeds), strict=False)):
        seed = torch.randint(2**63 - 1, (), generator=generator).item() if do_sample else None
        source, negative, mask = (select(of, row) for of in (source_image_tokens, negative_prompt_embeds, edit_mask))
        rows.append(decode_naively(model, source, prompt, seed, negative=negative, edit_mask=mask, **settings))
    return torch.tensor(rows)


# What is decoded in the tests of decoding


GREEDY = {"do_sample": False}


def seed_generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_inputs(batch_size=2, num_tokens=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "source_image_tokens": torch.randint(NUM_CODES, (batch_size, num_tokens), generator=generator),
        "prompt_embeds": torch.randn(batch_size, NUM_TEXT_TOKENS, TEXT_HIDDEN_SIZE, generator=generator),
    }


def draw_mask(*seeds, part=0.4):
    """Draw a mask of 16 tokens for each seed."""
    return torch.stack([torch.rand(16, generator=generator) < part for generator in seed_generators(*seeds)])


def select_row(inputs, row):
    return {name: tensor[row : row + 1] for name, tensor in inputs.items()}


class PassRecorder:
    """Note what forwards bring of each segment, the cache of the last one, and how many logits they compute."""

    def __init__(self, model):
        self.passes, self.num_logits, self.cache = [], [], None
        self.handles = [
            model.register_forward_pre_hook(self.record_inputs, with_kwargs=True),
            model.lm_head.register_forward_hook(self.record_logits),
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def record_inputs(self, module, args, kwargs):
        segments = ("source_image_tokens", "prompt_embeds", "target_image_tokens")
        self.passes.append({name: tuple(kwargs[name].shape[:2]) for name in segments if name in kwargs})
        self.cache = kwargs.get("past_key_values")

    def record_logits(self, module, args, logits):
        self.num_logits.append(logits.shape[1])
