"""The MLP of a few rows: of squared ReLU, whose zero neurons are skipped, and of a gate.

A program of the first kernel computes a block of neurons of all rows and lists those that are not zero in every row, in
rising order, in the block's own piece of memory. No program waits for another one and nothing is added atomically, so
the list, and the order of every sum over it, is the same each time. A program of the second kernel reads the rows of a
transposed `down_proj` that some blocks list, and writes a partial sum; the third adds up the partial sums in their
order, with the residual stream.

Letters of shapes: M rows, D hidden, F neurons, S blocks of neurons.
"""

# Kernels are written in a language of their own inside Python, whose constants and tensors type checkers do not know.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...matrix import Matrix
from ...parts import Norm
from .linear import TYPES, kind_of, operands, padded_rows, prepared, tiles
from .products import _HALF_GROUP, code_columns, multiply_add, project, weights_of

BLOCKS_AT_ONCE = 32
"""Blocks of neurons that one program of the second kernel reads."""
LISTED_AT_ONCE = 2
"""Neurons of each of them that it reads at a time: with one neuron in ten active, few blocks of eight list more."""
DOWN_COLUMNS = 128
"""Channels that it computes."""


@triton.jit
def _up(
    x,
    gain,
    offset,
    weight,
    scales,
    bias,
    values,
    index,
    counts,
    M,
    F,
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
    block = tl.program_id(0)
    neurons = block * BLOCK_N + tl.arange(0, BLOCK_N)
    found = project(
        x, gain, offset, weight, scales, bias, neurons, M, F, K, stride, eps,
        NORM, FORMAT, DTYPE, ROWS, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    rows = tl.arange(0, ROWS)
    inside = (rows[:, None] < M) & (neurons[None, :] < F)
    # NaN is not at most 0, so it is listed and reaches the result.
    squared = tl.where((found <= 0.0) | (inside == 0), 0.0, found * found).to(DTYPE)
    tl.store(values + rows[:, None].to(tl.int64) * F + neurons[None, :], squared, mask=inside)
    active = tl.max((squared.to(tl.float32) != 0.0).to(tl.int32), axis=0)
    count = tl.sum(active, axis=0)
    before = tl.cumsum(active, axis=0)
    position = tl.where(active != 0, before - 1, count + tl.arange(0, BLOCK_N) - before)
    tl.store(index + block * BLOCK_N + position, tl.where(active != 0, neurons, -1))
    tl.store(counts + block, count)


@triton.jit
def _down(
    values,
    index,
    counts,
    weight,
    scales,
    partial,
    M,
    F,
    D,
    S,
    stride,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program's channels of the sum over the neurons of its blocks, to `partial` (parts, M, D)."""
    BYTES: tl.constexpr = BLOCK_D // 2 if FORMAT == "int4" else BLOCK_D
    LINES: tl.constexpr = BLOCKS * LISTED
    first_byte = tl.program_id(0) * BYTES
    lines = tl.arange(0, LINES)
    blocks = tl.program_id(1) * BLOCKS + lines // LISTED
    count = tl.load(counts + blocks, mask=blocks < S, other=0)
    rows = tl.arange(0, ROWS)
    low = tl.zeros((ROWS, BYTES), tl.float32)
    high = tl.zeros((ROWS, BYTES), tl.float32)
    for first in range(0, tl.max(count, axis=0), LISTED):
        position = first + lines % LISTED
        valid = position < count
        neurons = tl.load(index + blocks * BLOCK + position, mask=valid, other=0)
        w, second = weights_of(weight, scales, neurons, valid, first_byte, stride, D, FORMAT, LINES, BYTES)
        if ROWS == 1:
            h = tl.load(values + neurons, mask=valid, other=0.0).to(DTYPE).to(tl.float32)[:, None]
            low += tl.sum(h * w, axis=0)[None, :]
            if FORMAT == "int4":
                high += tl.sum(h * second, axis=0)[None, :]
        else:
            at = rows[:, None].to(tl.int64) * F + neurons[None, :]
            h = tl.load(values + at, mask=(rows[:, None] < M) & valid[None, :], other=0.0).to(DTYPE)
            low = multiply_add(low, h, tl.trans(w), ROWS)
            if FORMAT == "int4":
                high = multiply_add(high, h, tl.trans(second), ROWS)
    columns = code_columns(first_byte + tl.arange(0, BYTES), FORMAT)
    to = partial + (tl.program_id(1) * M + rows[:, None]).to(tl.int64) * D
    tl.store(to + columns[None, :], low, mask=(rows[:, None] < M) & (columns[None, :] < D))
    if FORMAT == "int4":
        columns += _HALF_GROUP
        tl.store(to + columns[None, :], high, mask=(rows[:, None] < M) & (columns[None, :] < D))


@triton.jit
def _add_up(partial, bias, residual, out, M, D, parts, BLOCK_D: tl.constexpr):
    """residual + bias + the sum of `partial` (parts, M, D) over its parts, in their order."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    row = tl.program_id(1).to(tl.int64)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for part in range(parts):
        sums += tl.load(partial + (part * M + row) * D + columns, mask=inside, other=0.0)
    if bias is not None:
        sums += tl.load(bias + columns, mask=inside, other=0.0)
    if residual is not None:
        sums += tl.load(residual + row * D + columns, mask=inside, other=0.0)
    tl.store(out + row * D + columns, sums, mask=inside)


def up_squared_relu(
    x: Tensor,
    up: Matrix,
    dtype: torch.dtype,
    *,
    norm: Norm | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(norm(x) @ up.T + bias) ** 2, and which neurons of it are not zero.

    Args:
        x: (M, D), see `linear.linear`.
        up: (F, D).
        dtype: of the product and of the values.
        norm, eps, bias: see `linear.linear`.

    Returns:
        values (M, F) in `dtype`; index (S, block) int32, in each block the neurons that are not zero in every row, in
        rising order, then -1; counts (S,) int32, how many they are.
    """
    M, K = x.shape
    F = up.shape[0]
    data, scales, stride, format = operands(up)
    x, norm = prepared(x, norm, eps, dtype)
    gain, offset = (None, None) if norm is None else (norm.gain, norm.offset)
    sizes = tiles(M)
    block = sizes["BLOCK_N"]
    S = triton.cdiv(F, block)
    values = torch.empty((M, F), dtype=dtype, device=x.device)
    index = torch.empty((S, block), dtype=torch.int32, device=x.device)
    counts = torch.empty(S, dtype=torch.int32, device=x.device)
    _up[(S,)](
        x, gain, offset, data, scales, bias, values, index, counts, M, F, K, stride, eps,
        NORM=kind_of(norm), FORMAT=format, DTYPE=TYPES[dtype], ROWS=padded_rows(M), **sizes,
    )  # fmt: skip
    return values, index, counts


def down_active(
    values: Tensor,
    index: Tensor,
    counts: Tensor,
    down: Matrix,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + values @ down + bias, (M, D) fp32. Rows of `down` that are not listed are not read.

    Args:
        values, index, counts: of `up_squared_relu`.
        down: (F, D), the transposed `down_proj`.
        dtype: what the values of the neurons are rounded to.
        bias: (D,) fp32.
        residual: (M, D) fp32.
    """
    (M, F), (S, block), D = values.shape, index.shape, down.shape[1]
    data, scales, stride, format = operands(down)
    parts = triton.cdiv(S, BLOCKS_AT_ONCE)
    partial = torch.empty((parts, M, D), dtype=torch.float32, device=values.device)
    out = torch.empty((M, D), dtype=torch.float32, device=values.device)
    _down[(triton.cdiv(D, DOWN_COLUMNS), parts)](
        values, index, counts, data, scales, partial, M, F, D, S, stride,
        FORMAT=format, DTYPE=TYPES[dtype], ROWS=padded_rows(M), BLOCK=block, BLOCKS=BLOCKS_AT_ONCE,
        LISTED=LISTED_AT_ONCE, BLOCK_D=DOWN_COLUMNS,
    )  # fmt: skip
    _add_up[(triton.cdiv(D, 256), M)](partial, bias, residual, out, M, D, parts, BLOCK_D=256)
    return out


@triton.jit
def _gated(
    x,
    gain,
    offset,
    gate,
    gate_scales,
    gate_bias,
    up,
    up_scales,
    up_bias,
    out,
    M,
    F,
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
    neurons = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    a = project(
        x, gain, offset, gate, gate_scales, gate_bias, neurons, M, F, K, stride, eps,
        NORM, FORMAT, DTYPE, ROWS, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    b = project(
        x, gain, offset, up, up_scales, up_bias, neurons, M, F, K, stride, eps,
        NORM, FORMAT, DTYPE, ROWS, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    rows = tl.arange(0, ROWS)
    inside = (rows[:, None] < M) & (neurons[None, :] < F)
    tl.store(out + rows[:, None].to(tl.int64) * F + neurons[None, :], a * tl.sigmoid(a) * b, mask=inside)


def gated_silu(
    x: Tensor,
    gate: Matrix,
    up: Matrix,
    dtype: torch.dtype,
    *,
    norm: Norm | None = None,
    eps: float = 0.0,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """silu(n @ gate.T + gate_bias) * (n @ up.T + up_bias) with n = norm(x), (M, F) in `dtype`.

    Args:
        x: (M, D), see `linear.linear`.
        gate, up: (F, D), of one format.
        dtype, norm, eps: see `linear.linear`.
        gate_bias, up_bias: (F,) fp32.
    """
    M, K = x.shape
    F = up.shape[0]
    (a, a_scales, stride, format), (b, b_scales, _, _) = operands(gate), operands(up)
    x, norm = prepared(x, norm, eps, dtype)
    gain, offset = (None, None) if norm is None else (norm.gain, norm.offset)
    out = torch.empty((M, F), dtype=dtype, device=x.device)
    sizes = tiles(M)
    _gated[(triton.cdiv(F, sizes["BLOCK_N"]),)](
        x, gain, offset, a, a_scales, gate_bias, b, b_scales, up_bias, out, M, F, K, stride, eps,
        NORM=kind_of(norm), FORMAT=format, DTYPE=TYPES[dtype], ROWS=padded_rows(M), **sizes,
    )  # fmt: skip
    return out
