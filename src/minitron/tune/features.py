"""Training a head on a backbone that does not change: its hidden states are computed once, and only they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .labels import LabelLoss
from .rows import Row, RowStream, padded_batches


@torch.no_grad()
def features_of(model: Any, rows: Sequence[Row], pad: int, at_once: int = 32) -> Tensor:
    """(N, D) fp32: the last hidden state of each row at its last token that is not `pad`, which a sequence classifier
    judges."""
    model.eval()
    device = next(model.parameters()).device
    out = torch.zeros(len(rows), model.config.hidden_size)
    for numbers, batch in padded_batches(rows, pad, at_once, device):
        hidden = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        places = torch.arange(batch.input_ids.shape[1], device=device)
        last = (places * (batch.input_ids != pad)).argmax(-1)
        out[numbers] = hidden[torch.arange(len(numbers), device=device), last].float().cpu()
    return out


@dataclass(frozen=True)
class FeatureBatch:
    """Hidden states with targets: a `train.stream.TrainingBatch`."""

    features: Tensor
    """(B, D) fp32."""
    targets: dict[str, Tensor]
    num_items: int
    """Rows of the whole optimizer step."""

    @property
    def num_tokens(self) -> int:
        """Rows: no tokens are read."""
        return len(self.features)

    def to(self, device: torch.device | str) -> FeatureBatch:
        """The batch on a device."""
        targets = {name: value.to(device) for name, value in self.targets.items()}
        return replace(self, features=self.features.to(device), targets=targets)


class FeatureStream:
    """The hidden states of rows in the order of a `RowStream` over the same rows: a `train.stream.Stream`."""

    def __init__(self, rows: Sequence[Row], features: Tensor, order: RowStream) -> None:
        self._rows, self._features, self._order = list(rows), features, order

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self._rows)

    @property
    def key(self) -> Mapping[str, Any]:
        """As of `Stream`."""
        return self._order.key

    @property
    def origins(self) -> list[dict[str, Any]]:
        """As of `Stream`."""
        return []

    def check(self, vocab_size: int, sequence: int) -> None:
        """As of `Stream`."""
        self._order.check(vocab_size, sequence)

    def batches(self, start: int, count: int, at_once: int, *, share: tuple[int, int] = (0, 1)) -> list[FeatureBatch]:
        """As of `Stream`."""
        number, ways = share
        numbers = [self._order.number_at(start + i) for i in range(count)]
        mine = numbers[number * count // ways : (number + 1) * count // ways]
        return [self._batch(mine[first : first + at_once], count) for first in range(0, len(mine), at_once)]

    def _batch(self, numbers: list[int], count: int) -> FeatureBatch:
        rows = [self._rows[number] for number in numbers]
        targets = {name: torch.tensor([row.targets[name] for row in rows]) for name in rows[0].targets}
        return FeatureBatch(self._features[numbers], targets, count)


class FeatureLoss(nn.Module):
    """A `LabelLoss` of the head alone: a `train.LossFunction`."""

    def __init__(self, loss: LabelLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, model: Any, batch: FeatureBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The batch's part of the mean over `batch.num_items` rows."""
        logits = model.score(batch.features).float()
        return self.loss.of_logits(logits, batch.targets["labels"]).sum() / batch.num_items, {}
