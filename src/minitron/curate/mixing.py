"""How often each document is written, and in which order: both depend on its text and a seed, and on nothing else."""

from __future__ import annotations

import fnmatch
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from .recipe import Mix

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SAMPLING, _ORDER = 1, 2  # purposes of random numbers, which must differ


def random_keys(
    digests: np.ndarray[Any, np.dtype[np.uint64]], seed: int, purpose: int, copies: Any = 0
) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """(documents,) uint64, uniform: the same for the same text, seed, purpose and number of the copy (SplitMix64)."""
    with np.errstate(over="ignore"):
        key = digests[:, 0] ^ _mixed(digests[:, 1] + _GOLDEN * np.uint64(purpose))
        key = _mixed(key + _GOLDEN * np.asarray(copies, dtype=np.uint64))
        return _mixed(key + _GOLDEN * np.uint64(seed % 2**64))


def _mixed(x: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def weight_of(source: str, mix: Mix) -> float:
    """The weight of a file: that of the first entry that is the file, a folder above it or a pattern that matches."""
    path = Path(source)
    for entry in mix.weights:
        wanted = Path(entry.files).expanduser()
        if path == wanted or wanted in path.parents or fnmatch.fnmatchcase(source, str(wanted)):
            return entry.weight
    return 1.0


def copies_of(
    digests: np.ndarray[Any, np.dtype[np.uint64]], sources: list[str], mix: Mix
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(documents,) int64: how often each is written. 2.3 is 2 copies, and a third one with chance 0.3."""
    known = functools.cache(lambda source: weight_of(source, mix))
    weights = np.asarray([known(source) for source in sources], dtype=np.float64)
    whole = np.floor(weights)
    chance = random_keys(digests, mix.seed, _SAMPLING).astype(np.float64) / 2.0**64
    return (whole + (chance < weights - whole)).astype(np.int64)


def shuffled(
    digests: np.ndarray[Any, np.dtype[np.uint64]], copies: np.ndarray[Any, np.dtype[np.int64]], seed: int
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
    """(documents, numbers of their copies) in a random order; 24 bytes for each."""
    documents, numbers = repeated(copies)
    keys = random_keys(digests[documents], seed, _ORDER, numbers)
    # Equal keys (one pair in 4 billion documents, and equal texts) are ordered by what they are.
    order = np.lexsort((numbers, digests[documents, 1], digests[documents, 0], keys))
    return documents[order], numbers[order]


def repeated(
    copies: np.ndarray[Any, np.dtype[np.int64]],
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
    """(documents, numbers of their copies, from 0) in the documents' order, each as often as `copies` says."""
    documents = np.repeat(np.arange(len(copies)), copies)
    first = np.cumsum(copies) - copies
    return documents, np.arange(len(documents)) - first[documents]


def shards_of(sizes: np.ndarray[Any, np.dtype[np.int64]], shard_bytes: int) -> list[tuple[int, int]]:
    """Ranges of consecutive documents of `sizes` bytes; a new one begins where the last has `shard_bytes` or more."""
    if not len(sizes):
        return []
    number = (np.cumsum(sizes) - sizes) // shard_bytes
    cuts = [0, *(np.flatnonzero(number[1:] != number[:-1]) + 1).tolist(), len(sizes)]
    return list(itertools.pairwise(cuts))
