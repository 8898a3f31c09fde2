"""Paragraphs and lines that came before, in the same text or in another one: found by hash, dropped from the texts.

A line ends at a line feed, a paragraph at two or more. Of equal ones the first stays, in the order of the input files.
Equal means an equal hash of 64 bits: of a billion different pieces one is taken for another with probability 0.03.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from ..engine.cpu.compiled import cached
from . import hashing
from .hashing import mixed, span_hash
from .recipe import Exact
from .texts import Texts

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
KINDS = ("paragraphs", "lines")
BUCKET_PIECES = 16_000_000
"""Hashes that are compared at once, about; 8 bytes each, and 16 while they are sorted."""


@njit(nogil=True)
def _long_enough(data, start, stop, least):  # type: ignore[no-untyped-def]
    """Whether a span has at least so many characters."""
    if stop - start < least:
        return False
    count = 0
    for i in range(start, stop):
        count += (data[i] & 0xC0) != 0x80
    return count >= least


@njit(nogil=True)
def _line_end(data, i, stop):  # type: ignore[no-untyped-def]
    while i < stop and data[i] != 10:
        i += 1
    return i


@njit(nogil=True)
def _paragraph_end(data, i, stop):  # type: ignore[no-untyped-def]
    while i < stop and not (data[i] == 10 and (i + 1 == stop or data[i + 1] == 10)):
        i += 1
    return i


@njit(nogil=True)
def _walk(data, start, stop, paragraphs, lines, least, drop, at, hashes, out, to):  # type: ignore[no-untyped-def]
    """Pieces of a text in their order: hashes are written from `at` on, or, if `drop` is not empty, the text without
    the pieces whose entry there is true is written from `to` on. Returns (at, to, paragraphs dropped, lines dropped).

    The lines of a paragraph have their entries also where it is dropped, so that both uses count alike.
    """
    writing = len(drop) > 0
    gone_paragraphs, gone_lines = 0, 0
    i = start
    while i < stop:
        end = _paragraph_end(data, i, stop) if paragraphs else stop
        following = end
        while following < stop and data[following] == 10:
            following += 1
        dropped = False
        if paragraphs and _long_enough(data, i, end, least):
            if writing:
                dropped = drop[at]
                gone_paragraphs += dropped
            else:
                hashes[at] = mixed(span_hash(data, i, end) + np.uint64(1))
            at += 1
        line = i
        while line < end:
            line_end = _line_end(data, line, end) if lines else end
            gone = dropped
            if lines and _long_enough(data, line, line_end, least):
                if writing:
                    gone |= drop[at]
                    gone_lines += drop[at] and not dropped
                else:
                    hashes[at] = mixed(span_hash(data, line, line_end) + np.uint64(2))
                at += 1
            if writing and not gone:
                for k in range(line, min(line_end + 1, end)):
                    out[to] = data[k]
                    to += 1
            line = line_end + 1
        if writing and not dropped:
            for k in range(end, following):
                out[to] = data[k]
                to += 1
        i = following
    return at, to, gone_paragraphs, gone_lines


def _build(digest: int) -> Any:
    def text_pieces(data, offsets, paragraphs, lines, least, drop, hashes, out, out_offsets, gone):  # type: ignore[no-untyped-def]
        version = digest  # noqa: F841  part of the name of the cached code
        at, to = 0, 0
        for t in range(len(offsets) - 1):
            begin = to
            at, to, first, second = _walk(
                data, offsets[t], offsets[t + 1], paragraphs, lines, least, drop, at, hashes, out, to
            )
            gone[0] += first
            gone[1] += second
            if first or second:
                while to > begin and out[to - 1] == 10:
                    to -= 1
            out_offsets[t + 1] = to
        return at

    return text_pieces


_kernel = cached(_build, __file__, hashing)


def piece_hashes(texts: Texts, settings: Exact) -> Hashes:
    """Hashes of the paragraphs and lines of texts, as the settings ask, in their order."""
    hashes = np.zeros(2 * (len(texts.data) + len(texts)) // settings.min_characters + 2, dtype=np.uint64)
    none = np.zeros(0, dtype=np.uint8)
    count = _kernel(
        texts.data, texts.offsets, settings.paragraphs, settings.lines, settings.min_characters,
        np.zeros(0, dtype=np.bool_), hashes, none, np.zeros(len(texts) + 1, dtype=np.int64),
        np.zeros(2, dtype=np.int64),
    )  # fmt: skip
    return hashes[:count]


def without_pieces(texts: Texts, settings: Exact, drop: Any) -> tuple[Texts, tuple[int, int]]:
    """The texts without the pieces where `drop`, as long as `piece_hashes`, is true; how many of `KINDS` that were."""
    if not drop.any():
        return texts, (0, 0)
    out, offsets = np.empty(len(texts.data), dtype=np.uint8), np.zeros(len(texts) + 1, dtype=np.int64)
    gone = np.zeros(2, dtype=np.int64)
    _kernel(
        texts.data, texts.offsets, settings.paragraphs, settings.lines, settings.min_characters, drop,
        np.zeros(0, dtype=np.uint64), out, offsets, gone,
    )  # fmt: skip
    return Texts(out[: offsets[-1]], offsets), (int(gone[0]), int(gone[1]))


def repeated_pieces(paths: list[Path]) -> tuple[Hashes, np.ndarray[Any, np.dtype[np.int64]]]:
    """(sorted hashes that come more than once, index of the first of each in all files one after another).

    Args:
        paths: of arrays of hashes. They are read as often as there are buckets of `BUCKET_PIECES`.
    """
    parts = [np.load(path, mmap_mode="r") for path in paths]
    starts = np.cumsum([0, *map(len, parts)])
    buckets = int(starts[-1]) // BUCKET_PIECES + 1
    found: list[Any] = []
    for bucket in range(buckets):
        chosen = [np.flatnonzero(part % np.uint64(buckets) == bucket) for part in parts]
        hashes = np.concatenate(
            [np.zeros(0, dtype=np.uint64), *(part[rows] for part, rows in zip(parts, chosen, strict=True))]
        )
        places = np.concatenate(
            [np.zeros(0, dtype=np.int64), *(rows + start for rows, start in zip(chosen, starts[:-1], strict=True))]
        )
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        same = ordered[1:] == ordered[:-1]
        first = np.zeros(len(ordered), dtype=bool)
        first[:-1] = same
        first[1:] &= ~same
        found.append((ordered[first], places[order[first]]))
    hashes, places = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order = np.argsort(hashes)
    return hashes[order], places[order]


def to_drop(hashes: Hashes, start: int, repeated: Hashes, firsts: Any) -> Any:
    """(pieces,) bool: those that came before; `start` is the index of the first one among all pieces."""
    if not len(repeated):
        return np.zeros(len(hashes), dtype=bool)
    slot = np.minimum(np.searchsorted(repeated, hashes), len(repeated) - 1)
    return (repeated[slot] == hashes) & (firsts[slot] != start + np.arange(len(hashes)))
