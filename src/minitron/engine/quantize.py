"""Quantization of matrices to the formats of `engine.matrix`. This file defines the bytes, in torch;
`engine.cpu.quantizing` writes them and `engine.cpu.formats` reads them fast.
"""

from __future__ import annotations

import importlib.util
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .. import pages
from .matrix import BITS, BLOCK, GROUP, SHIFT, WEIGHTS_AT_ONCE, Format, Matrix, row_bytes

PLAIN = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}
"""The dtypes of plain formats."""
WINDOW = 15
"""bf12: number of exponents that a row can have; weights with others, infinity and NaN are escapes."""


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
    """Quantize parts of a matrix by compiled code, in as many threads as torch has, while the next ones are read.

    Only what is allocated before outlives a part: anything small between the parts' memory keeps malloc from reusing
    that (bf12 took twice its bytes).
    """
    from .cpu import quantizing
    from .cpu.compiled import compiling

    bases, counts = torch.empty((2, len(data) if format == "bf12" else 0), dtype=torch.int32)
    scratch = threading.local()

    def work(part: Tensor, rows: slice) -> bytes:
        stored = quantizing.as_stored(part)
        with compiling(f"the quantization of {stored.dtype} weights to {format}"):
            call(stored[:0], slice(0))
        return call(stored, rows)

    def call(stored: Any, rows: slice) -> bytes:
        """The listed escapes of bf12."""
        out = data[rows].numpy()
        if format != "bf12":
            if not quantizing.quantize_scaled(stored, BITS[format], out):
                raise _not_finite(format)
            return b""
        if not hasattr(scratch, "listed") or len(scratch.listed) < stored.size:
            scratch.listed = torch.empty((stored.size, 2), dtype=torch.int32).numpy()
        found = bases[rows].numpy(), counts[rows].numpy(), scratch.listed
        count = quantizing.encode_bf12(stored, WINDOW, SHIFT + 127, out, *found)
        return scratch.listed[:count].tobytes()

    first, threads = 0, torch.get_num_threads()
    jobs: deque[Future[bytes]] = deque()
    listed = bytearray()
    with ThreadPoolExecutor(threads) as pool:
        for part in parts:
            if format == "bf12":
                missing = -part.shape[1] % BLOCK
                part = torch.nn.functional.pad(part.bfloat16(), (0, missing)) if missing else part.bfloat16()
            elif part.dtype != torch.bfloat16:
                part = part.float()
            jobs.append(pool.submit(work, part, slice(first, first + len(part))))
            first += len(part)
            if len(jobs) > 2 * threads:
                listed += jobs.popleft().result()
        for job in jobs:
            listed += job.result()
    escapes = torch.frombuffer(listed, dtype=torch.int32) if listed else torch.empty(0, dtype=torch.int32)
    return [(bases, counts, escapes.view(-1, 2))]


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


def _join_extras(parts: list[Extras]) -> Tensor:
    found = (part for part in parts if part is not None)
    bases, counts, listed = (torch.cat(column) for column in zip(*found, strict=True))
    factors = torch.ldexp(torch.ones(len(bases)), bases - SHIFT)
    starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    return torch.cat([factors.view(torch.int32), starts, listed.flatten()])
