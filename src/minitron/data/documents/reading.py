"""The documents, or the rows, of files, one after another, checked."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...characters import first_surrogate
from .archives import archive_records
from .conll import tagged_sentences
from .formats import ROWS_KNOWN, first_line, kind_of, row_kind_of
from .problems import Bad, BadFileError, DataError, Problem, Problems
from .rows import Found, csv_rows, json_file, json_lines, whole_file
from .sources import Source
from .tables import column_values

READERS = {
    "whole": whole_file,
    "lines": json_lines,
    "json": json_file,
    "archive": archive_records,
    "parquet": column_values,
    "arrow": column_values,
}
"""What reads each kind of file: a function of the path, the field and the encoding, to (place, text or why not)."""
_ROW_READERS = {
    "lines": json_lines,
    "json": json_file,
    "conll": tagged_sentences,
    "parquet": column_values,
    "arrow": column_values,
}


def read_documents(path: Path, field: str = "text", encoding: str = "utf-8") -> Iterator[str]:
    """The documents of a file: each row's `field` where it has rows, the whole file otherwise. Empty ones are skipped.

    Raises:
        DataError: a document that cannot be used, or a damaged file.
    """
    for document in _scan(path, field, encoding):
        if isinstance(document, Problem):
            raise DataError(str(document))
        if document.strip():
            yield document


def read_all(files: Iterable[Path], field: str, encoding: str, problems: Problems) -> Iterator[str]:
    """The usable documents of files; those that are not go to `problems`."""
    for path in files:
        for document in _scan(path, field, encoding):
            if isinstance(document, Problem):
                if not problems.add(document):
                    break
            elif document.strip():
                yield document
            else:
                problems.empty += 1
        if problems.full:
            return


def read_texts(sources: Sequence[Source]) -> tuple[list[str], list[str]]:
    """All documents of sources, and sentences about what was skipped.

    Raises:
        FileNotFoundError: a source has no file.
        BadTextError: documents that cannot be used, those of all sources in one message.
    """
    listings = [source.listing() for source in sources]
    refused = Problems()
    texts: list[str] = []
    notes: list[str] = []
    for source, listing in zip(sources, listings, strict=True):
        problems = Problems(source.skip_bad, refused=refused.count)
        texts += read_all(listing.files, source.field, source.encoding, problems)
        refused.merge(problems)
        notes += [*listing.notes, *problems.notes()]
    refused.raise_any()
    return texts, notes


def _scan(path: Path, field: str, encoding: str) -> Iterator[str | Problem]:
    """Every document of a file, or what is wrong with it; damage ends the file with a problem."""
    for found in _explained(path, READERS[kind_of(path) or "whole"](path, field, encoding)):
        if isinstance(found, Problem):
            yield found
            continue
        place, value = found
        document = value if isinstance(value, Bad) else _normal(value)
        yield Problem(path, place, document.what) if isinstance(document, Bad) else document


def read_rows(
    path: Path, encoding: str = "utf-8", columns: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]] | Problem]:
    """(place in the file, row) of every row of a file, or what is wrong with it; damage ends the file with a problem.

    The values are as the file has them: no text is normalized. `columns` are the names of the columns of CSV files
    that do not begin with them.
    """
    kind = row_kind_of(path)
    if kind is None:
        yield Problem(path, "", f"unknown kind of file for labelled rows; known: {ROWS_KNOWN}")
        return
    reader = csv_rows(path, None, encoding, columns) if kind == "csv" else _ROW_READERS[kind](path, None, encoding)
    for found in _explained(path, reader):
        if isinstance(found, Problem):
            yield found
        else:
            place, value = found
            yield Problem(path, place, value.what) if isinstance(value, Bad) else (place, value)


def _explained(path: Path, found: Iterator[Found]) -> Iterator[Found | Problem]:
    """What a reader gives; damage of the file ends it with a problem."""
    try:
        yield from found
    except BadFileError as error:
        yield Problem(path, "", str(error))
    except DataError:  # a library is missing
        raise
    except OSError as error:
        # Errors of compressed files have no number.
        what = f"cannot be read ({error.strerror})" if error.errno else f"damaged or cut short ({first_line(error)})"
        yield Problem(path, "", what)
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        yield Problem(path, "", f"damaged or cut short ({first_line(error)})")


def _normal(value: str) -> str | Bad:
    """A text without byte-order mark and with `\\n` as line end, see the package's description."""
    text = value.lstrip("\ufeff")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        return Bad(f"holds NUL bytes, first in line {line} of the text: no text, or UTF-16 without a byte-order mark")
    place = first_surrogate(text)
    if place is not None:
        return Bad(
            f"holds the lone surrogate {text[place]!r} at character {place + 1} of the text, "
            f"which stands for no character"
        )
    return text
