"""The number of tokens to draft, against simulated models."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest

from minitron.engine.draft_length import DraftLength
from minitron.engine_hook import Speculation


def test_the_length_of_drafts_follows_what_is_kept_and_what_it_costs() -> None:
    def after(share: float, draft_seconds: float, step_seconds: float) -> int:
        rule = DraftLength(0.3)
        for _ in range(2):
            assert rule.next() == 0
            rule.saw(0, 0, 0.0, 1.0)
        for _ in range(25):
            k = rule.next()
            rule.saw(k, math.ceil(share * k), draft_seconds * k, step_seconds if k else 1.0)
        return rule.next()

    assert after(1.0, 0.0, 1.0) == 7  # free and always right
    assert after(0.0, 0.1, 1.2) == 0  # never right
    assert after(1.0, 1.0, 1.2) == 0  # as slow as the model
    assert 0 < after(0.5, 0.1, 1.2) < 7
    assert Speculation(10, 25, 20, 15).acceptance_rate == 0.75
    assert Speculation(10, 25, 20, 15).tokens_per_step == 2.5


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.87, 0.97])
@pytest.mark.parametrize("times", [(0.25, 0.25, 0.1), (0.0, 0.3, 0.02), (0.6, 0.3, 0.2), (0.05, 0.05, 0.3)], ids=str)
def test_the_length_of_drafts_is_nearly_the_best_one(rate: float, times: tuple[float, float, float]) -> None:
    before, each, verify = times  # seconds of the draft before its first token, of each token, and of checking it
    draws = random.Random(0)

    def step(k: int) -> tuple[int, float, float]:
        kept = next((i for i in range(k) if draws.random() > rate), k)
        return kept, before + each * k if k else 0.0, 1 + verify * k

    def tokens_per_second(choose: Callable[[], int], learn: Callable[[int, int, float, float], None]) -> float:
        tokens = seconds = 0.0
        for _ in range(400):
            k = choose()
            kept, drafting, checking = step(k)
            learn(k, kept, drafting, checking)
            tokens, seconds = tokens + kept + 1, seconds + drafting + checking
        return tokens / seconds

    fixed = [tokens_per_second(lambda k=k: k, lambda *_: None) for k in range(8)]
    rule = DraftLength(0.3)
    assert tokens_per_second(rule.next, rule.saw) >= 0.9 * max(fixed)


def _texts(rule: DraftLength, texts: int, cost: Callable[[int], float], rate: float) -> float:
    """Tokens per plain step's time in some texts of 64 tokens, where a step with k drafts takes `cost(k)` of it."""
    draws, tokens, seconds = random.Random(1), 0, 0.0
    for _ in range(texts):
        rule.begin()
        left = 64
        while left > 0:
            k = min(rule.next(left), left - 1)
            kept = next((i for i in range(k) if draws.random() > rate), k)
            took = cost(k) if k else 1.0
            rule.saw(k, kept, 0.0, took)
            tokens, seconds, left = tokens + kept + 1, seconds + took, left - kept - 1
    return tokens / seconds


def test_a_machine_where_drafts_do_not_pay_loses_two_hundredths_at_most() -> None:
    # As measured: checking two tokens is free or not, four take twice a step, a draft half a step.
    checks = ({1: 1.5, 2: 2.3, 3: 2.2, 4: 2.6, 5: 2.8, 6: 2.9, 7: 3.1}, {k: 1 + 0.3 * k for k in range(1, 8)})
    for verify, each, rate in itertools.product(checks, (0.5, 0.8), (0.0, 0.5, 0.9)):
        # A draft that pays only sometimes may gain.
        assert _texts(DraftLength(0.3), 20, lambda k, v=verify, e=each: v[k] + e * k, rate) >= 0.98
        assert _texts(DraftLength(0.3), 2, lambda k, v=verify, e=each: v[k] + e * k, rate) >= 0.96


def test_a_gain_that_is_small_or_in_short_drafts_only_is_found() -> None:
    short = {1: 0.95, 2: 1.8, 3: 1.85, 4: 2.1, 5: 2.5, 6: 2.8, 7: 3.0}
    assert _texts(DraftLength(0.3), 5, lambda k: short[k] + 0.35 * k, 0.95) > 1.35
    assert _texts(DraftLength(0.3), 5, lambda k: 1 + 0.35 * k, 0.95) > 1.5


def test_drafting_stops_when_it_has_lost_more_than_its_share() -> None:
    """One step in twenty takes far longer, which the expected times leave out as the work of other programs."""
    rule, count = DraftLength(0.3), itertools.count()

    def cost(k: int) -> float:
        return (k + 1) * (0.8 if next(count) % 20 < 19 else 30.0)

    assert _texts(rule, 200, cost, 1.0) >= 0.98
