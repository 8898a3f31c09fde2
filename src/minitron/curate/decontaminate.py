"""Removal of documents that share word n-grams with items of evaluations, whatever the case and punctuation.

An item is any text of an evaluation: a question, a choice, a passage. Its n-grams are those of 13 words; of an item of
fewer words, but at least `short`, it is the item as a whole.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.documents import DataError, read_documents
from ..files import new_file
from .quality import Reasons
from .recipe import Decontaminate
from .texts import Texts
from .word_kernels import distinct, flat_grams, gram_filter, suspects, word_counts

Index = dict[int, tuple[np.ndarray[Any, np.dtype[np.uint64]], np.ndarray[Any, np.dtype[np.int64]]]]
"""By n: sorted hashes of n-grams, and which source each is of."""
EVALUATIONS = "evaluations.npz"
_KINDS = "hashes", "sources"
"""Names of the two arrays of an index in that file."""


def strings_of(value: Any) -> Iterator[str]:
    """All texts in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from strings_of(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings_of(part)


def _task_items(task: str, data: str | None) -> list[str]:
    """All texts of the examples that a task is scored on.

    Raises:
        ValueError: `minitron eval` knows no such task, or its files are not in `data`.
    """
    from ..evaluate.task_data import TASK_FILES, TEST_SPLIT, read_task

    if task not in TASK_FILES:
        raise ValueError(f"decontaminate.tasks: no task {task!r}; known: {', '.join(TASK_FILES)}")
    if data is None:
        raise ValueError("decontaminate.tasks needs decontaminate.data, the folder with the files of the tasks")
    rows = read_task(task, Path(data).expanduser(), fewshot=False)[TEST_SPLIT[task]]
    return [text for row in rows for text in strings_of(row)]


def _file_items(name: str) -> list[str]:
    """All texts of the rows of a file of JSON lines; of another kind of file its documents."""
    path = Path(name).expanduser()
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return list(read_documents(path))
    items: list[str] = []
    number = 0
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):
            number += 1
            if line.strip():
                items += strings_of(json.loads(line))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    return items


@dataclass(frozen=True)
class Evaluations:
    """What texts are compared with: the n-grams of the items of all sources."""

    names: tuple[str, ...]
    """Of the sources."""
    index: Index
    beginnings: tuple[np.ndarray[Any, np.dtype[np.uint8]], np.ndarray[Any, np.dtype[np.uint64]]]
    """The `gram_filter` of the first `short` words of all n-grams: a text without them has none of those."""

    def digest(self) -> str:
        """SHA-256 of the n-grams and their sources."""
        digest = hashlib.sha256("\0".join(self.names).encode())
        for n, (hashes, numbers) in sorted(self.index.items()):
            digest.update(f"{n} {len(hashes)} ".encode() + hashes.tobytes() + numbers.tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write them to a folder, where `saved_evaluations` finds them."""
        arrays: dict[str, Any] = {}
        for n, pair in self.index.items():
            arrays |= {f"{kind}-{n}": part for kind, part in zip(_KINDS, pair, strict=True)}
        arrays |= {"bits": self.beginnings[0], "beginnings": self.beginnings[1], "names": np.asarray(self.names)}
        with new_file(folder / EVALUATIONS, overwrite=True) as draft, draft.open("wb") as file:
            np.savez(file, **arrays)


@functools.lru_cache(maxsize=1)
def read_evaluations(settings: Decontaminate) -> Evaluations:
    """The evaluations of a recipe, from their files.

    Raises:
        ValueError: a source that cannot be read, or one without an item that is long enough.
    """
    sources = {task: _task_items(task, settings.data) for task in settings.tasks}
    sources |= {name: _file_items(name) for name in settings.files}
    found: dict[int, list[tuple[np.ndarray[Any, Any], int]]] = {}
    beginnings: list[np.ndarray[Any, np.dtype[np.uint64]]] = []
    for number, (name, items) in enumerate(sources.items()):
        texts = Texts.of(items)
        words = word_counts(texts)
        if not (words >= settings.short).any():
            raise ValueError(f"decontaminate: {name} has no item of at least {settings.short} words")
        beginnings.append(flat_grams(texts.take(words >= settings.short), settings.short)[0])
        for n in range(settings.short, settings.ngram + 1):
            chosen = words >= n if n == settings.ngram else words == n
            if chosen.any():
                hashes, _ = flat_grams(texts.take(chosen), n)
                found.setdefault(n, []).append((distinct(hashes), number))
    index: Index = {}
    for n, parts in found.items():
        hashes = np.concatenate([part for part, _ in parts])
        numbers = np.concatenate([np.full(len(part), number) for part, number in parts])
        order = np.argsort(hashes, kind="stable")
        index[n] = hashes[order], numbers[order]
    return Evaluations(tuple(sources), index, gram_filter(np.concatenate(beginnings)))


def evaluations_now(settings: Decontaminate) -> Evaluations:
    """As `read_evaluations`, from the files as they are now and not as this process read them before."""
    read_evaluations.cache_clear()
    return read_evaluations(settings)


def saved_evaluations(folder: Path) -> Evaluations:
    """What `Evaluations.save` wrote, so that not every worker reads all tasks."""
    state = (folder / EVALUATIONS).stat()
    return _load(folder / EVALUATIONS, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=1)
def _load(path: Path, *version: int) -> Evaluations:
    with np.load(path, allow_pickle=False) as arrays:
        sizes = sorted(int(name.split("-")[1]) for name in arrays.files if name.startswith(f"{_KINDS[0]}-"))
        index: Index = {n: (arrays[f"{_KINDS[0]}-{n}"], arrays[f"{_KINDS[1]}-{n}"]) for n in sizes}
        return Evaluations(tuple(arrays["names"].tolist()), index, (arrays["bits"], arrays["beginnings"]))


def contaminated(texts: Texts, settings: Decontaminate, evaluations: Evaluations) -> Reasons:
    """(texts,) str or None: the source of an item that a text holds."""
    reasons = np.full(len(texts), None, dtype=object)
    suspicious = suspects(texts, settings.short, evaluations.beginnings)
    if suspicious.any():
        reasons[suspicious] = _sources(texts.take(suspicious), evaluations)
    return reasons


def _sources(texts: Texts, evaluations: Evaluations) -> Reasons:
    """As `contaminated`, without a filter first."""
    reasons = np.full(len(texts), None, dtype=object)
    for n, (hashes, numbers) in sorted(evaluations.index.items()):
        grams, ends = flat_grams(texts, n)
        place = np.minimum(np.searchsorted(hashes, grams), len(hashes) - 1)
        for hit in np.flatnonzero(hashes[place] == grams).tolist():
            text = int(np.searchsorted(ends, hit, side="right")) - 1
            if reasons[text] is None:
                reasons[text] = Path(evaluations.names[numbers[place[hit]]]).name
    return reasons
