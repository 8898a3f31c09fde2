"""A checksum of a tensor's bytes, as fast as memory is read: it tells whether a copy is still up to date.

Blocks of 512 words of 64 bits are hashed by multiplying the halves of each word with each other, after a random key was
added to the word (NH of UMAC, Black et al. 1999), twice with other keys; the blocks' two sums are then mixed in order.
Any change is missed with a probability of some 2^-60; a sum of words, or of words times odd numbers, would miss pairs
of changed signs. The checksum does not withstand somebody who constructs two tensors with the same one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiled import cached

BLOCK = 512
"""Words that are hashed together."""
KEYS = np.random.Generator(np.random.PCG64(20)).integers(2**64, size=(2, BLOCK), dtype=np.uint64)


def _build(digest: int) -> Any:
    def checksum(words, keys, state):  # type: ignore[no-untyped-def]
        """Mix words (n,) uint64, n a multiple of BLOCK, into the state (2,) uint64; keys are KEYS."""
        if digest == -1:
            return
        low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
        one, two = state[0], state[1]
        size = keys.shape[1]
        for start in range(0, words.shape[0], size):
            block = words[start : start + size]
            first, second = np.uint64(0), np.uint64(0)
            for i in range(size):
                x, y = block[i] + keys[0, i], block[i] + keys[1, i]
                first += (x & low) * (x >> half)
                second += (y & low) * (y >> half)
            one = (one ^ first) * np.uint64(0x9E3779B97F4A7C15)
            two = (two ^ second) * np.uint64(0xC2B2AE3D27D4EB4F)
            one ^= one >> half
            two ^= two >> half
        state[0], state[1] = one, two

    return checksum


mix = cached(_build, __file__)
