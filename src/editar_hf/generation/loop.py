"""The one loop of decoding: exact, masked, speculative, and masked and speculative.

A pass feeds the last accepted token and the tokens proposed after it: those outside the edit mask, which are known
(forced), and, in speculative decoding, drafts. Its logits say which drafts hold: those that equal what the logits
before them choose. The first that does not is replaced by that choice, and the next pass begins there. Noise is fixed
for each position, so the result is that of one token at a time. Forced tokens always hold.

Rows of a batch go forward together, by the smallest number any of them may; what a row chose beyond it stays proposed.
So does what was chosen after a draft that failed: it is the next draft there.

Sources: drafts that hold under fixed noise, predictive sampling (arXiv 2002.09928); own predictions as next drafts,
speculative Jacobi decoding (arXiv 2410.01699).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from .sampling import TokenSelector, as_index


@dataclass
class TargetPlan:
    """What is known of the target tokens before any is decoded.

    Args:
        tokens (`torch.LongTensor` of shape `(batch, N)`): What stands outside the edit mask, and first drafts in it.
        free_positions (`list[int]`): Where the mask of any row allows a change, ascending.
        num_draft_tokens (`int`): Drafts of a pass; 0 in exact decoding.
    """

    tokens: torch.LongTensor
    free_positions: list[int]
    num_draft_tokens: int


def plan_target(
    source_image_tokens: torch.LongTensor | None,
    edit_mask: torch.BoolTensor | None,
    shape: tuple[int, int],
    num_draft_tokens: int,
    device: torch.device,
) -> TargetPlan:
    """Propose the source's tokens; where no mask forbids it, every position of `shape` (batch, N) is free."""
    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    if source_image_tokens is not None:
        tokens = source_image_tokens
    free_positions = list(range(shape[1]))
    if edit_mask is not None:
        free_positions = edit_mask.any(dim=0).nonzero()[:, 0].tolist()
    return TargetPlan(tokens, free_positions, num_draft_tokens)


class Reporter:
    """Hand accepted tokens on, one after the other, however many a pass brings.

    Args:
        streamer (`BaseStreamer`, *optional*): Gets each token.
        stopping_criteria (`list[StoppingCriteria]`): Asked after each token.
    """

    def __init__(self, streamer: BaseStreamer | None, stopping_criteria: list[StoppingCriteria]):
        self.streamer = streamer
        self.stopping_criteria = stopping_criteria
        self.num_reported = 0

    def report(self, tokens: torch.LongTensor, num_accepted: int) -> bool:
        """Report the tokens accepted since the last time; True if decoding is to end after the last one reported."""
        while self.num_reported < num_accepted:
            self.num_reported += 1
            known = tokens[:, : self.num_reported]
            if self.streamer is not None:
                self.streamer.put(known[:, -1:].cpu())
            if self.is_to_stop(known):
                return True
        return False

    def is_to_stop(self, tokens: torch.LongTensor) -> bool:
        """Ask all criteria; True if each row is stopped by one of them.

        Not through `StoppingCriteriaList`, which waits for the device after every token even where criteria do not.
        """
        answers = [torch.as_tensor(criterion(tokens, None)).cpu() for criterion in self.stopping_criteria]
        return bool(answers) and bool(torch.stack([answer.expand(len(tokens)) for answer in answers]).any(0).all())


def decode_target_tokens(
    run_pass: Callable[[torch.LongTensor, int | None, Sequence[int]], torch.Tensor],
    select_tokens: TokenSelector,
    plan: TargetPlan,
    reporter: Reporter,
) -> tuple[torch.LongTensor, int]:
    """Decode the free positions of a plan.

    Args:
        run_pass (`Callable`): `run_pass(tokens, start, positions)` feeds the target tokens from `start` on, or the text
            and all target tokens if `start` is None, up to the last of the positions, and returns the logits that
            choose the tokens at the positions, `(branches, batch, positions, vocab_size)` in float32.
        select_tokens (`TokenSelector`): Chooses among them.
        plan (`TargetPlan`): What is known.
        reporter (`Reporter`): Hears of each accepted token, and may end decoding.

    Returns:
        The target tokens `(batch, N)`, fewer if the reporter ended decoding, and the number of passes.
    """
    tokens, free, num_tokens = plan.tokens.clone(), plan.free_positions, plan.tokens.shape[1]
    start, num_decided, num_passes = None, 0, 0
    while num_decided < len(free):
        # Nothing after the last free token is fed: the logits that choose it are the last ones needed.
        window = free[num_decided : num_decided + 1 + plan.num_draft_tokens]
        chosen = select_tokens(run_pass(tokens, start, window), tokens, window)
        num_passes += 1
        num_held = count_held(chosen, tokens, window)
        tokens[:, as_index(window[: chosen.shape[1]])] = chosen
        start = window[num_held - 1]
        num_decided += num_held
        # Forced tokens are accepted with the free one before them.
        num_accepted = free[num_decided] if num_decided < len(free) else num_tokens
        if reporter.report(tokens, num_accepted):
            break
    else:
        reporter.report(tokens, num_tokens)
    return tokens[:, : reporter.num_reported], num_passes


def count_held(chosen: torch.LongTensor, tokens: torch.LongTensor, window: Sequence[int]) -> int:
    """Count the choices that stand in every row: one more than the drafts that hold in every row."""
    num_drafts = chosen.shape[1] - 1
    if num_drafts == 0:  # exact decoding never waits for the device
        return 1
    holds = chosen[:, :num_drafts] == tokens[:, as_index(window[:num_drafts])]
    return holds.cumprod(dim=1).sum(dim=1).min().item() + 1
