"""Losses of some rows of logits, and the gradients of the logits, as two Triton kernels.

What `head_loss` does with a dozen operations over the logits in fp32 takes two here, and no fp32 copy of them: the
first reads a row and finds what is summed over the vocabulary (normalizers, divergence, cross-entropy), the second
overwrites logits with their gradients. All arithmetic is in fp32. Sparse targets and vocabularies that are split among
processes are not for these kernels.

Letters of shapes: R rows, V vocabulary.
"""

# Kernels are written in a language of their own inside Python, whose constants and tensors type checkers do not know.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .vocabulary import Vocabulary

# What the first kernel finds, in the order in which it stores it.
_HARD, _SOFT, _TEACHER, _NOTE, _VALUE, _CROSS_ENTROPY, _AGREES = range(7)
_WIDTH = tl.constexpr(8)
_KINDS = {"forward_kl": 1, "reverse_kl": 2, "jsd": 3}
_FORWARD, _REVERSE, _JSD = (tl.constexpr(number) for number in _KINDS.values())
_LOG_2 = tl.constexpr(0.6931471805599453)
# Columns that a program reads at a time, by arithmetic: not measured on a GPU.
_BLOCK = 4096


@triton.jit
def _extended(top, total, values):
    """A running (largest, sum of exponentials less the largest) with a block of values more."""
    new_top = tl.maximum(top, tl.max(values, axis=0))
    return new_top, total * tl.exp(top - new_top) + tl.sum(tl.exp(values - new_top), axis=0)


@triton.jit
def _log_mean(a, b):
    """log((exp(a) + exp(b)) / 2)."""
    top = tl.maximum(a, b)
    return top + tl.log(tl.exp(a - top) + tl.exp(b - top)) - _LOG_2


@triton.jit
def _statistics(
    student, teacher, labels, found, V, inverse, KIND: tl.constexpr, SOFT: tl.constexpr, BLOCK: tl.constexpr
):
    """What is summed over the vocabulary in one row; `teacher` is None without one."""
    row = tl.program_id(0).to(tl.int64)
    lowest = -float("inf")
    soft_top, soft_sum, hard_top, hard_sum, t_top, t_sum = lowest, 0.0, lowest, 0.0, lowest, 0.0
    best_s, best_t, s_id, t_id = lowest, lowest, 0, 0
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s = tl.load(student + row * V + columns, mask=columns < V, other=lowest).to(tl.float32)
        soft_top, soft_sum = _extended(soft_top, soft_sum, s * inverse)  # pyright: ignore[reportGeneralTypeIssues]
        if SOFT:
            hard_top, hard_sum = _extended(hard_top, hard_sum, s)
        if KIND != 0:
            t = tl.load(teacher + row * V + columns, mask=columns < V, other=lowest).to(tl.float32)
            t_top, t_sum = _extended(t_top, t_sum, t * inverse)
            here_s, here_t = tl.max(s, axis=0), tl.max(t, axis=0)
            s_id = tl.where(here_s > best_s, first + tl.argmax(s, axis=0), s_id)
            t_id = tl.where(here_t > best_t, first + tl.argmax(t, axis=0), t_id)
            best_s, best_t = tl.maximum(best_s, here_s), tl.maximum(best_t, here_t)
    soft = soft_top + tl.log(soft_sum)
    hard = soft
    if SOFT:
        hard = hard_top + tl.log(hard_sum)
    to = found + row * _WIDTH
    tl.store(to + 0, hard)
    tl.store(to + 1, soft)
    label = tl.load(labels + row)
    tl.store(to + 5, hard - tl.load(student + row * V + label).to(tl.float32))
    if KIND != 0:
        normalizer = t_top + tl.log(t_sum)
        note = tl.zeros((BLOCK,), tl.float32)
        rest = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, V, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            inside = columns < V
            log_s = tl.load(student + row * V + columns, mask=inside, other=0.0).to(tl.float32) * inverse - soft
            log_t = tl.load(teacher + row * V + columns, mask=inside, other=0.0).to(tl.float32) * inverse - normalizer
            if KIND == _FORWARD:
                rest += tl.where(inside, tl.exp(log_t) * (log_t - log_s), 0.0)
            elif KIND == _REVERSE:
                note += tl.where(inside, tl.exp(log_s) * (log_s - log_t), 0.0)
            else:
                log_m = _log_mean(log_s, log_t)
                note += tl.where(inside, tl.exp(log_s) * (log_s - log_m), 0.0)
                rest += tl.where(inside, tl.exp(log_t) * (log_t - log_m), 0.0)
        of_s = tl.sum(note, axis=0)
        tl.store(to + 2, normalizer)
        tl.store(to + 3, of_s)
        tl.store(to + 4, (of_s + tl.sum(rest, axis=0)) * (0.5 if KIND == _JSD else 1.0))
        tl.store(to + 6, (s_id == t_id).to(tl.float32))


