"""Texts on disk, one document after another: plain text, JSON lines, Parquet, Arrow, and folders of them.

Everything is read in pieces, so that files may be larger than memory, in an order that depends on their names alone.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_PLAIN = (".txt", ".md")
_LINES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".ndjson")
_TABLES = (".parquet", ".arrow")
SUFFIXES = (*_PLAIN, *_LINES, *_TABLES)

# Files that `datasets.Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave beside the data.
_DATASET_STATE = "state.json"
_DATASET_SPLITS = "dataset_dict.json"
_ROWS_AT_ONCE = 1024


class DataError(ValueError):
    """Text or a token cache that cannot be used; the message names the file and what would be right."""


@dataclass(frozen=True)
class Source:
    """Text files that share a weight."""

    path: str
    """A file, a folder (searched through all levels) or a glob pattern."""
    weight: float = 1.0
    """How many times an epoch passes over it; 0.5 takes one half in the first epoch, the other in the second."""
    field: str = "text"
    """Which field, or column, holds the text, in files that have some."""

    @classmethod
    def parse(cls, text: str, field: str = "text") -> Source:
        """Read `PATH` or `PATH:WEIGHT`."""
        path, colon, weight = text.rpartition(":")
        if not colon or Path(text).exists():
            return cls(text, field=field)
        try:
            value = float(weight)
        except ValueError:
            return cls(text, field=field)
        if not 0 < value < float("inf"):
            raise DataError(f"data {text!r}: the weight is {weight}; it must be greater than 0")
        return cls(path, value, field)

    def files(self) -> list[Path]:
        """The text files meant, sorted.

        Raises:
            FileNotFoundError: there is none.
            DataError: a file of another kind, or a data set on disk with several splits.
        """
        path = Path(self.path)
        if path.is_file():
            if not path.name.endswith(SUFFIXES):
                raise DataError(f"{path}: unknown kind of text file; known: {', '.join(SUFFIXES)}")
            return [path]
        found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(self.path, recursive=True))
        members = [inner for p in found for inner in (p.rglob("*") if p.is_dir() and not path.is_dir() else [p])]
        files = sorted({p for p in members if p.is_file() and p.name.endswith(SUFFIXES)})
        files = [p for p in files if p.suffix != ".arrow" or _belongs(p)]
        if not files:
            raise FileNotFoundError(f"data {self.path!r}: no text file there ({', '.join(SUFFIXES)})")
        splits = {p.parent.name: p.parent for p in files if (p.parent.parent / _DATASET_SPLITS).is_file()}
        if len(splits) > 1:
            raise DataError(
                f"{self.path}: a data set with several splits; name one, as in {next(iter(splits.values()))}"
            )
        return files


def _belongs(path: Path) -> bool:
    """Whether an Arrow file is data; a saved data set lists its own, and beside them may lie caches of `map`."""
    state = path.parent / _DATASET_STATE
    if not state.is_file():
        return True
    try:
        return path.name in {
            entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        }
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{state}: not the state of a data set saved to disk") from None


def read_documents(path: Path, field: str = "text") -> Iterator[str]:
    """The documents of a file: each row's `field` where it has rows, the whole file otherwise. Empty ones are left out.

    Raises:
        DataError: not UTF-8 text, a damaged file, or a row without that field.
    """
    try:
        if path.name.endswith(_TABLES):
            texts = _rows(path, field)
        elif path.name.endswith(_LINES):
            texts = _lines(path, field)
        else:
            texts = _whole(path)
        for text in texts:
            if text.strip():
                yield text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged or cut short ({error})") from None


def _whole(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if "\0" in text:
        raise DataError(f"{path}: holds NUL bytes, so it is not a text file")
    yield text


# --- JSON lines --------------------------------------------------------------------------------------------------


def _lines(path: Path, field: str) -> Iterator[str]:
    with _open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _text_of(line, path, number, field)


@contextmanager
def _open_text(path: Path) -> Iterator[IO[str]]:
    if path.suffix != ".zst":
        opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        with opener(path, "rt", encoding="utf-8") as lines:
            yield lines
        return
    arrow = _arrow(path)
    try:
        with arrow.input_stream(str(path), compression="zstd") as raw:
            yield io.TextIOWrapper(io.BufferedReader(raw), encoding="utf-8")
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged or cut short ({_first_line(error)})") from None


def _text_of(line: str, path: Path, number: int, field: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from None
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        there = ", ".join(map(str, row)) if isinstance(row, dict) else ""
        found = f"the object has the fields: {there or 'none'}" if isinstance(row, dict) else f"found {line[:40]!r}"
        raise DataError(f"{path}, line {number}: expected an object with a string in the field {field!r}; {found}")
    return text


# --- tables ------------------------------------------------------------------------------------------------------


def _rows(path: Path, field: str) -> Iterator[str]:
    arrow = _arrow(path)
    try:
        seen = 0
        for batch in _batches(path, field):
            for offset, text in enumerate(batch):
                if not isinstance(text, str):
                    where = f"{path}, row {seen + offset + 1}"
                    raise DataError(f"{where}: expected a string in the column {field!r}; found {text!r:.40}")
                yield text
            seen += len(batch)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged or cut short ({_first_line(error)})") from None


def _batches(path: Path, field: str) -> Iterator[list[Any]]:
    """The values of a column, some rows at a time."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path, memory_map=True) as file:
            _require_column(path, field, file.schema_arrow.names)
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[field]):
                yield batch.column(0).to_pylist()
        return
    import pyarrow as arrow
    from pyarrow import ipc

    with arrow.memory_map(str(path)) as raw:
        # Files of `datasets` are streams; those with a footer, of other programs, begin with a mark.
        file = raw.read(6) == b"ARROW1"
        raw.seek(0)
        reader: Any = ipc.open_file(raw) if file else ipc.open_stream(raw)
        _require_column(path, field, reader.schema.names)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if file else reader
        for batch in batches:
            column = batch.column(batch.schema.get_field_index(field))
            for start in range(0, len(column), _ROWS_AT_ONCE):
                yield column.slice(start, _ROWS_AT_ONCE).to_pylist()


def _require_column(path: Path, field: str, names: list[str]) -> None:
    if field not in names:
        raise DataError(f"{path}: no column {field!r}; the columns are: {', '.join(names)}")


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: reading this kind of file needs pyarrow: pip install 'minitron[train]'") from None
    return pyarrow


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
