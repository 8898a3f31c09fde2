"""The Linux system calls that Python does not offer, through the C library."""

import ctypes
import os
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: Any) -> None:
    """Call a function of the C library.

    Raises:
        OSError: the call fails.
    """
    if getattr(libc, name)(*args) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
