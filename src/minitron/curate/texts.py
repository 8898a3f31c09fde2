"""Many texts in one buffer: what the kernels read, without a Python object for each word or line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Offsets = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Texts:
    """Texts as UTF-8, one behind the other; the layout of Arrow's `large_string`."""

    data: Bytes
    """(bytes,) uint8. Must be valid UTF-8: the kernels do not check."""
    offsets: Offsets
    """(texts + 1,) int64: text i is `data[offsets[i]:offsets[i + 1]]`."""

    @classmethod
    def of(cls, texts: Iterable[str | bytes]) -> Texts:
        """Texts from Python's; a lone surrogate is a UnicodeEncodeError."""
        parts = [text if isinstance(text, bytes) else text.encode() for text in texts]
        offsets = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        return cls(np.frombuffer(b"".join(parts), dtype=np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        return self.raw(index).decode()

    def raw(self, index: int) -> bytes:
        """The bytes of a text."""
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def sizes(self) -> Offsets:
        """(texts,) int64: bytes of each."""
        return np.diff(self.offsets)

    def take(self, kept: np.ndarray[Any, np.dtype[np.bool_]]) -> Texts:
        """The texts where `kept` is true, in the same order."""
        if kept.all():
            return self
        sizes = self.sizes()
        offsets = np.zeros(int(kept.sum()) + 1, dtype=np.int64)
        np.cumsum(sizes[kept], out=offsets[1:])
        return Texts(self.data[np.repeat(kept, sizes)], offsets)

    def replaced(self, changed: dict[int, bytes]) -> Texts:
        """The texts with some of them replaced; the same object if `changed` is empty."""
        if not changed:
            return self
        return Texts.of(changed[i] if i in changed else self.raw(i) for i in range(len(self)))

    def to_list(self) -> list[str]:
        """All texts as Python's."""
        whole = self.data.tobytes()
        return [whole[a:b].decode() for a, b in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)]
