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

from ..packing import check_not_packed
from .cache import SourceCache, compute_source_cache, sample_weights
from .decoding import NUM_DRAFT_TOKENS, NUM_DRAFT_TOKENS_CPU, CompiledDecoding, TokenDecoder, decode_target_tokens
from .inputs import (
    check_decoding,
    check_generator,
    check_source_cache,
    check_source_image_tokens,
    check_tensors,
    check_weights,
    resolve_preserve_threshold,
    resolve_settings,
)
from .sampling import TokenSelector, compute_noise_keys, draw_seeds, select_branches


@dataclass
class EditARGenerateOutput(ModelOutput):
    """Output of `generate` with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, N)`): Target tokens; `(batch, T)` with T < N if a stopping
            criterion ended decoding early.
        num_decode_steps (`int`): Number of decoder passes after the prefill of source image and text.
    """

    sequences: torch.Tensor | None = None
    num_decode_steps: int | None = None

    @property
    def num_passes(self) -> int | None:
        warnings.warn("`num_passes` is now called `num_decode_steps`.", FutureWarning, stacklevel=2)
        return self.num_decode_steps


class EditARGenerationMixin(GenerationMixin):
    """Add `generate` to a model with EditAR's `forward`. Put it before `PreTrainedModel` among the base classes."""

    generation_config: GenerationConfig
    compiled_decoding: CompiledDecoding | None = None

    @functools.wraps(PreTrainedModel.save_pretrained)  # diffusers reads the names of the arguments from the signature.
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        check_not_packed("Saving", self)  # Before the configuration is written.
        # A setting that is None is saved with its published value. For greedy decoding, the settings of sampling are
        # not saved, because transformers would refuse to save them.
        settings = resolve_settings(self.generation_config, None, {})._asdict()
        if not settings["do_sample"]:
            settings = {name: settings[name] for name in ("do_sample", "guidance_scale")}
        if getattr(self.generation_config, "preserve_threshold", None) is not None:
            settings["preserve_threshold"] = resolve_preserve_threshold(self.generation_config)
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

        Each token is chosen in this order: guidance, logits processors, then, if `do_sample` is True, temperature,
        top-k, top-p and Gumbel noise, and at last arg-max. Logits are float32 from guidance on. A setting that is None
        is taken from `generation_config`, and if it is None there too, from `self.generation_config`.

        Args:
            source_image_tokens (`torch.LongTensor` of shape `(batch, N)`, *optional*): Codes of the source image in
                raster order; None for text-to-image, which uses the null image as the source.
            prompt_embeds (`torch.Tensor` of shape `(batch, num_text_tokens, text_hidden_size)`): States of the text
                encoder, in the model's dtype and on its device.
            guidance_scale (`float`, *optional*): Weight of the prompt. 1 means no guidance and needs one branch instead
                of two.
            image_guidance_scale (`float`, *optional*): Weight of the source image, which needs a third branch; None and
                1 mean guidance by the prompt only.
            negative_prompt_embeds (`torch.Tensor`, *optional*): Text states that replace the null text, of the same
                shape as `prompt_embeds`.
            do_sample, temperature, top_k, top_p (*optional*): See `DecodingSettings`.
            generator (`torch.Generator` or a list of them, *optional*): One for the batch, or one for each image. Each
                image draws one 63-bit seed, and its noise depends only on that seed. Not used without sampling.
            edit_mask (`torch.BoolTensor` of shape `(batch, N)`, *optional*): True where a token may change; all other
                tokens are copied from the source. Consecutive copied tokens share one pass, so at batch size 1 decoding
                takes about one pass per token inside the mask.
            source_cache (`SourceCache`, *optional*): From `prepare_source_cache`; it replaces `source_image_tokens`,
                which may also be given. The batch holds the same number of images for each source: first those of the
                first source, then those of the next.
            decoding (`str`): `"exact"` decodes one token per pass. `"speculative"` checks several drafts in one pass;
                the first drafts are the source tokens at the same positions, later drafts are the choices of earlier
                passes. Both give the same tokens, except that rounding in bf16 can decide near-ties differently.
            num_draft_tokens (`int`, *optional*): Number of drafts in a speculative pass; *defaults to* 8 on a CPU and
                16 on other devices.
            grid_height, grid_width (`int`, *optional*): Tokens per column and per row, with product N; *defaults to*
                `config.grid_size`.
            logits_processor (`LogitsProcessorList`, *optional*): Called with the target tokens so far, `(batch, T)`,
                and guided logits `(batch, vocab_size)`, in order, for every position at which a token is chosen.
                Positions outside the mask of all rows are skipped. Speculative decoding gives it the same inputs as
                exact decoding: it is called for a draft only after all tokens before the draft are accepted.
            stopping_criteria (`StoppingCriteriaList`, *optional*): Called after every token, including forced tokens
                and the last token, with the target tokens so far, `(batch, T)`, and None. Decoding ends when all rows
                are True. The tokens of one pass are reported one by one before the next pass. Use it for a progress
                bar, a callback or an interrupt.
            streamer (`BaseStreamer`, *optional*): Its `put` gets every token, `(batch, 1)` on the CPU, before the
                stopping criteria are called; its `end` is called last.
            generation_config (`GenerationConfig`, *optional*): Settings for this call.
            return_dict_in_generate (`bool`): Return an `EditARGenerateOutput`.

        Returns:
            `torch.LongTensor` of shape `(batch, N)`, in raster order; if a stopping criterion ended decoding early, the
            tokens so far, `(batch, T)`.

        Raises:
            ValueError: If a setting is out of range, or a tensor, the grid or the generators do not fit the model or
                each other. It is raised before the decoder runs.
            RuntimeError: If logits were NaN or infinite. It is raised at the end of decoding.

        Source: EditAR (arXiv 2501.04699), section 3.
        """
        sampling = {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        arguments = {"guidance_scale": guidance_scale, **sampling}
        settings = resolve_settings(self.generation_config, generation_config, arguments)
        grid_height, grid_width = self.model.resolve_grid(grid_height, grid_width)
        grid = {"grid_height": grid_height, "grid_width": grid_width}
        if prompt_embeds is None:
            raise ValueError("`prompt_embeds` is None; pass the text encoder's states for the prompt.")
        batch_size, device = len(prompt_embeds), prompt_embeds.device
        if source_cache is not None:
            check_source_cache(source_cache, self.dtype, device, **grid)
            check_weights(source_cache, self)
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
        else:  # Source tokens outside the edit mask are forced. Source tokens inside it are the first drafts.
            tokens = source_image_tokens.clone()
        free_positions = range(num_tokens) if edit_mask is None else edit_mask.any(dim=0).nonzero()[:, 0].tolist()
        num_drafts = 0
        if decoding == "speculative":
            num_drafts = num_draft_tokens or (NUM_DRAFT_TOKENS_CPU if device.type == "cpu" else NUM_DRAFT_TOKENS)
        noise_keys = None
        if settings.do_sample:
            noise_keys = compute_noise_keys(draw_seeds(generator, batch_size).to(device), num_tokens)
        select_tokens = TokenSelector(settings, image_scale, logits_processor or [], device, noise_keys, edit_mask)
        branches = select_branches(settings.guidance_scale, image_scale, has_source)
        source = source_image_tokens if source_cache is None else source_cache
        texts = prompt_embeds, negative_prompt_embeds
        decoder = TokenDecoder(self, source, *texts, branches, grid, tokens, select_tokens)
        try:
            for sequences in decode_target_tokens(decoder, free_positions, num_drafts):
                if streamer is not None:
                    streamer.put(sequences[:, -1:].cpu())
                if ask_to_stop(stopping_criteria or [], sequences):
                    break
        finally:
            decoder.close()
        decoder.select_tokens.check_logits()
        if streamer is not None:
            streamer.end()
        sequences = sequences.clone()  # A compiled step reuses its tokens in the next call.
        if not return_dict_in_generate:
            return sequences
        return EditARGenerateOutput(sequences=sequences, num_decode_steps=decoder.num_passes)

    def compile_decoding(self, **options: Any) -> None:
        """Compile the decoding steps of `generate` for all later calls. The first calls then take longer.

        All calls with the same number of rows and the same grid share one compilation and one cache. On a GPU, the step
        that decodes a token is also captured as a CUDA graph, unless `mode` is "reduce-overhead" or "max-autotune",
        which make CUDA graphs of their own. The graph and the cache stay allocated until `free_compiled_caches` is
        called. Speculative decoding and logits processors use compiled passes without a graph.

        Args:
            options: Options of `torch.compile`, such as `mode`. `disable=True` skips torch's compiler. On a GPU, steps
                are then only captured, which takes seconds instead of a minute, and gives a part of the gain.
        """
        self.compiled_decoding = CompiledDecoding(self.forward, **options)

    def compile_passes(self, **options: Any) -> None:
        """Call `compile_decoding`, the new name of this method."""
        warnings.warn("`compile_passes` is now called `compile_decoding`.", FutureWarning, stacklevel=2)
        self.compile_decoding(**options)

    def free_compiled_caches(self) -> None:
        """Free the caches and CUDA graphs that compiled decoding keeps between calls."""
        if self.compiled_decoding is not None:
            self.compiled_decoding.caches.clear()
            self.compiled_decoding.steps.clear()

    @torch.no_grad()
    def prepare_source_cache(
        self, source_image_tokens: torch.Tensor, grid_height: int | None = None, grid_width: int | None = None
    ) -> SourceCache:
        """Compute the keys and values of source images once, for any number of `generate` calls.

        A cache takes 200 MiB for one image of the published size in bf16.

        Args:
            source_image_tokens (`torch.LongTensor` of shape `(sources, N)`): Codes of the images in raster order, on
                the decoder's device.
            grid_height, grid_width (`int`, *optional*): Tokens per column and per row; *defaults to*
                `config.grid_size`.

        Raises:
            ValueError: If the tokens do not fit the grid or the vocabulary.
        """
        grid_height, grid_width = self.model.resolve_grid(grid_height, grid_width)
        grid = {"grid_height": grid_height, "grid_width": grid_width}
        check_source_image_tokens(source_image_tokens, self.config.vocab_size)
        cache = compute_source_cache(self, source_image_tokens, grid)
        cache.weight_samples = sample_weights(self)
        return cache


def ask_to_stop(stopping_criteria: Sequence[StoppingCriteria], tokens: torch.Tensor) -> bool:
    """Call all criteria, and return True if each row is stopped by at least one criterion.

    `StoppingCriteriaList` is not used for this, because it waits for the device after every token.
    """
    is_stopped = torch.zeros(len(tokens), dtype=torch.bool)
    for criterion in stopping_criteria:
        is_stopped |= torch.as_tensor(criterion(tokens, None), device="cpu")
    return bool(is_stopped.all())
