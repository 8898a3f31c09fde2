"""Names in texts: tags of words as labels of tokens, the loss, and the best tags that a name can have.

A word's label is learned at, and read from, the token that holds its last character: the first one at which a causal
model has seen the whole word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.annotated import OUTSIDE, Tagged
from ..data.examples import Examples
from ..ops.loss import IGNORE_INDEX
from .encoding import LabelError, special_ends
from .labels import probabilities
from .rows import PaddedBatch, Row, padded_batches

OVERLAP = 4
"""Windows of a long text share a quarter of their tokens; a word belongs to the first window that holds it."""


@dataclass(frozen=True)
class TagSet:
    """The tags of a task, in the BIO scheme."""

    types: tuple[str, ...]
    """Of names, sorted."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the labels by their numbers: `O`, then `B-` and `I-` of each type."""
        return (OUTSIDE, *(f"{part}-{kind}" for kind in self.types for part in "BI"))

    @classmethod
    def of(cls, examples: Examples[Tagged]) -> TagSet:
        """The tags of examples.

        Raises:
            LabelError: no word of them belongs to a name; a type of name occurs once only.
        """
        counts: dict[str, int] = {}
        where: dict[str, str] = {}
        for item, place in zip(examples.items, examples.places, strict=True):
            for tag in item.tags:
                if tag.startswith("B-"):
                    counts[tag[2:]] = counts.get(tag[2:], 0) + 1
                    where.setdefault(tag[2:], place)
        if not counts:
            raise LabelError("no word of the training rows belongs to a name; every tag is O")
        rare = next((kind for kind, count in sorted(counts.items()) if count < 2), None)
        if rare is not None:
            raise LabelError(
                f"there is a single name of type {rare!r} ({where[rare]}), so it cannot be both learned and measured; "
                f"add rows with it or remove that one"
            )
        return cls(tuple(sorted(counts)))

    @classmethod
    def of_config(cls, config: Any) -> TagSet:
        """The tags of a saved model.

        Raises:
            LabelError: its labels are not those of the BIO scheme in this order.
        """
        names = tuple(config.id2label[i] for i in range(config.num_labels))
        found = cls(tuple(name[2:] for name in names if name.startswith("B-")))
        if found.names != names:
            raise LabelError(f"the labels are {', '.join(names):.200}; expected O, then B- and I- of each type")
        return found

    def config(self) -> dict[str, Any]:
        """The fields of a model's configuration."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
        }

    def numbers(self, tags: Sequence[str], place: str) -> list[int]:
        """Tags as labels.

        Raises:
            LabelError: a type of name is none of these.
        """
        index = {name: number for number, name in enumerate(self.names)}
        unknown = next((tag for tag in tags if tag not in index), None)
        if unknown is not None:
            raise LabelError(f"{place}: type {unknown[2:]!r} is not among those of the training rows: "
                             f"{', '.join(self.types):.300}")  # fmt: skip
        return [index[tag] for tag in tags]


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a text."""

    ids: tuple[int, ...]
    words: tuple[tuple[int, int], ...]
    """(number of a word, index of the token that holds its last character)."""


