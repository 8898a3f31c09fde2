"""Labelled rows and conversations: from files to examples of a task, each checked where it is read.

`read_examples` reads files (JSON lines, JSON, CSV, CoNLL, Parquet, Arrow, folders of them) and gives examples of one
kind, with the file and the line of every row that cannot be used. Fields are found by their usual names, or named by
the caller. What an example is to a model, in tokens, is for `tune` to say.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from .annotated import squad_questions
from .documents import DataError, Problem, Problems, Source, read_rows
from .documents.formats import ROWS_KNOWN, row_kind_of
from .documents.problems import Bad

E = TypeVar("E")

FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "chat": {
        "messages": ("messages", "conversations", "conversation"),
        "tools": ("tools", "functions"),
    },
    "classify": {
        "text": ("text", "sentence", "content", "description", "body", "premise", "question1", "sentence1"),
        "pair": ("pair", "text_pair", "hypothesis", "question2", "sentence2"),
        "label": ("label", "labels", "class", "category", "target"),
    },
    "ner": {
        "words": ("words", "tokens"),
        "tags": ("tags", "ner_tags", "labels"),
        "text": ("text", "sentence"),
        "entities": ("entities", "spans"),
    },
    "qa": {
        "context": ("context", "passage", "document"),
        "question": ("question", "query"),
        "answers": ("answers", "answer"),
        "answer_start": ("answer_start",),
        "is_impossible": ("is_impossible",),
    },
    "dpo": {
        "prompt": ("prompt", "question", "instruction", "input"),
        "chosen": ("chosen", "preferred"),
        "rejected": ("rejected", "dispreferred"),
        "tools": ("tools", "functions"),
    },
}
FIELDS["reward"] = FIELDS["dpo"]
"""For each task, its fields and the names under which files usually have them, the likeliest first."""
OPTIONAL = {
    "chat": frozenset({"tools"}),
    "classify": frozenset({"pair"}),
    "ner": frozenset(FIELDS["ner"]),  # words and tags, or text and entities
    "qa": frozenset({"answers", "answer_start", "is_impossible"}),
    "dpo": frozenset({"prompt", "tools"}),
    "reward": frozenset({"prompt", "tools"}),
}
"""Fields that a row may lack."""
TARGETS = {
    "chat": frozenset[str](),
    "classify": frozenset({"label"}),
    "ner": frozenset({"tags", "entities"}),
    "qa": frozenset({"answers"}),
    "dpo": frozenset[str](),
    "reward": frozenset[str](),
}
"""Fields that a model predicts."""


@dataclass(frozen=True)
class Labelled:
    """A text, or a pair of texts, with its label."""

    text: str
    pair: str | None
    label: str | float | tuple[str, ...]
    """A name; a number, for regression; several names, where a text may have any number of labels."""

    @property
    def content(self) -> str:
        """What decides whether two examples are the same text."""
        return self.text if self.pair is None else f"{self.text}\0{self.pair}"


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form, and the tools that the assistant may call."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def content(self) -> str:
        """What decides whether two conversations are the same."""
        return json.dumps(self.messages, sort_keys=True)


@dataclass(frozen=True)
class Examples(Generic[E]):
    """Examples of one kind, with where each stands."""

    items: list[E]
    places: list[str]
    """As in "spam.csv, line 7"."""
    notes: list[str] = field(default_factory=list)
    """Sentences about rows that were skipped."""

    def __len__(self) -> int:
        return len(self.items)

    def pick(self, numbers: Iterable[int]) -> Examples[E]:
        """Those of the given numbers."""
        chosen = list(numbers)
        return Examples([self.items[i] for i in chosen], [self.places[i] for i in chosen])

    def digest(self) -> str:
        """SHA-256 of the examples in their order."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(json.dumps(asdict(item), sort_keys=True, default=str).encode())  # type: ignore[call-overload]
        return digest.hexdigest()


@dataclass(frozen=True)
class RowFormat:
    """How the rows of files are read."""

    names: Mapping[str, str] = field(default_factory=dict)
    """Field of the task to its name in the files, where it is not one of the usual names."""
    columns: tuple[str, ...] = ()
    """Names of the columns of CSV files that do not begin with them."""
    encoding: str = "utf-8"
    skip_bad: bool = False
    """Skip rows that cannot be used instead of refusing all."""
    unlabelled: bool = False
    """Rows need not have what a model predicts."""


