"""Random numbers of texts that are not equally far, against torch's own generator."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from engine_models import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from minitron.engine.base import DecodeEngine
from minitron.engine.cpu import picking
from minitron.engine.cpu.engine import CpuEngine
from minitron.engine.draws import Draws
from minitron.engine.model_weights import weights_of
from minitron.engine.mt19937 import exponentials, next_words, seeded, tempered
from minitron.engine.reference import ReferenceEngine
from minitron.engine.rules import Rules
from minitron.engine.text_draws import BatchDraws
from minitron.engine.texts import Texts
from minitron.sampling_parameters import SamplingParameters

V = 96
WEIGHTS = weights_of(tiny_model())
ENGINES = {"cpu": CpuEngine(WEIGHTS, 4), "reference": ReferenceEngine(WEIGHTS, 4)}


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 2000), min_size=1, max_size=6), seed=st.integers(0, 2**32 - 1))
def test_words_are_those_of_numpys_generator(counts: list[int], seed: int) -> None:
    oracle = np.random.RandomState(seed)
    for function in (next_words, picking.next_words):
        state = seeded(seed)
        oracle.seed(seed)
        for count in counts:
            out = np.empty(count, np.uint32)
            state = function(state, out)
            assert (tempered(out) == oracle.randint(0, 2**32, count, np.uint32)).all()
            assert 1 <= state.used <= 624


def exponentials_of_torch(seed: int, steps: int, rows: int) -> np.ndarray:
    """(steps, rows, V) fp32: what `torch.multinomial` divides by, for a batch at each step."""
    torch.manual_seed(seed)
    return np.stack([torch.empty(rows, V).exponential_().numpy() for _ in range(steps)])


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), seed=st.integers(0, 999))
def test_each_text_has_the_numbers_of_its_step(engine: str, rows: int, seed: int) -> None:
    pick = random.Random(seed)
    rules = Rules(LogitsProcessorList(), StoppingCriteriaList(), GenerationConfig(max_length=30, do_sample=True), rows)
    texts = Texts(torch.zeros(rows, 2, dtype=torch.long), [0] * rows, rules, None)
    expected = exponentials_of_torch(seed, 60, rows)
    torch.manual_seed(seed)
    numbers = BatchDraws(_draws(ENGINES[engine], rows), texts, ENGINES[engine], 4)
    while not texts.ended:
        asked = sorted(pick.sample(texts.running, pick.randint(1, len(texts.running))))
        steps = pick.randint(1, 4)
        begins = [texts.new(row) for row in asked]
        with numbers.of(asked, steps) as (together, each):
            for step in range(steps):
                for row, one, begin in zip(asked, each, begins, strict=True):
                    want = expected[begin + step, row]
                    assert together is not None
                    assert one is not None
                    for draws, at in ((together, row), (one, 0)):
                        draws.used = step * draws.per_step
                        first = draws.used + 2 * V * at
                        assert (exponentials(draws.words[first : first + 2 * V]) == want).all()
        for row in asked:
            if row in texts.running:
                texts.extend(row, [1] * pick.randint(0, steps))
        texts.complete()
    numbers.end(0)
    after = torch.rand(3)
    exponentials_of_torch(seed, texts.columns, rows)
    assert torch.equal(after, torch.rand(3))


def _draws(engine: DecodeEngine, rows: int) -> Draws:
    return engine.draws_of(SamplingParameters(temperature=1.0), [np.zeros(0, np.int64)] * rows)


def test_numbers_that_others_have_drawn_are_not_taken_back() -> None:
    rules = Rules(LogitsProcessorList(), StoppingCriteriaList(), GenerationConfig(max_length=3, do_sample=True), 2)
    texts = Texts(torch.zeros(2, 2, dtype=torch.long), [0, 0], rules, None)
    numbers = BatchDraws(_draws(ENGINES["reference"], 2), texts, ENGINES["reference"], 4)
    with numbers.of([0, 1], 1):
        pass
    torch.rand(1)
    state = torch.get_rng_state()
    for row in (0, 1):
        texts.extend(row, [1])
    texts.complete()
    numbers.end(1)
    assert torch.equal(torch.get_rng_state(), state)
