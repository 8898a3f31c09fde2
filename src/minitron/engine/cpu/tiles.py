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

from .dots import FLOATS, dots_of_four, dots_of_two, load_sums, panel_of_four, row_dot, sum_of_four
from .formats import (
    BLOCK,
    FAST,
    LEAF,
    ORDERED,
    Array,
    add_escapes,
    finish,
    row_factor,
    unpacked,
    whole_blocks,
)
from .gemv import add_block, add_rows, staged_matvec
from .lanes import load_fp32, piecewise, prefetch, prefetch_far, store_totals, total
from .microkernels import (
    GROUPS,
    MOST_VECTORS,
    REGISTER,
    TILE_ROWS,
    USED,
    tile_of_three,
    tile_of_two,
)

PANEL = 24
"""Units of rows in a panel, used where whole vectors do not stay in the first-level cache."""
GROUP = 16
"""Rows whose panels are processed before their next panels."""
COLUMNS_AT_ONCE = 16
"""Blocks of rows that are added for all vectors at a time: their sums stay in the first-level cache."""


@njit(**LEAF)
def _side_by_side(w, staged, columns, M, four, out, column, start, stop):  # type: ignore[no-untyped-def]
    """Products with staged vectors (M, ...); `four` is scratch for as many numbers."""
    whole = (M + 1) // 4 * 4  # a remainder of three is computed as four
    for r in range(start, stop):
        row = w[r]
        for m in range(0, whole, 4):
            x0, x1, x2, x3 = staged[m], staged[m + 1], staged[m + 2], staged[min(m + 3, M - 1)]
            s0, s1, s2, s3 = dots_of_four(row, x0, x1, x2, x3, columns)
            store_totals(four, 0, s0, s1, s2, s3)  # type: ignore[call-arg]
            for i in range(min(4, M - m)):
                out[m + i, column + r] = four[i]
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


# --- register tiles ----------------------------------------------------------------------------------------------