def read_examples(
    paths: Sequence[str], task: str, convert: Callable[[Mapping[str, Any]], E | Bad], rows: RowFormat
) -> Examples[E]:
    """The examples of files.

    Args:
        paths: files, folders or patterns.
        task: key of `FIELDS`.
        convert: makes an example of the fields of a row, or says why it is none.
        rows: how rows are read.

    Raises:
        FileNotFoundError: a path has no file.
        DataError: rows that cannot be used, all in one message; a field is unknown; there is no row at all.
    """
    unknown = sorted(set(rows.names) - set(FIELDS[task]))
    if unknown:
        raise DataError(f"field {unknown[0]!r} is not one of task {task}: {', '.join(FIELDS[task])}")
    problems = Problems(rows.skip_bad)
    found: Examples[E] = Examples([], [])
    for path in (file for source in paths for file in _files(source)):
        for row in _rows(path, task, rows):
            if isinstance(row, Problem):
                if not problems.add(row):
                    break
                continue
            place, values = row
            fields = _fields(values, task, rows)
            example = fields if isinstance(fields, Bad) else convert(fields)
            if not isinstance(example, Bad):
                found.items.append(example)
                found.places.append(f"{path}, {place}" if place else str(path))
            elif not problems.add(Problem(path, place, example.what)):
                break
    problems.raise_any()
    if not found.items:
        raise DataError(f"{', '.join(paths)}: no row at all")
    found.notes.extend(problems.notes())
    return found


def _rows(path: Path, task: str, rows: RowFormat) -> Iterator[tuple[str, Mapping[str, Any]] | Problem]:
    """The rows of a file, the nested articles of SQuAD's files taken apart."""
    for row in read_rows(path, rows.encoding, rows.columns or None):
        if isinstance(row, Problem) or task != "qa":
            yield row
            continue
        place, values = row
        for inner, question in squad_questions(values):
            yield ", ".join(part for part in (place, inner) if part), question


def _files(path: str) -> list[Path]:
    """The files of labelled rows that a path stands for."""
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        files = sorted(p for p in root.rglob("*") if p.is_file() and row_kind_of(p) and not p.name.startswith("."))
        # What `datasets.save_to_disk` writes beside the data.
        files = [p for p in files if p.name not in ("state.json", "dataset_info.json", "dataset_dict.json")]
        if files:
            return files
        raise FileNotFoundError(f"{path}: no file of labelled rows there (known: {ROWS_KNOWN})")
    return Source(path).files()


def _fields(values: Mapping[str, Any], task: str, rows: RowFormat) -> dict[str, Any] | Bad:
    """The fields of a row by the task's names; one that it lacks and need not have is left out."""
    names = rows.names
    predicted = TARGETS[task] if rows.unlabelled else frozenset[str]()
    out: dict[str, Any] = {}
    for wanted, usual in FIELDS[task].items():
        if wanted in names:
            name = names[wanted] if names[wanted] in values else None
        else:
            name = next((each for each in usual if each in values), None)
        if name is not None and values[name] is not None:
            out[wanted] = values[name]
        elif (wanted in names or wanted not in OPTIONAL[task]) and wanted not in predicted:
            asked = repr(names[wanted]) if wanted in names else f"{wanted!r} (or {', '.join(map(repr, usual[1:]))})"
            empty = "is empty" if name is not None else "is missing"
            there = ", ".join(map(str, values)) or "none"
            return Bad(f"the field {asked} {empty}; the row has the fields: {there:.200}")
    return out


# --- splitting ---------------------------------------------------------------------------------------------------


def _compared(item: Any) -> str:
    """What decides whether two examples are equal."""
    return " ".join(item.content.split()).casefold()


def overlap(train: Examples[E], other: Examples[E], name: str) -> str | None:
    """A note if examples of another part are equal to some of training, as `split_examples` compares them."""
    known = {_compared(item) for item in train.items}
    count = sum(_compared(item) in known for item in other.items)
    if not count:
        return None
    rows = f"{count} of {len(other.items)} {name} rows"
    return f"{rows} have texts that training rows have too, so scores on them say little about new texts"


def split_examples(examples: Examples[E], shares: Sequence[float], seed: int) -> list[Examples[E]]:
    """Split examples at random, equal texts into the same part, so that no part knows another's.

    Texts count as equal if they differ in case and white space alone.

    Args:
        examples: to split.
        shares: of each part but the first, which gets the rest.
        seed: determines the split.

    Raises:
        DataError: the first part or one with a share would be empty.
    """
    groups: dict[str, list[int]] = {}
    for number, item in enumerate(examples.items):
        groups.setdefault(_compared(item), []).append(number)
    members = list(groups.values())
    order = np.random.Generator(np.random.PCG64([seed, 0x5711])).permutation(len(members))
    parts: list[list[int]] = []
    first = 0
    for share in shares:
        stop = first + (max(1, round(share * len(members))) if share > 0 else 0)
        parts.append(sorted(n for g in order[first:stop] for n in members[g]))
        first = stop
    rest = sorted(n for g in order[first:] for n in members[g])
    if not rest:
        raise DataError(f"{len(members)} different texts are too few to set {sum(shares):.0%} of them aside")
    return [examples.pick(numbers) for numbers in (rest, *parts)]


