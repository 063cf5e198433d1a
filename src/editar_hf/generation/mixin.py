"""`generate()`: the target tokens of an image, whatever the guidance, by calling the model's forward.

The sequence is `[source image][text][target image]`, so the source prefix is computed once and shared by all guidance
branches; then come the text and the passes of the one loop in `loop.py`. Branches are rows of one batch, branch-major:
all images of the first branch, all images of the second, ….
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from ..checks import check_number
from .cache import SourceCache
from .compilation import CompiledPasses
from .configuration import EditARGenerationConfig, resolve_generation_config
from .inputs import (
    check_decoding,
    check_edit_mask,
    check_generate_inputs,
    check_listeners,
    check_own_states,
    check_source_cache,
    check_source_image_tokens,
    check_weight_samples,
)
from .loop import Reporter, decode_target_tokens, plan_target
from .passes import PassRunner, compute_source_states, sample_weights
from .sampling import TokenSelector, compute_noise_keys, draw_seeds, select_branches


# Drafts of a speculative pass. Where reading the weights is what takes time, drafts are almost free; on a CPU every row
# costs arithmetic: a pass of GPT-B with 8 drafts takes about 1.9 times one without in fp32, and 2.3 in bf16
# (`benchmarks/results/generation-pieces.md`).
NUM_DRAFT_TOKENS = {"cpu": 8}
NUM_DRAFT_TOKENS_ELSEWHERE = 16


def resolve_num_draft_tokens(decoding: str, num_draft_tokens: int | None, device: torch.device) -> int:
    """Decide how many drafts a pass has at most."""
    if decoding == "exact":
        return 0
    if num_draft_tokens is None:
        return NUM_DRAFT_TOKENS.get(device.type, NUM_DRAFT_TOKENS_ELSEWHERE)
    return num_draft_tokens


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

    compiled_passes: CompiledPasses | None = None

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
        edit_mask: torch.BoolTensor | None = None,
        source_cache: SourceCache | None = None,
        decoding: Literal["exact", "speculative"] = "exact",
        num_draft_tokens: int | None = None,
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
            edit_mask (`torch.BoolTensor` of shape `(batch, N)`, *optional*): True where a token may change; elsewhere
                the source's stands. Runs of such tokens go through in one pass, so that at batch 1 a mask costs about
                a pass per free token.
            source_cache (`SourceCache`, *optional*): From `prepare_source_cache`, in place of `source_image_tokens` or
                beside them. The batch holds equally many images for each of its sources, one after the other.
            decoding (`str`): `"exact"`, a token per pass; or `"speculative"`, which proposes the source's token at the
                same place, then what earlier passes chose there, and checks several in one pass: the same tokens, in
                bf16 up to rounding at near-ties.
            num_draft_tokens (`int`, *optional*): Drafts of a speculative pass; default by device, 8 on a CPU and 16
                elsewhere.
            grid_height, grid_width (`int`, *optional*): Tokens per column and row, N in all; default
                `config.grid_size`.
            logits_processor (`LogitsProcessorList`, *optional*): Called with the target tokens so far, `(batch, T)`,
                and guided logits `(batch, vocab_size)`; in order, for every token that is chosen, not for those that
                the mask forces in all rows. In a pass with drafts each is called once the tokens before it hold, so
                it sees what it sees in exact decoding.
            stopping_criteria (`StoppingCriteriaList`, *optional*): Called after every token, forced ones and the last
                included, with the target tokens so far, `(batch, T)`, and None; decoding ends when all rows are True.
                Tokens of one pass are reported one after the other before the next pass. The place for a progress bar,
                a callback or an interrupt.
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
            RuntimeError: If logits were NaN or infinite; at the end of decoding.

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
        image_scale = check_number("image_guidance_scale", 1 if image_guidance_scale is None else image_guidance_scale)
        check_listeners(logits_processor, stopping_criteria, streamer, return_dict_in_generate)
        grid_height, grid_width = self.model.resolve_grid(grid_height, grid_width)
        check_own_states(self, prompt_embeds)
        device = prompt_embeds.device
        check_source_cache(source_cache, self.dtype, device, grid_height, grid_width)
        if source_cache is not None:
            source_image_tokens = source_cache.expand_tokens(source_image_tokens, prompt_embeds)
        check_generate_inputs(
            self.config,
            source_image_tokens,
            prompt_embeds,
            negative_prompt_embeds,
            image_scale,
            generator,
            grid_height,
            grid_width,
        )
        check_edit_mask(edit_mask, source_image_tokens)
        check_decoding(decoding, num_draft_tokens, logits_processor or [], source_image_tokens is not None)
        if source_cache is not None:
            check_weight_samples(source_cache, sample_weights(self.model), self.config)

        noise_keys = None
        if settings.do_sample:
            seeds = draw_seeds(generator, len(prompt_embeds)).to(prompt_embeds.device)
            noise_keys = compute_noise_keys(seeds, grid_height * grid_width)
        select_tokens = TokenSelector(settings, image_scale, logits_processor or [], noise_keys, edit_mask)
        grid = {"grid_height": grid_height, "grid_width": grid_width}
        num_draft_tokens = resolve_num_draft_tokens(decoding, num_draft_tokens, device)
        num_images, num_tokens = len(prompt_embeds), grid_height * grid_width
        plan = plan_target(source_image_tokens, edit_mask, (num_images, num_tokens), num_draft_tokens, device)
        branches = select_branches(settings.guidance_scale, image_scale)
        run_pass = PassRunner(
            self, source_image_tokens, source_cache, prompt_embeds, negative_prompt_embeds, branches, grid
        )
        reporter = Reporter(streamer, list(stopping_criteria or []))
        try:
            sequences, num_passes = decode_target_tokens(run_pass, select_tokens, plan, reporter)
        finally:
            run_pass.close()
        select_tokens.check_logits()
        if streamer is not None:
            streamer.end()
        if not return_dict_in_generate:
            return sequences
        return EditARGenerateOutput(sequences=sequences, num_passes=max(num_passes - 1, 0))

    def compile_passes(self, **options):
        """Compile the passes of `generate` after the text, for all later calls; the first ones then take longer.

        A compilation serves all calls with equally many rows of the same grid, whatever their prompts, masks and
        sources. The caches of such calls stay allocated: one for each shape and thread, until `free_compiled_caches`.

        Args:
            options: Of `torch.compile`, such as `backend`; on a GPU `mode` is "reduce-overhead" (CUDA graphs) if left
                out.
        """
        if self.device.type == "cuda":
            options = {"mode": "reduce-overhead", **options}
        self.compiled_passes = CompiledPasses(self.forward, **options)

    def free_compiled_caches(self):
        """Free the caches that compiled passes keep between calls."""
        if self.compiled_passes is not None:
            self.compiled_passes.free_caches()

    @torch.no_grad()
    def prepare_source_cache(
        self,
        source_image_tokens: torch.LongTensor,
        grid_height: int | None = None,
        grid_width: int | None = None,
    ) -> SourceCache:
        """Compute what the decoder knows of source images before any instruction, for any number of `generate` calls.

        For one image of the published size in bf16 it holds 180 MiB.

        Args:
            source_image_tokens (`torch.LongTensor` of shape `(sources, N)`): Codes of the images in raster order, on
                the decoder's device.
            grid_height, grid_width (`int`, *optional*): Tokens per column and row; default `config.grid_size`.

        Raises:
            ValueError: If the tokens do not fit the grid or the vocabulary.
        """
        grid_height, grid_width = self.model.resolve_grid(grid_height, grid_width)
        check_source_image_tokens(self.config, source_image_tokens, grid_height, grid_width)
        grid = {"grid_height": grid_height, "grid_width": grid_width}
        is_null = torch.zeros(len(source_image_tokens), dtype=torch.bool, device=source_image_tokens.device)
        states = compute_source_states(self, source_image_tokens, is_null, grid)
        return SourceCache(source_image_tokens, *states, **grid, weight_samples=sample_weights(self.model))
