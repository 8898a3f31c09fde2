"""Columns of Parquet and Arrow files as documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .formats import damage_of_arrow, kind_of
from .problems import Bad, BadFileError
from .rows import Found, not_text

_ROWS_AT_ONCE = 1024


def column_values(path: Path, field: str | None, encoding: str) -> Iterator[Found]:
    """The values of a column, where bytes are text in `encoding`; whole rows if `field` is None."""
    seen = 0
    with damage_of_arrow(path):
        for column in _columns(path, field):
            for value in _values(column):
                seen += 1
                yield f"row {seen}", value if field is None else _text(value, field, encoding)


def _values(column: Any) -> Iterator[Any]:
    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:  # some value of them is no UTF-8
        for value in column:
            try:
                yield value.as_py()
            except UnicodeDecodeError as error:
                yield error


def _text(value: Any, field: str, encoding: str) -> str | Bad:
    if isinstance(value, UnicodeDecodeError):
        return Bad(not_text(value, "utf-8"))
    if isinstance(value, bytes):
        try:
            return value.decode(encoding)
        except UnicodeDecodeError as error:
            return Bad(not_text(error, encoding))
    if not isinstance(value, str):
        return Bad(f"expected a string in the column {field!r}; found {'null' if value is None else repr(value):.40}")
    return value


def _columns(path: Path, field: str | None) -> Iterator[Any]:
    """A column, or all of them, some rows at a time."""
    if kind_of(path) == "parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path, memory_map=True) as file:
            _require_column(field, file.schema_arrow.names)
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=None if field is None else [field]):
                yield batch if field is None else batch.column(0)
        return
    import pyarrow as arrow
    from pyarrow import ipc

    with arrow.memory_map(str(path)) as raw:
        # Files of `datasets` are streams; those with a footer, of other programs, begin with a mark.
        file = raw.read(6) == b"ARROW1"
        raw.seek(0)
        reader: Any = ipc.open_file(raw) if file else ipc.open_stream(raw)
        _require_column(field, reader.schema.names)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if file else reader
        for batch in batches:
            column = batch if field is None else batch.column(batch.schema.get_field_index(field))
            for start in range(0, column.num_rows if field is None else len(column), _ROWS_AT_ONCE):
                yield column.slice(start, _ROWS_AT_ONCE)


def _require_column(field: str | None, names: list[str]) -> None:
    if field is None:
        return
    if field not in names:
        raise BadFileError(f"no column {field!r}; the columns are: {', '.join(names)}")
    if names.count(field) > 1:
        raise BadFileError(f"{names.count(field)} columns are named {field!r}; only one may be")
