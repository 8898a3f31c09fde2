"""Reductions over a vocabulary for the losses of an LM head: whole, split among processes, or some columns of it.

Letters of shapes: R rows, V vocabulary (of this process, where it is split), K targets per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce


@dataclass(frozen=True)
class Vocabulary:
    """Reductions over the vocabulary of some rows, whether it is here as a whole or split among processes."""

    group: str
    start: int

    def reduce(self, values: Tensor, op: ReduceOp.RedOpType = ReduceOp.SUM) -> Tensor:
        """Of all processes, in place."""
        if self.group:
            all_reduce(values, op, group=_process_group(self.group))
        return values

    def log_normalizer(self, logits: Tensor) -> Tensor:
        """(R, V) to (R, 1)."""
        if not self.group:
            return torch.logsumexp(logits, dim=-1, keepdim=True)
        highest = self.reduce(logits.amax(dim=-1, keepdim=True), ReduceOp.MAX)
        return self.reduce((logits - highest).exp_().sum(dim=-1, keepdim=True)).log_().add_(highest)

    def top(self, logits: Tensor) -> Tensor:
        """(R, V) to the id (R,) of the largest; the lowest such id where the vocabulary is split."""
        value, index = logits.max(dim=-1)
        index = index + self.start
        if not self.group:
            return index
        highest = self.reduce(value.clone(), ReduceOp.MAX)
        return self.reduce(torch.where(value == highest, index, torch.iinfo(index.dtype).max), ReduceOp.MIN)

    def pick(self, values: Tensor, ids: Tensor) -> Tensor:
        """Values (R, V) at ids (R, K) of the whole vocabulary."""
        if not self.group:
            return values.gather(1, ids)
        here, inside = self.local(ids, values.shape[1])
        return self.reduce(values.gather(1, here).mul_(inside))

    def add_at(self, values: Tensor, ids: Tensor, addends: Tensor) -> None:
        """Add to values (R, V) at ids (R, K) of the whole vocabulary, in place."""
        if self.group:
            ids, inside = self.local(ids, values.shape[1])
            addends = addends * inside
        values.scatter_add_(1, ids, addends)

    def local(self, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Ids as columns here, and whether each is here."""
        here = ids - self.start
        inside = (here >= 0) & (here < size)
        return here.clamp_(0, size - 1), inside


def _process_group(name: str):
    from torch._C._distributed_c10d import _resolve_process_group  # what torch's own collectives do with a name

    return _resolve_process_group(name)  # type: ignore[arg-type]


MOST_REDUCTIONS = 5
"""Reductions over the vocabulary in one loss, at most."""


@dataclass(frozen=True)
class Recording(Vocabulary):
    """A whole vocabulary; what is reduced over it, a number per row each time, is noted."""

    group: str = ""
    start: int = 0
    notes: Iterator[Tensor] = field(default_factory=lambda: iter(()))
    """(R,) for each reduction, to write into: small tensors that stay would break up the memory between large ones."""

    def reduce(self, values: Tensor, op: ReduceOp.RedOpType = ReduceOp.SUM) -> Tensor:
        """The values, noted."""
        next(self.notes).copy_(values.reshape(-1))
        return values

    def log_normalizer(self, logits: Tensor) -> Tensor:
        """As of every vocabulary, noted."""
        return self.reduce(super().log_normalizer(logits))


@dataclass(frozen=True)
class Replay(Vocabulary):
    """Some columns of a vocabulary; what is reduced over all of it was noted, and comes in the order of the calls.

    What a loss only counts (its value, the most likely tokens) is nothing that counts here.
    """

    group: str = ""
    start: int = 0
    notes: Iterator[Tensor] = field(default_factory=lambda: iter(()))

    def reduce(self, values: Tensor, op: ReduceOp.RedOpType = ReduceOp.SUM) -> Tensor:
        """What was noted."""
        return next(self.notes).view_as(values)

    def log_normalizer(self, logits: Tensor) -> Tensor:
        """What was noted."""
        return next(self.notes)[:, None]

    def top(self, logits: Tensor) -> Tensor:
        """(R,) zeros."""
        return torch.zeros(len(logits), dtype=torch.long, device=logits.device)

    def pick(self, values: Tensor, ids: Tensor) -> Tensor:
        """(R, K) zeros."""
        return torch.zeros(ids.shape, dtype=values.dtype, device=values.device)

    def add_at(self, values: Tensor, ids: Tensor, addends: Tensor) -> None:
        """As of every vocabulary, where a column is here."""
        ids, inside = self.local(ids, values.shape[1])
        values.scatter_add_(1, ids, addends * inside)
