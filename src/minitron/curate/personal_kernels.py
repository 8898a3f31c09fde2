"""Which texts may hold personal data, by the shapes of their bytes: one fast pass before any pattern is tried.

A shape is a condition that every match of a pattern in `personal` meets, whatever stands around the match. So a text
without the shape has no match, and a text with it may have none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ..engine.cpu.compiled import cached
from .texts import Texts

KEY, AT, DOTTED, COLONS, DIGITS, PLUS, THREE_FOUR = (1 << i for i in range(7))
"""The beginning of a key; an @; three dots between digits, with at most three digits between two dots; two colons with
at most four hexadecimal digits between them; 13 digits with at most one blank or dash between two; a plus before a
digit; three digits, a dash or dot, four digits."""
_PREFIXES = (
    *("-----BEGIN ", "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "npm_", "hf_"),
    *("sk-", "sk_live_", "xox", "AIza", "eyJ"),
)
_CARD_DIGITS = 13
_PLAIN, _DIGIT, _HEX, _SPECIAL = 0, 1, 2, 4


def _classes() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(256,) uint8: what each byte may be part of; 0 for bytes that need no look."""
    table = np.zeros(256, dtype=np.uint8)
    table[list(b"0123456789")] |= _DIGIT | _HEX
    table[list(b"abcdefABCDEF")] |= _HEX
    table[list(b"@.:+- ")] |= _SPECIAL
    table[[prefix.encode()[0] for prefix in _PREFIXES]] |= 8
    return table


def _prefix_table() -> np.ndarray[Any, np.dtype[np.uint8]]:
    table = np.zeros((len(_PREFIXES), max(map(len, _PREFIXES)) + 1), dtype=np.uint8)
    for row, prefix in zip(table, _PREFIXES, strict=True):
        row[: len(prefix)] = np.frombuffer(prefix.encode(), dtype=np.uint8)
    return table


@njit(nogil=True)
def _starts_key(data, i, stop, prefixes):  # type: ignore[no-untyped-def]
    for k in range(len(prefixes)):
        if data[i] != prefixes[k, 0]:
            continue
        at = 1
        while prefixes[k, at] and i + at < stop and data[i + at] == prefixes[k, at]:
            at += 1
        if prefixes[k, at] == 0:
            return True
    return False


@njit(nogil=True)
def _digit(data, i, start, stop):  # type: ignore[no-untyped-def]
    return start <= i < stop and 48 <= data[i] <= 57


@njit(nogil=True)
def _three_four(data, i, start, stop):  # type: ignore[no-untyped-def]
    """Whether three digits stand before `i` and four behind it."""
    for k in range(1, 5):
        if not _digit(data, i + k, start, stop) or (k < 4 and not _digit(data, i - k, start, stop)):
            return False
    return True


@njit(nogil=True)
def _shapes_of(data, start, stop, classes, prefixes):  # type: ignore[no-untyped-def]
    found = 0
    dots, dot_at = 0, start - 9  # dots between digits, and where the last one is
    colon_at = start - 9
    digits, digit_at = 0, start - 9  # of a card number, and where the last one is
    for i in range(start, stop):
        kind = classes[data[i]]
        if kind == 0 or kind == 2:
            continue
        byte = data[i]
        if kind & 1:
            near = digit_at == i - 1 or (digit_at == i - 2 and (data[i - 1] == 32 or data[i - 1] == 45))
            digits = digits + 1 if near else 1
            digit_at = i
            if digits >= 13:
                found |= 16
            continue
        if kind & 8 and not found & 1 and _starts_key(data, i, stop, prefixes):
            found |= 1
        if not kind & 4:
            continue
        if byte == 64:
            found |= 2
        elif byte == 46:
            if _digit(data, i - 1, start, stop) and _digit(data, i + 1, start, stop):
                chained = 2 <= i - dot_at <= 4
                for k in range(dot_at + 1, i):
                    if not chained:
                        break
                    chained = _digit(data, k, start, stop)
                dots = dots + 1 if chained else 1
                dot_at = i
                if dots >= 3:
                    found |= 4
            if _three_four(data, i, start, stop):
                found |= 64
        elif byte == 58:
            if i - colon_at <= 5:
                hexadecimal = True
                for k in range(colon_at + 1, i):
                    hexadecimal &= classes[data[k]] & 2 != 0
                if hexadecimal:
                    found |= 8
            colon_at = i
        elif byte == 43:
            if _digit(data, i + 1, start, stop):
                found |= 32
        elif byte == 45 and _three_four(data, i, start, stop):
            found |= 64
    return found


def _build(digest: int) -> Any:
    def personal_shapes(data, offsets, classes, prefixes, out):  # type: ignore[no-untyped-def]
        version = digest  # noqa: F841  part of the name of the cached code
        for t in range(len(offsets) - 1):
            out[t] = _shapes_of(data, offsets[t], offsets[t + 1], classes, prefixes)

    return personal_shapes


_kernel = cached(_build, __file__)


def shapes(texts: Texts) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(texts,) uint8: the shapes in each text."""
    out = np.zeros(len(texts), dtype=np.uint8)
    _kernel(texts.data, texts.offsets, _classes(), _prefix_table(), out)
    return out
