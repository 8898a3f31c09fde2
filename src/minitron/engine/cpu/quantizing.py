"""Kernels that quantize weights to the formats of `engine.quantize`, which defines the bytes and a torch reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from . import formats, gemv, lanes
from .compiled import cached
from .formats import FAST, Array, widen
from .gemv import bf16_of_float

LEVELS = (8.0, 7.2, 6.6)
"""int4: values of the largest weight of a group that are tried, see `engine.quantize`."""


@njit(**FAST)
def _widened(row, wide):  # type: ignore[no-untyped-def]
    """Write a row as fp32, padded with zeros; whether all weights are finite."""
    for k in range(row.shape[0]):
        wide[k] = widen(row[k])
    wide[row.shape[0] :] = np.float32(0)
    top = np.float32(0)
    for k in range(row.shape[0]):
        value = wide[k] - wide[k]  # not 0 for infinity and NaN
        top += value * value
    return top == np.float32(0)


@njit(**FAST)
def _divisor(scale: Any) -> Any:
    """A scale as it is stored, 1 for 0, and its bits."""
    bits: Any = bf16_of_float(scale)
    stored: Any = widen(bits)
    return stored if stored != np.float32(0) else np.float32(1), bits


@njit(**FAST)
def _codes(group, divisor, least, most, codes):  # type: ignore[no-untyped-def]
    for k in range(group.shape[0]):
        codes[k] = min(max(np.rint(group[k] / divisor), least), most)


@njit(**FAST)
def _fitted(group, scale, codes):  # type: ignore[no-untyped-def]
    """The scale after choosing codes by it and fitting it to them, twice."""
    for _ in range(2):
        divisor, _bits = _divisor(scale)
        _codes(group, divisor, np.float32(-8), np.float32(7), codes)
        products, squares = np.float32(0), np.float32(0)
        for k in range(group.shape[0]):
            products += group[k] * codes[k]
            squares += codes[k] * codes[k]
        scale = products / max(squares, np.float32(1))
    return scale


@njit(**FAST)
def _best_of_levels(group, codes):  # type: ignore[no-untyped-def]
    """int4: the bits of the best scale of a group (32,); writes its codes to `codes`."""
    largest = group[0]
    for k in range(group.shape[0]):
        if abs(group[k]) > abs(largest):
            largest = group[k]
    best, best_error = np.float32(1), np.float32(np.inf)
    chosen = np.uint16(0)
    for level in LEVELS:
        divisor, bits = _divisor(_fitted(group, largest / np.float32(-level), codes))
        _codes(group, divisor, np.float32(-8), np.float32(7), codes)
        error = np.float32(0)
        for k in range(group.shape[0]):
            difference = codes[k] * divisor - group[k]
            error += difference * difference
        if error < best_error:
            best, best_error, chosen = divisor, error, bits
    _codes(group, best, np.float32(-8), np.float32(7), codes)
    return chosen


def _build_scaled(digest: int) -> Any:
    def quantize_scaled(w, bits_of_code, out):  # type: ignore[no-untyped-def]
        """Rows w (N, K), bf16 bits or fp32, as int8 or int4 in out (N, bytes of a row) uint8.

        Returns:
            whether all weights are finite; if not, `out` is not filled.
        """
        if digest == -1:
            return False
        columns = (w.shape[1] + 63) // 64 * 64
        size = 32
        wide, codes = np.empty(columns, np.float32), np.empty(size, np.float32)
        scales = columns * bits_of_code // 8
        for r in range(w.shape[0]):
            if not _widened(w[r], wide):
                return False
            row = out[r]
            for g in range(columns // size):
                group = wide[g * size : (g + 1) * size]
                if bits_of_code == 8:
                    top = np.float32(0)
                    for k in range(size):
                        top = max(top, abs(group[k]))
                    divisor, stored = _divisor(top / np.float32(127))
                    _codes(group, divisor, np.float32(-127), np.float32(127), codes)
                    stored_codes = row[g * size : (g + 1) * size]
                    for k in range(size):
                        stored_codes[k] = np.uint8(np.int32(codes[k]) & 255)
                else:
                    stored = _best_of_levels(group, codes)
                    stored_codes = row[g * 16 : g * 16 + 16]
                    for k in range(16):
                        low, high = codes[k] + np.float32(8), codes[k + 16] + np.float32(8)
                        stored_codes[k] = np.uint8(np.int32(low) | np.int32(high) << 4)
                row[scales + 2 * g] = np.uint8(stored & np.uint16(255))
                row[scales + 2 * g + 1] = np.uint8(stored >> np.uint16(8))
        return True

    return quantize_scaled


@njit(**FAST)
def _window(histogram, window, bases):  # type: ignore[no-untyped-def]
    """The first base whose exponents base + 1 to base + window are the most frequent, and their number."""
    count = 0
    for e in range(1, window + 1):
        count += histogram[e]
    best, most = 0, count
    for base in range(1, bases):
        count += histogram[base + window] - histogram[base]
        if count > most:
            best, most = base, count
    return best


def _build_bf12(digest: int) -> Any:
    def encode_bf12(w, window, bases, out, base_of_row, escapes, listed):  # type: ignore[no-untyped-def]
        """Rows w (N, K) of bf16 bits (uint16) as bf12, see `engine.matrix.Matrix`.

        Args:
            w: whole blocks of 64 columns.
            window, bases: number of exponents that a row can have, and number of bases to choose from.
            out: (N, 1.5 K) uint8.
            base_of_row, escapes: (N,) int32, the exponent before a row's window and its number of listed weights.
            listed: (N * K, 2) int32, their columns and bits.

        Returns:
            the number of listed weights.
        """
        if digest == -1:
            return 0
        found = 0
        histogram, code = np.empty(256, np.int32), np.empty(64, np.uint8)
        for r in range(w.shape[0]):
            histogram[:] = 0
            for k in range(w.shape[1]):
                histogram[(w[r, k] >> np.uint16(7)) & np.uint16(255)] += 1
            histogram[0] = histogram[255] = 0
            base = _window(histogram, window, bases)
            base_of_row[r], before = base, found
            for block in range(w.shape[1] // 64):
                at = block * 96
                for i in range(64):
                    bits = np.int32(w[r, block * 64 + i])
                    exponent = (bits >> 7) & 255
                    inside = base < exponent <= base + window and 0 < exponent < 255
                    zero = (bits & 0x7FFF) == 0
                    code[i] = np.uint8(exponent - base) if inside else np.uint8(0)
                    out[r, at + i] = np.uint8(((bits >> 8) & 128) | (bits & 127)) if inside or zero else np.uint8(0)
                    if not (inside or zero):
                        listed[found, 0], listed[found, 1] = block * 64 + i, bits
                        found += 1
                for i in range(32):
                    out[r, at + 64 + i] = code[i] | code[i + 32] << np.uint8(4)
            escapes[r] = found - before
        return found

    return encode_bf12


quantize_scaled = cached(_build_scaled, __file__, formats, gemv, lanes)
encode_bf12 = cached(_build_bf12, __file__, formats, gemv, lanes)


def as_stored(weights: Tensor) -> Array:
    """A matrix in bf16 (as bits) or fp32 as the kernels read it, in the same memory where it is contiguous."""
    plain = weights.contiguous()
    return plain.view(torch.int16).numpy().view(np.uint16) if plain.dtype == torch.bfloat16 else plain.numpy()
