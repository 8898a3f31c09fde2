"""Learning from preferences: DPO, IPO and a reward head.

DPO: Rafailov et al. 2023, arXiv 2305.18290. IPO: Azar et al. 2023, arXiv 2310.12036, with log-probabilities averaged
over a reply's tokens, as its authors and TRL do. The reward head: the model of Bradley and Terry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import write_bytes
from ..ops.loss import IGNORE_INDEX, linear_cross_entropy, shift_labels
from .pairs import Pair, PairBatch, pad_pairs

Kind = Literal["sigmoid", "ipo"]
KINDS = ("sigmoid", "ipo")


def reply_log_probabilities(model: Any, batch: PairBatch) -> Tensor:
    """(2 B,) fp32: log-probabilities of the replies in nats, the logits computed a few rows at a time.

    At a vocabulary of 256,000 tokens all logits of a batch would take more memory than everything else.
    """
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    hidden = causal.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    targets = shift_labels(batch.labels)
    weight = causal.lm_head.weight
    if torch.is_grad_enabled() and weight.requires_grad:
        return _RowLogProbabilities.apply(hidden, weight, targets)  # type: ignore[no-any-return]
    return _row_log_probabilities(hidden, weight, targets)


def _row_log_probabilities(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(B,) of hidden states (B, T, D), head (V, D) and targets (B, T)."""
    return torch.stack([-linear_cross_entropy(h, weight, t, 1) for h, t in zip(hidden, targets, strict=True)])


class _RowLogProbabilities(torch.autograd.Function):
    """`_row_log_probabilities` with one gradient of the head.

    `linear_cross_entropy` finds the gradient in its forward pass, which would keep one of (V, D) for every row. Here
    the backward pass computes each row once more and adds to a single one.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        kind = hidden.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return _row_log_probabilities(hidden, weight, targets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets = ctx.saved_tensors
        of_hidden, of_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        head = weight.detach().requires_grad_()
        for row, factor in enumerate(gradients[0]):
            states = hidden[row].detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                loss = linear_cross_entropy(states, head, targets[row], 1)
            found = torch.autograd.grad(loss, (states, head), -factor)
            of_hidden[row] = found[0]
            of_weight += found[1]
        return of_hidden, of_weight, None


class PreferenceLoss(nn.Module):
    """DPO or IPO over the pairs of a step: a `train.LossFunction`.

    Args:
        kind: `sigmoid` (DPO) or `ipo`.
        beta: how strongly the reference holds: 1 over a temperature.
        sft_weight: of the mean negative log-likelihood of the chosen reply's tokens, averaged over the pairs; added.
    """

    def __init__(self, kind: Kind = "sigmoid", beta: float = 0.1, sft_weight: float = 0.0) -> None:
        super().__init__()
        self.kind, self.beta, self.sft_weight = kind, beta, sft_weight

    def forward(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The batch's part of the mean over `batch.num_items` pairs; logged: accuracy and margin of the rewards."""
        ours = reply_log_probabilities(model, batch)
        losses, margins = self.of_log_probabilities(ours, batch)
        if self.sft_weight:
            chosen = len(ours) // 2
            counts = (shift_labels(batch.labels) != IGNORE_INDEX).sum(-1)
            losses = losses - self.sft_weight * ours[:chosen] / counts[:chosen]
        accuracy = (margins > 0).float().sum() / batch.num_items
        return losses.sum() / batch.num_items, {
            "accuracy": accuracy, "margin": margins.detach().sum() / batch.num_items
        }  # fmt: skip

    def of_log_probabilities(self, ours: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """((B,) losses, (B,) margins of the implicit rewards) of log-probabilities (2 B,)."""
        assert batch.reference is not None, "pairs without the reference's log-probabilities"
        ratios = ours - batch.reference.to(ours.dtype)
        chosen, rejected = ratios.chunk(2)
        if self.kind == "ipo":
            counts = (shift_labels(batch.labels) != IGNORE_INDEX).sum(-1)
            per_token = (ratios / counts).chunk(2)
            losses = (per_token[0] - per_token[1] - 1 / (2 * self.beta)) ** 2
        else:
            losses = -F.logsigmoid(self.beta * (chosen - rejected))
        return losses, self.beta * (chosen - rejected)


class RewardLoss(nn.Module):
    """The negative log-probability that the chosen reply wins, by the rewards of a head with one output."""

    def forward(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The batch's part of the mean over `batch.num_items` pairs."""
        chosen, rejected = rewards(model, batch).chunk(2)
        accuracy = (chosen > rejected).float().sum() / batch.num_items
        return -F.logsigmoid(chosen - rejected).sum() / batch.num_items, {"accuracy": accuracy}


def rewards(model: nn.Module, batch: PairBatch) -> Tensor:
    """(2 B,) fp32."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()[:, 0]


@torch.no_grad()
def with_reference(model: nn.Module, pairs: Sequence[Pair], pad: int, file: Path, at_once: int = 4) -> list[Pair]:
    """Pairs with their log-probabilities under a model, from a file that an earlier run wrote, or computed and kept.

    Args:
        model: as it is before training.
        pairs: without reference.
        pad: id at padding.
        file: its name must tell model and pairs.
        at_once: pairs of a forward pass.
    """
    known = _kept(file, len(pairs))
    if known is None:
        device = next(model.parameters()).device
        known = np.zeros((len(pairs), 2))
        order = sorted(range(len(pairs)), key=lambda i: -max(len(pairs[i].chosen.ids), len(pairs[i].rejected.ids)))
        for first in range(0, len(order), at_once):
            numbers = order[first : first + at_once]
            batch = pad_pairs([pairs[i] for i in numbers], pad).to(device)
            known[numbers] = reply_log_probabilities(model, batch).double().cpu().numpy().reshape(2, -1).T
        write_bytes(file, known.astype("<f8").tobytes())
    return [replace(pair, reference=(float(a), float(b))) for pair, (a, b) in zip(pairs, known, strict=True)]


def _kept(file: Path, count: int) -> np.ndarray | None:
    if not file.is_file() or file.stat().st_size != 16 * count:
        return None
    return np.frombuffer(file.read_bytes(), "<f8").reshape(count, 2)
