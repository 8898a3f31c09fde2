"""Exact duplicates by the digests of texts."""

from __future__ import annotations

from typing import Any

import numpy as np


def first_of_equal(digests: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(documents,) bool: true for the first document of each digest, in the order of the input files.

    Args:
        digests: (documents, 2) uint64.
    """
    count = len(digests)
    order = np.lexsort((np.arange(count), digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    first = np.ones(count, dtype=bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    kept = np.zeros(count, dtype=bool)
    kept[order[first]] = True
    return kept
