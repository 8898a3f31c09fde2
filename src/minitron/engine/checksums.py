"""Checksums of the tensors that the engine has copied, to notice when they change."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 24
"""Bytes that one thread takes at a time."""
SHORT = 1 << 22
"""Bytes below which a second thread is not worth starting."""

Checksum = tuple[bytes, ...]
"""A checksum of each piece of a tensor, after its shape and dtype."""


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, Checksum]:
    """The checksum of each contiguous tensor on the CPU: of its bytes, its shape and its dtype.

    With Numba at the speed at which memory is read, in as many threads as torch has.
    """
    jobs: list[tuple[str, np.ndarray]] = []
    for name, tensor in tensors.items():
        data = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        jobs.extend((name, data[start : start + PIECE]) for start in range(0, max(1, len(data)), PIECE))
    work = _blake
    if importlib.util.find_spec("numba") is not None:
        from .cpu.compiled import compiling

        work = _mixed
        with compiling("the checksum of weights"):
            work(np.zeros(1, np.uint8))
    if sum(len(piece) for _, piece in jobs) <= SHORT or torch.get_num_threads() == 1:
        sums = [work(piece) for _, piece in jobs]
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            sums = list(pool.map(work, [piece for _, piece in jobs]))
    found = {name: [repr((tuple(tensor.shape), tensor.dtype)).encode()] for name, tensor in tensors.items()}
    for (name, _), piece_sum in zip(jobs, sums, strict=True):
        found[name].append(piece_sum)
    return {name: tuple(parts) for name, parts in found.items()}


def _mixed(data: np.ndarray) -> bytes:
    from .cpu.checksum import BLOCK, KEYS, mix

    size = 8 * BLOCK
    whole = len(data) // size * size
    state = np.full(2, len(data), np.uint64)
    if whole:
        mix(data[:whole].view(np.uint64), KEYS, state)
    if whole < len(data):
        rest = np.zeros(size, np.uint8)
        rest[: len(data) - whole] = data[whole:]
        mix(rest.view(np.uint64), KEYS, state)
    return state.tobytes()


def _blake(data: np.ndarray) -> bytes:
    return hashlib.blake2b(data.data, digest_size=16).digest()
