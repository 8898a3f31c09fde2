"""How a teacher's outputs are stored: as hidden states, as samples, or as the most likely tokens.

A codec turns the teacher's hidden states of a block into two byte strings: a row of fixed length for every token, and
entries, of which a token may have any number. Letters of shapes: T tokens of a block, D hidden, V vocabulary, N
samples, K tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

# An entry of a sampled token: 18 bits of id and 6 bits of count, in three bytes.
ID_BITS, COUNT_BITS = 18, 6
ENTRY_BYTES = 3
# Logits of the teacher that exist at one time while targets are formed.
_VALUES_AT_ONCE = 1 << 24


def pack_entries(ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Ids below 2^18 and counts below 2^6 as (n, 3) uint8, the least significant byte first."""
    words = (ids.astype("<u4") | (counts.astype("<u4") << ID_BITS)).astype("<u4")
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, 4)[:, :ENTRY_BYTES])


def unpack_entries(entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, counts) of (n, 3) uint8, as int64."""
    wide = np.zeros((len(entries), 4), dtype=np.uint8)
    wide[:, :ENTRY_BYTES] = entries
    words = wide.view("<u4").reshape(-1).astype(np.int64)
    return words & ((1 << ID_BITS) - 1), words >> ID_BITS


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens (R, N) of distributions (R, V), by inverting the cumulated probabilities at uniforms (R, N) in [0, 1)."""
    cumulated = probabilities.double().cumsum(dim=-1)
    return torch.searchsorted(cumulated, uniforms * cumulated[:, -1:], right=True).clamp_(max=cumulated.shape[1] - 1)


@dataclass(frozen=True)
class Decoded:
    """Rows and entries of one block, as read."""

    rows: np.ndarray
    """(T, row_bytes) uint8."""
    entries: np.ndarray
    """(n, 3) uint8."""


@dataclass(frozen=True)
class HiddenCodec:
    """The teacher's last hidden states, unchanged: with its head they are its whole distribution, exactly."""

    dtype: str
    width: int
    kind: ClassVar[str] = "hidden"

    @property
    def row_bytes(self) -> int:
        """Bytes per token."""
        return self.width * getattr(torch, self.dtype).itemsize

    def encode(self, hidden: Tensor, head: Tensor, scored: Tensor, seed: int) -> tuple[bytes, bytes]:
        """Hidden states (T, D) of a block, head (V, D), which tokens (T,) are scored, seed of the block."""
        return hidden.to(getattr(torch, self.dtype)).contiguous().cpu().view(torch.uint8).numpy().tobytes(), b""

    def states(self, blocks: list[Decoded]) -> Tensor:
        """Hidden states (B, T, D) of blocks."""
        raw = torch.from_numpy(np.stack([block.rows for block in blocks]))
        return raw.view(getattr(torch, self.dtype))


