"""The documents of all parts as one numbered sequence: what stages that compare documents read."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import compute

from .part import keys_path, read_digests, read_table
from .quality import Mask
from .tally import EXAMPLE_CHARACTERS, StageTally
from .texts import Texts
from .word_kernels import grams

_HELD_SETS = 20_000
"""Sets of n-grams that are held at once; others are computed again from the text when they are wanted."""


class AllParts:
    """Numbers of all documents, in the order of the parts, and what is known of each.

    Memory: 24 bytes for each document, and 8 more for each band of `keys`.
    """

    def __init__(self, work: Path, parts: int) -> None:
        self._work, self._parts = work, parts
        digests = [read_digests(work, number) for number in range(parts)]
        self.starts: list[int] = np.cumsum([0, *map(len, digests)]).tolist()
        self.digests = np.concatenate([np.zeros((0, 2), dtype=np.uint64), *digests])
        length: Any = compute.binary_length  # type: ignore[attr-defined]
        sizes = [length(read_table(work, number, ["text"]).column(0)).to_numpy() for number in range(parts)]
        self.sizes = np.concatenate([np.zeros(0, dtype=np.int64), *sizes])

    def __len__(self) -> int:
        return self.starts[-1]

    def keys(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """(documents, bands) uint64: see `near.band_keys`."""
        return np.concatenate([np.load(keys_path(self._work, number)) for number in range(self._parts)])

    def _locate(self, document: int) -> tuple[int, int]:
        part = bisect.bisect_right(self.starts, document) - 1
        return part, document - self.starts[part]

    def document(self, document: int) -> tuple[str, str, str]:
        """(source, place, how the text begins)."""
        part, row = self._locate(document)
        table = self._table(part)
        source, place, text = (table.column(name)[row].as_py() for name in ("source", "place", "text"))
        return source, place, text[:EXAMPLE_CHARACTERS]

    @functools.cached_property
    def _table(self) -> Callable[[int], Any]:
        return functools.lru_cache(maxsize=64)(lambda part: read_table(self._work, part))

    def gram_reader(self, n: int) -> Callable[[int], np.ndarray[Any, np.dtype[np.uint64]]]:
        """A function from a document to its sorted set of n-grams."""

        @functools.lru_cache(maxsize=_HELD_SETS)
        def read(document: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
            part, row = self._locate(document)
            return grams(Texts.of([self._table(part).column("text")[row].as_py()]), n)[0]

        return read

    def tally(self, before: Mask, after: Mask, reason: str) -> StageTally:
        """What a stage did that kept `after` of `before`."""
        tally = StageTally(
            int(before.sum()), int(self.sizes[before].sum()), int(after.sum()), int(self.sizes[after].sum())
        )
        removed = tally.documents_in - tally.documents_out
        if removed:
            tally.removed[reason] = removed
        return tally
