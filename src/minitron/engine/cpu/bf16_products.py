"""Products of nine or more vectors with rows in bf16 by `vdpbf16ps`: for prompts, where AVX-512 has it.

One instruction multiplies 32 pairs of bf16 numbers and adds them to sixteen fp32 sums, twice as many as one for fp32
numbers. It needs both operands in bf16, so vectors are rounded, as torch and llama.cpp round them. Decoding does not
use it: its sums have the same bits for one token as for several, and nothing is rounded there. The instruction takes
numbers below 2^-126 for zero.

Rows of bf12, int8 and int4 are unpacked to bf16, a few at a time, as torch's products need them.

A tile is four rows times four to six vectors: 24 sums, four rows and a vector take 29 of 32 registers, and ten loads
serve 24 instructions. A row stays in the first-level cache until all vectors are multiplied with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from . import tiles
from .compiled import AVX512_BF16
from .formats import _BF16, _FP32, BLOCK, FAST, LEAF, Array
from .gemv import add_rows, bf16_of_float, staged_matvec
from .lanes import address_of, prefetch_line, shuffled, splat, totals_of_four
from .unpack import rows_as_bf16

TILE_ROWS, MOST_VECTORS = 4, 6
LEAST_VECTORS = 9
"""From so many vectors on every tile has four to six of them."""
COLUMNS = 32
"""Columns that an instruction multiplies; a matrix has a multiple of them."""
SUMMED_COLUMNS = 64
"""Columns of which `add_rows_rounded` adds rows at a time; a matrix has a multiple of them."""
SPARSE = 8
"""Where less than one factor in so many is not zero, only rows that count are added: an estimate, not measured."""
ROWS_IN_CACHE = 64
"""Rows after which a vector that is not rounded is multiplied with the same rows."""
ROWS_UNPACKED = 32
"""Rows of packed formats that are unpacked at a time: an even number."""
_LINE = 64
"""Bytes of as many bf16 numbers."""
_BYTE, _FLOATS = ir.IntType(8), ir.VectorType(ir.FloatType(), 16)
_PAIRS, _HALVES = ir.VectorType(ir.IntType(32), 16), ir.VectorType(ir.IntType(16), 32)


USED = AVX512_BF16
"""Whether these products are used."""


class _Code:
    """The LLVM code of a tile that is being built."""

    def __init__(self, context: Any, builder: Any, kinds: Any, args: Any) -> None:
        self._context, self._builder, self._kinds, self._args = context, builder, kinds, args
        kind = ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS])
        self._dot = ir.InlineAsm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v")

    def pointers(self, index: int, count: int) -> list[Any]:
        """Of so many rows of argument `index`, an array; the next two are the first row's offset and the stride."""
        at, stride = self._args[index + 1 : index + 3]
        first = self.pointer(index, at)
        return [self._builder.gep(first, [self._builder.mul(stride, stride.type(i))]) for i in range(count)]

    def pointer(self, index: int, offset: Any) -> Any:
        """Of a byte offset in argument `index`, an array."""
        return address_of(self._context, self._builder, self._kinds[index], self._args[index], offset, _BYTE)

    def _there(self, pointer: Any, offset: Any, kind: Any) -> Any:
        return self._builder.bitcast(self._builder.gep(pointer, [offset]), kind.as_pointer())

    def load(self, pointer: Any, offset: Any, kind: Any) -> Any:
        """A value at a byte offset."""
        return self._builder.load(self._there(pointer, offset, kind), align=1)

    def store(self, value: Any, pointer: Any, offset: Any) -> None:
        """Write a value to a byte offset."""
        self._builder.store(value, self._there(pointer, offset, value.type), align=4)

    def prefetch(self, pointer: Any, offset: Any) -> None:
        """Ask for the cache line at a byte offset, into the second level."""
        prefetch_line(self._builder, self._builder.gep(pointer, [offset]), 2)

    def add_products(self, sums: Any, a: Any, b: Any) -> None:
        """Add the products of 32 pairs of bf16 numbers, two neighbours' in a lane, to the sums in a variable."""
        self._builder.store(self._builder.call(self._dot, [self._builder.load(sums), a, b]), sums)


