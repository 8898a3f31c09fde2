"""Loss, and distance of logits, of several variants of a model at once, without the LM head or the logits in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.loss import IGNORE_INDEX, shift_labels
from .streaming import HEAD_BLOCK_BYTES, Removed, StreamError, Walk

_HIDDEN_VALUES = 1 << 26
"""Values of the variants' hidden states that are in memory at a time: 256 MiB in fp32."""
_LOGIT_TOKENS = 2048


@dataclass(frozen=True)
class Judged:
    """Loss and distance of a variant, as sums over tokens, which add up over batches and processes."""

    tokens: int
    nats: float
    squared_difference: float
    """From the whole model's logits."""
    squares: float
    """Of the whole model's logits."""

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the next token, in nats."""
        return self.nats / self.tokens

    @property
    def distance(self) -> float:
        """Mean squared difference of the logits, normalized by their mean square (arXiv 2511.16664)."""
        return self.squared_difference / self.squares

    def __add__(self, other: Judged) -> Judged:
        return Judged(
            self.tokens + other.tokens,
            self.nats + other.nats,
            self.squared_difference + other.squared_difference,
            self.squares + other.squares,
        )


@torch.no_grad()
def judge(walk: Walk, variants: Sequence[Removed] = (), at_most: int | None = None) -> dict[Removed, Judged]:
    """The whole model, named (), and variants whose streams have gone through all layers.

    Args:
        walk: a finished walk.
        variants: which of its streams.
        at_most: most tokens to use, evenly spread; all that have a label if None.

    Raises:
        StreamError: the model has no LM head, or no token has a label.
    """
    norm, head, device = walk.model.norm(), walk.model.head(), walk.model.device
    streams = [walk.at[()], *(walk.at[key] for key in variants)]
    sums = torch.zeros(3, len(streams), dtype=torch.float64)
    tokens = 0
    per_chunk = max(64, _HIDDEN_VALUES // (len(streams) * walk.model.config.hidden_size))
    for rows, picked, targets in _chunks(walk, per_chunk, at_most):
        hidden = [norm(stream.get(rows).flatten(0, 1)[picked].to(device)) for stream in streams]
        sums += _judge_chunk(hidden, targets.to(device), head.blocks(HEAD_BLOCK_BYTES)).cpu()
        tokens += len(targets)
    if not tokens:
        raise StreamError("no token of the calibration blocks has a label, so there is no loss")
    return {key: Judged(tokens, *sums[:, i].tolist()) for i, key in enumerate([(), *variants])}


def _chunks(walk: Walk, size: int, at_most: int | None) -> Iterator[tuple[range, Tensor, Tensor]]:
    """(blocks, positions within them, their targets), at most `size` positions at a time."""
    targets = shift_labels(walk.blocks.labels)
    labelled = int((targets != IGNORE_INDEX).sum())
    stride = 1 if at_most is None else max(1, -(-labelled // at_most))
    seen = 0
    for rows in walk.groups:
        here = targets[rows.start : rows.stop].flatten()
        positions = (here != IGNORE_INDEX).nonzero()[:, 0]
        chosen = positions[(-seen) % stride :: stride]
        seen += len(positions)
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
