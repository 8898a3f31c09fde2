"""Removal of documents that share word n-grams with items of evaluations, whatever the case and punctuation.

An item is any text of an evaluation: a question, a choice, a passage. Its n-grams are those of 13 words; of an item of
fewer words, but at least `short`, it is the item as a whole.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..data.documents import DataError, read_documents
from .recipe import Decontaminate
from .texts import Texts
from .word_kernels import flat_grams, gram_filter, suspects, word_counts

Index = dict[int, tuple[np.ndarray[Any, np.dtype[np.uint64]], np.ndarray[Any, np.dtype[np.int64]]]]
"""By n: sorted hashes of n-grams, and which source each is of."""


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


@functools.lru_cache(maxsize=1)
def build_index(settings: Decontaminate) -> tuple[tuple[str, ...], Index]:
    """Names of the sources of items, and their n-grams.

    Raises:
        ValueError: a source that cannot be read, or one without an item that is long enough.
    """
    sources = {task: _task_items(task, settings.data) for task in settings.tasks}
    sources |= {name: _file_items(name) for name in settings.files}
    found: dict[int, list[tuple[np.ndarray[Any, Any], int]]] = {}
    for number, (name, items) in enumerate(sources.items()):
        texts = Texts.of(items)
        words = word_counts(texts)
        if not (words >= settings.short).any():
            raise ValueError(f"decontaminate: {name} has no item of at least {settings.short} words")
        for n in range(settings.short, settings.ngram + 1):
            chosen = words >= n if n == settings.ngram else words == n
            if chosen.any():
                hashes, _ = flat_grams(texts.take(chosen), n)
                found.setdefault(n, []).append((np.unique(hashes), number))
    index: Index = {}
    for n, parts in found.items():
        hashes = np.concatenate([part for part, _ in parts])
        numbers = np.concatenate([np.full(len(part), number) for part, number in parts])
        order = np.argsort(hashes, kind="stable")
        index[n] = hashes[order], numbers[order]
    return tuple(sources), index


def evaluations_digest(settings: Decontaminate) -> str:
    """SHA-256 of the items as they are on disk now, and the index of this process made anew from them."""
    build_index.cache_clear()
    _beginnings.cache_clear()
    names, index = build_index(settings)
    digest = hashlib.sha256("\0".join(names).encode())
    for n, (hashes, numbers) in sorted(index.items()):
        digest.update(f"{n} {len(hashes)} ".encode() + hashes.tobytes() + numbers.tobytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def _beginnings(settings: Decontaminate) -> Any:
    """The first `short` words of all n-grams of items: without them a text has none of those."""
    build_index(settings)  # refuses sources without items
    items = [item for task in settings.tasks for item in _task_items(task, settings.data)]
    items += [item for name in settings.files for item in _file_items(name)]
    texts = Texts.of(items)
    return gram_filter(flat_grams(texts.take(word_counts(texts) >= settings.short), settings.short)[0])


def contaminated(texts: Texts, settings: Decontaminate) -> np.ndarray[Any, np.dtype[np.object_]]:
    """(texts,) str or None: the source of an item that a text holds."""
    reasons = np.full(len(texts), None, dtype=object)
    suspicious = suspects(texts, settings.short, _beginnings(settings))
    if suspicious.any():
        reasons[suspicious] = _sources(texts.take(suspicious), settings)
    return reasons


def _sources(texts: Texts, settings: Decontaminate) -> np.ndarray[Any, np.dtype[np.object_]]:
    """As `contaminated`, without a filter first."""
    names, index = build_index(settings)
    reasons = np.full(len(texts), None, dtype=object)
    for n, (hashes, numbers) in sorted(index.items()):
        grams, ends = flat_grams(texts, n)
        place = np.minimum(np.searchsorted(hashes, grams), len(hashes) - 1)
        for hit in np.flatnonzero(hashes[place] == grams).tolist():
            text = int(np.searchsorted(ends, hit, side="right")) - 1
            if reasons[text] is None:
                reasons[text] = Path(names[numbers[place[hit]]]).name
    return reasons
