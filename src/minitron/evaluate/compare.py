"""Means, standard errors, differences and paired tests from the scores of documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_SIGN_FLIPS = 10_000


class Mean(NamedTuple):
    """A mean and its standard error."""

    value: float
    stderr: float
    """Deviation of the sample over the root of its size; NaN for a single document."""


def mean_of(scores: Sequence[float]) -> Mean:
    """Mean and standard error of the scores of documents.

    Raises:
        ValueError: no scores.
    """
    if not len(scores):
        raise ValueError("there are no scores to average")
    values = np.asarray(scores, dtype=np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(float(values.mean()), float(error))


class Difference(NamedTuple):
    """The difference of two models on the same documents."""

    value: float
    """Mean of first minus second."""
    stderr: float
    """Standard error of that mean; smaller than the two models' errors suggest, because the documents are the same."""
    p_value: float
    """Probability of a difference at least this large if the models are equally good; two-sided."""
    test: str


def difference_of(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare two models document by document, with a paired test.

    Scores of 0 and 1 are compared by McNemar's test in its exact form, others by 10,000 random sign flips.

    Raises:
        ValueError: different numbers of scores.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} scores; a paired test needs the same documents")
    gaps = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    value, error = mean_of(gaps.tolist())
    if set(np.unique(gaps).tolist()) <= {-1.0, 0.0, 1.0}:
        return Difference(value, error, mcnemar(int((gaps > 0).sum()), int((gaps < 0).sum())), "McNemar, exact")
    return Difference(value, error, _sign_flips(gaps), f"{_SIGN_FLIPS} sign flips")


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value, given how many documents only the first or only the second model got right."""
    n, least = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(least + 1))
    return min(1.0, 2 * tail / 2**n)  # integers: no rounding before the division


def _sign_flips(gaps: np.ndarray) -> float:
    generator = np.random.default_rng(0)
    gaps = gaps[gaps != 0]
    if not len(gaps):
        return 1.0
    hits = 0
    for start in range(0, _SIGN_FLIPS, 500):
        signs = generator.choice((-1.0, 1.0), size=(min(500, _SIGN_FLIPS - start), len(gaps)))
        hits += int((np.abs(signs @ gaps) >= abs(gaps.sum()) - 1e-12).sum())
    return (hits + 1) / (_SIGN_FLIPS + 1)