@dataclass(frozen=True)
class _SparseCodec:
    """What both sparse kinds share. The first five bytes of a row are the entropy in fp16 and the most likely id."""

    vocabulary: int
    ROW_START: ClassVar[int] = 5

    def distribution(self, hidden: Tensor, head: Tensor) -> Any:
        """Chunks of rows: (rows, log-probabilities (R, V) in fp32)."""
        step = max(1, _VALUES_AT_ONCE // head.shape[0])
        for start in range(0, len(hidden), step):
            rows = slice(start, min(start + step, len(hidden)))
            yield rows, (hidden[rows].to(head.dtype) @ head.t()).float().log_softmax(dim=-1)

    @staticmethod
    def start_of(log_p: Tensor) -> np.ndarray:
        """(R, 5) uint8: entropy and most likely token."""
        entropy = -(log_p.exp() * log_p).sum(dim=-1).half().cpu().numpy().astype("<f2")
        top = pack_entries(log_p.argmax(dim=-1).cpu().numpy(), np.zeros(len(log_p), np.int64))
        return np.concatenate([entropy[:, None].view(np.uint8), top], axis=1)

    @staticmethod
    def read_start(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(entropy fp32, most likely id) of rows (..., 5 or more)."""
        flat = rows.reshape(-1, rows.shape[-1])
        entropy = np.ascontiguousarray(flat[:, :2]).view("<f2").astype(np.float32)
        return entropy.reshape(rows.shape[:-1]), unpack_entries(flat[:, 2:5])[0].reshape(rows.shape[:-1])


@dataclass(frozen=True)
class SampledCodec(_SparseCodec):
    """N tokens drawn from the teacher, as counts: an unbiased estimate of its distribution (RS-KD, 2503.16870).

    Unlike there, samples come from the teacher's own distribution (temperature 1), whose counts need no weights.
    """

    samples: int = 50
    kind: ClassVar[str] = "sampled"
    row_bytes: ClassVar[int] = _SparseCodec.ROW_START + 1

    def __post_init__(self) -> None:
        """Refuse more samples than an entry can count."""
        if not 1 <= self.samples < 1 << COUNT_BITS:
            raise ValueError(f"samples is {self.samples}; it must be 1 to {(1 << COUNT_BITS) - 1}")

    def encode(self, hidden: Tensor, head: Tensor, scored: Tensor, seed: int) -> tuple[bytes, bytes]:
        """As of `HiddenCodec.encode`; tokens that are not scored get no entries."""
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(hidden), self.samples, generator=generator, dtype=torch.float64)
        out_rows, out_entries = [], []
        for rows, log_p in self.distribution(hidden, head):
            found = draw(log_p.exp(), uniforms[rows].to(log_p.device)).sort(dim=-1).values.cpu().numpy()
            found = found[scored[rows].cpu().numpy()]
            keys = found + (np.arange(len(found)) << ID_BITS)[:, None]  # one number per (row, id)
            unique, counts = np.unique(keys.reshape(-1), return_counts=True)
            lengths = np.zeros(len(log_p), dtype=np.uint8)
            lengths[scored[rows].cpu().numpy()] = np.bincount(unique >> ID_BITS, minlength=len(found))
            out_rows.append(np.concatenate([self.start_of(log_p), lengths[:, None]], axis=1))
            out_entries.append(pack_entries(unique & ((1 << ID_BITS) - 1), counts))
        return np.concatenate(out_rows).tobytes(), np.concatenate(out_entries).tobytes()

    def shares(self, block: Decoded) -> tuple[np.ndarray, np.ndarray]:
        """(ids, shares), each (T, most entries of a token)."""
        lengths = block.rows[:, self.ROW_START].astype(np.int64)
        used = np.arange(max(1, lengths.max()))[None, :] < lengths[:, None]
        ids, shares = np.zeros(used.shape, np.int64), np.zeros(used.shape, np.float32)
        found, counts = unpack_entries(block.entries)
        ids[used], shares[used] = found, counts / self.samples
        return ids, shares


@dataclass(frozen=True)
class TopKCodec(_SparseCodec):
    """The K most likely tokens with their probabilities in fp16: biased, for comparison."""

    k: int = 8
    kind: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        """Refuse invalid values."""
        if not 1 <= self.k <= self.vocabulary:
            raise ValueError(f"k is {self.k}; it must be 1 to the vocabulary's {self.vocabulary}")

    @property
    def row_bytes(self) -> int:
        """Bytes per token."""
        return self.ROW_START + self.k * (ENTRY_BYTES + 2)

    def encode(self, hidden: Tensor, head: Tensor, scored: Tensor, seed: int) -> tuple[bytes, bytes]:
        """As of `HiddenCodec.encode`."""
        out = []
        for _, log_p in self.distribution(hidden, head):
            values, ids = log_p.exp().topk(self.k, dim=-1)
            flat = ids.reshape(-1).cpu().numpy()
            packed = pack_entries(flat, np.zeros_like(flat)).reshape(len(log_p), -1)
            shares = values.half().cpu().numpy().astype("<f2").view(np.uint8)
            out.append(np.concatenate([self.start_of(log_p), packed, shares], axis=1))
        return np.concatenate(out).tobytes(), b""

    def shares(self, block: Decoded) -> tuple[np.ndarray, np.ndarray]:
        """(ids, shares), each (T, K)."""
        middle = self.ROW_START + self.k * ENTRY_BYTES
        packed = block.rows[:, self.ROW_START : middle].reshape(-1, ENTRY_BYTES)
        shares = np.ascontiguousarray(block.rows[:, middle:]).view("<f2").astype(np.float32)
        return unpack_entries(packed)[0].reshape(-1, self.k), shares


Codec = HiddenCodec | SampledCodec | TopKCodec
CODECS: dict[str, type[Codec]] = {codec.kind: codec for codec in (HiddenCodec, SampledCodec, TopKCodec)}
