"""Matrices in the formats that decoding reads: plain, or quantized (bf12 without loss, int8 and int4 with scales).

| format | bits per weight | what is stored |
| --- | --- | --- |
| fp32, bf16 | 32, 16 | the numbers |
| bf12 | 12, and 64 for each escape | bf16 exactly: sign and mantissa, and the exponent as its index in a row's window |
| int8 | 8.5 | -127 to 127, a bf16 scale for each 32 columns |
| int4 | 4.5 | -8 to 7, a bf16 scale for each 32 columns |

All that belongs to a row is contiguous, so a neuron that is skipped costs nothing. This file defines the bytes, in
torch; `engine.cpu.quantizing` writes them and `engine.cpu.formats` reads them fast.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import pages

Format = Literal["bf16", "fp32", "bf12", "int8", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)
PLAIN = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}
"""Formats that are a dtype of torch; decode kernels read the first two, the reference engine all."""
BLOCK = 64
"""Columns that are unpacked together; rows are padded with zeros to whole blocks."""
BYTES_PER_BLOCK = {"bf12": 96, "int8": 68, "int4": 36}
BITS = {"int8": 8, "int4": 4}
HEAD_FORMATS = {"int4": "int8"}
"""Formats of the LM head where it differs from the other matrices: in four bits the head alone would add as much KL as
all layers together (measured on the bundled model, `docs/performance.md`)."""
GROUP = 32
"""Columns with one scale, int8 and int4."""

WINDOW = 15
"""bf12: number of exponents that a row can have; weights with others, infinity and NaN are escapes."""
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
    data: Tensor
    extras: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        parts = [self.data] if self.extras is None else [self.data, self.extras]
        return sum(part.numel() * part.element_size() for part in parts)

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` as plain numbers; plain formats are not copied if the dtype is theirs."""
        rows = slice(start, self.shape[0] if stop is None else stop)
        if self.format in PLAIN:
            return self.data[rows].to(dtype)
        K = self.shape[1]
        step = max(1, WEIGHTS_AT_ONCE // K)
        out = torch.empty((rows.stop - start, K), dtype=dtype)
        for first in range(start, rows.stop, step):
            last = min(first + step, rows.stop)
            out[first - start : last - start] = _UNPACK[self.format](self, first, last)[:, :K]
        return out

    def select(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows as plain numbers: indices (T,) to (T, K)."""
        if self.format in PLAIN:
            return self.data[rows].to(dtype)
        return torch.cat([self.dense(dtype, row, row + 1) for row in rows.tolist()])


def row_bytes(format: str, columns: int) -> int:
    """Bytes of one row, but for the escapes and row factors of bf12."""
    if format in PLAIN:
        return columns * PLAIN[format].itemsize
    return -(-columns // BLOCK) * BYTES_PER_BLOCK[format]


def quantize(weights: Tensor, format: Format) -> Matrix:
    """A matrix (N, K) in a format; plain formats share the memory where the dtype is already right."""
    return quantize_blocks([weights], (weights.shape[0], weights.shape[1]), format)


def quantize_blocks(blocks: Iterable[Tensor], shape: tuple[int, int], format: str) -> Matrix:
    """As `quantize`, from the matrix's rows in pieces, so that it is never in memory as a whole.

    Raises:
        ValueError: a weight is infinite or NaN, which int8 and int4 cannot hold.
    """
    if format in PLAIN:
        return Matrix(format, shape, _plain(blocks, shape, PLAIN[format]))
    data = pages.empty((shape[0], row_bytes(format, shape[1])), torch.uint8)
    step = max(1, WEIGHTS_AT_ONCE // shape[1])
    parts = (block[start : start + step] for block in blocks for start in range(0, len(block), step))
    first, extras = 0, []
    if importlib.util.find_spec("numba") is None:
        for part in parts:
            extras.append(_quantize_part(part, format, data[first : first + len(part)]))
            first += len(part)
    else:
        extras = _quantize_in_threads(parts, format, data)
    return Matrix(format, shape, data, _join_extras(extras) if format == "bf12" else None)


Extras = tuple[Tensor, Tensor, Tensor] | None
"""bf12: exponents before the rows' windows (N,), numbers of escapes (N,), the escapes (E, 2), all int32."""


def _quantize_part(part: Tensor, format: str, out: Tensor) -> Extras:
    """Quantize some rows into `out`, by torch."""
    if format != "bf12":
        part = part.float()
        if not bool(part.isfinite().all()):
            raise _not_finite(format)
    padded = torch.nn.functional.pad(part, (0, -part.shape[1] % BLOCK))
    if format != "bf12":
        out.copy_(_quantize_scaled(padded, format))
        return None
    rows, *found = _encode_bf12(padded)
    out.copy_(rows)
    return tuple(found)  # type: ignore[return-value]


def _not_finite(format: str) -> ValueError:
    return ValueError(f"a weight is infinite or NaN, which {format} cannot hold; bf16 and bf12 can")


def _quantize_in_threads(parts: Iterable[Tensor], format: str, data: Tensor) -> list[Extras]:
    """Quantize parts of a matrix by compiled code, in as many threads as torch has, while the next ones are read."""
    from .cpu import quantizing
    from .cpu.compiled import compiling

    def work(part: Tensor, out: Tensor) -> Extras:
        stored = quantizing.as_stored(part)
        with compiling(f"the quantization of {stored.dtype} weights to {format}"):
            call(stored[:0], out[:0])
        return call(stored, out)

    def call(stored: Any, out: Tensor) -> Extras:
        if format != "bf12":
            if not quantizing.quantize_scaled(stored, BITS[format], out.numpy()):
                raise _not_finite(format)
            return None
        found = [torch.empty(shape, dtype=torch.int32) for shape in (len(stored), len(stored), (stored.size, 2))]
        count = quantizing.encode_bf12(stored, WINDOW, SHIFT + 127, out.numpy(), *(x.numpy() for x in found))
        return found[0], found[1], found[2][:count].clone()

    first, threads = 0, torch.get_num_threads()
    jobs: deque[Future[Extras]] = deque()
    extras: list[Extras] = []
    with ThreadPoolExecutor(threads) as pool:
        for part in parts:
            if format == "bf12":
                part = torch.nn.functional.pad(part.bfloat16(), (0, -part.shape[1] % BLOCK))
            elif part.dtype != torch.bfloat16:
                part = part.float()
            jobs.append(pool.submit(work, part, data[first : first + len(part)]))
            first += len(part)
            if len(jobs) > 2 * threads:
                extras.append(jobs.popleft().result())
        extras.extend(job.result() for job in jobs)
    return extras


def _plain(blocks: Iterable[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    out = None
    first = 0
    for block in blocks:
        if len(block) == shape[0]:
            return block.to(dtype).contiguous()
        out = pages.empty(shape, dtype) if out is None else out
        out[first : first + len(block)] = block
        first += len(block)
    return torch.empty(shape, dtype=dtype) if out is None else out


# --- blocks with a scale -----------------------------------------------------------------------------------------


def _quantize_scaled(w: Tensor, format: str) -> Tensor:
    """(N, whole blocks) fp32 to rows of bytes: all codes, then all scales."""
    N = w.shape[0]
    groups = w.view(N, -1, GROUP)
    if format == "int8":
        scales, codes = _scales_int8(groups)
        packed = codes.to(torch.int8).view(torch.uint8).reshape(N, -1)
    else:
        scales, codes = _scales_int4(groups)
        # Sixteen bytes hold 32 columns: the first sixteen in their low halves.
        halves = (codes + 8).to(torch.uint8).view(N, -1, 2, 16)
        packed = (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(N, -1)
    return torch.cat([packed, scales.view(torch.uint8).view(N, -1)], dim=1)


def _scales_int8(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Groups (N, G, columns) to bf16 scales (N, G) and codes as fp32."""
    scales = (groups.abs().amax(-1) / 127).bfloat16()
    divisor = torch.where(scales == 0, 1.0, scales.float())
    return scales, (groups / divisor[..., None]).round_().clamp_(-127, 127)


def _scales_int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """As `_scales_int8`. The largest weight begins at -8; then the scale is fitted to the codes, twice."""
    indices = groups.abs().argmax(-1, keepdim=True)
    largest = groups.gather(-1, indices)[..., 0]
    best, best_error, best_codes = largest, torch.full_like(largest, torch.inf), groups
    for levels in (8.0, 7.2, 6.6):
        scale = largest / -levels
        for _ in range(2):
            divisor = torch.where(scale == 0, 1.0, scale.bfloat16().float())
            codes = (groups / divisor[..., None]).round_().clamp_(-8, 7)
            scale = (groups * codes).sum(-1) / (codes * codes).sum(-1).clamp(min=1)
        stored = scale.bfloat16().float()
        codes = (groups / torch.where(stored == 0, 1.0, stored)[..., None]).round_().clamp_(-8, 7)
        error = (codes * stored[..., None] - groups).square_().sum(-1)
        better = error < best_error
        best, best_error = torch.where(better, stored, best), torch.where(better, error, best_error)
        best_codes = torch.where(better[..., None], codes, best_codes)
    return best.bfloat16(), best_codes


def _unpack_scaled(matrix: Matrix, first: int, last: int) -> Tensor:
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


# --- bf16 with coded exponents -----------------------------------------------------------------------------------


def _encode_bf12(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of bytes (N, 1.5 K), exponents before the rows' windows (N,), escapes per row (N,), escapes (E, 2) int32."""
    bits = w.bfloat16().view(torch.int16).int() & 0xFFFF
    exponent, rest = (bits >> 7) & 255, ((bits >> 8) & 128) | (bits & 127)
    N = len(bits)
    histogram = torch.zeros((N, 256), dtype=torch.int32).scatter_add_(1, exponent.long(), torch.ones_like(exponent))
    histogram[:, 0] = histogram[:, 255] = 0
    covered = torch.nn.functional.pad(histogram.cumsum(1), (1, 0))
    # A window is the exponents base + 1 to base + WINDOW; 2 ** (base - SHIFT) must be a number of fp32.
    base = (covered[:, WINDOW + 1 :] - covered[:, 1:-WINDOW])[:, : SHIFT + 127].argmax(1).int()
    code = exponent - base[:, None]
    zero = (bits & 0x7FFF) == 0
    escape = ((code < 1) | (code > WINDOW) | (exponent == 0) | (exponent == 255)) & ~zero
    code = torch.where(escape | zero, 0, code).to(torch.uint8).view(N, -1, 2, 32)  # columns 0-31 in low nibbles
    rest = torch.where(escape, 0, rest).to(torch.uint8).view(N, -1, BLOCK)
    nibbles = code[:, :, 0] | (code[:, :, 1] << 4)
    rows = torch.cat([rest, nibbles], dim=2).view(N, -1)
    columns = escape.nonzero()[:, 1].int()
    listed = torch.stack([columns, bits[escape]], dim=1)
    return rows, base, escape.sum(1, dtype=torch.int32), listed


SHIFT = 64
"""bf12: kernels multiply activations by 2^SHIFT, because the stored numbers have tiny exponents."""


def _join_extras(parts: list[Extras]) -> Tensor:
    found = (part for part in parts if part is not None)
    bases, counts, listed = (torch.cat(column) for column in zip(*found, strict=True))
    factors = torch.ldexp(torch.ones(len(bases)), bases - SHIFT)
    starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    return torch.cat([factors.view(torch.int32), starts, listed.flatten()])


def _unpack_bf12(matrix: Matrix, first: int, last: int) -> Tensor:
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
