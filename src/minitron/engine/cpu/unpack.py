"""Rows of quantized matrices as bf16, for torch's matrix products."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from . import dots, formats, gemv, lanes
from .compiled import AVX512_BF16, cached
from .dots import store_sums
from .formats import BLOCK, INNER, LEAF, Array, block_add, row_factor, whole_blocks, write_escapes
from .gemv import bf16_of_float
from .lanes import address_of, floats, spread, store_bf16


@intrinsic
def _store_by_instruction(typingctx, array, offset, value):  # type: ignore[no-untyped-def]
    """As `store_bf16` by `vcvtneps2bf16`, but numbers below 2^-126 become zero."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        half = ir.VectorType(ir.IntType(16), 16)
        convert = ir.InlineAsm(ir.FunctionType(half, [args[2].type]), "vcvtneps2bf16 $1, $0", "=v,v")
        target = address_of(context, builder, signature.args[0], args[0], args[1], half)
        builder.store(builder.call(convert, [args[2]]), target, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, floats), codegen


def _store(array: Array, offset: int, value: Any, tiny: bool) -> None:
    """As `store_bf16`; unless `tiny`, numbers below 2^-126 may become zero."""
    raise NotImplementedError("only within compiled code")


@overload(_store, jit_options=INNER)
def _overload_store(array, offset, value, tiny):  # type: ignore[no-untyped-def]
    if not AVX512_BF16:
        return lambda array, offset, value, tiny: store_bf16(array, offset, value)  # type: ignore[call-arg]

    def either(array, offset, value, tiny):  # type: ignore[no-untyped-def]
        if tiny:
            store_bf16(array, offset, value)  # type: ignore[call-arg]
        else:
            _store_by_instruction(array, offset, value)  # type: ignore[call-arg]

    return either


@njit(**LEAF)
def rows_as_bf16(w, extras, wide, out, start, stop, tiny):  # type: ignore[no-untyped-def]
    """`out[: stop - start] = w[start:stop]` in bf16.

    Args:
        w: (N, items of a row), see `formats.KINDS`; quantized. extras: of bf12, see `engine.matrix.Matrix`.
        wide: fp32, scratch for one row, its columns rounded up to 64.
        out: (>= stop - start, K), bits of bf16 as uint16.
        start, stop: rows.
        tiny: whether numbers below 2^-126 are kept; otherwise they may become zero, in less time.
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
                _store(row, at, a, tiny)
                _store(row, at + 32, b, tiny)
                _store(row, at + 64, c, tiny)
                _store(row, at + 96, d, tiny)
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
        rows_as_bf16(w, extras, wide, out[start:stop], start, stop, True)

    return unpack_rows


unpack_rows = cached(_build, __file__, dots, formats, gemv, lanes)