def _tile_of(vectors: int) -> Any:
    """An intrinsic for products of rows and so many vectors.

    Four rows are multiplied with so many vectors; meanwhile two later rows are fetched into the second-level cache, a
    line of each at a time: in one go, they would stop the processor.

    Args (of the intrinsic; offsets and strides are in bytes):
        w, x: bf16 bits; the first row or vector begins at the offset, the others a stride further each.
        out: fp32; four products of the first vector are written to the offset, those of the others a stride further.
        lines: times COLUMNS are the columns.
        next_0, next_1: where in w the rows to fetch begin.
    """

    @intrinsic
    def tile(typingctx, w, at, stride, x, x_at, x_stride, out, out_at, out_stride, lines, next_0, next_1):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            code, size = _Code(context, builder, signature.args, args), args[1].type
            rows, parts = code.pointers(0, TILE_ROWS), code.pointers(3, vectors)
            zero = ir.Constant(_FLOATS, [0.0] * 16)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in rows] for _ in parts]
            later = [code.pointer(0, offset) for offset in args[10:]]
            with cgutils.for_range(builder, args[9]) as loop:
                offset = builder.mul(loop.index, size(_LINE))
                for row in later:
                    code.prefetch(row, offset)
                weights = [code.load(row, offset, _PAIRS) for row in rows]
                for part, found in zip(parts, sums, strict=True):
                    vector = code.load(part, offset, _PAIRS)
                    for row, variable in zip(weights, found, strict=True):
                        code.add_products(variable, row, vector)
            for target, found in zip(code.pointers(6, vectors), sums, strict=True):
                code.store(totals_of_four(builder, *(builder.load(variable) for variable in found)), target, size(0))
            return context.get_dummy_value()

        size = types.intp
        return types.void(w, size, size, x, size, size, out, size, size, size, size, size), codegen

    return tile


_tile_of_four, _tile_of_five, _tile_of_six = (_tile_of(vectors) for vectors in (4, 5, 6))


@njit(**LEAF)
def _round_vectors(x, staged):  # type: ignore[no-untyped-def]
    """Vectors x (M, K) as bf16, one after the other, in `staged` (>= M * K,) uint16."""
    M, K = x.shape
    for m in range(M):
        row, out = x[m], staged[m * K : (m + 1) * K]
        for k in range(K):
            out[k] = bf16_of_float(row[k])


@njit(**LEAF)
def _tile(vectors, w, at, stride, x, x_at, x_stride, out, out_at, out_stride, lines, next_0, next_1):  # type: ignore[no-untyped-def]
    args = (w, at, stride, x, x_at, x_stride, out, out_at, out_stride, lines, next_0, next_1)
    if vectors == 6:
        _tile_of_six(*args)  # type: ignore[call-arg]
    elif vectors == 5:
        _tile_of_five(*args)  # type: ignore[call-arg]
    else:
        _tile_of_four(*args)  # type: ignore[call-arg]


@njit(**LEAF)
def _last_rows(vectors, w, start, stop, x, x_at, x_stride, four, out, column, first, lines):  # type: ignore[no-untyped-def]
    """Rows that do not fill a tile: each is multiplied as if it were four. `four` is scratch for their products."""
    zero = np.int64(0)  # a literal would be compiled for itself
    for r in range(start, stop):
        at = r * x_stride
        _tile(vectors, w, at, zero, x, x_at, x_stride, four, zero, np.int64(4 * TILE_ROWS), lines, at, at)
        for v in range(vectors):
            out[first + v, column + r] = four[TILE_ROWS * v]


