"""Text in one form: Unicode normalization, line ends, no control characters, mojibake repaired."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import numpy as np
from numba import njit

from ..engine.cpu.compiled import cached
from . import codepoints
from .codepoints import code_at
from .recipe import Normalize
from .texts import Texts

# All control characters but tab, line feed and form feed; byte-order marks.
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")

_LINES = re.compile(r"[^\n]*\n|[^\n]+")
"""Lines with their line feeds."""
_TYPOGRAPHIC = np.asarray([0x2013, 0x2014, 0x2018, 0x2019, 0x201C, 0x201D, 0x2026], dtype=np.int64)
"""Dashes, quotation marks and the ellipsis of English books: normal in NFC, and no sign of a wrong encoding to ftfy."""


@njit(nogil=True)
def _abnormal(data, start, stop, typographic):  # type: ignore[no-untyped-def]
    """Whether a text has a character that may be changed: a control character, or one that is neither ASCII nor
    typographic."""
    i = start
    while i < stop:
        code, size = code_at(data, i)
        if code < 128:
            if (code < 32 and code != 9 and code != 10 and code != 12) or code == 127:
                return True
        else:
            known = False
            for other in typographic:
                known |= code == other
            if not known:
                return True
        i += size
    return False


def _build(digest: int) -> Any:
    def abnormal_texts(data, offsets, typographic, out):  # type: ignore[no-untyped-def]
        version = digest  # noqa: F841  part of the name of the cached code
        for t in range(len(offsets) - 1):
            out[t] = _abnormal(data, offsets[t], offsets[t + 1], typographic)

    return abnormal_texts


_kernel = cached(_build, __file__, codepoints)


def normalize_all(texts: Texts, settings: Normalize, run: Any) -> Texts:
    """What `run`, a `normalizer` of the same settings, makes of all texts; the same object if nothing changes."""
    out = np.zeros(len(texts), dtype=np.bool_)
    none = np.zeros(0, dtype=np.int64)
    _kernel(texts.data, texts.offsets, none if settings.unicode == "NFKC" else _TYPOGRAPHIC, out)
    changed: dict[int, bytes] = {}
    for index in np.flatnonzero(out).tolist():
        before = texts[index]
        after = run(before)
        if after != before:
            changed[index] = after.encode()
    return texts.replaced(changed)


def normalizer(settings: Normalize) -> Any:
    """A function from a text to its normal form.

    Raises:
        ValueError: `repair` wants ftfy, which is not installed.
    """
    fix = _repair() if settings.repair else None

    def run(text: str) -> str:
        text = text.removeprefix("\ufeff")
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if fix is not None and not text.isascii():
            text = fix(text)
        if settings.control_characters and _CONTROL.search(text):
            text = _CONTROL.sub("", text)
        if settings.unicode != "none" and not unicodedata.is_normalized(settings.unicode, text):
            text = unicodedata.normalize(settings.unicode, text)
        return text

    return run


def _repair() -> Any:
    try:
        import ftfy
    except ImportError:
        raise ValueError("normalize.repair needs ftfy: pip install 'minitron[curate]'") from None
    # Only the encoding is repaired: quotes, ligatures and HTML are text.
    settings = ftfy.TextFixerConfig(
        unescape_html=False, fix_latin_ligatures=False, fix_character_width=False, uncurl_quotes=False,
        fix_line_breaks=False, remove_terminal_escapes=False, remove_control_chars=False, normalization=None,
        fix_surrogates=False, explain=False,
    )  # fmt: skip
    from ftfy.badness import is_bad

    def repaired(line: str) -> str:
        # What ftfy does first with each line, without the objects that it makes for one that needs no repair.
        return line if line.isascii() or not is_bad(line) else ftfy.fix_text(line, settings)

    return lambda text: "".join(map(repaired, _LINES.findall(text)))
