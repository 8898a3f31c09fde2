"""Refuse text with lone surrogates, which are not characters.

Python represents bytes of the command line and of standard input that are not UTF-8 as lone surrogates (PEP 383), and
JSON and YAML can contain them. Tokenizers do not accept them.
"""

from __future__ import annotations


def first_surrogate(text: str) -> int | None:
    """Index of the first lone surrogate of a text; None if it has none."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def require_characters(text: str, what: str) -> str:
    """The text as it is.

    Raises:
        ValueError: the text has a lone surrogate; the message calls the text `what`.
    """
    place = first_surrogate(text)
    if place is None:
        return text
    code = ord(text[place])
    found = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"lone surrogate \\u{code:04x}"
    raise ValueError(f"{what} is not UTF-8 text: the {found} at character {place + 1} stands for no character")
