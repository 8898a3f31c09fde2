"""Draws of a request: the tokens that `choose` draws with torch's generator, and whole texts as in the plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_models import some_tokens, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StoppingCriteria, StoppingCriteriaList

from minitron.engine import rules
from minitron.engine.draws import Draws
from minitron.engine.mt19937 import from_bytes, seeded
from minitron.engine.sampling import choose
from minitron.sampling_parameters import SamplingParameters

MANY = {
    "temperature": st.sampled_from([0.2, 0.8, 1.0, 1.7]),
    "top_k": st.sampled_from([0, 1, 3, 40]),
    "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.1]),
    "min_p": st.sampled_from([0.0, 0.05, 0.4]),
    "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
}


@settings(max_examples=150, deadline=None)
@given(st.builds(SamplingParameters, **MANY), st.integers(2, 300), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_tokens_are_those_drawn_with_torchs_generator(
    parameters: SamplingParameters, V: int, B: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    seen = [rng.integers(0, V, 4) for _ in range(B)]
    draws = Draws(parameters, V, seen, seeded(seed))
    torch.manual_seed(seed)
    for _ in range(5):
        logits = (2 * rng.standard_normal((B, V))).astype(np.float32)
        expected = choose(logits, parameters, seen).tolist()
        assert draws.choose(logits, range(B)) == expected
        seen = [np.append(*pair) for pair in zip(seen, expected, strict=True)]
        assert draws.state == from_bytes(torch.get_rng_state().numpy())


def test_steps_that_are_taken_back_are_drawn_again() -> None:
    draws = Draws(SamplingParameters(temperature=1.0), 300, [np.zeros(0, int)] * 2, seeded(1))
    logits, start = np.zeros((2, 300), np.float32), draws.state
    tokens = [draws.choose(logits, [0, 1]) for _ in range(7)]
    draws.state = start
    assert [draws.choose(logits, [0, 1]) for _ in range(5)] == tokens[:5]
    draws.rewind(2)
    assert [draws.choose(logits, [0, 1]) for _ in range(5)] == tokens[2:]


class After(StoppingCriteria):
    """Ends all texts after some tokens, or the first one alone."""

    def __init__(self, length: int, first: int = 1000) -> None:
        self.length, self.first = length, first

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        length = input_ids.shape[1]
        return torch.tensor([length >= self.length] * len(input_ids)) | torch.tensor(
            [length >= self.first and row == 0 for row in range(len(input_ids))]
        )


REQUESTS = {
    "plain": {},
    "top-p, penalty": {"top_p": 0.8, "top_k": 0, "repetition_penalty": 1.3},
    "all": {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 0.9},
    "greedy, penalty": {"do_sample": False, "repetition_penalty": 1.3},
    "ends": {"eos_token_id": [3, 5, 7, 11, 13, 17, 19, 23, 29]},
    "stopped": {"stopping_criteria": StoppingCriteriaList([After(19)])},
    "one stopped": {"stopping_criteria": StoppingCriteriaList([After(19, 12)]), "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("batch", [1, 3, 11])
@pytest.mark.parametrize("request_name", REQUESTS)
def test_texts_and_the_generator_are_those_of_the_plain_loop(
    request_name: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    ids = torch.tensor([some_tokens(5, seed=seed) for seed in range(batch)])
    how = {"max_new_tokens": 40, "do_sample": True, "pad_token_id": 0, **REQUESTS[request_name]}
    texts, after = [], []
    for alike in (True, False):  # False: tokens are chosen in Python
        monkeypatch.setattr(rules, "draws_alike", lambda alike=alike: alike)
        for seed in (1, 2):
            torch.manual_seed(seed)
            texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), **how).tolist())
            assert model.last_generation.engine == "cpu"
            after.append(torch.rand(5).tolist())
    assert texts[:2] == texts[2:]
    assert after[:2] == after[2:]
