"""The number of tokens to draft, against simulated models."""

from __future__ import annotations

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
