"""Attention of new tokens over a cache, against the reference of a decode step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, numbers

from minitron.engine.cuda.kernels import attention
from minitron.engine.cuda.steps import Rows, TorchSteps

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 3e-2}
CAPACITY, EPS = 210, 1e-5


def compare(
    monkeypatch: pytest.MonkeyPatch,
    positions: list[int],
    slots: list[int],
    *,
    heads: tuple[int, int] = (4, 2),
    width: int = 32,
    half: int = 8,
    dtype: torch.dtype = torch.float32,
    gains: bool = False,
    span: int = CAPACITY,
    own: bool = True,
) -> None:
    # So that short sequences are split, and a part has several blocks.
    monkeypatch.setattr(attention, "KEYS_OF_A_PART", 64)
    monkeypatch.setattr(attention, "BLOCK_KEYS", 16)
    (N, K), H = heads, width
    layer: Any = SimpleNamespace(num_heads=N, num_key_value_heads=K, query_norm=None, key_norm=None)
    if gains:
        layer.query_norm, layer.key_norm = (numbers(H, seed=seed).abs() + 0.5 for seed in (1, 2))
    qkv = numbers(len(positions), (N + 2 * K) * H, seed=3)
    keys, values = (numbers(max(slots) + 1, K, CAPACITY, H, seed=seed).to(dtype) for seed in (4, 5))
    angles = numbers(CAPACITY, half, seed=6)
    rotary = angles.cos(), angles.sin()
    tokens = torch.zeros(len(slots), dtype=torch.int64, device=DEVICE)
    at, where = (torch.tensor(part, device=DEVICE) for part in (positions, slots))
    rows = Rows(tokens, at, where, at + 1, span=span, in_order=False)
    other_keys, other_values = keys.clone(), values.clone()
    expected = TorchSteps().attention(qkv, layer, other_keys, other_values, rotary, rows, EPS)
    given = {"query_gain": layer.query_norm, "key_gain": layer.key_norm, "eps": EPS}
    found = attention.attend(qkv, keys, values, rotary, where, at, at + 1, span=span, own_slots=own, **given)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for cache, other in ((keys, other_keys), (values, other_values)):
        torch.testing.assert_close(cache, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("own", [True, False])
def test_attention_over_a_cache_in_parts(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, own: bool) -> None:
    compare(monkeypatch, [0, 63, 64, 200], [3, 0, 2, 1], dtype=dtype, own=own)


@pytest.mark.parametrize(
    ("heads", "width", "half", "gains"),
    [((3, 1), 24, 12, True), ((2, 2), 40, 0, False), ((4, 1), 64, 16, False), ((6, 2), 8, 2, True)],
)
def test_shapes_of_heads(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], width: int, half: int, gains: bool
) -> None:
    compare(monkeypatch, [70, 5], [0, 1], heads=heads, width=width, half=half, gains=gains, span=71)


def test_rows_of_one_slot_attend_to_each_other_and_only_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    compare(monkeypatch, [62, 63, 64, 3, 62], [0, 0, 0, 1, 0], own=False, gains=True)
