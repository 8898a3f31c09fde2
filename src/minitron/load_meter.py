"""How much of the machine other programs took during a measurement."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

SHARE_RUNNING = 0.85
"""Least share of the time that the measuring thread must have had a core for the machine to count as free."""
CORES_LEFT = 0.8
"""Least number of cores that other programs must leave for each thread of the measurement."""
_STAT = Path("/proc/stat")


class LoadMeter:
    """Context that measures whether other programs took cores from `threads` threads while it was open.

    `reason` is a clause such as "other programs used 1.8 of 2 cores", or empty. It compares the processor time of this
    thread, which does nothing but decode, with the elapsed time, and where the system tells it, the time that all cores
    were busy with that of this process.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.reason = ""

    def __enter__(self) -> LoadMeter:
        self._before = _clocks()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wall, thread, process, busy = (b - a for a, b in zip(self._before, _clocks(), strict=True))
        self.reason = describe_load(wall, thread, process, busy, self.threads, os.cpu_count() or 1)


def describe_load(wall: float, thread: float, process: float, busy: float, threads: int, cores: int) -> str:
    """Why the machine was not free during a measurement; empty if it was.

    Args:
        wall: elapsed seconds.
        thread: processor seconds of the measuring thread, which never waits for anything but a core.
        process: processor seconds of its process, all threads.
        busy: processor seconds of all programs; 0 if unknown.
        threads: number that the measurement uses.
        cores: number that the machine has.
    """
    if wall <= 0:
        return ""
    taken = (busy - process) / wall
    reasons = []
    if cores - taken < CORES_LEFT * min(threads, cores):
        reasons.append(f"other programs used {min(taken, cores):.1f} of {cores} cores")
    if thread < SHARE_RUNNING * wall:
        reasons.append(f"it had a core for {thread / wall:.0%} of the time")
    return " and ".join(reasons)


def _clocks() -> tuple[float, float, float, float]:
    """Seconds: elapsed time, and processor time of this thread, this process, and all programs."""
    return time.perf_counter(), time.thread_time(), time.process_time(), _busy_seconds()


def _busy_seconds() -> float:
    """Processor time of all programs since the machine started; 0 where the system does not tell."""
    try:
        line = _STAT.read_text(encoding="ascii").splitlines()[0]
        user, nice, system, _, _, irq, softirq, steal = map(float, line.split()[1:9])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
