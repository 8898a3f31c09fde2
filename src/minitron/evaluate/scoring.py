"""Log-probabilities of tokens without the logits of all positions: hidden states first, then the head where it matters.

Letters of shapes: T tokens, D hidden, V vocabulary, N positions whose logits are formed, M (position, token) pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_VALUES = 1 << 24
"""fp32 values in the logits that exist at one time: 64 MiB."""


def logit_chunks(head: Any, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the N positions and their fp32 logits; each (n, V) is dropped before the next one is formed.

    Args:
        head: the LM head, a linear layer, quantized or not: (n, D) to (n, V), and `out_features`, V.
        hidden: (N, D), after the final norm.
    """
    rows = max(1, CHUNK_VALUES // head.out_features)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        yield part, head(hidden[part]).float()


class PairScores(NamedTuple):
    """What `pair_scores` returns."""

    log_probs: Tensor
    """(M,) fp32, nats."""
    best: Tensor
    """(N,) int64: the most probable token of each position."""


def pair_scores(head: Any, hidden: Tensor, positions: Tensor, tokens: Tensor) -> PairScores:
    """Log-probabilities of given tokens at given positions.

    Args:
        head: as for `logit_chunks`.
        hidden: (N, D).
        positions: (M,) int64, rows of `hidden` in ascending order; several tokens may be asked of one position.
        tokens: (M,) int64.
    """
    log_probs = torch.empty(len(tokens), dtype=torch.float32, device=hidden.device)
    best = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    for part, logits in logit_chunks(head, hidden):
        best[part] = logits.argmax(-1)
        normalizer = logits.logsumexp(-1)
        bounds = torch.tensor([part.start, part.start + logits.shape[0]], device=positions.device)
        first, last = torch.searchsorted(positions, bounds).tolist()
        rows = positions[first:last] - part.start
        log_probs[first:last] = logits[rows, tokens[first:last]] - normalizer[rows]
    return PairScores(log_probs, best)
