"""The choice of tokens in torch against the same rules in NumPy, and its random numbers against their distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.engine.cuda.sampling import DeviceDraws, choice_of, choose, exponentials, kept_tokens
from minitron.engine.sampling import distribution
from minitron.sampling_parameters import SamplingParameters

MANY = {
    "temperature": st.sampled_from([0.2, 0.8, 1.0, 1.7]),
    "top_k": st.sampled_from([0, 1, 3, 40]),
    "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.1]),
    "min_p": st.sampled_from([0.0, 0.05, 0.4]),
}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.builds(SamplingParameters, **MANY), min_size=1, max_size=3),
    st.integers(1, 300),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_distributions_are_those_of_numpy(
    parameters: list[SamplingParameters], V: int, rounded: bool, seed: int
) -> None:
    logits = (4 * np.random.default_rng(seed).standard_normal((len(parameters), V))).astype(np.float32)
    if rounded:  # many tokens tie
        logits = np.round(logits)
    ids, p = kept_tokens(torch.from_numpy(logits), choice_of(parameters, [0] * len(parameters), V, "cpu"))
    found = torch.zeros(len(parameters), V, dtype=torch.float64).scatter_(1, ids.expand_as(p), p)
    found /= found.sum(-1, keepdim=True)
    for row, own, one in zip(logits, found, parameters, strict=True):
        np.testing.assert_allclose(own.numpy(), distribution(row, one, np.zeros(0, int)), atol=1e-12)


def test_tokens_follow_their_distribution() -> None:
    torch.manual_seed(0)
    logits, count, parameters = torch.randn(1, 12), 40_000, SamplingParameters(temperature=0.9, top_p=0.9)
    rows = choice_of([parameters] * count, range(count), 12, "cpu")
    p = torch.from_numpy(distribution(logits[0].numpy(), parameters, np.zeros(0, int)))
    drawn = {
        "seeds": choose(logits.expand(count, -1), torch.zeros(count, dtype=torch.long), rows),
        "positions": choose(
            logits.expand(count, -1), torch.arange(count), choice_of([parameters] * count, [5] * count, 12, "cpu")
        ),
    }
    for tokens in drawn.values():
        counts = torch.bincount(tokens, minlength=12).double()
        assert counts[p == 0].sum() == 0
        expected = count * p[p > 0]
        assert ((counts[p > 0] - expected).square() / expected).sum() < 35  # 11 degrees of freedom: p = 2e-4
    assert len(drawn["seeds"].unique()) > 5


def test_random_numbers_are_exponential_and_independent() -> None:
    seeds, positions = torch.arange(300)[:, None], torch.arange(7)[:, None]
    numbers = exponentials(seeds[:, :, None], positions, torch.arange(100))
    assert numbers.shape == (300, 7, 100)
    assert numbers.min() > 0
    assert numbers.unique().numel() == numbers.numel()
    u = (-numbers).exp().flatten().sort().values
    # Kolmogorov-Smirnov: more than 1.95 / sqrt(n) would be seen once in a thousand times.
    assert (u - (torch.arange(len(u)) + 0.5) / len(u)).abs().max() < 1.95 / len(u) ** 0.5
    for axis in range(3):
        moved = numbers.roll(1, axis)
        assert torch.corrcoef(torch.stack([numbers.flatten(), moved.flatten()]))[0, 1].abs() < 0.01


def test_temperature_zero_takes_the_first_of_the_most_probable_beside_rows_that_draw() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]]).repeat(2, 1)
    parameters = [SamplingParameters(temperature=0.0), SamplingParameters(temperature=5.0, top_k=3)]
    for position in range(20):
        tokens = choose(logits, torch.full((2,), position), choice_of(parameters, [1, position], 4, "cpu"))
        assert tokens[0] == 1
        assert tokens[1] != 0


def draws(penalty: float = 1.0, texts: int = 1, seed: int = 3) -> DeviceDraws:
    parameters = SamplingParameters(temperature=1.0, repetition_penalty=penalty)
    return DeviceDraws(parameters, 50, [np.array([row, 7]) for row in range(texts)], seed, torch.device("cpu"))


@pytest.mark.parametrize("penalty", [1.0, 1.8])
def test_tokens_that_are_checked_are_those_that_are_drawn(penalty: float) -> None:
    torch.manual_seed(1)
    # The same few tokens are likely at each position, so the penalty decides.
    logits, positions = (4 * torch.randn(1, 50)).repeat(6, 1), torch.arange(10, 16)
    one, group = draws(penalty), [7]
    for row, position in zip(logits, positions, strict=True):
        group += one.next_tokens(row[None], position[None], torch.zeros(1, dtype=torch.long)).tolist()
    assert draws(penalty).after(logits, positions, group[:-1]).tolist() == group[1:]


def test_the_penalty_counts_what_was_seen_and_what_was_chosen() -> None:
    logits = torch.full((1, 50), -2.0)
    logits[0, 7], logits[0, 9] = 4.0, 3.0
    one, rows = draws(penalty=1e3), torch.zeros(1, dtype=torch.long)
    one.parameters = SamplingParameters()
    table = choice_of([SamplingParameters(temperature=0.0, repetition_penalty=2.0)], [0], 50, "cpu")
    assert choose(logits, torch.zeros(1, dtype=torch.long), table, one._seen).tolist() == [9]
    assert one.next_tokens(logits * 30, torch.tensor([1]), rows).tolist() == [9]
    assert one._seen is not None
    assert one._seen[0].nonzero().flatten().tolist() == [0, 7, 9]
    one.see([np.array([1])])
    one.join([2, 3])
    assert one._seen[0].nonzero().flatten().tolist() == [1, 2, 3]


def test_texts_of_a_batch_have_numbers_of_their_own() -> None:
    logits, rows = torch.zeros(4, 50), torch.arange(4)
    tokens = [draws(texts=4).next_tokens(logits, torch.full((4,), at), rows).tolist() for at in range(8)]
    assert len({tuple(column) for column in zip(*tokens, strict=True)}) == 4
    # A row's numbers do not depend on which rows are beside it.
    assert [draws(texts=4).next_tokens(logits[:1], torch.tensor([at]), rows[2:3]).item() for at in range(8)] == [
        row[2] for row in tokens
    ]
