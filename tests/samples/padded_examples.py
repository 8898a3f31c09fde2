"""Two streams that are not packed text: labelled rows, and conversations in which only answers are learned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAD = 0


@dataclass(frozen=True)
class PaddedBatch:
    """Examples of different lengths, padded on the right to the longest of them."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    """(B,) of rows; (B, T) of conversations, -100 where nothing is learned."""
    num_items: int

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> PaddedBatch:
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class Examples:
    """A `Stream` of (token ids, labels), shuffled anew in each epoch."""

    rows: Sequence[tuple[list[int], Any]]
    seed: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def key(self) -> dict[str, Any]:
        return {"rows": hashlib.sha256(json.dumps(self.rows).encode()).hexdigest(), "seed": self.seed}

    @property
    def origins(self) -> list[dict[str, Any]]:
        return []

    def check(self, vocab_size: int, sequence: int) -> None:
        for ids, _ in self.rows:
            if len(ids) > sequence:
                raise ValueError(f"an example has {len(ids)} tokens; the run's sequence is {sequence}")
            if max(ids) >= vocab_size:
                raise ValueError(f"token id {max(ids)}; the model's vocab_size is {vocab_size}")

    def at(self, position: int) -> tuple[list[int], Any]:
        epoch, inside = divmod(position, len(self))
        return self.rows[np.random.default_rng([self.seed, epoch]).permutation(len(self))[inside]]

    def batches(
        self, start: int, count: int, at_once: int, *, share: tuple[int, int] = (0, 1)
    ) -> Iterator[PaddedBatch]:
        step = [self.at(start + i) for i in range(count)]
        items = sum(scored(labels) for _, labels in step)
        number, ways = share
        mine = step[number * count // ways : (number + 1) * count // ways]
        for i in range(0, len(mine), at_once):
            yield padded(mine[i : i + at_once], items)


def scored(labels: Any) -> int:
    """Labels of an example that count in the loss."""
    return 1 if isinstance(labels, int) else sum(label != -100 for label in labels[1:])


def padded(examples: Sequence[tuple[list[int], Any]], items: int) -> PaddedBatch:
    ids = nn.utils.rnn.pad_sequence([torch.tensor(x) for x, _ in examples], batch_first=True, padding_value=PAD)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(x)).long() for x, _ in examples], batch_first=True)
    if isinstance(examples[0][1], int):
        labels = torch.tensor([label for _, label in examples])
    else:
        answers = [torch.tensor(label) for _, label in examples]
        labels = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-100)
    return PaddedBatch(ids, mask, labels, items)


def labelled_rows(count: int, seed: int = 0) -> Examples:
    """Rows of 3 to 9 tokens; the label is 1 if the last token is above 24."""
    random = np.random.default_rng(seed)
    rows = [random.integers(1, 50, random.integers(3, 10)).tolist() for _ in range(count)]
    return Examples([(ids, int(ids[-1] > 24)) for ids in rows], seed)


def conversations(count: int, seed: int = 0) -> Examples:
    """A question of 2 to 6 tokens, which is not learned, and an answer: its first token, counted on, 3 to 5 times."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        question = random.integers(1, 40, random.integers(2, 7)).tolist()
        answer = [question[0] + i for i in range(1, random.integers(4, 7))]
        rows.append(([*question, *answer], [*[-100] * len(question), *answer]))
    return Examples(rows, seed)


def row_loss(model: nn.Module, batch: PaddedBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Cross-entropy of the labels of rows, and how many are right."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    right = (logits.argmax(-1) == batch.labels).sum() / batch.num_items
    return F.cross_entropy(logits, batch.labels, reduction="sum") / batch.num_items, {"accuracy": right}


def answer_loss(model: nn.Module, batch: PaddedBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Cross-entropy of the next token where there is a label."""
    out = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        num_items_in_batch=batch.num_items,
        use_cache=False,
    )
    return out.loss, {}


@dataclass(frozen=True)
class Accuracy:
    """A `Measure` of rows."""

    rows: Examples

    def __call__(self, model: nn.Module) -> dict[str, float]:
        right = 0
        for ids, label in self.rows.rows:
            right += int(model(input_ids=torch.tensor([ids]), use_cache=False).logits.argmax(-1).item() == label)
        return {"accuracy": right / len(self.rows)}
