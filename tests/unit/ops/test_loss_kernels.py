"""Losses of the LM head as Triton kernels, against the torch operations that define them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minitron.ops import head_loss, loss_kernels
from minitron.ops.head_loss import KINDS
from minitron.ops.kl import linear_divergence
from minitron.ops.loss import linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def tensors(rows: int, width: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Student's and teacher's hidden states and heads, and labels, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, width), (vocab, width), (rows, width + 1), (vocab, width + 1))
    found = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.2] = -100
    return [x.requires_grad_(i < 2) for i, x in enumerate(found)], labels.to(DEVICE)


def both(monkeypatch: pytest.MonkeyPatch, run: Any, block: int = 16) -> tuple[list[Tensor], list[Tensor]]:
    """What `run` finds with torch operations, and with kernels, which are seen to run."""
    calls: list[int] = []
    plain = loss_kernels.differentiate
    monkeypatch.setattr(head_loss, "_KERNEL_DEVICES", ())
    expected = run()
    monkeypatch.setattr(head_loss, "_KERNEL_DEVICES", (DEVICE,))
    monkeypatch.setattr(loss_kernels, "_BLOCK", block)
    monkeypatch.setattr(loss_kernels, "differentiate", lambda *a, **k: calls.append(1) or plain(*a, **k))
    found = run()
    assert calls or not expected[0].isfinite() or float(expected[0]) == 0
    return found, expected


def numbers(values: list[Tensor], labels: Tensor, **settings: Any) -> list[Tensor]:
    out = linear_divergence(*values, labels, **settings)  # type: ignore[misc]
    gradients = torch.autograd.grad(out.loss, values[:2])
    return [out.loss.detach(), out.divergence, out.cross_entropy, out.agreements, *gradients]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (1.0, 0.5), (2.0, 0.7)])
def test_divergences(monkeypatch: pytest.MonkeyPatch, kind: str, temperature: float, ce_weight: float) -> None:
    values, labels = tensors(9, 6, 45, torch.float32)
    more = {"kind": kind, "temperature": temperature, "ce_weight": ce_weight, "rows_per_chunk": 4}
    found, expected = both(monkeypatch, lambda: numbers(values, labels, **more))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    values, labels = tensors(11, 6, 33, dtype)
    found, expected = both(monkeypatch, lambda: numbers(values, labels, kind="forward_kl", ce_weight=0.3))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0.03, atol=3e-3)


@given(rows=st.integers(1, 6), vocab=st.integers(1, 50), seed=st.integers(0, 99), num_items=st.sampled_from([None, 3]))
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cross_entropy_of_any_shape(
    monkeypatch: pytest.MonkeyPatch, rows: int, vocab: int, seed: int, num_items: int | None
) -> None:
    values, labels = tensors(rows, 3, vocab, torch.float32, seed)

    def run() -> list[Tensor]:
        loss = linear_cross_entropy(*values[:2], labels, num_items, rows_per_chunk=2)
        return [loss.detach(), *torch.autograd.grad(loss, values[:2])]

    with monkeypatch.context() as patch:
        for one, other in zip(*both(patch, run), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_whose_gradient_is_not_kept_are_computed_again(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    values, labels = tensors(60, 8, 40, torch.bfloat16)
    more = {"kind": kind, "temperature": 2.0, "ce_weight": 0.7, "rows_per_chunk": 30}
    expected = numbers(values, labels, **more)
    scored = int((labels != -100).sum())
    monkeypatch.setattr("minitron.ops.head_gradient._KEPT_VALUES", 30 * scored)
    known: list[bool] = []
    plain = loss_kernels.differentiate
    monkeypatch.setattr(loss_kernels, "differentiate", lambda *a, **k: known.append(k["known"]) or plain(*a, **k))
    monkeypatch.setattr(head_loss, "_KERNEL_DEVICES", (DEVICE,))
    for one, other in zip(numbers(values, labels, **more), expected, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0.03, atol=2e-3)
    assert True in known
    assert False in known


def test_without_gradients_and_without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "_KERNEL_DEVICES", (DEVICE,))
    values, labels = tensors(5, 4, 20, torch.float32)
    with torch.no_grad():
        value = linear_divergence(*values, labels).loss
    monkeypatch.setattr(head_loss, "_KERNEL_DEVICES", ())
    torch.testing.assert_close(value, linear_divergence(*values, labels).loss.detach())
    monkeypatch.setattr(head_loss, "_KERNEL_DEVICES", (DEVICE,))
    assert numbers(values, torch.full_like(labels, -100))[0] == 0


def test_nan_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "_KERNEL_DEVICES", (DEVICE,))
    values, _ = tensors(2, 4, 20, torch.float32)
    with torch.no_grad():
        values[1][7] = torch.nan
    assert linear_cross_entropy(values[0], values[1], torch.tensor([1, 2], device=DEVICE)).isnan()


def test_a_vocabulary_of_several_processes_and_other_dtypes_run_as_torch_operations() -> None:
    from minitron.ops.vocabulary import Vocabulary

    plain = torch.zeros(2, 2, dtype=torch.bfloat16, device="meta")
    assert not head_loss._kernels_serve(plain, Vocabulary("", 0))  # another device
    for tensor, group, serves in (
        (torch.zeros(2, 2), "", True),
        (torch.zeros(2, 2), "tensor", False),
        (torch.zeros(2, 2, dtype=torch.float64), "", False),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head_loss, "_KERNEL_DEVICES", ("cpu",))
            assert head_loss._kernels_serve(tensor, Vocabulary(group, 0)) == serves
