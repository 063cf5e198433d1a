"""Shared by the decoding benchmarks: a model with random weights, the systems that are compared, and parity checks.

A system decodes the target tokens at some positions; at all other positions, target tokens are source tokens. The
systems are the two baselines of `baselines.py` and the package's `generate`.
"""

from collections.abc import Callable, Sequence

import torch
from baselines import decode_like_published, decode_with_library
from transformers import LogitsProcessor, StoppingCriteria

from editar_hf import EditARConfig, EditARForConditionalGeneration


GUIDANCE_SCALE = 3.0
# Tokens are timed at these fractions of the target. All other tokens are forced.
PLACES = (0, 1 / 3, 2 / 3, 1)
# In fp32, tokens may differ only where the two highest logits of the whole forward pass are closer than this.
MAX_MARGIN = 1e-3
# In bf16, the rounding error may be larger by this factor than the error of one whole forward pass.
MAX_ERROR_RATIO = 1.5


class HearTokens(StoppingCriteria):
    """Call `on_token` for each token at a free position. This criterion never ends decoding."""

    def __init__(self, free_positions: Sequence[int], on_token: Callable[[], None]):
        self.free_positions, self.on_token = set(free_positions), on_token

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] - 1 in self.free_positions:
            self.on_token()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def build_edit_mask(source: torch.LongTensor, free_positions: Sequence[int]) -> torch.BoolTensor:
    """Mark the free positions of every image, in the shape of `source`."""
    positions = torch.arange(source.shape[1], device=source.device).expand_as(source)
    return torch.isin(positions, torch.tensor(free_positions, device=source.device))


def decode_with_package(
    model, source, prompt_embeds, guidance_scale, grid_size, free_positions, on_token=None
) -> torch.LongTensor:
    """Decode the target tokens at `free_positions` with `generate`. A mask sets all others to source tokens."""
    is_whole = len(free_positions) == source.shape[1]
    target = model.generate(
        source,
        prompt_embeds,
        do_sample=False,
        guidance_scale=guidance_scale,
        edit_mask=None if is_whole else build_edit_mask(source, free_positions),
        # Stopping criteria wait for the device after every token, so they are used only if `on_token` is given.
        stopping_criteria=None if on_token is None else [HearTokens(free_positions, on_token)],
        grid_height=grid_size,
        grid_width=grid_size,
    )
    return target[:, list(free_positions)]


# The decoder of a rehearsal. With it, a benchmark takes seconds on a CPU.
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_text_tokens": 5,
    "text_hidden_size": 16,
}
DECODERS = {
    "published style": decode_like_published,
    "library": decode_with_library,
    "editar_hf": decode_with_package,
    "editar_hf, compiled": decode_with_package,
    "editar_hf, packed": decode_with_package,
}


def build_empty_model(preset: str, grid_size: int, **overrides) -> EditARForConditionalGeneration:
    """Build a decoder of a published size, or "tiny", on the meta device, without memory for its weights."""
    overrides = {"grid_size": grid_size, "distillation_hidden_size": None, **overrides}
    config = EditARConfig(**TINY, **overrides) if preset == "tiny" else EditARConfig.from_preset(preset, **overrides)
    with torch.device("meta"):
        return EditARForConditionalGeneration(config)


