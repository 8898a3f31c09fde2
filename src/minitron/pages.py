"""Memory in large pages, where the system has them, and aligned to cache lines.

Rows of neurons that are not zero are far apart; with pages of 4 KiB each of them costs TLB misses. With pages of 2 MiB,
two threads read a tenth of the rows of a (65536, 3072) bf16 matrix at 27 GB/s
instead of 14 (2 x AMD EPYC, virtualized).
"""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PAGE = 1 << 21
_MADV_HUGEPAGE = 14


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.empty`; on Linux it asks the kernel for large pages, which it provides when they are first written to."""
    import torch

    out = torch.empty(shape, dtype=dtype)
    ask_for_large_pages(out.data_ptr(), out.nbytes)
    return out


def ask_for_large_pages(address: int, size: int) -> None:
    """Ask the kernel, on Linux, for large pages for memory of some size in bytes that has not been written to."""
    if sys.platform != "linux" or size < 2 * PAGE:
        return
    first = -(-address // PAGE) * PAGE
    last = (address + size) // PAGE * PAGE
    # Advice: a kernel without large pages refuses, and nothing else changes.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_HUGEPAGE)


LINE = 64
"""Bytes of a cache line, and of an AVX-512 register."""
SMALL = 1 << 26
"""Largest size, in bytes, of models that may stay in the caches."""


def align(model: nn.Module) -> None:
    """Align a small model's parameters on the CPU to cache lines.

    Parameters that are mapped from a file begin wherever its header ends, and then every register is read from two
    lines (`docs/performance.md`, what was tried). Sharded and quantized tensors have no memory of their own and stay.
    """
    from torch import nn

    parameters = [p for p in model.parameters() if type(p) is nn.Parameter and p.device.type == "cpu"]
    if sum(parameter.numel() * parameter.element_size() for parameter in parameters) > SMALL:
        return
    for parameter in parameters:
        if parameter.data_ptr() % LINE:
            parameter.data = parameter.data.clone()