@njit(**FAST)
def multiply_rounded(w, columns, M, staged, out, column, start, stop):  # type: ignore[no-untyped-def]
    """`out[m, column + r] = w[r] . x[m]` for rows start <= r < stop and M (9 or more) rounded vectors.

    Args:
        w: (N, columns) bf16 bits, without gaps; columns: a multiple of COLUMNS.
        staged: (>= M * columns,) uint16, see `stage`.
        out: (M, >= column + N) fp32.
    """
    stride, lines, out_stride = 2 * columns, columns // COLUMNS, out.strides[0]
    turns, whole = (M + MOST_VECTORS - 1) // MOST_VECTORS, start + (stop - start) // TILE_ROWS * TILE_ROWS
    four = np.empty(TILE_ROWS * MOST_VECTORS, np.float32)
    for top in range(start, stop, TILE_ROWS):
        for turn in range(turns):
            first, last = M * turn // turns, M * (turn + 1) // turns
            vectors, x_at = last - first, first * stride
            if top == whole:
                _last_rows(vectors, w, top, stop, staged, x_at, stride, four, out, column, first, lines)
                continue
            # The next four rows are fetched, one or two in a turn. Behind the last row that does nothing.
            begin, end = TILE_ROWS * turn // turns, TILE_ROWS * (turn + 1) // turns
            after = top + TILE_ROWS if begin < end else top
            next_0, next_1 = (after + begin) * stride, (after + max(begin, end - 1)) * stride
            at = first * out_stride + 4 * (column + top)
            _tile(vectors, w, top * stride, stride, staged, x_at, stride, out, at, out_stride, lines, next_0, next_1)


# --- sums of rows ------------------------------------------------------------------------------------------------


def _sums_tile_of(vectors: int) -> Any:
    """An intrinsic for sums of rows.

    Rows are added, times the factors of so many vectors; meanwhile later numbers are fetched as in `_tile_of`.

    Args (of the intrinsic; offsets and strides are in bytes):
        w: bf16 bits; SUMMED_COLUMNS of the first row begin at the offset, those of the others a stride further each.
        x: bf16 bits, the factors of each vector, likewise.
        out: fp32; SUMMED_COLUMNS sums of each vector, likewise, to which the products are added.
        pairs: half the number of rows.
        after: where SUMMED_COLUMNS to fetch begin, of the first or the second row of the first pair.
    """

    @intrinsic
    def tile(typingctx, w, at, stride, x, x_at, x_stride, out, out_at, out_stride, pairs, after):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            code, size = _Code(context, builder, signature.args, args), args[1].type
            parts, targets = code.pointers(3, vectors), code.pointers(6, vectors)
            found = [[code.load(target, size(_LINE * index), _FLOATS) for index in range(4)] for target in targets]
            sums = [[cgutils.alloca_once_value(builder, value) for value in row] for row in found]
            row, later = code.pointer(0, args[1]), code.pointer(0, args[10])
            with cgutils.for_range(builder, args[9]) as loop:
                upper = builder.mul(loop.index, builder.mul(args[2], size(2)))
                lower = builder.add(upper, args[2])
                for line in range(2):
                    code.prefetch(later, builder.add(upper, size(line * _LINE)))
                weights = []
                for line in range(2):
                    first, second = (
                        code.load(row, builder.add(offset, size(line * _LINE)), _HALVES) for offset in (upper, lower)
                    )
                    for begin in (0, 16):  # of two rows, the numbers of a column side by side
                        lanes = [i + 32 * which for i in range(begin, begin + 16) for which in range(2)]
                        weights.append(builder.bitcast(shuffled(builder, first, second, lanes), _PAIRS))
                for part, variables in zip(parts, sums, strict=True):
                    pair = code.load(part, builder.mul(loop.index, size(4)), ir.IntType(32))
                    factors = splat(builder, pair, _PAIRS)
                    for weight, variable in zip(weights, variables, strict=True):
                        code.add_products(variable, weight, factors)
            for target, variables in zip(targets, sums, strict=True):
                for index, variable in enumerate(variables):
                    code.store(builder.load(variable), target, size(_LINE * index))
            return context.get_dummy_value()

        size = types.intp
        return types.void(w, size, size, x, size, size, out, size, size, size, size), codegen

    return tile


