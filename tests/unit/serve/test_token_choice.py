from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from minitron.engine.cpu.picking import pick
from minitron.finite import NotFiniteError
from minitron.sampling_parameters import SamplingParameters
from minitron.serve.token_choice import TokenChooser, TokenRules, logprobs_of

V = 50
COMPILED = SimpleNamespace(pick=pick)
PYTHON = SimpleNamespace(pick=lambda draws, logits: np.full(len(logits), -1))


def logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=V).astype(np.float32) * 3


def chooser(prompt=(1, 2), mask=None, penalties=(0.0, 0.0), bias=None, top=None, **parameters) -> TokenChooser:
    rules = TokenRules(SamplingParameters(**{"temperature": 0.0, **parameters}), *penalties, bias or {}, top)
    return TokenChooser(rules, prompt, V, mask)


class Allowed:
    ended = False

    def __init__(self, allowed: np.ndarray) -> None:
        self.taken: list[int] = []
        self._allowed = allowed

    def allowed(self):
        return self._allowed

    def accept(self, token: int) -> None:
        self.taken.append(token)


class OnlyEven(Allowed):
    def __init__(self) -> None:
        super().__init__(np.arange(V) % 2 == 0)


def test_log_probabilities_are_those_of_torch_in_float64() -> None:
    row = logits()
    found = logprobs_of(row, 7, 5)
    exact = torch.from_numpy(row).double().log_softmax(-1)
    best = exact.topk(5)
    assert found.logprob == pytest.approx(float(exact[7]), abs=1e-13)
    assert [token for token, _ in found.top] == best.indices.tolist()
    assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-13)
    assert logprobs_of(row, 7, 0).top == ()


@pytest.mark.parametrize("engine", [COMPILED, PYTHON])
@pytest.mark.parametrize("masked", [False, True])
def test_a_draw_is_that_of_torch_with_the_same_generator(engine, masked) -> None:
    one = chooser(temperature=0.7, seed=5, mask=OnlyEven() if masked else None)
    generator = torch.Generator().manual_seed(5)
    for step in range(200):
        row = logits(step)
        scores = np.where(np.arange(V) % 2 == 0, row, -np.inf) if masked else row
        p = (torch.from_numpy(scores).double() / 0.7).softmax(-1).float()
        assert one.choose(row, engine)[0] == int(torch.multinomial(p, 1, generator=generator))


def test_compiled_code_and_python_draw_the_same_tokens() -> None:
    """With every rule, in a mask that allows one token, some, or all but some."""
    chance = np.random.default_rng(0)
    for seed in range(150):
        allowed = chance.random(V) < chance.choice([0.02, 0.3, 0.97])
        allowed[chance.integers(V)] = True
        rules = {
            "temperature": float(chance.choice([0.3, 1.0, 2.0])),
            "top_k": int(chance.choice([0, 1, 5, V])),
            "top_p": float(chance.choice([1.0, 0.9, 0.3])),
            "min_p": float(chance.choice([0.0, 0.1])),
            "repetition_penalty": float(chance.choice([1.0, 1.4])),
        }
        made = {"bias": {3: 2.0}, "penalties": (0.3, 0.2), "seed": seed, **rules}
        pair = [chooser(mask=Allowed(allowed), **made) for _ in range(2)]
        for step in range(12):
            first, second = (
                one.choose(logits(step), engine)[0] for one, engine in zip(pair, (COMPILED, PYTHON), strict=True)
            )
            assert first == second, (seed, step, rules)
            assert allowed[first]


def test_other_choosers_change_nothing() -> None:
    alone = [chooser(temperature=1.0, seed=3).choose(logits(step), COMPILED)[0] for step in range(1)]
    first, second = chooser(temperature=1.0, seed=3), chooser(temperature=1.0, seed=4)
    second.choose(logits(9), COMPILED)
    torch.manual_seed(0)
    assert [first.choose(logits(0), COMPILED)[0]] == alone


def test_penalties_are_those_of_the_definition() -> None:
    """OpenAI: logits[j] -= count[j] * frequency + (count[j] > 0) * presence, over the answer's tokens."""
    one = chooser(penalties=(0.4, 0.3))
    counts: Counter[int] = Counter()
    for step in range(30):
        row = logits(step % 2)
        shaped = row - np.array([0.3 * counts[j] + 0.4 * (counts[j] > 0) for j in range(V)], np.float32)
        expected = int(shaped.argmax())
        assert one.choose(row, COMPILED)[0] == expected
        counts[expected] += 1
    assert len(counts) > 2


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    ids, one = [1, 2, 3], chooser(prompt=(1, 2, 3), repetition_penalty=1.5)
    processor = RepetitionPenaltyLogitsProcessor(1.5)
    for step in range(10):
        row = logits(step)
        expected = int(processor(torch.tensor([ids]), torch.from_numpy(row.copy())[None]).argmax())
        assert one.choose(row, COMPILED)[0] == expected
        ids.append(expected)


def test_bias_forbids_and_forces() -> None:
    row = logits()
    best = int(row.argmax())
    assert chooser(bias={best: -100.0}).choose(row, COMPILED)[0] != best
    assert chooser(bias={3: 100.0}, temperature=1.0).choose(row, COMPILED)[0] == 3
    assert row[3] == logits()[3]


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_mask_allows_only_its_tokens_and_hears_of_each(temperature) -> None:
    mask = OnlyEven()
    one = chooser(mask=mask, temperature=temperature, seed=1)
    found = [one.choose(logits(step), COMPILED)[0] for step in range(50)]
    assert not any(token % 2 for token in found)
    assert mask.taken == found


def test_nan_is_an_error() -> None:
    row = logits()
    row[5] = np.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(NotFiniteError):
            chooser(temperature=temperature).choose(row, COMPILED)


def test_a_plain_choice_is_one_of_arg_max_alone() -> None:
    assert chooser().plain
    for other in (
        chooser(temperature=0.5),
        chooser(bias={1: 1.0}),
        chooser(penalties=(0.1, 0.0)),
        chooser(top=0),
        chooser(repetition_penalty=1.1),
        chooser(mask=OnlyEven()),
    ):
        assert not other.plain
