"""Hashes of spans of bytes inside compiled code, and sets of them: tables with open addressing, as large as needed."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


@njit(nogil=True)
def mixed(x):  # type: ignore[no-untyped-def]
    """A number whose bits all depend on all bits of `x` (the last step of MurmurHash3)."""
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xFF51AFD7ED558CCD)
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xC4CEB9FE1A85EC53)
    x ^= x >> np.uint64(33)
    return x


@intrinsic
def _load64(typingctx: Any, data: Any, index: Any) -> Any:
    """Eight bytes of a uint8 array from `index` on, as uint64; they must lie inside it."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(array.data, [arguments[1]])
        word = builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()))
        word.align = 1
        return word

    return types.uint64(data, types.int64), build


load64: Any = _load64
"""`_load64` as it is called from compiled code, without the argument that Numba adds."""


@njit(nogil=True)
def tail64(data, start, stop):  # type: ignore[no-untyped-def]
    """Fewer than eight bytes as a number."""
    word = np.uint64(0)
    for i in range(start, stop):
        word |= np.uint64(data[i]) << np.uint64(8 * (i - start))
    return word


@njit(nogil=True)
def span_hash(data, start, stop):  # type: ignore[no-untyped-def]
    """64-bit hash of bytes, which depends on their number too."""
    h = np.uint64(stop - start) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)
    i = start
    while i + 8 <= stop:
        h = (h ^ load64(data, i)) * np.uint64(0x9FB21C651E98DF25)
        h ^= h >> np.uint64(32)
        i += 8
    h = (h ^ tail64(data, i, stop)) * np.uint64(0x9FB21C651E98DF25)
    return mixed(h)


@njit(nogil=True)
def slot_of(keys, mask, key):  # type: ignore[no-untyped-def]
    """Where `key`, which is not 0, is in a set, or the empty slot (0) where it would be."""
    slot = np.int64((key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)) & mask
    while keys[slot] != 0 and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@njit(nogil=True)
def slots_for(count):  # type: ignore[no-untyped-def]
    """Slots of a set of `count` numbers: a power of two, at most half of them taken."""
    size = 16
    while size < 2 * count:
        size *= 2
    return size


@njit(nogil=True)
def emptied(keys, count):  # type: ignore[no-untyped-def]
    """Empty the part of `keys` that a set of `count` numbers needs; its slots less one."""
    size = slots_for(count)
    keys[:size] = 0
    return size - 1
