"""Products of a few vectors with rows that are read and unpacked once for all of them.

`gemv.matvec` goes over a row once for each vector: from the nearest cache, but each time all loads and conversions are
done again, and with eight vectors these are most of a step. Here two rows and two vectors are worked on at once in
registers. Sums are those of `formats.row_dot`, in its order, so that a vector's product has the same bits as alone.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.extending import overload

from .formats import _UNPACKED, BLOCK, FAST, INNER, Array, finish, stage, sum_of_four, unpacked, whole_blocks
from .gemv import ROW_BLOCK, add_rows, matvec
from .lanes import load_fp32, multiply_add, prefetch_far, store, store_totals

GROUP = 8
"""Rows that are multiplied with all vectors before the next ones; a multiple of ROW_BLOCK."""
PANEL = 24
"""Blocks of these rows that are worked on at a time: they and two vectors' blocks stay in the first-level cache."""

ROWS_AT_ONCE = 64
"""Rows that are added for one vector after the other; they stay in the second-level cache."""


@njit(**FAST)
def _two_by_two(w0, w1, x, y, first, last, whole, sums, after0, after1, turn, turns):  # type: ignore[no-untyped-def]
    """Add blocks `first` to `last` of two rows times two vectors to their sums.

    sums is (2 rows, 2 vectors, 64) fp32; a row has `whole` blocks. Of the rows that follow, `after0` and `after1`, each
    `turns`th block is asked for.
    """
    a0, b0, c0, d0 = _four(sums[0, 0], 0)
    a1, b1, c1, d1 = _four(sums[1, 0], 0)
    a2, b2, c2, d2 = _four(sums[0, 1], 0)
    a3, b3, c3, d3 = _four(sums[1, 1], 0)
    step = w0.shape[0] * w0.itemsize // whole
    wait = turn
    for i in range(first, last):
        if wait == 0:
            wait = turns
            for line in range(0, step, 64):
                prefetch_far(after0, i * step + line)  # type: ignore[call-arg]
                prefetch_far(after1, i * step + line)  # type: ignore[call-arg]
        wait -= 1
        p0, p1, p2, p3 = unpacked(w0, i)
        q0, q1, q2, q3 = unpacked(w1, i)
        at = i * 256
        u, v = load_fp32(x, at), load_fp32(y, at)  # type: ignore[call-arg]
        a0, a1 = multiply_add(p0, u, a0), multiply_add(q0, u, a1)  # type: ignore[call-arg]
        a2, a3 = multiply_add(p0, v, a2), multiply_add(q0, v, a3)  # type: ignore[call-arg]
        u, v = load_fp32(x, at + 64), load_fp32(y, at + 64)  # type: ignore[call-arg]
        b0, b1 = multiply_add(p1, u, b0), multiply_add(q1, u, b1)  # type: ignore[call-arg]
        b2, b3 = multiply_add(p1, v, b2), multiply_add(q1, v, b3)  # type: ignore[call-arg]
        u, v = load_fp32(x, at + 128), load_fp32(y, at + 128)  # type: ignore[call-arg]
        c0, c1 = multiply_add(p2, u, c0), multiply_add(q2, u, c1)  # type: ignore[call-arg]
        c2, c3 = multiply_add(p2, v, c2), multiply_add(q2, v, c3)  # type: ignore[call-arg]
        u, v = load_fp32(x, at + 192), load_fp32(y, at + 192)  # type: ignore[call-arg]
        d0, d1 = multiply_add(p3, u, d0), multiply_add(q3, u, d1)  # type: ignore[call-arg]
        d2, d3 = multiply_add(p3, v, d2), multiply_add(q3, v, d3)  # type: ignore[call-arg]
    _keep(sums[0, 0], a0, b0, c0, d0)
    _keep(sums[1, 0], a1, b1, c1, d1)
    _keep(sums[0, 1], a2, b2, c2, d2)
    _keep(sums[1, 1], a3, b3, c3, d3)


@njit(**INNER)
def _four(values, at):  # type: ignore[no-untyped-def]
    a, b = load_fp32(values, at), load_fp32(values, at + 64)  # type: ignore[call-arg]
    return a, b, load_fp32(values, at + 128), load_fp32(values, at + 192)  # type: ignore[call-arg]


