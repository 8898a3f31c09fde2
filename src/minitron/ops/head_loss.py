"""Losses of an LM head with a large vocabulary: value and gradients in one pass over chunks of rows.

The logits of 4,096 tokens over a vocabulary of 256,000 take 4 GiB in fp32. Here a chunk of rows is projected, its loss
and the gradient of its logits are formed at once, the gradients of hidden states and head are added up, and the chunk
is dropped. `ops.loss` and `ops.kl` are what others call; this file is the one operator below them.

It is one operator to torch as well (`minitron::head_loss`), so that `torch.compile` takes it whole, and its shapes do
not depend on which rows are ignored.

Letters of shapes: N rows, D hidden, V vocabulary (of this process, where the head is sharded), K targets per row.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .autocast import autocast_dtype, without_autocast
from .head_gradient import HeadGradient
from .vocabulary import MOST_REDUCTIONS, Recording, Replay, Vocabulary

IGNORE_INDEX = -100
# Logits of one chunk: 128 MiB.
_CHUNK_BYTES = 1 << 27
# fp32 values that a few tensors of this size keep in the processor's cache while one operation follows another.
_CACHED_VALUES = 1 << 20
_SLICE = 16000

FORWARD_KL, REVERSE_KL, JSD = "forward_kl", "reverse_kl", "jsd"
KINDS = (FORWARD_KL, REVERSE_KL, JSD)


@dataclass(frozen=True)
class Shard:
    """The part of the vocabulary whose head rows this process holds; all processes hold the same hidden states."""

    group: str
    """Name of the process group (`group.group_name`) among whose processes the vocabulary is split."""
    start: int
    """Id of the first head row here."""


# --- the losses of some rows: each overwrites the logits with the gradient, and returns the loss of each row ------


def _forward_kl(rows: Vocabulary, s: Tensor, t: Tensor) -> Tensor:
    """KL(p_t || p_s) from log-probabilities; the gradient is p_s - p_t. Also overwrites `t`."""
    p_t = t.exp()
    value = rows.reduce(torch.linalg.vecdot(p_t, t.sub_(s)))
    s.exp_().sub_(p_t)
    return value


def _reverse_kl(rows: Vocabulary, s: Tensor, t: Tensor) -> Tensor:
    """KL(p_s || p_t); the gradient is p_s (log p_s - log p_t - KL)."""
    difference = torch.sub(s, t, out=t)
    p_s = s.exp_()
    value = rows.reduce(torch.linalg.vecdot(p_s, difference))
    p_s.mul_(difference.sub_(value[:, None]))
    return value


def _jsd(rows: Vocabulary, s: Tensor, t: Tensor) -> Tensor:
    """(KL(p_t || m) + KL(p_s || m)) / 2, m = (p_t + p_s) / 2; the gradient is p_s (log(p_s / m) - KL(p_s || m)) / 2."""
    log_m = torch.logaddexp(s, t).sub_(math.log(2))
    from_t = torch.linalg.vecdot(t.exp(), t.sub_(log_m))
    log_ratio = torch.sub(s, log_m, out=log_m)
    p_s = s.exp_()
    from_s = rows.reduce(torch.linalg.vecdot(p_s, log_ratio))
    p_s.mul_(log_ratio.sub_(from_s[:, None])).mul_(0.5)
    return (rows.reduce(from_t) + from_s) * 0.5


_DIVERGENCES: dict[str, Callable[[Vocabulary, Tensor, Tensor], Tensor]] = {
    FORWARD_KL: _forward_kl,
    REVERSE_KL: _reverse_kl,
    JSD: _jsd,
}


def _sparse_cross_entropy(rows: Vocabulary, s: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
    """-sum_k shares_k log p_s(ids_k); the gradient is (sum of shares) p_s, less the shares at their ids."""
    value = -(rows.pick(s, ids) * shares).sum(dim=-1)
    s.exp_().mul_(shares.sum(dim=-1, keepdim=True))
    rows.add_at(s, ids, -shares)
    return value


class _Sparse(NamedTuple):
    ids: Tensor
    shares: Tensor
    top: Tensor | None


@dataclass(frozen=True)
class _Loss:
    """What is computed from the logits of some rows."""

    rows: Vocabulary
    kind: str
    temperature: float
    ce_weight: float
    gradients: bool

    def __call__(self, s: Tensor, labels: Tensor, t: Tensor | None, sparse: _Sparse | None) -> Tensor:
        """(divergence, cross-entropy, agreements) summed over rows; overwrites `s` (R, V) with its gradient.

        Args:
            s: logits of the student; of at least fp32.
            labels: (R,).
            t: logits of the teacher, overwritten too; or else
            sparse: the teacher's distribution as few ids per row.
        """
        rows, labels = self.rows, labels[:, None]
        normalizer = rows.log_normalizer(s)
        sums = [torch.zeros((), dtype=s.dtype, device=s.device), (normalizer - rows.pick(s, labels)).sum()]
        top = rows.top(t) if t is not None else sparse.top if sparse is not None else None
        sums.append(sums[0] if top is None else (rows.top(s) == top).sum().to(s.dtype))
        hard = None
        if self.ce_weight and self.gradients:
            plain = t is None and sparse is None
            hard = torch.sub(s, normalizer, out=s if plain else None).exp_()
            rows.add_at(hard, labels, torch.full_like(normalizer, -1.0))
            if plain:
                s.mul_(self.ce_weight)
                return torch.stack(sums)
        if self.temperature != 1:
            s.div_(self.temperature)
            normalizer = rows.log_normalizer(s)
        s.sub_(normalizer)
        if t is not None:
            if self.temperature != 1:
                t.div_(self.temperature)
            sums[0] = _DIVERGENCES[self.kind](rows, s, t.sub_(rows.log_normalizer(t))).sum()
        elif sparse is not None:
            sums[0] = _sparse_cross_entropy(rows, s, sparse.ids, sparse.shares.to(s.dtype)).sum()
        if self.temperature != 1:
            s.div_(self.temperature)
        if hard is not None:
            s.add_(hard, alpha=self.ce_weight)
        return torch.stack(sums)


# Devices whose losses run as Triton kernels, where Triton is installed.
_KERNEL_DEVICES = ("cuda",)
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows of a tile of matrix products on a GPU: chunks are whole tiles.
_TILE = 128


def _kernels_serve(logits: Tensor, rows: Vocabulary) -> bool:
    """Whether `loss_kernels` computes the loss of these logits."""
    if logits.device.type not in _KERNEL_DEVICES or logits.dtype not in _KERNEL_DTYPES or rows.group:
        return False
    return importlib.util.find_spec("triton") is not None


# --- the operator ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    """What the operator is given, without the settings."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    ids: Tensor | None
    shares: Tensor | None
    top: Tensor | None

    @property
    def wide(self) -> torch.dtype:
        """Of sums and of the logits while they become gradients."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def differentiate(
        self, at: Tensor, loss_of: Callable[[slice], _Loss], in_cache: bool, columns: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the logits (R, columns) of the rows `at` (R,), and the sums of `_Loss`.

        Args:
            at: numbers of rows.
            loss_of: the loss of a part of them.
            in_cache: whether parts should fit into a processor's cache.
            columns: the tokens that count.
        """
        head = self.weight[columns]
        logits = self.hidden[at] @ head.t()
        teacher = None
        if self.teacher_hidden is not None and self.teacher_weight is not None:
            teacher = self.teacher_hidden[at] @ self.teacher_weight[columns].t()
        loss = loss_of(slice(None))
        if self.ids is None and _kernels_serve(logits, loss.rows):
            from .loss_kernels import differentiate

            return logits, differentiate(
                loss.rows,
                logits,
                teacher,
                self.labels[at],
                kind=loss.kind,
                temperature=loss.temperature,
                ce_weight=loss.ce_weight,
                gradients=loss.gradients,
                known=isinstance(loss.rows, Replay),
            )
        sums = torch.zeros(3, dtype=self.wide, device=logits.device)
        rows_at_once = max(1, _CACHED_VALUES // len(head)) if in_cache else max(1, len(at))
        for first in range(0, len(at), rows_at_once):
            part = slice(first, first + rows_at_once)
            some = at[part]
            s = logits[part].to(self.wide)
            t = None if teacher is None else teacher[part].to(self.wide)
            sparse = None
            if self.ids is not None and self.shares is not None:
                sparse = _Sparse(self.ids[some], self.shares[some], None if self.top is None else self.top[some])
            sums += loss_of(part)(s, self.labels[some], t, sparse)
            if logits.dtype != self.wide:
                logits[part] = s
        return logits, sums


@torch.library.custom_op("minitron::head_loss", mutates_args=())
def _head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    ids: Tensor | None,
    shares: Tensor | None,
    top: Tensor | None,
    kind: str,
    temperature: float,
    ce_weight: float,
    rows_per_chunk: int,
    need_hidden: bool,
    need_weight: bool,
    group: str,
    start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, sums, gradient of hidden, gradient of weight); `sums` are divergence, cross-entropy, agreements."""
    given = _Inputs(hidden, weight, labels, teacher_hidden, teacher_weight, ids, shares, top)
    need = need_hidden or need_weight
    loss = _Loss(Vocabulary(group, start), kind, temperature, ce_weight, need)
    sums = torch.zeros(3, dtype=given.wide, device=hidden.device)
    kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    grad_hidden = torch.zeros_like(hidden) if need_hidden else hidden.new_empty(0)
    of_head = HeadGradient(weight, len(kept), can_repeat=not group) if need_weight else None
    scale = 1 / max(1.0, num_items.item())
    in_cache = not group and hidden.device.type == "cpu"
    repeats = of_head is not None and of_head.repeats
    notes = sums.new_empty(MOST_REDUCTIONS, of_head.limit if of_head is not None and repeats else 0)

    def again(rows: Tensor, columns: slice) -> Tensor:
        """Gradients of the logits (R, columns) of the rows of `notes`."""

        def replay(part: slice) -> _Loss:
            return replace(loss, rows=Replay(start=columns.start, notes=iter(notes[:, : len(rows)][:, part])))

        logits, _ = given.differentiate(rows, replay, in_cache, columns)
        return logits

    def record(part: slice) -> _Loss:
        used = of_head.used if of_head is not None else 0
        return replace(loss, rows=Recording(notes=iter(notes[:, used : used + len(at)][:, part])))

    noting = record if repeats else lambda part: loss
    done = 0
    while done < len(kept):
        at = kept[done : done + (rows_per_chunk if of_head is None else of_head.next_rows(rows_per_chunk))]
        done += len(at)
        logits, more = given.differentiate(at, noting, in_cache)
        sums += more
        if need_hidden:
            # The factor goes into the product, before its one rounding; on 16-bit logits it would bias every gradient.
            product = torch.addmm(hidden[at], logits, weight, beta=0, alpha=scale)
            grad_hidden[at] = loss.rows.reduce(product)
        if of_head is not None:
            of_head.add(logits, hidden, at, scale)
            del logits
            if of_head.is_full:
                of_head.flush(hidden, scale, again)
    if of_head is not None:
        of_head.flush(hidden, scale, again)
    grad_weight = of_head.sum if of_head is not None else weight.new_empty(0)
    return (sums[0] + ce_weight * sums[1]) * scale, sums, grad_hidden, grad_weight


@_head_loss.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    need_hidden, need_weight = rest[-4], rest[-3]
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(3, dtype=wide),
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
    )


def _keep_gradients(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx, grad: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True; the gradients were formed as numbers
        raise RuntimeError("this loss has no second derivatives; use cross_entropy of the logits")
    of_hidden, of_weight = ctx.saved_tensors
    if grad is None:
        return (None,) * 17
    keep = torch.compiler.is_compiling() or _graph_is_kept()
    scaled = (_times(gradient, grad, keep) if gradient.numel() else None for gradient in (of_hidden, of_weight))
    return (*scaled, *((None,) * 15))


_head_loss.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _times(gradient: Tensor, factor: Tensor, keep: bool) -> Tensor:
    """The product, formed in fp32: a 16-bit factor would bias every gradient. In place unless `keep`."""
    if keep:
        return (gradient.to(factor.dtype) * factor).to(gradient.dtype)
    if factor.device.type == "cpu" and factor.item() == 1:
        return gradient
    for part in gradient.split(_SLICE):
        part.copy_(part.to(factor.dtype).mul_(factor))
    return gradient


def _graph_is_kept() -> bool:
    """Whether the running backward pass was asked to retain its graph; yes, where torch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # type: ignore[attr-defined]
    return ask is None or ask()


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items: Tensor | int | None,
    *,
    teacher: tuple[Tensor, Tensor] | None = None,
    sparse: tuple[Tensor, Tensor, Tensor | None] | None = None,
    kind: str = FORWARD_KL,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    rows_per_chunk: int | None = None,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over rows of divergence + `ce_weight` * cross-entropy, divided by `num_items`; and three plain sums.

    Args:
        hidden: (..., D).
        weight: (V, D), the head, or this process's part of it.
        labels: (...) integers; rows with -100 are ignored.
        num_items: divisor; the number of rows that are not ignored if None.
        teacher: hidden states (..., Dt) and head (V, Dt) of the teacher; or else
        sparse: ids (..., K), shares (..., K), and the teacher's most likely ids (...) if they are known.
        kind: which divergence, for dense teachers.
        temperature: divides the logits of both in the divergence.
        ce_weight: of the cross-entropy at `labels`, at temperature 1.
        rows_per_chunk: rows whose logits exist at one time.
        shard: set where the heads hold a part of the vocabulary.

    Returns:
        The loss, a scalar of at least fp32; (divergence, cross-entropy, rows where both have the same most likely
        token), summed over rows, without gradient.
    """
    width = hidden.shape[-1]
    hidden, labels = hidden.reshape(-1, width), labels.reshape(-1)
    dtype = autocast_dtype(hidden) or weight.dtype
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if rows_per_chunk is None:
        rows_per_chunk = max(1, _CHUNK_BYTES // (weight.element_size() * weight.shape[0]))
        if hidden.device.type == "cuda" and rows_per_chunk > _TILE:
            rows_per_chunk -= rows_per_chunk % _TILE
    count = (labels != IGNORE_INDEX).sum() if num_items is None else torch.as_tensor(num_items, device=hidden.device)
    teacher_hidden, teacher_weight, ids, shares, top = None, None, None, None, None
    if teacher is not None:
        teacher_weight = teacher[1].detach().to(autocast_dtype(hidden) or teacher[1].dtype)
        teacher_hidden = teacher[0].detach().reshape(-1, teacher[0].shape[-1]).to(teacher_weight.dtype)
    elif sparse is not None:
        ids, shares = (x.reshape(-1, x.shape[-1]) for x in sparse[:2])
        top = None if sparse[2] is None else sparse[2].reshape(-1)
    need = torch.is_grad_enabled()
    with without_autocast(hidden):
        loss, sums, _, _ = _head_loss(
            hidden,
            weight,
            labels,
            count,
            teacher_hidden,
            teacher_weight,
            ids,
            shares,
            top,
            kind,
            float(temperature),
            float(ce_weight),
            rows_per_chunk,
            need and hidden.requires_grad,
            need and weight.requires_grad,
            shard.group if shard else "",
            shard.start if shard else 0,
        )
    return loss, sums.detach()
