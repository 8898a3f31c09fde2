"""Counts behind the rules of Gopher (Rae et al. 2021, arXiv:2112.11446, table A1 and section A.1.1), in one pass.

What is counted, and in which order ties are decided, follows datatrove 0.10.1 (`GopherQualityFilter`,
`GopherRepetitionFilter`), except that a word is what white space separates (`str.split`), not what spaCy says.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import njit

from ..engine.cpu.compiled import cached
from . import codepoints, hashing
from .codepoints import code_at, stripped
from .hashing import emptied, load64, mixed, slot_of, slots_for, span_hash
from .texts import Texts

COLUMNS = (
    *("characters", "words", "real_words", "real_word_characters", "alpha_words", "stop_words"),
    *("hashes", "ellipses", "lines", "bullet_lines", "ellipsis_lines"),
    *("paragraphs", "duplicate_paragraphs", "duplicate_paragraph_characters"),
    *("rows", "duplicate_rows", "duplicate_row_characters"),
    *("top_2", "top_3", "top_4", "top_2_grams", "top_3_grams", "top_4_grams"),
    *("duplicate_5", "duplicate_6", "duplicate_7", "duplicate_8", "duplicate_9", "duplicate_10"),
)
"""Of the counts. `real_words` have a character that is no punctuation; `lines` end at any of Python's line ends, `rows`
at runs of line feeds, `paragraphs` at runs of two or more; `top_N` are the characters of all occurrences of the most
frequent N-gram, `top_N_grams` how many N-grams there are, `duplicate_N` the characters of repeated N-grams."""
C = SimpleNamespace(**{name: index for index, name in enumerate(COLUMNS)})
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")

_CHARACTERS, _WORDS, _REAL, _REAL_CHARACTERS, _ALPHA, _STOP = range(6)
_HASHES, _ELLIPSES, _LINES, _BULLETS, _ELLIPSIS_LINES = range(6, 11)
_PARAGRAPHS, _ROWS, _TOP, _TOP_GRAMS, _DUPLICATE = 11, 14, 17, 20, 23
_TOP_SIZES, _DUPLICATE_SIZES = (2, 3, 4), (5, 6, 7, 8, 9, 10)
_SPACE, _LINE_END, _ALPHA_FLAG, _PUNCTUATION = 1, 2, 4, 32
_MULTIPLIER = np.uint64(0x9FB21C651E98DF25)
_DOT, _HASH, _DASH, _BULLET, _ELLIPSIS = 46, 35, 45, 0x2022, 0x2026


@njit(nogil=True)
def _close_line(data, first, end, row):  # type: ignore[no-untyped-def]
    """Count a line whose first character that is no white space is `first`, and whose last ends before `end`."""
    row[_LINES] += 1
    if first < 0:
        return
    if first in (_BULLET, _DASH):
        row[_BULLETS] += 1
    # Three bytes reach back across the line's begin only if a line end is among them, which is no dot.
    if end >= 3:
        a, b, c = data[end - 3], data[end - 2], data[end - 1]
        if (a == _DOT and b == _DOT and c == _DOT) or (a == 0xE2 and b == 0x80 and c == 0xA6):
            row[_ELLIPSIS_LINES] += 1


@njit(nogil=True)
def _scan(data, start, stop, flags, packed, ends, characters, hashes, stops, longest_stop, row):  # type: ignore[no-untyped-def]
    """Words and lines of a text; returns the number of words.

    packed: gets the text without white space; ends, characters: (words + 1,) where each word of it begins, in bytes
    and in characters; hashes: (words,) of each word; stops: hashes of the stop words, of which none has more bytes than
    `longest_stop`.
    """
    words, at, total, spaces, found_stops = 0, 0, 0, 0, 0
    line_first, line_open, line_end, dots_until = np.int64(-1), False, start, start
    i = start
    while i < stop:
        code, size = code_at(data, i)
        flag = flags[code]
        if flag & _SPACE:
            spaces += 1
            if not flag & _LINE_END:
                line_open = True
            elif not (code == 10 and i > start and data[i - 1] == 13):
                _close_line(data, line_first, line_end, row)
                line_open, line_first = False, np.int64(-1)
            i += size
            continue
        if line_first < 0:
            line_first, line_open = code, True
        ends[words], characters[words] = at, total
        flags_or, flags_and, h = np.uint8(0), np.uint8(255), np.uint64(0)
        while True:
            flags_or |= flag
            flags_and &= flag
            packed[at] = data[i]
            at += 1
            h = (h + np.uint64(code)) * _MULTIPLIER
            for k in range(i + 1, i + size):
                packed[at] = data[k]
                at += 1
            total += 1
            if flag & _PUNCTUATION:
                if code == _DOT:
                    if i >= dots_until and i + 2 < stop and data[i + 1] == _DOT and data[i + 2] == _DOT:
                        row[_ELLIPSES] += 1
                        dots_until = i + 3
                elif code == _HASH:
                    row[_HASHES] += 1
                elif code == _ELLIPSIS:
                    row[_ELLIPSES] += 1
            i += size
            if i >= stop:
                break
            code, size = code_at(data, i)
            flag = flags[code]
            if flag & _SPACE:
                break
        hashes[words] = mixed(h)
        row[_ALPHA] += flags_or & _ALPHA_FLAG != 0
        if not flags_and & _PUNCTUATION:
            row[_REAL] += 1
            row[_REAL_CHARACTERS] += total - characters[words]
        if at - ends[words] <= longest_stop:
            for k in range(len(stops)):
                if stops[k] == hashes[words]:
                    found_stops |= 1 << k
        words += 1
        line_end = i
    ends[words], characters[words] = at, total
    if line_open:
        _close_line(data, line_first, line_end, row)
    while found_stops:
        row[_STOP] += found_stops & 1
        found_stops >>= 1
    row[_CHARACTERS], row[_WORDS] = total + spaces, words
    return words


@njit(nogil=True)
def characters_of(data, start, stop):  # type: ignore[no-untyped-def]
    """How many characters a span of UTF-8 has."""
    count = 0
    for i in range(start, stop):
        count += (data[i] & 0xC0) != 0x80
    return count


@njit(nogil=True)
def duplicate_pieces(data, start, stop, least, keys, mask, out):  # type: ignore[no-untyped-def]
    """Pieces of a span between runs of at least `least` line feeds: out[0] how many, out[1] of them repeated, out[2]
    characters of those."""
    begin = i = start
    while True:
        while i < stop and data[i] != 10:
            i += 1
        run = i
        while run < stop and data[run] == 10:
            run += 1
        if i == stop or run - i >= least:
            key = span_hash(data, begin, i) | np.uint64(1)
            slot = slot_of(keys, mask, key)
            out[0] += 1
            if keys[slot] == key:
                out[1] += 1
                out[2] += characters_of(data, begin, i)
            keys[slot] = key
            if i == stop:
                return
            begin = run
        i = run


@njit(nogil=True)
def _top_characters(n, words, hashes, characters, repeats, keys, counts, firsts, slots):  # type: ignore[no-untyped-def]
    """Characters of all occurrences of the most frequent n-gram; of several, the one that came first.

    repeats: (words,) whether the (n - 1)-gram at a word is repeated; an n-gram that is repeated begins with two such.
    Gets the same of the n-grams.
    """
    mask = emptied(keys, words)
    best, best_first = 1, 0
    for i in range(words - n + 1):
        slots[i] = -1
        if not (repeats[i] and repeats[i + 1]):
            continue
        key = hashes[i]
        for k in range(1, n):
            key = key * _MULTIPLIER + hashes[i + k]
        key |= np.uint64(1)
        slot = slot_of(keys, mask, key)
        if keys[slot] == 0:
            keys[slot], counts[slot], firsts[slot] = key, 0, i
        slots[i] = slot
        counts[slot] += 1
        if counts[slot] > best or (counts[slot] == best and firsts[slot] < best_first):
            best, best_first = counts[slot], firsts[slot]
    for i in range(words - n + 1):
        repeats[i] = slots[i] >= 0 and counts[slots[i]] > 1
    return best * (characters[best_first + n] - characters[best_first] + n - 1)


@njit(nogil=True)
def _repeated_starts(words, packed, ends, keys, counts, starts):  # type: ignore[no-untyped-def]
    """Words where a repeated n-gram may begin go into `starts`; returns how many.

    Equal n-grams of five or more words begin with the same bytes, as many as the shortest 5-gram has (of which up to
    eight are looked at). Few words share them with another one, so that all others need not be looked at again.
    """
    size = np.int64(8)
    for i in range(words - 4):
        size = min(size, ends[i + 5] - ends[i])
    keep = np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - 8 * size)
    mask = emptied(keys, words)
    for i in range(words - 4):
        key = (load64(packed, ends[i]) & keep) + np.uint64(1)
        slot = slot_of(keys, mask, key)
        counts[slot] = 2 if keys[slot] == key else 1
        keys[slot] = key
        starts[i] = slot
    found = 0
    for i in range(words - 4):
        if counts[starts[i]] == 2:
            starts[found] = i
            found += 1
    return found


@njit(nogil=True)
def _duplicate_characters(n, words, starts, found, packed, ends, characters, keys):  # type: ignore[no-untyped-def]
    """Characters of n-grams, without spaces, that came before; after one, the next n words are skipped."""
    mask = emptied(keys, found)
    repeated = following = 0
    for k in range(found):
        i = starts[k]
        if i < following or i > words - n:
            continue
        key = span_hash(packed, ends[i], ends[i + n]) | np.uint64(1)
        slot = slot_of(keys, mask, key)
        if keys[slot] == key:
            repeated += characters[i + n] - characters[i]
            following = i + n
        else:
            keys[slot] = key
    return repeated


@njit(nogil=True)
def _measure(data, offsets, flags, stops, longest_stop, out):  # type: ignore[no-untyped-def]
    room = 0
    packed, repeats = np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.bool_)
    hashes = keys = np.empty(0, dtype=np.uint64)
    ends = characters = starts = counts = firsts = np.empty(0, dtype=np.int64)
    for t in range(len(offsets) - 1):
        start, stop, row = offsets[t], offsets[t + 1], out[t]
        if stop - start + 2 > room:
            room = 2 * (stop - start) + 2
            most = room // 2 + 2  # words, or lines
            packed, repeats = np.empty(room + 8, dtype=np.uint8), np.empty(most, dtype=np.bool_)
            hashes, starts = np.empty(most, dtype=np.uint64), np.empty(most, dtype=np.int64)
            ends, characters = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64)
            slots = slots_for(most)
            keys, counts = np.empty(slots, dtype=np.uint64), np.empty(slots, dtype=np.int64)
            firsts = np.empty(slots, dtype=np.int64)
        words = _scan(data, start, stop, flags, packed, ends, characters, hashes, stops, longest_stop, row)
        pieces = 1
        for i in range(start, stop):
            pieces += data[i] == 10
        pieces = min(pieces, (stop - start) // 2 + 2)
        first, last = stripped(data, start, stop, flags)
        duplicate_pieces(data, first, last, 2, keys, emptied(keys, pieces), row[_PARAGRAPHS : _PARAGRAPHS + 3])
        duplicate_pieces(data, start, stop, 1, keys, emptied(keys, pieces), row[_ROWS : _ROWS + 3])
        repeats[:words] = True
        for index, n in enumerate(_TOP_SIZES):
            row[_TOP_GRAMS + index] = max(0, words - n + 1)
            if words >= n:
                row[_TOP + index] = _top_characters(n, words, hashes, characters, repeats, keys, counts, firsts, starts)
        found = _repeated_starts(words, packed, ends, keys, counts, starts)
        if found:
            for index, n in enumerate(_DUPLICATE_SIZES):
                row[_DUPLICATE + index] = _duplicate_characters(n, words, starts, found, packed, ends, characters, keys)


def _build(digest: int) -> Any:
    def gopher_counts(data, offsets, flags, stops, longest_stop, out):  # type: ignore[no-untyped-def]
        version = digest  # noqa: F841  part of the name of the cached code
        _measure(data, offsets, flags, stops, longest_stop, out)

    return gopher_counts


_kernel = cached(_build, __file__, codepoints, hashing)


def _word_hash(word: str) -> int:
    """As `_scan` computes it."""
    h = 0
    for character in word:
        h = (h + ord(character)) * int(_MULTIPLIER) % 2**64
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h = (h ^ h >> 33) * multiplier % 2**64
    return h ^ h >> 33


def measure(texts: Texts, stop_words: tuple[str, ...] = STOP_WORDS) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(texts, COLUMNS) int64: the counts of each text."""
    out = np.zeros((len(texts), len(COLUMNS)), dtype=np.int64)
    stops = np.asarray([_word_hash(word) for word in stop_words], dtype=np.uint64)
    longest = max((len(word.encode()) for word in stop_words), default=0)
    _kernel(texts.data, texts.offsets, codepoints.flags(), stops, longest, out)
    return out