def build_model(
    preset: str, grid_size: int, dtype: torch.dtype, device: str, **overrides
) -> EditARForConditionalGeneration:
    """Build a decoder with random weights that bfloat16 holds, like published ones, in any dtype.

    The head is random too; in a freshly built decoder, it is zero.
    """
    # The dtype is set before memory is allocated, so that peak memory does not include a conversion of the weights.
    model = build_empty_model(preset, grid_size, **overrides).to(dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.ndim == 1:
                tensor.fill_(1)
            else:
                tensor.normal_(std=0.04, generator=generator)
                tensor.copy_(tensor.bfloat16())
    return model


def build_inputs(model, batch_size: int, device: str) -> tuple[torch.LongTensor, torch.Tensor]:
    """Draw random source tokens and text states."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    source = torch.randint(config.vocab_size, (batch_size, config.num_image_tokens), generator=generator)
    text = torch.randn(batch_size, config.num_text_tokens, config.text_hidden_size, generator=generator)
    return source.to(device), text.to(device, model.dtype)


def compute_decode_floor(
    model,
    batch_size: int,
    num_sources: int,
    dtype: torch.dtype,
    bandwidth: float,
    weight_dtype: torch.dtype | None = None,
) -> float:
    """Compute the mean time in seconds to read the data that a token needs, a lower bound of its decoding time.

    These data are all weights, every source once, and on average half of the target slots of each row.

    Args:
        model (`EditARForConditionalGeneration`): The decoder; only its sizes matter.
        batch_size (`int`): Number of edits. Each has two guidance branches.
        num_sources (`int`): Number of different source images.
        dtype (`torch.dtype`): Dtype of keys and values.
        bandwidth (`float`): Bytes read per second.
        weight_dtype (`torch.dtype`, *optional*): Dtype of the weights; *defaults to* `dtype`.
    """
    config = model.config
    weights = sum(p.numel() for p in model.model.layers.parameters()) + model.lm_head.weight.numel()
    slot = 2 * config.num_hidden_layers * config.hidden_size
    own = 2 * batch_size * (1 + config.num_image_tokens / 2)
    states = slot * (num_sources * config.num_image_tokens + own)
    return (weights * (weight_dtype or dtype).itemsize + states * dtype.itemsize) / bandwidth


class RecordLogits(LogitsProcessor):
    """Record the guided logits of every token."""

    def __init__(self):
        self.logits = []

    def __call__(self, input_ids, scores):
        self.logits.append(scores.clone())
        return scores


def compute_guided_logits(model, source, prompt_embeds, tokens, grid: dict[str, int]) -> torch.Tensor:
    """Compute, in one whole forward per branch, the guided logits `(B, N, vocab_size)` that choose tokens `(B, N)`."""
    branches = [
        model(
            source,
            prompt_embeds,
            target_image_tokens=tokens[:, :-1],
            drop_prompt=torch.full((len(source),), is_dropped, device=source.device),
            **grid,
        ).logits.float()
        for is_dropped in (False, True)
    ]
    return branches[1] + GUIDANCE_SCALE * (branches[0] - branches[1])


@torch.no_grad()
def check_parity(
    preset: str,
    grid_size: int,
    dtype: torch.dtype,
    num_tokens: int,
    batch_size: int = 1,
    device: str = "cpu",
    is_compiled: bool = False,
    is_packed: bool = False,
    **compile_options,
) -> str:
    """Compare the logits of decoding with the logits of one forward pass over the same tokens; in fp32, also tokens.

    Packed decoding is compared with a forward pass of the unpacked weights. In bf16, decoding and forward pass are
    compared with the logits of the same weights in fp32. The error of decoding may exceed the error of the forward pass
    only by the factor `MAX_ERROR_RATIO`.

    Raises:
        AssertionError: If logits differ by more than rounding, or a token differs whose two highest logits are not
            close.
    """
    model = build_model(preset, grid_size, dtype, device)
    source, prompt_embeds = build_inputs(model, batch_size, device)
    if is_compiled:
        model.compile_decoding(**compile_options)
    if is_packed:
        model.pack_weights()
    record = RecordLogits()
    grid = {"grid_height": grid_size, "grid_width": grid_size}
    tokens = model.generate(
        source,
        prompt_embeds,
        do_sample=False,
        guidance_scale=GUIDANCE_SCALE,
        logits_processor=[record],
        edit_mask=build_edit_mask(source, range(num_tokens)),
        **grid,
    )[:, :num_tokens]
    ours = torch.stack(record.logits, dim=1)
    if is_packed:
        model.unpack_weights()
    plain = compute_guided_logits(model, source, prompt_embeds, tokens, grid)
    way = "compiled" if is_compiled else "packed" if is_packed else "eager"
    start = f"{way}, over {tokens.numel()} tokens, guided logits"
    if dtype != torch.float32:
        exact = compute_guided_logits(model.float(), source, prompt_embeds.float(), tokens, grid)
        our_error, plain_error = ((logits - exact).std() / exact.std() for logits in (ours, plain))
        assert our_error < MAX_ERROR_RATIO * plain_error, f"errors are {our_error}, of one whole forward {plain_error}"
        return (
            f"{start} are {our_error:.1%} of their spread away from those in fp32, and those of one whole forward "
            f"{plain_error:.1%}"
        )
    difference = ((ours - plain).abs().max() / plain.std()).item()
    best = plain.topk(2, dim=-1)
    is_other = best.indices[..., 0] != tokens
    margins = (best.values[..., 0] - best.values[..., 1])[is_other]
    assert difference < 1e-3, f"logits differ by {difference} of their spread"
    assert (margins < MAX_MARGIN).all(), f"tokens differ at margins {margins.tolist()}"
    return (
        f"{start} differ from one whole forward by at most {difference:.1e} of their spread; {len(margins)} tokens "
        "differ" + (f", at margins below {MAX_MARGIN}" if len(margins) else "")
    )


@torch.no_grad()
def check_paths(
    preset: str, grid_size: int, num_tokens: int, device: str = "cpu", is_compiled: bool = True, **compile_options
) -> str:
    """Compare the tokens of every other decoding mode with the tokens of exact decoding, in fp32, greedy and sampled.

    Raises:
        AssertionError: If a token differs.
    """
    model = build_model(preset, grid_size, torch.float32, device)
    source, prompt_embeds = build_inputs(model, 1, device)
    grid = {"grid_height": grid_size, "grid_width": grid_size}
    # Two runs of free positions, with forced tokens between them.
    far = source.shape[1] // 2
    edit_mask = build_edit_mask(source, [*range(num_tokens // 2), *range(far, far + num_tokens // 2)])
    ways = {
        "a source cache": {"source_cache": model.prepare_source_cache(source, **grid)},
        "drafts": {"decoding": "speculative"},
    }
    if is_compiled:
        ways |= {"compiled passes": {}, "compiled passes and drafts": {"decoding": "speculative"}}
        model.compile_decoding(**compile_options)
    compiled_decoding, model.compiled_decoding = model.compiled_decoding, None
    for do_sample in (False, True):

        def decode(do_sample=do_sample, **how) -> torch.LongTensor:
            generator = torch.Generator(device).manual_seed(0)
            how = {"edit_mask": edit_mask, "guidance_scale": GUIDANCE_SCALE, "generator": generator, **grid, **how}
            return model.generate(source, prompt_embeds, do_sample=do_sample, **how)

        exact = decode()
        for name, how in ways.items():
            model.compiled_decoding = compiled_decoding if name.startswith("compiled") else None
            num_different = (decode(**how) != exact).sum().item()
            model.compiled_decoding = None
            assert num_different == 0, f"with {name}, do_sample={do_sample}, {num_different} tokens differ"
    return f"greedy and sampled, {num_tokens} tokens under a mask are the same with {', with '.join(ways)}"