@triton.jit
def _gradient(
    student,
    teacher,
    labels,
    hard,
    soft,
    normalizer,
    note,
    V,
    start,
    inverse,
    ce_weight,
    KIND: tl.constexpr,
    CE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite a block of one row's logits with their gradients; `start` is the id of the first column."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    s = tl.load(student + row * V + columns, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.zeros((BLOCK,), tl.float32)
    if KIND != 0:
        log_s = s * inverse - tl.load(soft + row)
        t = tl.load(teacher + row * V + columns, mask=inside, other=0.0).to(tl.float32)
        log_t = t * inverse - tl.load(normalizer + row)
        if KIND == _FORWARD:
            gradient = tl.exp(log_s) - tl.exp(log_t)
        elif KIND == _REVERSE:
            gradient = tl.exp(log_s) * (log_s - log_t - tl.load(note + row))
        else:
            gradient = 0.5 * tl.exp(log_s) * (log_s - _log_mean(log_s, log_t) - tl.load(note + row))
        gradient = gradient * inverse
    if CE:
        here = tl.where(columns + start == tl.load(labels + row), 1.0, 0.0)
        gradient += ce_weight * (tl.exp(s - tl.load(hard + row)) - here)
    tl.store(student + row * V + columns, gradient, mask=inside)


def differentiate(
    rows: Vocabulary,
    logits: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    kind: str,
    temperature: float,
    ce_weight: float,
    gradients: bool,
    known: bool,
) -> Tensor:
    """(divergence, cross-entropy, agreements) summed over rows, (3,) fp32; overwrites logits with their gradient.

    Args:
        rows: what sums over the vocabulary go through, four numbers per row; `start` is the id of the first column.
        logits: (R, V) of the student, contiguous, in bf16, fp16 or fp32.
        teacher: (R, V) logits of the teacher, contiguous; None for cross-entropy alone.
        labels: (R,) int64.
        kind: the divergence.
        temperature: divides the logits of both in it.
        ce_weight: of the cross-entropy in the gradient.
        gradients: whether the gradient is wanted.
        known: `rows` knows the sums over the whole vocabulary, of which `logits` are some columns; the result is 0.
    """
    R, V = logits.shape
    number = 0 if teacher is None else _KINDS[kind]
    found = torch.zeros((R, _WIDTH.value), dtype=torch.float32, device=logits.device)
    if R and not known:
        _statistics[(R,)](
            logits, teacher, labels, found, V, 1 / temperature,
            KIND=number, SOFT=temperature != 1, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    hard, soft, normalizer, note = (
        rows.reduce(found[:, at].contiguous()).contiguous() for at in (_HARD, _SOFT, _TEACHER, _NOTE)
    )
    if R and gradients:
        _gradient[(R, triton.cdiv(V, _BLOCK))](
            logits, teacher, labels, hard, soft, normalizer, note, V, rows.start, 1 / temperature, ce_weight,
            KIND=number, CE=ce_weight != 0, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return found[:, [_VALUE, _CROSS_ENTROPY, _AGREES]].sum(0)