_sums_of_four, _sums_of_five, _sums_of_six = (_sums_tile_of(vectors) for vectors in (4, 5, 6))


@njit(**LEAF)
def _sums_tile(vectors, w, at, stride, x, x_at, x_stride, out, out_at, out_stride, pairs, after):  # type: ignore[no-untyped-def]
    args = (w, at, stride, x, x_at, x_stride, out, out_at, out_stride, pairs, after)
    if vectors == 6:
        _sums_of_six(*args)  # type: ignore[call-arg]
    elif vectors == 5:
        _sums_of_five(*args)  # type: ignore[call-arg]
    else:
        _sums_of_four(*args)  # type: ignore[call-arg]


@njit(**LEAF)
def add_rows_rounded(w, scales, staged, out):  # type: ignore[no-untyped-def]
    """`out[m] += sum(scales[m, f] * w[f])`, with factors rounded to bf16.

    Args:
        w: (n, columns) bf16 bits, without gaps; n is even, columns a multiple of SUMMED_COLUMNS.
        scales: (M, n) fp32, M 9 or more.
        staged: (>= M * n,) uint16, scratch.
        out: (M, >= columns) fp32.
    """
    (M, n), columns = scales.shape, w.shape[1]
    _round_vectors(scales, staged)
    stride, x_stride, out_stride = 2 * columns, 2 * n, out.strides[0]
    turns = (M + MOST_VECTORS - 1) // MOST_VECTORS
    for column in range(0, columns, SUMMED_COLUMNS):
        for turn in range(turns):
            first, last = M * turn // turns, M * (turn + 1) // turns
            at, out_at = 2 * column, first * out_stride + 4 * column
            # The next columns of each pair's first rows are fetched in the first turn, those of its second in the next.
            after = at + 2 * SUMMED_COLUMNS + turn * stride if turn < 2 else at
            _sums_tile(
                last - first, w, at, stride, staged, first * x_stride, x_stride, out, out_at, out_stride, n // 2, after
            )


# --- packed formats ----------------------------------------------------------------------------------------------


@njit(**FAST)
def _multiply_unpacked(w, extras, columns, M, staged, out, column, start, stop):  # type: ignore[no-untyped-def]
    """As `multiply_rounded` for rows that are unpacked to bf16, ROWS_UNPACKED at a time."""
    panel, wide = np.empty((ROWS_UNPACKED, columns), np.uint16), np.empty(columns + BLOCK, np.float32)
    for top in range(start, stop, ROWS_UNPACKED):
        last = min(top + ROWS_UNPACKED, stop)
        rows_as_bf16(w, extras, wide, panel, top, last, False)
        multiply_rounded(panel, columns, M, staged, out, column + top, np.int64(0), last - top)


@njit(**FAST)
def _add_unpacked(w, extras, columns, scales, start, stop, staged, out):  # type: ignore[no-untyped-def]
    """As `add_rows_rounded` for rows `start` to `stop`, unpacked to bf16, ROWS_UNPACKED at a time."""
    panel, wide = np.empty((ROWS_UNPACKED, columns), np.uint16), np.empty(columns + BLOCK, np.float32)
    for top in range(start, stop, ROWS_UNPACKED):
        last = min(top + ROWS_UNPACKED, stop)
        rows_as_bf16(w, extras, wide, panel, top, last, False)
        add_rows_rounded(panel[: last - top], scales[:, top:last], staged, out)


# --- for the step ------------------------------------------------------------------------------------------------


def stage(w: Array, x: Array, staged: Array, rounded: int) -> None:
    """As `tiles.stage`, but the first `rounded` vectors for `multiply` with as many. There is none, or 9 or more."""
    raise NotImplementedError("only within compiled code")


