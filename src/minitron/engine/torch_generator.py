"""torch's CPU generator as a state of the Mersenne Twister that compiled code can go on from."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch

from .mt19937 import TwisterState, exponentials, from_bytes, next_block, to_bytes

_lock = threading.RLock()
"""Held while tokens are drawn: two requests must not use the same numbers."""


@contextmanager
def held() -> Iterator[TwisterState]:
    """The state of torch's generator. On leaving, the generator gets the state as the block has changed it."""
    with _lock:
        state = torch.get_rng_state()
        twister = from_bytes(state.numpy())
        yield twister
        to_bytes(twister, state.numpy())
        torch.set_rng_state(state)


@lru_cache(maxsize=1)
def draws_alike() -> bool:
    """Whether this build of torch draws tokens from the numbers that `mt19937` says. Checked by some draws."""
    generator = torch.Generator().manual_seed(20)
    p = torch.rand(3, 250, generator=generator)
    for _ in range(4):
        twister = from_bytes(generator.get_state().numpy())
        words = [twister.block]
        while len(words) * len(twister.block) < twister.used + 2 * p.numel():
            words.append(next_block(words[-1]))
        q = exponentials(np.concatenate(words)[twister.used : twister.used + 2 * p.numel()]).reshape(p.shape)
        drawn = torch.multinomial(p, 1, generator=generator)[:, 0].numpy()
        used = (twister.used + 2 * p.numel() - 1) % len(twister.block) + 1
        if (drawn != (p.numpy() / q).argmax(-1)).any() or from_bytes(generator.get_state().numpy()).used != used:
            return False
    return True
