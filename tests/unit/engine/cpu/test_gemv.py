"""Decode kernels against float64 formulas, over odd shapes, with guard zones around every output."""

from __future__ import annotations

import itertools

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron import NemotronConfig
from minitron.engine.cpu import formats, gemv, tiles
from minitron.engine.matrix import FORMATS, Matrix
from minitron.engine.quantize import quantize
from minitron.presets import PRESETS

GUARD = np.float32(-12345.0)
DTYPES = ("bf16", "fp32")


def widths_of(preset: str) -> set[int]:
    """Columns of a published model's matrices."""
    config = NemotronConfig.preset(preset)
    return {config.hidden_size, config.num_attention_heads * config.head_dim, config.head_dim}  # type: ignore[operator]


WIDTHS = sorted({width for name in PRESETS for width in widths_of(name)})


def weights(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> np.ndarray:
    w = rng.standard_normal(shape).astype(np.float32)
    return w if dtype == "fp32" else torch.from_numpy(w).bfloat16().view(torch.int16).numpy().view(np.uint16)


def packed(rng: np.random.Generator, shape: tuple[int, int], format: str) -> Matrix:
    """Weights of which a few are zeros or far from the others."""
    w = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    w[torch.from_numpy(rng.random(shape)) < 0.02] *= 2.0**-20
    w[torch.from_numpy(rng.random(shape)) < 0.02] = 0.0
    return quantize(w, format)  # type: ignore[arg-type]


def arrays(matrix: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """A matrix as the kernels read it."""
    data = matrix.data.view(torch.int16) if matrix.data.dtype == torch.bfloat16 else matrix.data
    extras = gemv.NONE if matrix.extras is None else matrix.extras.numpy()
    return data.numpy().view(formats.KINDS[matrix.format]), extras


def exact(matrix: Matrix) -> np.ndarray:
    return matrix.dense(torch.float64).numpy()


def allowed(matrix: Matrix, x: np.ndarray) -> np.ndarray:
    """Errors (M, N) of fp32 sums, and for int8 and int4 of vectors rounded to 16 bits, half a step each."""
    size = np.abs(exact(matrix))
    bound = 3e-6 * (np.abs(x) @ size.T) + 1e-6
    if matrix.format in ("int8", "int4"):
        bound += np.abs(x).max(axis=1)[:, None] / 32767 * 0.5001 * size.sum(axis=1)
    return bound


def scratch(M: int, K: int) -> np.ndarray:
    return np.zeros((M, -(-K // 64) * formats.STAGED_BLOCK), np.float32)


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


sizes = st.integers(1, 300)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 8), sizes, sizes, st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_matvec(format: str, M: int, N: int, K: int, threads: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, x = packed(rng, (N, K), format), rng.standard_normal((M, K)).astype(np.float32)
    w, extras = arrays(matrix)
    out, whole = guarded(M, N)
    staged, whole_staged = guarded(*scratch(M, K).shape)
    for thread in range(threads):
        gemv.matvec(w, extras, x, staged, out, 0, *gemv.share(N, gemv.ROW_BLOCK, thread, threads))
    assert (np.abs(out - x.astype(np.float64) @ exact(matrix).T) <= allowed(matrix, x)).all()
    assert untouched(out, whole)
    assert untouched(staged, whole_staged)
    alone, _ = guarded(1, N)
    gemv.matvec(w, extras, x[-1:], scratch(1, K), alone, 0, 0, N)
    assert (alone[0] == out[-1]).all(), "a vector's result depends on its company or on the threads"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("K", WIDTHS)
def test_row_widths_of_the_presets(format: str, K: int) -> None:
    rng = np.random.default_rng(K)
    matrix, x = packed(rng, (7, K), format), rng.standard_normal((2, K)).astype(np.float32)
    out, whole = guarded(2, 7)
    gemv.matvec(*arrays(matrix), x, scratch(2, K), out, 0, 0, 7)
    assert (np.abs(out - x.astype(np.float64) @ exact(matrix).T) <= allowed(matrix, x)).all()
    assert untouched(out, whole)
    scales, rows = np.abs(x[0, :7]), np.array([0, 1, 2, 3, 5, 6], np.int32)  # four without a gap, and two
    out, whole = guarded(1, K)
    gemv.add_rows(*arrays(matrix), K, scales, rows, 6, out[0], formats.AHEAD)
    size = scales[rows].astype(np.float64)
    assert (np.abs(out[0] - size @ exact(matrix)[rows]) <= 3e-6 * (size @ np.abs(exact(matrix)[rows])) + 1e-6).all()
    assert untouched(out, whole)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("K", [1, 64, 129, 3072])
def test_vectors_of_integers_lose_nothing(format: str, K: int) -> None:
    rng = np.random.default_rng(K)
    x = rng.integers(-32767, 32768, (1, K)).astype(np.float32)
    x[0, -1] = 32767  # so that a step is 1
    whole = rng.integers(-8, 8, (4, K)) if format == "int4" else rng.integers(-127, 128, (4, K))
    whole[:, ::32] = -8 if format == "int4" else 127  # so that a weight's step is 1
    matrix = quantize(torch.from_numpy(whole).float(), format)  # type: ignore[arg-type]
    assert (exact(matrix) == whole).all()
    out, _ = guarded(1, 4)
    gemv.matvec(*arrays(matrix), x, scratch(1, K), out, 0, 0, 4)
    expected = x.astype(np.float64) @ whole.T
    assert (np.abs(out - expected) <= 1e-6 * (np.abs(x) @ np.abs(whole).T)).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_in_a_vector_is_not_hidden(format: str, bad: float) -> None:
    rng = np.random.default_rng(0)
    matrix, x = packed(rng, (5, 70), format), np.ones((1, 70), np.float32)
    x[0, 68] = bad
    out, _ = guarded(1, 5)
    gemv.matvec(*arrays(matrix), x, scratch(1, 70), out, 0, 0, 5)
    assert not np.isfinite(out[:, (exact(matrix)[:, 68] != 0)]).any()


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 600),
    sizes,
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_down_with_zeros(format: str, F: int, D: int, zeros: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, h = packed(rng, (F, D), format), hidden(rng, 1, F, zeros)[0]
    w, extras = arrays(matrix)
    expected_h = gemv.squared_relu_reference(h)
    active = np.zeros(F, np.int32)
    half = F // 2
    first = gemv.squared_relu_list(h, active, 0, half)
    second = gemv.squared_relu_list(h, active, half, F)
    assert (h == expected_h).all()
    assert [*active[:first], *active[half : half + second]] == np.flatnonzero(h).tolist()
    width = D if format in ("bf16", "fp32") else -(-D // 64) * 64
    out, whole = guarded(1, width)
    gemv.add_rows(w, extras, D, h, active, first, out[0], formats.AHEAD)
    gemv.add_rows(w, extras, D, h, active[half:], second, out[0], formats.AHEAD)
    bound = 3e-6 * (h @ np.abs(exact(matrix))) + 1e-6
    assert (np.abs(out[0, :D] - h.astype(np.float64) @ exact(matrix)) <= bound).all()
    assert untouched(out, whole)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_inactive_neurons_are_not_read(format: str) -> None:
    rng = np.random.default_rng(0)
    matrix, h = packed(rng, (256, 64), format), hidden(rng, 1, 256, 0.7)[0]
    active, outs = np.zeros(256, np.int32), []
    inactive = h <= 0
    n = gemv.squared_relu_list(h, active, 0, 256)
    for other in (False, True):
        if other:  # what must not be read becomes NaN, which no factor of zero hides
            matrix.data.view(torch.uint8)[torch.from_numpy(inactive)] = 255
            h[inactive] = np.nan
        out, _ = guarded(1, 64)
        gemv.add_rows(*arrays(matrix), 64, h, active, n, out[0], formats.AHEAD)
        outs.append(out)
    assert (outs[0] == outs[1]).all()
    out, _ = guarded(1, 64)
    gemv.add_rows(*arrays(matrix), 64, h, np.arange(256, dtype=np.int32), 256, out[0], formats.AHEAD)
    assert not np.isfinite(out).all()  # had they been read, it would show


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_activation_is_not_hidden(bad: float) -> None:
    h = np.full(8, -1, np.float32)
    h[3] = bad
    active = np.zeros(8, np.int32)
    n = gemv.squared_relu_list(h, active, 0, 8)
    out, _ = guarded(1, 4)
    gemv.add_rows(np.ones((8, 4), np.float32), gemv.NONE, 4, h, active, n, out[0], formats.AHEAD)
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


@numba.njit(nogil=True)
def by_tiles(w, extras, x, staged, out, start, stop):  # type: ignore[no-untyped-def]
    tiles.stage(w, x, staged)
    tiles.multiply(w, extras, x, staged, out, 0, start, stop)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 33),
    sizes,
    st.sampled_from([64, 192, 1600, 3136, 100]),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
def test_vectors_together_have_the_bits_of_each_alone(
    format: str, M: int, N: int, K: int, threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    matrix, x = packed(rng, (N, K), format), rng.standard_normal((M, K)).astype(np.float32)
    w, extras = arrays(matrix)
    out, whole = guarded(M, N)
    staged, whole_staged = guarded(*scratch(M, K).shape)
    for thread in range(threads):
        by_tiles(w, extras, x, staged, out, *gemv.share(N, gemv.ROW_BLOCK, thread, threads))
    assert untouched(out, whole)
    assert untouched(staged, whole_staged)
    alone, _ = guarded(1, N)
    for m in range(M):
        gemv.matvec(w, extras, x[m : m + 1], scratch(1, K), alone, 0, 0, N)
        assert (alone[0] == out[m]).all()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 33),
    st.integers(1, 600),
    st.sampled_from([64, 128, 100]),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_neurons_of_several_vectors(format: str, M: int, F: int, D: int, zeros: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, h = packed(rng, (F, D), format), hidden(rng, M, F, zeros)
    w, extras = arrays(matrix)
    start, active, counts = int(rng.integers(F)), np.zeros((M, F), np.int32), np.zeros(M, np.int64)
    width = -(-D // 64) * 64
    expected = np.zeros((M, width), np.float32)
    for m in range(M):
        counts[m] = gemv.squared_relu_list(h[m], active[m], start, F)
        gemv.add_rows(w, extras, D, h[m], active[m, start:], counts[m], expected[m], formats.AHEAD)
    out, whole = guarded(M, width)
    tiles.add_rows_of(w, extras, D, h, active[:, start:], counts, start, F, out)
    assert (out == expected).all()
    assert untouched(out, whole)
