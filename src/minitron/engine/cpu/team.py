"""How many threads decode: the most allowed, or fewer where other programs use the cores.

A step has three barriers a layer. Where another program holds a core, each barrier can cost a time slice of the
scheduler, some milliseconds, and one thread is several times as fast as two. So the time of a step is measured. While
the system preempts this process, smaller numbers of threads are tried, and the fastest one is kept. Without preemption
nothing is tried, so a free machine loses nothing. Results do not depend on the number of threads.
"""

from __future__ import annotations

import time

try:
    import resource
except ImportError:  # Windows
    resource = None

PERIOD_SECONDS = 0.03
"""Time for which a number of threads is measured before it is judged."""
RETRY_SECONDS, LONGEST_RETRY = 0.5, 4.0
"""Time after which a number of threads that was slower is tried again; doubled each time that it is slower again."""
GAIN = 0.9
"""Another number of threads replaces the best one if it takes at most this share of its time."""
WARM_STEPS = 2
"""Steps after a change that are not measured: threads have to start."""


def interruptions() -> int:
    """How often the system has preempted a thread of this process; 0 where it does not tell."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource is not None else 0


_latest: dict[int, tuple[int, float]] = {}
"""For the most threads of a team: the number that the last team of this process has chosen, and when."""


def latest_size(most: int, now: float | None = None) -> int:
    """The number of threads that a new team should begin with: that of the last one, if it is recent.

    A call of `generate` has a team of its own. On a busy machine it would pay for two threads again, each time.
    """
    size, when = _latest.get(most, (most, 0.0))
    return size if (time.monotonic() if now is None else now) - when < LONGEST_RETRY else most


class Team:
    """Chooses the number of threads from the measured times of steps.

    Args:
        most: the largest number of threads.
        first: the number to begin with; `most` if None.
    """

    def __init__(self, most: int, first: int | None = None) -> None:
        self.options = [most]
        while self.options[-1] > 1:
            self.options.append(self.options[-1] // 2)
        self.size = most if first is None else first
        """Threads of the next step."""
        self._pace: dict[int, tuple[float, float]] = {}
        """For a number of threads: seconds a step when it was last judged, and when that was."""
        self._patience: dict[int, float] = {}
        self._best = self.size
        self._begin()

    def _begin(self) -> None:
        self._steps, self._seconds, self._warm, self._disturbed = 0, 0.0, WARM_STEPS, False

    def saw(self, steps: int, seconds: float, interrupted: bool, now: float | None = None) -> None:
        """Record the time of some steps of equal work, and whether the process was preempted meanwhile."""
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
        _latest[self.options[0]] = self._best, now
        self._begin()

    def _next(self, now: float, disturbed: bool) -> int:
        """The number of threads to use next: another one that is due to be tried, or the best one."""
        index = self.options.index(self._best)
        if disturbed and index + 1 < len(self.options) and self._is_due(self.options[index + 1], now):
            return self.options[index + 1]
        if index > 0 and self._is_due(self.options[index - 1], now):
            return self.options[index - 1]
        return self._best

    def _is_due(self, size: int, now: float) -> bool:
        return size not in self._pace or now - self._pace[size][1] > self._patience.get(size, RETRY_SECONDS)
