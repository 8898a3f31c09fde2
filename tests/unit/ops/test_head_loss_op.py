"""Cross-entropy without all logits: against the formula in float64, in any chunking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.ops.loss import cross_entropy, linear_cross_entropy, shift_labels


def formula(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, num_items: int | None) -> torch.Tensor:
    """Mean of -log softmax at the target, row by row, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for row, target in zip(hidden.double(), targets.tolist(), strict=True):
        if target != -100:
            scores = weight.double() @ row
            total = total + torch.log(torch.exp(scores - scores.max()).sum()) + scores.max() - scores[target]
    return total / max(num_items if num_items is not None else int((targets != -100).sum()), 1)


cases = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 12),
        "width": st.integers(1, 8),
        "vocab": st.integers(1, 20),
        "chunk": st.integers(1, 5),
        "ignored": st.floats(0, 1),
        "scale": st.sampled_from([0.1, 1.0, 10.0]),
        "num_items": st.sampled_from([None, 1, 7]),
        "seed": st.integers(0, 2**31),
    }
)


def draw(rows: int, width: int, vocab: int, ignored: float, scale: float, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator) * scale
    weight = torch.randn(vocab, width, generator=generator)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -100
    return hidden, weight, targets


@settings(max_examples=60, deadline=None)
@given(cases)
def test_chunked_loss_and_gradients_are_the_formulas(case: dict[str, Any]) -> None:
    num_items, chunk = case["num_items"], case["chunk"]
    hidden, weight, targets = draw(**{k: v for k, v in case.items() if k not in ("num_items", "chunk")})
    wide = [t.double().requires_grad_() for t in (hidden, weight)]
    exact = formula(*wide, targets, num_items)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, num_items, rows_per_chunk=chunk)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    (loss * 2).backward()
    if exact.requires_grad:
        (exact * 2).backward()
    for narrow, reference in zip((hidden, weight), wide, strict=True):
        expected = torch.zeros_like(reference) if reference.grad is None else reference.grad
        size = max(hidden.abs().max().item(), weight.abs().max().item(), 1.0)
        torch.testing.assert_close(narrow.grad.double(), expected, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunk_size_does_not_change_the_loss(dtype: torch.dtype, chunk: int) -> None:
    hidden, weight, targets = draw(11, 16, 50, 0.3, 1.0, 0)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    whole = linear_cross_entropy(hidden, weight, targets, rows_per_chunk=11)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, rows_per_chunk=chunk), whole)
    plain = cross_entropy(hidden @ weight.t(), targets)
    torch.testing.assert_close(whole, plain, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=0)


def test_bf16_gradients_are_summed_in_fp32() -> None:
    # 512 rows in chunks of one: a sum kept in bf16 would lose most of them.
    hidden, weight, targets = draw(512, 8, 16, 0.0, 1.0, 0)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    linear_cross_entropy(hidden, weight, targets, rows_per_chunk=1).backward()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    formula(*wide, targets, None).backward()
    error = (weight.grad.double() - wide[1].grad).norm() / wide[1].grad.norm()
    assert weight.grad.dtype == torch.bfloat16
    assert error < 2**-8


@pytest.mark.parametrize("num_items", [3, 4])
def test_the_number_of_items_does_not_bias_bf16_gradients(num_items: int) -> None:
    # One third in bf16 is off by two parts in a thousand, and so would be every gradient of the backbone.
    hidden, weight, targets = draw(64, 32, 50, 0.0, 1.0, 0)
    hidden = hidden.bfloat16().requires_grad_()
    linear_cross_entropy(hidden, weight.bfloat16(), targets, num_items).backward()
    wide = hidden.detach().double().requires_grad_()
    formula(wide, weight.bfloat16(), targets, num_items).backward()
    slope = (hidden.grad.double() * wide.grad).sum() / wide.grad.square().sum()
    assert abs(slope - 1) < 8e-4


@pytest.mark.parametrize("function", ["linear", "plain"])
def test_nothing_counted_gives_zero_with_zero_gradients(function: str) -> None:
    hidden, weight, _ = draw(5, 4, 6, 0.0, 1.0, 0)
    hidden.requires_grad_()
    targets = torch.full((5,), -100)
    if function == "linear":
        loss = linear_cross_entropy(hidden, weight, targets)
    else:
        loss = cross_entropy(hidden @ weight.t(), targets)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.abs().max() == 0


@pytest.mark.parametrize(("need_hidden", "need_weight"), [(True, False), (False, True), (False, False)])
def test_only_the_gradients_asked_for_are_formed(need_hidden: bool, need_weight: bool) -> None:
    hidden, weight, targets = draw(6, 4, 9, 0.2, 1.0, 0)
    loss = linear_cross_entropy(hidden.requires_grad_(need_hidden), weight.requires_grad_(need_weight), targets)
    assert loss.requires_grad == (need_hidden or need_weight)
    if loss.requires_grad:
        loss.backward()
    assert (hidden.grad is not None) == need_hidden
    assert (weight.grad is not None) == need_weight


def test_second_derivatives_are_refused_not_wrong() -> None:
    hidden, weight, targets = draw(6, 4, 9, 0.2, 1.0, 0)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    with pytest.raises(RuntimeError, match="no second derivatives; use cross_entropy of the logits"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_batched_shapes_strides_and_autocast() -> None:
    hidden, weight, targets = draw(12, 4, 9, 0.2, 1.0, 0)
    flat = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(linear_cross_entropy(hidden.view(3, 4, 4), weight, targets.view(3, 4)), flat)
    turned = targets.view(3, 4).t().contiguous().t()
    assert not turned.is_contiguous()
    assert torch.equal(linear_cross_entropy(hidden.view(3, 4, 4), weight, turned), flat)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = linear_cross_entropy(hidden, weight, targets)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, flat, rtol=2e-2, atol=0)


def test_two_backward_passes_do_not_change_each_other() -> None:
    hidden, weight, targets = draw(6, 4, 9, 0.2, 1.0, 0)
    hidden.requires_grad_()
    weight.requires_grad_()
    one = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss * 3, (hidden, weight))
    for a, b, c in zip(one, first, second, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a * 3, c)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-100, 50), min_size=1, max_size=9))
def test_shifted_labels_are_the_next_ones(labels: list[int]) -> None:
    shifted = shift_labels(torch.tensor([labels]))
    assert shifted.tolist() == [[*labels[1:], -100]]
