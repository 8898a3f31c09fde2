"""Register tiles of products, as LLVM code: a few rows of weights times a few vectors, with sums in registers.

A product of a row and a vector is kept as 64 sums side by side, as in `dots`. These do not depend on each other, so a
tile computes only as many of them as a register holds, for all columns, and for several rows and vectors at once: with
AVX2, 4 rows times 3 vectors are 12 of 16 registers, and 7 loads serve 12 multiplications. Each sum is added up in the
order of `dots`, hence the same bits. Both operands are packed (by `register_tiles`), so that a tile reads two streams.

These tiles are for processors with sixteen registers of eight numbers. With AVX-512 the loops of `tiles` over four
vectors fit into registers, and are used there.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import processor_has
from .lanes import address_of

WIDTH = 8
"""Sums that a tile computes side by side."""
REGISTER = 4 * WIDTH
"""Bytes of as many."""
SETS = 64 // WIDTH
"""Registers of sums of a product."""
PRODUCT = 256
"""Bytes of the sums of a product."""
TILE_ROWS, MOST_VECTORS = 4, 3
"""Rows of a tile, and its most vectors. The least is 2: any number from 2 on is divided into tiles without a rest."""

_BYTE, _FLOATS = ir.IntType(8), ir.VectorType(ir.FloatType(), WIDTH)


USED = not processor_has("avx512f")
"""Whether the processor has no AVX-512."""


class _Code:
    """The LLVM code of a tile that is being built."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def at(self, pointer: Any, offset: Any) -> Any:
        """A pointer so many bytes further."""
        return self.builder.gep(pointer, [ir.IntType(64)(offset) if isinstance(offset, int) else offset])

    def load(self, pointer: Any, offset: int) -> Any:
        """A register of numbers at a byte offset."""
        address = self.builder.bitcast(self.at(pointer, offset), _FLOATS.as_pointer())
        return self.builder.load(address, align=4)

    def store(self, sums: Any, pointer: Any, offset: int) -> None:
        """Write a variable to a byte offset."""
        address = self.builder.bitcast(self.at(pointer, offset), _FLOATS.as_pointer())
        self.builder.store(self.builder.load(sums), address, align=4)

    def multiply_add(self, a: Any, b: Any, sums: Any) -> None:
        """Add products to the sums in a variable; as `lanes.multiply_add`."""
        product = self.builder.fmul(a, b, flags=("contract",))
        self.builder.store(self.builder.fadd(product, self.builder.load(sums), flags=("contract",)), sums)


def _product_tile(vectors: int) -> Any:
    """An intrinsic `f(panel, at, x, x_at, sums, out_at, blocks)`: the product of packed rows and packed vectors.

    Args (of the intrinsic; offsets are in bytes):
        panel: for each block, a register of each of TILE_ROWS rows. x: for each block, a register of each vector.
        sums: (vectors, TILE_ROWS) products, PRODUCT bytes each, from `out_at` on; the tile writes a register of each.
    """

    @intrinsic
    def tile(typingctx, panel, at, x, x_at, sums, out_at, blocks):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            code, kinds = _Code(builder), signature.args
            rows = address_of(context, builder, kinds[0], args[0], args[1], _BYTE)
            vector = address_of(context, builder, kinds[2], args[2], args[3], _BYTE)
            out = address_of(context, builder, kinds[4], args[4], args[5], _BYTE)
            zero = ir.Constant(_FLOATS, [0.0] * WIDTH)
            found = [[cgutils.alloca_once_value(builder, zero) for _ in range(vectors)] for _ in range(TILE_ROWS)]
            with cgutils.for_range(builder, args[6]) as loop:
                step = loop.index.type
                here = code.at(rows, builder.mul(loop.index, step(TILE_ROWS * REGISTER)))
                there = code.at(vector, builder.mul(loop.index, step(vectors * REGISTER)))
                # Vectors first: 12 sums, 3 vectors and a row are just the 16 registers.
                parts = [code.load(there, v * REGISTER) for v in range(vectors)]
                for r in range(TILE_ROWS):
                    row = code.load(here, r * REGISTER)
                    for v, part in enumerate(parts):
                        code.multiply_add(row, part, found[r][v])
            for r in range(TILE_ROWS):
                for v in range(vectors):
                    code.store(found[r][v], out, PRODUCT * (v * TILE_ROWS + r))
            return context.get_dummy_value()

        return types.void(panel, types.intp, x, types.intp, sums, types.intp, types.intp), codegen

    return tile


tile_of_two, tile_of_three = _product_tile(2), _product_tile(3)
