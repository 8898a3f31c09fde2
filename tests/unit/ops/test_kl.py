"""Divergences without all logits, against formulas over whole matrices in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minitron.ops.head_loss import KINDS
from minitron.ops.kl import Divergence, linear_divergence, linear_sparse_divergence
from minitron.ops.loss import linear_cross_entropy


def draw(rows: int, width: int, vocab: int, ignored: float, scale: float, seed: int) -> tuple[Tensor, ...]:
    """Student's and teacher's (hidden, head) in float64, and labels."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    return (
        noise(rows, width) * scale,
        noise(vocab, width),
        noise(rows, width + 1) * scale,
        noise(vocab, width + 1),
        labels,
    )


def log_softmax(logits: Tensor) -> Tensor:
    top = logits.max(dim=-1, keepdim=True).values
    return logits - top - (logits - top).exp().sum(dim=-1, keepdim=True).log()


def formula(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Sum over rows of the divergence of softmaxes, term by term."""
    log_s, log_t = log_softmax(student / temperature), log_softmax(teacher / temperature)
    if kind == "forward_kl":
        return (log_t.exp() * (log_t - log_s)).sum()
    if kind == "reverse_kl":
        return (log_s.exp() * (log_s - log_t)).sum()
    log_m = ((log_s.exp() + log_t.exp()) / 2).log()
    return (log_t.exp() * (log_t - log_m)).sum() / 2 + (log_s.exp() * (log_s - log_m)).sum() / 2


def naive(
    kind: str, tensors: tuple[Tensor, ...], temperature: float, ce_weight: float, num_items: int | None
) -> Tensor:
    hidden, weight, teacher_hidden, teacher_weight, labels = tensors
    kept = labels != -100
    s, t = hidden[kept] @ weight.t(), teacher_hidden[kept] @ teacher_weight.t()
    ce = -log_softmax(s).gather(1, labels[kept][:, None]).sum()
    total = formula(kind, s, t, temperature) + ce_weight * ce
    return total / max(1, int(kept.sum()) if num_items is None else num_items)


cases = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 12),
        "width": st.integers(1, 8),
        "vocab": st.integers(1, 20),
        "ignored": st.floats(0, 1),
        "scale": st.sampled_from([0.1, 1.0, 5.0]),
        "seed": st.integers(0, 2**31),
    }
)


@settings(max_examples=80, deadline=None)
@given(
    cases,
    st.sampled_from(KINDS),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from([0.0, 0.25, 1.0]),
    st.integers(1, 5),
    st.sampled_from([None, 1, 7]),
)
def test_value_and_gradients_are_those_of_the_formula(
    case: dict[str, Any], kind: str, temperature: float, ce_weight: float, chunk: int, num_items: int | None
) -> None:
    tensors = draw(**case)
    hidden, weight = (tensors[i].requires_grad_() for i in (0, 1))
    expected = naive(kind, tensors, temperature, ce_weight, num_items)
    found = linear_divergence(
        *tensors,
        kind=kind,
        temperature=temperature,
        ce_weight=ce_weight,
        num_items=num_items,
        rows_per_chunk=chunk,
    )
    assert found.loss.dtype == torch.float64
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(found.loss * 2, (hidden, weight))
    theirs = torch.autograd.grad(expected * 2, (hidden, weight))
    size = max(1.0, hidden.abs().max().item(), weight.abs().max().item()) * case["rows"]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * size)


@settings(max_examples=40, deadline=None)
@given(cases, st.integers(1, 6), st.sampled_from([0.0, 0.5]), st.integers(1, 5))
def test_sparse_targets_are_their_formula(case: dict[str, Any], k: int, ce_weight: float, chunk: int) -> None:
    hidden, weight, _, _, labels = draw(**case)
    generator = torch.Generator().manual_seed(case["seed"])
    ids = torch.randint(0, case["vocab"], (case["rows"], k), generator=generator)  # some of them repeated
    shares = torch.rand(case["rows"], k, generator=generator, dtype=torch.float64)
    entropy = torch.rand(case["rows"], generator=generator, dtype=torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_()
    found = linear_sparse_divergence(
        hidden, weight, ids, shares, entropy, labels, ce_weight=ce_weight, rows_per_chunk=chunk
    )
    expected = torch.zeros((), dtype=torch.float64) + 0 * hidden.sum() + 0 * weight.sum()
    for row in range(case["rows"]):
        if labels[row] != -100:
            log_p = log_softmax(weight @ hidden[row])
            for i in range(k):
                expected = expected - shares[row, i] * log_p[ids[row, i]]
            expected = expected - entropy[row] - ce_weight * log_p[labels[row]]
    expected = expected / max(1, int((labels != -100).sum()))
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(found.loss, (hidden, weight))
    for a, b in zip(ours, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(cases)
def test_divergences_are_what_mathematics_says(case: dict[str, Any]) -> None:
    """Never negative, 0 for equal models; forward and reverse change places with the models; JSD is at most log 2."""
    hidden, weight, teacher_hidden, teacher_weight, labels = draw(**case)
    count = int((labels != -100).sum())
    values = {}
    for kind in KINDS:
        there = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, labels, kind=kind)
        back = linear_divergence(teacher_hidden, teacher_weight, hidden, weight, labels, kind=kind)
        values[kind] = (there.divergence.item(), back.divergence.item())
        assert there.divergence >= -1e-12
        equal = linear_divergence(hidden, weight, hidden, weight, labels, kind=kind).divergence.item()
        assert abs(equal) < (1e-14 if kind == "jsd" else 1e-300)  # the mean of two equal numbers is rounded in JSD
        assert there.agreements == back.agreements <= count
    assert values["forward_kl"] == pytest.approx(values["reverse_kl"][::-1], rel=1e-10, abs=1e-12)
    assert values["jsd"][0] == pytest.approx(values["jsd"][1], rel=1e-10, abs=1e-12)
    assert values["jsd"][0] <= count * math.log(2) + 1e-12


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_bf16_errors_are_not_above_those_of_the_textbook_loss(scale: float) -> None:
    """The textbook: bf16 logits, everything else in fp32. Error: relative distance from float64 on the same numbers."""
    tensors = draw(700, 48, 900, 0.0, scale, 0)
    narrow = [x.bfloat16() for x in tensors[:4]]
    wide = tuple(x.double() for x in narrow)
    hidden, weight = (wide[i].requires_grad_() for i in (0, 1))
    exact = naive("forward_kl", (*wide, tensors[4]), 1.0, 0.0, None)
    exact_gradients = torch.autograd.grad(exact, (hidden, weight))

    def errors(loss: Tensor, leaves: tuple[Tensor, ...]) -> list[float]:
        found = [x.double() for x in torch.autograd.grad(loss, leaves)]
        relative = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact_gradients, strict=True)]
        return [abs(loss.item() / exact.item() - 1), *relative]

    leaves = tuple(narrow[i].requires_grad_() for i in (0, 1))
    s, t = (narrow[0] @ narrow[1].t()).float(), (narrow[2] @ narrow[3].t()).float()
    textbook = errors(formula("forward_kl", s, t, 1.0) / 700, leaves)
    for chunk in (50, 700):
        ours = errors(linear_divergence(*narrow, tensors[4], rows_per_chunk=chunk).loss, leaves)
        for a, b in zip(ours, textbook, strict=True):
            assert a <= 1.02 * b + 1e-6


@pytest.mark.parametrize("rows_kept", [30, 50, 59])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (2.0, 0.7)])
def test_columns_whose_gradient_is_not_kept_are_computed_again(
    monkeypatch: pytest.MonkeyPatch, kind: str, temperature: float, ce_weight: float, rows_kept: int
) -> None:
    """The same numbers as when all are kept, up to where the sum would be rounded in between (fewer than 45 rows)."""
    tensors = draw(60, 8, 40, 0.2, 1.0, 0)
    narrow = [x.bfloat16().requires_grad_(i < 2) for i, x in enumerate(tensors[:4])]
    more: Any = {"kind": kind, "temperature": temperature, "ce_weight": ce_weight, "rows_per_chunk": 7}
    sparse = torch.randint(0, 40, (60, 3)), torch.rand(60, 3), torch.rand(60)

    def outcomes() -> list[Tensor]:
        found = []
        for loss in (
            linear_divergence(*narrow, tensors[4], **more).loss,
            linear_sparse_divergence(*narrow[:2], *sparse, tensors[4], ce_weight=ce_weight, rows_per_chunk=7).loss,
            linear_cross_entropy(*narrow[:2], tensors[4], rows_per_chunk=7),
        ):
            found += [loss.detach(), *torch.autograd.grad(loss, narrow[:2])]
        return found

    kept = outcomes()
    scored = int((tensors[4] != -100).sum())
    monkeypatch.setattr("minitron.ops.head_gradient._KEPT_VALUES", 40 * rows_kept * scored // 60)
    monkeypatch.setattr("minitron.ops.head_gradient._PIECE", 9 * 45)
    monkeypatch.setattr("minitron.ops.head_gradient._PRODUCT", 4 * 45)
    for found, expected in zip(outcomes(), kept, strict=True):
        # One rounding to bf16 of sums in another order, or of two sums.
        rtol, atol = (2e-2, 1e-3) if rows_kept < 45 else (2**-7, 1e-5)
        torch.testing.assert_close(found.float(), expected.float(), rtol=rtol, atol=atol)


def test_a_head_gradient_that_fills_what_is_kept_is_still_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = draw(60, 8, 40, 0.2, 1.0, 0)
    narrow = [x.bfloat16().requires_grad_(i == 1) for i, x in enumerate(tensors[:4])]
    once = torch.autograd.grad(linear_divergence(*narrow, tensors[4]).loss, narrow[1])[0]
    monkeypatch.setattr("minitron.ops.head_gradient._KEPT_VALUES", 40 * 13)
    monkeypatch.setattr("minitron.ops.head_gradient._PIECE", 16 * 13)
    often = torch.autograd.grad(linear_divergence(*narrow, tensors[4]).loss, narrow[1])[0]
    torch.testing.assert_close(often.float(), once.float(), rtol=2e-2, atol=1e-3)


def test_more_rows_than_32_bits_count_logits_for() -> None:
    """8,400 rows of 256,000 logits are more than 2^31; the last row must count as it does alone."""
    generator = torch.Generator().manual_seed(0)
    rows, vocab = 8400, 256000
    hidden = torch.randn(rows, 2, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(vocab, 2, generator=generator).bfloat16()
    labels = torch.full((rows,), 1)
    labels[10:-10] = -100
    few = torch.cat([hidden[:10], hidden[-10:]]).detach().requires_grad_()
    for only_few, given_hidden in ((True, few), (False, hidden)):
        targets = labels[labels != -100] if only_few else labels
        linear_divergence(
            given_hidden, weight, given_hidden.detach() * 2, weight, targets, num_items=20
        ).loss.backward()
    assert hidden.grad is not None
    assert few.grad is not None
    assert torch.equal(torch.cat([hidden.grad[:10], hidden.grad[-10:]]), few.grad)
    assert hidden.grad[10:-10].abs().max() == 0
    whole = torch.full((rows,), vocab - 1)
    hidden, weight = hidden.detach().float().requires_grad_(), weight.float()  # four times as fast as bf16 on a CPU
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, whole, num_items=1), hidden)
    alone = hidden[-3:].detach().requires_grad_()
    linear_cross_entropy(alone, weight, whole[-3:], num_items=1).backward()
    assert torch.equal(gradient[-3:], alone.grad)  # type: ignore[arg-type]


def test_it_compiles_into_one_graph() -> None:
    tensors = draw(20, 6, 30, 0.3, 1.0, 0)
    hidden, weight = (tensors[i].requires_grad_() for i in (0, 1))

    def loss(hidden: Tensor, weight: Tensor) -> Divergence:
        return linear_divergence(hidden * 2, weight, *tensors[2:], ce_weight=0.5)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(hidden, weight), loss(hidden, weight)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(torch.autograd.grad(x.loss * 3, (hidden, weight)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
    settings_of_op = ("jsd", 1.0, 0.0, 4, True, True, "", 0)
    torch.library.opcheck(
        torch.ops.minitron.head_loss.default,
        (hidden, weight, tensors[4], torch.tensor(3), *tensors[2:4], None, None, None, *settings_of_op),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_second_derivatives_are_refused_not_wrong() -> None:
    tensors = draw(6, 4, 9, 0.0, 1.0, 0)
    hidden = tensors[0].requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(linear_divergence(*tensors).loss, hidden, create_graph=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "kl"}, "kind is 'kl'; it must be one of forward_kl, reverse_kl, jsd"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be greater than 0"),
        ({"teacher_weight": torch.zeros(8, 5)}, "the student's head has 9 tokens and the teacher's 8"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], says: str) -> None:
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight", "labels")
    tensors = dict(zip(names, draw(6, 4, 9, 0.0, 1.0, 0), strict=True))
    with pytest.raises(ValueError, match="must") as error:
        linear_divergence(**{**tensors, **change})
    assert says in str(error.value)