# --- labels ------------------------------------------------------------------------------------------------------


def labelled(kind: str) -> Callable[[Mapping[str, Any]], Labelled | Bad]:
    """Makes a `Labelled` of a row's fields.

    Args:
        kind: "one" (a name or an integer), "several" (a list of them, or names joined by `|`), or "number".
    """

    def convert(fields: Mapping[str, Any]) -> Labelled | Bad:
        for name in ("text", "pair"):
            if name in fields and (not isinstance(fields[name], str) or (name == "text" and not fields[name].strip())):
                return Bad(f"{name} is {_shown(fields[name])}; expected a text")
        label = _LABELS[kind](fields["label"])
        return label if isinstance(label, Bad) else Labelled(fields["text"], fields.get("pair"), label)

    return convert


def _name(value: Any) -> str | Bad:
    if isinstance(value, bool) or not isinstance(value, str | int) or (isinstance(value, str) and not value.strip()):
        return Bad(f"label is {_shown(value)}; expected a name or an integer")
    return str(value).strip()


def _names(value: Any) -> tuple[str, ...] | Bad:
    values = value.split("|") if isinstance(value, str) else value
    if not isinstance(values, list | tuple):
        return Bad(f"label is {_shown(value)}; expected a list of names, or names joined by |")
    names = [_name(each) for each in values if not (isinstance(each, str) and not each.strip())]
    return next((n for n in names if isinstance(n, Bad)), None) or tuple(dict.fromkeys(map(str, names)))


def _number(value: Any) -> float | Bad:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    return number if math.isfinite(number) else Bad(f"label is {_shown(value)}; expected a finite number")


_LABELS: dict[str, Callable[[Any], Any]] = {"one": _name, "several": _names, "number": _number}


def _shown(value: Any) -> str:
    return f"{json.dumps(value, default=str):.60}"


# --- conversations -----------------------------------------------------------------------------------------------

_SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool", "user": "user",
             "assistant": "assistant", "function_call": "assistant", "observation": "tool"}  # fmt: skip
ROLES = ("system", "developer", "user", "assistant", "tool")


def conversation(fields: Mapping[str, Any]) -> Conversation | Bad:
    """Makes a `Conversation` of a row's fields: messages in OpenAI's form (role, content) or ShareGPT's (from, value).

    Each must have a turn of the assistant, and turns of the user must not follow each other.
    """
    messages, tools = (_parsed(fields.get(name), name) for name in ("messages", "tools"))
    for value in (messages, tools):
        if isinstance(value, Bad):
            return value
    if not isinstance(messages, list) or not messages:
        return Bad(f"messages is {_shown(messages)}; expected a list of messages")
    out: list[dict[str, Any]] = []
    for number, message in enumerate(messages, 1):
        made = _message(message)
        if isinstance(made, Bad):
            return Bad(f"message {number}: {made.what}")
        if made["role"] == "user" and out and out[-1]["role"] == "user":
            return Bad(f"messages {number - 1} and {number} are both of the user; the assistant must answer in between")
        if made["role"] in ("system", "developer") and out:
            return Bad(f"message {number} has the role {made['role']!r}; only the first message can")
        out.append(made)
    if not any(message["role"] == "assistant" for message in out):
        return Bad("there is no message of the assistant, so there is nothing to learn")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return Bad(f"tools is {_shown(tools)}; expected a list of objects")
    return Conversation(tuple(out), tuple(tools or ()))


def _parsed(value: Any, name: str) -> Any:
    """A value that may be JSON in a string, as tables of strings have it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return Bad(f"{name} is {_shown(value)}; expected a list")


def _message(value: Any) -> dict[str, Any] | Bad:
    if not isinstance(value, dict):
        return Bad(f"{_shown(value)} is no object")
    if "from" in value and "role" not in value:
        role = _SHAREGPT.get(str(value["from"]))
        if role is None:
            return Bad(f"from is {_shown(value['from'])}; expected one of {', '.join(_SHAREGPT)}")
        return _message({"role": role, "content": value.get("value")})
    if value.get("role") not in ROLES:
        return Bad(f"role is {_shown(value.get('role'))}; expected one of {', '.join(ROLES)}")
    content, calls = value.get("content"), value.get("tool_calls")
    if not isinstance(content, str | list) and not (content is None and calls):
        return Bad(f"content is {_shown(content)}; expected a text")
    # Tables give every message every key; those that are null stand for nothing.
    return {name: each for name, each in value.items() if each is not None or name == "content"}
