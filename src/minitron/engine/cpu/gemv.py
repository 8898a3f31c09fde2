"""Products with a few vectors, in Numba: most of the time of decoding. Each kernel has its plain reference here.

Weights are read once, in rows, and widened to fp32 in registers; sums are fp32. A row's sum does not depend on how
many vectors are multiplied at once nor on how rows are shared among threads, so a token gets the same bits alone, in
a draft of eight, and on any number of cores. Kernels take the range of rows (or columns) of one thread and run without
the GIL; the caller starts the threads (`engine.cpu.engine`).

Letters: M vectors, N rows, K columns of a matrix (N, K); F MLP neurons, D hidden width. A bf16 matrix is its bits as
uint16. Importing this file compiles nothing, but loads Numba: import it only where a kernel is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from .dots import SHORT_ROW, four_dots, load_sums, row_dot, store_sums
from .formats import (
    AHEAD,
    BLOCK,
    INNER,
    LEAF,
    Array,
    add_escapes,
    ask_ahead,
    block_add,
    finish,
    row_factor,
    stage,
    whole_blocks,
    widen,
)
from .lanes import bits_of_float, float_of_bits, prefetch, store_totals, total

ROW_BLOCK = 4
"""Rows whose sums run together; a thread's first row must be a multiple of it."""
LONG_ROW = 2048
"""Bytes of a row from which on rows that follow each other are added one by one."""
NONE = np.zeros(0, np.int32)
"""The extras of a matrix that has none."""


# --- references --------------------------------------------------------------------------------------------------


def widen_reference(w: Array) -> Array:
    """Weights as float64: bf16 bits (uint16) or float32."""
    if w.dtype == np.uint16:
        w = (w.astype(np.uint32) << 16).view(np.float32)
    return w.astype(np.float64)


def matvec_reference(w: Array, x: Array) -> Array:
    """`x @ w.T` in float64: w (N, K), x (M, K) to (M, N)."""
    return x.astype(np.float64) @ widen_reference(w).T


def squared_relu_reference(h: Array) -> Array:
    """`max(h, 0) ** 2`, elementwise."""
    return np.square(np.maximum(h, 0))


def silu_reference(x: Array) -> Array:
    """`x / (1 + exp(-x))` in float64, elementwise."""
    x = x.astype(np.float64)
    return x / (1 + np.exp(-x))


def down_reference(w_t: Array, h: Array) -> Array:
    """`h @ w_t` in float64: the down projection w_t (F, D), activations h (M, F) to (M, D)."""
    return h.astype(np.float64) @ widen_reference(w_t)


# --- single values -----------------------------------------------------------------------------------------------


