"""`generate`: decode the target tokens of an edited image with any form of guidance.

The sequence is `[source image][text][target image]`. All guidance branches share the keys and values of the source.
Branches are rows of one batch, branch-major: all images of the first branch, then all images of the second branch.
"""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .cache import SourceCache, compute_source_cache, sample_weights
from .decoding import CompiledDecoding, PassRunner, decode_target_tokens
from .inputs import (
    check_decoding,
    check_generator,
    check_source_cache,
    check_source_image_tokens,
    check_tensors,
    check_weights,
    resolve_settings,
)
from .sampling import TokenSelector, compute_noise_keys, draw_seeds, select_branches


# The most drafts of a speculative pass. On a GPU reading the weights takes the time, so drafts are almost free. On a
# CPU every row costs arithmetic: a pass of GPT-B with 8 drafts takes about 1.9 times as long as one without in fp32,
# and 2.3 times in bf16 (`benchmarks/results/generation-pieces.md`).
NUM_DRAFT_TOKENS_CPU, NUM_DRAFT_TOKENS = 8, 16


@dataclass
class EditARGenerateOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, N)`): Target tokens; `(batch, T)` with T < N if a stopping
            criterion ended decoding early.
        num_decode_steps (`int`): Decoder forwards after the prefill of source image and text.
    """

    sequences: torch.Tensor | None = None
    num_decode_steps: int | None = None

    @property
    def num_passes(self) -> int | None:
        warnings.warn("`num_passes` is now called `num_decode_steps`.", FutureWarning, stacklevel=2)
        return self.num_decode_steps


class EditARGenerationMixin(GenerationMixin):
    """Give a model with EditAR's `forward` its `generate`; comes before `PreTrainedModel` among the base classes."""

    generation_config: GenerationConfig
    compiled_decoding: CompiledDecoding | None = None

    @functools.wraps(PreTrainedModel.save_pretrained)  # diffusers reads the signature to see what may be passed
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        # Each setting that is None is saved with its published value. Greedy settings leave out those of sampling,
        # which transformers would refuse to save.
        settings = resolve_settings(self.generation_config, None, {})._asdict()
        if not settings["do_sample"]:
            settings = {name: settings[name] for name in ("do_sample", "guidance_scale")}
        own, self.generation_config = self.generation_config, GenerationConfig(**settings)
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.generation_config = own

    @torch.no_grad()
    def generate(
        self,
        source_image_tokens: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        edit_mask: torch.Tensor | None = None,
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
    ) -> torch.Tensor | EditARGenerateOutput:
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
            do_sample, temperature, top_k, top_p (*optional*): See `DecodingSettings`.
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
        sampling = {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        arguments = {"guidance_scale": guidance_scale, **sampling}
        settings = resolve_settings(self.generation_config, generation_config, arguments)
        grid_height, grid_width = self.model.resolve_grid(grid_height, grid_width)
        grid = {"grid_height": grid_height, "grid_width": grid_width}
        if prompt_embeds is None:
            raise ValueError("`prompt_embeds` is None; pass the text encoder's states of the prompt.")
        batch_size, device = len(prompt_embeds), prompt_embeds.device
        if source_cache is not None:
            check_source_cache(source_cache, self.dtype, device, **grid)
            check_weights(source_cache, self.model)
            source_image_tokens = source_cache.expand_tokens(source_image_tokens, prompt_embeds)
        if source_image_tokens is not None:
            check_source_image_tokens(source_image_tokens, self.config.vocab_size)
        self.model.check_shapes(source_image_tokens, prompt_embeds, grid_height, grid_width)
        check_tensors(source_image_tokens, prompt_embeds, negative_prompt_embeds, edit_mask, self.dtype)
        check_generator(generator, batch_size)
        has_source = source_image_tokens is not None
        image_scale = 1 if image_guidance_scale is None else image_guidance_scale
        check_decoding(decoding, num_draft_tokens, image_scale, has_source)

        num_tokens = grid_height * grid_width
        if source_image_tokens is None:
            tokens = torch.zeros(batch_size, num_tokens, dtype=torch.long, device=device)
        else:  # Tokens outside the edit mask are forced. Those inside it are the first drafts.
            tokens = source_image_tokens.clone()
        free_positions = range(num_tokens) if edit_mask is None else edit_mask.any(dim=0).nonzero()[:, 0].tolist()
        num_drafts = 0
        if decoding == "speculative":
            num_drafts = num_draft_tokens or (NUM_DRAFT_TOKENS_CPU if device.type == "cpu" else NUM_DRAFT_TOKENS)
        noise_keys = None
        if settings.do_sample:
            noise_keys = compute_noise_keys(draw_seeds(generator, batch_size).to(device), num_tokens)
        select_tokens = TokenSelector(settings, image_scale, logits_processor or [], noise_keys, edit_mask)
        branches = select_branches(settings.guidance_scale, image_scale, has_source)
        source = source_image_tokens if source_cache is None else source_cache
        run_pass = PassRunner(self, source, prompt_embeds, negative_prompt_embeds, branches, grid)
        try:
            for sequences in decode_target_tokens(run_pass, select_tokens, tokens, free_positions, num_drafts):
                if streamer is not None:
                    streamer.put(sequences[:, -1:].cpu())
                if ask_to_stop(stopping_criteria or [], sequences):
                    break
        finally:
            run_pass.close()
        select_tokens.check_logits()
        if streamer is not None:
            streamer.end()
        if not return_dict_in_generate:
            return sequences
        return EditARGenerateOutput(sequences=sequences, num_decode_steps=max(run_pass.num_passes - 1, 0))

    def compile_decoding(self, **options: Any) -> None:
        """Compile the decoding steps of `generate` for all later calls; the first calls then take longer.

        One compilation serves all calls with equally many rows and the same grid, whatever their prompts, masks and
        sources. The cache of such calls stays allocated until `free_compiled_caches`, one for each shape.

        Args:
            options: Options of `torch.compile`, such as `backend`. On a GPU `mode` defaults to "reduce-overhead" (CUDA
                graphs).
        """
        if self.device.type == "cuda":
            options = {"mode": "reduce-overhead", **options}
        self.compiled_decoding = CompiledDecoding(self.forward, **options)

    def compile_passes(self, **options: Any) -> None:
        """Call `compile_decoding`, the new name."""
        warnings.warn("`compile_passes` is now called `compile_decoding`.", FutureWarning, stacklevel=2)
        self.compile_decoding(**options)

    def free_compiled_caches(self) -> None:
        """Free the caches that compiled decoding keeps between calls."""
        if self.compiled_decoding is not None:
            self.compiled_decoding.caches.clear()

    @torch.no_grad()
    def prepare_source_cache(
        self, source_image_tokens: torch.Tensor, grid_height: int | None = None, grid_width: int | None = None
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
        grid = {"grid_height": grid_height, "grid_width": grid_width}
        check_source_image_tokens(source_image_tokens, self.config.vocab_size)
        cache = compute_source_cache(self, source_image_tokens, grid)
        cache.weight_samples = sample_weights(self.model)
        return cache


def ask_to_stop(stopping_criteria: Sequence[StoppingCriteria], tokens: torch.Tensor) -> bool:
    """Call all criteria; return True if each row is stopped by one of them.

    `StoppingCriteriaList` is not used: it waits for the device after every token, even where no criterion does.
    """
    answers = [torch.as_tensor(criterion(tokens, None)).cpu().expand(len(tokens)) for criterion in stopping_criteria]
    return bool(answers) and bool(torch.stack(answers).any(dim=0).all())
