"""Cross-entropy straight from hidden states and the LM head, without the logits of all tokens in memory.

At a vocabulary of 256,000 the logits of 4,096 tokens take 4 GiB in fp32, and the textbook loss holds several such
tensors. Here a chunk of rows is projected, its loss and gradients are taken at once, and the chunk is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .autocast import autocast_dtype, without_autocast

IGNORE_INDEX = -100
# fp32 values in the logits of one chunk: 32 Mi of them are 128 MiB.
CHUNK_VALUES = 1 << 25


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; gradients are formed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, rows_per_chunk: int) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Summed over many chunks, so in fp32 whatever the dtype of the weights.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, hidden.shape[0], rows_per_chunk):
            rows = slice(start, start + rows_per_chunk)
            h, y = hidden[rows], labels[rows, None]
            logits = F.linear(h, weight).float()
            log_normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += (log_normalizer - logits.gather(1, y)).sum()
            if not (need_hidden or need_weight):
                continue
            grad_logits = logits.sub_(log_normalizer).exp_()  # softmax, in the memory of the logits
            grad_logits.scatter_add_(1, y, torch.full_like(y, -1, dtype=grad_logits.dtype))
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                if weight.dtype == torch.float32:
                    grad_weight.addmm_(grad_logits.t(), h)
                else:
                    grad_weight += grad_logits.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(  # type: ignore[override]
        ctx, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True; the gradients were formed as numbers
            raise RuntimeError("linear_cross_entropy has no second derivatives; use cross_entropy of the logits")
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            # In fp32: the factor is one over the number of targets, and a 16-bit one would bias every gradient.
            wide = torch.promote_types(grad_hidden.dtype, torch.float32)
            grad_hidden = (grad_hidden.to(wide) * grad).to(grad_hidden.dtype)
        if grad_weight is not None:
            # The buffer is this function's own. It is given away unless the graph stays for another backward pass.
            scaled = grad_weight * grad if _graph_is_kept() else grad_weight.mul_(grad)
            grad_weight = scaled.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def _graph_is_kept() -> bool:
    """Whether the running backward pass was asked to retain its graph; yes, where torch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # type: ignore[attr-defined]
    return ask is None or ask()


def shift_labels(labels: Tensor) -> Tensor:
    """Labels (B, T) moved one to the left, so that position t is judged by token t + 1; the last is ignored."""
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_items: Tensor | int | None = None,
    rows_per_chunk: int | None = None,
) -> Tensor:
    """Mean cross-entropy of `softmax(hidden @ weight.T)` at `targets`, in nats, as an fp32 scalar.

    Args:
        hidden: (N, D) or (B, T, D).
        weight: (V, D), the LM head.
        targets: integers of the shape of `hidden` less its last dimension; -100 is left out.
        num_items: divisor; the number of targets that are not -100 if None. With none of them the result is 0,
            and so is every gradient.
        rows_per_chunk: rows whose logits exist at one time; by default as many as fill 128 MiB.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    kept = targets != IGNORE_INDEX
    hidden, targets = hidden[kept], targets[kept]
    dtype = autocast_dtype(hidden)
    if dtype is not None:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    hidden = hidden.to(weight.dtype)
    if rows_per_chunk is None:
        rows_per_chunk = max(1, CHUNK_VALUES // weight.shape[0])
    with without_autocast(hidden):
        total = _LinearCrossEntropy.apply(hidden, weight, targets, rows_per_chunk)
    return _per_item(total, kept.sum() if num_items is None else num_items)  # type: ignore[arg-type]


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
