"""What a model with a trained head says of rows: labels, names or answers as JSON lines, in the order of the rows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..checkpoint.hf import check_checkpoint
from ..data.annotated import Question, Tagged, entities_of, unanswered, untagged
from ..data.documents.problems import Bad
from ..data.examples import OPTIONAL, Labelled, RowFormat, read_examples
from ..dtypes import parse_dtype
from ..files import TargetError, writing
from ..registration import register
from .answer_job import NO_ANSWER
from .answers import predict_spans
from .encoding import REPLIES, encoder_of, is_padding
from .labels import LabelSet, predict_logits, probabilities
from .models import SUFFIXES, head_of, pad_id, saved_head, stored_temperature
from .names import TagSet, predict_tags
from .rows import Row

WINDOW = 2048
"""Rows that are sorted by length, predicted and written together."""


class Predictor(Protocol):
    """A saved model with a trained head."""

    @property
    def task(self) -> str:
        """Key of `data.examples.FIELDS`."""
        ...

    @property
    def sequence(self) -> int:
        """Tokens that are read at once."""
        ...

    def convert(self, fields: Mapping[str, Any]) -> Any:
        """An example without its target, of the fields of a row; `Bad` if it is none."""
        ...

    def predict(self, items: Sequence[Any], at_once: int) -> Iterator[dict[str, Any]]:
        """A prediction for each example, in their order."""
        ...


@dataclass(frozen=True)
class Classifier:
    """Labels of texts or pairs of texts."""

    model: Any
    tokenizer: Any
    labels: LabelSet
    sequence: int
    """Tokens of a text that are read; what follows is cut off."""
    task: str = "classify"
    temperature: float = 1.0
    """Divides the logits before they become probabilities."""

    def convert(self, fields: Mapping[str, Any]) -> Labelled | Bad:
        """As of `Predictor`."""
        for name in ("text", *OPTIONAL["classify"] & fields.keys()):
            if not isinstance(fields[name], str):
                return Bad(f"{name} is {fields[name]!r:.60}; expected a text")
        if not fields["text"].strip():
            return Bad("the text is empty")
        if is_padding(self.tokenizer, fields["text"]):
            return Bad(f"the text {fields['text']!r:.60} has no tokens but padding")
        if getattr(self.model.config, "text_format", "") in REPLIES.values():
            try:
                self._encode([(fields["text"], fields.get("pair"))])
            except ValueError as error:
                return Bad(str(error))
        return Labelled(fields["text"], fields.get("pair"), "")

    def _encode(self, texts: Sequence[tuple[str, str | None]]) -> list[list[int]]:
        return encoder_of(self.model.config)(self.tokenizer, texts, self.sequence)

    def predict(self, items: Sequence[Labelled], at_once: int) -> Iterator[dict[str, Any]]:
        """The label and the probability of every label, or a value."""
        texts = [(item.text, item.pair) for item in items]
        rows = [Row(tuple(ids), {}) for ids in self._encode(texts)]
        logits = predict_logits(self.model, rows, self.model.config.pad_token_id, at_once)
        if self.labels.problem == "number":
            yield from ({"value": float(value)} for value in logits[:, 0])
            return
        for shares in probabilities(logits, self.labels.problem, self.temperature):
            by_name = dict(zip(self.labels.names, (round(float(share), 6) for share in shares), strict=True))
            if self.labels.problem == "several":
                yield {"labels": [name for name, p in by_name.items() if p >= 0.5], "probabilities": by_name}
            else:
                best = self.labels.names[int(shares.argmax())]
                yield {"label": best, "probability": by_name[best], "probabilities": by_name}


@dataclass(frozen=True)
class NameFinder:
    """Names in texts."""

    model: Any
    tokenizer: Any
    tags: TagSet
    sequence: int
    """Tokens of a window; longer texts are read in several."""
    task: str = "ner"

    def convert(self, fields: Mapping[str, Any]) -> Tagged | Bad:
        """As of `Predictor`."""
        return untagged(fields)

    def predict(self, items: Sequence[Tagged], at_once: int) -> Iterator[dict[str, Any]]:
        """The names: text, type, first character and last + 1, and the least probability of their words' tags."""
        pad = self.model.config.pad_token_id
        found = predict_tags(self.model, self.tokenizer, items, self.tags, pad, self.sequence, at_once)
        for item, (tags, shares) in zip(items, found, strict=True):
            entities = []
            for kind, first, stop in entities_of(tags):
                begins, ends = item.spans[first][0], item.spans[stop - 1][1]
                score = round(float(shares[first:stop].min()), 6)
                entities.append({"text": item.text[begins:ends], "label": kind, "start": begins, "end": ends,
                                 "words": [first, stop], "score": score})  # fmt: skip
            yield {"text": item.text, "entities": entities}


