"""Loss, and distance of logits, of several variants of a model at once, without the LM head or the logits in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import IGNORE_INDEX
from ..ops.loss import shift_labels
from .streaming import HEAD_BLOCK_BYTES, Removed, Walk

_HIDDEN_VALUES = 1 << 26
"""Values of the variants' hidden states that are in memory at a time: 256 MiB in fp32."""
_LOGIT_TOKENS = 2048


@dataclass(frozen=True)
class Judged:
    """How a variant predicts."""

    loss: float
    """Mean negative log-likelihood of the next token, in nats."""
    distance: float
    """Sum of squared differences from the whole model's logits over the sum of those logits' squares."""


@torch.no_grad()
def judge(walk: Walk, variants: Sequence[Removed], at_most: int | None = None) -> dict[Removed, Judged]:
    """Loss and distance of variants whose streams have gone through all layers. The head is read once per chunk.

    Args:
        walk: a finished walk.
        variants: which of its streams.
        at_most: number of tokens to look at, evenly spread; all that have a label if None.

    Raises:
        StreamError: the model has no LM head.
    """
    norm, head = walk.model.norm(), walk.model.head()
    streams = [walk.at[()], *(walk.at[key] for key in variants)]
    sums = torch.zeros(3, len(streams), dtype=torch.float64)  # nats, squared differences, squares
    tokens = 0
    per_chunk = max(64, _HIDDEN_VALUES // (len(streams) * walk.model.config.hidden_size))
    for rows, picked, targets in _chunks(walk, per_chunk, at_most):
        hidden = [
            norm(stream.get(rows).to(walk.model.device).flatten(0, 1)[picked.to(walk.model.device)])
            for stream in streams
        ]
        sums += _judge_chunk(hidden, targets.to(walk.model.device), head.blocks(HEAD_BLOCK_BYTES)).cpu()
        tokens += len(targets)
    loss, distance = sums[0] / tokens, sums[1] / sums[2]
    return {key: Judged(float(loss[i]), float(distance[i])) for i, key in enumerate([(), *variants])}


def _chunks(walk: Walk, size: int, at_most: int | None) -> Iterator[tuple[range, Tensor, Tensor]]:
    """(blocks, places within them, their targets), at most `size` places at a time."""
    targets = shift_labels(walk.blocks.labels)
    labelled = int((targets != IGNORE_INDEX).sum())
    stride = 1 if at_most is None else max(1, -(-labelled // at_most))
    seen = 0
    for rows in walk.groups:
        here = targets[rows.start : rows.stop].flatten()
        places = (here != IGNORE_INDEX).nonzero()[:, 0]
        chosen = places[(-seen) % stride :: stride]
        seen += len(places)
        for part in chosen.split(size):
            if len(part):
                yield rows, part, here[part]


def _judge_chunk(hidden: list[Tensor], targets: Tensor, head: Iterator[Tensor]) -> Tensor:
    """Sums over tokens, (3, variants): nats, squared differences from the first's logits, squares of the first's."""
    count = len(targets)
    highest = [h.new_full((count,), -torch.inf, dtype=torch.float64) for h in hidden]
    total = [h.new_zeros(count, dtype=torch.float64) for h in hidden]
    at_target = [h.new_zeros(count, dtype=torch.float64) for h in hidden]
    sums = torch.zeros(3, len(hidden), dtype=torch.float64, device=targets.device)
    first = 0
    for block in head:
        weight = block.to(hidden[0].device, hidden[0].dtype)
        inside = (targets >= first) & (targets < first + len(weight))
        column = (targets - first).clamp(0, len(weight) - 1)[:, None]
        for start in range(0, count, _LOGIT_TOKENS):
            part = slice(start, start + _LOGIT_TOKENS)
            reference = hidden[0][part] @ weight.T
            square = reference.square().sum(dtype=torch.float64)
            for i, h in enumerate(hidden):
                logits = reference if i == 0 else h[part] @ weight.T
                peak = torch.maximum(highest[i][part], logits.amax(1).double())
                new = (logits - peak[:, None].to(logits.dtype)).exp().sum(1, dtype=torch.float64)
                # The first block has no total to rescale, and -inf - peak is fine: exp gives 0.
                total[i][part] = total[i][part] * (highest[i][part] - peak).exp() + new
                highest[i][part] = peak
                found = logits.gather(1, column[part])[:, 0].double()
                at_target[i][part] += torch.where(inside[part], found, 0.0)
                sums[1, i] += (logits - reference).square().sum(dtype=torch.float64) if i else 0.0
                sums[2, i] += square
        first += len(weight)
    for i in range(len(hidden)):
        sums[0, i] = (highest[i] + total[i].log() - at_target[i]).sum()
    return sums