def multiply(
    w: Array, extras: Array, x: Array, staged: Array, out: Array, column: int, start: int, stop: int,
    rounded: int, ahead: int, short: int,
) -> None:  # fmt: skip
    """As `tiles.multiply`, but the first `rounded` vectors are rounded to bf16. `staged` is x, see `stage`.

    If any are rounded, at most one is not; its products have the same bits as alone. For `ahead` and `short` see
    `gemv.staged_matvec`.
    """
    raise NotImplementedError("only within compiled code")


def add_rows_of(
    w: Array, extras: Array, columns: int, scales: Array, rows: Array, counts: Array, start: int, stop: int,
    staged: Array, out: Array, rounded: int, ahead: int,
) -> None:  # fmt: skip
    """As `tiles.add_rows_of`, to `out` that is zero, but the first `rounded` vectors may be rounded to bf16.

    That is done where few of their numbers are zero. `staged` is scratch as for `stage`.
    """
    raise NotImplementedError("only within compiled code")


@overload(stage)
def _overload_stage(w, x, staged, rounded):  # type: ignore[no-untyped-def]
    def either(w, x, staged, rounded):  # type: ignore[no-untyped-def]
        _round_vectors(x[:rounded], staged.reshape(-1).view(np.uint16))
        if rounded < x.shape[0]:
            tiles.stage(w, x[rounded:], staged[rounded:])

    return either if USED and w.dtype != _FP32 else lambda w, x, staged, rounded: tiles.stage(w, x, staged)


@overload(multiply)
def _overload_multiply(w, extras, x, staged, out, column, start, stop, rounded, ahead, short):  # type: ignore[no-untyped-def]
    def either(w, extras, x, staged, out, column, start, stop, rounded, ahead, short):  # type: ignore[no-untyped-def]
        if rounded == 0:
            tiles.multiply(w, extras, x, staged, out, column, start, stop)
            return
        halves = staged.reshape(-1).view(np.uint16)
        for top in range(start, stop, ROWS_IN_CACHE):
            last = min(top + ROWS_IN_CACHE, stop)
            if plain:
                multiply_rounded(w, x.shape[1], rounded, halves, out, column, top, last)
            else:
                _multiply_unpacked(w, extras, x.shape[1], rounded, halves, out, column, top, last)
            if rounded < x.shape[0]:
                one = x[rounded:]
                staged_matvec(w, extras, one, staged[rounded:], out[rounded:], column, top, last, ahead, short)

    def exact(w, extras, x, staged, out, column, start, stop, rounded, ahead, short):  # type: ignore[no-untyped-def]
        tiles.multiply(w, extras, x, staged, out, column, start, stop)

    plain = w.dtype == _BF16
    return either if USED and w.dtype != _FP32 else exact


@overload(add_rows_of)
def _overload_add_rows_of(w, extras, columns, scales, rows, counts, start, stop, staged, out, rounded, ahead):  # type: ignore[no-untyped-def]
    def either(w, extras, columns, scales, rows, counts, start, stop, staged, out, rounded, ahead):  # type: ignore[no-untyped-def]
        if SPARSE * counts[:rounded].sum() <= rounded * (stop - start):
            tiles.add_rows_of(w, extras, columns, scales, rows, counts, start, stop, out)
            return
        halves = staged.reshape(-1).view(np.uint16)
        if plain:
            add_rows_rounded(w[start:stop], scales[:rounded, start:stop], halves, out)
        else:
            _add_unpacked(w, extras, columns, scales[:rounded], start, stop, halves, out)
        for m in range(rounded, scales.shape[0]):
            add_rows(w, extras, columns, scales[m], rows[m], counts[m], out[m], ahead)

    def exact(w, extras, columns, scales, rows, counts, start, stop, staged, out, rounded, ahead):  # type: ignore[no-untyped-def]
        tiles.add_rows_of(w, extras, columns, scales, rows, counts, start, stop, out)

    plain = w.dtype == _BF16
    return either if USED and w.dtype != _FP32 else exact
