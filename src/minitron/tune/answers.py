"""Answers within a text: questions as rows of tokens, the loss, and the best span over all windows of a text.

A row is the question, a line end, a window of the text, and a last token that stands for "no answer here". The
question comes first so that a causal model knows it while it reads the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.annotated import Question
from ..data.examples import Examples
from .encoding import LabelError, special_ends
from .models import pad_id
from .rows import PaddedBatch, Row, padded_batches

OVERLAP = 3
"""Windows of a long text share a third of their tokens, so that an answer at a border is whole in one of them."""
MOST_ANSWER = 48
"""Tokens of an answer."""
LONGEST_QUESTION = 2
"""A question may fill half of a row; a longer one is cut at its beginning."""


@dataclass(frozen=True)
class Span:
    """What a model answers."""

    text: str
    """Empty if the text does not answer the question."""
    start: int
    """Index of its first character in the context; 0 if there is none."""
    score: float
    """Its probability among the spans and "no answer", where that is possible."""


@dataclass(frozen=True)
class AnswerWindow:
    """A question with a part of the text."""

    ids: tuple[int, ...]
    first: int
    """Index of the first token of the text."""
    offsets: tuple[tuple[int, int], ...]
    """Of each token of the text: its first character in the context, and one past its last."""

    @property
    def nowhere(self) -> int:
        """Index of the token that stands for no answer."""
        return len(self.ids) - 1


def answer_windows(tokenizer: Any, items: Sequence[Question], most: int) -> list[list[AnswerWindow]]:
    """The windows of each question, of at most `most` tokens.

    Raises:
        LabelError: the tokenizer does not say which characters a token stands for; `most` is too small.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise LabelError("the tokenizer does not say which characters a token stands for; a fast tokenizer is needed")
    before, _ = special_ends(tokenizer)
    last = pad_id(tokenizer)
    if most < 16:
        raise LabelError(f"{most} tokens leave no room for a question and a text; --sequence must be at least 16")
    asked = tokenizer([f"{item.question}\n" for item in items], add_special_tokens=False)["input_ids"]
    texts = tokenizer([item.context for item in items], add_special_tokens=False, return_offsets_mapping=True)
    out = []
    for question, ids, offsets in zip(asked, texts["input_ids"], texts["offset_mapping"], strict=True):
        head = [*before, *question[-(most // LONGEST_QUESTION) :]]
        room = most - len(head) - 1
        step = max(1, room - room // OVERLAP)
        firsts = range(0, max(1, len(ids) - room + step), step)
        out.append([
            AnswerWindow((*head, *ids[f : f + room], last), len(head), tuple(map(tuple, offsets[f : f + room])))
            for f in firsts if f == 0 or f < len(ids)
        ])  # fmt: skip
    return out


def answer_rows(tokenizer: Any, examples: Examples[Question], most: int) -> list[Row]:
    """Examples as rows with the targets `start` and `end`: those of the answer's first and last token, or twice the
    last token where the window does not hold the whole answer."""
    out = []
    for item, mine in zip(examples.items, answer_windows(tokenizer, examples.items, most), strict=True):
        for window in mine:
            start, end = _inside(window, item)
            out.append(Row(window.ids, {"start": start, "end": end}))
    return out


def _inside(window: AnswerWindow, item: Question) -> tuple[int, int]:
    nowhere = (window.nowhere, window.nowhere)
    if item.start is None or not window.offsets:
        return nowhere
    first, stop = item.start, item.start + len(item.answers[0])
    if first < window.offsets[0][0] or stop > window.offsets[-1][1]:
        return nowhere
    tokens = [i for i, (a, b) in enumerate(window.offsets) if a < stop and b > first]
    return (window.first + tokens[0], window.first + tokens[-1]) if tokens else nowhere


class SpanLoss(nn.Module):
    """The mean of the cross-entropies of start and end over the rows of a step: a `train.LossFunction`."""

    def forward(self, model: nn.Module, batch: PaddedBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The batch's part of the mean over `batch.num_items` rows."""
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        padding = batch.attention_mask == 0
        losses = [
            F.cross_entropy(logits.float().masked_fill(padding, -torch.inf), batch.targets[name], reduction="sum")
            for name, logits in (("start", out.start_logits), ("end", out.end_logits))
        ]
        return (losses[0] + losses[1]) / (2 * batch.num_items), {}


@torch.no_grad()
def predict_spans(
    model: nn.Module, tokenizer: Any, items: Sequence[Question], pad: int, most: int, no_answer: bool, at_once: int = 16
) -> list[Span]:
    """The best answer to each question.

    Args:
        model: with a question answering head.
        tokenizer: its tokenizer.
        items: the questions; answers are not read.
        pad: id at padding.
        most: tokens of a window.
        no_answer: whether a question may have no answer in its text.
        at_once: windows of a forward pass.
    """
    found = answer_windows(tokenizer, items, most)
    flat = [(number, window) for number, mine in enumerate(found) for window in mine]
    rows = [Row(window.ids, {}) for _, window in flat]
    device = next(model.parameters()).device
    scores: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(rows)
    for numbers, batch in padded_batches(rows, pad, at_once, device):
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        starts, ends = (logits.double().cpu().numpy() for logits in (out.start_logits, out.end_logits))
        for row, i in enumerate(numbers):
            length = len(rows[i].ids)
            scores[i] = (starts[row, :length], ends[row, :length])
    spans: list[list[tuple[AnswerWindow, Any]]] = [[] for _ in items]
    for (number, window), pair in zip(flat, scores, strict=True):
        spans[number].append((window, pair))
    return [_best(item.context, mine, no_answer) for item, mine in zip(items, spans, strict=True)]


def _best(context: str, windows: Sequence[tuple[AnswerWindow, Any]], no_answer: bool) -> Span:
    """The span with the greatest sum of start and end over all windows.

    "No answer" competes with the least that any window gives it: the window with the answer decides.
    """
    best, place = -np.inf, (0, 0)
    total: list[np.ndarray] = []
    for window, (starts, ends) in windows:
        count = len(window.offsets)
        if not count:
            continue
        inside = slice(window.first, window.first + count)
        pairs = starts[inside, None] + ends[None, inside]
        width = np.arange(count)[None, :] - np.arange(count)[:, None]
        pairs[(width < 0) | (width >= MOST_ANSWER)] = -np.inf
        total.append(np.logaddexp.reduce(pairs, axis=None))
        a, b = np.unravel_index(int(pairs.argmax()), pairs.shape)
        if pairs[a, b] > best:
            best, place = float(pairs[a, b]), (window.offsets[a][0], window.offsets[b][1])
    nowhere = min(starts[window.nowhere] + ends[window.nowhere] for window, (starts, ends) in windows)
    if no_answer:
        total.append(np.array(nowhere))
    norm = float(np.logaddexp.reduce(total)) if total else 0.0
    if not np.isfinite(best) or (no_answer and nowhere >= best):
        return Span("", 0, float(np.exp(nowhere - norm)) if no_answer else 0.0)
    # Tokens of many tokenizers begin with the space before the word.
    first, stop = place
    while first < stop and context[first].isspace():
        first += 1
    while stop > first and context[stop - 1].isspace():
        stop -= 1
    return Span(context[first:stop], first, float(np.exp(best - norm)))