LEAST_VECTORS = 4
"""Vectors of fp32 numbers from which on register tiles are used, and the rows of a panel that is unpacked for them."""
ROWS_OF_PANEL = 2 * TILE_ROWS
_store_pieces = piecewise(64 // REGISTER)


@njit(**FAST)
def _aligned(size):  # type: ignore[no-untyped-def]
    """Scratch memory of so many fp32 numbers, which begins with a cache line."""
    memory = np.empty(size + 16, np.float32)
    first = -(memory.ctypes.data // 4) % 16
    return memory[first : first + size]


@njit(**LEAF)
def turn_of(M, turn):  # type: ignore[no-untyped-def]
    """The first vector and the number of vectors of a turn; the numbers of all turns differ by at most 1."""
    turns = (M + MOST_VECTORS - 1) // MOST_VECTORS
    least, larger = M // turns, M % turns
    return turn * least + min(turn, larger), least + (turn < larger)


@njit(**LEAF)
def _pack_vectors(staged, blocks, M, packed):  # type: ignore[no-untyped-def]
    """Staged vectors for tiles: of each turn, group of sums and block, a register of each vector."""
    for turn in range((M + MOST_VECTORS - 1) // MOST_VECTORS):
        first, count = turn_of(M, turn)
        for v in range(count):
            row, at = staged[first + v], 256 * first * blocks + v * REGISTER
            for block in range(blocks):
                for i in range(4):
                    value = load_fp32(row, 256 * block + 64 * i)  # type: ignore[call-arg]
                    here = at + (i * GROUPS // 4 * blocks + block) * count * REGISTER
                    _store_pieces(packed, here, blocks * count * REGISTER, value)  # type: ignore[call-arg]


@njit(**LEAF)
def _pack_rows(w, top, stop, blocks, panel):  # type: ignore[no-untyped-def]
    """Unpack ROWS_OF_PANEL rows from `top` on for tiles; the last row stands for those from `stop` on."""
    stride = blocks * TILE_ROWS * REGISTER
    for i in range(ROWS_OF_PANEL):
        row, at = w[min(top + i, stop - 1)], i // TILE_ROWS * GROUPS * stride + i % TILE_ROWS * REGISTER
        for block in range(blocks):
            weights = unpacked(row, block)
            for j in range(4):
                here = at + j * GROUPS // 4 * stride + block * TILE_ROWS * REGISTER
                _store_pieces(panel, here, stride, weights[j])  # type: ignore[call-arg]


@njit(**ORDERED)
def _tile(panel, at, count, packed, x_at, sums, out_at, blocks):  # type: ignore[no-untyped-def]
    if count == 2:
        tile_of_two(panel, at, packed, x_at, sums, out_at, blocks)  # type: ignore[call-arg]
    else:
        tile_of_three(panel, at, packed, x_at, sums, out_at, blocks)  # type: ignore[call-arg]


@njit(**LEAF)
def _panel_sums(M, blocks, packed, panel, sums, after):  # type: ignore[no-untyped-def]
    """The sums of a panel's rows and all vectors; meanwhile the rows `after` are prefetched."""
    turns, stride = (M + MOST_VECTORS - 1) // MOST_VECTORS, blocks * TILE_ROWS * REGISTER
    tiles_of_panel = ROWS_OF_PANEL // TILE_ROWS
    lines, parts, part = after.size * after.itemsize // 64, GROUPS * turns, 0
    for group in range(GROUPS):
        for turn in range(turns):
            first, count = turn_of(M, turn)
            x_at = 256 * first * blocks + group * blocks * count * REGISTER
            for line in range(lines * part // parts, lines * (part + 1) // parts):
                prefetch_far(after, 64 * line)  # type: ignore[call-arg]
            part += 1
            for i in range(tiles_of_panel):
                out_at = 256 * TILE_ROWS * (i * M + first) + group * REGISTER
                _tile(panel, (i * GROUPS + group) * stride, count, packed, x_at, sums, out_at, blocks)


@njit(**ORDERED)
def _write_totals(M, sums, four, rows, out, column):  # type: ignore[no-untyped-def]
    """Write the products of `rows` rows of a panel to `out`; `four` is scratch for as many numbers."""
    for i in range(0, rows, TILE_ROWS):
        for m in range(M):
            at = 256 * TILE_ROWS * (i // TILE_ROWS * M + m)
            s0, s1 = sum_of_four(*load_sums(sums, at)), sum_of_four(*load_sums(sums, at + 256))
            s2, s3 = sum_of_four(*load_sums(sums, at + 512)), sum_of_four(*load_sums(sums, at + 768))
            store_totals(four, 0, s0, s1, s2, s3)  # type: ignore[call-arg]
            for j in range(min(TILE_ROWS, rows - i)):
                out[m, column + i + j] = four[j]


@njit(**FAST)
def _in_tiles(w, staged, columns, M, out, column, start, stop):  # type: ignore[no-untyped-def]
    """As `_side_by_side` for formats in FLOATS; M is 2 or more."""
    blocks = whole_blocks(w, columns)
    packed, panel = _aligned(M * blocks * BLOCK), _aligned(ROWS_OF_PANEL * blocks * BLOCK)
    sums, four = _aligned(ROWS_OF_PANEL * M * BLOCK), np.empty(4, np.float32)
    _pack_vectors(staged, blocks, M, packed)
    for top in range(start, stop, ROWS_OF_PANEL):
        rows = min(ROWS_OF_PANEL, stop - top)
        _pack_rows(w, top, stop, blocks, panel)
        _panel_sums(M, blocks, packed, panel, sums, w[top + rows : min(top + rows + ROWS_OF_PANEL, stop)])
        _write_totals(M, sums, four, rows, out, column + top)


# --- products of several vectors ---------------------------------------------------------------------------------


def multiply(w: Array, extras: Array, x: Array, staged: Array, out: Array, column: int, start: int, stop: int) -> None:
    """As `gemv.staged_matvec`, bit for bit, in less time for several vectors."""
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
            _in_tiles(w, staged, columns, M, out, column, start, stop)

    if w.dtype not in FLOATS:
        return one_stream
    return by_number if USED else by_length


@overload(multiply)
def _multiply(w, extras, x, staged, out, column, start, stop):  # type: ignore[no-untyped-def]
    def run(w, extras, x, staged, out, column, start, stop):  # type: ignore[no-untyped-def]
        M, K = x.shape
        if M == 1:
            staged_matvec(w, extras, x, staged, out, column, start, stop)
            return
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
            add_rows(w, extras, columns, scales[m], rows[m], counts[m], out[m])
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