@dataclass(frozen=True)
class Answerer:
    """Answers within texts."""

    model: Any
    tokenizer: Any
    sequence: int
    """Tokens of question and window; longer texts are read in several."""
    task: str = "qa"

    def convert(self, fields: Mapping[str, Any]) -> Question | Bad:
        """As of `Predictor`."""
        return unanswered(fields)

    def predict(self, items: Sequence[Question], at_once: int) -> Iterator[dict[str, Any]]:
        """The answer, empty if there is none, its first character in the context and its probability."""
        config = self.model.config
        no_answer = bool(getattr(config, NO_ANSWER, False))
        spans = predict_spans(self.model, self.tokenizer, items, config.pad_token_id, self.sequence, no_answer, at_once)
        for span in spans:
            yield {"answer": span.text, "start": span.start, "end": span.start + len(span.text),
                   "score": round(span.score, 6)}  # fmt: skip


def open_predictor(
    folder: Path, tokenizer: Any, dtype: str, device: Any, sequence: int | None = None, calibrated: bool = False
) -> Predictor:
    """The model of a checkpoint folder with the head that it was trained with.

    Args:
        folder: in the Hugging Face layout.
        tokenizer: its tokenizer.
        dtype: as on the command line.
        device: where it runs.
        sequence: tokens that are read at once; the model's positions if None.
        calibrated: divide a classifier's logits by the temperature that training stored.

    Raises:
        ValueError: the checkpoint has no trained head, or no temperature where one is wanted.
    """
    check_checkpoint(folder)
    register()
    head = head_of(folder)
    if head is None:
        raise ValueError(
            f"{folder}: the model has no head of its own (...{', ...'.join(SUFFIXES)}), such as `minitron finetune "
            f"--task classify`, ner and qa train"
        )
    temperature = 1.0
    if calibrated:
        path = folder / "config.json"
        temperature = stored_temperature(json.loads(path.read_text(encoding="utf-8")), path)
    model = saved_head(folder, head, parse_dtype(dtype), device)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_id(tokenizer)
    most = model.config.max_position_embeddings
    length = min(sequence or most, most)
    if head == "sequence-classification":
        return Classifier(model, tokenizer, LabelSet.of_config(model.config), length, temperature=temperature)
    if head == "token-classification":
        return NameFinder(model, tokenizer, TagSet.of_config(model.config), length)
    return Answerer(model, tokenizer, length)


def read_unlabelled(path: str, predictor: Predictor, rows: RowFormat) -> list[Any]:
    """The examples of a file of rows, without what is to be predicted.

    Raises:
        ValueError: rows that cannot be used; file and line are named.
    """
    return read_examples([path], predictor.task, predictor.convert, replace(rows, unlabelled=True)).items


def write_predictions(
    predictor: Predictor,
    items: Sequence[Any],
    out: Path,
    key: str,
    at_once: int = 32,
    progress: Callable[[int], Any] = lambda done: None,
) -> int:
    """Write a line for each example, and continue where an interrupted call of the same `key` stopped.

    Args:
        predictor: predicts.
        items: examples in their order.
        out: the file; it appears when it is complete, `OUT.part` holds what is done until then.
        key: tells this work from other work.
        at_once: examples of a forward pass.
        progress: called with how many are written.

    Returns:
        How many of them an earlier call had written.

    Raises:
        TargetError: `OUT.part` belongs to other work.
    """
    part, note = out.with_name(f"{out.name}.part"), out.with_name(f"{out.name}.part.key")
    if part.exists() and (not note.exists() or note.read_text(encoding="utf-8") != key):
        raise TargetError(f"{part} holds predictions of another model or file; delete it or choose another output")
    with writing(part):
        note.write_text(key, encoding="utf-8")
        with part.open("ab+") as file:
            done = _complete_lines(file)
            for first in range(done, len(items), WINDOW):
                lines = (json.dumps(found, ensure_ascii=False) for found in
                         predictor.predict(items[first : first + WINDOW], at_once))  # fmt: skip
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                progress(min(first + WINDOW, len(items)))
        os.replace(part, out)
        note.unlink()
    return done


def _complete_lines(file: Any) -> int:
    """How many whole lines a file has; what follows them is cut off."""
    file.seek(0)
    content = file.read()
    end = content.rfind(b"\n") + 1
    file.truncate(end)
    file.seek(end)
    return content.count(b"\n")
