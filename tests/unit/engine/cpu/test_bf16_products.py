"""Products with vectors rounded to bf16, against float64 products of the rounded numbers, with guard zones."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import some_tokens, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from samples.family_samples import small_config

from minitron.engine.cpu import bf16_products
from minitron.engine.cpu import engine as cpu
from minitron.engine.matrix import Format
from minitron.engine.reference import ReferenceEngine
from minitron.engine.weights import EngineWeights, from_model
from minitron.families import FAMILIES
from minitron.family_models import causal_lm_class

needs_bf16 = pytest.mark.skipif(not bf16_products.USED, reason="the processor has no AVX512-BF16")
GUARD = np.float32(-12345.0)
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 160}
"""A shape that the tiles can multiply."""


def bf16_bits(values: torch.Tensor) -> np.ndarray:
    return values.bfloat16().view(torch.int16).numpy().view(np.uint16)


def rounded(values: torch.Tensor) -> np.ndarray:
    return values.bfloat16().double().numpy()


@needs_bf16
@settings(max_examples=60, deadline=None)
@given(
    vectors=st.integers(9, 32), rows=st.integers(1, 23), lines=st.integers(1, 9), column=st.integers(0, 5),
    shares=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_products_are_those_of_the_rounded_numbers(
    vectors: int, rows: int, lines: int, column: int, shares: int, seed: int
) -> None:
    random, columns = torch.Generator().manual_seed(seed), 32 * lines
    weights, x = (torch.randn(n, columns, generator=random) for n in (rows, vectors))
    staged = np.zeros(vectors * columns, np.uint16)
    bf16_products._round_vectors(x.numpy(), staged)
    out = np.full((vectors, column + rows + 3), GUARD)
    bounds = [rows * share // shares for share in range(shares + 1)]
    for start, stop in itertools.pairwise(bounds):
        bf16_products.multiply_rounded(bf16_bits(weights), columns, vectors, staged, out, column, start, stop)
    expected = rounded(x) @ rounded(weights).T
    bound = 2e-6 * (np.abs(rounded(x)) @ np.abs(rounded(weights)).T) + 1e-30
    assert (np.abs(out[:, column : column + rows] - expected) <= bound).all()
    assert (out[:, :column] == GUARD).all()
    assert (out[:, column + rows :] == GUARD).all()


@needs_bf16
@settings(max_examples=40, deadline=None)
@given(
    vectors=st.integers(9, 32), start=st.integers(0, 9), pairs=st.integers(1, 40), blocks=st.integers(1, 4),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_sums_of_rows_are_those_of_the_rounded_factors(
    vectors: int, start: int, pairs: int, blocks: int, seed: int
) -> None:
    random, columns, stop = torch.Generator().manual_seed(seed), 64 * blocks, start + 2 * pairs
    weights = torch.randn(stop + 3, columns, generator=random)
    factors = torch.randn(vectors, stop + 3, generator=random)
    out = np.full((vectors, columns + 5), GUARD)
    staged = np.zeros(vectors * (stop - start), np.uint16)
    out[:, :columns] = 3
    bf16_products.add_rows_rounded(bf16_bits(weights)[start:stop], factors.numpy()[:, start:stop], staged, out)
    x, w = rounded(factors)[:, start:stop], rounded(weights)[start:stop]
    assert (np.abs(out[:, :columns] - 3 - x @ w) <= 2e-6 * (3 + np.abs(x) @ np.abs(w))).all()
    assert (out[:, columns:] == GUARD).all()


@needs_bf16
def test_nan_and_infinity_stay() -> None:
    x = torch.zeros(9, 32)
    x[2, 5], x[4, 7] = float("nan"), float("inf")
    out, staged = np.zeros((9, 4), np.float32), np.zeros(9 * 32, np.uint16)
    bf16_products._round_vectors(x.numpy(), staged)
    bf16_products.multiply_rounded(bf16_bits(torch.ones(4, 32)), 32, 9, staged, out, 0, 0, 4)
    assert np.isnan(out[2]).all()
    assert np.isposinf(out[4]).all()
    assert (np.delete(out, [2, 4], axis=0) == 0).all()


def wide_model(gated: bool) -> Any:
    if not gated:
        return tiny_model(torch.bfloat16, **WIDE)
    config = small_config("llama", **WIDE)
    torch.manual_seed(0)
    return causal_lm_class(FAMILIES["llama"])(config).bfloat16().eval()


def logits_after(weights: EngineWeights, tokens: list[int], more: bool, threads: int = 2) -> tuple[torch.Tensor, ...]:
    with cpu.CpuEngine(weights, 100, threads=threads) as engine:
        engine._exact_prompt = cpu.SHORT_PROMPT_OF_LARGE
        engine.prefill(tokens[:-1], more=more)
        logits = engine.step(tokens[-1:]).clone()
        return logits, *engine.kv.keys, *engine.kv.values


@needs_bf16
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("length", [10, 11, 32, 33, 41, 42, 75])
def test_a_long_prompt_is_rounded_and_its_last_token_is_not(gated: bool, length: int) -> None:
    weights, tokens = from_model(wide_model(gated)), some_tokens(length)
    found = logits_after(weights, tokens, more=True)
    for more, threads in ((True, 1), (False, 2), (False, 1)):
        assert all(map(torch.equal, found, logits_after(weights, tokens, more, threads)))
    exact = ReferenceEngine(from_model(wide_model(gated).float()), 100)
    exact.prefill(tokens[:-1])
    expected = exact.step(tokens[-1:])
    assert 0 < (found[0] - expected).norm() / expected.norm() < 0.02


@needs_bf16
def test_weights_packed_without_loss_give_the_same_bits() -> None:
    model, tokens = wide_model(gated=False), some_tokens(50)
    found = [logits_after(from_model(model, format), tokens, more=True) for format in ("bf16", "bf12")]
    for plain, packed in zip(*(cached[1:] for cached in found), strict=True):
        assert torch.equal(plain, packed)


@needs_bf16
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("gated", [False, True])
def test_packed_weights_are_unpacked_to_bf16(format: Format, gated: bool) -> None:
    model, tokens = wide_model(gated), some_tokens(50)
    weights = from_model(model, format)
    found = logits_after(weights, tokens, more=True)
    assert all(map(torch.equal, found, logits_after(weights, tokens, more=False, threads=1)))
    for layer in weights.layers:
        for matrix in layer.matrices:
            matrix.data, matrix.format = matrix.dense(torch.float32), "fp32"
    exact = ReferenceEngine(weights, 100)
    exact.prefill(tokens[:-1])
    expected = exact.step(tokens[-1:])
    assert 0 < (found[0] - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("format", ["fp32", "bf16", "bf12", "int8", "int4"])
def test_waiting_for_the_next_token_changes_no_bit(format: Format) -> None:
    weights = from_model(tiny_model(torch.bfloat16, intermediate_size=300), format)
    for length in (2, 9, 31, 32, 33):
        tokens, found = some_tokens(length), []
        for more in (False, True):
            with cpu.CpuEngine(weights, 60, threads=2) as engine:
                engine.prefill(tokens[:-1], more=more)
                assert engine.active_neurons == engine.seen_neurons == 0  # tokens of a prompt are not counted
                chosen = engine.greedy(tokens[-1:], 5)
                found.append((chosen, engine.hidden.copy(), engine.active_neurons, engine.seen_neurons))
                assert engine.kv.lengths == [length + 4]
                found[-1] += tuple(part[:, :, : length + 4].clone() for part in (*engine.kv.keys, *engine.kv.values))
        (a, *more_of_a), (b, *more_of_b) = found
        assert a == b
        assert np.array_equal(more_of_a[0], more_of_b[0])
        assert more_of_a[1:3] == more_of_b[1:3]
        assert all(map(torch.equal, more_of_a[3:], more_of_b[3:]))


def test_tokens_that_wait_are_appended_before_other_work() -> None:
    weights, tokens = from_model(tiny_model()), some_tokens(12)
    alone = []
    for slot in range(2):
        with cpu.CpuEngine(weights, 40, slots=2) as engine:
            engine.prefill(tokens[: 8 + slot], slot)
            alone.append(engine.decode([tokens[9]], [slot])[0].clone())
    with cpu.CpuEngine(weights, 40, slots=2) as engine:
        engine.prefill(tokens[:8], 0, more=True)
        engine.prefill(tokens[:9], 1, more=True)
        assert torch.equal(engine.decode([tokens[9]] * 2, [0, 1]), torch.stack(alone))
        engine.release(0)
        engine.prefill(tokens[:8], 0, more=True)
        engine.truncate(5, 0)
        assert engine.kv.lengths == [5, 10]
        engine.prefill(tokens[5:8], 0, more=True)
        assert engine.verify([tokens[9:11]], [0])[0][0] == int(alone[0].argmax())
        engine.prefill(tokens[:1], 0, more=True)
        engine.reserve(64)
        assert engine.kv.lengths[0] == len(tokens[:8]) + len(engine.verify([tokens[9:10]], [1])[0]) + 1