def windows(tokenizer: Any, texts: Sequence[Tagged], most: int) -> list[list[Window]]:
    """The windows of each text, of at most `most` tokens; every word belongs to exactly one.

    Raises:
        LabelError: the tokenizer does not say which characters a token stands for, or its own special tokens leave no
            room.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise LabelError("the tokenizer does not say which characters a token stands for; a fast tokenizer is needed")
    before, after = special_ends(tokenizer)
    room = most - len(before) - len(after)
    if room < 1:
        raise LabelError(f"{most} tokens leave no room for a text; the tokenizer itself adds {len(before + after)}")
    encoded = tokenizer([item.text for item in texts], add_special_tokens=False, return_offsets_mapping=True)
    out = []
    for item, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        at = _token_of_words(item.spans, offsets)
        out.append([
            Window((*before, *ids[first : first + room], *after),
                   tuple((word, at[word] - first + len(before)) for word in mine))
            for first, mine in _shares(at, len(ids), room)
        ])  # fmt: skip
    return out


def _token_of_words(spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """For each word, the token that holds its last character."""
    out, token = [], 0
    for _, stop in spans:
        # A character of several bytes may be several tokens, all with its place; the last one has seen all of it.
        while token + 1 < len(offsets) and offsets[token + 1][0] < stop:
            token += 1
        out.append(token)
    return out


def _shares(at: Sequence[int], count: int, room: int) -> Iterable[tuple[int, list[int]]]:
    """(first token, words) of each window over `count` tokens, where word w is read at token `at[w]`."""
    first, done = 0, 0
    while True:
        stop = done
        while stop < len(at) and at[stop] < first + room:
            stop += 1
        yield first, list(range(done, stop))
        if stop == len(at):
            return
        done, first = stop, min(at[stop], first + room - room // OVERLAP)
        first = max(first, at[stop] - room + 1)


def name_rows(
    tokenizer: Any, examples: Examples[Tagged], tags: TagSet, most: int, skip_bad: bool = False
) -> tuple[list[Row], list[str]]:
    """Examples as rows with a label at the last token of each word, and sentences about what was skipped.

    Args:
        tokenizer: a fast one.
        examples: with tags.
        tags: of the task.
        most: tokens of a row.
        skip_bad: skip an example whose names have borders inside a token.

    Raises:
        LabelError: a tag is not known; a border of a name lies inside a token.
    """
    out: list[Row] = []
    bad: list[str] = []
    found = windows(tokenizer, examples.items, most)
    for item, place, mine in zip(examples.items, examples.places, found, strict=True):
        labels = tags.numbers(item.tags, place)
        rows = [_labelled(window, labels) for window in mine]
        split = next((word for word in rows if isinstance(word, int)), None)
        if split is None:
            out += [row for row in rows if isinstance(row, Row) and row.num_items]
            continue
        bad.append(
            f"{place}: at the word {item.words[split]!r} a name begins or ends inside a token, where this tokenizer "
            f"cannot tell it apart"
        )
        if not skip_bad:
            raise LabelError(f"{bad[0]}; --skip-bad skips such rows")
    return out, [f"{len(bad):,} rows were skipped; the first: {bad[0]}"] if bad else []


def _labelled(window: Window, labels: Sequence[int]) -> Row | int:
    """A window with its labels; or the word that ends in one token with another word, with a label that does not go on
    from that one's."""
    chosen = [IGNORE_INDEX] * len(window.ids)
    for word, token in window.words:
        taken = chosen[token]
        # B- of a type has an odd number, its I- the next one.
        if taken != IGNORE_INDEX and labels[word] != taken + taken % 2:
            return word
        if taken == IGNORE_INDEX:
            chosen[token] = labels[word]
    return Row(window.ids, {}, tuple(chosen))


class TokenLoss(nn.Module):
    """Cross-entropy over the labelled tokens of a step: a `train.LossFunction`."""

    def forward(self, model: nn.Module, batch: PaddedBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The batch's part of the mean over `batch.num_items` tokens."""
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
        loss = F.cross_entropy(
            logits.flatten(0, 1), batch.targets["labels"].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return loss / batch.num_items, {}


@torch.no_grad()
def predict_tags(
    model: nn.Module, tokenizer: Any, texts: Sequence[Tagged], tags: TagSet, pad: int, most: int, at_once: int = 32
) -> list[tuple[list[str], np.ndarray]]:
    """(tags of the words, probability of each) of every text, whatever else shares a batch with it."""
    found = windows(tokenizer, texts, most)
    flat = [(number, window) for number, mine in enumerate(found) for window in mine if window.words]
    device = next(model.parameters()).device
    logits = [np.zeros((len(item.spans), len(tags.names)), np.float32) for item in texts]
    rows = [Row(window.ids, {}) for _, window in flat]
    for numbers, batch in padded_batches(rows, pad, at_once, device):
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float().cpu().numpy()
        for row, i in enumerate(numbers):
            text, window = flat[i]
            for word, token in window.words:
                logits[text][word] = out[row, token]
    return [_decoded(each, tags) for each in logits]


def _decoded(logits: np.ndarray, tags: TagSet) -> tuple[list[str], np.ndarray]:
    if not len(logits):
        return [], np.zeros(0)
    p = probabilities(logits, "one")
    path = best_path(np.log(np.maximum(p, 1e-300)), tags)
    return [tags.names[i] for i in path], p[np.arange(len(path)), path]


def best_path(scores: np.ndarray, tags: TagSet) -> list[int]:
    """The labels with the greatest sum of scores (W, C) among those where `I-` follows a word of its type (Viterbi)."""
    names = tags.names
    allowed = np.array([[b[0] != "I" or a[2:] == b[2:] for b in names] for a in names])
    best = np.where([name[0] == "I" for name in names], -np.inf, scores[0])
    back = []
    for row in scores[1:]:
        steps = np.where(allowed, best[:, None], -np.inf)
        back.append(steps.argmax(0))
        best = steps.max(0) + row
    path = [int(best.argmax())]
    for origin in reversed(back):
        path.append(int(origin[path[-1]]))
    return path[::-1]
