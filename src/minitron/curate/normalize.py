"""Text in one form: Unicode normalization, line ends, no control characters, mojibake repaired."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from .recipe import Normalize

# All control characters but tab, line feed and form feed; byte-order marks.
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")


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
    return lambda text: ftfy.fix_text(text, settings)
