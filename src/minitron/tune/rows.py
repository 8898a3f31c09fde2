"""Rows of tokens with targets, padded into batches: the stream of every task but chats."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data.packing import EpochOrder
from ..ops.loss import IGNORE_INDEX

CPU_TOKENS = 512
"""Tokens of a batch that is only predicted: beyond them the activations leave a CPU's caches."""


@dataclass(frozen=True)
class Row:
    """One example as tokens."""

    ids: tuple[int, ...]
    targets: Mapping[str, Any]
    """By name what the loss compares with: numbers, or lists of numbers of one length in all rows."""
    token_labels: tuple[int, ...] | None = None
    """A label for each token, `IGNORE_INDEX` where none is learned; the target `labels` of the batch."""

    @property
    def num_items(self) -> int:
        """What the row counts in the mean of a step: its labelled tokens, or 1."""
        if self.token_labels is None:
            return 1
        return sum(label != IGNORE_INDEX for label in self.token_labels)


@dataclass(frozen=True)
class PaddedBatch:
    """Rows as tensors: a `train.stream.TrainingBatch`."""

    input_ids: Tensor
    """(B, T) int64, padded on the right to the longest row."""
    attention_mask: Tensor
    """(B, T) int64: 1 at tokens of the row."""
    targets: dict[str, Tensor]
    """(B, ...) each."""
    num_items: int
    """Rows, or labelled tokens, of the whole optimizer step, of which this batch may be a part; the divisor of the
    loss."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> PaddedBatch:
        """The batch on a device."""
        moved = {name: value.to(device) for name, value in self.targets.items()}
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            targets=moved,
        )


def pad_rows(rows: Sequence[Row], pad: int) -> PaddedBatch:
    """Rows as one batch; `pad` is the id at padding, which a sequence classifier takes for no token."""
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        mask[index, : len(row.ids)] = 1
    targets = {name: torch.tensor([row.targets[name] for row in rows]) for name in rows[0].targets}
    if rows[0].token_labels is not None:
        targets["labels"] = torch.full_like(ids, IGNORE_INDEX)
        for index, row in enumerate(rows):
            targets["labels"][index, : len(row.ids)] = torch.tensor(row.token_labels)
    return PaddedBatch(ids, mask, targets, sum(row.num_items for row in rows))


class RowStream:
    """Rows in a new order in every epoch: a `train.stream.Stream`.

    The rows of a step are sorted by length before they are cut into batches, so that little is padding.

    Args:
        rows: the examples.
        pad: id at padding.
        seed: determines the order.
        sequence: tokens that a row may have.
    """

    def __init__(self, rows: Sequence[Row], pad: int, seed: int, sequence: int) -> None:
        self._rows, self._pad, self._seed, self._sequence = list(rows), pad, seed, sequence
        self._order = EpochOrder(len(self._rows), seed, 0x7075)

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self._rows)

    @property
    def key(self) -> dict[str, Any]:
        """As of `Stream`."""
        digest = hashlib.sha256(f"{self._seed} {self._pad}".encode())
        for row in self._rows:
            labels = () if row.token_labels is None else (row.token_labels,)
            digest.update(repr((row.ids, sorted(row.targets.items()), *labels)).encode())
        return {"rows": digest.hexdigest()}

    @property
    def origins(self) -> list[dict[str, Any]]:
        """As of `Stream`."""
        return []

    def check(self, vocab_size: int, sequence: int) -> None:
        """As of `Stream`."""
        highest = max(max(row.ids) for row in self._rows)
        if highest >= vocab_size:
            raise ValueError(f"the rows have token id {highest}; the model's vocab_size is {vocab_size}")
        if self._sequence != sequence:
            raise ValueError(f"rows have at most {self._sequence} tokens; sequence is {sequence}")

    def batches(self, start: int, count: int, at_once: int, *, share: tuple[int, int] = (0, 1)) -> list[PaddedBatch]:
        """As of `Stream`."""
        rows = [self._rows[self.number_at(start + i)] for i in range(count)]
        number, ways = share
        items = sum(row.num_items for row in rows)
        mine = rows[number * count // ways : (number + 1) * count // ways]
        mine.sort(key=lambda row: len(row.ids))
        parts = (mine[i : i + at_once] for i in range(0, len(mine), at_once))
        return [replace(pad_rows(part, self._pad), num_items=items) for part in parts]

    def number_at(self, position: int) -> int:
        """The number of the row at a position of the stream."""
        return self._order.at(position)


def padded_batches(
    rows: Sequence[Row], pad: int, at_once: int, device: torch.device
) -> Iterator[tuple[list[int], PaddedBatch]]:
    """Batches of rows of similar lengths on a device, each with its rows' numbers; the longest first, where memory is
    scarcest.

    On a CPU a batch of more than `CPU_TOKENS` tokens takes longer than several small ones.

    Args:
        rows: in any order.
        pad: id at padding.
        at_once: rows of a batch, at most.
        device: where the batches go.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    first = 0
    while first < len(order):
        fit = CPU_TOKENS // max(1, len(rows[order[first]].ids)) if device.type == "cpu" else at_once
        numbers = order[first : first + max(1, min(at_once, fit))]
        first += len(numbers)
        yield numbers, pad_rows([rows[number] for number in numbers], pad).to(device)
