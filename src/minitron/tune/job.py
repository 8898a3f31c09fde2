"""What each task of `minitron finetune` brings to the training loop: model, stream, loss, measures, and a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.examples import Examples, Labelled, RowFormat, conversation, labelled, read_examples, split_examples
from ..train.adapters import choose_trained
from ..train.objective import next_token_loss
from ..train.stream import Measure, Stream
from .conversations import PackedConversations, render_all, show_learned
from .labels import LabelLoss, LabelSet, Problem, class_weights, label_rows, predict_logits
from .models import head_model, language_model
from .rows import Row, RowStream
from .scores import baselines, best_temperature, confusion, score

TASKS = ("chat", "classify")
PREVIEWED = 3


@dataclass(frozen=True)
class TuneOptions:
    """What is learned from which rows."""

    task: str
    data: tuple[str, ...]
    """Rows to learn from."""
    validation: tuple[str, ...] = ()
    """Rows that are measured during training; a share of `data` if empty."""
    test: tuple[str, ...] = ()
    """Rows of the report; a share of `data` if empty."""
    share: float = 0.1
    """Of `data` for each of validation and test where they have no files; 0 for none."""
    rows: RowFormat = field(default_factory=RowFormat)
    labels: Problem = "one"
    """For classify: one label of some, several, or a number."""
    balance: bool = False
    """For classify: let every class weigh the same in the loss."""
    tune: str = "full"
    """As of `train.adapters.choose_trained`."""
    lora_rank: int = 16

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"--task is {self.task!r}; it must be one of {', '.join(TASKS)}")
        if not 0 <= self.share < 0.5:
            raise ValueError(f"--heldout-share is {self.share}; it must be 0 or more and less than 0.5")
        if self.balance and (self.task, self.labels) != ("classify", "one"):
            raise ValueError("--balance weighs the classes of --task classify --labels one, and nothing else")


@dataclass(frozen=True)
class Job:
    """A task, ready for `train.loop.train`."""

    model: nn.Module
    stream: Stream
    loss: Any
    identity: dict[str, Any]
    """What tells this run from another, as JSON values."""
    measures: dict[str, Measure]
    preview: tuple[str, ...]
    """The first examples as the model sees them."""
    notes: tuple[str, ...]
    report: Callable[[nn.Module], dict[str, Any]]
    """Scores of the trained model beside baselines, as JSON values."""


def prepare_job(
    folder: Path, tokenizer: Any, options: TuneOptions, sequence: int, seed: int, device: Any, say: Callable[[str], Any]
) -> Job:
    """Read the rows of a task and load the model.

    Args:
        folder: checkpoint in the Hugging Face layout.
        tokenizer: its tokenizer.
        options: what is learned.
        sequence: tokens that an example may have.
        seed: determines the split, the head's first weights and the order.
        device: where the model goes.
        say: called with a sentence before long work.

    Raises:
        ValueError: rows that cannot be used; the message names file and line.
    """
    prepare = {"chat": _chat, "classify": _classify}[options.task]
    return prepare(folder, tokenizer, options, sequence, seed, device, say)


def _parts(
    options: TuneOptions, convert: Callable[[Mapping[str, Any]], Any], seed: int, named_test: bool
) -> tuple[Examples[Any], Examples[Any] | None, Examples[Any] | None]:
    """Rows for training, validation and test."""

    def read(paths: Sequence[str]) -> Examples[Any]:
        return read_examples(paths, options.task, convert, options.rows)

    train = read(options.data)
    notes = train.notes
    valid = read(options.validation) if options.validation else None
    test = read(options.test) if options.test else None
    shares = [options.share if part is None else 0.0 for part in (valid, *([test] if named_test else []))]
    train, *rest = split_examples(train, shares, seed)
    train.notes.extend(notes)
    if valid is None and shares[0]:
        valid = rest[0]
    if named_test and test is None and shares[1]:
        test = rest[1]
    return train, valid, test


# --- conversations -----------------------------------------------------------------------------------------------


def _chat(
    folder: Path, tokenizer: Any, options: TuneOptions, sequence: int, seed: int, device: Any, say: Callable[[str], Any]
) -> Job:
    train, valid, _ = _parts(options, conversation, seed, named_test=False)
    say(f"rendering {len(train) + (len(valid) if valid else 0):,} conversations")
    rendered = render_all(tokenizer, train, sequence, options.rows.skip_bad)
    stream = PackedConversations(rendered.turns, sequence, seed, rendered.digest)
    measures: dict[str, Measure] = {}
    notes = list(rendered.notes)
    if valid is not None:
        held = render_all(tokenizer, valid, sequence, options.rows.skip_bad)
        measures["validation"] = _ChatMeasure(PackedConversations(held.turns, sequence, seed, held.digest))
        notes += held.notes
    preview = tuple(show_learned(tokenizer, turns) for turns in rendered.turns[:PREVIEWED])
    notes.append(
        f"{stream.num_learned:,} of {sum(len(t.ids) for t in rendered.turns):,} tokens are learned, in {len(stream):,} "
        f"blocks of {sequence}"
    )
    model = choose_trained(language_model(folder, device), options.tune, options.lora_rank)
    return Job(
        model, stream, next_token_loss, {"task": "chat"}, measures, preview, tuple(notes), lambda _: {"task": "chat"}
    )


class _ChatMeasure:
    """The mean negative log-likelihood of what the assistant said: a `Measure`."""

    def __init__(self, packed: PackedConversations) -> None:
        self._packed = packed

    def __call__(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        for number in range(len(self._packed)):
            batch = self._packed.batch([number]).to(device)
            if batch.num_items:
                loss, _ = next_token_loss(model, batch)
                total += loss.double().cpu() * batch.num_items
                count += batch.num_items
        return {"nats_per_token": float(total) / max(1, count)}


# --- labels ------------------------------------------------------------------------------------------------------


def _classify(
    folder: Path, tokenizer: Any, options: TuneOptions, sequence: int, seed: int, device: Any, say: Callable[[str], Any]
) -> Job:
    train, valid, test = _parts(options, labelled(options.labels), seed, named_test=True)
    labels = LabelSet.of(train, options.labels)
    say(f"encoding {sum(len(part) for part in (train, valid, test) if part is not None):,} texts")
    rows = label_rows(tokenizer, train, labels, sequence)
    model, pad = head_model(folder, tokenizer, "sequence-classification", labels.config(), seed, device)
    model = choose_trained(model, options.tune, options.lora_rank, whole=("score",))
    weights = class_weights(rows, len(labels.names)) if options.balance else None
    measures: dict[str, Measure] = {}
    held = None if valid is None else label_rows(tokenizer, valid, labels, sequence)
    if held is not None:
        measures["validation"] = _LabelMeasure(held, labels, pad)
    cut = sum(len(row.ids) == sequence for row in rows)
    notes = [*train.notes, *([f"{cut:,} texts have {sequence} tokens or more and were cut"] if cut else [])]
    preview = tuple(
        f"{labels_text(item.label)}: {tokenizer.decode(list(row.ids))}"
        for item, row in zip(train.items[:PREVIEWED], rows, strict=False)
    )
    identity = {"task": "classify", "labels": list(labels.names), "problem": labels.problem, "balance": options.balance}

    def report(trained: nn.Module) -> dict[str, Any]:
        found = {"task": "classify", "problem": labels.problem, "labels": list(labels.names), "train_rows": len(train)}
        if test is None:
            return found
        say(f"measuring {len(test):,} test rows and the baselines")
        tested = label_rows(tokenizer, test, labels, sequence)
        return {**found, **_label_report(trained, pad, labels, train, test, tested, held)}

    return Job(model, RowStream(rows, pad, seed, sequence), LabelLoss(labels.problem, weights), identity, measures,
               preview, tuple(notes), report)  # fmt: skip


def labels_text(label: Any) -> str:
    """A label for people."""
    return " | ".join(label) if isinstance(label, tuple) else str(label)


class _LabelMeasure:
    """The scores of held-out rows: a `Measure`."""

    def __init__(self, rows: Sequence[Row], labels: LabelSet, pad: int) -> None:
        self._rows, self._labels, self._pad = rows, labels, pad
        self._targets = np.array([row.targets["labels"] for row in rows])

    def __call__(self, model: nn.Module) -> dict[str, float]:
        return score(predict_logits(model, self._rows, self._pad), self._targets, self._labels.problem)


@torch.no_grad()
def _label_report(
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
