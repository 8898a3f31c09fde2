"""One part of the input through the stages, into a file of Arrow that later stages read at any place."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from ..data.documents.problems import Bad
from ..files import new_file, write_text
from .near import band_keys
from .reading import Found, Span, documents
from .recipe import Recipe
from .stages import Batch, run_stages, stages_of
from .tally import StageTally
from .texts import Texts

BATCH_BYTES = 16_000_000
"""Text that a worker holds at once, in characters."""
MOST_BAD = 20
"""Bad documents of a part that are named; the others are counted."""
SCHEMA = pa.schema(
    [
        ("text", pa.large_string()),
        ("source", pa.string()),
        ("place", pa.string()),
        ("digest", pa.binary(16)),
        ("language", pa.string()),
        ("language_score", pa.float32()),
    ]
)


def part_path(folder: Path, number: int) -> Path:
    """Where a part's documents are; `.json` beside it says what was done, and that the part is complete."""
    return folder / f"part-{number:06d}.arrow"


def keys_path(folder: Path, number: int) -> Path:
    """The keys of a part's documents by which near duplicates are found."""
    return folder / f"part-{number:06d}.keys.npy"


def process_part(part: tuple[Span, ...], number: int, recipe: Recipe, folder: Path) -> None:
    """Read a part, put it through the stages and write it; nothing is done if it is complete already."""
    target = part_path(folder, number)
    record = target.with_suffix(".json")
    if record.exists():
        return
    stages = stages_of(recipe)
    tallies = {name: StageTally() for name in ("read", *stages)}
    bad = _BadDocuments()
    kept = 0
    keys: list[np.ndarray[Any, Any]] = []
    key_seconds = 0.0
    with (
        new_file(target, overwrite=True) as draft,
        pa.OSFile(str(draft), "wb") as raw,
        ipc.new_file(raw, SCHEMA) as writer,
    ):
        for batch in _batches(documents(part, recipe), bad, tallies["read"]):
            done = run_stages(batch, stages, tallies)
            if not len(done):
                continue
            kept += len(done)
            writer.write_batch(_record_batch(done))
            if recipe.near is not None:
                start = time.process_time()
                keys.append(band_keys(done.texts, recipe.near))
                key_seconds += time.process_time() - start
    if recipe.near is not None:
        empty = np.zeros((0, recipe.near.bands), dtype=np.uint64)
        with new_file(keys_path(folder, number), overwrite=True) as draft, draft.open("wb") as file:
            np.save(file, np.concatenate([empty, *keys]))
    facts = {
        "documents": kept,
        "near_seconds": key_seconds,
        "bad": bad.as_dict(),
        "stages": {name: tally.as_dict() for name, tally in tallies.items()},
    }
    write_text(record, json.dumps(facts, ensure_ascii=False))


class _BadDocuments:
    def __init__(self) -> None:
        self.count = self.empty = 0
        self.named: list[str] = []

    def add(self, found: Found, why: Bad) -> None:
        self.count += 1
        if len(self.named) < MOST_BAD:
            self.named.append(f"{found.path}{', ' if found.place else ''}{found.place}: {why.what}")

    def as_dict(self) -> dict[str, Any]:
        return {"count": self.count, "empty": self.empty, "named": self.named}


def _batches(found: Iterable[Found], bad: _BadDocuments, tally: StageTally) -> Iterator[Batch]:
    documents = iter(found)
    while True:
        start = time.process_time()
        texts: list[str] = []
        sources: list[str] = []
        places: list[str] = []
        size = 0
        for document in documents:
            if isinstance(document.text, Bad):
                bad.add(document, document.text)
            elif not document.text.strip():
                bad.empty += 1
            else:
                texts.append(document.text)
                sources.append(document.path)
                places.append(document.place)
                size += len(document.text)
                if size >= BATCH_BYTES:
                    break
        if not texts:
            return
        batch = Batch(Texts.of(texts), sources, places)
        tally.add(batch, batch, None, time.process_time() - start)
        yield batch


def _record_batch(batch: Batch) -> pa.RecordBatch:
    data, offsets = pa.py_buffer(batch.texts.data), pa.py_buffer(batch.texts.offsets)
    text = pa.LargeStringArray.from_buffers(len(batch), offsets, data)
    bounds = batch.texts.offsets.tolist()
    view = memoryview(batch.texts.data)  # type: ignore[arg-type]
    digests = [hashlib.blake2b(view[a:b], digest_size=16).digest() for a, b in itertools.pairwise(bounds)]
    codes, scores = batch.languages or ([None] * len(batch), [None] * len(batch))
    columns = [
        text,
        pa.array(batch.sources),
        pa.array(batch.places),
        pa.array(digests, pa.binary(16)),
        pa.array(codes, pa.string()),
        pa.array(scores, pa.float32()),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def read_record(folder: Path, number: int) -> dict[str, Any]:
    """What was done to a complete part."""
    return json.loads(part_path(folder, number).with_suffix(".json").read_text(encoding="utf-8"))


def read_table(folder: Path, number: int, columns: list[str] | None = None) -> pa.Table:
    """The documents of a complete part, mapped into memory."""
    table = ipc.open_file(pa.memory_map(str(part_path(folder, number)))).read_all()
    return table if columns is None else table.select(columns)


def read_digests(folder: Path, number: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """(documents, 2) uint64: 128 bits of BLAKE2b of each text."""
    column = read_table(folder, number, ["digest"]).column(0)
    parts = [
        np.frombuffer(c.buffers()[1], dtype="<u8").reshape(-1, 2)[c.offset : c.offset + len(c)] for c in column.chunks
    ]
    return np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.uint64)
