"""Words without case and punctuation, n-grams of them, and MinHash signatures of the n-grams (Broder 1997).

A word is a run of letters and digits (`str.isalnum`) in small letters; apostrophes in it are dropped, everything else
separates. So the n-grams of a text do not change with case, punctuation and white space.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ..engine.cpu.compiled import cached
from . import codepoints, hashing
from .codepoints import code_at
from .hashing import mixed
from .texts import Texts

_MULTIPLIER = np.uint64(0x9FB21C651E98DF25)
NO_GRAM = np.uint32(0xFFFFFFFF)
"""Every number of the signature of a text without words."""


@njit(nogil=True)
def _words(data, start, stop, folded, out):  # type: ignore[no-untyped-def]
    """Hashes of the words of a text go into `out`; returns how many."""
    count, h, inside = 0, np.uint64(0), False
    i = start
    while i < stop:
        code, size = code_at(data, i)
        letter = folded[code]
        if letter > 1:
            h = (h + np.uint64(letter)) * _MULTIPLIER
            inside = True
        elif letter == 0 and inside:
            out[count] = mixed(h)
            count += 1
            h, inside = np.uint64(0), False
        i += size
    if inside:
        out[count] = mixed(h)
        count += 1
    return count


@njit(nogil=True)
def _grams(words, count, n, out):  # type: ignore[no-untyped-def]
    """Hashes of the n-grams go into `out`; a text of fewer words is one gram. Returns how many."""
    size = min(n, count)
    grams = count - size + 1 if count else 0
    for i in range(grams):
        h = np.uint64(size)
        for k in range(size):
            h = (h ^ words[i + k]) * _MULTIPLIER
            h ^= h >> np.uint64(32)
        out[i] = mixed(h)
    return grams


@njit(nogil=True)
def _sign(gram, multipliers, offsets, signature):  # type: ignore[no-untyped-def]
    """One gram's part in a signature: numbers of 32 bits, so that the loop is done with eight at a time."""
    x = np.uint32(gram >> np.uint64(32))
    y = np.uint32(gram)
    for k in range(len(signature)):
        # Numba computes with 64 bits unless each result is cut.
        h = np.uint32((x ^ offsets[k]) * multipliers[k])
        h = np.uint32((h ^ (h >> np.uint32(16)) ^ y) * np.uint32(0x85EBCA6B))
        h = np.uint32(h ^ (h >> np.uint32(15)))
        if h < signature[k]:
            signature[k] = h


@njit(nogil=True)
def _signatures(data, offsets, folded, n, multipliers, additions, out, counts):  # type: ignore[no-untyped-def]
    words = grams = np.empty(0, dtype=np.uint64)
    for t in range(len(offsets) - 1):
        start, stop = offsets[t], offsets[t + 1]
        if stop - start + 2 > len(words):
            words, grams = np.empty(stop - start + 2, dtype=np.uint64), np.empty(stop - start + 2, dtype=np.uint64)
        counts[t] = _grams(words, _words(data, start, stop, folded, words), n, grams)
        out[t, :] = NO_GRAM
        for i in range(counts[t]):
            _sign(grams[i], multipliers, additions, out[t])


@njit(nogil=True)
def _text_grams(data, offsets, folded, n, out, ends):  # type: ignore[no-untyped-def]
    words = np.empty(0, dtype=np.uint64)
    at = 0
    for t in range(len(offsets) - 1):
        start, stop = offsets[t], offsets[t + 1]
        if stop - start + 2 > len(words):
            words = np.empty(stop - start + 2, dtype=np.uint64)
        at += _grams(words, _words(data, start, stop, folded, words), n, out[at:])
        ends[t + 1] = at


def _build_signatures(digest: int) -> Any:
    def minhash_signatures(data, offsets, folded, n, multipliers, additions, out, counts):  # type: ignore[no-untyped-def]
        version = digest  # noqa: F841  part of the name of the cached code
        _signatures(data, offsets, folded, n, multipliers, additions, out, counts)

    return minhash_signatures


def _build_grams(digest: int) -> Any:
    def gram_hashes(data, offsets, folded, n, out, ends):  # type: ignore[no-untyped-def]
        version = digest  # noqa: F841  part of the name of the cached code
        _text_grams(data, offsets, folded, n, out, ends)

    return gram_hashes


@njit(nogil=True)
def _holds(ordered, value):  # type: ignore[no-untyped-def]
    """Whether a value is among sorted ones."""
    first, last = 0, len(ordered)
    while first < last:
        middle = (first + last) >> 1
        if ordered[middle] < value:
            first = middle + 1
        else:
            last = middle
    return first < len(ordered) and ordered[first] == value


