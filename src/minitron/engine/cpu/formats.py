"""How the kernels of `gemv` read a row of weights, for each format of `engine.quantize`, sixteen columns at a time.

A matrix of each format has its own dtype in Numba, so that a kernel is compiled only for the formats in use: uint16 is
bf16, float32 fp32, int16 bf12, int8 is int8 and uint8 (two weights a byte) int4. This file defines for each format how
vectors and rows are read; products are in `dots`:

- `stage(w, x, staged)` lays out one vector so that `dots.row_dot` can read it in whole registers;
- `block_add(row, block, columns, scale, sums)` adds 64 columns of a row, times a number, to four times sixteen sums.

Plain rows may end within a block of 64; rows of quantized formats are padded with zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from .lanes import (
    even_bf16,
    float_of_bits,
    high_code,
    high_nibble,
    joined,
    joined_high,
    joined_low,
    larger,
    load_bf16,
    load_byte_halves,
    load_bytes,
    load_fp32,
    load_halves,
    load_int8,
    load_signed_byte_halves,
    load_signed_bytes,
    load_words,
    low_code,
    low_nibble,
    multiply_add,
    number_at,
    odd_bf16,
    prefetch,
    product,
    spread,
    store,
    store_code_offsets,
    store_rounded,
    store_rounded_apart,
    total,
)

Array = np.ndarray[Any, Any]

# Sums may be reordered where loops are vectorized; NaN and infinity keep their meaning.
FAST: Any = {"fastmath": {"reassoc", "contract", "nsz"}, "nogil": True}
LEAF: Any = {**FAST, "_nrt": False}
"""For functions that allocate no array. Otherwise Numba counts references to each row, which costs more than the work
on a short row."""
INNER: Any = {**LEAF, "forceinline": True}
"""For functions that must be inlined into their caller's loop: a call returns sixteen numbers through memory."""

ORDERED: Any = {**LEAF, "fastmath": {"contract", "nsz"}}
"""For functions whose order of additions determines a product's bits."""

BLOCK = 64
STAGED_BLOCK = 96
"""Largest number of fp32 values in a staged block."""
HEADER = 64
"""Bytes before the integers of a vector staged for int8 or int4."""

KINDS = {"bf16": np.uint16, "fp32": np.float32, "bf12": np.int16, "int8": np.int8, "int4": np.uint8}
"""The dtype of arrays by which kernels know a format."""

_BF16, _FP32, _BF12, _INT8, _INT4 = types.uint16, types.float32, types.int16, types.int8, types.uint8
_LARGE = np.float32(2.0**64)
MOST = np.float32(32767)
"""Largest integer of a vector staged for int8 or int4: products of 64 columns stay below 2^24 and are exact."""


def _only_compiled(*_: Any) -> Any:
    raise NotImplementedError("only within compiled code")


def row_items(w: Array, columns: int) -> int:
    """Array items of a row of so many columns."""
    return _only_compiled()


def stage(w: Array, x: Array, staged: Array) -> None:
    """Lay out x (K,) for `dots.row_dot` in `staged`, (at least STAGED_BLOCK * ceil(K / 64),) fp32."""
    _only_compiled()


def unpacked(row: Array, block: int) -> Any:
    """64 weights of a row as four times sixteen numbers, in the order in which `stage` lays vectors out; not scaled."""
    _only_compiled()


def widen(value: Any) -> Any:
    """A weight of a plain format as fp32: bf16 bits are its upper half."""
    return _only_compiled()


