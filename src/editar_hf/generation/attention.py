"""Attention of a decoding pass, in pure tensor functions: new positions look at a source prefix and at their own row.

Rows of a batch (guidance branches, prompts, images per prompt) that edit the same source share its keys and values:
they are stored once, and read once for all of these rows. Scores of the two parts are put side by side and take one
softmax, so that the result is that of ordinary attention up to rounding.

Source: attention in a shared and a private part, Hydragen (arXiv 2402.05099).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F


# Queries whose scores exist at once; bounds the memory of long passes: 2 rows of the published size take 22 MB.
QUERIES_PER_CHUNK = 128


class SharedPrefix(NamedTuple):
    """Keys and values of source images in one layer, and who reads them.

    Attributes:
        keys, values (`torch.Tensor` of shape `(sources, heads, N, head_dim)`): Of every source.
        num_rows (`int`): How many rows read them: all images of a branch, then all images of the next, ….
        num_images (`int`): Images of a branch; equally many, one after the other, belong to each source.
    """

    keys: torch.Tensor
    values: torch.Tensor
    num_rows: int
    num_images: int

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """Bring `(rows, heads, queries, x)` to `(sources, heads, rows of a source · queries, x)`."""
        num_sources, width = len(self.keys), states.shape[-1]
        states = states.unflatten(0, (-1, num_sources, self.num_images // num_sources))
        return states.permute(1, 3, 0, 2, 4, 5).reshape(num_sources, states.shape[3], -1, width)

    def scatter(self, states: torch.Tensor, num_queries: int) -> torch.Tensor:
        """Undo `gather`."""
        num_sources = len(self.keys)
        states = states.unflatten(2, (-1, self.num_images // num_sources, num_queries))
        return states.permute(2, 0, 3, 1, 4, 5).flatten(0, 2)


def apply_attention(
    query: torch.Tensor,
    prefixes: list[SharedPrefix],
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attend from each query to the prefix its row reads, and to its row's own keys.

    Args:
        query (`torch.Tensor` of shape `(rows, heads, queries, head_dim)`): What looks.
        prefixes (`list[SharedPrefix]`): Consecutive rows read the first, the next ones the second, …; an empty list if
            the rows' own keys are all there is.
        keys, values (`torch.Tensor` of shape `(rows, heads, slots, head_dim)`): Each row's own.
        bias (`torch.Tensor` of shape `(queries, slots)`, *optional*): float32, added to the scores of the own keys.
        scaling (`float`): Multiplies the products of queries and keys.

    Returns:
        `torch.Tensor` shaped like `query`.
    """
    if not prefixes:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scaling)
    if query.shape[2] <= QUERIES_PER_CHUNK:
        return attend_in_one_softmax(query, prefixes, keys, values, bias, scaling)
    biases = [None] * query.shape[2] if bias is None else bias.split(QUERIES_PER_CHUNK)
    chunks = zip(query.split(QUERIES_PER_CHUNK, dim=2), biases, strict=False)
    return torch.cat([attend_in_one_softmax(q, prefixes, keys, values, b, scaling) for q, b in chunks], dim=2)


def attend_in_one_softmax(query, prefixes, keys, values, bias, scaling) -> torch.Tensor:
    """Attend with plain matrix products: two blocks of scores, one softmax in float32, two weighted sums."""
    num_queries, prefix_length = query.shape[2], prefixes[0].keys.shape[2]
    query = query * scaling
    rows_of_prefix = [prefix.num_rows for prefix in prefixes]
    prefix_scores = join_rows(
        prefix.scatter(prefix.gather(rows) @ prefix.keys.transpose(2, 3), num_queries)
        for prefix, rows in zip(prefixes, query.split(rows_of_prefix), strict=True)
    )
    own_scores = (query @ keys.transpose(2, 3)).float()
    if bias is not None:
        own_scores = own_scores + bias
    scores = torch.cat([prefix_scores.float(), own_scores], dim=-1)
    weights = scores.softmax(dim=-1).to(values.dtype)
    prefix_weights, own_weights = weights.split([prefix_length, keys.shape[2]], dim=-1)
    prefix_output = join_rows(
        prefix.scatter(prefix.gather(rows) @ prefix.values, num_queries)
        for prefix, rows in zip(prefixes, prefix_weights.split(rows_of_prefix), strict=True)
    )
    return prefix_output + own_weights @ values


def join_rows(blocks: Iterable[torch.Tensor]) -> torch.Tensor:
    """Put blocks of rows one after the other; a single one, the usual case, is not copied."""
    blocks = list(blocks)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def build_causal_bias(slots: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Build `(queries, num_slots)`: 0 up to the slot of each query, −inf after it."""
    columns = torch.arange(num_slots, device=slots.device)
    return torch.zeros(len(slots), num_slots, device=slots.device).masked_fill(columns > slots[:, None], -math.inf)
