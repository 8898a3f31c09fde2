"""The choice of the next tokens: logits in, ids out. The rules and their order are those of transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..finite import NotFiniteError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Choice:
    """How a token is chosen. The rules apply in this order: penalty, temperature, top-k, top-p, min-p."""

    temperature: float = 0.0
    """0 takes the most probable token; 1 the model's own distribution."""
    top_k: int = 0
    """Keep this many most probable tokens, and those that tie with the last; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most probable tokens that together have at least this probability."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the most probable one's probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already present become less likely."""


def penalize(logits: Array, seen: Array, penalty: float) -> Array:
    """A copy of `logits` (V,) in which those of the ids `seen` are divided by `penalty`, or multiplied if negative."""
    if penalty == 1.0:
        return logits
    out = logits.copy()
    picked = out[seen]
    out[seen] = np.where(picked < 0, picked * np.float32(penalty), picked / np.float32(penalty))
    return out


def distribution(logits: Array, choice: Choice) -> tuple[Array, Array]:
    """The tokens that may be drawn, ids (n,), and their probabilities (n,) float64, which sum to 1.

    Args:
        logits: (V,) float32, the penalty already applied.
        choice: its temperature is greater than 0.

    Raises:
        NotFiniteError: the largest logit is NaN or infinite.
    """
    V, top = logits.shape[0], float(logits.max())
    if not math.isfinite(top):
        raise NotFiniteError(f"the largest logit is {top}")
    ids = np.arange(V)
    if 0 < choice.top_k < V:
        ids = np.flatnonzero(logits >= np.partition(logits, V - choice.top_k)[V - choice.top_k])
    p = np.exp((logits[ids].astype(np.float64) - top) / choice.temperature)
    p /= p.sum()
    if choice.top_p < 1:
        # Tokens below this have less than 1 - top_p together: none of them can be needed, and most need no sorting.
        likely = np.flatnonzero(p >= (1 - choice.top_p) / len(p))
        ids, p = ids[likely], p[likely]
        order = np.argsort(-p, kind="stable")
        ids, p = ids[order], p[order]
        kept = np.cumsum(p) - p < choice.top_p
        ids, p = ids[kept], p[kept]
    if choice.min_p > 0:
        kept = p >= choice.min_p * p.max()
        ids, p = ids[kept], p[kept]
    return ids, p / p.sum()


def draw(laws: list[tuple[Array, Array]], vocabulary: int) -> Array:
    """One id for each of `laws` (ids, probabilities): what transformers draws for a batch in the same state of torch's
    generator."""
    full = torch.zeros(len(laws), vocabulary)
    for row, (ids, probabilities) in zip(full, laws, strict=True):
        row[torch.from_numpy(ids)] = torch.from_numpy(probabilities).float()
    return torch.multinomial(full, 1)[:, 0].numpy()


def choose(logits: Array, choice: Choice, seen: Sequence[Array]) -> Array:
    """The next token of each sequence, (B,), after the ids that each has `seen`, for logits (B, V) float32.

    Raises:
        NotFiniteError: the largest logit of a sequence is NaN or infinite.
    """
    rows = [penalize(*pair, choice.repetition_penalty) for pair in zip(logits, seen, strict=True)]
    if choice.temperature == 0:
        best = np.array([row.argmax() for row in rows])  # of NaN where there is one
        for row, token in zip(rows, best, strict=True):
            if not math.isfinite(row[token]):
                raise NotFiniteError(f"the largest logit is {row[token]}")
        return best
    return draw([distribution(row, choice) for row in rows], logits.shape[1])


def law(logits: Array, choice: Choice, seen: Array) -> Array:
    """The probability of every token, (V,) float64, for logits (V,) float32 after the ids `seen` (T,)."""
    full = np.zeros(logits.shape[0])
    ids, p = distribution(penalize(logits, seen, choice.repetition_penalty), choice)
    full[ids] = p
    return full


# --- speculative sampling: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023 ------


def acceptance(p: Array, q: Array) -> Array:
    """With what probability a token drafted with probability q (V,) is kept where its own is p (V,): min(1, p / q)."""
    return np.divide(p, q, out=np.ones_like(p), where=q > p)


def residual(p: Array, q: Array) -> Array:
    """The law (V,) from which a token is drawn where a draft was not kept: max(p - q, 0), normalized.

    Keeping a draft with `acceptance` and otherwise drawing from this gives each token with probability p.
    """
    rest = np.maximum(p - q, 0.0)
    total = rest.sum()
    return rest / total if total > 0 else p  # p == q but for rounding: nothing is ever rejected


def draw_exact(p: Array) -> int:
    """A token of the law p (V,) float64, by inversion with 53 random bits of torch's generator."""
    ids = np.flatnonzero(p)
    sums = np.cumsum(p[ids])
    uniform = float(torch.rand((), dtype=torch.float64))
    return int(ids[min(np.searchsorted(sums, uniform * sums[-1], side="right"), len(ids) - 1)])
