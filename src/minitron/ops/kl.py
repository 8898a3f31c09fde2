"""Distance of a student from a teacher over a large vocabulary, straight from hidden states and LM heads.

Sources: Hinton et al. 2015 for the temperature; Minitron (arXiv 2407.14679, section 2.3) for the forward KL; random
sampling of the teacher (arXiv 2503.16870). Unlike in the first, losses are not multiplied by the temperature squared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .head_loss import FORWARD_KL, IGNORE_INDEX, KINDS, Shard, head_loss


class Divergence(NamedTuple):
    """What a comparison of student and teacher gives; sums are over the rows whose label is not -100."""

    loss: Tensor
    """Scalar with a gradient: (divergence + ce_weight * cross_entropy) / num_items."""
    divergence: Tensor
    """Scalar, nats, summed over rows."""
    cross_entropy: Tensor
    """Scalar, nats, at temperature 1, summed over rows."""
    agreements: Tensor
    """Scalar: rows whose most likely token is the same for both."""


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    kind: str = FORWARD_KL,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    num_items: Tensor | int | None = None,
    rows_per_chunk: int | None = None,
    shard: Shard | None = None,
) -> Divergence:
    """Mean divergence between softmax(hidden @ weight.T / T) and that of the teacher; no logits of all rows exist.

    Args:
        hidden, weight: (..., D) and (V, D), the student's.
        teacher_hidden, teacher_weight: (..., Dt) and (V, Dt); constants.
        labels: (...) integers, the tokens to come; rows with -100 are ignored.
        kind: `forward_kl` KL(teacher || student), `reverse_kl` KL(student || teacher), or `jsd`, the Jensen-Shannon
            divergence (the mean KL of both to their mean).
        temperature: T above 0.
        ce_weight: weight of the cross-entropy at `labels` that is added.
        num_items: divisor; the number of rows that are not ignored if None.
        rows_per_chunk: rows whose logits exist at one time; by default as many as fill 128 MiB in fp32.
        shard: set where the heads hold a part of the vocabulary. Every process gets the whole loss, the whole
            gradient of `hidden`, and the gradient of its own part of `weight`.

    Raises:
        ValueError: vocabularies that differ, an unknown kind, or a temperature that is not above 0.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be greater than 0")
    if weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"the student's head has {weight.shape[0]} tokens and the teacher's {teacher_weight.shape[0]}; "
            f"both must have the same vocabulary"
        )
    loss, sums = head_loss(
        hidden,
        weight,
        labels,
        num_items,
        teacher=(teacher_hidden, teacher_weight),
        kind=kind,
        temperature=temperature,
        ce_weight=ce_weight,
        rows_per_chunk=rows_per_chunk,
        shard=shard,
    )
    return Divergence(loss, *sums.unbind())


def linear_sparse_divergence(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    shares: Tensor,
    entropy: Tensor,
    labels: Tensor,
    *,
    top: Tensor | None = None,
    ce_weight: float = 0.0,
    num_items: Tensor | int | None = None,
    rows_per_chunk: int | None = None,
    shard: Shard | None = None,
) -> Divergence:
    """As `linear_divergence` of kind `forward_kl`, with the teacher known at a few tokens only.

    The divergence of a row is -sum_k shares_k log p(ids_k) - entropy. Where the shares are counts of samples of the
    teacher and the entropy is the teacher's own, it and its gradient are unbiased estimates of KL(teacher || student)
    and of its gradient.

    Args:
        hidden, weight, labels, ce_weight, num_items, rows_per_chunk, shard: as of `linear_divergence`.
        ids: (..., K) int64 tokens; repeated ones add up.
        shares: (..., K) weights of these tokens; 0 for unused places.
        entropy: (...) nats.
        top: (...) int64, the teacher's most likely token; without it no agreements are counted.
    """
    loss, sums = head_loss(
        hidden,
        weight,
        labels,
        num_items,
        sparse=(ids, shares, top),
        ce_weight=ce_weight,
        rows_per_chunk=rows_per_chunk,
        shard=shard,
    )
    kept = labels != IGNORE_INDEX
    constant = (entropy * kept).sum().to(loss.dtype)
    count = kept.sum() if num_items is None else torch.as_tensor(num_items, device=loss.device)
    return Divergence(loss - constant / count.clamp(min=1), sums[0] - constant, sums[1], sums[2])
