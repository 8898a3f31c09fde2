"""The documents that stay, as shards that `minitron train` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from ..files import new_file
from .part import read_table
from .quality import Mask


def shard_path(folder: Path, number: int, kind: str) -> Path:
    """Of the shard with the documents of a part."""
    return folder / f"{number:06d}.{kind}"


def write_shard(work: Path, number: int, kept: Mask, folder: Path, kind: str) -> None:
    """Write the documents of a part that stay; nothing is done if the shard is there."""
    target = shard_path(folder, number, kind)
    if target.exists():
        return
    table = read_table(work, number)
    with new_file(target) as draft:
        if kind == "parquet":
            chosen = table.filter(pa.array(kept))
            ids = pa.array([value.hex() for value in chosen.column("digest").to_pylist()])
            written = chosen.drop_columns(["digest"]).add_column(0, "id", ids)
            if chosen.column("language").null_count:
                written = written.drop_columns(["language", "language_score"])
            parquet.write_table(written, draft, compression="zstd")
            return
        compression = "zstd" if kind.endswith(".zst") else None
        with pa.output_stream(str(draft), compression=compression) as stream:
            for line in _lines(table, kept):
                stream.write(line)


def _lines(table: Any, kept: Mask) -> Iterator[bytes]:
    start = 0
    for batch in table.to_batches(max_chunksize=1024):
        chosen = batch.filter(pa.array(np.asarray(kept[start : start + batch.num_rows])))
        start += batch.num_rows
        for row in chosen.to_pylist():
            digest = row.pop("digest")
            if row["language"] is None:
                del row["language"], row["language_score"]
            yield json.dumps({"id": digest.hex(), **row}, ensure_ascii=False).encode() + b"\n"
