"""The choice of a token in compiled code: the same one as `engine.sampling.choose` makes of torch's generator.

Token v is drawn where weight_v / q_v is largest: its weight is exp((logit - top) / temperature), q_v its exponential.
The most probable token is tried first; a bound that needs neither exp nor log (`mersenne.contenders`) then leaves a few
tokens of the vocabulary to compare in float64. Whether top-k, top-p and min-p keep such a token is asked only then.

Probabilities are rounded to fp32 in `sampling.draw`, and sums for top-p are fp32 here. Where that might decide, no
token is chosen: the caller then asks `sampling`. This happens about once in a hundred thousand tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numba import carray, njit  # type: ignore[reportPrivateImportUsage] (documented as public)

from ..base import MAX_TOKENS
from ..draws import Draws
from .formats import FAST, LEAF, Array
from .gemv import exp_of
from .lanes import LANES, larger, load_fp32, pointer, store
from .mersenne import EXACT, LN_2_BITS, WORDS, contenders, extend, uniform

UNDECIDED = -1
"""Instead of a token: rounding might decide, or the logits are not finite."""
TEMPERATURE, TOP_P, MIN_P, PENALTY, TOP_K, CLOSE = range(6)
"""Of the settings, float64. Top-k 0 keeps all. Rounding might decide where another score is at least the share CLOSE of
the best one."""
# Columns of the table of a call's draws; see `engine.draws`. Addresses: of the generator's words, uint32; of scratch
# for weights, fp32 (threads, V); of the tokens seen in each text of the batch, bool (B, V), 0 without a penalty; of the
# settings.
ON, WORDS_AT, WEIGHTS_AT, SEEN_AT, SETTINGS_AT = range(5)
# Words of the generator: how many there is room for, are computed, are used, and one step uses for the whole batch.
ROOM, READY, USED, PER_STEP = range(5, 9)
# Set where a token of the last step is UNDECIDED. The rows, in the whole batch, of the texts of a call.
LEFT_OPEN, FIRST_ROW = 9, 10
COLUMNS = FIRST_ROW + MAX_TOKENS
_MARGIN = 1 + 1e-4
"""By which the bound of `contenders` is raised: for those that come close, and for rounding in fp32."""
_SUM_ERROR = 1e-5
"""Of sums of weights, as a share of all weights."""
_RATIO_ERROR = 1e-12
_LEAST_WEIGHT = 1e-30
"""A smaller weight is not a normal number in fp32."""
_PIECE = 1024
"""Weights that are added in fp32 before the sum goes on in float64."""


@njit(**FAST)
def best(logits, lanes):  # type: ignore[no-untyped-def]
    """The first index of the largest of logits (V,); lanes (16,) fp32 is scratch."""
    whole = logits.shape[0] // LANES * LANES
    top = logits[0]
    if whole > 0:
        tops = load_fp32(logits, 0)  # type: ignore[call-arg]
        for v in range(0, whole, LANES):
            tops = larger(tops, load_fp32(logits, 4 * v))  # type: ignore[call-arg]
        store(lanes, 0, tops)  # type: ignore[call-arg]
        for i in range(LANES):
            top = max(top, lanes[i])
    for v in range(whole, logits.shape[0]):
        top = max(top, logits[v])
    for v in range(logits.shape[0]):
        if logits[v] == top:
            return v
    return 0


@njit(**FAST)
def penalize(logits, seen, penalty):  # type: ignore[no-untyped-def]
    """Divide the logits (V,) of tokens that are `seen`, bool (V,), by the penalty; multiply them where negative."""
    for v in range(logits.shape[0]):
        x = logits[v]
        changed = x * penalty if x < 0 else x / penalty
        logits[v] = changed if seen[v] else x


@njit(**LEAF)
def _above(logits, weights, x, equal, start, stop):  # type: ignore[no-untyped-def]
    """How many logits from `start` on exceed x (or equal it, if `equal`), and the sum of their weights."""
    count, total = 0, 0.0
    for first in range(start, stop, _PIECE):
        # Slices: an index that might be negative would keep the loops from being vectorized.
        some, their = logits[first : min(first + _PIECE, stop)], weights[first : min(first + _PIECE, stop)]
        counted, part = np.int32(0), np.float32(0)
        if equal:
            for v in range(some.shape[0]):
                counted += np.int32(some[v] >= x)
                part += their[v] if some[v] >= x else np.float32(0)
        else:
            for v in range(some.shape[0]):
                counted += np.int32(some[v] > x)
                part += their[v] if some[v] > x else np.float32(0)
        count += counted
        total += np.float64(part)
    return count, total


@njit(**LEAF)
def _count_above(logits, x):  # type: ignore[no-untyped-def]
    count = np.int32(0)
    for v in range(logits.shape[0]):
        count += np.int32(logits[v] > x)
    return count


@njit(**LEAF)
def _count_from(logits, x):  # type: ignore[no-untyped-def]
    count = np.int32(0)
    for v in range(logits.shape[0]):
        count += np.int32(logits[v] >= x)
    return count


@njit(**LEAF)
def _weigh(logits, top, temperature, weights):  # type: ignore[no-untyped-def]
    factor = np.float32(1 / temperature)
    for v in range(logits.shape[0]):
        weights[v] = exp_of((logits[v] - top) * factor)


@njit(**LEAF)
def _kept_weight(logits, weights, top, top_k):  # type: ignore[no-untyped-def]
    """The sum of the weights that top-k keeps."""
    V, lowest = logits.shape[0], np.float32(-np.inf)
    low = lowest if top_k <= 0 or top_k >= V else top
    high, step, count = low, np.float32(1), V if low == lowest else _count_from(logits, low)
    while count < top_k and low > lowest:  # down to a logit that at least so many tokens reach
        high, low = low, low - step
        step *= np.float32(2)
        count = _count_from(logits, low)
    while low > lowest and count > top_k:  # `low` has too many and `high` too few, unless tokens tie
        middle = low + (high - low) * np.float32(0.5)
        if middle <= low or middle >= high:
            break
        counted = _count_from(logits, middle)
        if counted >= top_k:
            low, count = middle, counted
        else:
            high = middle
    return _above(logits, weights, low, True, 0, V)[1]


@njit(**EXACT)
def _score(logit, top, temperature, u):  # type: ignore[no-untyped-def]
    """The weight, and what it scores with the uniform number u; rounded as in `sampling`."""
    weight = math.exp((np.float64(logit) - np.float64(top)) / temperature)
    q = np.float32(-math.log1p(-u))
    return weight, (weight / np.float64(q) if q > 0 else np.inf)


@njit(**EXACT)
def draw(logits, weights, words, first, settings, lanes):  # type: ignore[no-untyped-def]
    """The token drawn from logits (V,), or the most probable one at temperature 0; UNDECIDED if rounding decides.

    Args:
        weights: (V,) fp32, scratch; only for top-p.
        words: uint32, of the generator; token v has those at first + 2 v.
        settings: float64, (TEMPERATURE, ..., CLOSE).
        lanes: (16,) fp32, scratch.
    """
    V, likeliest = logits.shape[0], best(logits, lanes)
    top, temperature, top_p, min_p = logits[likeliest], settings[TEMPERATURE], settings[TOP_P], settings[MIN_P]
    if not np.isfinite(top):
        return UNDECIDED
    if temperature == 0:
        return likeliest
    top_k, close = np.int64(settings[TOP_K]), settings[CLOSE]
    all_k, all_p = top_k <= 0 or top_k >= V, top_p >= 1
    kept_sum = 0.0
    if not all_p:
        _weigh(logits, top, temperature, weights)
        kept_sum = _kept_weight(logits, weights, top, top_k)
    chosen, weight, unsure = likeliest, 1.0, 0.0
    _, most = _score(top, top, temperature, uniform(words, first + 2 * likeliest))
    second = 0.0
    # Logits at which tokens are known to be kept, and not to be.
    kept_k, kept_p, lost = top, np.float32(np.inf), np.float32(-np.inf)
    scale = np.float32(LN_2_BITS / temperature)
    whole = V // LANES * LANES
    bound = np.float32(2.0**21 / most * _MARGIN)
    for v in range(0, V, LANES):
        if v < whole:
            mask = contenders(words, first + 2 * v, logits, v, top, scale, bound, lost)  # type: ignore[call-arg]
        else:
            mask = np.int64((1 << (V - v)) - 1)
        at = v
        while mask != 0:
            while mask & 1 == 0:
                mask >>= 1
                at += 1
            token, x = at, logits[at]
            mask >>= 1
            at += 1
            if token == likeliest or x < lost:
                continue
            its_weight, score = _score(x, top, temperature, uniform(words, first + 2 * token))
            if score < most * close:
                continue
            kept, sure = True, True
            if not all_k and x < kept_k:
                if _count_above(logits, x) < top_k:
                    kept_k = x
                else:
                    kept = False
            if kept and not all_p and x <= kept_p:
                tied = _above(logits, weights, x, True, 0, token)[1]
                share = (tied + _above(logits, weights, x, False, token, V)[1]) / kept_sum
                if abs(share - top_p) <= _SUM_ERROR:
                    sure = False
                elif share < top_p:
                    kept_p = x
                else:
                    kept = False
            if kept and min_p > 0:
                if abs(its_weight - min_p) <= _RATIO_ERROR * min_p:
                    sure = False
                elif its_weight < min_p:
                    kept = False
            if not kept:
                lost = max(lost, x)
            elif not sure:
                unsure = max(unsure, score)
            elif score > most:
                second, most, chosen, weight = most, score, token, its_weight
                bound = np.float32(2.0**21 / most * _MARGIN)
            else:
                second = max(second, score)
    if max(second, unsure) >= most * close or weight < _LEAST_WEIGHT or most == np.inf:
        return UNDECIDED
    return chosen


@njit(**FAST)
def _words_of(draws):  # type: ignore[no-untyped-def]
    return carray(pointer(draws[WORDS_AT]), (draws[ROOM],), np.uint32)  # type: ignore[call-arg]


@njit(**FAST)
def _extend(draws, steps):  # type: ignore[no-untyped-def]
    """Compute the words that so many steps need, if there is room for them, in whole blocks."""
    stop = -(-(draws[USED] + steps * draws[PER_STEP]) // WORDS) * WORDS
    if draws[READY] < stop <= draws[ROOM]:
        extend(_words_of(draws), draws[READY], stop)
        draws[READY] = stop


@njit(**FAST)
def prepare(draws):  # type: ignore[no-untyped-def]
    """Compute the words of the next step. Where there is no room behind the last ones, they begin anew."""
    used, words = draws[USED], _words_of(draws)
    if used + draws[PER_STEP] + WORDS > draws[ROOM]:
        block = (used - 1) // WORDS * WORDS
        for n in range(WORDS):
            words[n] = words[block + n]
        draws[USED], draws[READY] = used - block, WORDS
    _extend(draws, 1)


@njit(**FAST)
def draw_rows(thread, threads, draws, logits, M, lanes, tokens):  # type: ignore[no-untyped-def]
    """Choose the next `tokens` (M,) of M texts for logits (M, V), which the penalty changes; a thread has every T-th.

    The last thread then computes the words of the next step, which the first one would have to wait for.
    """
    V, words = logits.shape[1], _words_of(draws)
    settings = carray(pointer(draws[SETTINGS_AT]), (CLOSE + 1,), np.float64)  # type: ignore[call-arg]
    weights = carray(pointer(draws[WEIGHTS_AT] + 4 * V * thread), (V,), np.float32)  # type: ignore[call-arg]
    for m in range(thread, M, threads):
        row = draws[FIRST_ROW + m]
        seen = carray(pointer(draws[SEEN_AT] + row * V), (V,), np.bool_)  # type: ignore[call-arg]
        if draws[SEEN_AT] != 0:
            penalize(logits[m], seen, np.float32(settings[PENALTY]))
        token = draw(logits[m], weights, words, draws[USED] + 2 * V * row, settings, lanes)
        tokens[m] = token
        if draws[SEEN_AT] != 0 and token >= 0:
            seen[token] = True
    if thread > 0 and thread == threads - 1:
        _extend(draws, 2)


# --- from Python -------------------------------------------------------------------------------------------------


def fill(table: Array, draws: Draws, threads: int, rows: Sequence[int]) -> None:
    """Fill the table for a call that chooses tokens for these rows of the draws' batch."""
    seen = 0 if draws.seen is None else draws.seen.ctypes.data
    weights = draws.scratch(threads).ctypes.data
    table[:FIRST_ROW] = (
        1,
        draws.words.ctypes.data,
        weights,
        seen,
        draws.settings.ctypes.data,
        len(draws.words),
        draws.ready,
        draws.used,
        draws.per_step,
        0,
    )
    table[FIRST_ROW : FIRST_ROW + len(rows)] = rows


def finish(table: Array, draws: Draws, rows: Sequence[int], tokens: Array, logits: Array) -> int:
    """Take over what a call has used, and choose the `tokens` of a step left open; the number of such steps, 0 or 1."""
    draws.ready, draws.used = int(table[READY]), int(table[USED])
    if not table[LEFT_OPEN]:
        return 0
    for m, row in enumerate(rows):
        if tokens[m] == UNDECIDED:
            tokens[m] = draws.choose_one(logits[m], row, penalized=True)
    draws.used += draws.per_step
    return 1
