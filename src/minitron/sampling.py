"""The choice of the next token: logits in, an id out. The rules and their order are those of transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

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
        ValueError: the largest logit is NaN or infinite.
    """
    V, top = logits.shape[0], float(logits.max())
    if not math.isfinite(top):
        raise ValueError(f"the largest logit is {top}; the weights or the prompt's activations are not finite")
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


def draw(ids: Array, probabilities: Array, vocabulary: int) -> int:
    """One of `ids`, with these probabilities: what transformers draws in the same state of torch's generator."""
    full = torch.zeros(vocabulary)
    full[torch.from_numpy(ids)] = torch.from_numpy(probabilities).float()
    return int(torch.multinomial(full, 1))


def choose(logits: Array, choice: Choice, seen: Array) -> int:
    """The next token after the ids `seen`, for logits (V,) float32."""
    logits = penalize(logits, seen, choice.repetition_penalty)
    if choice.temperature == 0:
        return int(logits.argmax())
    return draw(*distribution(logits, choice), logits.shape[0])