@njit(fastmath={"contract"}, nogil=True)  # reordering would join the two parts of ln 2
def exp_of(x):  # type: ignore[no-untyped-def]
    """`exp(x)` for x <= 0 in fp32 arithmetic that vectorizes, unlike the C library's; relative error below 2e-7."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    # x - n ln 2, in two parts so that no bits are lost; then a Taylor polynomial on |r| <= ln(2) / 2.
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = np.float32(1 / 5040)
    for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = p * r + np.float32(c)
    return p * float_of_bits(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))  # type: ignore[call-arg]


@njit(**LEAF)
def bf16_of_float(value):  # type: ignore[no-untyped-def]
    """Bits of the nearest bf16 number, ties to even; NaN stays NaN."""
    bits = bits_of_float(value)  # type: ignore[call-arg]
    if value != value:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


def narrowed(array: Array, value: float) -> Any:
    """An fp32 number as an array of bf16 bits or fp32 stores it."""
    raise NotImplementedError("only within compiled code")


@overload(narrowed, inline="always")
def _narrowed(array, value):  # type: ignore[no-untyped-def]
    if array.dtype == types.uint16:
        return lambda array, value: bf16_of_float(value)
    return lambda array, value: value


# --- kernels -----------------------------------------------------------------------------------------------------


@njit(**LEAF)
def matvec(w: Array, extras: Array, x: Array, staged: Array, out: Array, column: int, start: int, stop: int) -> None:
    """`out[m, column + r] = w[r] . x[m]` for rows start <= r < stop.

    Args:
        w: (N, items of a row), see `formats.KINDS` and `formats.row_items`. extras: of bf12, see `quantize.Matrix`.
        x: (M, K) float32. staged: (>= M, >= STAGED_BLOCK * ceil(K / 64)) float32, scratch.
        out: (M, >= column + N) float32.
        start: multiple of ROW_BLOCK.
    """
    for m in range(x.shape[0]):
        stage(w, x[m], staged[m])
    staged_matvec(w, extras, x, staged, out, column, start, stop, AHEAD, SHORT_ROW)


@njit(**LEAF)
def staged_matvec(w, extras, x, staged, out, column, start, stop, ahead, short):  # type: ignore[no-untyped-def]
    """`matvec` where x is staged already; the same bits for any `ahead` and `short`.

    Args:
        ahead: bytes by which memory is prefetched before it is needed; 0 for not at all.
        short: columns up to which four rows are read side by side.
    """
    M, K = x.shape
    whole = start if short < K else start + (stop - start) // ROW_BLOCK * ROW_BLOCK
    for r in range(start, whole, ROW_BLOCK):
        w0, w1, w2, w3 = w[r], w[r + 1], w[r + 2], w[r + 3]
        for m in range(M):
            s0, s1, s2, s3 = four_dots(w0, w1, w2, w3, staged[m], K, ahead)
            store_totals(out[m], 4 * (column + r), s0, s1, s2, s3)  # type: ignore[call-arg]
    for r in range(whole, stop):
        row = w[r]
        for m in range(M):
            out[m, column + r] = total(row_dot(row, staged[m], K, ahead))  # type: ignore[call-arg]
    finish(w, extras, x, out, column, start, stop)


@njit(**LEAF)
def squared_relu_list(h: Array, active: Array, start: int, stop: int) -> int:
    """Square the positive values of h[start:stop] in place, zero the others, and list those that are not zero.

    Args:
        h: (F,) float32.
        active: (F,) int32; the neurons' numbers are written to active[start:].

    Returns:
        how many there are.
    """
    values, found = h[start:stop], active[start:stop]
    n = 0
    for f in range(values.shape[0]):
        v = max(values[f], np.float32(0))
        # A NaN must reach the output; `max` above has dropped it.
        v = v * v if values[f] == values[f] else values[f]
        values[f] = v
        found[n] = start + f  # overwritten by the next neuron unless this one counts
        n += v != np.float32(0)
    return n


@njit(**LEAF)
def times_silu(gate: Array, h: Array) -> None:
    """`h *= silu(gate)`, elementwise and in place; silu(x) is x / (1 + exp(-x)). Both are (n,) float32."""
    for f in range(h.shape[0]):
        small = exp_of(-abs(gate[f]))
        h[f] *= gate[f] * ((np.float32(1) if gate[f] >= 0 else small) / (np.float32(1) + small))


@njit(**LEAF)
def _add_four(w, columns, f0, f1, f2, f3, s0, s1, s2, s3, after, out):  # type: ignore[no-untyped-def]
    """Add four rows, times numbers, to `out`; `after` are the four rows that come next."""
    w0, w1, w2, w3 = w[f0], w[f1], w[f2], w[f3]
    g0, g1, g2, g3 = w[after[0]], w[after[1]], w[after[2]], w[after[3]]
    blocks = whole_blocks(w, columns)
    step = w0.shape[0] * w.itemsize // max(blocks, 1)
    for block in range(blocks):
        for line in range(block * step, (block + 1) * step, 64):
            prefetch(g0, line)  # type: ignore[call-arg]
            prefetch(g1, line)  # type: ignore[call-arg]
            prefetch(g2, line)  # type: ignore[call-arg]
            prefetch(g3, line)  # type: ignore[call-arg]
        at = block * 4 * BLOCK
        a, b, c, d = load_sums(out, at)
        a, b, c, d = block_add(w0, block, columns, s0, a, b, c, d)
        a, b, c, d = block_add(w1, block, columns, s1, a, b, c, d)
        a, b, c, d = block_add(w2, block, columns, s2, a, b, c, d)
        a, b, c, d = block_add(w3, block, columns, s3, a, b, c, d)
        store_sums(out, at, (a, b, c, d))
    for k in range(blocks * BLOCK, columns):
        out[k] += (s0 * widen(w0[k]) + s1 * widen(w1[k])) + (s2 * widen(w2[k]) + s3 * widen(w3[k]))


@njit(**LEAF)
def add_row(w: Array, extras: Array, columns: int, row: int, scale: Any, out: Array, ahead: int = AHEAD) -> None:
    """`out += scale * w[row]` but for bf12's escapes, see `add_rows`."""
    scale *= row_factor(w, extras, row)
    values = w[row]
    blocks = whole_blocks(w, columns)
    asking = blocks if ahead > 0 else 0
    step = values.shape[0] * w.itemsize // max(blocks, 1)
    for block in range(asking):
        ask_ahead(values, block * step, ahead)
        ask_ahead(values, block * step + 64, ahead)
        add_block(values, block, columns, scale, out)
    for block in range(asking, blocks):
        add_block(values, block, columns, scale, out)
    for k in range(blocks * BLOCK, columns):
        out[k] += scale * widen(values[k])


