"""Layer norm with gain 1 + weight, squared ReLU, and eager attention, against float64 and plain formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from minitron.ops.act import SquaredReLU, squared_relu
from minitron.ops.attention import eager_attention, repeat_groups
from minitron.ops.norm import layer_norm_1p


def exact_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight, bias = x.double(), weight.double(), bias.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + weight) + bias


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(2, 65),
    rows=st.integers(1, 4),
    scale=st.sampled_from([1e-2, 1.0, 1e2]),
    offset=st.sampled_from([0.0, 3.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_layer_norm_is_float64_rounded_once(
    width: int, rows: int, scale: float, offset: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = ((torch.randn(rows, width, generator=generator) + offset) * scale).to(dtype)
    weight = (torch.randn(width, generator=generator) * 0.05).to(dtype)
    bias = torch.randn(width, generator=generator).to(dtype)
    got = layer_norm_1p(x, weight, bias, 1e-5)
    assert got.dtype == dtype
    step = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    expected = exact_norm(x, weight, bias, 1e-5)
    # Half a unit in the last place of the result, and what fp32 statistics may add.
    torch.testing.assert_close(got.double(), expected, rtol=step, atol=1e-10 if dtype == torch.float64 else 2e-4)


def test_layer_norm_in_fp32_is_torchs_with_the_gain_added() -> None:
    x, weight, bias = torch.randn(5, 16), torch.randn(16) * 0.05, torch.randn(16)
    assert torch.equal(layer_norm_1p(x, weight, bias, 1e-5), F.layer_norm(x, (16,), weight + 1, bias, 1e-5))


def test_layer_norm_gradients() -> None:
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 6), (6,), (6,))]
    assert torch.autograd.gradcheck(lambda *t: layer_norm_1p(*t, 1e-5), inputs)


def test_layer_norm_of_fp32_input_with_bf16_weights() -> None:
    x, weight, bias = torch.randn(5, 16), (torch.randn(16) * 0.05).bfloat16(), torch.randn(16).bfloat16()
    got = layer_norm_1p(x, weight, bias, 1e-5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact_norm(x, weight, bias, 1e-5), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20))
def test_squared_relu_is_the_square_of_the_positive_part(values: list[float]) -> None:
    x = torch.tensor(values)
    expected = torch.where(x > 0, x * x, torch.zeros(()))
    kept = x.clone()
    assert torch.equal(squared_relu(x), expected)
    assert torch.equal(SquaredReLU()(x), expected)
    assert torch.equal(squared_relu(x.clone().requires_grad_()).detach(), expected)
    assert torch.equal(x, kept)  # never in place


def test_squared_relu_gradients() -> None:
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(squared_relu, (x,))
    assert torch.autograd.gradgradcheck(squared_relu, (x,))
    (gradient,) = torch.autograd.grad(squared_relu(x).sum(), x)
    torch.testing.assert_close(gradient, 2 * x.clamp(min=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_squared_relu_keeps_the_dtype_and_zeros_are_exact(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 41).to(dtype)
    out = squared_relu(x)
    assert out.dtype == dtype
    assert torch.equal(out == 0, x <= 0)


class Heads(nn.Module):
    """What eager attention asks of its module."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def by_hand(q: Any, k: Any, v: Any, scaling: float, groups: int) -> torch.Tensor:
    """Causal attention, one query of one head at a time."""
    B, N, T, H = q.shape
    out = torch.zeros(B, T, N, H, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            for t in range(T):
                keys, values = k[b, n // groups, : t + 1], v[b, n // groups, : t + 1]
                weights = torch.softmax(keys @ q[b, n, t] * scaling, 0)
                out[b, t, n] = weights @ values
    return out


@settings(max_examples=15, deadline=None)
@given(kv=st.integers(1, 3), groups=st.integers(1, 3), tokens=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_eager_attention_is_attention(kv: int, groups: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, kv * groups, tokens, 4, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv, tokens, 4, generator=generator, dtype=torch.float64)
    mask = torch.full((tokens, tokens), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    out, weights = eager_attention(Heads(groups), q, k, v, mask, scaling=0.5)
    assert out.dtype == weights.dtype == torch.float64
    torch.testing.assert_close(out, by_hand(q, k, v, 0.5, groups))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, kv * groups, tokens, dtype=torch.float64))


def test_eager_attention_softmax_is_fp32_for_16_bit_queries() -> None:
    q = torch.randn(1, 1, 4, 8).bfloat16()
    out, weights = eager_attention(Heads(1), q, q, q, None, scaling=1.0)
    scores = (q @ q.transpose(2, 3)).float()
    assert out.dtype == weights.dtype == torch.bfloat16
    assert torch.equal(weights, scores.softmax(-1).bfloat16())


def test_groups_are_repeated_next_to_each_other() -> None:
    x = torch.arange(6.0).reshape(1, 3, 1, 2)
    assert repeat_groups(x, 2)[0, :, 0, 0].tolist() == [0, 0, 2, 2, 4, 4]
    assert repeat_groups(x, 1) is x
