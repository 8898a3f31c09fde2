"""How many threads decode: all that there may be, or fewer where other programs take the cores.

A step has three points a layer at which threads wait for each other. Where another program holds a core, each of them
can cost the system's time slice, some milliseconds, and one thread is several times as fast as two. So the time of a
step is measured; while the system takes cores away from this process, fewer threads are tried, and the fastest number
is kept. Without such interruptions nothing is tried, so a free machine loses nothing. The numbers that are computed do
not depend on the number of threads.
"""

from __future__ import annotations

import time

try:
    import resource
except ImportError:  # Windows
    resource = None

PERIOD_SECONDS = 0.03
"""For which a number of threads is kept before it is judged."""
RETRY_SECONDS, LONGEST_RETRY = 0.5, 4.0
"""After which a number of threads that was slower is tried again; doubled each time that it is slower once more."""
GAIN = 0.9
"""Another number of threads must take at most this share of the time."""
WARM_STEPS = 2
"""Steps after a change that are not counted: threads have to start."""


def interruptions() -> int:
    """How often the system has taken a core away from a thread of this process; 0 where it does not tell."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource is not None else 0


class Team:
    """Chooses the number of threads from what steps took.

    Args:
        most: threads that there may be.
    """

    def __init__(self, most: int) -> None:
        self.options = [most]
        while self.options[-1] > 1:
            self.options.append(self.options[-1] // 2)
        self.size = most
        """Threads of the next step."""
        self._pace: dict[int, tuple[float, float]] = {}
        """Of a number of threads: seconds of a step when it was last judged, and when that was."""
        self._patience: dict[int, float] = {}
        self._best = most
        self._begin()

    def _begin(self) -> None:
        self._steps, self._seconds, self._warm, self._disturbed = 0, 0.0, WARM_STEPS, False

    def saw(self, steps: int, seconds: float, interrupted: bool, now: float | None = None) -> None:
        """Learn that some steps of equal work took so long, and whether cores were taken away meanwhile."""
        if len(self.options) == 1:
            return
        self._disturbed |= interrupted
        if self._warm > 0:
            self._warm -= steps
            return
        self._steps += steps
        self._seconds += seconds
        if self._seconds >= PERIOD_SECONDS:
            self._judge(time.monotonic() if now is None else now)

    def _judge(self, now: float) -> None:
        pace, disturbed = self._seconds / self._steps, self._disturbed
        self._pace[self.size] = pace, now
        if self.size == self._best or pace < GAIN * self._pace[self._best][0]:
            self._best = self.size
            self._patience.pop(self.size, None)
        else:
            self._patience[self.size] = min(LONGEST_RETRY, 2 * self._patience.get(self.size, RETRY_SECONDS))
        self.size = self._next(now, disturbed)
        self._begin()

    def _next(self, now: float, disturbed: bool) -> int:
        """Another number of threads that is due to be tried, or the best one."""
        place = self.options.index(self._best)
        if disturbed and place + 1 < len(self.options) and self._is_due(self.options[place + 1], now):
            return self.options[place + 1]
        if place > 0 and self._is_due(self.options[place - 1], now):
            return self.options[place - 1]
        return self._best

    def _is_due(self, size: int, now: float) -> bool:
        return size not in self._pace or now - self._pace[size][1] > self._patience.get(size, RETRY_SECONDS)
