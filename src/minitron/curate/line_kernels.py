"""Lines of a text: C4's line filter (Raffel et al. 2020, arXiv:1910.10683) and FineWeb's counts (arXiv:2406.17557).

What is decided, and in which order, follows datatrove 0.10.1 (`C4QualityFilter`, `FineWebQualityFilter`). Sentences are
counted by a rule of our own, see `_sentences`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import njit

from ..engine.cpu.compiled import cached
from . import codepoints, hashing
from .codepoints import code_at, stripped
from .hashing import emptied, slot_of, slots_for, span_hash
from .texts import Texts

FINEWEB_COLUMNS = (
    *("rows", "rows_with_end_mark", "short_rows", "duplicate_characters", "characters", "line_feeds", "words"),
)
"""`rows` are lines, ended by line feeds, that hold more than white space; `characters` are those but line feeds."""
F = SimpleNamespace(**{name: index for index, name in enumerate(FINEWEB_COLUMNS)})
REMOVALS = (None, "lorem ipsum", "curly bracket", "few sentences")
"""Reasons for which C4's rules remove a document."""
C4_LINES = ("long word", "no end mark", "few words", "javascript", "policy")
"""Reasons for which they remove a line."""
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")

_SPACE, _LINE_END, _DIGIT, _TERMINAL = 1, 2, 16, 64
_DOT, _QUESTION, _EXCLAMATION, _QUOTE, _APOSTROPHE, _ELLIPSIS = 46, 63, 33, 34, 39, 0x2026
_KELVIN = 0x212A


