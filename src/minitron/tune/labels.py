"""Classification of texts: labels as numbers, the loss, and predictions of a sequence classification head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.examples import Examples, Labelled
from ..templates import render_conversation
from .rows import PaddedBatch, Row, by_length, pad_rows

Problem = Literal["one", "several", "number"]
"""One label of some, any number of them, or a number."""
PROBLEM_TYPES = {
    "one": "single_label_classification",
    "several": "multi_label_classification",
    "number": "regression",
}
"""transformers' `problem_type`."""


PLACEHOLDER = "MESSAGE OF THE USER"


class LabelError(ValueError):
    """Labels that cannot be learned or compared."""


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


def encode_texts(tokenizer: Any, texts: Sequence[tuple[str, str | None]], most: int) -> list[list[int]]:
    """Token ids of texts or pairs of texts, as the tokenizer encodes them; longer ones are cut at their end.

    Both texts of a pair are cut, the longer one first.
    """
    pairs = any(pair is not None for _, pair in texts)
    first = [text for text, _ in texts]
    second = [pair or "" for _, pair in texts] if pairs else None
    encoded = tokenizer(first, second, truncation=True, max_length=most)["input_ids"]
    return [list(ids) for ids in encoded]


def encode_turns(tokenizer: Any, texts: Sequence[tuple[str, str | None]], most: int) -> list[list[int]]:
    """Token ids of messages: each text as a user's, up to the heading of the answer; the second text, if there is one,
    as the answer. This is what a guard of `minitron serve` reads of a prompt and of an answer.

    Messages that are too long are cut at their end, the answer as well as the question.

    Raises:
        LabelError: the tokenizer has no chat template, or one that does not repeat the message.
    """
    if tokenizer.chat_template is None:
        raise LabelError("the model has no chat template, so texts cannot be rendered as messages; leave out --chat")
    rendered = render_conversation(
        tokenizer, [{"role": "user", "content": PLACEHOLDER}], tools=None, add_generation_prompt=True
    )
    head, mark, tail = rendered.partition(PLACEHOLDER)
    if not mark:
        raise LabelError("the chat template does not repeat the user's message, so --chat cannot be used")

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    room = most - len(ids(head + tail)) - 2  # tokens may join differently at the two seams
    if room < 2:
        raise LabelError(f"texts may have {most} tokens, which the chat template alone takes")

    def cut(text: str, room: int) -> str:
        found = ids(text)
        return text if len(found) <= room else tokenizer.decode(found[:room], clean_up_tokenization_spaces=False)

    encoded = []
    for text, answer in texts:
        asked = cut(text.strip(), room if answer is None else room // 2)
        encoded.append(ids(head + asked + tail + ("" if answer is None else cut(answer, room // 2)))[:most])
    return encoded


def encoder_of(config: Any) -> Callable[[Any, Sequence[tuple[str, str | None]], int], list[list[int]]]:
    """How the texts of a saved classifier were encoded when it was trained."""
    return encode_turns if getattr(config, "text_format", "plain") == "chat" else encode_texts


def label_rows(
    tokenizer: Any,
    examples: Examples[Labelled],
    labels: LabelSet,
    most: int,
    encode: Callable[[Any, Sequence[tuple[str, str | None]], int], list[list[int]]] = encode_texts,
) -> list[Row]:
    """Examples as rows with the target `labels`.

    Raises:
        LabelError: a label is not known; a text has no tokens.
    """
    texts = [(item.text, item.pair) for item in examples.items]
    rows = []
    encoded = encode(tokenizer, texts, most)
    for ids, item, place in zip(encoded, examples.items, examples.places, strict=True):
        if not ids:
            raise LabelError(f"{place}: the text has no tokens")
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


@torch.no_grad()
def predict_logits(model: nn.Module, rows: Sequence[Row], pad: int, at_once: int = 32) -> np.ndarray:
    """Logits (N, C) fp32 of rows, in their order; rows of similar lengths share a batch."""
    device = next(model.parameters()).device
    out: np.ndarray | None = None
    for numbers in by_length(rows, at_once):
        batch = pad_rows([rows[i] for i in numbers], pad).to(device)
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
