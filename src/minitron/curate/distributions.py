"""Histograms of what was measured on documents, with edges that are the same in every part, so that they add up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

_POWERS = tuple(float(2**k) for k in range(2, 31))
_SHARES = tuple(round(0.05 * k, 2) for k in range(1, 21))
EDGES: dict[str, tuple[float, ...]] = {
    "bytes": _POWERS,
    "tokens": _POWERS,
    "words": _POWERS,
    "mean word length": tuple(0.5 * k for k in range(2, 31)),
    "words with a letter": _SHARES,
    "characters in repeated 5-grams": _SHARES,
    "characters in repeated lines": _SHARES,
    "lines with an end mark": _SHARES,
    "language score": _SHARES,
    "bits per byte": tuple(0.25 * k for k in range(1, 33)),
    "probability": _SHARES,
    "similarity of near duplicates": tuple(round(0.5 + 0.025 * k, 3) for k in range(1, 21)),
}
"""Upper edges of the bins by name; a last bin takes what is above all of them."""


@dataclass
class Distributions:
    """Counts of documents by name and bin."""

    counts: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = field(default_factory=dict)
    """(edges + 1,) int64 of each name of `EDGES` that was measured."""

    def add(self, name: str, values: Any) -> None:
        """Count values, one of each document. A value on an edge belongs to the bin below it."""
        edges = EDGES[name]
        bins = np.searchsorted(np.asarray(edges), np.asarray(values, dtype=np.float64))
        found = np.bincount(bins, minlength=len(edges) + 1)
        self.counts[name] = self.counts.get(name, 0) + found

    def merge(self, other: Distributions) -> None:
        """Add the counts of another part."""
        for name, found in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + found

    def as_dict(self) -> dict[str, list[int]]:
        """Plain values."""
        return {name: found.tolist() for name, found in self.counts.items()}

    @classmethod
    def from_dict(cls, values: dict[str, list[int]]) -> Distributions:
        """The reverse of `as_dict`."""
        return cls({name: np.asarray(found, dtype=np.int64) for name, found in values.items()})
