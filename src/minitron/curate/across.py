"""The documents of all parts as one numbered sequence: what stages that compare documents read."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import compute

from .part import read_array, read_digests, read_table
from .quality import Mask
from .tally import EXAMPLE_CHARACTERS, StageTally
from .texts import Texts
from .word_kernels import grams

_HELD_SETS = 20_000
"""Sets of n-grams that are held at once; others are computed again from the text when they are wanted."""
DOCUMENT_BYTES = 32
"""Memory for each document; each band of `near` takes 8 bytes more."""


class AllParts:
    """Numbers of all documents, in the order of the parts, and what is known of each.

    Memory: `DOCUMENT_BYTES` for each document, and 8 more for each band of `keys`.
    """

    def __init__(self, work: Path, parts: int) -> None:
        self._work, self._parts = work, parts
        digests = [read_digests(work, number) for number in range(parts)]
        self.starts: list[int] = np.cumsum([0, *map(len, digests)]).tolist()
        self.digests = np.concatenate([np.zeros((0, 2), dtype=np.uint64), *digests])
        length: Any = compute.binary_length  # type: ignore[attr-defined]
        self.sizes = self._gather("text", lambda column: length(column).to_numpy())
        # Without a tokenizer the column is null, and no token is counted.
        self.tokens = self._gather("tokens", lambda column: column.fill_null(0).to_numpy())

    def _gather(self, name: str, read: Callable[[Any], Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
        columns = (read(read_table(self._work, number, [name]).column(0)) for number in range(self._parts))
        return np.concatenate([np.zeros(0, dtype=np.int64), *columns])

    def __len__(self) -> int:
        return self.starts[-1]

    def column(self, name: str) -> list[Any]:
        """A column of short values of all documents."""
        return [
            value for part in range(self._parts) for value in read_table(self._work, part, [name]).column(0).to_pylist()
        ]

    def keys(self, bands: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """(documents, bands) uint64: see `near.band_keys`."""
        return np.concatenate([read_array(self._work, number, "keys", bands) for number in range(self._parts)])

    def embeddings(self) -> np.ndarray[Any, np.dtype[np.float16]]:
        """(documents, hidden size) float16: see `scoring.embeddings`."""
        found = [read_array(self._work, number, "embeddings", 0) for number in range(self._parts)]
        return np.concatenate([rows for rows in found if len(rows)]) if len(self) else np.zeros((0, 0), np.float16)

    def locate(self, document: int) -> tuple[int, int]:
        """(part, row in it) of a document."""
        part = bisect.bisect_right(self.starts, document) - 1
        return part, document - self.starts[part]

    def document(self, document: int) -> tuple[str, str, str]:
        """(source, place, how the text begins)."""
        part, row = self.locate(document)
        table = self._table(part)
        source, place, text = (table.column(name)[row].as_py() for name in ("source", "place", "text"))
        return source, place, text[: 100 * EXAMPLE_CHARACTERS]

    @functools.cached_property
    def _table(self) -> Callable[[int], Any]:
        return functools.lru_cache(maxsize=64)(lambda part: read_table(self._work, part))

    def gram_reader(self, n: int) -> Callable[[int], np.ndarray[Any, np.dtype[np.uint64]]]:
        """A function from a document to its sorted set of n-grams."""

        @functools.lru_cache(maxsize=_HELD_SETS)
        def read(document: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
            part, row = self.locate(document)
            return grams(Texts.of([self._table(part).column("text")[row].as_py()]), n)[0]

        return read

    def tally(self, before: Mask, after: Mask, reason: str) -> StageTally:
        """What a stage did that kept `after` of `before`."""
        tally = StageTally(
            *(int(before.sum()), int(self.sizes[before].sum()), int(self.tokens[before].sum())),
            *(int(after.sum()), int(self.sizes[after].sum()), int(self.tokens[after].sum())),
        )
        removed = tally.documents_in - tally.documents_out
        if removed:
            tally.removed[reason] = removed
        return tally
