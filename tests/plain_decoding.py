"""The plain loop of decoding, the oracle for every other way of decoding.

The whole sequence runs anew at every position, one call per guidance branch, without a cache; noise and filters are in
Python's own numbers. It shares no code with the package's loop.
"""

import math

import numpy as np
import torch


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
    height=None,
    width=None,
    edit_mask=None,
):
    """Decode one image; sampling if there is a seed. Outside the edit mask the source's token is taken as it is."""
    height, width = height or model.config.grid_size, width or model.config.grid_size
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


def decode_batch_naively(
    model, source_image_tokens, prompt_embeds, seeds=None, negative=None, edit_mask=None, **kwargs
):
    """Decode image after image."""
    return [
        decode_naively(
            model,
            None if source_image_tokens is None else source_image_tokens[row],
            prompt_embeds[row],
            seed=None if seeds is None else seeds[row],
            negative=None if negative is None else negative[row],
            edit_mask=None if edit_mask is None else edit_mask[row],
            **kwargs,
        )
        for row in range(len(prompt_embeds))
    ]
