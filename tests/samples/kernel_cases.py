"""Where Triton kernels run in tests (a GPU, otherwise Triton's interpreter), on what, and how exact they are."""

from __future__ import annotations

import torch
from torch import Tensor

from minitron.engine.matrix import PLAIN_BYTES, Matrix
from minitron.engine.parts import Norm
from minitron.engine.quantize import PLAIN, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest error of a sum, as a share of the sum of the terms' magnitudes: two roundings of each factor."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def matrix_of(weights: Tensor, format: str) -> Matrix:
    made = quantize(weights.cpu(), format)  # type: ignore[arg-type]
    return Matrix(made.format, made.shape, made.data.to(DEVICE))


def dense(matrix: Matrix) -> Tensor:
    """The numbers that a matrix holds, in fp64, on the CPU."""
    return Matrix(matrix.format, matrix.shape, matrix.data.cpu()).dense(torch.float64)


def dtype_of_format(format: str) -> torch.dtype:
    return PLAIN[format] if format in PLAIN_BYTES else torch.bfloat16


def some_norm(width: int, kind: str) -> Norm | None:
    if kind == "none":
        return None
    gain = numbers(width, seed=1).abs() + 0.5
    return Norm(gain, numbers(width, seed=2) * 0.1 if kind == "layer" else None)


def normed(x: Tensor, norm: Norm | None, eps: float) -> Tensor:
    """In fp64, on the CPU."""
    x = x.double().cpu()
    if norm is None:
        return x
    gain = norm.gain.double().cpu()
    if norm.offset is None:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], gain, eps)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], gain, norm.offset.double().cpu(), eps)


def assert_product(found: Tensor, x: Tensor, w: Tensor, dtype: torch.dtype, *added: Tensor | None) -> None:
    """`found` is x @ w.T plus what is added, given in fp64, as exactly as the dtype permits."""
    terms = [part.double().cpu() for part in added if part is not None]
    expected, size = x @ w.T + sum(terms), x.abs() @ w.abs().T + sum(part.abs() for part in terms)
    error = (found.double().cpu() - expected).abs()
    assert (error <= EXACT[dtype] * (size + 1)).all(), float((error / size).max())
