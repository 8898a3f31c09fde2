"""Compiled functions, cached on disk until a source file that they were compiled from changes."""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from numba import njit

from .formats import FAST

SILENT_SECONDS = 1.0
"""Loading compiled code from the disk takes less than this, compiling it more."""
_log = logging.getLogger("minitron")
_compiled: set[str] = set()
_lock = threading.Lock()


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Log, once a process, that `what` is being compiled if this block takes long."""
    with _lock:
        if what in _compiled:
            known = True
        else:
            known = False
            _compiled.add(what)
    if known:
        yield
        return
    text = f"compiling {what}, once per machine and version ..."
    note = threading.Timer(SILENT_SECONDS, _log.warning, [text])
    note.daemon = True
    note.start()
    try:
        yield
    finally:
        note.cancel()
        note.join()


def cached(build: Callable[[int], Any], file: str, *modules: ModuleType) -> Any:
    """`build(digest)`, compiled without the GIL, and cached on disk where there is a writable folder.

    Numba looks only at the file of a cached function, and at the values of its closure: the function that `build`
    returns must use `digest`, a checksum of the source of `file` and of the modules.
    """
    files = (file, *(module.__file__ or "" for module in modules))
    function = build(zlib.crc32(b"".join(Path(name).read_bytes() for name in files)))
    try:
        return njit(cache=True, **FAST)(function)
    except RuntimeError:  # no writable folder: compiled anew in each process
        return njit(**FAST)(function)
