"""On which processors the threads of an engine run: threads that wait for each other by spinning must not share one.

Linux chooses the processor of a thread that starts or wakes by the processors' load. After a pause the two threads of
an engine often come to the same one, although the other is idle, and each spins through its time slices until the
system moves one of them: the first token then takes 10 to 16 ms more (docs/performance.md).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress

IDLE_SECONDS = 0.005
"""After a pause of so long threads may have been placed anew. Until then they spin, see `threads.wait_while`."""
_PROCESSOR = 36
"""Index of the processor among the values of /proc/.../stat that follow the name."""


def processor_of(thread: int) -> int | None:
    """The processor on which a thread of this process runs, or ran last; None where the system does not tell.

    Args:
        thread: its `native_id`.
    """
    try:
        with open(f"/proc/self/task/{thread}/stat", "rb", buffering=0) as file:
            text = file.read()
        return int(text.rpartition(b")")[2].split()[_PROCESSOR])
    except (OSError, ValueError, IndexError):
        return None


def keep_apart(others: Iterable[int]) -> None:
    """Move the calling thread to another processor if one of the other threads (`native_id`) is on the same one.

    The thread may still run on every processor that it might run on before. Where the system does not allow this,
    nothing happens.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    taken = {processor_of(thread) for thread in others}
    if processor_of(threading.get_native_id()) not in taken - {None}:
        return
    allowed = os.sched_getaffinity(0)
    free = allowed - taken
    if not free:
        return
    with suppress(OSError):
        try:
            os.sched_setaffinity(0, free)
        finally:  # also after Ctrl-C
            os.sched_setaffinity(0, allowed)
