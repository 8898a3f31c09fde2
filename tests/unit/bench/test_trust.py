"""Measured speeds that should not be believed are found out."""

from __future__ import annotations

from minitron.bench.trust import below_prediction, slower_though_smaller


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
