"""The gradient of an LM head, (V, D), summed over chunks of rows without rounding in between.

In fp32 and above each chunk is added at once. In 16 bits the gradients of the logits are kept, as the textbook loss
keeps them, and one product per piece of the vocabulary sums over all of them in fp32; what is kept is given back piece
by piece, so that it and the result together take the room of the larger one. If they are more than are kept, those of
the last columns are computed a second time at the end, and beyond that the sum is rounded in between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# 16-bit gradients of logits that are kept: so many that with all else a loss takes less than 2 GiB.
_KEPT_VALUES = 980_000_000
# The largest share of the vocabulary whose gradients are computed twice.
_MOST_TWICE = 0.25
# Kept gradients in one piece of memory. The C library gives pieces above 32 MiB back to the system one by one; this is
# just above that.
_PIECE = 4096 * 4200
_PIECE_BYTES = 1 << 25
# Of those in one product: the library that multiplies makes copies of its operands.
_PRODUCT = 4096 * 1050
_FEWEST_ROWS = 16

Again = Callable[[Tensor, slice], Tensor]


class HeadGradient:
    """The sum, and what is kept for it.

    Args:
        weight: (V, D), the head.
        rows: how many there will be.
        can_repeat: whether gradients of some columns can be computed twice.
    """

    def __init__(self, weight: Tensor, rows: int, can_repeat: bool) -> None:
        self.sum = torch.empty_like(weight)
        """(V, D); what it holds counts once `flush` was called after the last rows."""
        self.exact = torch.promote_types(weight.dtype, torch.float32) == weight.dtype
        size = weight.shape[0]
        self.width = size
        if not self.exact and can_repeat and rows * size > _KEPT_VALUES:
            self.width = max(size - int(size * _MOST_TWICE), _KEPT_VALUES // rows)
        self.most = max(1, _KEPT_VALUES // self.width)
        self.limit = min(rows, self.most)
        self.piece, self.product = (max(1, count // max(1, self.limit)) for count in (_PIECE, _PRODUCT))
        self.first, self.used = True, 0
        self.pieces: list[Tensor] = []
        self.rows: list[Tensor] = []

    @property
    def repeats(self) -> bool:
        """Whether some columns are left to be computed again."""
        return self.width < len(self.sum)

    @property
    def is_full(self) -> bool:
        """Whether `flush` is due before more rows."""
        return not self.exact and self.used == self.limit

    def next_rows(self, most: int) -> int:
        """Rows of the next chunk, at most `most`: near the limit it lives in the room that is not filled yet."""
        if self.exact:
            return most
        room = (self.most - self.used) // 4
        if room * self.sum.shape[0] * self.sum.element_size() < _PIECE_BYTES:
            room = _FEWEST_ROWS  # smaller ones stay with the process, and should be small
        return min(most, room, self.limit - self.used)

    def add(self, gradient: Tensor, hidden: Tensor, at: Tensor, scale: float) -> None:
        """Add `scale` times the gradients of logits (R, V) transposed times the rows `at` (R,) of hidden (N, D)."""
        if self.exact:
            self._multiply(slice(None), gradient, hidden[at], scale)
            self.first = False
            return
        parts = gradient[:, : self.width].split(self.piece, dim=1)
        if not self.pieces:
            self.pieces = [gradient.new_empty(self.limit, part.shape[1]) for part in parts]
        for part, piece in zip(parts, self.pieces, strict=True):
            piece[self.used : self.used + len(at)] = part
        self.rows.append(at)
        self.used += len(at)

    def flush(self, hidden: Tensor, scale: float, again: Again) -> None:
        """Take in what is kept; `again(rows, columns)` are the gradients of logits that were not."""
        if self.used:
            rows = torch.cat(self.rows)
            # Without ignored rows it is all of them, in their order: no copy.
            some = hidden if self.used == len(hidden) else hidden[rows]
            for i in range(len(self.pieces)):
                self._in_products(i * self.piece, self.pieces[i][: self.used], some, scale)
                self.pieces[i] = self.pieces[i][:0].clone()  # the memory goes back
            self.pieces = []
            for first in range(self.width, len(self.sum), self.piece):
                columns = slice(first, min(first + self.piece, len(self.sum)))
                self._in_products(first, again(rows, columns), some, scale)
            self.rows, self.used, self.first = [], 0, False
        if self.first:
            self.sum.zero_()

    def _in_products(self, column: int, gradient: Tensor, hidden: Tensor, scale: float) -> None:
        for part in gradient.split(self.product, dim=1):
            self._multiply(slice(column, column + part.shape[1]), part, hidden, scale)
            column += part.shape[1]

    def _multiply(self, columns: slice, gradient: Tensor, hidden: Tensor, scale: float) -> None:
        beta = 0 if self.first else 1  # 0 also where the memory holds NaN
        self.sum[columns].addmm_(gradient.t(), hidden, beta=beta, alpha=scale)
