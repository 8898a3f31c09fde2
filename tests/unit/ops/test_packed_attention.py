"""Attention of packed documents with its own backward pass, against torch's in float64 and upstream's model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from minitron import NemotronConfig, NemotronForCausalLM
from minitron.data.packing import collate
from minitron.ops import packed_attention as packed
from minitron.ops.packed_attention import packed_attention, packed_attention_in


class Heads(nn.Module):
    """What transformers' attention functions ask a module for."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def packed_mask(cuts: list[list[int]], tokens: int) -> Tensor:
    """(B, 1, T, T), true within documents that begin at `cuts`, and causal."""
    rows = []
    for row in cuts:
        number = torch.zeros(tokens, dtype=torch.long)
        number[row] += 1
        number = number.cumsum(0)
        rows.append((number[:, None] == number) & torch.ones(tokens, tokens, dtype=torch.bool).tril())
    return torch.stack(rows)[:, None]


def inputs(dtype: torch.dtype, tokens: int, batch: int = 2, heads: int = 4, groups: int = 2, size: int = 8) -> list:
    widths = (heads, heads // groups, heads // groups)
    return [
        torch.randn(batch, tokens, n, size, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_()
        for n in widths
    ]


def outcome(attend: Any, tensors: list[Tensor], mask: Tensor, gradient: Tensor, **more: Any) -> list[Tensor]:
    """Output and gradients in float64."""
    groups = tensors[0].shape[1] // tensors[1].shape[1]
    out, weights = attend(Heads(groups), *tensors, mask, **more)
    assert weights is None
    return [out.detach().double(), *(g.double() for g in torch.autograd.grad(out, tensors, gradient.to(out.dtype)))]


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(128, 200),
    cuts=st.lists(st.lists(st.integers(1, 127), max_size=4), min_size=2, max_size=2),
    groups=st.sampled_from([1, 2, 4]),
    scaling=st.sampled_from([None, 0.5]),
)
def test_output_and_gradients_are_those_of_torch_in_float64(
    tokens: int, cuts: list[list[int]], groups: int, scaling: float | None
) -> None:
    torch.manual_seed(tokens)
    mask, tensors = packed_mask(cuts, tokens), inputs(torch.float64, tokens, groups=groups)
    assert packed.serves(tensors[0], tensors[1], mask)
    gradient = torch.randn(2, tokens, 4, 8, dtype=torch.float64)
    ours = outcome(packed_attention, tensors, mask, gradient, scaling=scaling)
    theirs = outcome(sdpa_attention_forward, tensors, mask, gradient, scaling=scaling)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_gradients_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_FEWEST", 2)
    monkeypatch.setattr(packed, "_CHUNK", 4)
    tensors, mask = inputs(torch.float64, 11, size=3), packed_mask([[4], [1, 7]], 11)
    assert packed.serves(tensors[0], tensors[1], mask)
    assert torch.autograd.gradcheck(lambda q, k, v: packed_attention(Heads(2), q, k, v, mask)[0], tensors)


def test_its_error_in_bfloat16_is_not_above_that_of_torch() -> None:
    torch.manual_seed(0)
    mask = packed_mask([[100, 300], [], [17, 200, 400], [256]], 512)
    tensors = inputs(torch.bfloat16, 512, batch=4, size=64)
    gradient = torch.randn(4, 512, 4, 64).bfloat16()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = outcome(sdpa_attention_forward, exact, mask, gradient)
    errors = [
        [((found - true).norm() / true.norm()).item() for found, true in zip(result, expected, strict=True)]
        for result in (outcome(f, tensors, mask, gradient) for f in (packed_attention, sdpa_attention_forward))
    ]
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= 1.05 * theirs


def test_what_it_is_not_for_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, causal = inputs(torch.float32, 128), packed_mask([[5], [9]], 128)
    query, key = tensors[:2]
    assert packed.serves(query, key, causal)
    ahead, blind = causal.clone(), causal.clone()
    ahead[1, 0, 3, 100], blind[0, 0, 7] = True, False
    assert not packed.serves(query, key, ahead)  # looks at later keys
    assert not packed.serves(query, key, blind)  # a row that looks at nothing
    assert not packed.serves(query, key, torch.zeros(causal.shape))  # an additive mask
    assert not packed.serves(query, key[:, :, :100], causal[..., :100])  # a cache, or other lengths
    assert not packed.serves(query.detach(), key, causal)  # no training
    assert not packed.serves(query[:, :, :64], key[:, :, :64], causal[..., :64, :64])  # not faster there
    monkeypatch.setattr(packed, "_KEPT_BYTES", 1000)
    assert not packed.serves(query, key, causal)  # its weights would take too much memory


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_trains_with_it_as_with_torch(monkeypatch: pytest.MonkeyPatch, autocast: bool) -> None:
    """The loss and gradients of a model over packed documents; afterwards the model is as it was."""
    torch.manual_seed(0)
    config = NemotronConfig(60, 32, 64, 2, 4, num_key_value_heads=2, max_position_embeddings=160)
    model = NemotronForCausalLM(config)
    batch = collate([[torch.randint(0, 60, (n,)).numpy() for n in row] for row in ((90, 60), (150,))], 160)
    calls: list[bool] = []
    serves = packed.serves
    monkeypatch.setattr(packed, "serves", lambda q, k, m: calls.append(serves(q, k, m)) or calls[-1])

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(batch.input_ids, position_ids=batch.position_ids, labels=batch.labels, use_cache=False)
        out.loss.backward()
        return [out.loss.detach(), *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr]

    theirs = gradients()
    assert not calls
    with packed_attention_in(model):
        ours = gradients()
        model.eval()
        with torch.no_grad():
            model(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    assert calls == [True, True, False, False]
    assert model.config._attn_implementation == "sdpa"
    for found, expected in zip(ours, theirs, strict=True):
        error = (found - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < (0.02 if autocast else 2e-5)
