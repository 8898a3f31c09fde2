"""Threads that spin for each other are kept on different processors."""

from __future__ import annotations

import os
import threading

import pytest

from minitron.engine.cpu import placement

linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not place threads")


@linux
def test_the_processor_of_a_thread_is_one_that_it_may_run_on() -> None:
    assert placement.processor_of(threading.get_native_id()) in os.sched_getaffinity(0)
    assert placement.processor_of(2**30) is None


@linux
def test_a_thread_leaves_the_processor_of_another_and_keeps_its_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) == 1:
        pytest.skip("one processor")
    me, asked = threading.get_native_id(), []
    where = min(allowed)
    monkeypatch.setattr(placement, "processor_of", lambda thread: where)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, processors: asked.append(set(processors)))
    placement.keep_apart([me + 1])
    assert asked == [allowed - {where}, allowed]
    monkeypatch.setattr(placement, "processor_of", lambda thread: where if thread == me else max(allowed))
    placement.keep_apart([me + 1])
    monkeypatch.setattr(placement, "processor_of", lambda thread: None)
    placement.keep_apart([me + 1])
    assert len(asked) == 2


@linux
def test_nothing_happens_where_it_is_not_allowed_or_no_processor_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "processor_of", lambda thread: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    placement.keep_apart([1])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})

    def refuse(pid: int, processors: set[int]) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    placement.keep_apart([1])
    monkeypatch.delattr(os, "sched_setaffinity")
    placement.keep_apart([1])