@njit(nogil=True)
def _suspects(data, offsets, folded, n, bits, hashes, out):  # type: ignore[no-untyped-def]
    words = grams = np.empty(0, dtype=np.uint64)
    mask = np.uint64(8 * len(bits) - 1)
    for t in range(len(offsets) - 1):
        start, stop = offsets[t], offsets[t + 1]
        if stop - start + 2 > len(words):
            words, grams = np.empty(stop - start + 2, dtype=np.uint64), np.empty(stop - start + 2, dtype=np.uint64)
        count = _words(data, start, stop, folded, words)
        if count < n:
            continue
        for i in range(_grams(words, count, n, grams)):
            bit = grams[i] & mask
            if bits[bit >> np.uint64(3)] >> (bit & np.uint64(7)) & 1 and _holds(hashes, grams[i]):
                out[t] = True
                break


def _build_suspects(digest: int) -> Any:
    def suspect_texts(data, offsets, folded, n, bits, hashes, out):  # type: ignore[no-untyped-def]
        version = digest  # noqa: F841  part of the name of the cached code
        _suspects(data, offsets, folded, n, bits, hashes, out)

    return suspect_texts


_suspect_kernel = cached(_build_suspects, __file__, codepoints, hashing)
_signature_kernel = cached(_build_signatures, __file__, codepoints, hashing)
_gram_kernel = cached(_build_grams, __file__, codepoints, hashing)


def signatures(texts: Texts, n: int, permutations: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """(texts, permutations) uint32: the smallest hash of each text's n-grams under each permutation.

    The share of equal numbers of two signatures estimates the Jaccard similarity of the sets of n-grams without bias.
    """
    rng = np.random.Generator(np.random.PCG64([seed, 0x3145]))
    multipliers = rng.integers(0, 1 << 31, permutations, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    additions = rng.integers(0, 1 << 32, permutations, dtype=np.uint32)
    out = np.empty((len(texts), permutations), dtype=np.uint32)
    counts = np.empty(len(texts), dtype=np.int64)
    _signature_kernel(texts.data, texts.offsets, codepoints.folded(), n, multipliers, additions, out, counts)
    return out


def flat_grams(
    texts: Texts, n: int
) -> tuple[np.ndarray[Any, np.dtype[np.uint64]], np.ndarray[Any, np.dtype[np.int64]]]:
    """(hashes of all n-grams in their order, (texts + 1,) where those of each text begin)."""
    out = np.empty(len(texts.data) // 2 + 2 * len(texts) + 1, dtype=np.uint64)
    ends = np.zeros(len(texts) + 1, dtype=np.int64)
    _gram_kernel(texts.data, texts.offsets, codepoints.folded(), n, out, ends)
    return out[: ends[-1]], ends


def distinct(hashes: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Sorted hashes, each once; `np.unique` of NumPy 2.4 takes four to fourteen times as long for them."""
    ordered = np.sort(hashes)
    first = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return ordered[first]


def gram_filter(
    hashes: np.ndarray[Any, np.dtype[np.uint64]],
) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], np.ndarray[Any, np.dtype[np.uint64]]]:
    """Hashes as `suspects` looks for them: a table of bits, at most one in 16 of them set, and the sorted hashes."""
    size = 1 << max(10, (16 * len(hashes)).bit_length())
    bits = np.zeros(size, dtype=bool)
    bits[hashes & np.uint64(size - 1)] = True
    return np.packbits(bits, bitorder="little"), distinct(hashes)


def suspects(texts: Texts, n: int, filter: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(texts,) bool: texts with one of the n-grams of a `gram_filter`."""
    out = np.zeros(len(texts), dtype=bool)
    _suspect_kernel(texts.data, texts.offsets, codepoints.folded(), n, *filter, out)
    return out


def word_counts(texts: Texts) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(texts,) int64: words of each text."""
    return np.diff(flat_grams(texts, 1)[1])


def grams(texts: Texts, n: int) -> list[np.ndarray[Any, np.dtype[np.uint64]]]:
    """The set of n-grams of each text, as sorted hashes; a text of fewer than n words is one gram."""
    out, ends = flat_grams(texts, n)
    return [distinct(out[a:b]) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def jaccard(a: np.ndarray[Any, np.dtype[np.uint64]], b: np.ndarray[Any, np.dtype[np.uint64]]) -> float:
    """Shared elements of two sorted sets for each element of their union; 0 for two empty sets."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(1, len(a) + len(b) - shared)
