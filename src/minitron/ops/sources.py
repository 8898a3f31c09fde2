"""Compiled functions cached on disk that notice changes of what is compiled into them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from numba import njit

from .formats import FAST


def cached(build: Callable[[int], Any], file: str, *modules: ModuleType) -> Any:
    """`build(digest)` compiled, without the GIL, and cached on disk where a folder may be written to.

    Numba looks only at the file of a cached function, and at the values of its closure: the function that `build`
    returns must use `digest`, which changes with every source line of `file` and of the modules.
    """
    files = (file, *(module.__file__ or "" for module in modules))
    function = build(zlib.crc32(b"".join(Path(name).read_bytes() for name in files)))
    try:
        return njit(cache=True, **FAST)(function)
    except RuntimeError:  # no folder that may be written to: compiled anew in each process
        return njit(**FAST)(function)
