"""The texts of a request, some of which may be further than others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .loop import room_for
from .rules import Rules
from .sampling import Array

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


class Texts:
    """Prompts (B, T), padded on the left, and their continuations, which grow one by one.

    A column of tokens is complete once all texts that have not ended before have a token in it. It then goes to the
    streamer, and the rules say which texts end with it: the calls are those of plain decoding, whatever text is ahead.

    Args:
        input_ids: (B, T).
        starts: the column at which each prompt begins, after its padding.
        rules: of the request.
        streamer: gets the columns.
    """

    def __init__(self, input_ids: Tensor, starts: list[int], rules: Rules, streamer: BaseStreamer | None) -> None:
        self._ids = room_for(input_ids, rules)
        self._array = self._ids.numpy()  # the same memory
        self._starts, self._rules, self._streamer = starts, rules, streamer
        self.begin = input_ids.shape[1]
        """Columns of the prompts."""
        self._length = self.begin
        self._lengths = [self.begin] * len(starts)
        self._ended = np.zeros(len(starts), bool)
        self.running = list(range(len(starts)))
        """The texts that need more tokens."""

    @property
    def ids(self) -> Tensor:
        """(B, T), the complete columns; the same memory."""
        return self._ids[:, : self._length]

    @property
    def ended(self) -> bool:
        """Whether all texts have ended and all columns are complete."""
        return not self.running

    @property
    def columns(self) -> int:
        """Complete columns after the prompts."""
        return self._length - self.begin

    def tokens(self, row: int) -> list[int]:
        """All of a text without its padding."""
        return self._ids[row, self._starts[row] : self._lengths[row]].tolist()

    def last(self, row: int) -> int:
        """A text's last token, which the engine has yet to append."""
        return int(self._ids[row, self._lengths[row] - 1])

    def new(self, row: int) -> int:
        """A text's tokens after its prompt."""
        return self._lengths[row] - self.begin

    def left(self, row: int) -> int:
        """Tokens that a text may still get; 0 only if it has ended."""
        return self._ids.shape[1] - self._lengths[row]

    def seen(self) -> list[Array]:
        """The tokens (T,) of each text that the repetition penalty counts."""
        return [seen[: len(seen) - self.left(row)] for row, seen in enumerate(self._rules.seen(self._ids))]

    def extend(self, row: int, tokens: list[int]) -> None:
        """Add tokens to a text up to its end, as far as that is known: to a token that ends it, or to its length."""
        for token in tokens:
            self._ids[row, self._lengths[row]] = token
            self._lengths[row] += 1
            if token in self._rules.ends or not self.left(row):
                self.running.remove(row)
                return

    def complete(self) -> list[int]:
        """Complete columns as far as there are tokens; for each, the number of texts that had not ended before it."""
        counts = []
        while not self._ended.all():
            waiting = np.flatnonzero(~self._ended)
            if min(self._lengths[row] for row in waiting) == self._length:
                break
            self._array[self._ended, self._length] = self._rules.pad
            self._length += 1
            counts.append(len(waiting))
            if self._streamer is not None:
                self._streamer.put(self._ids[:, self._length - 1].clone())
            self._ended |= self._rules.ended(self.ids)
        if counts:  # the caller's criteria may end texts that have more tokens already
            self.running = [row for row in self.running if not self._ended[row]]
        return counts
