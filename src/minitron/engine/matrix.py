"""A matrix of weights in one of the formats that decoding reads, and how its bytes are read back in torch.

| format | bits per weight | what is stored |
| --- | --- | --- |
| fp32, bf16 | 32, 16 | the numbers |
| bf12 | 12, and 64 for each escape | bf16 exactly: sign and mantissa, and the exponent as its index in a row's window |
| int8 | 8.5 | -127 to 127, a bf16 scale for each 32 columns |
| int4 | 4.5 | -8 to 7, a bf16 scale for each 32 columns |

All that belongs to a row is contiguous, so a neuron that is skipped costs nothing. Importing this file does not import
torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from .buffers import Buffer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Format = Literal["bf16", "fp32", "bf12", "int8", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)
CUDA_FORMATS = ("bf16", "fp16", "fp32", "int8", "int4")
"""Formats that the CUDA engine reads."""
PLAIN_BYTES = {"bf16": 2, "fp32": 4, "fp16": 2, "fp64": 8}
"""Formats that are a dtype, and the bytes of a number; decode kernels read the first two, the reference engine all."""
BLOCK = 64
"""Columns that are unpacked together; rows are padded with zeros to whole blocks."""
BYTES_PER_BLOCK = {"bf12": 96, "int8": 68, "int4": 36}
BITS = {"int8": 8, "int4": 4}
HEAD_FORMATS = {"int4": "int8"}
"""Formats of the LM head where it differs from the other matrices: in four bits the head alone would add as much KL as
all layers together (measured on the bundled model, `docs/performance.md`)."""
GROUP = 32
"""Columns with one scale, int8 and int4."""

WEIGHTS_AT_ONCE = 1 << 20
"""Weights that are quantized or unpacked at a time: bounds the memory of intermediate numbers."""


@dataclass
class Matrix:
    """A matrix (N, K) of weights.

    Attributes:
        format: one of FORMATS, or for the reference engine "fp16" or "fp64".
        shape: (N, K).
        data: the matrix itself in plain formats, otherwise (N, bytes of a row) uint8.
        extras: bf12 only, int32: N row factors (bits of fp32), N + 1 indices into the list of escapes, and that list:
            column and bf16 bits of each.
    """

    format: str
    shape: tuple[int, int]
    data: Buffer
    extras: Buffer | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        parts = [self.data] if self.extras is None else [self.data, self.extras]
        return sum(part.nbytes for part in parts)

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` as plain numbers; plain formats are not copied if the dtype is theirs."""
        rows = slice(start, self.shape[0] if stop is None else stop)
        if self.format in PLAIN_BYTES:
            return self.data[rows].to(dtype)
        import torch

        K = self.shape[1]
        step = max(1, WEIGHTS_AT_ONCE // K)
        out = torch.empty((rows.stop - start, K), dtype=dtype, device=self.data.device)
        for first in range(start, rows.stop, step):
            last = min(first + step, rows.stop)
            out[first - start : last - start] = _UNPACK[self.format](self, first, last)[:, :K]
        return out

    def select(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows as plain numbers: indices (T,) to (T, K)."""
        if self.format in PLAIN_BYTES:
            return self.data[rows].to(dtype)
        import torch

        return torch.cat([self.dense(dtype, row, row + 1) for row in rows.tolist()])


def row_bytes(format: str, columns: int) -> int:
    """Bytes of one row, but for the escapes and row factors of bf12."""
    if format in PLAIN_BYTES:
        return columns * PLAIN_BYTES[format]
    return -(-columns // BLOCK) * BYTES_PER_BLOCK[format]


def _unpack_scaled(matrix: Matrix, first: int, last: int) -> Tensor:
    import torch

    rows = matrix.data[first:last]
    N, columns = len(rows), -(-matrix.shape[1] // BLOCK) * BLOCK
    width = columns if matrix.format == "int8" else columns // 2
    scales = rows[:, width:].contiguous().view(torch.bfloat16).float()
    if matrix.format == "int8":
        codes = rows[:, :width].contiguous().view(torch.int8).float()
    else:
        nibbles = rows[:, :width].reshape(N, -1, 1, 16)
        codes = torch.cat([nibbles & 15, nibbles >> 4], dim=2).float() - 8
    return (codes.view(N, -1, GROUP) * scales[..., None]).view(N, -1)


SHIFT = 64
"""bf12: kernels multiply activations by 2^SHIFT, because the stored numbers have tiny exponents."""


def _unpack_bf12(matrix: Matrix, first: int, last: int) -> Tensor:
    import torch

    assert matrix.extras is not None
    N = matrix.shape[0]
    blocks = matrix.data[first:last].view(last - first, -1, BYTES_PER_BLOCK["bf12"])
    rest, nibbles = blocks[..., :BLOCK].int(), blocks[..., BLOCK:].int()
    code = torch.cat([nibbles & 15, nibbles >> 4], dim=2)
    base = (matrix.extras[first:last] >> 23) - 127 + SHIFT
    exponent = torch.where(code == 0, 0, code + base[:, None, None])
    bits = ((rest & 128) << 8 | exponent << 7 | rest & 127).view(last - first, -1)
    starts = matrix.extras[N : 2 * N + 1]
    begin, end = int(starts[first]), int(starts[last])
    listed = matrix.extras[2 * N + 1 :].view(-1, 2)[begin:end]
    rows = torch.repeat_interleave(torch.arange(last - first), starts[first : last + 1].diff().long())
    bits[rows, listed[:, 0].long()] = listed[:, 1]
    return bits.to(torch.int16).view(torch.bfloat16)


_UNPACK = {"int8": _unpack_scaled, "int4": _unpack_scaled, "bf12": _unpack_bf12}
