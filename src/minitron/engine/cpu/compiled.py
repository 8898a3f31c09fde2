"""Compiled functions, cached on disk until a source file that they were compiled from changes."""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
from llvmlite import binding
from numba import njit

from .formats import FAST

SILENT_SECONDS = 1.0
"""Loading compiled code from the disk takes less than this, compiling it more."""
_log = logging.getLogger("minitron")
_announced: set[str] = set()
_lock = threading.Lock()


def processor_has(feature: str) -> bool:
    """Whether code is compiled for this processor, and it has the feature, by LLVM's name."""
    host = numba.config.CPU_NAME in (None, "host")  # type: ignore[reportAttributeAccessIssue]
    return host and bool(binding.get_host_cpu_features().get(feature))


AVX512_BF16 = processor_has("avx512bf16")
"""Whether the processor has `vdpbf16ps` and `vcvtneps2bf16`. They are written as assembly, because the types of LLVM's
intrinsics for them differ between versions."""
if AVX512_BF16:
    binding.initialize_native_asmparser()


def compiling(what: str) -> AbstractContextManager[None]:
    """Log, once a process, that `what` is being compiled if this block takes long."""
    return announced(f"compiling {what}")


@contextmanager
def announced(work: str) -> Iterator[None]:
    """Log, once a process, what is being done once per machine if this block takes long."""
    with _lock:
        if work in _announced:
            known = True
        else:
            known = False
            _announced.add(work)
    if known:
        yield
        return
    text = f"{work}, once per machine and version ..."
    note = threading.Timer(SILENT_SECONDS, _log.warning, [text])
    note.daemon = True
    note.start()
    try:
        yield
    finally:
        note.cancel()
        note.join()


def source_digest(file: str, *modules: ModuleType) -> int:
    """A checksum of the source of a file and of modules: the version of what is compiled from them."""
    files = (file, *(module.__file__ or "" for module in modules))
    return zlib.crc32(b"".join(Path(name).read_bytes() for name in files))


def cached(build: Callable[[int], Any], file: str, *modules: ModuleType) -> Any:
    """`build(digest)`, compiled without the GIL, and cached on disk where there is a writable folder.

    Numba looks only at the file of a cached function, and at the values of its closure: the function that `build`
    returns must use `digest`, the `source_digest` of `file` and of the modules.
    """
    function = build(source_digest(file, *modules))
    try:
        return njit(cache=True, **FAST)(function)
    except RuntimeError:  # no writable folder: compiled anew in each process
        return njit(**FAST)(function)
