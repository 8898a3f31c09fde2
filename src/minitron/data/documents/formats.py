"""Kinds of text files by their names, and how their bytes are decoded."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, get_args

from .problems import BadFileError, DataError

T = TypeVar("T")
Kind = Literal["whole", "lines", "json", "archive", "parquet", "arrow"]
RowKind = Literal["lines", "json", "csv", "conll", "parquet", "arrow"]

_KINDS: dict[str, Kind] = {
    ".txt": "whole",
    ".md": "whole",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".warc": "archive",
    ".wet": "archive",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_ROW_KINDS: dict[str, RowKind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_PACKED = (".gz", ".xz", ".bz2", ".zst")
ROWS_KNOWN = f"{', '.join(s for s in _ROW_KINDS if s not in ('.parquet', '.arrow'))}, also with " + (
    f"{', '.join(_PACKED[:-1])} or {_PACKED[-1]}; .parquet, .arrow"
)
"""The suffixes of files of labelled rows, for messages."""
KNOWN = f"{', '.join(s for s, kind in _KINDS.items() if kind not in get_args(Kind)[4:])}, also with " + (
    f"{', '.join(_PACKED[:-1])} or {_PACKED[-1]}; .parquet, .arrow"
)
"""The suffixes, for messages."""

# UTF-32 before UTF-16, whose mark is the beginning of the other's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# How files begin that are not text, whatever their names say; many encodings would accept any bytes.
_BINARY = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "a zip archive",
    b"%PDF-": "PDF",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
}
MARK_BYTES = 8
"""Bytes at the head of a file that decide its encoding."""


def kind_of(path: Path) -> Kind | None:
    """What a file holds, by its name in any case; None if it is not a known kind of text."""
    return _kind(path, _KINDS)


def row_kind_of(path: Path) -> RowKind | None:
    """What a file of labelled rows holds, by its name in any case; None if it is not a known kind of them."""
    return _kind(path, _ROW_KINDS)


def _kind(path: Path, kinds: Mapping[str, T]) -> T | None:
    name = path.name.lower()
    packed = next((suffix for suffix in _PACKED if name.endswith(suffix)), "")
    kind = kinds.get(Path(name.removesuffix(packed)).suffix)
    return None if packed and kind in ("parquet", "arrow") else kind


def check_encoding(name: str) -> None:
    """Refuse a name that is not an encoding of text.

    Raises:
        DataError: Python has no such encoding.
    """
    try:
        b"".decode(name)
        "\n".encode(name)
    except (LookupError, ValueError):
        raise DataError(
            f"encoding is {name!r}, which is not an encoding of text; expected one like utf-8, cp1252 (Western "
            f"Windows), latin-1, shift_jis or gb18030"
        ) from None


def encoding_of(head: bytes, encoding: str) -> tuple[str, int]:
    """(encoding, bytes of its mark) of a file that begins with `head`; `encoding` is that of files without a mark."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name, len(mark)
    return encoding, 0


def binary_kind(head: bytes) -> str | None:
    """The format of a file that begins with `head`, if it is certainly not text."""
    return next((name for magic, name in _BINARY.items() if head.startswith(magic)), None)


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed according to its suffix."""
    suffix = path.suffix.lower()
    if suffix != ".zst":
        opener: Any = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(suffix, open)
        with opener(path, "rb") as raw:
            yield raw
        return
    with damage_of_arrow(path), require_arrow(path).input_stream(str(path), compression="zstd") as raw:
        yield io.BufferedReader(raw)


@contextmanager
def damage_of_arrow(path: Path) -> Iterator[None]:
    """Turns pyarrow's errors about a damaged file into `BadFileError`."""
    arrow = require_arrow(path)
    try:
        yield
    except arrow.ArrowException as error:
        raise BadFileError(f"damaged or cut short ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def require_arrow(path: Path) -> Any:
    """The library pyarrow.

    Raises:
        DataError: it is not installed; `path` is the file that needs it.
    """
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: reading this kind of file needs pyarrow: pip install 'minitron[train]'") from None
    return pyarrow
