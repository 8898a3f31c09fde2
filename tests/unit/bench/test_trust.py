"""Measured speeds that should not be believed are found out."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from minitron.bench.trust import LoadMeter, below_prediction, describe_load, slower_though_smaller


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


def test_a_measurement_far_below_its_prediction() -> None:
    assert "9.6 tokens/s is 0.0045 of the predicted 2,130" in below_prediction(9.6, 2130)
    assert below_prediction(1500, 2130) == ""
    assert below_prediction(12920, 2130) == ""  # zeros are skipped, and a small model stays in the cache


def test_a_smaller_model_that_is_slower() -> None:
    assert "1,924 tokens/s is slower than teacher (5,116), though it reads 61%" in slower_though_smaller(
        1924, 5116, 61, 100, "teacher"
    )
    assert slower_though_smaller(5200, 5116, 61, 100) == ""
    assert slower_though_smaller(5100, 5116, 61, 100) == ""  # within noise
    assert slower_though_smaller(1924, 5116, 100, 100) == ""  # of the same size
