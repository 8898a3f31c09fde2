"""Labels for rows that have none: a classifier's predictions as JSON lines, in the order of the rows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.hf import check_checkpoint
from ..data.documents.problems import Bad
from ..data.examples import OPTIONAL, Labelled, RowFormat, read_examples
from ..dtypes import parse_dtype
from ..files import TargetError, writing
from ..registration import register
from .labels import LabelSet, encode_texts, predict_logits, probabilities
from .models import CLASSES, pad_id
from .rows import Row

WINDOW = 2048
"""Rows that are sorted by length, predicted and written together."""
SUFFIX = "ForSequenceClassification"


@dataclass(frozen=True)
class Classifier:
    """A saved classifier with its tokenizer."""

    model: Any
    tokenizer: Any
    labels: LabelSet
    sequence: int
    """Tokens of a text that are read."""

    def predict(self, texts: Sequence[tuple[str, str | None]], at_once: int) -> Iterator[dict[str, Any]]:
        """A prediction for each text or pair of texts, in their order."""
        rows = [Row(tuple(ids), {}) for ids in encode_texts(self.tokenizer, texts, self.sequence)]
        logits = predict_logits(self.model, rows, self.model.config.pad_token_id, at_once)
        if self.labels.problem == "number":
            yield from ({"value": float(value)} for value in logits[:, 0])
            return
        for shares in probabilities(logits, self.labels.problem):
            by_name = dict(zip(self.labels.names, (round(float(share), 6) for share in shares), strict=True))
            if self.labels.problem == "several":
                yield {"labels": [name for name, p in by_name.items() if p >= 0.5], "probabilities": by_name}
            else:
                best = self.labels.names[int(shares.argmax())]
                yield {"label": best, "probability": by_name[best], "probabilities": by_name}


def open_classifier(folder: Path, tokenizer: Any, dtype: str, device: Any, sequence: int | None = None) -> Classifier:
    """The classifier of a checkpoint folder.

    Args:
        folder: in the Hugging Face layout.
        tokenizer: its tokenizer.
        dtype: as on the command line.
        device: where it runs.
        sequence: tokens of a text that are read; the model's positions if None.

    Raises:
        ValueError: the checkpoint is no sequence classifier.
    """
    check_checkpoint(folder)
    register()
    architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["none"]
    if not str(architectures[0]).endswith(SUFFIX):
        raise ValueError(
            f"{folder}: the model is a {architectures[0]}; predict needs one with a classification head (...{SUFFIX}), "
            f"such as `minitron finetune --task classify` makes"
        )
    model, info = CLASSES["sequence-classification"].from_pretrained(
        folder, dtype=parse_dtype(dtype) or "auto", output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"{folder}: tensor {sorted(info['missing_keys'])[0]!r} is missing from the checkpoint")
    model.config.pad_token_id = pad_id(tokenizer) if model.config.pad_token_id is None else model.config.pad_token_id
    most = model.config.max_position_embeddings
    return Classifier(model.to(device).eval(), tokenizer, LabelSet.of_config(model.config), min(sequence or most, most))


def read_texts(path: str, rows: RowFormat) -> list[tuple[str, str | None]]:
    """The texts of a file of rows; labels are not needed.

    Raises:
        ValueError: rows without a text; file and line are named.
    """
    unlabelled = RowFormat({k: v for k, v in rows.names.items() if k != "label"}, rows.columns, rows.encoding)

    def convert(fields: Mapping[str, Any]) -> Labelled | Bad:
        for name in ("text", *OPTIONAL & fields.keys()):
            if not isinstance(fields[name], str):
                return Bad(f"{name} is {fields[name]!r:.60}; expected a text")
        if not fields["text"].strip():
            return Bad("the text is empty")
        return Labelled(fields["text"], fields.get("pair"), "")

    return [(item.text, item.pair) for item in read_examples([path], "predict", convert, unlabelled).items]


def write_predictions(
    classifier: Classifier,
    texts: Sequence[tuple[str, str | None]],
    out: Path,
    key: str,
    at_once: int = 32,
    progress: Callable[[int], Any] = lambda done: None,
) -> int:
    """Write a line for each text, and continue where an interrupted call of the same `key` stopped.

    Args:
        classifier: predicts.
        texts: in their order.
        out: the file; it appears when it is complete, `OUT.part` holds what is done until then.
        key: tells this work from other work.
        at_once: texts of a forward pass.
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
            for first in range(done, len(texts), WINDOW):
                lines = (json.dumps(found, ensure_ascii=False) for found in
                         classifier.predict(texts[first : first + WINDOW], at_once))  # fmt: skip
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                progress(min(first + WINDOW, len(texts)))
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
