"""The documents that stay, as shards that `minitron train` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from ..files import new_file, writing
from .part import read_table

_ROWS = 1024
"""Documents that are Python objects at once."""
_OPTIONAL = ("language", "language_score", "quality_score", "tokens")
"""Columns that are written only if a stage filled them."""
Numbers = np.ndarray[Any, np.dtype[np.int64]]


def shard_path(folder: Path, number: int, kind: str) -> Path:
    """Of a shard."""
    return folder / f"{number:06d}.{kind}"


def write_shard(
    work: Path, number: int, rows: Numbers, copies: Numbers, columns: list[str], folder: Path, kind: str
) -> None:
    """Write documents of a part, in the part's order; nothing is done if the shard is there.

    Args:
        work: folder of the parts.
        number: of the part, and of the shard.
        rows: of the documents, as often as they are written.
        copies: numbers of their copies.
        columns: optional columns that are filled.
        folder, kind: where the shard is written, and in which format.
    """
    target = shard_path(folder, number, kind)
    if not target.exists():
        _write(read_table(work, number), rows, copies, columns, target, kind)


def write_shuffled(
    work: Path, starts: list[int], number: int, documents: Numbers, copies: Numbers, columns: list[str], folder: Path,
    kind: str,
) -> None:  # fmt: skip
    """As `write_shard`, of documents of any parts; `starts` are the numbers of the first documents of the parts."""
    target = shard_path(folder, number, kind)
    if target.exists():
        return
    parts = np.searchsorted(np.asarray(starts), documents, side="right") - 1
    order = np.argsort(parts, kind="stable")
    tables = []
    for part in np.unique(parts).tolist():
        rows = documents[order][parts[order] == part] - starts[part]
        tables.append(read_table(work, part).take(pa.array(rows)))
    back = np.empty(len(order), dtype=np.int64)
    back[order] = np.arange(len(order))
    _write(pa.concat_tables(tables), back, copies, columns, target, kind)


def _write(table: Any, rows: Numbers, copies: Numbers, columns: list[str], target: Path, kind: str) -> None:
    """Write rows of a table, which may repeat, as one file."""
    table = table.drop_columns([name for name in _OPTIONAL if name not in columns])
    with new_file(target) as draft, writing(target):
        if kind == "parquet":
            chosen = table.take(pa.array(rows))
            ids = _ids(chosen.column("digest").to_pylist(), copies)
            written = chosen.drop_columns(["digest"]).add_column(0, "id", pa.array(ids))
            parquet.write_table(written, draft, compression="zstd")
            return
        compression = "zstd" if kind.endswith(".zst") else None
        with pa.output_stream(str(draft), compression=compression) as stream:
            for line in _lines(table, rows, copies):
                stream.write(line)


def _ids(digests: list[bytes], copies: Numbers) -> list[str]:
    """The text's digest; of a further copy with its number, so that each id is unique."""
    return [
        digest.hex() if not copy else f"{digest.hex()}-{copy}"
        for digest, copy in zip(digests, copies.tolist(), strict=True)
    ]


def _lines(table: Any, rows: Numbers, copies: Numbers) -> Iterator[bytes]:
    for start in range(0, len(rows), _ROWS):
        chosen = table.take(pa.array(rows[start : start + _ROWS])).to_pylist()
        ids = _ids([row.pop("digest") for row in chosen], copies[start : start + _ROWS])
        for name, row in zip(ids, chosen, strict=True):
            yield json.dumps({"id": name, **row}, ensure_ascii=False).encode() + b"\n"
