"""What a task of `minitron finetune` is: its options, and what it brings to the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..data.examples import Examples, RowFormat, overlap, read_examples, split_examples
from ..train.stream import Measure, Stream
from .labels import Problem
from .preferences import KINDS, Kind

TASKS = ("chat", "classify", "ner", "qa", "dpo", "reward")
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
    tag_names: tuple[str, ...] = ()
    """For ner: what tags that are numbers stand for."""
    attention: str = "causal"
    """For ner and qa: as of `models.attention_config`."""
    preference_loss: Kind = "sigmoid"
    """For dpo."""
    beta: float = 0.1
    """For dpo: how strongly the model before training holds."""
    sft_weight: float = 0.0
    """For dpo: of the likelihood of the chosen replies."""
    preview: bool = False
    """Only the first examples are wanted: prepare nothing that takes long."""
    chat: bool = False
    """For classify: texts are rendered as messages by the model's chat template, see `labels.encode_turns`."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"--task is {self.task!r}; it must be one of {', '.join(TASKS)}")
        if not 0 <= self.share < 0.5:
            raise ValueError(f"--heldout-share is {self.share}; it must be 0 or more and less than 0.5")
        if self.balance and (self.task, self.labels) != ("classify", "one"):
            raise ValueError("--balance weighs the classes of --task classify --labels one, and nothing else")
        if self.task != "classify" and (self.chat or self.tune == "head"):
            raise ValueError(f"{'--chat' if self.chat else '--tune head'} is for --task classify")
        if self.labels != "one" and self.task != "classify":
            raise ValueError(f"--labels {self.labels} is for --task classify; the task is {self.task}")
        if self.tag_names and self.task != "ner":
            raise ValueError(f"--tag-names is for --task ner; the task is {self.task}")
        if self.preference_loss not in KINDS:
            raise ValueError(f"--preference-loss is {self.preference_loss!r}; it must be one of {', '.join(KINDS)}")
        if not 0 < self.beta < math.inf or not 0 <= self.sft_weight < math.inf:
            raise ValueError(f"--beta is {self.beta} and --sft-weight {self.sft_weight}; they must be positive numbers")
        if self.task != "dpo" and (self.preference_loss, self.beta, self.sft_weight) != ("sigmoid", 0.1, 0.0):
            raise ValueError(f"--preference-loss, --beta and --sft-weight are for --task dpo; the task is {self.task}")
        if self.attention != "causal" and self.task not in ("ner", "qa", "dpo", "reward"):
            raise ValueError(
                f"--attention {self.attention} is for --task ner and qa; {self.task} reads the last token, which has "
                f"seen the whole text"
            )


@dataclass(frozen=True)
class Inputs:
    """What a task is prepared from."""

    folder: Path
    """Checkpoint in the Hugging Face layout."""
    tokenizer: Any
    options: TuneOptions
    sequence: int
    """Tokens that an example may have."""
    seed: int
    """Determines the split, the head's first weights and the order."""
    device: Any
    """Where the model goes."""
    say: Callable[[str], Any]
    """Called with a sentence before long work."""
    cache: Path
    """Folder of what later runs need not compute again: the log-probabilities of `dpo`."""


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


def split_parts(
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
    own = (("validation", valid), ("test", test))
    train.notes.extend(note for name, part in own if part is not None and (note := overlap(train, part, name)))
    if valid is None and shares[0]:
        valid = rest[0]
    if named_test and test is None and shares[1]:
        test = rest[1]
    return train, valid, test
