"""The compiled choice of a token against `Draws`, which is NumPy, and against exact probabilities."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.engine.cpu import choice
from minitron.engine.draws import Draws
from minitron.engine.mt19937 import seeded
from minitron.engine.sampling import distribution
from minitron.sampling_parameters import SamplingParameters

MANY = {
    "temperature": st.sampled_from([0.0, 0.2, 0.8, 1.0, 1.7]),
    "top_k": st.sampled_from([0, 1, 3, 40]),
    "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.1]),
    "min_p": st.sampled_from([0.0, 0.05, 0.4]),
    "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
}
LANES = np.zeros(16, np.float32)


def step(draws: Draws, logits: np.ndarray, threads: int = 1) -> tuple[list[int], int]:
    """The tokens that compiled code chooses for all rows, and how many it left to NumPy."""
    table, rows = np.zeros(choice.COLUMNS, np.int64), range(len(logits))
    tokens, logits = np.zeros(len(logits), np.int64), logits.copy()
    choice.fill(table, draws, threads, rows)
    choice.prepare(table)
    for thread in range(threads):
        choice.draw_rows(thread, threads, table, logits, len(logits), LANES, tokens)
    left = int((tokens == choice.UNDECIDED).sum())
    table[choice.LEFT_OPEN] = left > 0
    if not left:
        table[choice.USED] += table[choice.PER_STEP]
    choice.finish(table, draws, rows, tokens, logits)
    return tokens.tolist(), left


@settings(max_examples=300, deadline=None)
@given(
    st.builds(SamplingParameters, **MANY),
    st.integers(1, 500),
    st.sampled_from([0.05, 1.0, 4.0, 20.0]),
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
def test_tokens_are_those_of_numpy(
    parameters: SamplingParameters, V: int, spread: float, rounded: bool, threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    B = int(rng.integers(1, 4))
    seen = [rng.integers(0, V, 4) for _ in range(B)]
    ours, numpys = (Draws(parameters, V, seen, seeded(seed)) for _ in range(2))
    for _ in range(5):
        logits = (spread * rng.standard_normal((B, V))).astype(np.float32)
        if rounded:  # many tokens tie
            logits = np.round(logits)
        assert step(ours, logits, threads)[0] == numpys.choose(logits, range(B))
        assert ours.state == numpys.state


def test_numpy_is_hardly_ever_asked_and_draws_have_the_exact_probabilities() -> None:
    rng, V, count = np.random.default_rng(0), 40, 4000
    logits = (1.5 * rng.standard_normal(V)).astype(np.float32)
    for parameters in (
        SamplingParameters(temperature=0.9),
        SamplingParameters(temperature=1.2, top_k=12),
        SamplingParameters(temperature=1.0, top_p=0.8),
        SamplingParameters(temperature=1.0, top_k=20, top_p=0.9, min_p=0.05),
    ):
        draws, left, found = Draws(parameters, V, [np.zeros(0, int)], seeded(4)), 0, np.zeros(V)
        for _ in range(count):
            tokens, undecided = step(draws, logits[None])
            found[tokens[0]] += 1
            left += undecided
        expected = count * distribution(logits, parameters, np.zeros(0, int))
        assert left <= 2
        assert (found[expected == 0] == 0).all()
        likely = expected >= 5
        statistic = ((found - expected)[likely] ** 2 / expected[likely]).sum()
        assert statistic < likely.sum() + 4 * (2 * likely.sum()) ** 0.5


def test_large_vocabularies() -> None:
    rng, V = np.random.default_rng(1), 50_003
    for parameters in (
        SamplingParameters(temperature=1.0),
        SamplingParameters(temperature=0.7, top_k=50, top_p=0.9),
        SamplingParameters(temperature=1.0, top_p=0.95, repetition_penalty=1.2),
    ):
        ours, numpys = (Draws(parameters, V, [rng.integers(0, V, 9) * 0 + 7], seeded(2)) for _ in range(2))
        for spread in (0.1, 3.0):
            logits = (spread * rng.standard_normal((1, V))).astype(np.float32)
            assert step(ours, logits)[0] == numpys.choose(logits, [0])


def test_logits_that_are_not_finite_are_left_to_numpy() -> None:
    for bad in (np.nan, np.inf):
        draws = Draws(SamplingParameters(temperature=1.0, top_k=2, top_p=0.5), 40, [np.zeros(0, int)], seeded(0))
        table, tokens = np.zeros(choice.COLUMNS, np.int64), np.zeros(1, np.int64)
        logits = np.zeros((1, 40), np.float32)
        logits[0, :] = bad
        choice.fill(table, draws, 1, [0])
        choice.prepare(table)
        choice.draw_rows(0, 1, table, logits, 1, LANES, tokens)
        assert tokens[0] == choice.UNDECIDED
