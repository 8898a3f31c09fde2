"""Rotary embedding is a rotation, of positions relative to each other, of the leading channels only."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.ops.rope import apply_rotary, rotary_frequencies

widths = st.sampled_from([2, 4, 8, 16])


def tables(positions: torch.Tensor, width: int, theta: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions[..., None].double() * rotary_frequencies(width, theta).double()
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


@settings(max_examples=40, deadline=None)
@given(width=widths, rest=st.integers(0, 5), seed=st.integers(0, 2**31), start=st.integers(0, 5000))
def test_norms_are_kept_and_other_channels_untouched(width: int, rest: int, seed: int, start: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 5, 3, width + rest, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 5, 1, width + rest, generator=generator, dtype=torch.float64)
    cos, sin = tables(start + torch.arange(5)[None], width)
    for before, after in zip((q, k), apply_rotary(q, k, cos, sin), strict=True):
        assert after.shape == before.shape
        assert torch.equal(after[..., width:], before[..., width:])
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
        pairs = lambda x: torch.stack((x[..., : width // 2], x[..., width // 2 : width]))  # noqa: E731
        torch.testing.assert_close(pairs(after).norm(dim=0), pairs(before).norm(dim=0))


@settings(max_examples=40, deadline=None)
@given(width=widths, seed=st.integers(0, 2**31), shift=st.integers(0, 3000))
def test_scores_depend_on_the_distance_only(width: int, seed: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 6, 1, width + 2, generator=generator, dtype=torch.float64)
    scores = []
    for start in (0, shift):
        a, b = apply_rotary(q, k, *tables(start + torch.arange(6)[None], width))
        scores.append(torch.einsum("bqnh,bknh->bqk", a, b))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-9, atol=1e-9)


def test_position_zero_turns_nothing_and_a_pair_turns_by_its_angle() -> None:
    x = torch.zeros(1, 1, 1, 6, dtype=torch.float64)
    x[..., 0] = 1.0  # its partner is channel 2, half the rotated width away
    assert torch.equal(apply_rotary(x, x, *tables(torch.zeros(1, 1), 4))[0], x)
    turned = apply_rotary(x, x, *tables(torch.ones(1, 1), 4))[0].flatten()
    expected = torch.tensor([math.cos(1), 0, math.sin(1), 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(turned, expected)


@settings(max_examples=20, deadline=None)
@given(width=st.integers(1, 32), theta=st.floats(10, 1e6))
def test_frequencies_are_the_powers_of_the_base(width: int, theta: float) -> None:
    frequencies = rotary_frequencies(width, theta)
    assert frequencies.dtype == torch.float32
    expected = [theta ** (-2 * i / width) for i in range(-(-width // 2))]
    torch.testing.assert_close(frequencies.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


def test_no_width_at_all() -> None:
    assert rotary_frequencies(0, 10000.0).shape == (0,)
    q = torch.randn(1, 2, 1, 4)
    empty = torch.zeros(1, 2, 0)
    assert all(torch.equal(x, q) for x in apply_rotary(q, q, empty, empty))


def test_gradients_are_rotated_back() -> None:
    q = torch.randn(1, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = tables(torch.arange(3)[None], 4)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, x, cos, sin), (q,))
