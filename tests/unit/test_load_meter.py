"""Other load on the machine during a measurement is noticed."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from minitron.load_meter import LoadMeter, describe_load


def test_a_free_machine_is_not_doubted() -> None:
    assert describe_load(wall=10, thread=9.9, process=19.8, busy=20, threads=2, cores=2) == ""
    assert describe_load(wall=10, thread=9.9, process=19.8, busy=0, threads=2, cores=2) == ""  # nobody tells
    assert describe_load(wall=10, thread=9.9, process=19.8, busy=619.8, threads=2, cores=64) == ""  # cores to spare


def test_cores_that_others_use_and_time_without_a_core_are_told() -> None:
    taken = describe_load(wall=10, thread=9.9, process=10, busy=20, threads=2, cores=2)
    assert taken == "other programs used 1.0 of 2 cores"
    starved = describe_load(wall=10, thread=4, process=5, busy=0, threads=1, cores=2)
    assert starved == "it had a core for 40% of the time"


def _burn(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="the system does not tell what its cores do")
def test_programs_that_run_at_the_same_time_are_noticed() -> None:
    others = [
        multiprocessing.get_context("spawn").Process(target=_burn, args=(20,)) for _ in range(os.cpu_count() or 1)
    ]
    for other in others:
        other.start()
    try:
        time.sleep(3)  # they start
        with LoadMeter(os.cpu_count() or 1) as load:
            _burn(1)
        assert load.reason
    finally:
        for other in others:
            other.kill()
            other.join()