@njit(**INNER)
def add_block(values, block, columns, scale, out):  # type: ignore[no-untyped-def]
    """Add 64 columns of a row, times a number, to `out`."""
    at = block * 4 * BLOCK
    a, b, c, d = load_sums(out, at)
    store_sums(out, at, block_add(values, block, columns, scale, a, b, c, d))


@njit(**LEAF)
def add_rows(
    w: Array, extras: Array, columns: int, scales: Array, rows: Array, n: int, out: Array, ahead: int = AHEAD
) -> None:
    """`out += sum(scales[rows[j]] * w[rows[j]] for j < n)`.

    Args:
        w: (F, items of a row of `columns`). extras: as in `matvec`.
        scales: (F,) float32. rows: (>= n,) int32.
        out: (>= columns,) float32; where w is packed, columns are rounded up to 64.
        ahead: as in `staged_matvec`, where rows follow each other.
    """
    whole = n // 4 * 4
    long = w.shape[1] * w.itemsize >= LONG_ROW
    for j in range(0, whole, 4):
        f0, f1, f2, f3 = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
        if f3 - f0 == 3 and long:  # without a gap, memory is fastest in one stream
            for f in range(f0, f0 + 4):
                add_row(w, extras, columns, f, scales[f], out, ahead)
            continue
        s0, s1 = scales[f0] * row_factor(w, extras, f0), scales[f1] * row_factor(w, extras, f1)
        s2, s3 = scales[f2] * row_factor(w, extras, f2), scales[f3] * row_factor(w, extras, f3)
        after = min(j + 4, n - 4)
        _add_four(w, columns, f0, f1, f2, f3, s0, s1, s2, s3, rows[after : after + 4], out)
    for j in range(whole, n):
        add_row(w, extras, columns, rows[j], scales[rows[j]], out, ahead)
    for j in range(n):
        add_escapes(w, extras, rows[j], scales[rows[j]], out)


@njit(**LEAF)
def add_all_rows(w: Array, scales: Array, out: Array) -> None:
    """`out += scales @ w`, reading every row: w (S, H), scales (S,) float32, out (H,) float32."""
    whole = w.shape[0] // 4 * 4
    for r in range(0, whole, 4):
        w0, w1, w2, w3 = w[r], w[r + 1], w[r + 2], w[r + 3]
        s0, s1, s2, s3 = scales[r], scales[r + 1], scales[r + 2], scales[r + 3]
        for c in range(out.shape[0]):
            out[c] += (s0 * widen(w0[c]) + s1 * widen(w1[c])) + (s2 * widen(w2[c]) + s3 * widen(w3[c]))
    for r in range(whole, w.shape[0]):
        s, row = scales[r], w[r]
        for c in range(out.shape[0]):
            out[c] += s * widen(row[c])


@njit(**LEAF)
def share(total: int, unit: int, thread: int, threads: int) -> tuple[int, int]:
    """First and last + 1 of the `total` items of a thread; bounds are multiples of `unit`, but for `total` itself."""
    units = (total + unit - 1) // unit
    return min(units * thread // threads * unit, total), min(units * (thread + 1) // threads * unit, total)
