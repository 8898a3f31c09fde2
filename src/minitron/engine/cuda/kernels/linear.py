"""One row or a few through a norm and a matrix, with what is added to the product: QKV, `o_proj`, a gated `down_proj`,
the LM head."""

# Kernels are written in a language of their own inside Python, whose constants and tensors type checkers do not know.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...matrix import PLAIN_BYTES, Matrix
from ...parts import Norm
from . import FORMATS, MOST_ROWS
from .products import LAYER_NORM, NO_NORM, RMS_NORM, normalized, project, row_statistics

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
"""Dtypes that the kernels compute products in."""
FUSED_NORM_ROWS = 4
"""Above so many rows a norm runs once, in a kernel of its own; below, every program normalizes the rows for itself."""


@triton.jit
def _linear(
    x,
    gain,
    offset,
    weight,
    scales,
    bias,
    residual,
    out,
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
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    found = project(
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
        NORM,
        FORMAT,
        DTYPE,
        ROWS,
        BLOCK_N,
        BLOCK_K,
    )
    rows = tl.arange(0, ROWS)
    inside = (rows[:, None] < M) & (outputs[None, :] < N)
    at = rows[:, None].to(tl.int64) * N + outputs[None, :]
    if residual is not None:
        found += tl.load(residual + at, mask=inside, other=0.0)
    tl.store(out + at, found, mask=inside)


@triton.jit
def _normalize(x, gain, offset, out, K, eps, NORM: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * K
    mean, deviation = row_statistics(x + row, 1, K, eps, NORM, 1, BLOCK_K)  # pyright: ignore[reportGeneralTypeIssues]
    for first in range(0, K, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        found = normalized(x + row, columns, 1, K, mean, deviation, gain, offset, NORM, 1, DTYPE)
        tl.store(out + row + columns[None, :], found, mask=columns[None, :] < K)


def kind_of(norm: Norm | None) -> int:
    """Which of the kernels' norms a norm is."""
    if norm is None:
        return NO_NORM
    return RMS_NORM if norm.offset is None else LAYER_NORM


def operands(matrix: Matrix) -> tuple[Tensor, Tensor | None, int, str]:
    """A matrix as a kernel takes it: (data, the same bytes as bf16 scales, elements between rows, format).

    Raises:
        ValueError: the kernels do not read its format.
    """
    if matrix.format not in FORMATS:
        raise ValueError(f"weights in {matrix.format} do not run on a GPU; take one of {', '.join(FORMATS)}")
    data = matrix.data
    if matrix.format in PLAIN_BYTES:
        return data, None, data.stride(0), "plain"
    return data, data.view(torch.bfloat16), data.stride(0), matrix.format


def padded_rows(rows: int) -> int:
    """Rows of a program's tile: matrix units take 16 or more.

    Raises:
        ValueError: there are too many.
    """
    if not 0 < rows <= MOST_ROWS:
        raise ValueError(f"{rows} rows in one call; the kernels take 1 to {MOST_ROWS}")
    return 1 if rows == 1 else max(16, 1 << (rows - 1).bit_length())


def tiles(rows: int) -> dict[str, int]:
    """Sizes of tiles, by arithmetic: not measured on a GPU."""
    return {"BLOCK_N": 8, "BLOCK_K": 512} if rows == 1 else {"BLOCK_N": 16, "BLOCK_K": 128}


def normalize(x: Tensor, norm: Norm, eps: float, dtype: torch.dtype) -> Tensor:
    """Rows (M, K) fp32 normalized, in a dtype."""
    M, K = x.shape
    out = torch.empty((M, K), dtype=dtype, device=x.device)
    _normalize[(M,)](x, norm.gain, norm.offset, out, K, eps, NORM=kind_of(norm), DTYPE=TYPES[dtype], BLOCK_K=1024)
    return out


def prepared(x: Tensor, norm: Norm | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Norm | None]:
    """Rows and the norm that is left to be done to them."""
    if norm is None or len(x) <= FUSED_NORM_ROWS:
        return x, norm
    return normalize(x, norm, eps, dtype), None


def linear(
    x: Tensor,
    matrix: Matrix,
    dtype: torch.dtype,
    *,
    norm: Norm | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """residual + norm(x) @ matrix.T + bias, (M, N) fp32; what is None is left out.

    Args:
        x: (M, K), contiguous, at most MOST_ROWS rows; fp32 where there is a norm.
        matrix: (N, K), in one of FORMATS.
        dtype: what the rows are rounded to before the product, whose sums are fp32.
        norm: layer norm or RMSNorm; its vectors on the device of `x`.
        eps: of the norm.
        bias: (N,) fp32.
        residual: (M, N) fp32; may be `out`.
        out: (M, N) fp32, to write to.

    Raises:
        ValueError: a format that the kernels do not read, or too many rows.
    """
    M, K = x.shape
    N = matrix.shape[0]
    ROWS = padded_rows(M)
    data, scales, stride, format = operands(matrix)
    x, norm = prepared(x, norm, eps, dtype)
    gain, offset = (None, None) if norm is None else (norm.gain, norm.offset)
    out = torch.empty((M, N), dtype=torch.float32, device=x.device) if out is None else out
    sizes = tiles(M)
    _linear[(triton.cdiv(N, sizes["BLOCK_N"]),)](
        x, gain, offset, data, scales, bias, residual, out, M, N, K, stride, eps,
        NORM=kind_of(norm), FORMAT=format, DTYPE=TYPES[dtype], ROWS=ROWS, **sizes,
    )  # fmt: skip
    return out
