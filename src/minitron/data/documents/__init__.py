"""Texts on disk, one document after another: plain text, JSON, Parquet, Arrow, compressed or not, and folders of them.

This is the only reader of text that a model is trained, calibrated or measured on, so that the same text gives the same
tokens whatever file holds it:

- A byte-order mark at the head of a file decides its encoding (UTF-8, UTF-16, UTF-32); without one it is UTF-8, or what
  `encoding` says. U+FEFF at the head of a document is not part of it.
- Line ends `\\r\\n` and `\\r` become `\\n` in every document. No other character is changed: form feeds, U+2028 and the
  like are text.
- A document is refused if it holds NUL, a lone surrogate, or bytes that are invalid in its encoding, and so is a row
  without a string in the named field. One with nothing but white space is skipped.

Everything is read in pieces, so that files may be larger than memory, in an order that depends on their names alone.
"""

from .problems import BadTextError, DataError, Problem, Problems
from .reading import read_all, read_documents, read_rows, read_texts
from .sources import Listing, Source

__all__ = [
    "BadTextError",
    "DataError",
    "Listing",
    "Problem",
    "Problems",
    "Source",
    "read_all",
    "read_documents",
    "read_rows",
    "read_texts",
]
