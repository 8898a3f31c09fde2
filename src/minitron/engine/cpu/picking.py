"""The compiled choice of tokens without a step of the model: for logits that Python code has changed."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..base import MAX_TOKENS
from ..draws import Draws
from . import choice, formats, gemv, lanes, mersenne
from .choice import COLUMNS, READY, UNDECIDED, USED, draw_rows, fill, prepare
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