def _folded(texts: tuple[str, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Texts of small letters as rows of a table, ended by zeros."""
    table = np.zeros((len(texts), max(map(len, texts)) + 1), dtype=np.uint8)
    for row, text in zip(table, texts, strict=True):
        row[: len(text)] = np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    return table


_PHRASES = _folded(("lorem ipsum", "javascript", *POLICIES))
_SHORTEST_PHRASE = 10
_FOLLOWING = np.zeros(32, dtype=np.int64)
"""The second and third letter of the phrases that begin with a letter, by that letter; they are the same for all."""
for _row in _PHRASES:
    _FOLLOWING[_row[0] & 31] = int(_row[1]) << 8 | int(_row[2])
_CITATIONS = _folded(("[edit]", "[citation needed]"))


@njit(nogil=True)
def _small(data, i):  # type: ignore[no-untyped-def]
    """(byte of the small letter, bytes) at `i`, for comparison with ASCII."""
    byte = data[i]
    if 65 <= byte <= 90:
        return byte + 32, 1
    if byte == 0xE2 and data[i + 1] == 0x84 and data[i + 2] == 0xAA:
        return np.uint8(107), 3  # the Kelvin sign, the only other character whose small form is an ASCII letter
    return byte, 1


@njit(nogil=True)
def _begins(data, i, stop, phrase, fold):  # type: ignore[no-untyped-def]
    """Bytes at `i` that spell a phrase; 0 if they do not."""
    at = i
    for expected in phrase:
        if expected == 0:
            return at - i
        if at >= stop:
            return 0
        if fold:
            byte, size = _small(data, at)
        else:
            byte, size = data[at], 1
        if byte != expected:
            return 0
        at += size
    return at - i


@njit(nogil=True)
def _phrases_in(data, start, stop, phrases, following):  # type: ignore[no-untyped-def]
    """Bits of the phrases in a span, in capitals or small letters; none has a k, whose sign for kelvin has three bytes,
    among its first three letters."""
    found = 0
    for i in range(start, stop - _SHORTEST_PHRASE + 1):
        # One comparison for most places: of the two bytes that follow with those that would have to.
        expected = following[data[i] & 31]
        if expected == 0 or (np.int64(data[i + 1] | 0x20) << 8 | np.int64(data[i + 2] | 0x20)) != expected:
            continue
        for k in range(len(phrases)):
            if _begins(data, i, stop, phrases[k], True):
                found |= 1 << k
    return found


@njit(nogil=True)
def _citation(data, i, stop, flags, citations):  # type: ignore[no-untyped-def]
    """Bytes of a citation mark (`[12]`, `[]`, `[edit]`, `[citation needed]`) at `i`; 0 if there is none."""
    at = i + 1
    while at < stop:
        code, size = code_at(data, at)
        if code == 93:
            return at + 1 - i
        if not flags[code] & _DIGIT:
            break
        at += size
    for k in range(len(citations)):
        size = _begins(data, i, stop, citations[k], False)
        if size:
            return size
    return 0


@njit(nogil=True)
def _sentences(data, start, stop, flags):  # type: ignore[no-untyped-def]
    """Sentences of a line that is not empty: one more than there are runs of . ? ! or an ellipsis, with quotes and
    brackets that close behind them, before white space that is followed by something."""
    count, ended = 1, False
    i = start
    while i < stop:
        if not ended:  # only a mark matters, of which the ellipsis begins with 0xE2
            byte = data[i]
            if byte not in (_DOT, _QUESTION, _EXCLAMATION, 0xE2):
                i += 1
                continue
        code, size = code_at(data, i)
        if code in (_DOT, _QUESTION, _EXCLAMATION, _ELLIPSIS):
            ended = True
        elif code in (_QUOTE, _APOSTROPHE, 41, 93, 0x2019, 0x201D):
            pass
        elif flags[code] & _SPACE:
            if ended:
                first, last = stripped(data, i, stop, flags)
                count += last > first
            ended = False
        else:
            ended = False
        i += size
    return count


@njit(nogil=True)
def _line(data, start, stop, flags):  # type: ignore[no-untyped-def]
    """(end, begin of the next, words, characters of the longest, marks) of a line; marks: 1 if it holds [, 2 for {."""
    words, length, longest, marks = 0, 0, 0, 0
    i = start
    next_line = stop
    while i < stop:
        code, size = code_at(data, i)
        flag = flags[code]
        if flag & _SPACE:
            if flag & _LINE_END:
                next_line = i + size
                if code == 13 and next_line < stop and data[next_line] == 10:
                    next_line += 1
                break
            longest = max(longest, length)
            length = 0
        else:
            words += length == 0
            length += 1
            marks |= (code == 91) | (code == 123) << 1
        i += size
    return i, next_line, words, max(longest, length), marks


@njit(nogil=True)
def _ends_well(out, start, stop):  # type: ignore[no-untyped-def]
    """Whether a line ends with . ? ! " or ', and not with three dots."""
    if stop == start:
        return False
    last = out[stop - 1]
    if last not in (_DOT, _QUESTION, _EXCLAMATION, _QUOTE, _APOSTROPHE):
        return False
    return not (last == _DOT and stop - start >= 3 and out[stop - 2] == _DOT and out[stop - 3] == _DOT)


@njit(nogil=True)
def _c4_text(data, start, stop, flags, phrases, following, citations, limits, out, begin, lines):  # type: ignore[no-untyped-def]
    """Write the lines that stay behind `begin`; returns (reason to remove the text or 0, end of what was written)."""
    least_sentences, least_words, longest_word, end_marks, cite = limits
    at, sentences, i = begin, 0, start
    while i < stop:
        end, next_line, words, longest, marks = _line(data, i, stop, flags)
        first, last = stripped(data, i, end, flags)
        i = next_line
        if longest_word >= 0 and longest > longest_word:
            lines[0] += 1
            continue
        line = at
        if cite and marks & 1:
            k = first
            while k < last:
                size = _citation(data, k, last, flags, citations) if data[k] == 91 else 0
                if size:
                    k += size
                else:
                    out[at] = data[k]
                    at += 1
                    k += 1
        else:
            for k in range(last - first):
                out[at + k] = data[first + k]
            at += last - first
        if end_marks and not _ends_well(out, line, at):
            lines[1] += 1
            at = line
            continue
        if words < least_words:
            lines[2] += 1
            at = line
            continue
        found = _phrases_in(out, line, at, phrases, following)
        if found & 1:
            return 1, at
        if found & 2:
            lines[3] += 1
            at = line
            continue
        if marks & 2:
            return 2, at
        if found > 3:
            lines[4] += 1
            at = line
            continue
        sentences += _sentences(out, line, at, flags)
        out[at] = 10
        at += 1
    return (3 if sentences < least_sentences else 0), at


@njit(nogil=True)
def _c4(data, offsets, flags, phrases, following, citations, limits, out, out_offsets, reasons, lines):  # type: ignore[no-untyped-def]
    at = 0
    for t in range(len(offsets) - 1):
        begin = at
        reasons[t], end = _c4_text(
            data, offsets[t], offsets[t + 1], flags, phrases, following, citations, limits, out, begin, lines
        )
        if reasons[t] == 0:
            first, last = stripped(out, begin, end, flags)
            if first > begin:
                for k in range(first, last):
                    out[begin + k - first] = out[k]
            at = begin + last - first
        else:
            for k in range(offsets[t], offsets[t + 1]):  # as it was, for the report
                out[begin + k - offsets[t]] = data[k]
            at = begin + offsets[t + 1] - offsets[t]
        out_offsets[t + 1] = at


@njit(nogil=True)
def _fineweb(data, offsets, flags, short, out):  # type: ignore[no-untyped-def]
    keys = np.empty(0, dtype=np.uint64)
    for t in range(len(offsets) - 1):
        start, stop, row = offsets[t], offsets[t + 1], out[t]
        pieces = 1
        for i in range(start, stop):
            pieces += data[i] == 10
        if slots_for(pieces) > len(keys):
            keys = np.empty(slots_for(pieces), dtype=np.uint64)
        mask = emptied(keys, pieces)
        row[5] = pieces - 1
        i = start
        while i <= stop:
            end, length, last_flag, blank, in_word = i, 0, np.uint8(0), True, False
            while end < stop and data[end] != 10:
                code, size = code_at(data, end)
                last_flag = flags[code]
                space = last_flag & _SPACE != 0
                blank &= space
                row[6] += not space and not in_word
                in_word = not space
                length += 1
                end += size
            row[4] += length
            if not blank:
                row[0] += 1
                row[1] += last_flag & _TERMINAL != 0
                row[2] += length <= short
                key = span_hash(data, i, end) | np.uint64(1)
                slot = slot_of(keys, mask, key)
                if keys[slot] == key:
                    row[3] += length
                keys[slot] = key
            i = end + 1


def _build_c4(digest: int) -> Any:
    def c4_lines(data, offsets, flags, phrases, following, citations, limits, out, out_offsets, reasons, lines):  # type: ignore[no-untyped-def]
        version = digest  # noqa: F841  part of the name of the cached code
        _c4(data, offsets, flags, phrases, following, citations, limits, out, out_offsets, reasons, lines)

    return c4_lines


def _build_fineweb(digest: int) -> Any:
    def fineweb_counts(data, offsets, flags, short, out):  # type: ignore[no-untyped-def]
        version = digest  # noqa: F841  part of the name of the cached code
        _fineweb(data, offsets, flags, short, out)

    return fineweb_counts


_c4_kernel = cached(_build_c4, __file__, codepoints, hashing)
_fineweb_kernel = cached(_build_fineweb, __file__, codepoints, hashing)


def c4_lines(
    texts: Texts, min_sentences: int = 5, min_words: int = 3, max_word: int = 1000, end_marks: bool = True
) -> tuple[Texts, np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Drop lines by C4's rules, and say which texts they remove.

    Args:
        texts: as they are after Gopher's rules.
        min_sentences: of the lines that stay.
        min_words: of a line.
        max_word: characters of the longest word of a line; -1 for no limit.
        end_marks: whether a line must end with . ? ! " or '.

    Returns:
        The texts, those that are removed as they were; (texts,) indices into `REMOVALS`, 0 for those that stay;
        how many lines each of `C4_LINES` dropped.
    """
    # A line without an end mark may come out one byte longer than it was.
    out = np.empty(len(texts.data) + len(texts) + 1, dtype=np.uint8)
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    reasons = np.zeros(len(texts), dtype=np.int64)
    lines = np.zeros(len(C4_LINES), dtype=np.int64)
    limits = (min_sentences, min_words, max_word, int(end_marks), 1)
    _c4_kernel(
        texts.data, texts.offsets, codepoints.flags(), _PHRASES, _FOLLOWING, _CITATIONS, limits, out, offsets, reasons,
        lines,
    )  # fmt: skip
    return Texts(out[: offsets[-1]], offsets), reasons, lines


def fineweb_counts(texts: Texts, short: int = 30) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(texts, FINEWEB_COLUMNS) int64; rows of at most `short` characters count as short."""
    out = np.zeros((len(texts), len(FINEWEB_COLUMNS)), dtype=np.int64)
    _fineweb_kernel(texts.data, texts.offsets, codepoints.flags(), short, out)
    return out
