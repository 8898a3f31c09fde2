"""Decode kernels against float64 formulas, over odd shapes, with guard zones around every output."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

gemv = pytest.importorskip("minitron.ops.gemv")

GUARD = np.float32(-12345.0)
DTYPES = ("bf16", "fp32")


def weights(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> np.ndarray:
    w = rng.standard_normal(shape).astype(np.float32)
    return w if dtype == "fp32" else torch.from_numpy(w).bfloat16().view(torch.int16).numpy().view(np.uint16)


def guarded(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """An output of zeros (rows, columns) and the larger array around it."""
    whole = np.full((rows + 2) * columns + 128, GUARD, np.float32)
    first = columns + 64
    out = whole[first : first + rows * columns].reshape(rows, columns)
    out[:] = 0
    return out, whole


def untouched(out: np.ndarray, whole: np.ndarray) -> bool:
    return bool((whole == GUARD).sum() == whole.size - out.size)


def hidden(rng: np.random.Generator, M: int, F: int, zeros: float) -> np.ndarray:
    """Pre-activations of which about `zeros` are negative."""
    h = np.abs(rng.standard_normal((M, F))).astype(np.float32)
    h[rng.random((M, F)) < zeros] *= -1
    return h


def lists(M: int, F: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((M, F), np.int32), np.zeros((M, -(-F // gemv.NEURON_BLOCK)), np.int32)


sizes = st.integers(1, 300)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(1, 8), sizes, sizes, st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_matvec(dtype: str, M: int, N: int, K: int, threads: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w, x = weights(rng, (N, K), dtype), rng.standard_normal((M, K)).astype(np.float32)
    out, whole = guarded(M, N)
    for thread in range(threads):
        gemv.matvec(w, x, out, 0, *gemv.share(N, gemv.ROW_BLOCK, thread, threads))
    bound = 1e-6 * (np.abs(x) @ np.abs(gemv.widen_reference(w)).T) + 1e-6
    assert (np.abs(out - gemv.matvec_reference(w, x)) <= bound).all()
    assert untouched(out, whole)
    alone, _ = guarded(1, N)
    gemv.matvec(w, x[-1:], alone, 0, 0, N)
    assert (alone[0] == out[-1]).all(), "a vector's result depends on its company or on the threads"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 8),
    st.integers(1, 600),
    sizes,
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)
def test_down_with_zeros(dtype: str, M: int, F: int, D: int, zeros: float, threads: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w_t, h = weights(rng, (F, D), dtype), hidden(rng, M, F, zeros)
    expected_h = gemv.squared_relu_reference(h)
    active, counts = lists(M, F)
    for thread in range(threads):
        gemv.squared_relu_lists(h, active, counts, *gemv.share(F, gemv.NEURON_BLOCK, thread, threads))
    assert (h == expected_h).all()
    assert counts.sum() == (h != 0).sum()
    out, whole = guarded(M, D)
    for thread in range(threads):
        gemv.down(w_t, h, active, counts, out, *gemv.share(D, 32, thread, threads))
    bound = 2e-6 * (h @ np.abs(gemv.widen_reference(w_t))) + 1e-6
    assert (np.abs(out - gemv.down_reference(w_t, h)) <= bound).all()
    assert untouched(out, whole)
    alone, _ = guarded(1, D)
    gemv.down(w_t, h[-1:], active[-1:], counts[-1:], alone, 0, D)
    assert (alone[0] == out[-1]).all(), "a vector's result depends on its company or on the threads"


def test_rows_of_inactive_neurons_are_not_read() -> None:
    rng = np.random.default_rng(0)
    w_t, h = weights(rng, (256, 64), "fp32"), hidden(rng, 1, 256, 0.7)
    w_t[h[0] <= 0] = np.nan
    active, counts = lists(1, 256)
    gemv.squared_relu_lists(h, active, counts, 0, 256)
    out, _ = guarded(1, 64)
    gemv.down(w_t, h, active, counts, out, 0, 64)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_activation_is_not_hidden(bad: float) -> None:
    h = np.full((1, 8), -1, np.float32)
    h[0, 3] = bad
    active, counts = lists(1, 8)
    gemv.squared_relu_lists(h, active, counts, 0, 8)
    out, _ = guarded(1, 4)
    gemv.down(np.ones((8, 4), np.float32), h, active, counts, out, 0, 4)
    assert not np.isfinite(out).any()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_rounding_to_bf16_is_torchs(bits: int) -> None:
    value = np.array([bits], np.uint32).view(np.float32)
    expected = torch.from_numpy(value.copy()).bfloat16()
    found = torch.from_numpy(np.array([gemv.bf16_of_float(value[0])], np.uint16).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(found.isnan(), expected.isnan())
    assert found.isnan().any() or torch.equal(found, expected)


def test_exponential() -> None:
    x = -np.concatenate([np.linspace(0, 87, 5000), 10.0 ** np.linspace(-30, 0, 200)]).astype(np.float32)
    found = np.array([gemv.exp_of(value) for value in x], np.float64)
    assert np.allclose(found, np.exp(x.astype(np.float64)), rtol=2e-7, atol=0)
    assert gemv.exp_of(np.float32(-np.inf)) < 1e-37


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(DTYPES), sizes, sizes, st.integers(0, 2**32 - 1))
def test_add_all_rows(dtype: str, S: int, H: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w, scales = weights(rng, (S, H), dtype), rng.random(S, np.float32)
    out, whole = guarded(1, H)
    gemv.add_all_rows(w, scales, out[0])
    bound = 1e-6 * (scales @ np.abs(gemv.widen_reference(w))) + 1e-6
    assert (np.abs(out[0] - scales.astype(np.float64) @ gemv.widen_reference(w)) <= bound).all()
    assert untouched(out, whole)


@given(st.integers(0, 10_000), st.sampled_from([1, 4, 32, 128]), st.integers(1, 70))
@settings(deadline=None)
def test_shares_cover_everything_once(total: int, unit: int, threads: int) -> None:
    shares = [gemv.share(total, unit, thread, threads) for thread in range(threads)]
    assert shares[0][0] == 0
    assert shares[-1][1] == total
    for (_, end), (begin, _) in itertools.pairwise(shares):
        assert begin == end
        assert begin % unit == 0 or begin == total
