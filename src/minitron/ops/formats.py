"""How the kernels of `gemv` read a row of weights, for each format of `quantize`, sixteen columns at a time.

A matrix of each format has its own dtype in Numba, so that a kernel is compiled for the formats in use and no other:
uint16 is bf16, float32 itself, int16 bf12, int8 and uint8 (two weights a byte) the scaled ones. Three functions tell
the formats apart, and this file defines them for each:

- `stage(w, x, staged)` lays out one vector so that `row_dot` may read it in whole registers;
- `row_dot(row, staged, columns)` is the product of a row and a staged vector, as sixteen partial sums;
- `block_add(row, block, columns, scale, sums)` adds 64 columns of a row, times a number, to four times sixteen sums.

Plain rows may end within a block of 64; packed ones are padded with zeros. Needs Numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from .lanes import (
    as_floats,
    centred,
    even_bf16,
    first_lane,
    float_of_bits,
    high_nibble,
    joined,
    load_bf16,
    load_bytes,
    load_fp32,
    load_int8,
    load_signed_bytes,
    load_words,
    low_nibble,
    multiply_add,
    number_at,
    odd_bf16,
    plus,
    product,
    spread,
)

Array = np.ndarray[Any, Any]

# Sums may be reordered where loops are vectorized; NaN and infinity keep their meaning.
FAST = {"fastmath": {"reassoc", "contract", "nsz"}, "nogil": True}

BLOCK = 64
STAGED_BLOCK = 96
"""Numbers that a staged block takes at most: int4 adds two times sixteen sums."""

KINDS = {"bf16": np.uint16, "fp32": np.float32, "bf12": np.int16, "int8": np.int8, "int4": np.uint8}
"""dtype of the arrays in which kernels see a format."""

_BF16, _FP32, _BF12, _INT8, _INT4 = types.uint16, types.float32, types.int16, types.int8, types.uint8
_SMALL, _LARGE = np.float32(2.0**-64), np.float32(2.0**64)


def _only_compiled(*_: Any) -> Any:
    raise NotImplementedError("only within compiled code")


def row_items(w: Array, columns: int) -> int:
    """Array items of a row of so many columns."""
    return _only_compiled()


def stage(w: Array, x: Array, staged: Array) -> None:
    """Lay out x (K,) for `row_dot` in `staged`, (at least STAGED_BLOCK * ceil(K / 64),) fp32."""
    _only_compiled()


def row_dot(row: Array, staged: Array, columns: int) -> Any:
    """Sixteen numbers whose sum is `row . x`, but for bf12's row factor and escapes."""
    return _only_compiled()


