"""What each Unicode code point is, as one table of flags, and UTF-8 bytes as code points inside compiled code.

The flags answer Python's own questions (`str.isspace`, `str.splitlines`, `str.isalpha`, `str.isdecimal`), one of the
`regex` library (`[[:alpha:]]`), and datatrove's lists of punctuation, so that a kernel decides as those libraries do.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import njit

SPACE, LINE_END, ALPHA, ALPHABETIC, DIGIT, PUNCTUATION, TERMINAL = (1 << i for i in range(7))
"""`str.isspace`; where `str.splitlines` cuts; `str.isalpha`; `[[:alpha:]]`; `str.isdecimal`; datatrove's
`PUNCTUATION_SET` and `TERMINAL_PUNCTUATION`."""
CODE_POINTS = 0x110000

_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_PUNCTUATION = (
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\u00ab\u00b4\u00bb\u2013\u2014\u2019\u201c\u201d\u201e\u2026\u2236\u2501\u25ba\u3001"
    "\u3002\u3008\u3009\u300a\u300b\u300c\u300d\u3010\u3011\uff01\uff05\uff08\uff09\uff0c\uff0e\uff11\uff1a\uff1b\uff1f\uff5e"
    + "".join(map(chr, (*range(9), *range(11, 32), *range(127, 160))))
)
# Code points that end a sentence in some script: datatrove 0.10.1, utils/text.py, in hexadecimal.
_TERMINAL = (
    "21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736 "
    "17D4-17D6 17D9-17DA 1803 1809 1944-1945 1AA8-1AAB 1B5A-1B5B 1B5E-1B5F 1B7D-1B7E 1C3B-1C3C 1C7E-1C7F "
    "203C-203D 2047-2049 2E2E 2E3C 2E53-2E54 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 "
    "AA5D-AA5F AAF0-AAF1 ABEB FE52 FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59 10F86-10F89 11047-11048 "
    "110BE-110C1 11141-11143 111C5-111C6 111CD 111DE-111DF 11238-11239 1123B-1123C 112A9 1144B-1144C 115C2-115C3 "
    "115C9-115D7 11641-11642 1173C-1173E 11944 11946 11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 "
    "16A6E-16A6F 16AF5 16B37-16B38 16B44 16E98 1BC9F 1DA88 "
)


def _ranges(text: str) -> list[int]:
    """ "2E 203C-203D" as numbers."""
    found = []
    for part in text.split():
        first, _, last = part.partition("-")
        found += range(int(first, 16), int(last or first, 16) + 1)
    return found


@functools.cache
def flags() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(0x110000,) uint8: the flags of each code point."""
    import regex

    table = np.zeros(CODE_POINTS, dtype=np.uint8)
    everything = [chr(i) for i in range(CODE_POINTS) if not 0xD800 <= i < 0xE000]
    text = "".join(everything)

    def mark(flag: int, characters: Any) -> None:
        table[np.fromiter(map(ord, characters), dtype=np.int64)] |= flag

    mark(SPACE, filter(str.isspace, everything))
    mark(LINE_END, _LINE_ENDS)
    mark(ALPHA, filter(str.isalpha, everything))
    mark(ALPHABETIC, regex.findall("[[:alpha:]]", text))
    mark(DIGIT, filter(str.isdecimal, everything))
    mark(PUNCTUATION, _PUNCTUATION)
    terminal = _ranges(_TERMINAL)
    mark(TERMINAL | PUNCTUATION, map(chr, terminal))
    return table


@functools.cache
def folded() -> np.ndarray[Any, np.dtype[np.uint32]]:
    """(0x110000,) uint32: each letter or digit (`str.isalnum`) in small letters; 0 for what separates words, and 1 for
    apostrophes, which are dropped from them.

    A letter whose small form has several code points stands for the first of them.
    """
    table = np.zeros(CODE_POINTS, dtype=np.uint32)
    for code in range(CODE_POINTS):
        character = chr(code)
        if character.isalnum():
            table[code] = ord(character.lower()[0])
    for apostrophe in "'\u2019\u02bc":
        table[ord(apostrophe)] = 1
    return table


@njit(nogil=True)
def code_at(data, i):  # type: ignore[no-untyped-def]
    """(code point, its bytes) at `i`, which must be the first byte of a character of UTF-8."""
    first = data[i]
    if first < 0x80:
        return np.int64(first), 1
    if first < 0xE0:
        return (np.int64(first & 0x1F) << 6) | np.int64(data[i + 1] & 0x3F), 2
    if first < 0xF0:
        return (
            (np.int64(first & 0x0F) << 12) | (np.int64(data[i + 1] & 0x3F) << 6) | np.int64(data[i + 2] & 0x3F),
            3,
        )
    return (
        (np.int64(first & 0x07) << 18)
        | (np.int64(data[i + 1] & 0x3F) << 12)
        | (np.int64(data[i + 2] & 0x3F) << 6)
        | np.int64(data[i + 3] & 0x3F),
        4,
    )


@njit(nogil=True)
def code_before(data, start, i):  # type: ignore[no-untyped-def]
    """(code point, its bytes) that ends before `i`; `start` is where the text begins."""
    first = i - 1
    while first > start and (data[first] & 0xC0) == 0x80:
        first -= 1
    code, size = code_at(data, first)
    return code, size


@njit(nogil=True)
def stripped(data, start, stop, flags):  # type: ignore[no-untyped-def]
    """(first, last + 1) of a span without the white space at its ends, as `str.strip`."""
    while start < stop:
        code, size = code_at(data, start)
        if not flags[code] & 1:
            break
        start += size
    while stop > start:
        code, size = code_before(data, start, stop)
        if not flags[code] & 1:
            break
        stop -= size
    return start, stop
