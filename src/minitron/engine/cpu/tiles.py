"""Products of a few vectors with rows that are read and unpacked once for all of them.

`gemv.matvec` reads a row once for each vector and repeats all loads and conversions; with eight vectors these are most
of a step. Here up to four vectors are multiplied at once in registers, and a row is read in one stream. Without AVX-512
there are too few registers for that: four or more vectors of fp32 numbers are multiplied in the register tiles of
`microkernels`. Sums are those of `dots.row_dot`, in its order, so that a vector's product has the same bits as alone.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.extending import overload

from . import formats
from .dots import FLOATS, dots_of_four, dots_of_two, load_sums, panel_of_four, row_dot, sum_of_four
from .formats import AHEAD, BLOCK, FAST, LEAF, Array, add_escapes, finish, row_factor, whole_blocks
from .gemv import add_block, add_rows
from .lanes import prefetch, store_totals, total
from .microkernels import USED
from .register_tiles import LEAST_VECTORS, multiply_packed, pack_vectors

PANEL = 24
"""Units of rows in a panel, used where whole vectors do not stay in the first-level cache."""
GROUP = 16
"""Rows whose panels are processed before their next panels."""
VECTORS_IN_CACHE = 8
"""Vectors up to which a row is multiplied with all of them before the next row."""
COLUMNS_AT_ONCE = 16
"""Blocks of rows that are added for all vectors at a time: their sums stay in the first-level cache."""


@njit(**LEAF)
def _side_by_side(w, staged, columns, M, four, out, column, start, stop):  # type: ignore[no-untyped-def]
    """Products with staged vectors (M, ...); `four` is scratch for as many numbers."""
    whole = (M + 1) // 4 * 4  # a remainder of three is computed as four
    rows = GROUP if M > VECTORS_IN_CACHE else 1
    for top in range(start, stop, rows):
        for m in range(0, whole, 4):
            x0, x1, x2, x3 = staged[m], staged[m + 1], staged[m + 2], staged[min(m + 3, M - 1)]
            for r in range(top, min(top + rows, stop)):
                s0, s1, s2, s3 = dots_of_four(w[r], x0, x1, x2, x3, columns)
                store_totals(four, 0, s0, s1, s2, s3)  # type: ignore[call-arg]
                for i in range(min(4, M - m)):
                    out[m + i, column + r] = four[i]
    for r in range(start, stop if whole < M else start):
        row = w[r]
        for m in range(whole, M - 1):  # a remainder of two
            s0, s1 = dots_of_two(row, staged[m], staged[m + 1], columns)
            out[m, column + r], out[m + 1, column + r] = total(s0), total(s1)  # type: ignore[call-arg]
        for m in range(whole + (M - whole) // 2 * 2, M):
            out[m, column + r] = total(row_dot(row, staged[m], columns))  # type: ignore[call-arg]


@njit(**LEAF)
def _in_panels(w, staged, columns, M, sums, four, out, column, start, stop):  # type: ignore[no-untyped-def]
    """As `_side_by_side` for formats in FLOATS, but for a part of the columns at a time; M is 3 or more.

    sums: (ceil(M / 4), GROUP, 4, 64) fp32, scratch.
    """
    blocks = whole_blocks(w, columns)
    turns = (M + 3) // 4
    for top in range(start, stop, GROUP):
        rows = min(GROUP, stop - top)
        sums[:] = np.float32(0)
        for first in range(0, blocks, PANEL):
            last = min(first + PANEL, blocks)
            for turn in range(turns):
                m = 4 * turn
                x0, x1 = staged[m], staged[min(m + 1, M - 1)]
                x2, x3 = staged[min(m + 2, M - 1)], staged[min(m + 3, M - 1)]
                for i in range(rows):
                    row = w[top + i]
                    # Prefetch what comes after the last turn: the next panel, or later rows.
                    after = row if last < blocks else w[min(top + i + GROUP, stop - 1)]
                    shift = PANEL if last < blocks else -first
                    panel_of_four(row, x0, x1, x2, x3, first, last, sums[turn, i], after, shift)
        for turn in range(turns):
            for i in range(rows):
                found = sums[turn, i]
                s0, s1 = sum_of_four(*load_sums(found, 0)), sum_of_four(*load_sums(found, 256))
                s2, s3 = sum_of_four(*load_sums(found, 512)), sum_of_four(*load_sums(found, 768))
                store_totals(four, 0, s0, s1, s2, s3)  # type: ignore[call-arg]
                for m in range(4 * turn, min(4 * turn + 4, M)):
                    out[m, column + top + i] = four[m - 4 * turn]


# --- products of several vectors ---------------------------------------------------------------------------------


def stage(w: Array, x: Array, staged: Array) -> None:
    """Lay out vectors x (M, K) for `multiply`.

    Args:
        w: see `gemv.matvec`.
        staged: (>= M, >= STAGED_BLOCK * ceil(K / 64)) float32, contiguous.
    """
    raise NotImplementedError("only within compiled code")


@njit(**LEAF)
def _stage_each(w, x, staged):  # type: ignore[no-untyped-def]
    for m in range(x.shape[0]):
        formats.stage(w, x[m], staged[m])


@overload(stage)
def _overload_stage(w, x, staged):  # type: ignore[no-untyped-def]
    def for_tiles(w, x, staged):  # type: ignore[no-untyped-def]
        if x.shape[0] < LEAST_VECTORS:
            _stage_each(w, x, staged)
        else:
            pack_vectors(w, x, staged.reshape(-1))

    return for_tiles if USED and w.dtype in FLOATS else lambda w, x, staged: _stage_each(w, x, staged)


def multiply(w: Array, extras: Array, x: Array, staged: Array, out: Array, column: int, start: int, stop: int) -> None:
    """As `gemv.staged_matvec`, bit for bit, in less time for several vectors; `staged` is x, see `stage`."""
    raise NotImplementedError("only within compiled code")


LONG_VECTOR = 32
"""Blocks from which on three or more vectors of fp32 numbers take most of the first-level cache."""


def _several(w: Array, staged: Array, columns: int, M: int, out: Array, column: int, start: int, stop: int) -> None:
    """Products with several staged vectors."""
    raise NotImplementedError("only within compiled code")


@overload(_several)
def _overload_several(w, staged, columns, M, out, column, start, stop):  # type: ignore[no-untyped-def]
    def one_stream(w, staged, columns, M, out, column, start, stop):  # type: ignore[no-untyped-def]
        _side_by_side(w, staged, columns, M, np.empty(4, np.float32), out, column, start, stop)

    def by_length(w, staged, columns, M, out, column, start, stop):  # type: ignore[no-untyped-def]
        four = np.empty(4, np.float32)
        if M < 3 or whole_blocks(w, columns) < LONG_VECTOR:
            _side_by_side(w, staged, columns, M, four, out, column, start, stop)
        else:
            sums = np.empty(((M + 3) // 4, GROUP, 4, BLOCK), np.float32)
            _in_panels(w, staged, columns, M, sums, four, out, column, start, stop)

    def by_number(w, staged, columns, M, out, column, start, stop):  # type: ignore[no-untyped-def]
        if M < LEAST_VECTORS:
            _side_by_side(w, staged, columns, M, np.empty(4, np.float32), out, column, start, stop)
        else:
            multiply_packed(w, columns, M, staged.reshape(-1), out, column, start, stop)

    if w.dtype not in FLOATS:
        return one_stream
    return by_number if USED else by_length


@overload(multiply)
def _multiply(w, extras, x, staged, out, column, start, stop):  # type: ignore[no-untyped-def]
    def run(w, extras, x, staged, out, column, start, stop):  # type: ignore[no-untyped-def]
        M, K = x.shape
        _several(w, staged, K, M, out, column, start, stop)
        finish(w, extras, x, out, column, start, stop)

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
    M, blocks = scales.shape[0], whole_blocks(w, columns)
    # Columns behind the last whole block are added in fours, whose order depends on the vector's own rows.
    if M == 1 or columns % BLOCK != 0:
        for m in range(M):
            add_rows(w, extras, columns, scales[m], rows[m], counts[m], out[m], AHEAD)
        return
    union = np.empty(stop - start, np.int32)
    n = 0
    for f in range(start, stop):
        union[n] = f
        for m in range(M):
            if scales[m, f] != np.float32(0):
                n += 1
                break
    for first in range(0, blocks, COLUMNS_AT_ONCE):
        _add_union(w, extras, columns, scales, union, n, out, first, min(first + COLUMNS_AT_ONCE, blocks))
    for m in range(M):
        for j in range(counts[m]):
            add_escapes(w, extras, rows[m, j], scales[m, rows[m, j]], out[m])


@njit(**LEAF)
def _add_union(w, extras, columns, scales, union, n, out, first, last):  # type: ignore[no-untyped-def]
    """Blocks `first` to `last` of the rows that at least one vector needs, added for each vector that needs them."""
    step = w.shape[1] * w.itemsize // whole_blocks(w, columns)
    for j in range(n):
        f = union[j]
        values, after = w[f], w[union[min(j + 2, n - 1)]]
        for line in range(first * step, last * step, 64):
            prefetch(after, line)  # type: ignore[call-arg]
        factor = row_factor(w, extras, f)
        for m in range(scales.shape[0]):
            scale = scales[m, f] * factor
            if scale != np.float32(0):
                for block in range(first, last):
                    add_block(values, block, columns, scale, out[m])
