"""The one thread that computes: it steps the schedulers of all models in turn, and runs jobs between their steps."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from .errors import failed, unavailable
from .scheduler import Scheduler, TextSequence, Update

MOST_FAILURES = 3
"""Failed steps in a row after which the thread gives up."""
IDLE_SECONDS = 0.2
_log = logging.getLogger("minitron.serve")

Deliver = Callable[[list[tuple[TextSequence, Update]]], object]


class EngineLoop:
    """Runs schedulers in a thread. Sequences and jobs may be handed in from any thread."""

    def __init__(
        self,
        schedulers: Sequence[Scheduler],
        deliver: Deliver,
        died: Callable[[BaseException], object] = lambda error: None,
        most_jobs: int = 256,
    ) -> None:
        """Prepare the thread; `start` starts it.

        Args:
            schedulers: one for each model that writes text.
            deliver: called in the engine's thread with all updates of a step.
            died: called in the engine's thread when it cannot go on.
            most_jobs: jobs that may wait.
        """
        self._schedulers, self._deliver, self._died = list(schedulers), deliver, died
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._most_jobs = most_jobs
        self._wake = threading.Condition()
        self._awake = False
        self._stopping = False
        self.dead: BaseException | None = None
        """Why the thread has ended; None while it can answer."""
        self._thread = threading.Thread(target=self._run, name="minitron-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self.dead is None and self._thread.is_alive()

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting or running."""
        return not self._jobs and all(not one.num_waiting and not one.num_running for one in self._schedulers)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step in progress; what is unfinished ends with an error."""
        self._stopping = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join()

    def wake(self) -> None:
        """Tell the thread that there may be work."""
        with self._wake:
            self._awake = True
            self._wake.notify()

    def submit(self, scheduler: Scheduler, *sequences: TextSequence) -> None:
        """Queue sequences, all or none.

        Raises:
            ApiError: the queue is full, or the thread is dead.
        """
        self._require_alive()
        scheduler.submit(*sequences)
        self.wake()

    def call(self, job: Callable[[], Any]) -> Future[Any]:
        """Run a job between two steps.

        Raises:
            ApiError: too many jobs wait, or the thread is dead.
        """
        self._require_alive()
        if len(self._jobs) >= self._most_jobs:
            raise unavailable(f"{len(self._jobs)} jobs are waiting, and at most {self._most_jobs} may")
        future: Future[Any] = Future()
        self._jobs.append((job, future))
        self.wake()
        return future

    def _require_alive(self) -> None:
        if self.dead is not None:
            raise unavailable("the engine has failed and the server is about to end")

    # --- in the engine's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while not self._stopping:
            try:
                worked = self._turn()
                failures = 0 if worked else failures
            except BaseException as error:
                failures += 1
                _log.exception("the engine failed")
                if failures >= MOST_FAILURES or not isinstance(error, Exception) or not self._recover():
                    self._give_up(error)
                    return
                continue
            if not worked:
                self._rest()
        self._fail_all("the server is shutting down")
        self._close()

    def _turn(self) -> bool:
        worked = False
        for scheduler in self._schedulers:
            try:
                worked = scheduler.step() or worked
            finally:
                self._flush(scheduler)
        return self._do_job() or worked

    def _do_job(self) -> bool:
        if not self._jobs:
            return False
        self._close()  # torch's threads need the cores
        job, future = self._jobs.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)
        return True

    def _flush(self, scheduler: Scheduler) -> None:
        if scheduler.outbox:
            updates, scheduler.outbox = scheduler.outbox, []
            self._deliver(updates)

    def _rest(self) -> None:
        with self._wake:
            if not self._awake:
                self._wake.wait(IDLE_SECONDS)
            rested, self._awake = not self._awake, False
        if rested:
            self._close()

    def _close(self) -> None:
        """End the engines' threads, which otherwise poll for work for a while."""
        for scheduler in self._schedulers:
            scheduler.engine.close()

    def _recover(self) -> bool:
        """Whether the engines work again after a failure that ended the sequences in progress."""
        self._fail_all("the engine failed while it wrote this answer; other requests are not affected")
        try:
            for scheduler in self._schedulers:
                scheduler.engine.close()
                slot = scheduler.engine.acquire(1)
                scheduler.engine.decode([0], [slot])
                scheduler.engine.release(slot)
        except Exception:
            _log.exception("the engine could not be restarted")
            return False
        return True

    def _give_up(self, error: BaseException) -> None:
        self.dead = error
        self._fail_all("the engine failed and cannot go on")
        while self._jobs:
            self._jobs.popleft()[1].set_exception(failed("the engine failed and cannot go on"))
        self._died(error)

    def _fail_all(self, why: str) -> None:
        for scheduler in self._schedulers:
            scheduler.fail(failed(why))
            self._flush(scheduler)
