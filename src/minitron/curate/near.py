"""Near duplicates: MinHash and locality-sensitive hashing find candidates, the exact Jaccard similarity decides.

Texts are ranked: the longer one first, of equal length the one with the smaller digest. In the order of ranks a text is
removed if it is similar to a text before it that stays. So every text that is removed is similar to one that stays (no
chains), and what stays depends on the texts alone, not on their order or on how they are divided into files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .recipe import Near
from .word_kernels import jaccard, signatures


def band_keys(texts: Any, settings: Near) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """(texts, bands) uint64: texts with an equal key in a band are candidates.

    Two texts of Jaccard similarity s become candidates with probability 1 - (1 - s^rows)^bands.
    """
    signed = signatures(texts, settings.ngram, settings.bands * settings.rows, settings.seed)
    keys = np.zeros((len(texts), settings.bands), dtype=np.uint64)
    rows = signed.reshape(len(texts), settings.bands, settings.rows)
    for row in range(settings.rows):
        keys = (keys ^ rows[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def near_duplicates(
    keys: np.ndarray[Any, np.dtype[np.uint64]],
    digests: np.ndarray[Any, np.dtype[np.uint64]],
    sizes: np.ndarray[Any, np.dtype[np.int64]],
    alive: np.ndarray[Any, np.dtype[np.bool_]],
    grams_of: Callable[[int], np.ndarray[Any, np.dtype[np.uint64]]],
    similarity: float,
) -> dict[int, tuple[int, float]]:
    """Texts to remove: number -> (number of the text that stays for it, their Jaccard similarity).

    Args:
        keys: (texts, bands) of `band_keys`.
        digests: (texts, 2) of each text.
        sizes: (texts,) bytes.
        alive: (texts,) the texts to look at.
        grams_of: the sorted set of n-grams of a text.
        similarity: texts with at least this one are duplicates.
    """
    order = np.lexsort((digests[:, 1], digests[:, 0], -sizes))
    order = order[alive[order]]
    shared = _shared_bands(keys, order)
    removed: dict[int, tuple[int, float]] = {}
    staying: dict[tuple[int, int], list[int]] = {}
    for rank in np.flatnonzero(shared.any(axis=1)).tolist():
        text = int(order[rank])
        bands = [(band, int(keys[text, band])) for band in np.flatnonzero(shared[rank]).tolist()]
        candidates = sorted({other for band in bands for other in staying.get(band, ())})
        mine = grams_of(text)
        found = [(jaccard(mine, grams_of(other)), -other) for other in candidates]
        best, other = max(found, default=(0.0, 0))
        if found and best >= similarity:
            removed[text] = (-other, best)
            continue
        for band in bands:
            staying.setdefault(band, []).append(text)
    return removed


def _shared_bands(
    keys: np.ndarray[Any, np.dtype[np.uint64]], chosen: np.ndarray[Any, np.dtype[np.int64]]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(chosen, bands) bool: whether another of the chosen texts has the same key in the band.

    One band after the other: a copy of all keys would double the memory.
    """
    shared = np.zeros((len(chosen), keys.shape[1]), dtype=bool)
    for band in range(keys.shape[1]):
        column = keys[chosen, band]
        order = np.argsort(column, kind="stable")
        column = column[order]
        equal = column[1:] == column[:-1]
        shared[order[1:][equal], band] = True
        shared[order[:-1][equal], band] = True
    return shared
