"""Sixteen fp32 numbers side by side as one value in Numba code, and the operations that unpack weights.

A loop over such values adds in the same order on every machine and does not depend on the vectorizer: LLVM turns
sixteen lanes into one register with AVX-512, two with AVX2, four with NEON. Offsets into arrays are in bytes, because
rows of quantized weights hold numbers of several sizes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16

_BYTE, _HALF, _WORD, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_FLOATS, _WORDS, _HALVES = ir.VectorType(_FLOAT, LANES), ir.VectorType(_WORD, LANES), ir.VectorType(_HALF, 2 * LANES)


class LanesType(types.Type):
    """Numba's type of sixteen fp32 numbers, or of as many bits as sixteen or thirty-two integers."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)


floats = LanesType("lanes of fp32")
words = LanesType("lanes of 32 bits")
halves = LanesType("lanes of 16 bits")


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: LanesType) -> None:
        super().__init__(dmm, fe_type, {floats: _FLOATS, words: _WORDS, halves: _HALVES}[fe_type])


@intrinsic
def pointer(typingctx, address):  # type: ignore[no-untyped-def]
    """An address (int64) as a pointer, for `carray`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


def _constant(value: int, kind: Any = _WORDS) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def address_of(context: Any, builder: Any, kind: Any, array: Any, offset: Any, element: Any) -> Any:
    """The LLVM pointer to an `element` at a byte offset in an array."""
    data = context.make_array(kind)(context, builder, array).data
    data = builder.gep(builder.bitcast(data, cgutils.voidptr_t), [offset])
    return builder.bitcast(data, element.as_pointer())


def splat(builder: Any, value: Any, kind: Any) -> Any:
    """An LLVM value in all lanes of a vector."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _WORD(0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), _constant(0))


def shuffled(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Some lanes of two LLVM vectors, which count as one behind the other."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_WORD, len(lanes)), lanes))


def _loader(element: Any, result: Any, unpack: Any, count: int = LANES) -> Any:
    """An intrinsic `f(array, offset)`: some `element`s from a byte offset on, through `unpack(builder, vector)`."""

    @intrinsic
    def load(typingctx, array, offset):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            kind = ir.VectorType(element, count)
            address = address_of(context, builder, signature.args[0], args[0], args[1], kind)
            return unpack(builder, builder.load(address, align=1))

        return result(array, types.intp), codegen

    return load


def _widened(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(value, _WORDS), _constant(16)), _FLOATS)


load_fp32 = _loader(_FLOAT, floats, lambda builder, value: value)
load_bf16 = _loader(_HALF, floats, _widened)
load_int8 = _loader(_BYTE, floats, lambda builder, value: builder.sitofp(builder.sext(value, _WORDS), _FLOATS))
load_words = _loader(_WORD, words, lambda builder, value: value)
load_bytes = _loader(_BYTE, words, lambda builder, value: builder.zext(value, _WORDS))
load_signed_bytes = _loader(_BYTE, words, lambda builder, value: builder.sext(value, _WORDS))
load_halves = _loader(_HALF, halves, lambda builder, value: value, 2 * LANES)
load_byte_halves = _loader(_BYTE, halves, lambda builder, value: builder.zext(value, _HALVES), 2 * LANES)
load_signed_byte_halves = _loader(_BYTE, halves, lambda builder, value: builder.sext(value, _HALVES), 2 * LANES)


