from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from minitron.finite import NotFiniteError
from minitron.sampling_parameters import SamplingParameters
from minitron.serve.token_choice import TokenChooser, TokenRules, logprobs_of

V = 50


def logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=V).astype(np.float32) * 3


def chooser(prompt=(1, 2), mask=None, penalties=(0.0, 0.0), bias=None, top=None, **parameters) -> TokenChooser:
    rules = TokenRules(SamplingParameters(**{"temperature": 0.0, **parameters}), *penalties, bias or {}, top)
    return TokenChooser(rules, prompt, V, mask)


def test_log_probabilities_are_those_of_torch_in_float64() -> None:
    row = logits()
    found = logprobs_of(row, 7, 5)
    exact = torch.from_numpy(row).double().log_softmax(-1)
    best = exact.topk(5)
    assert found.logprob == pytest.approx(float(exact[7]), abs=1e-13)
    assert [token for token, _ in found.top] == best.indices.tolist()
    assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-13)
    assert logprobs_of(row, 7, 0).top == ()


def test_a_draw_is_that_of_torch_with_the_same_generator() -> None:
    one = chooser(temperature=0.7, seed=5)
    generator = torch.Generator().manual_seed(5)
    for step in range(20):
        row = logits(step)
        expected = torch.multinomial((torch.from_numpy(row).double() / 0.7).softmax(-1).float(), 1, generator=generator)
        assert one.choose(row)[0] == int(expected)


def test_other_choosers_change_nothing() -> None:
    alone = [chooser(temperature=1.0, seed=3).choose(logits(step))[0] for step in range(1)]
    first, second = chooser(temperature=1.0, seed=3), chooser(temperature=1.0, seed=4)
    second.choose(logits(9))
    torch.manual_seed(0)
    assert [first.choose(logits(0))[0]] == alone


def test_penalties_are_those_of_the_definition() -> None:
    """OpenAI: logits[j] -= count[j] * frequency + (count[j] > 0) * presence, over the answer's tokens."""
    one = chooser(penalties=(0.4, 0.3))
    counts: Counter[int] = Counter()
    for step in range(30):
        row = logits(step % 2)
        shaped = row - np.array([0.3 * counts[j] + 0.4 * (counts[j] > 0) for j in range(V)], np.float32)
        expected = int(shaped.argmax())
        assert one.choose(row)[0] == expected
        counts[expected] += 1
    assert len(counts) > 2


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    ids, one = [1, 2, 3], chooser(prompt=(1, 2, 3), repetition_penalty=1.5)
    processor = RepetitionPenaltyLogitsProcessor(1.5)
    for step in range(10):
        row = logits(step)
        expected = int(processor(torch.tensor([ids]), torch.from_numpy(row.copy())[None]).argmax())
        assert one.choose(row)[0] == expected
        ids.append(expected)


def test_bias_forbids_and_forces() -> None:
    row = logits()
    best = int(row.argmax())
    assert chooser(bias={best: -100.0}).choose(row)[0] != best
    assert chooser(bias={3: 100.0}, temperature=1.0).choose(row)[0] == 3
    assert row[3] == logits()[3]


class OnlyEven:
    ended = False

    def __init__(self) -> None:
        self.taken: list[int] = []

    def allowed(self):
        return np.arange(V) % 2 == 0

    def accept(self, token: int) -> None:
        self.taken.append(token)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_mask_allows_only_its_tokens_and_hears_of_each(temperature) -> None:
    mask = OnlyEven()
    one = chooser(mask=mask, temperature=temperature, seed=1)
    found = [one.choose(logits(step))[0] for step in range(50)]
    assert not any(token % 2 for token in found)
    assert mask.taken == found


def test_nan_is_an_error() -> None:
    row = logits()
    row[5] = np.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(NotFiniteError):
            chooser(temperature=temperature).choose(row)


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
