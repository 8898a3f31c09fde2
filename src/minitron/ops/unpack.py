"""Rows of packed matrices as bf16, for torch's matrix products. Needs Numba."""

from __future__ import annotations

import numpy as np
from numba import njit

from .formats import FAST, Array, add_escapes
from .gemv import add_row, bf16_of_float


@njit(cache=True, **FAST)
def unpack_rows(w: Array, extras: Array, wide: Array, out: Array, start: int, stop: int) -> None:
    """`out[start:stop] = w[start:stop]` in bf16.

    Args:
        w: (N, items of a row), see `formats.KINDS`. extras: of bf12, see `quantize.Matrix`.
        wide: fp32, scratch for one row, its columns rounded up to 64.
        out: (N, K), bits of bf16 as uint16.
    """
    K = out.shape[1]
    for r in range(start, stop):
        wide[:] = np.float32(0)
        add_row(w, extras, K, r, np.float32(1), wide)
        add_escapes(w, extras, r, np.float32(1), wide)
        row = out[r]
        for k in range(K):
            row[k] = bf16_of_float(wide[k])