def block_add(row: Array, block: int, columns: int, scale: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """`a, b, c, d` (sixteen each) plus `scale` times the row's 64 columns of that block."""
    return _only_compiled()


def whole_blocks(w: Array, columns: int) -> int:
    """Blocks of a row that `block_add` may be asked for."""
    return _only_compiled()


def finish(w: Array, extras: Array, x: Array, out: Array, column: int, start: int, stop: int) -> None:
    """bf12: turn sums of stored numbers in `out[:, column + start : column + stop]` into products with x (M, K)."""
    _only_compiled()


def row_factor(w: Array, extras: Array, row: int) -> float:
    """What the stored numbers of a row are to be multiplied by, after 2 ** 64."""
    return _only_compiled()


def add_escapes(w: Array, extras: Array, row: int, scale: Any, out: Array) -> None:
    """bf12: `out[k] += scale * weight` for weights of the row that are not stored in it."""
    _only_compiled()


@overload(row_items, inline="always")
def _row_items(w, columns):  # type: ignore[no-untyped-def]
    if w.dtype in (_BF16, _FP32):
        return lambda w, columns: columns
    items = {_BF12: 48, _INT8: 66, _INT4: 36}[w.dtype]
    return lambda w, columns: (columns + 63) // 64 * items


@overload(whole_blocks, inline="always")
def _whole_blocks(w, columns):  # type: ignore[no-untyped-def]
    if w.dtype in (_BF16, _FP32):
        return lambda w, columns: columns // 64
    return lambda w, columns: (columns + 63) // 64


# --- vectors -----------------------------------------------------------------------------------------------------


@njit(**FAST)
def _stage_pairs(x, staged):  # type: ignore[no-untyped-def]
    """Each 32 numbers as sixteen even and sixteen odd ones, for bf16 is read in pairs; the rest stays in order."""
    whole = x.shape[0] // BLOCK * BLOCK
    for first in range(0, whole, 32):
        for i in range(16):
            staged[first + i] = x[first + 2 * i]
            staged[first + 16 + i] = x[first + 2 * i + 1]
    for k in range(whole, x.shape[0]):
        staged[k] = x[k]


@njit(**FAST)
def _stage_padded(x, factor, staged):  # type: ignore[no-untyped-def]
    K = x.shape[0]
    for k in range(K):
        staged[k] = x[k] * factor
    for k in range(K, (K + BLOCK - 1) // BLOCK * BLOCK):
        staged[k] = np.float32(0)


@njit(**FAST)
def _stage_sums(x, staged):  # type: ignore[no-untyped-def]
    """Each 32 numbers followed by sixteen times -8 of a pair's sum: codes are stored plus 8."""
    K = x.shape[0]
    for g in range((K + BLOCK - 1) // BLOCK * 2):
        for i in range(16):
            k, at = 32 * g + i, 48 * g + i
            low = x[k] if k < K else np.float32(0)
            high = x[k + 16] if k + 16 < K else np.float32(0)
            staged[at], staged[at + 16], staged[at + 32] = low, high, np.float32(-8) * (low + high)


@overload(stage)
def _stage(w, x, staged):  # type: ignore[no-untyped-def]
    if w.dtype == _BF16:
        return lambda w, x, staged: _stage_pairs(x, staged)
    if w.dtype == _INT4:
        return lambda w, x, staged: _stage_sums(x, staged)
    factor = np.float32(_LARGE if w.dtype == _BF12 else 1)
    return lambda w, x, staged: _stage_padded(x, factor, staged)


# --- products ----------------------------------------------------------------------------------------------------


def _dot_bf16(row, staged, columns):  # type: ignore[no-untyped-def]
    a = spread(np.float32(0))  # type: ignore[call-arg]
    b, c, d = a, a, a
    blocks = columns // BLOCK
    for i in range(blocks):
        w, x = i * 128, i * 256
        pair = load_words(row, w)  # type: ignore[call-arg]
        a = multiply_add(even_bf16(pair), load_fp32(staged, x), a)  # type: ignore[call-arg]
        b = multiply_add(odd_bf16(pair), load_fp32(staged, x + 64), b)  # type: ignore[call-arg]
        pair = load_words(row, w + 64)  # type: ignore[call-arg]
        c = multiply_add(even_bf16(pair), load_fp32(staged, x + 128), c)  # type: ignore[call-arg]
        d = multiply_add(odd_bf16(pair), load_fp32(staged, x + 192), d)  # type: ignore[call-arg]
    rest = np.float32(0)
    for k in range(blocks * BLOCK, columns):
        rest += number_at(row, 2 * k) * staged[k]  # type: ignore[call-arg]
    return plus(plus(plus(a, b), plus(c, d)), first_lane(rest))  # type: ignore[call-arg]


def _dot_fp32(row, staged, columns):  # type: ignore[no-untyped-def]
    a = spread(np.float32(0))  # type: ignore[call-arg]
    b, c, d = a, a, a
    blocks = columns // BLOCK
    for i in range(blocks):
        w = i * 256
        a = multiply_add(load_fp32(row, w), load_fp32(staged, w), a)  # type: ignore[call-arg]
        b = multiply_add(load_fp32(row, w + 64), load_fp32(staged, w + 64), b)  # type: ignore[call-arg]
        c = multiply_add(load_fp32(row, w + 128), load_fp32(staged, w + 128), c)  # type: ignore[call-arg]
        d = multiply_add(load_fp32(row, w + 192), load_fp32(staged, w + 192), d)  # type: ignore[call-arg]
    rest = np.float32(0)
    for k in range(blocks * BLOCK, columns):
        rest += row[k] * staged[k]
    return plus(plus(plus(a, b), plus(c, d)), first_lane(rest))  # type: ignore[call-arg]


def _dot_bf12(row, staged, columns):  # type: ignore[no-untyped-def]
    a = spread(np.float32(0))  # type: ignore[call-arg]
    b, c, d = a, a, a
    for i in range((columns + BLOCK - 1) // BLOCK):
        w, x = i * 96, i * 256
        codes = load_bytes(row, w + 64)  # type: ignore[call-arg]
        first = joined(load_signed_bytes(row, w), low_nibble(codes))  # type: ignore[call-arg]
        second = joined(load_signed_bytes(row, w + 16), high_nibble(codes))  # type: ignore[call-arg]
        a = multiply_add(first, load_fp32(staged, x), a)  # type: ignore[call-arg]
        b = multiply_add(second, load_fp32(staged, x + 64), b)  # type: ignore[call-arg]
        codes = load_bytes(row, w + 80)  # type: ignore[call-arg]
        first = joined(load_signed_bytes(row, w + 32), low_nibble(codes))  # type: ignore[call-arg]
        second = joined(load_signed_bytes(row, w + 48), high_nibble(codes))  # type: ignore[call-arg]
        c = multiply_add(first, load_fp32(staged, x + 128), c)  # type: ignore[call-arg]
        d = multiply_add(second, load_fp32(staged, x + 192), d)  # type: ignore[call-arg]
    return plus(plus(a, b), plus(c, d))  # type: ignore[call-arg]


def _dot_int8(row, staged, columns):  # type: ignore[no-untyped-def]
    sums = spread(np.float32(0))  # type: ignore[call-arg]
    blocks = (columns + BLOCK - 1) // BLOCK
    for i in range(blocks):
        w, x = i * 64, i * 256
        part = product(load_int8(row, w), load_fp32(staged, x))  # type: ignore[call-arg]
        part = multiply_add(load_int8(row, w + 16), load_fp32(staged, x + 64), part)  # type: ignore[call-arg]
        part = multiply_add(load_int8(row, w + 32), load_fp32(staged, x + 128), part)  # type: ignore[call-arg]
        part = multiply_add(load_int8(row, w + 48), load_fp32(staged, x + 192), part)  # type: ignore[call-arg]
        scale = spread(number_at(row, blocks * 64 + 2 * i))  # type: ignore[call-arg]
        sums = multiply_add(part, scale, sums)  # type: ignore[call-arg]
    return sums


def _dot_int4(row, staged, columns):  # type: ignore[no-untyped-def]
    sums = spread(np.float32(0))  # type: ignore[call-arg]
    groups = (columns + BLOCK - 1) // BLOCK * 2
    for g in range(groups):
        x = g * 192
        codes = load_bytes(row, g * 16)  # type: ignore[call-arg]
        part = load_fp32(staged, x + 128)  # type: ignore[call-arg]
        part = multiply_add(as_floats(low_nibble(codes)), load_fp32(staged, x), part)  # type: ignore[call-arg]
        part = multiply_add(as_floats(high_nibble(codes)), load_fp32(staged, x + 64), part)  # type: ignore[call-arg]
        scale = spread(number_at(row, groups * 16 + 2 * g))  # type: ignore[call-arg]
        sums = multiply_add(part, scale, sums)  # type: ignore[call-arg]
    return sums


_DOTS = {_BF16: _dot_bf16, _FP32: _dot_fp32, _BF12: _dot_bf12, _INT8: _dot_int8, _INT4: _dot_int4}


@overload(row_dot)
def _row_dot(row, staged, columns):  # type: ignore[no-untyped-def]
    return _DOTS[row.dtype]


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
    codes = load_bytes(row, w + 64)  # type: ignore[call-arg]
    first = joined(load_signed_bytes(row, w), low_nibble(codes))  # type: ignore[call-arg]
    second = joined(load_signed_bytes(row, w + 16), high_nibble(codes))  # type: ignore[call-arg]
    a = multiply_add(product(first, up), s, a)  # type: ignore[call-arg]
    b = multiply_add(product(second, up), s, b)  # type: ignore[call-arg]
    codes = load_bytes(row, w + 80)  # type: ignore[call-arg]
    first = joined(load_signed_bytes(row, w + 32), low_nibble(codes))  # type: ignore[call-arg]
    second = joined(load_signed_bytes(row, w + 48), high_nibble(codes))  # type: ignore[call-arg]
    c = multiply_add(product(first, up), s, c)  # type: ignore[call-arg]
    d = multiply_add(product(second, up), s, d)  # type: ignore[call-arg]
    return a, b, c, d


def _add_int8(row, block, columns, scale, a, b, c, d):  # type: ignore[no-untyped-def]
    w = block * 64
    s = spread(scale * number_at(row, (columns + BLOCK - 1) // BLOCK * 64 + 2 * block))  # type: ignore[call-arg]
    a = multiply_add(load_int8(row, w), s, a)  # type: ignore[call-arg]
    b = multiply_add(load_int8(row, w + 16), s, b)  # type: ignore[call-arg]
    c = multiply_add(load_int8(row, w + 32), s, c)  # type: ignore[call-arg]
    d = multiply_add(load_int8(row, w + 48), s, d)  # type: ignore[call-arg]
    return a, b, c, d


def _add_int4(row, block, columns, scale, a, b, c, d):  # type: ignore[no-untyped-def]
    w = block * 32
    scales = (columns + BLOCK - 1) // BLOCK * 32 + 4 * block
    s = spread(scale * number_at(row, scales))  # type: ignore[call-arg]
    codes = load_bytes(row, w)  # type: ignore[call-arg]
    a = multiply_add(as_floats(centred(low_nibble(codes))), s, a)  # type: ignore[call-arg]
    b = multiply_add(as_floats(centred(high_nibble(codes))), s, b)  # type: ignore[call-arg]
    s = spread(scale * number_at(row, scales + 2))  # type: ignore[call-arg]
    codes = load_bytes(row, w + 16)  # type: ignore[call-arg]
    c = multiply_add(as_floats(centred(low_nibble(codes))), s, c)  # type: ignore[call-arg]
    d = multiply_add(as_floats(centred(high_nibble(codes))), s, d)  # type: ignore[call-arg]
    return a, b, c, d


_ADDS = {_BF16: _add_bf16, _FP32: _add_fp32, _BF12: _add_bf12, _INT8: _add_int8, _INT4: _add_int4}


@overload(block_add)
def _block_add(row, block, columns, scale, a, b, c, d):  # type: ignore[no-untyped-def]
    return _ADDS[row.dtype]


# --- what is not in the row --------------------------------------------------------------------------------------


@njit(**FAST)
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


@overload(finish)
def _finish(w, extras, x, out, column, start, stop):  # type: ignore[no-untyped-def]
    if w.dtype == _BF12:
        return lambda w, extras, x, out, column, start, stop: _finish_bf12(w, extras, x, out, column, start, stop)
    return lambda w, extras, x, out, column, start, stop: None


@overload(row_factor, inline="always")
def _row_factor(w, extras, row):  # type: ignore[no-untyped-def]
    if w.dtype == _BF12:
        return lambda w, extras, row: float_of_bits(np.uint32(extras[row]))  # type: ignore[call-arg]
    return lambda w, extras, row: np.float32(1)


@njit(**FAST)
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
