"""Sampling: logits in, ids of the next tokens out. The rules and their order are those of transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..finite import NotFiniteError
from ..sampling_parameters import SamplingParameters

Array = np.ndarray[Any, Any]


def penalize(logits: Array, seen: Array, penalty: float) -> Array:
    """A copy of `logits` (V,) in which those of the ids `seen` are divided by `penalty`, or multiplied if negative."""
    if penalty == 1.0:
        return logits
    out = logits.copy()
    picked = out[seen]
    out[seen] = np.where(picked < 0, picked * np.float32(penalty), picked / np.float32(penalty))
    return out


def kept_tokens(logits: Array, parameters: SamplingParameters) -> tuple[Array, Array]:
    """The tokens that may be drawn, ids (n,), and their probabilities (n,) float64, which sum to 1.

    Args:
        logits: (V,) float32, the penalty already applied.
        parameters: their temperature is greater than 0.

    Raises:
        NotFiniteError: the largest logit is NaN or infinite.
    """
    V, top = logits.shape[0], float(logits.max())
    if not math.isfinite(top):
        raise NotFiniteError(f"the largest logit is {top}")
    ids = np.arange(V)
    if 0 < parameters.top_k < V:
        ids = np.flatnonzero(logits >= np.partition(logits, V - parameters.top_k)[V - parameters.top_k])
    p = np.exp((logits[ids].astype(np.float64) - top) / parameters.temperature)
    p /= p.sum()
    if parameters.top_p < 1:
        # Tokens below this have less than 1 - top_p together: none of them can be needed, and most need no sorting.
        likely = np.flatnonzero(p >= (1 - parameters.top_p) / len(p))
        ids, p = ids[likely], p[likely]
        order = np.argsort(-p, kind="stable")
        ids, p = ids[order], p[order]
        kept = np.cumsum(p) - p < parameters.top_p
        ids, p = ids[kept], p[kept]
    if parameters.min_p > 0:
        kept = p >= parameters.min_p * p.max()
        ids, p = ids[kept], p[kept]
    return ids, p / p.sum()


def draw(distributions: list[tuple[Array, Array]], vocabulary: int) -> Array:
    """One id for each distribution (ids, probabilities): what transformers draws for a batch from the same state of
    torch's generator."""
    import torch

    full = torch.zeros(len(distributions), vocabulary)
    for row, (ids, probabilities) in zip(full, distributions, strict=True):
        row[torch.from_numpy(ids)] = torch.from_numpy(probabilities).float()
    return torch.multinomial(full, 1)[:, 0].numpy()


def best_token(logits: Array) -> int:
    """The first of the most probable tokens for logits (V,).

    Raises:
        NotFiniteError: the largest logit is NaN or infinite.
    """
    token = int(logits.argmax())  # the first NaN where there is one
    if not math.isfinite(logits[token]):
        raise NotFiniteError(f"the largest logit is {logits[token]}")
    return token


def choose(logits: Array, parameters: SamplingParameters, seen: Sequence[Array]) -> Array:
    """The next token of each sequence, (B,), after the ids that each has `seen`, for logits (B, V) float32.

    Raises:
        NotFiniteError: the largest logit of a sequence is NaN or infinite.
    """
    rows = [penalize(*pair, parameters.repetition_penalty) for pair in zip(logits, seen, strict=True)]
    if parameters.temperature == 0:
        return np.array([best_token(row) for row in rows])
    return draw([kept_tokens(row, parameters) for row in rows], logits.shape[1])


def distribution(logits: Array, parameters: SamplingParameters, seen: Array) -> Array:
    """The probability of every token, (V,) float64, for logits (V,) float32 after the ids `seen` (T,)."""
    full = np.zeros(logits.shape[0])
    ids, p = kept_tokens(penalize(logits, seen, parameters.repetition_penalty), parameters)
    full[ids] = p
    return full


# --- speculative sampling: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023 ------


def acceptance(p: Array, q: Array) -> Array:
    """The probability of accepting a token that was drafted from q (V,) where the model has p (V,): min(1, p / q)."""
    return np.divide(p, q, out=np.ones_like(p), where=q > p)


def residual(p: Array, q: Array) -> Array:
    """The distribution (V,) from which a token is drawn where a draft is rejected: max(p - q, 0), normalized.

    Accepting a draft with probability `acceptance` and otherwise drawing from this gives each token with probability p.
    """
    rest = np.maximum(p - q, 0.0)
    total = rest.sum()
    return rest / total if total > 0 else p  # p == q up to rounding: nothing is ever rejected


def draw_exact(p: Array) -> int:
    """A token drawn from p (V,) float64, by inversion with 53 random bits of torch's generator."""
    import torch

    ids = np.flatnonzero(p)
    sums = np.cumsum(p[ids])
    uniform = float(torch.rand((), dtype=torch.float64))
    return int(ids[min(np.searchsorted(sums, uniform * sums[-1], side="right"), len(ids) - 1)])
