"""What speculation does with its measured times: a scripted model and draft, and a clock that they set."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from minitron.engine import speculate
from minitron.engine.base import DecodeEngine
from minitron.engine.draft_length import DraftLengths
from minitron.engine.drafts import Proposal
from minitron.engine.rules import Rules
from minitron.engine.texts import Texts
from minitron.engine_hook import Speculation


def token(row: int, position: int) -> int:
    """The right one."""
    return (31 * row + 7 * position) % 50


class ScriptedEngine(DecodeEngine):
    """Knows its texts; a step takes 1 + `each` seconds more for each further token."""

    name = "scripted"

    def __init__(self, clock: Any, rows: int, each: float) -> None:
        self.clock, self.each = clock, each
        self.kv: Any = SimpleNamespace(lengths=[0] * rows)

    def seconds(self, tokens: int) -> float:
        return 1 + self.each * (tokens - 1)

    def prefill(self, tokens: list[int], slot: int = 0, more: bool = False) -> None:
        self.kv.lengths[slot] += len(tokens)

    def greedy(
        self, tokens: list[int], count: int, stops: Collection[int] = (), slots: Sequence[int] = (0,)
    ) -> list[list[int]]:
        self.clock.now += count * self.seconds(len(slots))
        found = [[token(slot, self.kv.lengths[slot] + 1 + step) for slot in slots] for step in range(count)]
        for slot in slots:
            self.kv.lengths[slot] += count
        return found

    def verify(self, groups: Any, slots: Sequence[int] = (0,), draws: Any = (None,)) -> list[list[int]]:
        total, found = sum(map(len, groups)), []
        assert total <= self.most_rows
        self.clock.now += self.seconds(total)
        for group, slot in zip(groups, slots, strict=True):
            right = [token(slot, self.kv.lengths[slot] + 1 + at) for at in range(len(group))]
            wrong = next((at for at, drafted in enumerate(group[1:]) if drafted != right[at]), len(group) - 1)
            found.append(right[: wrong + 1])
            self.kv.lengths[slot] += wrong + 1
        return found


class ScriptedDraft:
    """Proposes the right token of a text with its rate; a drafted token takes the share `cost` of a step."""

    setup_seconds = 0.0

    def __init__(
        self, engine: ScriptedEngine, rates: Sequence[float], cost: float, silent: Collection[int] = ()
    ) -> None:
        self.engine, self.rates, self.cost, self.silent = engine, rates, cost, silent
        self.random = random.Random(0)
        self.asked: list[list[int]] = []

    def prepare(self, texts: Any, rows: Sequence[int] = (0,)) -> None:
        pass

    def propose(
        self, texts: Sequence[list[int]], count: int, draws: object = None, rows: Sequence[int] = (0,)
    ) -> list[Proposal]:
        self.engine.clock.now += count * self.cost * self.engine.seconds(len(rows))
        self.asked.append(list(rows))
        proposals = []
        for text, row in zip(texts, rows, strict=True):
            right = [token(row, len(text) + at) for at in range(count)]
            guessed = [one if self.random.random() < self.rates[row] else one + 1 for one in right]
            proposals.append(Proposal([] if row in self.silent else guessed))
        return proposals


def decoded(
    draft: ScriptedDraft, lengths: DraftLengths, new_tokens: int = 64, most: int = 7
) -> tuple[float, Speculation, torch.Tensor]:
    """The seconds of plain decoding over those with drafts, what was found, and the texts."""
    engine = draft.engine
    rows = len(engine.kv.lengths)
    engine.kv.lengths[:] = [0] * rows
    config = GenerationConfig(max_length=3 + new_tokens, do_sample=False)
    rules = Rules(LogitsProcessorList(), StoppingCriteriaList(), config, rows)
    prompts = torch.tensor([[token(row, position) for position in range(3)] for row in range(rows)])
    speculator = speculate.Speculator(engine, draft, Texts(prompts, [0] * rows, rules, None), rules, lengths, most)
    begin = engine.clock.now
    ids = speculator.run()
    assert ids.tolist() == [[token(row, position) for position in range(3 + new_tokens)] for row in range(rows)]
    return new_tokens * engine.seconds(rows) / (engine.clock.now - begin), speculator.found, ids


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(speculate, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


ROWS = (1, 2, 3, 5, 8, 16)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("each", [0.02, 0.25, 0.6])
def test_a_batch_is_hardly_ever_slower_than_without_drafts(clock: Any, rows: int, each: float) -> None:
    for cost, rate in itertools.product((0.0, 0.3, 0.8), ((0.0,), (0.5,), (0.9,), (0.95, 0.0), (0.9, 0.5, 0.7))):
        rates = [rate[row % len(rate)] for row in range(rows)]
        draft = ScriptedDraft(ScriptedEngine(clock, rows, each), rates, cost)
        lengths = DraftLengths(0.3)
        gains = [decoded(draft, lengths)[0] for _ in range(8)]
        print(rows, each, cost, rate, [round(gain, 2) for gain in gains])
        assert min(gains) >= 0.95, (cost, rate, gains)
        assert 8 / sum(1 / gain for gain in gains) >= 0.975, (cost, rate, gains)


@pytest.mark.parametrize("rows", ROWS)
def test_a_batch_gains_where_checking_is_cheap(clock: Any, rows: int) -> None:
    lengths = DraftLengths(0.3)
    draft = ScriptedDraft(ScriptedEngine(clock, rows, 0.01), [0.9] * rows, 0.1)
    gains = [decoded(draft, lengths)[0] for _ in range(4)]
    # As many tokens as fit into a step of 32, each accepted with this rate.
    most = min(7, 32 // rows - 1)
    best = sum(0.9**k for k in range(most + 1)) / (1 + 0.1 * most + 0.01 * rows * most / (1 + 0.01 * (rows - 1)))
    print(rows, gains, best)
    assert gains[-1] >= 0.7 * best


def test_each_number_of_texts_has_its_own_rule(clock: Any) -> None:
    """Checking pays for one text and not for eight, in turn on the same rules."""
    lengths = DraftLengths(0.3)
    for _ in range(3):
        for rows in (1, 8):
            draft = ScriptedDraft(ScriptedEngine(clock, rows, 0.2), [0.8] * rows, 0.1)
            gain, found, _ = decoded(draft, lengths, new_tokens=100)
    assert found.drafted < 0.1 * found.tokens
    assert gain >= 0.97
    gain, found, _ = decoded(ScriptedDraft(ScriptedEngine(clock, 1, 0.2), [0.8], 0.1), lengths, new_tokens=100)
    assert found.drafted > found.tokens / 2
    assert gain > 1.2


def test_texts_without_drafts_take_part_in_the_step_of_the_others(clock: Any) -> None:
    draft = ScriptedDraft(ScriptedEngine(clock, 3, 0.01), [1.0, 1.0, 1.0], 0.0, silent={1})
    _, found, _ = decoded(draft, DraftLengths(0.3), new_tokens=40)
    assert found.kept == found.drafted > 20
    assert found.tokens == 120
    assert found.tokens == found.steps + found.kept
    assert [0, 1, 2] in draft.asked
    assert draft.asked[-1] in ([1], [0, 1], [1, 2], [0, 1, 2])


def test_a_draft_that_proposes_nothing_costs_nothing_but_its_time(clock: Any) -> None:
    draft = ScriptedDraft(ScriptedEngine(clock, 4, 0.1), [1.0] * 4, 0.0, silent=range(4))
    gain, found, _ = decoded(draft, DraftLengths(0.3))
    assert found.drafted == 0
    assert gain == pytest.approx(1)
    assert draft.asked


@pytest.mark.parametrize("most", [1, 2, 7])
def test_no_step_has_more_tokens_than_asked_for(clock: Any, most: int) -> None:
    counts: list[int] = []

    class Counted(ScriptedDraft):
        def propose(self, texts: Any, count: int, *rest: Any) -> list[Proposal]:
            counts.append(count)
            return super().propose(texts, count, *rest)

    for rows in (1, 4, 13):
        decoded(Counted(ScriptedEngine(clock, rows, 0.001), [1.0] * rows, 0.0), DraftLengths(0.0), 50, most)
        assert 0 < max(counts) <= min(most, 32 // rows - 1)
        counts.clear()


class SlowFirstCheck(ScriptedEngine):
    """Its first check takes twice as long, as the first one of a process does."""

    checks = 0

    def verify(self, groups: Any, slots: Sequence[int] = (0,), draws: Any = (None,)) -> list[list[int]]:
        self.checks += 1
        if self.checks == 1:
            self.clock.now += self.seconds(sum(map(len, groups)))
        return super().verify(groups, slots, draws)


def test_a_slow_first_check_does_not_decide_against_a_draft(clock: Any) -> None:
    """It did: a draft that takes long to set up was then never tried again."""
    draft = ScriptedDraft(SlowFirstCheck(clock, 1, 0.05), [0.95], 0.3)
    draft.setup_seconds = 20.0
    lengths = DraftLengths(0.3)
    gains = [decoded(draft, lengths, new_tokens=200) for _ in range(3)]
    assert gains[0][0] >= 0.97  # what the checks cost
    assert gains[-1][1].kept > 100
    assert gains[-1][0] > 1.2


def test_a_draft_that_never_pays_is_not_set_up(clock: Any) -> None:
    draft = ScriptedDraft(SlowFirstCheck(clock, 1, 0.6), [0.95], 0.6)
    draft.setup_seconds = 20.0
    lengths = DraftLengths(0.6)
    for _ in range(6):
        gain, found, _ = decoded(draft, lengths, new_tokens=200)
        assert gain >= 0.97
        assert found.drafted == 0