@njit(**INNER)
def _keep(values, a, b, c, d):  # type: ignore[no-untyped-def]
    store(values, 0, a)  # type: ignore[call-arg]
    store(values, 64, b)  # type: ignore[call-arg]
    store(values, 128, c)  # type: ignore[call-arg]
    store(values, 192, d)  # type: ignore[call-arg]


@njit(**INNER)
def _sum_of(values):  # type: ignore[no-untyped-def]
    """Four times sixteen sums as sixteen."""
    a, b, c, d = _four(values, 0)
    return sum_of_four(a, b, c, d)


@njit(**FAST)
def _by_tiles(w, x, staged, out, column, start, stop):  # type: ignore[no-untyped-def]
    M, blocks = x.shape[0], whole_blocks(w, x.shape[1])
    turns = (M + 1) // 2
    sums = np.empty((turns, GROUP // 2, 2, 2, BLOCK), np.float32)
    for top in range(start, stop, GROUP):
        pairs = (min(top + GROUP, stop) - top) // 2
        sums[:] = np.float32(0)
        for first in range(0, blocks, PANEL):
            last = min(first + PANEL, blocks)
            for turn in range(turns):
                # The last of an odd number of vectors is worked on twice.
                f, g = staged[2 * turn], staged[min(2 * turn + 1, M - 1)]
                for pair in range(pairs):
                    r = top + 2 * pair
                    after = min(r + GROUP, stop - 2)
                    _two_by_two(
                        w[r], w[r + 1], f, g, first, last, blocks, sums[turn, pair], w[after], w[after + 1], turn, turns
                    )
        for m in range(M):
            for pair in range(0, pairs, 2):
                s, t = sums[m // 2, pair, :, m % 2], sums[m // 2, pair + 1, :, m % 2]
                s0, s1, s2, s3 = _sum_of(s[0]), _sum_of(s[1]), _sum_of(t[0]), _sum_of(t[1])
                store_totals(out[m], 4 * (column + top + 2 * pair), s0, s1, s2, s3)  # type: ignore[call-arg]


def multiply(w: Array, extras: Array, x: Array, staged: Array, out: Array, column: int, start: int, stop: int) -> None:
    """As `gemv.matvec`, bit for bit, in less time for several vectors."""
    raise NotImplementedError("only within compiled code")


@overload(multiply)
def _multiply(w, extras, x, staged, out, column, start, stop):  # type: ignore[no-untyped-def]
    if w.dtype not in _UNPACKED:
        return lambda w, extras, x, staged, out, column, start, stop: matvec(
            w, extras, x, staged, out, column, start, stop
        )

    def run(w, extras, x, staged, out, column, start, stop):  # type: ignore[no-untyped-def]
        M, K = x.shape
        if M == 1 or K < BLOCK:
            matvec(w, extras, x, staged, out, column, start, stop)
            return
        for m in range(M):
            stage(w, x[m], staged[m])
        whole = start + (stop - start) // ROW_BLOCK * ROW_BLOCK
        _by_tiles(w, x, staged, out, column, start, whole)
        finish(w, extras, x, out, column, start, whole)
        if whole < stop:
            matvec(w, extras, x, staged, out, column, whole, stop)

    return run


@njit(**FAST)
def add_rows_of(w, extras, columns, scales, rows, counts, start, stop, out):  # type: ignore[no-untyped-def]
    """`gemv.add_rows` for each of several vectors, bit for bit, so that a row comes from memory once for all of them.

    Args:
        w, extras, columns: as there.
        scales: (M, F) float32. rows: (M, >= counts[m]) int32, ascending, from `start` to `stop` - 1.
        counts: (M,) rows of each vector.
        out: (>= M, >= columns) float32.
    """
    M = scales.shape[0]
    # The order in which columns behind the last whole block, and escapes, are added depends on where lists are cut.
    whole = M == 1 or columns % BLOCK != 0 or extras.shape[0] != 0
    step = stop - start if whole else ROWS_AT_ONCE
    begins = np.zeros(M, np.int64)
    for last in range(start + step, stop + step, step):
        for m in range(M):
            begin = end = begins[m]
            while end < counts[m] and rows[m, end] < last:
                end += 1
            add_rows(w, extras, columns, scales[m], rows[m, begin:], end - begin, out[m])
            begins[m] = end
