"""The generator's numbers against NumPy's Mersenne Twister and torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.engine.mt19937 import (
    WORDS,
    TwisterState,
    advanced,
    exponentials,
    from_bytes,
    next_block,
    seeded,
    tempered,
    to_bytes,
)
from minitron.engine.torch_generator import draws_alike, held


@pytest.mark.parametrize("seed", [0, 1, 5489, 2**32 - 1, 2**40 + 3, -1, -(2**63)])
def test_a_seed_gives_the_state_that_it_gives_torch(seed: int) -> None:
    ours, theirs = seeded(seed), torch.Generator().manual_seed(seed)
    assert ours == from_bytes(theirs.get_state().numpy())
    numpys = np.random.RandomState(seed & 0xFFFFFFFF)
    assert np.array_equal(ours.block, numpys.get_state()[1])
    words = np.concatenate([next_block(ours.block), next_block(next_block(ours.block))])
    assert np.array_equal(tempered(words), numpys.randint(0, 2**32, len(words), dtype=np.uint32))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 900), min_size=1, max_size=4))
def test_exponentials_and_states_are_those_of_torch(seed: int, counts: list[int]) -> None:
    generator, twister = torch.Generator().manual_seed(seed), seeded(seed)
    for count in counts:
        words = [twister.block]
        while len(words) * WORDS < twister.used + 2 * count:
            words.append(next_block(words[-1]))
        ours = exponentials(np.concatenate(words)[twister.used : twister.used + 2 * count])
        assert np.array_equal(ours, torch.empty(count).exponential_(generator=generator).numpy())
        twister = advanced(twister, 2 * count)
        state = generator.get_state()
        assert twister == from_bytes(state.numpy())
        again = torch.Generator().manual_seed(0).get_state()
        to_bytes(twister, again.numpy())
        other = torch.Generator()
        other.set_state(again)
        assert torch.equal(
            torch.rand(700, generator=other), torch.rand(700, generator=torch.Generator().set_state(state))
        )


def test_torchs_generator_goes_on_from_the_state_that_it_is_given() -> None:
    torch.manual_seed(3)
    torch.empty(1000).exponential_()
    expected = torch.rand(800)
    torch.manual_seed(3)
    with held() as twister:
        after = advanced(twister, 2000)
        twister.block, twister.used = after.block, after.used
    assert torch.equal(torch.rand(800), expected)
    torch.manual_seed(3)
    with held():
        pass
    assert torch.equal(torch.rand(9), torch.rand(9, generator=torch.Generator().manual_seed(3)))


def test_another_build_of_torch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert draws_alike()
    draws_alike.cache_clear()
    plain = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: plain(p.flip(-1), n, generator=generator))
    assert not draws_alike()
    draws_alike.cache_clear()


def test_states_that_differ_are_not_equal() -> None:
    assert seeded(1) == seeded(1)
    assert seeded(1) != seeded(2)
    assert seeded(1) != TwisterState(seeded(1).block, 3)
