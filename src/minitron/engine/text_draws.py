"""The random numbers of texts that are not equally far: each text has at each step the numbers of plain decoding.

Plain decoding uses the numbers of torch's generator step by step, and within a step text by text. A text that is ahead
needs numbers of later steps than the others, so the generator's state before the numbers of each text is kept (2.5 kB)
for every step that some text may still need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np

from . import torch_generator
from .base import DecodeEngine
from .draws import Draws
from .loop import give_back, numbers_of
from .mt19937 import TwisterState, seeded
from .sampling import Array
from .texts import Texts

MOST_WORDS = 1 << 22
"""Random numbers of a burst of plain decoding; 16 MiB."""


class TextDraws:
    """How the tokens of texts are chosen: greedily here."""

    def most_steps(self, wanted: int) -> int:
        """How many of so many steps can be drawn at once."""
        return wanted

    @contextmanager
    def of(self, rows: Sequence[int], steps: int) -> Iterator[tuple[Draws | None, list[Draws | None]]]:
        """For the next `steps` steps of the texts `rows`: the draws of all texts, for `DecodeEngine.draw`, and those of
        each one alone, for `DecodeEngine.verify`. Both are valid within the block."""
        yield None, [None] * len(rows)

    def again(self) -> None:
        """Go back to the first of these steps."""

    def end(self, steps: int) -> None:
        """All texts have ended, of which the first that ran last took so many tokens at once: torch's generator goes on
        where plain decoding would have left it."""


class OneTextDraws(TextDraws):
    """Draws for one text: any `Draws` of the engine, with the numbers of torch's generator if it uses these."""

    def __init__(self, draws: Draws, texts: Texts) -> None:
        self._draws, self._texts, self._begin = draws, texts, 0

    @contextmanager
    def of(self, rows: Sequence[int], steps: int) -> Iterator[tuple[Draws | None, list[Draws | None]]]:
        """See `TextDraws`."""
        self._begin = self._texts.columns
        with numbers_of(self._draws):
            self._draws.see(self._texts.seen())
            yield self._draws, [self._draws]

    def again(self) -> None:
        """See `TextDraws`."""
        self._draws.rewind(0)
        self._draws.see(self._texts.seen())

    def end(self, steps: int) -> None:
        """See `TextDraws`. The text may have been drawn too far."""
        used = self._texts.columns - self._begin
        if used < steps:
            give_back(self._draws, used)


class BatchDraws(TextDraws):
    """Draws for several texts, with the numbers of torch's generator from its state now on.

    Args:
        draws: of all texts, as `Rules.draws` makes them.
        texts: the batch.
        engine: computes the numbers.
        most: drafted tokens, and one more.
    """

    def __init__(self, draws: Draws, texts: Texts, engine: DecodeEngine, most: int) -> None:
        self._draws, self._texts, self._engine, self._most = draws, texts, engine, most
        self._each = draws.per_step // draws.texts
        """Numbers of a text in a step."""
        with torch_generator.held() if self._each else nullcontext(seeded(0)) as twister:
            self._first = self._next = twister
        self._states: dict[int, list[TwisterState]] = {}
        """For each step the state before the numbers of each text."""
        self._known = 0
        """Steps whose states were computed."""
        self._scratch = np.empty(self._each, np.uint32)

    def most_steps(self, wanted: int) -> int:
        """See `TextDraws`."""
        return min(wanted, max(self._most, MOST_WORDS // self._draws.per_step)) if self._each else wanted

    @contextmanager
    def of(self, rows: Sequence[int], steps: int) -> Iterator[tuple[Draws | None, list[Draws | None]]]:
        """See `TextDraws`."""
        if self._each:
            self._fill(rows, [self._texts.new(row) for row in rows], steps)
        self.again()
        yield self._draws, [self._draws.of_row(row) for row in rows]

    def again(self) -> None:
        """See `TextDraws`."""
        self._draws.used = 0
        self._draws.see(self._texts.seen())

    def end(self, steps: int) -> None:
        """See `TextDraws`."""
        if not self._each:
            return
        columns = self._texts.columns
        after = self._next if columns == self._known else self._states[columns][0]
        with torch_generator.held() as twister:
            if twister == self._first:  # nobody has drawn numbers since
                twister.block, twister.used = after.block, after.used

    def _fill(self, rows: Sequence[int], begins: list[int], steps: int) -> None:
        """Put the numbers of some steps of these texts, from step `begins[i]` of text `rows[i]` on, where `draws` takes
        them."""
        words = self._draws.room_for(steps)

        def place(row: int, step: int) -> Array:
            first = step * self._draws.per_step + row * self._each
            return words[first : first + self._each]

        known = self._known
        while self._known < max(begins) + steps:
            states = []
            for row in range(self._draws.texts):
                states.append(self._next)
                step = self._known - begins[rows.index(row)] if row in rows else -1
                out = place(row, step) if 0 <= step < steps else self._scratch
                self._next = self._engine.random_words(self._next, out)
            self._states[self._known] = states
            self._known += 1
        for row, begin in zip(rows, begins, strict=True):
            for step in range(begin, min(begin + steps, known)):
                self._engine.random_words(self._states[step][row], place(row, step - begin))
        for step in range(min(self._states), min(map(self._texts.new, self._texts.running))):
            del self._states[step]
