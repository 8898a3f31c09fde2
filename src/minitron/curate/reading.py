"""Input files in parts of bounded size, and the documents of a part, with the place of each.

A part is what one worker reads: a few small files, a file, or a range of bytes of a large file of JSON lines. How files
are divided depends on their names and sizes alone.
"""

from __future__ import annotations

import itertools
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..characters import first_surrogate
from ..data.documents import DataError, Source
from ..data.documents.formats import MARK_BYTES, binary_kind, encoding_of, first_line, kind_of, open_bytes
from ..data.documents.problems import Bad, BadFileError
from ..data.documents.reading import READERS
from ..data.documents.rows import json_file, json_lines, not_text, skip_line, text_of
from .recipe import Recipe

PART_BYTES = 32_000_000
"""Of files on disk that a part has, unless a single file is larger and cannot be divided."""

WHOLE_DOCUMENTS = 16
"""JSON that can only be read whole may be as large as so many of the longest documents."""


@dataclass(frozen=True)
class Span:
    """A file, or a range of its bytes."""

    path: str
    start: int = 0
    stop: int | None = None
    """Lines that begin before this byte belong to the span; None for the whole file."""


@dataclass(frozen=True)
class Found:
    """A document, or why there is none."""

    path: str
    place: str
    """As in "line 3"; empty for a whole file."""
    text: str | Bad


def input_files(inputs: Iterable[str], recipe: Recipe) -> list[Path]:
    """The files of all inputs, each once, sorted by name.

    Raises:
        FileNotFoundError: an input has no text file.
        DataError: see `data.documents.Source`.
    """
    by_identity: dict[Path, Path] = {}
    for name in inputs:
        for path in Source(name, field=recipe.field, encoding=recipe.encoding).files():
            by_identity.setdefault(path.resolve(), path)
    return sorted(by_identity.values())


def plan_parts(files: list[Path], encoding: str, part_bytes: int = PART_BYTES) -> list[tuple[Span, ...]]:
    """Divide sorted files into parts."""
    parts: list[tuple[Span, ...]] = []
    small: list[Span] = []
    room = part_bytes
    for path in files:
        size = path.stat().st_size
        if small and size > room:
            parts.append(tuple(small))
            small, room = [], part_bytes
        if size <= part_bytes:
            small.append(Span(str(path)))
            room -= size
        elif _divisible(path, encoding):
            cuts = [*range(0, size, part_bytes), size]
            parts += [(Span(str(path), a, b),) for a, b in itertools.pairwise(cuts)]
        else:
            parts.append((Span(str(path)),))
    return [*parts, tuple(small)] if small else parts


def _divisible(path: Path, encoding: str) -> bool:
    if path.suffix.lower() not in (".jsonl", ".ndjson") or not _is_utf8(encoding):
        return False
    with path.open("rb") as raw:
        return encoding_of(raw.read(MARK_BYTES), "utf-8")[0] == "utf-8"


def _is_utf8(encoding: str) -> bool:
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8", "ascii", "us-ascii")


def documents(part: tuple[Span, ...], recipe: Recipe) -> Iterator[Found]:
    """The documents of a part, checked: no NUL, no lone surrogate, none longer than the recipe allows."""
    for span in part:
        try:
            for place, text in _read(span, recipe):
                yield Found(span.path, place, text if isinstance(text, Bad) else _checked(text, recipe))
        except BadFileError as error:
            yield Found(span.path, "", Bad(str(error)))
        except DataError:  # a library is missing
            raise
        except OSError as error:
            what = (
                f"cannot be read ({error.strerror})" if error.errno else f"damaged or cut short ({first_line(error)})"
            )
            yield Found(span.path, "", Bad(what))
        except (EOFError, lzma.LZMAError, zlib.error) as error:
            yield Found(span.path, "", Bad(f"damaged or cut short ({first_line(error)})"))


def _checked(text: str, recipe: Recipe) -> str | Bad:
    if "\0" in text:
        return Bad("holds NUL bytes: no text, or UTF-16 without a byte-order mark")
    place = first_surrogate(text)
    if place is not None:
        return Bad(f"holds the lone surrogate {text[place]!r} at character {place + 1} of the text")
    # A character has at most four bytes, so that short texts need no counting.
    if 4 * len(text) > recipe.max_document_bytes and len(text.encode()) > recipe.max_document_bytes:
        return _too_long(recipe)
    return text


def _too_long(recipe: Recipe) -> Bad:
    return Bad(f"longer than max_document_bytes, {recipe.max_document_bytes:,}")


def _read(span: Span, recipe: Recipe) -> Iterator[tuple[str, str | Bad]]:
    path = Path(span.path)
    kind = kind_of(path)
    if kind == "lines" and _is_utf8(recipe.encoding):
        with open_bytes(path) as raw:
            head = raw.read(MARK_BYTES)
        encoding, mark = encoding_of(head, "utf-8")
        what = binary_kind(head)
        if what is not None:
            raise BadFileError(f"is {what} and no text; its name should say so")
        if encoding == "utf-8":
            yield from _json_rows(span, mark, recipe)
            return
    if kind == "whole":
        with open_bytes(path) as raw:
            if len(raw.read(recipe.max_document_bytes + MARK_BYTES)) > recipe.max_document_bytes:
                yield "", _too_long(recipe)
                return
    if kind in ("lines", "json"):
        read = json_lines if kind == "lines" else json_file
        yield from read(path, recipe.field, recipe.encoding, WHOLE_DOCUMENTS * recipe.max_document_bytes)
        return
    yield from READERS[kind or "whole"](path, recipe.field, recipe.encoding)


def _json_rows(span: Span, mark: int, recipe: Recipe) -> Iterator[tuple[str, str | Bad]]:
    with open_bytes(Path(span.path)) as raw:
        for place, line in _lines(raw, span, mark, recipe):
            if isinstance(line, Bad):
                yield place, line
                continue
            line = line.strip(b" \t\r\n")
            if line:
                yield place, _row(line, recipe)


def _lines(raw: IO[bytes], span: Span, mark: int, recipe: Recipe) -> Iterator[tuple[str, bytes | Bad]]:
    """Lines that begin in the span. One that is too long is skipped without being held in memory."""
    # JSON may spell one character in twelve bytes (\\ud83d\\ude00) that has four.
    limit = 6 * recipe.max_document_bytes + 65_536
    at = span.start
    if at:
        raw.seek(at - 1)
        at += skip_line(raw) - 1  # a line that begins before the span is of the span before
    else:
        raw.read(mark)
        at = mark
    number = 0
    while span.stop is None or at < span.stop:
        line = raw.readline(limit)
        if not line:
            return
        number += 1
        place = f"line {number}" if not span.start else f"the line at byte {at:,}"
        at += len(line)
        if len(line) == limit and not line.endswith(b"\n"):
            at += skip_line(raw)
            yield place, _too_long(recipe)
        else:
            yield place, line


def _row(line: bytes, recipe: Recipe) -> str | Bad:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Bad(not_text(error, "utf-8"))
    except json.JSONDecodeError as error:
        return Bad(f"not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        return Bad(f"not JSON that can be read ({first_line(error)})")
    return text_of(row, recipe.field)
