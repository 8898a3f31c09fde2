"""Products with a few vectors, in Numba: what decoding a token spends its time on. Each kernel has its plain form here.

Weights are read once, in rows, and widened to fp32 in registers; sums are fp32. A row's sum does not depend on how
many vectors are multiplied at once nor on how rows are shared among threads, so a token gets the same bits alone, in
a draft of eight, and on any number of cores. Kernels take the range of rows (or columns) that one thread works on and
run without the GIL; threads are the caller's business (`engine.team`).

Letters: M vectors, N rows, K columns of a matrix (N, K); F MLP neurons, D hidden width. A bf16 matrix is its bits as
uint16. This file needs Numba; import it only where a kernel is about to be used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

Array = np.ndarray[Any, Any]

ROW_BLOCK = 4
"""Rows whose sums run together; a thread's first row must be a multiple of it."""
NEURON_BLOCK = 128
"""Neurons with one list of active ones; a thread's first neuron must be a multiple of it."""
COLUMN_BLOCK = 128
"""Columns accumulated between two prefetches; a thread's first column must be a multiple of 32 for speed."""

# Sums may be reordered, for they must be vectorized; NaN and infinity keep their meaning.
FAST = {"fastmath": {"reassoc", "contract", "nsz"}, "nogil": True}


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


def down_reference(w_t: Array, h: Array) -> Array:
    """`h @ w_t` in float64: the down projection w_t (F, D), activations h (M, F) to (M, D)."""
    return h.astype(np.float64) @ widen_reference(w_t)


# --- single values -----------------------------------------------------------------------------------------------


@intrinsic
def float_of_bits(typingctx, bits):  # type: ignore[no-untyped-def]
    """The fp32 number of 32 bits; a register move."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def bits_of_float(typingctx, value):  # type: ignore[no-untyped-def]
    """The 32 bits of an fp32 number."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


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