def block_add(row: Array, block: int, columns: int, scale: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """`a, b, c, d` (sixteen each) plus `scale` times the row's 64 columns of that block."""
    return _only_compiled()


def whole_blocks(w: Array, columns: int) -> int:
    """Number of blocks of a row that `block_add` can add."""
    return _only_compiled()


def finish(w: Array, extras: Array, x: Array, out: Array, column: int, start: int, stop: int) -> None:
    """Make `out[:, column + start : column + stop]` products with x (M, K).

    Plain formats: add columns behind the last whole block. bf12: multiply with the row factors and add escapes.
    """
    _only_compiled()


def row_factor(w: Array, extras: Array, row: int) -> float:
    """The factor on the stored numbers of a row, besides 2 ** 64."""
    return _only_compiled()


def add_escapes(w: Array, extras: Array, row: int, scale: Any, out: Array) -> None:
    """bf12: `out[k] += scale * weight` for weights of the row that are not stored in it."""
    _only_compiled()


def write_escapes(w: Array, extras: Array, row: int, out: Array) -> None:
    """bf12: write the bits of weights that are not stored in the row, into out (K,) bf16 bits."""
    _only_compiled()


@overload(widen, inline="always")
def _widen(value):  # type: ignore[no-untyped-def]
    if value == types.uint16:
        return lambda value: float_of_bits(np.uint32(value) << np.uint32(16))  # type: ignore[call-arg]
    return lambda value: np.float32(value)


@overload(row_items, inline="always")
def _row_items(w, columns):  # type: ignore[no-untyped-def]
    if w.dtype in (_BF16, _FP32):
        return lambda w, columns: columns
    items = {_BF12: 48, _INT8: 68, _INT4: 36}[w.dtype]
    return lambda w, columns: (columns + 63) // 64 * items


@overload(whole_blocks, inline="always")
def _whole_blocks(w, columns):  # type: ignore[no-untyped-def]
    if w.dtype in (_BF16, _FP32):
        return lambda w, columns: columns // 64
    return lambda w, columns: (columns + 63) // 64


# --- vectors -----------------------------------------------------------------------------------------------------


@njit(**LEAF)
def _stage_pairs(x, factor, whole, staged):  # type: ignore[no-untyped-def]
    """Each 32 of the first `whole` numbers as sixteen even and sixteen odd ones, because bf16 is read in pairs.

    Where `whole` is more than x has, zeros follow; where it is less, the rest stays in order.
    """
    K = x.shape[0]
    full = min(K // 32 * 32, whole)
    for first in range(0, full, 32):
        for i in range(16):
            staged[first + i] = x[first + 2 * i] * factor
            staged[first + 16 + i] = x[first + 2 * i + 1] * factor
    for k in range(full, whole):
        index = k // 32 * 32 + k % 2 * 16 + k % 32 // 2
        staged[index] = x[k] * factor if k < K else np.float32(0)
    for k in range(whole, K):
        staged[k] = x[k] * factor


@njit(**LEAF)
def _stage_padded(x, staged):  # type: ignore[no-untyped-def]
    K = x.shape[0]
    for k in range(K):
        staged[k] = x[k]
    for k in range(K, (K + BLOCK - 1) // BLOCK * BLOCK):
        staged[k] = np.float32(0)


@njit(**INNER)
def _sixteen(x, first, staged):  # type: ignore[no-untyped-def]
    """x[first : first + 16], zeros behind its end; `staged` is scratch."""
    if first + 16 <= x.shape[0]:
        return load_fp32(x, 4 * first)  # type: ignore[call-arg]
    for i in range(16):
        staged[i] = x[first + i] if first + i < x.shape[0] else np.float32(0)
    return load_fp32(staged, 0)  # type: ignore[call-arg]


@njit(**LEAF)
def _steps(x: Array, staged: Array) -> Any:
    """The step of a vector's 16-bit integers and its inverse; the step is NaN where a number is infinite or NaN."""
    tops, bad = spread(np.float32(0)), spread(np.float32(0))  # type: ignore[call-arg]
    zero, minus = spread(np.float32(0)), spread(np.float32(-1))  # type: ignore[call-arg]
    for first in range(0, x.shape[0], 16):
        value = _sixteen(x, first, staged)
        tops = larger(larger(tops, value), product(value, minus))  # type: ignore[call-arg]
        bad = multiply_add(value, zero, bad)  # type: ignore[call-arg]
    store(staged, 0, tops)  # type: ignore[call-arg]
    top = np.float32(0)
    for i in range(16):
        top = max(top, staged[i])
    inverse = MOST / top if top > np.float32(0) else np.float32(0)
    return top / MOST + total(bad), inverse  # type: ignore[call-arg]


@njit(**LEAF)
def _stage_int8(x, staged):  # type: ignore[no-untyped-def]
    """A header with the step in its first number, then 16-bit integers in order."""
    step, inverse = _steps(x, staged)
    factor = spread(inverse)  # type: ignore[call-arg]
    for first in range(0, (x.shape[0] + BLOCK - 1) // BLOCK * BLOCK, 16):
        store_rounded(staged, HEADER + 2 * first, product(_sixteen(x, first, staged), factor))  # type: ignore[call-arg]
    staged[0] = step


@njit(**LEAF)
def _stage_int4(x, staged):  # type: ignore[no-untyped-def]
    """A header as for int8; then of each 128 the integers of a row's four nibbles, 32 each, and -8 times their sums."""
    step, inverse = _steps(x, staged)
    factor = spread(inverse)  # type: ignore[call-arg]
    for block in range((x.shape[0] + 127) // 128):
        at = HEADER + 320 * block
        for group in range(4):
            first, offset = 128 * block + 32 * group, at + 16 * group
            low = product(_sixteen(x, first, staged), factor)  # type: ignore[call-arg]
            store_rounded_apart(staged, offset, offset + 128, low)  # type: ignore[call-arg]
            high = product(_sixteen(x, first + 16, staged), factor)  # type: ignore[call-arg]
            store_rounded_apart(staged, offset + 64, offset + 192, high)  # type: ignore[call-arg]
        a, b = load_halves(staged, at), load_halves(staged, at + 64)  # type: ignore[call-arg]
        c, d = load_halves(staged, at + 128), load_halves(staged, at + 192)  # type: ignore[call-arg]
        store_code_offsets(staged, at + 256, a, b, c, d)  # type: ignore[call-arg]
    staged[0] = step


@overload(stage)
def _stage(w, x, staged):  # type: ignore[no-untyped-def]
    if w.dtype in (_BF16, _BF12):
        factor = np.float32(_LARGE if w.dtype == _BF12 else 1)
        return lambda w, x, staged: _stage_pairs(x, factor, BLOCK * whole_blocks(w, x.shape[0]), staged)
    if w.dtype == _INT8:
        return lambda w, x, staged: _stage_int8(x, staged)
    if w.dtype == _INT4:
        return lambda w, x, staged: _stage_int4(x, staged)
    return lambda w, x, staged: _stage_padded(x, staged)


AHEAD = 4096
"""Bytes by which loops over rows ask for memory before they need it, where `tuning` has not chosen another number."""


@njit(**INNER)
def ask_ahead(row, offset, ahead=AHEAD):  # type: ignore[no-untyped-def]
    """Prefetch what lies `ahead` bytes behind a row's byte offset; unpacking keeps the processor from looking that far.

    After a row comes the next one. A prefetch behind the last row does nothing.
    """
    prefetch(row, offset + ahead)  # type: ignore[call-arg]


# --- unpacked blocks ----------------------------------------------------------------------------------------------


def _unpacked_bf16(row, block):  # type: ignore[no-untyped-def]
    at = block * 128
    first, second = load_words(row, at), load_words(row, at + 64)  # type: ignore[call-arg]
    return even_bf16(first), odd_bf16(first), even_bf16(second), odd_bf16(second)  # type: ignore[call-arg]


def _unpacked_fp32(row, block):  # type: ignore[no-untyped-def]
    at = block * 256
    a, b = load_fp32(row, at), load_fp32(row, at + 64)  # type: ignore[call-arg]
    return a, b, load_fp32(row, at + 128), load_fp32(row, at + 192)  # type: ignore[call-arg]


def _unpacked_bf12(row, block):  # type: ignore[no-untyped-def]
    at = block * 96
    codes = load_byte_halves(row, at + 64)  # type: ignore[call-arg]
    first = joined_low(load_signed_byte_halves(row, at), codes)  # type: ignore[call-arg]
    second = joined_high(load_signed_byte_halves(row, at + 32), codes)  # type: ignore[call-arg]
    return even_bf16(first), odd_bf16(first), even_bf16(second), odd_bf16(second)  # type: ignore[call-arg]


_UNPACKED = {_BF16: _unpacked_bf16, _FP32: _unpacked_fp32, _BF12: _unpacked_bf12}


@overload(unpacked, jit_options=INNER)
def _unpacked(row, block):  # type: ignore[no-untyped-def]
    return _UNPACKED[row.dtype]


# --- sums of rows ------------------------------------------------------------------------------------------------


def _add_bf16(row, block, columns, scale, a, b, c, d):  # type: ignore[no-untyped-def]
    w = block * 128
    s = spread(scale)  # type: ignore[call-arg]
    a = multiply_add(load_bf16(row, w), s, a)  # type: ignore[call-arg]
    b = multiply_add(load_bf16(row, w + 32), s, b)  # type: ignore[call-arg]
    c = multiply_add(load_bf16(row, w + 64), s, c)  # type: ignore[call-arg]
    d = multiply_add(load_bf16(row, w + 96), s, d)  # type: ignore[call-arg]
    return a, b, c, d


def _add_fp32(row, block, columns, scale, a, b, c, d):  # type: ignore[no-untyped-def]
    w = block * 256
    s = spread(scale)  # type: ignore[call-arg]
    a = multiply_add(load_fp32(row, w), s, a)  # type: ignore[call-arg]
    b = multiply_add(load_fp32(row, w + 64), s, b)  # type: ignore[call-arg]
    c = multiply_add(load_fp32(row, w + 128), s, c)  # type: ignore[call-arg]
    d = multiply_add(load_fp32(row, w + 192), s, d)  # type: ignore[call-arg]
    return a, b, c, d


def _add_bf12(row, block, columns, scale, a, b, c, d):  # type: ignore[no-untyped-def]
    # Twice a multiplication, for the product of a stored number and the scale would be too small.
    w = block * 96
    s, up = spread(scale), spread(_LARGE)  # type: ignore[call-arg]
    codes, more = load_bytes(row, w + 64), load_bytes(row, w + 80)  # type: ignore[call-arg]
    first = joined(load_signed_bytes(row, w), low_nibble(codes))  # type: ignore[call-arg]
    second = joined(load_signed_bytes(row, w + 16), low_nibble(more))  # type: ignore[call-arg]
    a = multiply_add(product(first, up), s, a)  # type: ignore[call-arg]
    b = multiply_add(product(second, up), s, b)  # type: ignore[call-arg]
    first = joined(load_signed_bytes(row, w + 32), high_nibble(codes))  # type: ignore[call-arg]
    second = joined(load_signed_bytes(row, w + 48), high_nibble(more))  # type: ignore[call-arg]
    c = multiply_add(product(first, up), s, c)  # type: ignore[call-arg]
    d = multiply_add(product(second, up), s, d)  # type: ignore[call-arg]
    return a, b, c, d


def _add_int8(row, block, columns, scale, a, b, c, d):  # type: ignore[no-untyped-def]
    w = block * 64
    scales = (columns + BLOCK - 1) // BLOCK * 64 + 4 * block
    s = spread(scale * number_at(row, scales))  # type: ignore[call-arg]
    a = multiply_add(load_int8(row, w), s, a)  # type: ignore[call-arg]
    b = multiply_add(load_int8(row, w + 16), s, b)  # type: ignore[call-arg]
    s = spread(scale * number_at(row, scales + 2))  # type: ignore[call-arg]
    c = multiply_add(load_int8(row, w + 32), s, c)  # type: ignore[call-arg]
    d = multiply_add(load_int8(row, w + 48), s, d)  # type: ignore[call-arg]
    return a, b, c, d


def _add_int4(row, block, columns, scale, a, b, c, d):  # type: ignore[no-untyped-def]
    w = block * 32
    scales = (columns + BLOCK - 1) // BLOCK * 32 + 4 * block
    s = spread(scale * number_at(row, scales))  # type: ignore[call-arg]
    codes = load_bytes(row, w)  # type: ignore[call-arg]
    a = multiply_add(low_code(codes), s, a)  # type: ignore[call-arg]
    b = multiply_add(high_code(codes), s, b)  # type: ignore[call-arg]
    s = spread(scale * number_at(row, scales + 2))  # type: ignore[call-arg]
    codes = load_bytes(row, w + 16)  # type: ignore[call-arg]
    c = multiply_add(low_code(codes), s, c)  # type: ignore[call-arg]
    d = multiply_add(high_code(codes), s, d)  # type: ignore[call-arg]
    return a, b, c, d


_ADDS = {_BF16: _add_bf16, _FP32: _add_fp32, _BF12: _add_bf12, _INT8: _add_int8, _INT4: _add_int4}


@overload(block_add, jit_options=INNER)
def _block_add(row, block, columns, scale, a, b, c, d):  # type: ignore[no-untyped-def]
    return _ADDS[row.dtype]


# --- what is not in the row --------------------------------------------------------------------------------------


@njit(**LEAF)
def _finish_bf12(w, extras, x, out, column, start, stop):  # type: ignore[no-untyped-def]
    N = w.shape[0]
    for r in range(start, stop):
        factor = float_of_bits(np.uint32(extras[r]))  # type: ignore[call-arg]
        for m in range(x.shape[0]):
            value = out[m, column + r] * factor
            for e in range(extras[N + r], extras[N + r + 1]):
                at = 2 * N + 1 + 2 * e
                value += x[m, extras[at]] * float_of_bits(np.uint32(extras[at + 1]) << np.uint32(16))  # type: ignore[call-arg]
            out[m, column + r] = value


def sixteen_at(row: Array, first: int) -> Any:
    """Sixteen numbers of a row of a plain format, from column `first` on."""
    return _only_compiled()


@overload(sixteen_at, jit_options=INNER)
def _sixteen_at(row, first):  # type: ignore[no-untyped-def]
    if row.dtype == _BF16:
        return lambda row, first: load_bf16(row, 2 * first)  # type: ignore[call-arg]
    return lambda row, first: load_fp32(row, 4 * first)  # type: ignore[call-arg]


@njit(**ORDERED)
def _finish_plain(w, x, out, column, start, stop):  # type: ignore[no-untyped-def]
    K = x.shape[1]
    whole, sixteens = K // BLOCK * BLOCK, K // 16 * 16
    if whole == K:
        return
    for r in range(start, stop):
        row = w[r]
        for m in range(x.shape[0]):
            sums = spread(np.float32(0))  # type: ignore[call-arg]
            for k in range(whole, sixteens, 16):
                sums = multiply_add(sixteen_at(row, k), load_fp32(x, 4 * (m * K + k)), sums)  # type: ignore[call-arg]
            rest = total(sums)  # type: ignore[call-arg]
            for k in range(sixteens, K):
                rest += widen(row[k]) * x[m, k]
            out[m, column + r] += rest


@overload(finish)
def _finish(w, extras, x, out, column, start, stop):  # type: ignore[no-untyped-def]
    if w.dtype in (_BF16, _FP32):
        return lambda w, extras, x, out, column, start, stop: _finish_plain(w, x, out, column, start, stop)
    if w.dtype == _BF12:
        return lambda w, extras, x, out, column, start, stop: _finish_bf12(w, extras, x, out, column, start, stop)
    return lambda w, extras, x, out, column, start, stop: None


@overload(row_factor, inline="always")
def _row_factor(w, extras, row):  # type: ignore[no-untyped-def]
    if w.dtype == _BF12:
        return lambda w, extras, row: float_of_bits(np.uint32(extras[row]))  # type: ignore[call-arg]
    return lambda w, extras, row: np.float32(1)


@njit(**LEAF)
def _add_escapes_bf12(w, extras, row, scale, out):  # type: ignore[no-untyped-def]
    N = w.shape[0]
    for e in range(extras[N + row], extras[N + row + 1]):
        at = 2 * N + 1 + 2 * e
        out[extras[at]] += scale * float_of_bits(np.uint32(extras[at + 1]) << np.uint32(16))  # type: ignore[call-arg]


@overload(add_escapes)
def _add_escapes(w, extras, row, scale, out):  # type: ignore[no-untyped-def]
    if w.dtype == _BF12:
        return lambda w, extras, row, scale, out: _add_escapes_bf12(w, extras, row, scale, out)
    return lambda w, extras, row, scale, out: None


@njit(**LEAF)
def _write_escapes_bf12(w, extras, row, out):  # type: ignore[no-untyped-def]
    N = w.shape[0]
    for e in range(extras[N + row], extras[N + row + 1]):
        at = 2 * N + 1 + 2 * e
        out[extras[at]] = np.uint16(extras[at + 1])


@overload(write_escapes)
def _write_escapes(w, extras, row, out):  # type: ignore[no-untyped-def]
    if w.dtype == _BF12:
        return lambda w, extras, row, out: _write_escapes_bf12(w, extras, row, out)
    return lambda w, extras, row, out: None
