"""Rows of packed matrices as bf16, for torch's matrix products. Needs Numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import formats, gemv, lanes
from .formats import add_escapes
from .gemv import add_row, bf16_of_float
from .sources import cached


def _build(digest: int) -> Any:
    def unpack_rows(w, extras, wide, out, start, stop):  # type: ignore[no-untyped-def]
        """`out[start:stop] = w[start:stop]` in bf16.

        Args:
            w: (N, items of a row), see `formats.KINDS`. extras: of bf12, see `quantize.Matrix`.
            wide: fp32, scratch for one row, its columns rounded up to 64.
            out: (N, K), bits of bf16 as uint16.
            start, stop: rows.
        """
        if digest == -1:
            return
        K = out.shape[1]
        for r in range(start, stop):
            wide[:] = np.float32(0)
            add_row(w, extras, K, r, np.float32(1), wide)
            add_escapes(w, extras, r, np.float32(1), wide)
            row = out[r]
            for k in range(K):
                row[k] = bf16_of_float(wide[k])

    return unpack_rows


unpack_rows = cached(_build, __file__, formats, gemv, lanes)
