"""The Mersenne Twister behind torch's CPU generator: its state from a seed, from torch, and back. No torch needed.

torch draws a token from probabilities p (B, V) as the arg max of p / q, where each q is -log(1 - u) rounded to fp32 and
u is made of 53 bits of two numbers, the first of which has the high bits. Row b uses the numbers from 2 b V on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

WORDS = 624
"""Numbers of 32 bits in the state: a block, from which the next block follows."""
# Where torch keeps them in the bytes of `torch.get_rng_state()`; each word of the block takes eight bytes.
_LEFT, _NEXT, _BLOCK = slice(8, 12), slice(16, 24), slice(24, 24 + 8 * WORDS)


@dataclass(eq=False)
class TwisterState:
    """A block of numbers, uint32 (624,), before they are tempered, and how many of them have been used."""

    block: Array
    used: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TwisterState) and self.used == other.used and np.array_equal(self.block, other.block)


def seeded(seed: int) -> TwisterState:
    """The state after `torch.manual_seed(seed)`, which uses the low 32 bits of the seed."""
    block, word = np.empty(WORDS, np.uint32), seed & 0xFFFFFFFF
    for index in range(WORDS):
        block[index] = word
        word = (1812433253 * (word ^ (word >> 30)) + index + 1) & 0xFFFFFFFF
    return TwisterState(block, WORDS)


def from_bytes(state: Array) -> TwisterState:
    """The state in the bytes (5056,) uint8 of `torch.get_rng_state().numpy()`."""
    block = state[_BLOCK].view(np.uint64).astype(np.uint32)
    return TwisterState(block, WORDS + 1 - int(state[_LEFT].view(np.int32)[0]))


def to_bytes(twister: TwisterState, state: Array) -> None:
    """Write the state into the bytes (5056,) uint8 for `torch.set_rng_state`. What else they hold stays."""
    state[_BLOCK].view(np.uint64)[:] = twister.block
    state[_LEFT].view(np.int32)[0] = WORDS + 1 - twister.used
    state[_NEXT].view(np.uint64)[0] = twister.used


def tempered(words: Array) -> Array:
    """The random numbers (N,) uint32 for the words (N,) of a state."""
    words = words ^ (words >> np.uint32(11))
    words ^= (words << np.uint32(7)) & np.uint32(0x9D2C5680)
    words ^= (words << np.uint32(15)) & np.uint32(0xEFC60000)
    return words ^ (words >> np.uint32(18))


def exponentials(words: Array) -> Array:
    """What torch's `exponential_` makes of the words (2 N,): (N,) fp32."""
    numbers = tempered(words).astype(np.uint64)
    bits = ((numbers[0::2] << np.uint64(32)) | numbers[1::2]) & np.uint64(2**53 - 1)
    return (-np.log1p(-(bits.astype(np.float64) * 2.0**-53))).astype(np.float32)


def next_block(block: Array) -> Array:
    """The block (624,) that follows a block."""
    high, low = block & np.uint32(0x80000000), block & np.uint32(0x7FFFFFFF)
    out, shift = np.empty_like(block), 397

    def mixed(joined: Array) -> Array:
        return (joined >> np.uint32(1)) ^ ((joined & np.uint32(1)) * np.uint32(0x9908B0DF))

    first = mixed(high[:-1] | low[1:])
    reach = WORDS - shift
    out[:reach] = block[shift:] ^ first[:reach]
    out[reach : 2 * reach] = out[:reach] ^ first[reach : 2 * reach]
    out[2 * reach : -1] = out[reach : shift - 1] ^ first[2 * reach :]
    out[-1:] = out[shift - 1 : shift] ^ mixed(high[-1:] | (out[:1] & np.uint32(0x7FFFFFFF)))
    return out


def advanced(twister: TwisterState, count: int) -> TwisterState:
    """The state after so many more numbers."""
    block, used = twister.block, twister.used + count
    while used > WORDS:
        block, used = next_block(block), used - WORDS
    return TwisterState(block, used)


def next_words(twister: TwisterState, out: Array) -> TwisterState:
    """Write the next words, before they are tempered, into `out` (N,) uint32; the state after them."""
    block, used, filled = twister.block, twister.used, 0
    while filled < len(out):
        if used == WORDS:
            block, used = next_block(block), 0
        some = min(WORDS - used, len(out) - filled)
        out[filled : filled + some] = block[used : used + some]
        used, filled = used + some, filled + some
    return TwisterState(block, used)
