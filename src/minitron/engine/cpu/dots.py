"""Products of rows of weights with staged vectors, for each format of `formats`: one row or four, one vector or four.

A row is processed in units of 64 columns (int4: 128), each unpacked once for all vectors. Each format defines:

- `units(row, columns)` and `unit_bytes(row)`: how many whole units there are, and their size;
- `weights_at(row, i, columns)`: a unit's weights, unpacked; `last_weights` those of half a unit at the end (int4);
- `times(row, weights, staged, i, sums)`: `sums` plus the products with the vector's part;
- `summed(row, sums, staged)`: sixteen partial sums of the product.

Every product of a row and a vector is summed in the same order, however many are computed together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload

from .formats import (
    _BF12,
    _BF16,
    _FP32,
    _INT4,
    _INT8,
    AHEAD,
    BLOCK,
    HEADER,
    INNER,
    Array,
    ask_ahead,
    unpacked,
    whole_blocks,
)
from .lanes import (
    as_floats,
    load_four_scales,
    load_fp32,
    load_half_row,
    load_halves,
    load_signed_byte_halves,
    load_two_scales,
    load_words,
    multiply_add,
    nibble_0,
    nibble_1,
    nibble_2,
    nibble_3,
    no_words,
    number_at,
    pair_dot,
    plus,
    prefetch,
    prefetch_far,
    product,
    spread,
    store,
)

FLOATS = (_BF16, _FP32, _BF12)
"""Formats whose weights are multiplied as fp32 numbers."""
SHORT_ROW = 1024
"""Columns up to which four rows are read side by side. Longer ones come from memory, which is fastest in one stream."""


def _only_compiled(*_: Any) -> Any:
    raise NotImplementedError("only within compiled code")


def units(row: Array, columns: int) -> int:
    """Whole units of a row."""
    return _only_compiled()


def last_units(row: Array, columns: int) -> int:
    """1 where half a unit follows, otherwise 0."""
    return _only_compiled()


def unit_bytes(row: Array) -> int:
    """Bytes of a unit, without its scales."""
    return _only_compiled()


def no_sums(row: Array) -> Any:
    """The sums to begin with."""
    return _only_compiled()


def weights_at(row: Array, unit: int, columns: int) -> Any:
    """A unit's weights, unpacked once for several vectors."""
    return _only_compiled()


def last_weights(row: Array, unit: int, columns: int) -> Any:
    """Those of half a unit, with zeros behind."""
    return _only_compiled()


def times(row: Array, weights: Any, staged: Array, unit: int, sums: Any) -> Any:
    """`sums` plus the products of a unit's weights with its part of a staged vector."""
    return _only_compiled()


def summed(row: Array, sums: Any, staged: Array) -> Any:
    """Sixteen partial sums of a product."""
    return _only_compiled()


# --- fp32, bf16, bf12 --------------------------------------------------------------------------------------------


@njit(fastmath={"contract", "nsz"}, nogil=True, forceinline=True)
def sum_of_four(a, b, c, d):  # type: ignore[no-untyped-def]
    """Four times sixteen sums as sixteen; in this order everywhere, because it determines a product's bits."""
    return plus(plus(a, b), plus(c, d))  # type: ignore[call-arg]


@njit(**INNER)
def times_floats(weights, staged, unit, sums):  # type: ignore[no-untyped-def]
    """`times` for formats in FLOATS: both are four times sixteen numbers."""
    p, q, r, s = weights
    a, b, c, d = sums
    x = unit * 256
    a = multiply_add(p, load_fp32(staged, x), a)  # type: ignore[call-arg]
    b = multiply_add(q, load_fp32(staged, x + 64), b)  # type: ignore[call-arg]
    c = multiply_add(r, load_fp32(staged, x + 128), c)  # type: ignore[call-arg]
    d = multiply_add(s, load_fp32(staged, x + 192), d)  # type: ignore[call-arg]
    return a, b, c, d


@njit(**INNER)
def _no_floats():  # type: ignore[no-untyped-def]
    zero = spread(np.float32(0))  # type: ignore[call-arg]
    return zero, zero, zero, zero


# --- int8 --------------------------------------------------------------------------------------------------------


def _weights_int8(row, unit, columns):  # type: ignore[no-untyped-def]
    w, scales = unit * 64, (columns + BLOCK - 1) // BLOCK * 64 + 4 * unit
    codes = load_signed_byte_halves(row, w), load_signed_byte_halves(row, w + 32)  # type: ignore[call-arg]
    return codes, (spread(number_at(row, scales)), spread(number_at(row, scales + 2)))  # type: ignore[call-arg]


