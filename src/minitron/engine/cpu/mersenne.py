"""The Mersenne Twister in compiled code, sixteen numbers at a time; see `engine.mt19937`.

Its numbers are a sequence of words in which each follows from three earlier ones, tempered when they are used. Here the
sequence lies in one long array, so that a token's random number can be read at its index.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .lanes import LANES

WORDS = 624
"""Words of a block; a multiple of LANES."""

_WORD, _FLOAT = ir.IntType(32), ir.FloatType()
_WORDS, _FLOATS = ir.VectorType(_WORD, LANES), ir.VectorType(_FLOAT, LANES)
_PAIRS = ir.VectorType(_WORD, 2 * LANES)
EXACT: Any = {"nogil": True, "_nrt": False}
"""For functions in which nothing is reordered; they allocate no array."""
LN_2_BITS = 2.0**23 / np.log(2.0)
"""The bits of an fp32 number, read as an integer, grow by so much for each unit of its logarithm."""
_ONE_BITS, _LEAST_BITS, _SLACK = 127.0 * 2**23, 2.0**23, 512.0


def _all(value: float, kind: Any = _WORDS) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _spread(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, _WORD(0))
    return builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), _all(0))


def _load(context: Any, builder: Any, kind: Any, array: Any, index: Any, vector: Any) -> Any:
    return builder.load(_address(context, builder, kind, array, index, vector), align=4)


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any, vector: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


@intrinsic
def _follow(typingctx, words, n):  # type: ignore[no-untyped-def]
    """Compute words[n : n + LANES] from earlier ones."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind, (array, index) = signature.args[0], args

        def before(distance):  # type: ignore[no-untyped-def]
            at = builder.sub(index, ir.Constant(index.type, distance))
            return _load(context, builder, kind, array, at, _WORDS)

        next_one = before(WORDS - 1)
        joined = builder.or_(builder.and_(before(WORDS), _all(0x80000000)), builder.and_(next_one, _all(0x7FFFFFFF)))
        odd = builder.sub(_all(0), builder.and_(next_one, _all(1)))
        mixed = builder.xor(builder.lshr(joined, _all(1)), builder.and_(odd, _all(0x9908B0DF)))
        value = builder.xor(before(WORDS - 397), mixed)
        builder.store(value, _address(context, builder, kind, array, index, _WORDS), align=4)
        return context.get_dummy_value()

    return types.void(words, types.intp), codegen


def _tempered(builder: Any, y: Any) -> Any:
    y = builder.xor(y, builder.lshr(y, _all(11)))
    y = builder.xor(y, builder.and_(builder.shl(y, _all(7)), _all(0x9D2C5680)))
    y = builder.xor(y, builder.and_(builder.shl(y, _all(15)), _all(0xEFC60000)))
    return builder.xor(y, builder.lshr(y, _all(18)))


@intrinsic
def contenders(typingctx, words, first, logits, v, top, scale, bound, floor):  # type: ignore[no-untyped-def]
    """Which of the tokens from v on, as LANES bits, may have exp(scale (logit - top)) / q >= 1 / bound.

    Those left out certainly have not, or have a logit below `floor`. q is the token's exponential, which is at least u,
    of which the first word gives 21 bits; `bound` is times 2 ** 21. For the power of two a straight line between powers
    of two is taken, which is never below it. `scale` is times `LN_2_BITS`.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pairs = _load(context, builder, signature.args[0], args[0], args[1], _PAIRS)
        even = ir.Constant(_WORDS, [*range(0, 2 * LANES, 2)])
        first_words = builder.shuffle_vector(pairs, ir.Constant(_PAIRS, ir.Undefined), even)
        u = builder.sitofp(builder.and_(_tempered(builder, first_words), _all(0x1FFFFF)), _FLOATS)
        x = _load(context, builder, signature.args[2], args[2], args[3], _FLOATS)
        top, scale, bound, floor = (_spread(builder, value) for value in args[4:])
        bits = builder.fmul(builder.fsub(x, top), scale)
        bits = builder.fadd(bits, _all(_ONE_BITS + _SLACK, _FLOATS))
        least = _all(_LEAST_BITS, _FLOATS)
        bits = builder.select(builder.fcmp_ordered(">", bits, least), bits, least)
        weight = builder.bitcast(builder.fptosi(bits, _WORDS), _FLOATS)
        ahead = builder.fcmp_ordered(">=", builder.fmul(weight, bound), u)
        ahead = builder.and_(ahead, builder.fcmp_ordered(">=", x, floor))
        return builder.zext(builder.bitcast(ahead, ir.IntType(LANES)), ir.IntType(64))

    fp32 = types.float32
    return types.int64(words, types.intp, logits, types.intp, fp32, fp32, fp32, fp32), codegen


@njit(**EXACT)
def extend(words, start, stop):  # type: ignore[no-untyped-def]
    """Compute words[start:stop] from the 624 before them, in steps of LANES: it may write so many more."""
    for n in range(start, stop, LANES):
        _follow(words, n)  # type: ignore[call-arg]


@njit(**EXACT)
def _number(word):  # type: ignore[no-untyped-def]
    y = np.uint32(word)
    y = np.uint32(y ^ (y >> np.uint32(11)))
    y = np.uint32(y ^ (np.uint32(y << np.uint32(7)) & np.uint32(0x9D2C5680)))
    y = np.uint32(y ^ (np.uint32(y << np.uint32(15)) & np.uint32(0xEFC60000)))
    return np.uint32(y ^ (y >> np.uint32(18)))


@njit(**EXACT)
def uniform(words, at):  # type: ignore[no-untyped-def]
    """The number below 1 of 53 bits in words[at] and words[at + 1], float64."""
    bits = (np.uint64(_number(words[at])) << np.uint64(32)) | np.uint64(_number(words[at + 1]))
    return np.float64(bits & np.uint64(2**53 - 1)) * 2.0**-53
