"""`generate()`: one loop that decodes an image token by token, whatever the guidance, by calling the model's forward.

The sequence is `[source image][text][target image]`, so the source prefix is computed once and shared by all guidance
branches; then the text, then one token a step. Branches are rows of one batch, branch-major: all images of the first
branch, all images of the second, ….
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .configuration import EditARGenerationConfig, resolve_generation_config
from .inputs import check_generate_inputs
from .sampling import (
    GuidanceBranch,
    TokenSelector,
    compute_noise_keys,
    draw_seeds,
    select_branches,
)


@dataclass
class EditARGenerateOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, N)`): Target tokens; `(batch, T)` with T < N if a stopping
            criterion ended decoding early.
        num_passes (`int`): Decoder forwards after the prefill of source image and text.
    """

    sequences: torch.LongTensor | None = None
    num_passes: int | None = None


class EditARGenerationMixin(GenerationMixin):
    """Give a model with EditAR's `forward` its `generate`."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Set on the model's class itself: of its bases, `PreTrainedModel` comes first and has this attribute too.
        cls.generation_config_class = EditARGenerationConfig

    def adjust_generation_fn(self, *args, **kwargs):
        """Load the generation config as transformers does, then as our class, which fills in published settings."""
        super().adjust_generation_fn(*args, **kwargs)
        self.generation_config = EditARGenerationConfig.from_dict(self.generation_config.to_dict())

    @torch.no_grad()
    def generate(
        self,
        source_image_tokens: torch.LongTensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        grid_height: int | None = None,
        grid_width: int | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: BaseStreamer | None = None,
        generation_config: GenerationConfig | None = None,
        return_dict_in_generate: bool = False,
    ) -> torch.LongTensor | EditARGenerateOutput:
        """Decode the tokens of the target image.

        At each position: guidance, logits processors, temperature, top-k, top-p, plus noise (the last four when
        sampling), arg-max. Logits are float32 from guidance on. Settings left at None come from `generation_config`,
        and what that leaves open from `self.generation_config`.

        Args:
            source_image_tokens (`torch.LongTensor` of shape `(batch, N)`, *optional*): Codes of the source image in
                raster order; None for text-to-image, which decodes from the null image.
            prompt_embeds (`torch.Tensor` of shape `(batch, num_text_tokens, text_hidden_size)`): States of the text
                encoder, in the model's dtype and on its device.
            guidance_scale (`float`, *optional*): Weight of the prompt; 1 decodes without guidance, in half the work.
            image_guidance_scale (`float`, *optional*): Weight of the source image in two-knob guidance, for a third
                branch; None and 1 are the one-knob form.
            negative_prompt_embeds (`torch.Tensor`, *optional*): Shaped like `prompt_embeds`, in place of the null text.
            do_sample, temperature, top_k, top_p (*optional*): See `EditARGenerationConfig`.
            generator (`torch.Generator` or a list of them, *optional*): One for the batch, or one per image. Each
                image draws one 63-bit seed, and its noise depends on that seed alone. Unused without sampling.
            grid_height, grid_width (`int`, *optional*): Tokens per column and row, N in all; default
                `config.grid_size`.
            logits_processor (`LogitsProcessorList`, *optional*): Called with the target tokens so far, `(batch, T)`,
                and guided logits `(batch, vocab_size)`.
            stopping_criteria (`StoppingCriteriaList`, *optional*): Called after every token, the last included, with
                the target tokens so far, `(batch, T)`, and None; decoding ends when all rows are True. The place for a
                progress bar, a callback or an interrupt.
            streamer (`BaseStreamer`, *optional*): Its `put` gets every token, `(batch, 1)` on the CPU, before the
                stopping criteria are asked; `end` comes last.
            generation_config (`GenerationConfig`, *optional*): Settings for this call.
            return_dict_in_generate (`bool`): Return an `EditARGenerateOutput`.

        Returns:
            `torch.LongTensor` of shape `(batch, N)`, in raster order; if a stopping criterion ended decoding early, the
            tokens so far, `(batch, T)`.

        Raises:
            ValueError: If a setting is out of range, or a tensor, the grid or the generators do not fit the model or
                each other; before the first forward.

        Source: EditAR (arXiv 2501.04699), section 3.
        """
        arguments = {
            "guidance_scale": guidance_scale,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
        settings = resolve_generation_config(self.generation_config, generation_config, arguments)
        image_guidance_scale = 1 if image_guidance_scale is None else image_guidance_scale
        grid_height, grid_width = self.model.resolve_grid(grid_height, grid_width)
        check_generate_inputs(
            self.config,
            source_image_tokens,
            prompt_embeds,
            negative_prompt_embeds,
            image_guidance_scale,
            generator,
            grid_height,
            grid_width,
        )
        noise_keys = None
        if settings.do_sample:
            seeds = draw_seeds(generator, len(prompt_embeds)).to(prompt_embeds.device)
            noise_keys = compute_noise_keys(seeds, grid_height * grid_width)
        select_tokens = TokenSelector(settings, image_guidance_scale, logits_processor or [], noise_keys)
        criteria = StoppingCriteriaList(stopping_criteria or [])

        grid = {"grid_height": grid_height, "grid_width": grid_width}
        branches = select_branches(settings.guidance_scale, image_guidance_scale)
        cache = self.compute_source_prefix(source_image_tokens, prompt_embeds, branches, grid)
        logits = self.compute_first_logits(prompt_embeds, negative_prompt_embeds, branches, cache, grid)
        sequences = self.decode_target_tokens(logits, cache, grid, len(branches), select_tokens, criteria, streamer)
        if not return_dict_in_generate:
            return sequences
        return EditARGenerateOutput(sequences=sequences, num_passes=sequences.shape[1] - 1)

    def compute_source_prefix(
        self,
        source_image_tokens: torch.LongTensor | None,
        prompt_embeds: torch.Tensor,
        branches: list[GuidanceBranch],
        grid: dict[str, int],
    ) -> Cache:
        """Run every source image, and at most one null image, once; return their cache, one row per branch and image.

        Sharing is exact: attention is causal and the text comes after the source.
        """
        batch_size, device = len(prompt_embeds), prompt_embeds.device
        null_tokens = torch.zeros(1, grid["grid_height"] * grid["grid_width"], dtype=torch.long, device=device)
        if source_image_tokens is None:
            tokens, num_images = null_tokens, 0
        elif any(branch.drop_source for branch in branches):
            tokens, num_images = torch.cat([source_image_tokens, null_tokens]), batch_size
        else:
            tokens, num_images = source_image_tokens, batch_size
        is_null = torch.arange(len(tokens), device=device) >= num_images
        cache = self(source_image_tokens=tokens, drop_source=is_null, use_cache=True, **grid).cache

        image_rows = torch.arange(batch_size, device=device)
        null_rows = torch.full_like(image_rows, num_images)
        is_dropped = [source_image_tokens is None or branch.drop_source for branch in branches]
        cache.batch_select_indices(torch.cat([null_rows if dropped else image_rows for dropped in is_dropped]))
        return cache

    def compute_first_logits(
        self,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        branches: list[GuidanceBranch],
        cache: Cache,
        grid: dict[str, int],
    ) -> torch.Tensor:
        """Continue the source prefix with each branch's text; return logits of target token 0, `(rows, vocab_size)`.

        A branch without the prompt reads the negative prompt, or else the null text.
        """
        drops_prompt = torch.tensor([branch.drop_prompt for branch in branches], device=prompt_embeds.device)
        drops_prompt = drops_prompt.repeat_interleave(len(prompt_embeds))
        rows = prompt_embeds.repeat(len(branches), 1, 1)
        if negative_prompt_embeds is not None:
            negative_rows = negative_prompt_embeds.repeat(len(branches), 1, 1)
            rows = torch.where(drops_prompt[:, None, None], negative_rows, rows)
            drops_prompt = torch.zeros_like(drops_prompt)
        return self(prompt_embeds=rows, drop_prompt=drops_prompt, past_key_values=cache, **grid).logits[:, -1]

    def decode_target_tokens(
        self,
        logits: torch.Tensor,
        cache: Cache,
        grid: dict[str, int],
        num_branches: int,
        select_tokens: TokenSelector,
        stopping_criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
    ) -> torch.LongTensor:
        """Choose a token per image, feed it to all branches, and again, until the grid is full or all are to stop."""
        num_image_tokens = grid["grid_height"] * grid["grid_width"]
        tokens = torch.empty(len(logits) // num_branches, 0, dtype=torch.long, device=logits.device)
        while True:
            next_tokens = select_tokens(logits.float().chunk(num_branches), tokens)[:, None]
            tokens = torch.cat([tokens, next_tokens], dim=1)
            if streamer is not None:
                streamer.put(next_tokens.cpu())
            is_stopped = bool(stopping_criteria) and stopping_criteria(tokens, None).all()
            if is_stopped or tokens.shape[1] == num_image_tokens:
                break
            rows = next_tokens.repeat(num_branches, 1)
            logits = self(target_image_tokens=rows, past_key_values=cache, **grid).logits[:, -1]
        if streamer is not None:
            streamer.end()
        return tokens