def _times_int8(row, weights, staged, unit, sums):  # type: ignore[no-untyped-def]
    codes, scales = weights
    x = HEADER + unit * 128
    first = pair_dot(no_words(), codes[0], load_halves(staged, x))  # type: ignore[call-arg]
    second = pair_dot(no_words(), codes[1], load_halves(staged, x + 64))  # type: ignore[call-arg]
    a = multiply_add(as_floats(first), scales[0], sums[0])  # type: ignore[call-arg]
    return a, multiply_add(as_floats(second), scales[1], sums[1])  # type: ignore[call-arg]


def _no_int8(row):  # type: ignore[no-untyped-def]
    zero = spread(np.float32(0))  # type: ignore[call-arg]
    return zero, zero


# --- int4 --------------------------------------------------------------------------------------------------------


@njit(**INNER)
def _nibbles(codes):  # type: ignore[no-untyped-def]
    return nibble_0(codes), nibble_1(codes), nibble_2(codes), nibble_3(codes)  # type: ignore[call-arg]


def _weights_int4(row, unit, columns):  # type: ignore[no-untyped-def]
    scales = load_four_scales(row, (columns + BLOCK - 1) // BLOCK * 32 + 8 * unit)  # type: ignore[call-arg]
    return _nibbles(load_halves(row, unit * 64)), scales  # type: ignore[call-arg]


def _last_weights_int4(row, unit, columns):  # type: ignore[no-untyped-def]
    scales = load_two_scales(row, (columns + BLOCK - 1) // BLOCK * 32 + 8 * unit)  # type: ignore[call-arg]
    return _nibbles(load_half_row(row, unit * 64)), scales  # type: ignore[call-arg]


def _times_int4(row, weights, staged, unit, sums):  # type: ignore[no-untyped-def]
    codes, scales = weights
    x = HEADER + unit * 320
    part = load_words(staged, x + 256)  # type: ignore[call-arg]
    part = pair_dot(part, codes[0], load_halves(staged, x))  # type: ignore[call-arg]
    part = pair_dot(part, codes[1], load_halves(staged, x + 64))  # type: ignore[call-arg]
    part = pair_dot(part, codes[2], load_halves(staged, x + 128))  # type: ignore[call-arg]
    part = pair_dot(part, codes[3], load_halves(staged, x + 192))  # type: ignore[call-arg]
    return (multiply_add(as_floats(part), scales, sums[0]),)  # type: ignore[call-arg]


# --- which is which ----------------------------------------------------------------------------------------------


@overload(units, jit_options=INNER)
def _units(row, columns):  # type: ignore[no-untyped-def]
    if row.dtype == _INT4:
        return lambda row, columns: (columns + BLOCK - 1) // BLOCK // 2
    return lambda row, columns: whole_blocks(row, columns)


@overload(last_units, jit_options=INNER)
def _last_units(row, columns):  # type: ignore[no-untyped-def]
    if row.dtype == _INT4:
        return lambda row, columns: (columns + BLOCK - 1) // BLOCK % 2
    return lambda row, columns: 0


@overload(unit_bytes, jit_options=INNER)
def _unit_bytes(row):  # type: ignore[no-untyped-def]
    size = {_BF16: 128, _FP32: 256, _BF12: 96, _INT8: 64, _INT4: 64}[row.dtype]
    return lambda row: size


@overload(no_sums, jit_options=INNER)
def _no_sums(row):  # type: ignore[no-untyped-def]
    if row.dtype == _INT8:
        return _no_int8
    if row.dtype == _INT4:
        return lambda row: (spread(np.float32(0)),)  # type: ignore[call-arg]
    return lambda row: _no_floats()


@overload(weights_at, jit_options=INNER)
def _weights_at(row, unit, columns):  # type: ignore[no-untyped-def]
    if row.dtype in FLOATS:
        return lambda row, unit, columns: unpacked(row, unit)
    return _weights_int8 if row.dtype == _INT8 else _weights_int4


@overload(last_weights, jit_options=INNER)
def _last_weights(row, unit, columns):  # type: ignore[no-untyped-def]
    if row.dtype == _INT4:
        return _last_weights_int4
    return lambda row, unit, columns: weights_at(row, unit, columns)


@overload(times, jit_options=INNER)
def _times(row, weights, staged, unit, sums):  # type: ignore[no-untyped-def]
    if row.dtype in FLOATS:
        return lambda row, weights, staged, unit, sums: times_floats(weights, staged, unit, sums)
    return _times_int8 if row.dtype == _INT8 else _times_int4


@overload(summed, jit_options=INNER)
def _summed(row, sums, staged):  # type: ignore[no-untyped-def]
    if row.dtype in FLOATS:
        return lambda row, sums, staged: sum_of_four(*sums)
    if row.dtype == _INT8:
        return lambda row, sums, staged: product(plus(sums[0], sums[1]), spread(staged[0]))  # type: ignore[call-arg]
    return lambda row, sums, staged: product(sums[0], spread(staged[0]))  # type: ignore[call-arg]


# --- one row -----------------------------------------------------------------------------------------------------


@njit(**INNER)
def _ask(row, unit, ahead=AHEAD):  # type: ignore[no-untyped-def]
    for line in range(0, unit_bytes(row), 64):
        ask_ahead(row, unit * unit_bytes(row) + line, ahead)


def ask_for_row(row: Array, ahead: int) -> None:
    """Prefetch as much as a whole row of int4 into the second level, `-ahead` bytes further, if `ahead` is negative."""
    _only_compiled()


@overload(ask_for_row, jit_options=INNER)
def _ask_for_row(row, ahead):  # type: ignore[no-untyped-def]
    if row.dtype != _INT4:
        return lambda row, ahead: None

    def ask(row, ahead):  # type: ignore[no-untyped-def]
        for at in range(0, row.shape[0] if ahead < 0 else 0, 64):  # behind an `if` Numba counts references
            prefetch_far(row, at - ahead)  # type: ignore[call-arg]

    return ask


def prefetched_units(row: Array, whole: int, ahead: int) -> int:
    """How many of a row's units are processed in the loop that prefetches."""
    return _only_compiled()


@overload(prefetched_units, jit_options=INNER)
def _prefetched_units(row, whole, ahead):  # type: ignore[no-untyped-def]
    if row.dtype in FLOATS:
        return lambda row, whole, ahead: whole if ahead > 0 else 0
    # A second loop for integers would be compiled for nothing: without prefetching they were slower everywhere, and
    # a prefetch of the line that is read anyway costs next to nothing.
    return lambda row, whole, ahead: whole


@njit(**INNER)
def row_dot(row, staged, columns, ahead=AHEAD):  # type: ignore[no-untyped-def]
    """Sixteen numbers whose sum is `row . x`, but for what `formats.finish` adds; `staged` is x, staged.

    Memory is prefetched `ahead` bytes before it is needed, not at all if that is 0; for negative numbers see
    `ask_for_row`.
    """
    s = no_sums(row)
    whole = units(row, columns)
    asking = prefetched_units(row, whole, ahead)
    ask_for_row(row, ahead)
    near = max(ahead, 0)
    for i in range(asking):
        _ask(row, i, near)
        s = times(row, weights_at(row, i, columns), staged, i, s)
    for i in range(asking, whole):
        s = times(row, weights_at(row, i, columns), staged, i, s)
    for i in range(whole, whole + last_units(row, columns)):  # behind an `if` Numba counts references
        s = times(row, last_weights(row, i, columns), staged, i, s)
    return summed(row, s, staged)


@njit(**INNER)
def dots_of_two(row, x, y, columns):  # type: ignore[no-untyped-def]
    """`row_dot` with two staged vectors, the same bits."""
    s, t = no_sums(row), no_sums(row)
    whole = units(row, columns)
    for i in range(whole):
        _ask(row, i)
        weights = weights_at(row, i, columns)
        s, t = times(row, weights, x, i, s), times(row, weights, y, i, t)
    for i in range(whole, whole + last_units(row, columns)):
        weights = last_weights(row, i, columns)
        s, t = times(row, weights, x, i, s), times(row, weights, y, i, t)
    return summed(row, s, x), summed(row, t, y)


@njit(**INNER)
def dots_of_four(row, x0, x1, x2, x3, columns):  # type: ignore[no-untyped-def]
    """`row_dot` with four staged vectors, the same bits."""
    s0, s1, s2, s3 = no_sums(row), no_sums(row), no_sums(row), no_sums(row)
    whole = units(row, columns)
    for i in range(whole):
        _ask(row, i)
        weights = weights_at(row, i, columns)
        s0, s1 = times(row, weights, x0, i, s0), times(row, weights, x1, i, s1)
        s2, s3 = times(row, weights, x2, i, s2), times(row, weights, x3, i, s3)
    for i in range(whole, whole + last_units(row, columns)):
        weights = last_weights(row, i, columns)
        s0, s1 = times(row, weights, x0, i, s0), times(row, weights, x1, i, s1)
        s2, s3 = times(row, weights, x2, i, s2), times(row, weights, x3, i, s3)
    return summed(row, s0, x0), summed(row, s1, x1), summed(row, s2, x2), summed(row, s3, x3)


@njit(**INNER)
def load_sums(values, offset):  # type: ignore[no-untyped-def]
    """Load four times sixteen sums from a byte offset."""
    a, b = load_fp32(values, offset), load_fp32(values, offset + 64)  # type: ignore[call-arg]
    return a, b, load_fp32(values, offset + 128), load_fp32(values, offset + 192)  # type: ignore[call-arg]


@njit(**INNER)
def store_sums(values, offset, sums):  # type: ignore[no-untyped-def]
    """Store four times sixteen sums at a byte offset."""
    for i in range(4):
        store(values, offset + 64 * i, sums[i])  # type: ignore[call-arg]


@njit(**INNER)
def panel_of_four(row, x0, x1, x2, x3, first, last, sums, after, shift):  # type: ignore[no-untyped-def]
    """Add units `first` to `last` of a row in FLOATS times four staged vectors to sums (4, 64) fp32.

    Meanwhile the units of row `after` that lie `shift` units further are prefetched.
    """
    s0, s1, s2, s3 = load_sums(sums, 0), load_sums(sums, 256), load_sums(sums, 512), load_sums(sums, 768)
    for i in range(first, last):
        for line in range(0, unit_bytes(row), 64):
            prefetch_far(after, (i + shift) * unit_bytes(row) + line)  # type: ignore[call-arg]
        weights = unpacked(row, i)
        s0, s1 = times_floats(weights, x0, i, s0), times_floats(weights, x1, i, s1)
        s2, s3 = times_floats(weights, x2, i, s2), times_floats(weights, x3, i, s3)
    store_sums(sums, 0, s0)
    store_sums(sums, 256, s1)
    store_sums(sums, 512, s2)
    store_sums(sums, 768, s3)


# --- four rows ---------------------------------------------------------------------------------------------------


def four_dots(w0: Array, w1: Array, w2: Array, w3: Array, staged: Array, columns: int, ahead: int) -> Any:
    """`row_dot` of four rows, the same bits: numbers side by side, integers one after the other."""
    return _only_compiled()


@njit(**INNER)
def _ask_for_next_four(row, unit):  # type: ignore[no-untyped-def]
    for line in range(0, unit_bytes(row), 64):
        prefetch(row, 4 * row.shape[0] * row.itemsize + unit * unit_bytes(row) + line)  # type: ignore[call-arg]


@njit(**INNER)
def _four_float_dots(w0, w1, w2, w3, staged, columns, ahead):  # type: ignore[no-untyped-def]
    s0, s1, s2, s3 = _no_floats(), _no_floats(), _no_floats(), _no_floats()
    whole = whole_blocks(w0, columns)
    asking = whole if ahead > 0 else 0
    for i in range(asking):
        _ask_for_next_four(w0, i)
        _ask_for_next_four(w1, i)
        _ask_for_next_four(w2, i)
        _ask_for_next_four(w3, i)
        s0, s1 = times_floats(unpacked(w0, i), staged, i, s0), times_floats(unpacked(w1, i), staged, i, s1)
        s2, s3 = times_floats(unpacked(w2, i), staged, i, s2), times_floats(unpacked(w3, i), staged, i, s3)
    for i in range(asking, whole):
        s0, s1 = times_floats(unpacked(w0, i), staged, i, s0), times_floats(unpacked(w1, i), staged, i, s1)
        s2, s3 = times_floats(unpacked(w2, i), staged, i, s2), times_floats(unpacked(w3, i), staged, i, s3)
    return sum_of_four(*s0), sum_of_four(*s1), sum_of_four(*s2), sum_of_four(*s3)


@njit(**INNER)
def _four_single_dots(w0, w1, w2, w3, staged, columns, ahead):  # type: ignore[no-untyped-def]
    s0, s1 = row_dot(w0, staged, columns, ahead), row_dot(w1, staged, columns, ahead)
    return s0, s1, row_dot(w2, staged, columns, ahead), row_dot(w3, staged, columns, ahead)


@overload(four_dots, jit_options=INNER)
def _four_dots(w0, w1, w2, w3, staged, columns, ahead):  # type: ignore[no-untyped-def]
    if w0.dtype in FLOATS:
        return lambda w0, w1, w2, w3, staged, columns, ahead: _four_float_dots(w0, w1, w2, w3, staged, columns, ahead)
    return lambda w0, w1, w2, w3, staged, columns, ahead: _four_single_dots(w0, w1, w2, w3, staged, columns, ahead)
