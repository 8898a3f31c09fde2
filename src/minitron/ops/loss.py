"""Cross-entropy: of logits, and straight from hidden states and the LM head without the logits of all tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .head_loss import IGNORE_INDEX, Shard, head_loss

# Up to so many logits the plain loss takes no more memory than is free to take: 128 MiB in fp32.
CHUNK_VALUES = 1 << 25


def shift_labels(labels: Tensor) -> Tensor:
    """Labels (B, T) moved one to the left, so that position t is judged by token t + 1; the last is ignored."""
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_items: Tensor | int | None = None,
    rows_per_chunk: int | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """Mean cross-entropy of `softmax(hidden @ weight.T)` at `targets`, in nats, as a scalar of at least fp32.

    Args:
        hidden: (N, D) or (B, T, D).
        weight: (V, D), the LM head.
        targets: integers of the shape of `hidden` less its last dimension; -100 is ignored.
        num_items: divisor; the number of targets that are not -100 if None. With none of them the result is 0,
            and so is every gradient.
        rows_per_chunk: rows whose logits exist at one time; by default as many as fill 128 MiB.
        shard: set where `weight` is a part of the head; see `ops.kl.linear_divergence`.
    """
    return head_loss(hidden, weight, targets, num_items, ce_weight=1.0, rows_per_chunk=rows_per_chunk, shard=shard)[0]


def cross_entropy(logits: Tensor, targets: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Mean cross-entropy of `logits` (..., V) at `targets` (...), in nats, as an fp32 scalar.

    As `torch.nn.functional.cross_entropy` in fp32, but 0 with a zero gradient when every target is -100.
    """
    logits, targets = logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1)
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return _per_item(total, (targets != IGNORE_INDEX).sum() if num_items is None else num_items)


def _per_item(total: Tensor, num_items: Tensor | int) -> Tensor:
    if isinstance(num_items, Tensor):
        return total / num_items.to(total.device).clamp(min=1)
    return total / max(num_items, 1)
