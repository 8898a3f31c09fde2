"""Prompts read in torch's products with memory taken once, against the reference's plain formulas."""

from __future__ import annotations

import pytest
import torch
from engine_models import VARIANTS, some_tokens, tiny_model

from minitron.engine.cpu import prefill as prompt
from minitron.engine.kv import KeyValues
from minitron.engine.matrix import Format, Matrix
from minitron.engine.quantize import quantize
from minitron.engine.reference import ReferenceEngine
from minitron.engine.weights import EngineWeights, from_model


def error(weights: EngineWeights, wide: EngineWeights, pieces: list[list[int]], slot: int = 1) -> float:
    """Of keys and values, relative to their size, against the same weights in fp32."""
    capacity = sum(map(len, pieces))
    expected = ReferenceEngine(wide, capacity)
    kv = KeyValues(weights, capacity, 2)
    reader = prompt.Prefill(weights, kv, 2)
    for piece in pieces:
        expected.prefill(piece)
        reader.append(piece, slot)
    assert kv.lengths[slot] == capacity
    found = torch.stack([part[slot].float() for part in (*kv.keys, *kv.values)])
    exact = torch.stack([part[0] for part in (*expected.kv.keys, *expected.kv.values)])
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "no layers"])
def test_keys_and_values_are_the_references(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "CHUNK", 16)
    model = tiny_model(**VARIANTS[variant])
    tokens = some_tokens(60, model.config.vocab_size)
    for lengths in ([9], [15], [16], [17, 9], [33, 10], [48, 12]):
        pieces = [tokens[sum(lengths[:i]) : sum(lengths[: i + 1])] for i in range(len(lengths))]
        assert error(from_model(model), from_model(model), pieces) < 2e-6
        half = from_model(tiny_model(torch.bfloat16, **VARIANTS[variant]))
        wide = from_model(tiny_model(torch.bfloat16, **VARIANTS[variant]).float())
        assert error(half, wide, pieces) < 0.02


@pytest.mark.parametrize("format", ["bf12", "int8", "int4"])
def test_packed_weights_are_read_as_the_same_numbers(format: Format) -> None:
    model = tiny_model(torch.bfloat16, hidden_size=36, head_dim=10, intermediate_size=131)
    wide = from_model(model.float())
    for matrix in [wide.embed, wide.head, *(m for layer in wide.layers for m in layer.matrices)]:
        matrix.data = quantize(matrix.data, format).dense(torch.float32)
    packed = from_model(tiny_model(torch.bfloat16, hidden_size=36, head_dim=10, intermediate_size=131), format)
    assert error(packed, wide, [some_tokens(25)]) < 0.02


@pytest.mark.parametrize("format", ["bf12", "int8", "int4"])
@pytest.mark.parametrize("shape", [(1, 64), (7, 100), (33, 31)])
def test_unpacked_rows_are_those_of_the_format(format: Format, shape: tuple[int, int]) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights.view(-1)[::7] *= 2.0**-30  # escapes of bf12
    matrix: Matrix = quantize(weights, format)
    reader = prompt.Prefill.__new__(prompt.Prefill)
    reader._threads, reader._plain = 3, torch.empty(shape[0] * shape[1], dtype=torch.bfloat16)
    with prompt.ThreadPoolExecutor(3) as reader._pool:
        assert torch.equal(reader._dense(matrix), matrix.dense(torch.bfloat16))
