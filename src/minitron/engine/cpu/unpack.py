"""Rows of quantized matrices as bf16, for torch's matrix products."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from . import dots, formats, gemv, lanes
from .compiled import cached
from .dots import store_sums
from .formats import BLOCK, LEAF, block_add, row_factor, whole_blocks, write_escapes
from .gemv import bf16_of_float
from .lanes import spread, store_bf16


@njit(**LEAF)
def rows_as_bf16(w, extras, wide, out, start, stop):  # type: ignore[no-untyped-def]
    """`out[: stop - start] = w[start:stop]` in bf16.

    Args:
        w: (N, items of a row), see `formats.KINDS`; quantized. extras: of bf12, see `engine.matrix.Matrix`.
        wide: fp32, scratch for one row, its columns rounded up to 64.
        out: (>= stop - start, K), bits of bf16 as uint16.
        start, stop: rows.
    """
    K, zero = out.shape[1], spread(np.float32(0))  # type: ignore[call-arg]
    whole = K // BLOCK
    for r in range(start, stop):
        stored, row = w[r], out[r - start]
        factor = row_factor(w, extras, r)
        for block in range(whole_blocks(w, K)):
            a, b, c, d = block_add(stored, block, K, factor, zero, zero, zero, zero)
            at = block * 2 * BLOCK
            if block < whole:
                store_bf16(row, at, a)  # type: ignore[call-arg]
                store_bf16(row, at + 32, b)  # type: ignore[call-arg]
                store_bf16(row, at + 64, c)  # type: ignore[call-arg]
                store_bf16(row, at + 96, d)  # type: ignore[call-arg]
            else:
                store_sums(wide, 2 * at, (a, b, c, d))
        for k in range(whole * BLOCK, K):
            row[k] = bf16_of_float(wide[k])
        write_escapes(w, extras, r, row)


def _build(digest: int) -> Any:
    def unpack_rows(w, extras, wide, out, start, stop):  # type: ignore[no-untyped-def]
        """`out[start:stop] = w[start:stop]` in bf16, see `rows_as_bf16`; `out` has all rows."""
        if digest == -1:
            return
        rows_as_bf16(w, extras, wide, out[start:stop], start, stop)

    return unpack_rows


unpack_rows = cached(_build, __file__, dots, formats, gemv, lanes)
