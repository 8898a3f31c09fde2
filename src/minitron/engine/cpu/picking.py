"""The compiled choice of tokens without a step of the model: for logits that Python code has changed."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..base import MAX_TOKENS
from ..draws import Draws
from ..mt19937 import TwisterState
from . import choice, formats, gemv, lanes, mersenne
from .choice import COLUMNS, ON, PER_STEP, READY, UNDECIDED, USED, best, draw_rows, fill, prepare
from .compiled import cached
from .formats import Array
from .lanes import LANES


def _compiled(digest: int) -> Any:
    def draw(table, logits, lanes, tokens):  # type: ignore[no-untyped-def]
        if digest == -1:
            return
        prepare(table)
        draw_rows(0, 1, table, logits, logits.shape[0], lanes, tokens)

    return draw


_draw = cached(_compiled, __file__, choice, formats, gemv, lanes, mersenne)


def _compiled_until(digest: int) -> Any:
    def choose(table, logits, lanes, given, tokens):  # type: ignore[no-untyped-def]
        count = logits.shape[0]
        if digest == -1:
            return count
        if table[ON] != 0:
            each = table[PER_STEP]
            table[PER_STEP] = count * each  # the words of all of them
            prepare(table)
            table[PER_STEP] = each
        for m in range(count):
            if table[ON] != 0:
                draw_rows(0, 1, table, logits[m : m + 1], 1, lanes, tokens[m : m + 1])
                if tokens[m] == UNDECIDED:
                    return m
                table[USED] += table[PER_STEP]
            else:
                tokens[m] = best(logits[m], lanes)
            if m + 1 < count and tokens[m] != given[m + 1]:
                return m + 1
        return count

    return choose


_until = cached(_compiled_until, __file__, choice, formats, gemv, lanes, mersenne)


def choose_until(draws: Draws | None, logits: Array, given: list[int]) -> list[int]:
    """The tokens chosen for logits (N, V) of one text, one after the other, while the next of `given` (N,) is chosen.

    Args:
        draws: how tokens are chosen, greedily if None; their batch is this text.
        logits: after each of the given tokens. The penalty changes them.
        given: tokens.
    """
    table, tokens = np.zeros(COLUMNS, np.int64), np.zeros(len(logits), np.int64)
    if draws is not None:
        needed = len(given) * draws.per_step + 2 * mersenne.WORDS
        assert len(draws.words) >= needed, f"room for {len(draws.words)} random words where {needed} are needed"
        fill(table, draws, 1, [0])
    count = int(_until(table, logits, np.empty(LANES, np.float32), np.array(given), tokens))
    chosen = tokens[:count].tolist()
    if draws is not None:
        draws.ready, draws.used = int(table[READY]), int(table[USED])
        if count < len(given) and chosen == given[1 : count + 1]:  # rounding might decide the next one
            chosen.append(draws.choose_one(logits[count], 0, penalized=True))
            draws.used += draws.per_step
    return chosen


def _compiled_words(digest: int) -> Any:
    def extend_words(words, stop):  # type: ignore[no-untyped-def]
        if digest != -1:
            mersenne.extend(words, mersenne.WORDS, stop)

    return extend_words


_extend = cached(_compiled_words, __file__, mersenne)


def next_words(twister: TwisterState, out: Array) -> TwisterState:
    """As `mt19937.next_words`, compiled."""
    used = twister.used + len(out)
    stop = -(-used // mersenne.WORDS) * mersenne.WORDS
    words = np.empty(stop, np.uint32)
    words[: mersenne.WORDS] = twister.block
    _extend(words, stop)
    out[:] = words[twister.used : used]
    return TwisterState(words[stop - mersenne.WORDS :].copy(), used - (stop - mersenne.WORDS))


def pick(draws: Draws, logits: Array) -> Array:
    """The next tokens (B,) of all texts of the draws' batch for logits (B, V) float32, which the penalty changes.

    A token is UNDECIDED where rounding might decide; else the step has used its random numbers.
    """
    table, tokens = np.zeros(COLUMNS, np.int64), np.zeros(len(logits), np.int64)
    rows = range(len(logits))
    for first in range(0, len(logits), MAX_TOKENS):
        some = slice(first, first + MAX_TOKENS)
        fill(table, draws, 1, rows[some])
        _draw(table, logits[some], np.empty(LANES, np.float32), tokens[some])
        draws.ready, draws.used = int(table[READY]), int(table[USED])
    if (tokens != UNDECIDED).all():
        draws.used += draws.per_step
    return tokens
