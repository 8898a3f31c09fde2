"""Files of characters as documents or rows: a whole file, JSON lines, other JSON, tables of characters."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from .formats import MARK_BYTES, binary_kind, encoding_of, first_line, open_bytes
from .problems import Bad, BadFileError

Found = tuple[str, Any]
"""Place in the file (empty if it is one document), and a document or a `Bad` that says why there is none.

A document is a string, or a row as a dict where the caller asked for whole rows (`field` None)."""

_LINE_END = re.compile("\r\n|\r|\n")
MOST_WHOLE_BYTES = 1 << 30
"""Bytes, after decompression, up to which JSON is read that can only be read whole, and up to which a line is."""
# Bytes looked at to tell JSON lines from other JSON.
_FIRST_LINE = 1 << 20


def whole_file(path: Path, field: str, encoding: str) -> Iterator[Found]:
    """The file as one document."""
    with open_bytes(path) as raw:
        content = raw.read()
    yield "", _decoded(content, encoding)


def _decoded(raw: bytes, encoding: str) -> str:
    _refuse_binary(raw)
    encoding, mark = encoding_of(raw[:MARK_BYTES], encoding)
    try:
        return raw[mark:].decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, mark + error.start) + 1
        raise BadFileError(f"{not_text(error, encoding)} in line {line}") from None


def _refuse_binary(head: bytes) -> None:
    what = binary_kind(head[:MARK_BYTES])
    if what is not None:
        raise BadFileError(f"is {what}, not text; rename it to match")


def not_text(error: UnicodeDecodeError, encoding: str) -> str:
    """Why bytes are not text in an encoding."""
    name = "UTF-8" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    byte = error.object[error.start : error.start + 1]
    return f"not {name} text ({error.reason}{f': byte 0x{byte[0]:02x}' if byte else ''})"


# --- JSON lines --------------------------------------------------------------------------------------------------


def json_lines(path: Path, field: str | None, encoding: str, most: int = MOST_WHOLE_BYTES) -> Iterator[Found]:
    """An object in each line. A line that cannot be decoded, or has more than `most` bytes, does not affect others."""
    with open_bytes(path) as raw:
        head = raw.read(MARK_BYTES)
    _refuse_binary(head)
    encoding, mark = encoding_of(head, encoding)
    with open_bytes(path) as raw:
        if "\n".encode(encoding) == b"\n":
            raw.read(mark)
            lines: Iterable[str | Bad] = _split(raw, encoding, most)
        else:  # its bytes cannot be cut at line ends
            lines = _LINE_END.split(_decoded(_at_most(raw, most), encoding))
        for number, line in enumerate(lines, 1):
            if isinstance(line, Bad):
                yield f"line {number}", line
            elif line := line.strip(" \t\ufeff"):  # files with marks may have been joined
                yield f"line {number}", _text_in(line, field)


def _at_most(raw: IO[bytes], most: int) -> bytes:
    """The rest of a file that cannot be read in pieces: a small compressed file may unpack to any size."""
    content = raw.read(most + 1)
    if len(content) > most:
        raise BadFileError(
            f"has more than {most:,} bytes and can only be read whole; write JSON lines in UTF-8 (.jsonl)"
        )
    return content


def skip_line(raw: IO[bytes]) -> int:
    """Read past the next line end; how many bytes."""
    skipped = 0
    while True:
        piece = raw.readline(1 << 20)
        skipped += len(piece)
        if not piece or piece.endswith(b"\n"):
            return skipped


def _split(raw: IO[bytes], encoding: str, most: int) -> Iterator[str | Bad]:
    while line := raw.readline(most):
        if len(line) == most and not line.endswith(b"\n"):
            skip_line(raw)
            yield Bad(f"longer than {most:,} bytes")
            continue
        for part in line.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
            try:
                yield part.decode(encoding)
            except UnicodeDecodeError as error:
                yield Bad(not_text(error, encoding))


def _text_in(line: str, field: str | None) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return Bad(f"not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        return Bad(f"not JSON that can be read ({first_line(error)})")
    return text_of(row, field)


# --- other JSON --------------------------------------------------------------------------------------------------


def json_file(path: Path, field: str | None, encoding: str, most: int = MOST_WHOLE_BYTES) -> Iterator[Found]:
    """JSON lines, an array of objects, or one object over several lines; of at most `most` bytes if not lines."""
    with open_bytes(path) as raw:
        head = raw.read(_FIRST_LINE)
    name, mark = encoding_of(head[:MARK_BYTES], encoding)
    first, *others = _LINE_END.split(head[mark:].decode(name, errors="replace").lstrip(), maxsplit=1)
    if first.startswith("{") and (others or len(head) < _FIRST_LINE) and _is_json(first):
        yield from json_lines(path, field, encoding, most)
        return
    with open_bytes(path) as raw:
        text = _decoded(_at_most(raw, most), encoding)
    if not text.strip():
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadFileError(f"not JSON ({error.msg} in line {error.lineno}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"not JSON that can be read ({first_line(error)})") from None
    if isinstance(values, list):
        yield from ((f"item {number}", text_of(value, field)) for number, value in enumerate(values, 1))
    else:
        yield "", text_of(values, field)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def text_of(row: Any, field: str | None) -> Any:
    """The text of a row of JSON; the whole row if `field` is None."""
    if field is None:
        return row if isinstance(row, dict) else Bad(f"expected an object; found {_shown(row)}")
    wanted = f"expected an object with a string in the field {field!r}"
    if not isinstance(row, dict):
        return Bad(f"{wanted}; found {_shown(row)}")
    if field not in row:
        return Bad(f"{wanted}; the object has the fields: {', '.join(row) or 'none':.200}")
    if not isinstance(row[field], str):
        return Bad(f"{wanted}; it holds {_shown(row[field])}")
    return row[field]


def _shown(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with the fields: {', '.join(value) or 'none':.100}"
    return f"{json.dumps(value):.40}"


# --- CSV ---------------------------------------------------------------------------------------------------------


def csv_rows(path: Path, field: str | None, encoding: str, columns: Sequence[str] | None = None) -> Iterator[Found]:
    """The rows of a CSV or TSV file, whose first row names the columns unless `columns` does."""
    with open_bytes(path) as raw:
        text = _decoded(raw.read(), encoding)
    tabs = ".tsv" in path.name.lower()
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True)
    try:
        names = list(columns) if columns else next(reader, [])
        if len(set(names)) < len(names):
            raise BadFileError(f"a column is named twice: {', '.join(names):.200}")
        for values in reader:
            if not values:
                continue
            place = f"line {reader.line_num}"
            if len(values) != len(names):
                yield place, Bad(f"{len(values)} values for {len(names)} columns: {', '.join(names):.200}")
            else:
                yield place, text_of(dict(zip(names, values, strict=True)), field)
    except csv.Error as error:
        raise BadFileError(f"not CSV ({error} in line {reader.line_num})") from None
