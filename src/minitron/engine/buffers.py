"""The arrays that the engine works on: tensors of torch, or NumPy arrays where a process does without torch.

Both kinds have the same bytes. NumPy has no bf16: such numbers are their bits, as uint16. This file, and all of the
CPU engine but the prefill of long prompts, runs without torch.
"""

from __future__ import annotations

import math
import os
import sys
from typing import Any, TypeAlias

import numpy as np

from ..pages import LINE, ask_for_large_pages

Buffer: TypeAlias = Any
"""A tensor or a NumPy array. What both have may be used: `shape`, `nbytes`, indexing, assignment."""

NUMPY_DTYPES: dict[str, Any] = {
    "bf16": np.uint16,
    "fp32": np.float32,
    "fp16": np.float16,
    "fp64": np.float64,
    "int32": np.int32,
}
"""How NumPy stores numbers of a kind."""
_TORCH_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16", "fp64": "float64", "int32": "int32"}


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """`numpy.empty`, aligned to cache lines, and in large pages where it is large."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + LINE, np.uint8)
    ask_for_large_pages(address(memory), size + LINE)
    first = -address(memory) % LINE
    return memory[first : first + size].view(dtype).reshape(shape)


def zeros(shape: tuple[int, ...], kind: str, like: Buffer) -> Buffer:
    """Zeros of one of NUMPY_DTYPES, of the sort of buffer that `like` is and on its device, aligned to cache lines.

    Memory on the CPU that is never written to is never touched. `torch.zeros` writes to it, and by several threads,
    which spin for some milliseconds afterwards on the cores that the engine's threads need.
    """
    if not isinstance(like, np.ndarray) and like.device.type != "cpu":
        import torch

        return torch.zeros(shape, dtype=getattr(torch, _TORCH_DTYPES[kind]), device=like.device)
    dtype = np.dtype(NUMPY_DTYPES[kind])
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + LINE, np.uint8)
    first = -address(memory) % LINE
    memory = memory[first : first + size]
    if isinstance(like, np.ndarray):
        return memory.view(dtype).reshape(shape)
    import torch

    return torch.from_numpy(memory).view(getattr(torch, _TORCH_DTYPES[kind])).reshape(shape)


def address(buffer: Buffer) -> int:
    """Where a contiguous buffer begins in memory."""
    if isinstance(buffer, np.ndarray):
        assert buffer.flags.c_contiguous, buffer.shape
        return buffer.ctypes.data
    assert buffer.is_contiguous(), buffer.shape
    return buffer.data_ptr()


def of_kind(array: np.ndarray, like: Buffer) -> Buffer:
    """The array aligned to cache lines; as a tensor on its device if `like` is one."""
    if address(array) % LINE:
        aligned = empty(array.shape, array.dtype)
        aligned[...] = array
        array = aligned
    if isinstance(like, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array).to(like.device)


def most_threads() -> int:
    """Threads that may compute: what torch says where it is loaded, else as many as it would say."""
    if "torch" in sys.modules:
        import torch

        return torch.get_num_threads()
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else _cores()


def _cores() -> int:
    """Cores that this process may use; two hardware threads of one core count once."""
    try:
        usable = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
    siblings = set()
    for cpu in usable:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as file:
                siblings.add(file.read())
        except OSError:
            siblings.add(str(cpu))
    return len(siblings)
