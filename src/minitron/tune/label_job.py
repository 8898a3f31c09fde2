"""`minitron finetune --task classify`: labels of texts."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.examples import Examples, Labelled, labelled
from ..train.adapters import choose_trained
from ..train.stream import Measure
from .encoding import SEPARATOR, encoder_of, pair_separator
from .features import FeatureLoss, FeatureStream, features_of
from .labels import LabelLoss, LabelSet, class_weights, label_rows, predict_logits
from .models import head_model
from .rows import Row, RowStream
from .scores import baselines, best_temperature, confusion, score
from .task import PREVIEWED, Inputs, Job, split_parts


def label_job(inputs: Inputs) -> Job:
    """Texts with labels under a sequence classification head."""
    tokenizer, options, sequence, seed = inputs.tokenizer, inputs.options, inputs.sequence, inputs.seed
    train, valid, test = split_parts(options, labelled(options.labels), seed, named_test=True)
    labels = LabelSet.of(train, options.labels)
    inputs.say(f"encoding {sum(len(part) for part in (train, valid, test) if part is not None):,} texts")
    config = {**labels.config(), "text_format": "chat" if options.chat else "plain",
              SEPARATOR: None if options.chat else pair_separator(tokenizer)}  # fmt: skip
    encode = encoder_of(SimpleNamespace(**config))
    rows = label_rows(tokenizer, train, labels, sequence, encode)
    model, pad = head_model(inputs.folder, tokenizer, "sequence-classification", config, seed, inputs.device)
    model = choose_trained(model, options.tune, options.lora_rank, whole=("score",))
    weights = class_weights(rows, len(labels.names)) if options.balance else None
    measures: dict[str, Measure] = {}
    # All parts before training: a label that is not known there must not be found after hours.
    held, tested = (
        None if part is None else label_rows(tokenizer, part, labels, sequence, encode) for part in (valid, test)
    )
    if held is not None:
        measures["validation"] = LabelMeasure(held, labels, pad)
    cut = sum(len(row.ids) == sequence for row in rows)
    notes = [*train.notes, *([f"{cut:,} texts have {sequence} tokens or more and were cut"] if cut else [])]
    if config[SEPARATOR] is not None and any(item.pair for item in train.items):
        notes.append(f"{config[SEPARATOR]!r} stands between the texts of a pair, also in predict and serve")
    preview = tuple(
        f"{labels_text(item.label)}: {tokenizer.decode(list(row.ids))}"
        for item, row in zip(train.items[:PREVIEWED], rows, strict=False)
    )
    identity = {"task": "classify", "labels": list(labels.names), "problem": labels.problem, "balance": options.balance,
                **({"chat": True} if options.chat else {})}  # fmt: skip

    def report(trained: nn.Module) -> dict[str, Any]:
        found = {"task": "classify", "problem": labels.problem, "labels": list(labels.names), "train_rows": len(train)}
        if test is None or tested is None:
            return found
        inputs.say(f"measuring {len(test):,} test rows and the baselines")
        return {**found, **label_report(trained, pad, labels, train, test, tested, held)}

    stream: Any = RowStream(rows, pad, seed, sequence)
    loss: Any = LabelLoss(labels.problem, weights)
    if options.tune == "head" and not options.preview:
        inputs.say(f"computing the hidden states of {len(rows):,} texts once; the backbone does not change")
        stream, loss = FeatureStream(rows, features_of(model, rows, pad), stream), FeatureLoss(loss)
    return Job(model, stream, loss, identity, measures, preview, tuple(notes), report)


def labels_text(label: Any) -> str:
    """A label for people."""
    return " | ".join(label) if isinstance(label, tuple) else str(label)


class LabelMeasure:
    """The scores of held-out rows: a `Measure`."""

    def __init__(self, rows: Sequence[Row], labels: LabelSet, pad: int) -> None:
        self._rows, self._labels, self._pad = rows, labels, pad
        self._targets = np.array([row.targets["labels"] for row in rows])

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """As of `Measure`."""
        return score(predict_logits(model, self._rows, self._pad), self._targets, self._labels.problem)


@torch.no_grad()
def label_report(
    model: nn.Module,
    pad: int,
    labels: LabelSet,
    train: Examples[Labelled],
    test: Examples[Labelled],
    tested: Sequence[Row],
    held: Sequence[Row] | None,
) -> dict[str, Any]:
    """Scores of the test rows beside the baselines; for one label also calibration by a temperature that the
    validation rows choose, and the confusion table."""
    model.eval()
    logits = predict_logits(model, tested, pad)
    targets = np.array([row.targets["labels"] for row in tested])
    found: dict[str, Any] = {
        "test_rows": len(test),
        "scores": {"model": score(logits, targets, labels.problem), **baselines(train, test, labels)},
    }
    if labels.problem != "one":
        return found
    found["confusion"] = confusion(logits.argmax(-1), targets, len(labels.names))
    if held is not None:
        known = np.array([row.targets["labels"] for row in held])
        temperature = best_temperature(predict_logits(model, held, pad), known)
        found["temperature"] = temperature
        found["calibrated"] = {
            name: value for name, value in score(logits, targets, "one", temperature).items() if name in ("nats", "ece")
        }
    return found