@intrinsic
def prefetch(typingctx, matrix, row, column):  # type: ignore[no-untyped-def]
    """Ask for the cache line of `matrix[row, column]`. Rows of active neurons lie where no hardware expects them."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = signature.args[0]
        array = context.make_array(kind)(context, builder, args[0])
        place = cgutils.get_item_pointer(context, builder, kind, array, args[1:], wraparound=False)
        place = builder.bitcast(place, cgutils.voidptr_t)
        flag = ir.IntType(32)
        signature_ = ir.FunctionType(ir.VoidType(), [place.type, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, signature_, "llvm.prefetch.p0")
        builder.call(function, [place, flag(0), flag(3), flag(1)])  # read, keep in all levels, data
        return context.get_dummy_value()

    return types.void(matrix, types.intp, types.intp), codegen


def widen(value: Any) -> Any:
    """A stored weight as fp32: bf16 bits are its upper half."""
    raise NotImplementedError("only within compiled code")


@overload(widen, inline="always")
def _widen(value):  # type: ignore[no-untyped-def]
    if value == types.uint16:
        return lambda value: float_of_bits(np.uint32(value) << np.uint32(16))  # type: ignore[call-arg]
    return lambda value: value


@njit(**FAST)
def bf16_of_float(value):  # type: ignore[no-untyped-def]
    """Bits of the nearest bf16 number, ties to even; NaN stays NaN."""
    bits = bits_of_float(value)  # type: ignore[call-arg]
    if value != value:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


# --- kernels -----------------------------------------------------------------------------------------------------


@njit(**FAST)
def matvec(w: Array, x: Array, out: Array, column: int, start: int, stop: int) -> None:
    """`out[m, column + r] = w[r] . x[m]` for rows start <= r < stop.

    Args:
        w: (N, K) uint16 (bf16) or float32, rows contiguous.
        x: (M, K) float32. out: (M, >= column + N) float32.
        start: multiple of ROW_BLOCK.
    """
    # Rows are sliced before the loops: an index that could be negative would keep them from being vectorized.
    M, K = x.shape
    whole = start + (stop - start) // ROW_BLOCK * ROW_BLOCK
    for r in range(start, whole, ROW_BLOCK):
        w0, w1, w2, w3 = w[r], w[r + 1], w[r + 2], w[r + 3]
        for m in range(M):
            xm = x[m]
            s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for k in range(K):
                v = xm[k]
                s0 += v * widen(w0[k])
                s1 += v * widen(w1[k])
                s2 += v * widen(w2[k])
                s3 += v * widen(w3[k])
            sums = out[m, column + r : column + r + 4]
            sums[0], sums[1], sums[2], sums[3] = s0, s1, s2, s3
    for r in range(whole, stop):
        row = w[r]
        for m in range(M):
            xm = x[m]
            s = np.float32(0)
            for k in range(K):
                s += xm[k] * widen(row[k])
            out[m, column + r] = s


@njit(**FAST)
def squared_relu_lists(h: Array, active: Array, counts: Array, start: int, stop: int) -> None:
    """Square the positive values of `h` (M, F) in place, zero the others, and list the neurons that are not zero.

    Args:
        h: float32, columns start <= f < stop are worked on; start is a multiple of NEURON_BLOCK.
        active: (M, F) int32; of each block of NEURON_BLOCK columns the first `counts` entries are filled.
        counts: (M, ceil(F / NEURON_BLOCK)) int32.
    """
    for m in range(h.shape[0]):
        for first in range(start, stop, NEURON_BLOCK):
            values = h[m, first : min(first + NEURON_BLOCK, stop)]
            found = active[m, first : first + values.shape[0]]
            n = 0
            for f in range(values.shape[0]):
                v = max(values[f], np.float32(0))
                # A NaN must reach the output; `max` above has dropped it.
                v = v * v if values[f] == values[f] else values[f]
                values[f] = v
                found[n] = first + f  # overwritten by the next neuron unless this one counts
                n += v != np.float32(0)
            counts[m, first // NEURON_BLOCK] = n


@njit(**FAST)
def add_rows(w: Array, scales: Array, rows: Array, n: int, out: Array, start: int, stop: int) -> None:
    """`out[start:stop] += sum(scales[rows[j]] * w[rows[j], start:stop] for j < n)`.

    Args:
        w: (F, D) uint16 (bf16) or float32. scales: (F,) float32. rows: (>= n,) int32. out: (D,) float32.
    """
    whole = n // 4 * 4
    for j in range(0, whole, 4):
        f0, f1, f2, f3 = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
        s0, s1, s2, s3 = scales[f0], scales[f1], scales[f2], scales[f3]
        after = min(j + 4, n - 4)
        g0, g1, g2, g3 = rows[after], rows[after + 1], rows[after + 2], rows[after + 3]
        for first in range(start, stop, COLUMN_BLOCK):
            last = min(first + COLUMN_BLOCK, stop)
            for line in range(first, last, 64 // w.itemsize):
                prefetch(w, g0, line)  # type: ignore[call-arg]
                prefetch(w, g1, line)  # type: ignore[call-arg]
                prefetch(w, g2, line)  # type: ignore[call-arg]
                prefetch(w, g3, line)  # type: ignore[call-arg]
            w0, w1, w2, w3 = w[f0, first:last], w[f1, first:last], w[f2, first:last], w[f3, first:last]
            sums = out[first:last]
            for c in range(sums.shape[0]):
                sums[c] += (s0 * widen(w0[c]) + s1 * widen(w1[c])) + (s2 * widen(w2[c]) + s3 * widen(w3[c]))
    sums = out[start:stop]
    for j in range(whole, n):
        s, row = scales[rows[j]], w[rows[j], start:stop]
        for c in range(sums.shape[0]):
            sums[c] += s * widen(row[c])


@njit(**FAST)
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


@njit(**FAST)
def down(w_t: Array, h: Array, active: Array, counts: Array, out: Array, start: int, stop: int) -> None:
    """`out[:, start:stop] += h @ w_t[:, start:stop]`, reading only rows of neurons that are active.

    Args:
        w_t: (F, D), the transposed down projection, uint16 (bf16) or float32.
        h, active, counts: as `squared_relu_lists` leaves them. out: (M, D) float32.
    """
    for block in range(counts.shape[1]):
        first = block * NEURON_BLOCK
        for m in range(h.shape[0]):  # inside: the block's rows are still in the cache for the next vector
            add_rows(w_t, h[m], active[m, first : first + NEURON_BLOCK], counts[m, block], out[m], start, stop)


@njit(**FAST)
def share(total: int, unit: int, thread: int, threads: int) -> tuple[int, int]:
    """First and last + 1 of the `total` items of a thread; bounds are multiples of `unit`, but for `total` itself."""
    units = (total + unit - 1) // unit
    return min(units * thread // threads * unit, total), min(units * (thread + 1) // threads * unit, total)
