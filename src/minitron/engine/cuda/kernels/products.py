"""Products of a few rows with a matrix in any of the device's formats: what the other kernels are made of.

The rows may be normalized while they are read. The matrix is read once, in pieces that a program multiplies as they
come. Columns of 4-bit codes lie in halves of bytes, so such a piece takes two products, one for each half.

Letters of shapes: M rows, N outputs, K inputs.
"""

# Kernels are written in a language of their own inside Python, whose constants and tensors type checkers do not know.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from ...matrix import BLOCK as PADDING
from ...matrix import GROUP

NO_NORM, LAYER_NORM, RMS_NORM = 0, 1, 2
"""What is done to the rows before the product."""

# Names of a kernel's constants must be constexpr.
_LAYER = tl.constexpr(LAYER_NORM)
_RMS = tl.constexpr(RMS_NORM)
_GROUP = tl.constexpr(GROUP)
_HALF_GROUP = tl.constexpr(GROUP // 2)
_PADDING = tl.constexpr(PADDING)
# The interpreter multiplies the bits of bf16 numbers; in fp32 the products of rounded numbers are the same.
_INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def row_statistics(x, M, K, eps, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """(mean, 1 / deviation) of each row of x (M, K), in fp32, each (ROWS,)."""
    rows = tl.arange(0, ROWS)
    mean = tl.zeros((ROWS,), tl.float32)
    if NORM == _LAYER:
        for first in range(0, K, BLOCK_K):
            columns = first + tl.arange(0, BLOCK_K)
            inside = (rows[:, None] < M) & (columns[None, :] < K)
            mean += tl.sum(tl.load(x + rows[:, None] * K + columns[None, :], mask=inside, other=0.0), axis=1)
        mean = mean / K
    squares = tl.zeros((ROWS,), tl.float32)
    for first in range(0, K, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < M) & (columns[None, :] < K)
        values = tl.load(x + rows[:, None] * K + columns[None, :], mask=inside, other=0.0)
        distance = tl.where(inside, values - mean[:, None], 0.0)
        squares += tl.sum(distance * distance, axis=1)
    return mean, 1.0 / tl.sqrt(squares / K + eps)


@triton.jit
def normalized(
    x, columns, M, K, mean, deviation, gain, offset, NORM: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr
):
    """Some columns (C,) of the rows of x (M, K), normalized if NORM says so, rounded to DTYPE: (ROWS, C)."""
    rows = tl.arange(0, ROWS)
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    values = tl.load(x + rows[:, None] * K + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM != 0:
        values = (values - mean[:, None]) * deviation[:, None]
        values = values * tl.load(gain + columns, mask=columns < K, other=0.0)[None, :]
        if NORM == _LAYER:
            values += tl.load(offset + columns, mask=columns < K, other=0.0)[None, :]
        values = tl.where(inside, values, 0.0)
    return values.to(DTYPE)


@triton.jit
def stored_columns(K, FORMAT: tl.constexpr):
    """Elements of a row before its scales: of quantized rows bytes, with those that fill the last block."""
    if FORMAT == "plain":
        return K
    whole = (K + _PADDING - 1) // _PADDING * _PADDING
    return whole if FORMAT == "int8" else whole // 2


@triton.jit
def code_columns(piece, FORMAT: tl.constexpr):
    """The first of the columns that the bytes number `piece` of rows hold; int4 holds another, GROUP / 2 later."""
    if FORMAT == "int4":
        return piece // _HALF_GROUP * _GROUP + piece % _HALF_GROUP
    return piece


@triton.jit
def weights_of(
    weight, scales, rows, readable, first, stride, K, FORMAT: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr
):
    """Weights (ROWS, BYTES) fp32, and for int4 those of the second halves, of some rows (ROWS,) of a matrix.

    Args:
        weight: to the matrix; its rows are `stride` elements apart, of its dtype or bytes.
        scales: to the same bytes as bf16.
        readable: (ROWS,), which rows to read; the weights of others are 0.
        first: the first of the BYTES elements of each row.
    """
    at = rows[:, None].to(tl.int64) * stride
    piece = first + tl.arange(0, BYTES)
    inside = readable[:, None] & (piece < stored_columns(K, FORMAT))[None, :]
    if FORMAT == "plain":
        found = tl.load(weight + at + piece[None, :], mask=inside, other=0.0).to(tl.float32)
        return found, found
    else:
        stored = tl.load(weight + at + piece[None, :], mask=inside, other=0)
        WIDTH: tl.constexpr = _GROUP if FORMAT == "int8" else _HALF_GROUP
        COUNT: tl.constexpr = BYTES // WIDTH
        # One scale is read for all codes of a group, not one for each.
        group = first // WIDTH + tl.arange(0, COUNT)
        limit = stored_columns(K, FORMAT)
        scale = tl.load(
            scales + at // 2 + (limit // 2 + group)[None, :],
            mask=readable[:, None] & (group * WIDTH < limit)[None, :],
            other=0.0,
        )
        scale = scale.to(tl.float32)[:, :, None]
        if FORMAT == "int8":
            codes = stored.to(tl.int8, bitcast=True).to(tl.float32)
            found = tl.reshape(tl.reshape(codes, (ROWS, COUNT, WIDTH)) * scale, (ROWS, BYTES))
            return found, found
        else:
            low = (stored & 15).to(tl.float32) - 8.0
            high = (stored >> 4).to(tl.float32) - 8.0
            low = tl.reshape(tl.reshape(low, (ROWS, COUNT, WIDTH)) * scale, (ROWS, BYTES))
            high = tl.reshape(tl.reshape(high, (ROWS, COUNT, WIDTH)) * scale, (ROWS, BYTES))
            return low, high


@triton.jit
def multiply_add(sums, x, w, ROWS: tl.constexpr):
    """`sums` plus x (ROWS, C) times w (R, C): (R, C) products of one row, which are summed later, or (ROWS, R)."""
    if ROWS == 1:
        return sums + x.to(tl.float32) * w
    elif _INTERPRETED:
        return tl.dot(x.to(tl.float32), tl.trans(w.to(x.dtype).to(tl.float32)), sums, input_precision="ieee")
    else:
        return tl.dot(x, tl.trans(w.to(x.dtype)), sums, input_precision="ieee")


@triton.jit
def project(
    x,
    gain,
    offset,
    weight,
    scales,
    bias,
    outputs,
    M,
    N,
    K,
    stride,
    eps,
    NORM: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """norm(x) @ weight[outputs].T + bias in fp32, (ROWS, BLOCK_N).

    Args:
        x: to (M, K), contiguous; M is at most ROWS.
        gain, offset: to (K,) fp32, of the norm; `offset` of a layer norm only.
        weight, scales: see `weights_of`.
        bias: to (N,) fp32, or None.
        outputs: (BLOCK_N,) rows of the matrix (N, K).
        stride: elements between rows of `weight`.
        eps: of the norm.
        DTYPE: what the normalized rows are rounded to, and what the product of several rows runs in.
        ROWS: 1, or at least 16 and a power of two.
    """
    mean = tl.zeros((ROWS,), tl.float32)
    deviation = tl.zeros((ROWS,), tl.float32)
    if NORM != 0:
        mean, deviation = row_statistics(x, M, K, eps, NORM, ROWS, BLOCK_K)
    BYTES: tl.constexpr = BLOCK_K // 2 if FORMAT == "int4" else BLOCK_K
    sums = tl.zeros((BLOCK_N, BYTES) if ROWS == 1 else (ROWS, BLOCK_N), tl.float32)
    for first in range(0, stored_columns(K, FORMAT), BYTES):
        columns = code_columns(first + tl.arange(0, BYTES), FORMAT)
        low, high = weights_of(weight, scales, outputs, outputs < N, first, stride, K, FORMAT, BLOCK_N, BYTES)
        some = normalized(x, columns, M, K, mean, deviation, gain, offset, NORM, ROWS, DTYPE)
        sums = multiply_add(sums, some, low, ROWS)
        if FORMAT == "int4":
            other = columns + _HALF_GROUP
            some = normalized(x, other, M, K, mean, deviation, gain, offset, NORM, ROWS, DTYPE)
            sums = multiply_add(sums, some, high, ROWS)
    found = tl.sum(sums, axis=1)[None, :] if ROWS == 1 else sums
    if bias is not None:
        found += tl.load(bias + outputs, mask=outputs < N, other=0.0)[None, :]
    return found
