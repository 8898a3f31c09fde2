"""Classification of texts: labels as numbers, the loss, and predictions of a sequence classification head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.examples import Examples, Labelled
from .encoding import Encoder, LabelError, encode_texts, is_padding
from .models import pad_id
from .rows import PaddedBatch, Row, padded_batches

Problem = Literal["one", "several", "number"]
"""One label of some, any number of them, or a number."""
PROBLEM_TYPES = {
    "one": "single_label_classification",
    "several": "multi_label_classification",
    "number": "regression",
}
"""transformers' `problem_type`."""


@dataclass(frozen=True)
class LabelSet:
    """The labels of a task."""

    problem: Problem
    names: tuple[str, ...]
    """By their numbers; one name, "value", for regression."""

    @classmethod
    def of(cls, examples: Examples[Labelled], problem: Problem) -> LabelSet:
        """The labels of examples, sorted; names that are all integers by their value.

        Raises:
            LabelError: there are fewer than two, or one has a single example.
        """
        if problem == "number":
            return cls(problem, ("value",))
        counts = Counter(name for item in examples.items for name in _several(item.label))
        names = sorted(counts, key=lambda name: (0, int(name), name) if _is_integer(name) else (1, 0, name))
        if problem == "one" and len(names) < 2:
            raise LabelError(f"every row has the label {names[0]!r}; there must be at least two labels")
        if not names:
            raise LabelError("no row has a label")
        rare = [name for name in names if counts[name] < 2]
        if rare:
            where = next(
                p for i, p in zip(examples.items, examples.places, strict=True) if rare[0] in _several(i.label)
            )
            raise LabelError(
                f"label {rare[0]!r} has a single row ({where}), so it cannot be both learned and measured; "
                f"add rows with it or remove that one"
            )
        return cls(problem, tuple(names))

    def number(self, label: Any, place: str) -> Any:
        """A label as the head's target.

        Raises:
            LabelError: the label is none of these.
        """
        if self.problem == "number":
            return float(label)
        numbers = []
        for name in _several(label):
            if name not in self.names:
                known = ", ".join(map(repr, self.names))
                raise LabelError(f"{place}: label {name!r} is not among those of the training rows: {known:.300}")
            numbers.append(self.names.index(name))
        if self.problem == "one":
            return numbers[0]
        return [float(i in numbers) for i in range(len(self.names))]

    def config(self) -> dict[str, Any]:
        """The fields of a model's configuration."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
            "problem_type": PROBLEM_TYPES[self.problem],
        }

    @classmethod
    def of_config(cls, config: Any) -> LabelSet:
        """The labels of a saved model."""
        kinds = {kind: problem for problem, kind in PROBLEM_TYPES.items()}
        problem = kinds.get(config.problem_type or "", "one" if config.num_labels > 1 else "number")
        return cls(problem, tuple(config.id2label[i] for i in range(config.num_labels)))  # type: ignore[arg-type]


def _several(label: Any) -> tuple[str, ...]:
    return label if isinstance(label, tuple) else (label,)


def _is_integer(name: str) -> bool:
    return name.lstrip("-").isdecimal() and name.isascii()


def label_rows(
    tokenizer: Any,
    examples: Examples[Labelled],
    labels: LabelSet,
    most: int,
    encode: Encoder = encode_texts,
) -> list[Row]:
    """Examples as rows with the target `labels`.

    Raises:
        LabelError: a label is not known; a text has no tokens but padding.
    """
    texts = [(item.text, item.pair) for item in examples.items]
    pad = pad_id(tokenizer)
    rows = []
    encoded = encode(tokenizer, texts, most)
    for ids, item, place in zip(encoded, examples.items, examples.places, strict=True):
        if not set(ids) - {pad} or is_padding(tokenizer, item.text):
            raise LabelError(f"{place}: the text {item.text!r:.60} has no tokens but padding")
        rows.append(Row(tuple(ids), {"labels": labels.number(item.label, place)}))
    return rows


def class_weights(rows: Sequence[Row], count: int) -> Tensor:
    """(C,) fp32 that let every class weigh the same, with mean 1 over the rows."""
    counts = np.bincount([row.targets["labels"] for row in rows], minlength=count)
    return torch.tensor(len(rows) / (count * np.maximum(counts, 1)), dtype=torch.float32)


class LabelLoss(nn.Module):
    """The loss of a sequence classifier over the rows of a step: a `train.LossFunction`.

    Cross-entropy for one label of some, the mean binary cross-entropy over labels for several, squared error for a
    number; the mean over the rows of the whole step, whatever the batches.
    """

    def __init__(self, problem: Problem, weights: Tensor | None = None) -> None:
        super().__init__()
        self.problem = problem
        self.weights: Tensor | None
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, model: nn.Module, batch: PaddedBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The batch's part of the mean over `batch.num_items` rows."""
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
        loss = self.of_logits(logits, batch.targets["labels"]).sum() / batch.num_items
        return loss, {}

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B,) the loss of each row, from logits (B, C)."""
        if self.problem == "one":
            losses = F.cross_entropy(logits, targets, reduction="none")
            return losses if self.weights is None else losses * self.weights.to(losses.device)[targets]
        if self.problem == "several":
            return F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none").mean(-1)
        return (logits[:, 0] - targets.float()) ** 2


class DistilledLabelLoss(LabelLoss):
    """The mean of a `LabelLoss` and of what parts the logits from a teacher's: a `train.LossFunction`.

    That is the Kullback-Leibler divergence of the labels' probabilities, or the squared difference of a number. The
    batch has the target `teacher`, (B, C): the teacher's logits.
    """

    def forward(self, model: nn.Module, batch: PaddedBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The batch's part of the mean over `batch.num_items` rows, and that of the divergence as `kl`."""
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
        labels = self.of_logits(logits, batch.targets["labels"]).sum() / batch.num_items
        teacher = self.divergence(logits, batch.targets["teacher"].float()).sum() / batch.num_items
        return (labels + teacher) / 2, {} if self.problem == "number" else {"kl": teacher}

    def divergence(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """(B,) of logits (B, C) from the teacher's."""
        if self.problem == "number":
            return ((logits - teacher) ** 2)[:, 0]
        if self.problem == "one":
            shares = teacher.log_softmax(-1)
            return (shares.exp() * (shares - logits.log_softmax(-1))).sum(-1)
        yes = F.binary_cross_entropy_with_logits
        return (
            yes(logits, teacher.sigmoid(), reduction="none") - yes(teacher, teacher.sigmoid(), reduction="none")
        ).mean(-1)


@torch.no_grad()
def predict_logits(model: nn.Module, rows: Sequence[Row], pad: int, at_once: int = 32) -> np.ndarray:
    """Logits (N, C) fp32 of rows, in their order; rows of similar lengths share a batch."""
    device = next(model.parameters()).device
    out: np.ndarray | None = None
    for numbers, batch in padded_batches(rows, pad, at_once, device):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float().cpu().numpy()
        if out is None:
            out = np.zeros((len(rows), logits.shape[1]), np.float32)
        out[numbers] = logits
    assert out is not None, "no rows"
    return out


def probabilities(logits: np.ndarray, problem: Problem, temperature: float = 1.0) -> np.ndarray:
    """(N, C) float64 of logits (N, C): softmax for one label, sigmoid for several."""
    scaled = logits.astype(np.float64) / temperature
    if problem == "several":
        return 1 / (1 + np.exp(-np.clip(scaled, -500, 500)))
    scaled -= scaled.max(-1, keepdims=True)
    shares = np.exp(scaled)
    return shares / shares.sum(-1, keepdims=True)
