"""Products of four or more vectors of fp32 numbers by the register tiles of `microkernels`, and how these are packed.

Vectors are packed once for all products with them. Rows are unpacked and packed, a panel of a few rows at a time, into
memory that stays in the second-level cache; a panel is multiplied with all vectors before the next one.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .dots import load_sums, sum_of_four
from .formats import BLOCK, FAST, LEAF, ORDERED, STAGED_BLOCK, stage, unpacked, whole_blocks
from .lanes import load_fp32, piecewise, prefetch_far, store_totals
from .microkernels import (
    MOST_VECTORS,
    PRODUCT,
    REGISTER,
    SETS,
    TILE_ROWS,
    tile_of_three,
    tile_of_two,
)

LEAST_VECTORS = 4
"""Vectors from which on register tiles are used."""
ROWS_OF_PANEL = 4 * TILE_ROWS
"""Rows that are unpacked at a time. A register of each of their blocks takes most of the first-level cache."""
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


@njit(**FAST)
def pack_vectors(w, x, packed):  # type: ignore[no-untyped-def]
    """Stage vectors x (M, K) for `multiply_packed`: of each turn, set of sums and block, a register of each vector.

    Args:
        w: see `gemv.matvec`; of a format in FLOATS.
        packed: float32, at least 64 * ceil(K / 64) for each vector; aligned.
    """
    M, K = x.shape
    blocks = whole_blocks(w, K)
    staged = _aligned((K + BLOCK - 1) // BLOCK * STAGED_BLOCK)
    for turn in range((M + MOST_VECTORS - 1) // MOST_VECTORS):
        first, count = turn_of(M, turn)
        for v in range(count):
            stage(w, x[first + v], staged)
            at = PRODUCT * first * blocks + v * REGISTER
            for block in range(blocks):
                for i in range(4):
                    value = load_fp32(staged, PRODUCT * block + 64 * i)  # type: ignore[call-arg]
                    here = at + (i * SETS // 4 * blocks + block) * count * REGISTER
                    _store_pieces(packed, here, blocks * count * REGISTER, value)  # type: ignore[call-arg]


@njit(**LEAF)
def _pack_rows(w, top, stop, blocks, panel):  # type: ignore[no-untyped-def]
    """Unpack ROWS_OF_PANEL rows from `top` on for tiles; the last row stands for those from `stop` on."""
    stride = blocks * TILE_ROWS * REGISTER
    for i in range(ROWS_OF_PANEL):
        row, at = w[min(top + i, stop - 1)], i // TILE_ROWS * SETS * stride + i % TILE_ROWS * REGISTER
        for block in range(blocks):
            weights = unpacked(row, block)
            for j in range(4):
                here = at + j * SETS // 4 * stride + block * TILE_ROWS * REGISTER
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
    lines, parts, part = after.size * after.itemsize // 64, SETS * turns, 0
    for s in range(SETS):
        for turn in range(turns):
            first, count = turn_of(M, turn)
            x_at = PRODUCT * first * blocks + s * blocks * count * REGISTER
            for line in range(lines * part // parts, lines * (part + 1) // parts):
                prefetch_far(after, 64 * line)  # type: ignore[call-arg]
            part += 1
            for i in range(ROWS_OF_PANEL // TILE_ROWS):
                out_at = PRODUCT * TILE_ROWS * (i * M + first) + s * REGISTER
                _tile(panel, (i * SETS + s) * stride, count, packed, x_at, sums, out_at, blocks)


@njit(**ORDERED)
def _write_totals(M, sums, four, rows, out, column):  # type: ignore[no-untyped-def]
    """Write the products of `rows` rows of a panel to `out`; `four` is scratch for as many numbers."""
    for i in range(0, rows, TILE_ROWS):
        for m in range(M):
            at = PRODUCT * (i * M + TILE_ROWS * m)
            s0, s1 = sum_of_four(*load_sums(sums, at)), sum_of_four(*load_sums(sums, at + PRODUCT))
            at += 2 * PRODUCT
            s2, s3 = sum_of_four(*load_sums(sums, at)), sum_of_four(*load_sums(sums, at + PRODUCT))
            store_totals(four, 0, s0, s1, s2, s3)  # type: ignore[call-arg]
            for j in range(min(TILE_ROWS, rows - i)):
                out[m, column + i + j] = four[j]


@njit(**FAST)
def multiply_packed(w, columns, M, packed, out, column, start, stop):  # type: ignore[no-untyped-def]
    """Products of rows `start` to `stop` with M (2 or more) packed vectors, but for `formats.finish`, to `out`."""
    blocks = whole_blocks(w, columns)
    panel = _aligned(ROWS_OF_PANEL * blocks * BLOCK)
    sums, four = _aligned(ROWS_OF_PANEL * M * BLOCK), np.empty(4, np.float32)
    for top in range(start, stop, ROWS_OF_PANEL):
        rows = min(ROWS_OF_PANEL, stop - top)
        _pack_rows(w, top, stop, blocks, panel)
        _panel_sums(M, blocks, packed, panel, sums, w[top + rows : min(top + rows + ROWS_OF_PANEL, stop)])
        _write_totals(M, sums, four, rows, out, column + top)