def _bf16_scales(builder: Any, value: Any, count: int) -> Any:
    """`count` bf16 numbers, each in LANES / 4 lanes; zeros in the remaining lanes."""
    wide = ir.VectorType(_WORD, count)
    numbers = builder.shl(builder.zext(value, wide), _constant(16, wide))
    spread_out = shuffled(builder, numbers, ir.Constant(wide, [0] * count), [min(i // 4, count) for i in range(LANES)])
    return builder.bitcast(spread_out, _FLOATS)


def _zero_filled(builder: Any, value: Any) -> Any:
    return shuffled(builder, value, ir.Constant(value.type, [0] * LANES), [*range(2 * LANES)])


load_half_row = _loader(_HALF, halves, _zero_filled)
"""Sixteen 16-bit integers, and sixteen zeros."""
load_four_scales = _loader(_HALF, floats, lambda builder, value: _bf16_scales(builder, value, 4), 4)
"""Four bf16 numbers, each in four lanes."""
load_two_scales = _loader(_HALF, floats, lambda builder, value: _bf16_scales(builder, value, 2), 2)
"""Two bf16 numbers, each in four lanes; zeros in the others."""


def _unary(kind: Any, result: Any, build: Any) -> Any:
    @intrinsic
    def operate(typingctx, value):  # type: ignore[no-untyped-def]
        return result(kind), lambda context, builder, signature, args: build(builder, args[0])

    return operate


def _low_half(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.shl(value, _constant(16)), _FLOATS)


def _high_half(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.and_(value, _constant(0xFFFF0000)), _FLOATS)


def _low_nibble(builder: Any, value: Any) -> Any:
    return builder.and_(value, _constant(15))


def _high_nibble(builder: Any, value: Any) -> Any:
    return builder.lshr(value, _constant(4))


even_bf16 = _unary(words, floats, _low_half)
"""The first numbers of pairs of bf16 numbers."""
odd_bf16 = _unary(words, floats, _high_half)
"""The second numbers of pairs of bf16 numbers."""
low_nibble = _unary(words, words, _low_nibble)
high_nibble = _unary(words, words, _high_nibble)


def _code(shift: int) -> Any:
    """Nibbles of bytes as -8 to 7: they become the lowest bits of a large number, which is then subtracted."""

    def build(builder: Any, value: Any) -> Any:
        large = 23 - shift  # 2 ** large, whose bits at `shift` stand for 1
        bits = builder.or_(builder.and_(value, _constant(15 << shift)), _constant((127 + large) << 23))
        return builder.fsub(builder.bitcast(bits, _FLOATS), ir.Constant(_FLOATS, [2.0**large + 8] * LANES))

    return _unary(words, floats, build)


low_code, high_code = _code(0), _code(4)
"""The lower and the upper four bits of bytes, 0 to 15 for -8 to 7, as fp32."""


def _nibble(index: int) -> Any:
    def build(builder: Any, value: Any) -> Any:
        return builder.and_(builder.lshr(value, _constant(4 * index, _HALVES)), _constant(15, _HALVES))

    return _unary(halves, halves, build)


nibble_0, nibble_1, nibble_2, nibble_3 = (_nibble(index) for index in range(4))
"""The lowest four bits of 16-bit integers, ..., the highest four."""
as_floats = _unary(words, floats, lambda builder, value: builder.sitofp(value, _FLOATS))


@intrinsic
def joined(typingctx, signed, exponent):  # type: ignore[no-untyped-def]
    """fp32 numbers from sign and seven bits of mantissa (sign-extended bytes) and exponent fields below 16."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        signed = builder.and_(builder.shl(args[0], _constant(16)), _constant(0x807F0000))
        exponent = builder.shl(args[1], _constant(23))
        return builder.bitcast(builder.or_(signed, exponent), _FLOATS)

    return floats(words, words), codegen


def _joiner(shift: int) -> Any:
    """An intrinsic: bf16 numbers, in pairs, from sign and mantissa (sign-extended bytes) and nibbles."""

    @intrinsic
    def join(typingctx, signed, nibbles):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            signed = builder.and_(args[0], _constant(0x807F, _HALVES))
            exponent = builder.and_(builder.shl(args[1], _constant(shift, _HALVES)), _constant(0x780, _HALVES))
            return builder.bitcast(builder.or_(signed, exponent), _WORDS)

        return words(halves, halves), codegen

    return join


joined_low = _joiner(7)
"""With exponent fields that are the low nibbles of bytes."""
joined_high = _joiner(3)
"""With exponent fields that are the high nibbles of bytes."""


@intrinsic
def no_words(typingctx):  # type: ignore[no-untyped-def]
    """Sixteen zeros."""
    return words(), lambda context, builder, signature, args: _constant(0)


@intrinsic
def pair_dot(typingctx, sums, a, b):  # type: ignore[no-untyped-def]
    """`sums` plus the products of 16-bit integers, each two neighbours' in a lane; exact within 32 bits.

    One instruction with VNNI, two with AVX-512 or AVX2; LLVM selects them by itself.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        wide = ir.VectorType(_WORD, 2 * LANES)
        products = builder.mul(builder.sext(args[1], wide), builder.sext(args[2], wide))
        even, odd = ([*range(start, 2 * LANES, 2)] for start in (0, 1))
        pairs = builder.add(shuffled(builder, products, products, even), shuffled(builder, products, products, odd))
        return builder.add(args[0], pairs)

    return words(words, halves, halves), codegen


def _rounded(builder: Any, value: Any) -> Any:
    """fp32 numbers below 2^15 as the nearest 16-bit integers, ties to even: the low bits after adding 1.5 * 2^23."""
    moved = builder.fadd(value, ir.Constant(_FLOATS, [12582912.0] * LANES))
    return builder.trunc(builder.bitcast(moved, _WORDS), ir.VectorType(_HALF, LANES))


@intrinsic
def store_rounded(typingctx, array, offset, value):  # type: ignore[no-untyped-def]
    """Write numbers, rounded to 16-bit integers, at a byte offset."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value = _rounded(builder, args[2])
        builder.store(value, address_of(context, builder, signature.args[0], args[0], args[1], value.type), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, floats), codegen


@intrinsic
def store_rounded_apart(typingctx, array, offset, other, value):  # type: ignore[no-untyped-def]
    """As `store_rounded`, the first of each pair at `offset` and the second at `other`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value = _rounded(builder, args[3])
        for offset, first in ((args[1], 0), (args[2], 1)):
            part = shuffled(builder, value, value, [*range(first, LANES, 2)])
            builder.store(part, address_of(context, builder, signature.args[0], args[0], offset, part.type), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, floats), codegen


@intrinsic
def store_code_offsets(typingctx, array, offset, a, b, c, d):  # type: ignore[no-untyped-def]
    """Write -8 times the sums over the pairs of four times 32 integers, a lane's together, at a byte offset."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        wide = ir.VectorType(_WORD, 2 * LANES)
        value = _constant(0)
        for part in args[2:]:
            numbers = builder.sext(part, wide)
            for start in (0, 1):
                value = builder.sub(value, shuffled(builder, numbers, numbers, [*range(start, 2 * LANES, 2)]))
        value = builder.mul(value, _constant(8))
        builder.store(value, address_of(context, builder, signature.args[0], args[0], args[1], _WORDS), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, halves, halves, halves, halves), codegen


@intrinsic
def spread(typingctx, value):  # type: ignore[no-untyped-def]
    """One fp32 number in all lanes."""
    return floats(types.float32), lambda context, builder, signature, args: splat(builder, args[0], _FLOATS)


@intrinsic
def multiply_add(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """`a * b + c`, rounded once where the machine has such an instruction."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        flags = ("contract",)
        return builder.fadd(builder.fmul(args[0], args[1], flags=flags), args[2], flags=flags)

    return floats(floats, floats, floats), codegen


@intrinsic
def product(typingctx, a, b):  # type: ignore[no-untyped-def]
    """`a * b`."""
    return floats(floats, floats), lambda context, builder, signature, args: builder.fmul(*args)


@intrinsic
def total(typingctx, value):  # type: ignore[no-untyped-def]
    """The sum over the lanes, in halves."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, width = args[0], LANES
        while width > 1:
            width //= 2
            halves = ([*range(start, start + width)] for start in (0, width))
            value = builder.fadd(*(shuffled(builder, value, value, lanes) for lanes in halves))
        return builder.extract_element(value, _WORD(0))

    return types.float32(floats), codegen


@intrinsic
def plus(typingctx, a, b):  # type: ignore[no-untyped-def]
    """`a + b`."""
    return floats(floats, floats), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def larger(typingctx, a, b):  # type: ignore[no-untyped-def]
    """The larger number of each pair; `a` where one is NaN."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.select(builder.fcmp_ordered(">", args[1], args[0]), args[1], args[0])

    return floats(floats, floats), codegen


def totals_of_four(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The sums over the lanes of four LLVM values of sixteen fp32 numbers, in halves, as four numbers."""
    low, high = [*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]

    def halved(a: Any, b: Any) -> Any:  # eight numbers of each
        return builder.fadd(shuffled(builder, a, b, low), shuffled(builder, a, b, high))

    ab, cd = halved(a, b), halved(c, d)
    quarters = [[8 * row + 4 * half + i for row in range(4) for i in range(4)] for half in range(2)]
    value = builder.fadd(shuffled(builder, ab, cd, quarters[0]), shuffled(builder, ab, cd, quarters[1]))
    for apart in (2, 1):
        value = builder.fadd(value, shuffled(builder, value, value, [i ^ apart for i in range(LANES)]))
    return shuffled(builder, value, value, [0, 4, 8, 12])


@intrinsic
def store_totals(typingctx, array, offset, a, b, c, d):  # type: ignore[no-untyped-def]
    """Write the sums over the lanes of four values, each the same bits as `total`, as four fp32 numbers."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        four = totals_of_four(builder, *args[2:])
        builder.store(four, address_of(context, builder, signature.args[0], args[0], args[1], four.type), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, floats, floats, floats, floats), codegen


@intrinsic
def store(typingctx, array, offset, value):  # type: ignore[no-untyped-def]
    """Write sixteen fp32 numbers at a byte offset."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        address = address_of(context, builder, signature.args[0], args[0], args[1], _FLOATS)
        builder.store(args[2], address, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, floats), codegen


def pieces(builder: Any, value: Any, count: int) -> list[Any]:
    """An LLVM vector divided into so many vectors of equal size."""
    size = value.type.count // count
    parts = ([*range(first, first + size)] for first in range(0, value.type.count, size))
    return [shuffled(builder, value, value, lanes) for lanes in parts]


def piecewise(count: int) -> Any:
    """An intrinsic `f(array, offset, stride, value)`: write `count` pieces of a value, `stride` bytes apart."""

    @intrinsic
    def store_pieces(typingctx, array, offset, stride, value):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            for index, piece in enumerate(pieces(builder, args[3], count)):
                at = builder.add(args[1], builder.mul(args[2], args[1].type(index)))
                target = address_of(context, builder, signature.args[0], args[0], at, piece.type)
                builder.store(piece, target, align=1)
            return context.get_dummy_value()

        return types.void(array, types.intp, types.intp, value), codegen

    return store_pieces


@intrinsic
def store_bf16(typingctx, array, offset, value):  # type: ignore[no-untyped-def]
    """Write sixteen fp32 numbers, rounded to the nearest bf16, ties to even, at a byte offset; none may be NaN."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        bits = builder.bitcast(args[2], _WORDS)
        last = builder.and_(builder.lshr(bits, _constant(16)), _constant(1))
        bits = builder.lshr(builder.add(builder.add(bits, _constant(0x7FFF)), last), _constant(16))
        half = builder.trunc(bits, ir.VectorType(_HALF, LANES))
        builder.store(half, address_of(context, builder, signature.args[0], args[0], args[1], half.type), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, floats), codegen


@intrinsic
def float_of_bits(typingctx, bits):  # type: ignore[no-untyped-def]
    """The fp32 number of 32 bits; a register move."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], _FLOAT)

    return types.float32(types.uint32), codegen


@intrinsic
def bits_of_float(typingctx, value):  # type: ignore[no-untyped-def]
    """The 32 bits of an fp32 number."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], _WORD)

    return types.uint32(types.float32), codegen


@intrinsic
def number_at(typingctx, array, offset):  # type: ignore[no-untyped-def]
    """One bf16 number at a byte offset, as fp32."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        address = address_of(context, builder, signature.args[0], args[0], args[1], _HALF)
        bits = builder.shl(builder.zext(builder.load(address, align=1), _WORD), _WORD(16))
        return builder.bitcast(bits, _FLOAT)

    return types.float32(array, types.intp), codegen


def prefetch_line(builder: Any, address: Any, locality: int) -> None:
    """Ask for the cache line at an LLVM pointer, into all levels of the cache (3) or from the second on (2)."""
    flag = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [address.type, flag, flag, flag])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [address, flag(0), flag(locality), flag(1)])  # read, data


def _prefetcher(locality: int) -> Any:
    """An intrinsic `f(array, offset)`: ask for the cache line at a byte offset."""

    @intrinsic
    def ask(typingctx, array, offset):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            prefetch_line(builder, address_of(context, builder, signature.args[0], args[0], args[1], _BYTE), locality)
            return context.get_dummy_value()

        return types.void(array, types.intp), codegen

    return ask


prefetch = _prefetcher(3)
"""Into all levels of the cache. Hardware prefetchers do not predict where rows of active neurons lie."""
prefetch_far = _prefetcher(2)
"""Into the second level, for data that is needed later."""
