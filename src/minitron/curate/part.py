"""One part of the input through the stages, into a file of Arrow that later stages read at any place."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from ..data.documents.problems import Bad
from ..files import new_file, write_text
from .batch import Batch, Evidence, Notes, Stage, TokenCounter, changed_texts, run_stages
from .near import band_keys
from .personal import masked
from .pieces import KINDS, piece_hashes, to_drop, without_pieces
from .reading import Found, Span, documents
from .recipe import Recipe
from .stages import stages_of
from .tally import MOST_EXAMPLES, StageTally
from .texts import Texts
from .word_kernels import grams

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
        ("quality_score", pa.float32()),
        ("tokens", pa.int64()),
    ]
)
_SHOWN_BAD = 300
_WARM_UP = (
    "The first text of a process, with some words in it and a few more of them.\nIt has lines; and paragraphs.\n\n"
    "So every kernel is compiled, or loaded, before a clock runs: 1, 2, 3 and so on to the end of that text. " * 2
)


def part_path(folder: Path, number: int, kind: str = "documents") -> Path:
    """Where a part's documents are, without repeated pieces if `kind` is "pieces"; `.json` beside it says what was
    done, and that the part is complete."""
    suffix = "" if kind == "documents" else f".{kind}"
    return folder / f"part-{number:06d}{suffix}.arrow"


def array_path(folder: Path, number: int, name: str) -> Path:
    """An array with a row for each document of a part: `keys` (of bands) and `embeddings`; or its `pieces`."""
    return folder / f"part-{number:06d}.{name}.npy"


def compares_pieces(recipe: Recipe) -> bool:
    """Whether paragraphs or lines are compared across documents, which changes texts after all parts were read."""
    return recipe.exact is not None and (recipe.exact.paragraphs or recipe.exact.lines)


def process_part(part: tuple[Span, ...], number: int, recipe: Recipe, folder: Path) -> None:
    """Read a part, put it through the stages and write it; nothing is done if it is complete already."""
    record = part_path(folder, number).with_suffix(".json")
    if record.exists():
        return
    stages = stages_of(recipe, folder)
    startup = warm_up(recipe, stages)
    count_tokens = _token_counter(recipe)
    evidence = Evidence({name: StageTally() for name in ("read", *stages, *(["tokens"] if count_tokens else []))})
    bad, sources = _BadDocuments(), _Sources()
    with _PartWriter(folder, number, "documents", recipe, last=not compares_pieces(recipe)) as writer:
        for batch in _batches(documents(part, recipe), bad, evidence.tallies["read"], count_tokens, evidence):
            sources.add(batch)
            evidence.distributions.add("bytes", batch.texts.sizes())
            if batch.tokens is not None:
                evidence.distributions.add("tokens", batch.tokens)
            writer.add(run_stages(batch, stages, evidence, count_tokens))
    if count_tokens is not None:
        last = evidence.tallies[list(stages)[-1] if stages else "read"]
        tokens = evidence.tallies["tokens"]
        tokens.documents_in = tokens.documents_out = last.documents_out
        tokens.bytes_in = tokens.bytes_out = last.bytes_out
        tokens.tokens_in = tokens.tokens_out = last.tokens_out
    facts = {
        "documents": writer.documents,
        "startup_seconds": startup,
        **writer.seconds,
        "bad": bad.as_dict(),
        "stages": {name: tally.as_dict() for name, tally in evidence.tallies.items()},
        "languages": dict(evidence.languages),
        "distributions": evidence.distributions.as_dict(),
        "sources": sources.counts,
    }
    write_text(record, json.dumps(facts, ensure_ascii=False))


def drop_pieces(number: int, start: int, recipe: Recipe, folder: Path) -> None:
    """Write a part again without the paragraphs and lines that came before.

    Args:
        number: of the part.
        start: index of its first piece among the pieces of all parts; see `pieces.repeated_pieces`.
        recipe, folder: as for `process_part`. The folder holds the arrays `repeated` and `firsts`.
    """
    record = part_path(folder, number, "pieces").with_suffix(".json")
    if record.exists():
        return
    settings: Any = recipe.exact
    repeated, firsts = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("repeated", "firsts"))
    hashes = np.load(array_path(folder, number, "pieces"))
    drop = to_drop(hashes, start, repeated, firsts)
    count_tokens, tally, at = _token_counter(recipe), StageTally(), 0
    with _PartWriter(folder, number, "pieces", recipe, last=True) as writer:
        for batch in _arrow_batches(folder, number):
            cpu, wall = time.process_time(), time.perf_counter()
            pieces = len(piece_hashes(batch.texts, settings))
            texts, gone = without_pieces(batch.texts, settings, drop[at : at + pieces])
            at += pieces
            changed = replace(batch, texts=texts)
            different = changed_texts(batch.texts, texts)
            for index in map(int, different[:MOST_EXAMPLES]):
                tally.change(batch.sources[index], batch.places[index], batch.texts[index], texts[index])
            if count_tokens is not None and batch.tokens is not None and len(different):
                mask = np.isin(np.arange(len(batch)), different)
                batch_tokens = batch.tokens.copy()
                batch_tokens[mask] = count_tokens(texts.take(mask))
                changed = replace(changed, tokens=batch_tokens)
            empty = np.asarray(["nothing left" if size == 0 else None for size in texts.sizes()], dtype=object)
            after = changed.take(texts.sizes() > 0)
            tally.add(batch, after, empty, time.process_time() - cpu, time.perf_counter() - wall)
            tally.dropped += Counter({kind: count for kind, count in zip(KINDS, gone, strict=True) if count})
            writer.add(after)
    facts = {"documents": writer.documents, **writer.seconds, "stage": tally.as_dict()}
    write_text(record, json.dumps(facts, ensure_ascii=False))


def _token_counter(recipe: Recipe) -> TokenCounter | None:
    if recipe.tokens is None:
        return None
    from .scoring import token_counter

    return token_counter(recipe.tokens.tokenizer)


_warm: set[Recipe] = set()


def warm_up(recipe: Recipe, stages: dict[str, Stage]) -> float:
    """Compile or load the kernels and models of a recipe in this process; CPU-seconds, 0 after the first time."""
    if recipe in _warm:
        return 0.0
    _warm.add(recipe)
    start = time.process_time()
    batch = Batch(Texts.of([_WARM_UP, _WARM_UP]), ["", ""], ["", ""])
    for stage in stages.values():
        stage(batch, Notes())
    count_tokens = _token_counter(recipe)
    if count_tokens is not None:
        count_tokens(batch.texts)
    if recipe.near is not None:
        band_keys(batch.texts, recipe.near)
        grams(batch.texts, recipe.near.ngram)
    if recipe.exact is not None and compares_pieces(recipe):
        without_pieces(batch.texts, recipe.exact, np.ones(len(piece_hashes(batch.texts, recipe.exact)), dtype=bool))
    return time.process_time() - start


class _PartWriter:
    """The file of a part and, of the last texts of its documents, what duplicates are found by."""

    def __init__(self, folder: Path, number: int, kind: str, recipe: Recipe, last: bool) -> None:
        self._folder, self._number, self._recipe, self._last = folder, number, recipe, last
        self._kind, self._files = kind, ExitStack()
        self._arrays: dict[str, list[np.ndarray[Any, Any]]] = {}
        self.documents = 0
        self.seconds = {"near_seconds": 0.0, "semantic_seconds": 0.0, "pieces_seconds": 0.0}

    def __enter__(self) -> _PartWriter:
        target = part_path(self._folder, self._number, self._kind)
        with ExitStack() as files:
            draft = files.enter_context(new_file(target, overwrite=True))
            raw = files.enter_context(pa.OSFile(str(draft), "wb"))
            self._writer = files.enter_context(ipc.new_file(raw, SCHEMA))
            self._files = files.pop_all()
        return self

    def add(self, batch: Batch) -> None:
        """Write the documents of a batch."""
        if not len(batch):
            return
        self.documents += len(batch)
        self._writer.write_batch(_record_batch(batch))
        recipe = self._recipe
        if not self._last:
            self._add("pieces", "pieces_seconds", lambda: piece_hashes(batch.texts, recipe.exact))  # type: ignore[arg-type]
            return
        if recipe.near is not None:
            self._add("keys", "near_seconds", lambda: band_keys(batch.texts, recipe.near))  # type: ignore[arg-type]
        if recipe.semantic is not None:
            from .scoring import embeddings

            self._add("embeddings", "semantic_seconds", lambda: embeddings(batch.texts, recipe.semantic))  # type: ignore[arg-type]

    def _add(self, name: str, clock: str, make: Any) -> None:
        start = time.process_time()
        self._arrays.setdefault(name, []).append(make())
        self.seconds[clock] += time.process_time() - start

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)
        if kind is None:
            for name, rows in self._arrays.items():
                path = array_path(self._folder, self._number, name)
                with new_file(path, overwrite=True) as draft, draft.open("wb") as file:
                    np.save(file, np.concatenate(rows))


class _Sources:
    """Documents and bytes of each file."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}

    def add(self, batch: Batch) -> None:
        for source, size in zip(batch.sources, batch.texts.sizes().tolist(), strict=True):
            found = self.counts.setdefault(source, [0, 0])
            found[0] += 1
            found[1] += size


class _BadDocuments:
    def __init__(self) -> None:
        self.count = self.empty = 0
        self.named: list[str] = []

    def add(self, found: Found, why: Bad) -> None:
        self.count += 1
        if len(self.named) < MOST_BAD:
            what = masked(why.what, _SHOWN_BAD)
            self.named.append(f"{found.path}{', ' if found.place else ''}{found.place}: {what}")

    def as_dict(self) -> dict[str, Any]:
        return {"count": self.count, "empty": self.empty, "named": self.named}


def _batches(
    found: Iterable[Found], bad: _BadDocuments, tally: StageTally, count_tokens: TokenCounter | None, evidence: Evidence
) -> Iterator[Batch]:
    documents = iter(found)
    while True:
        cpu, wall = time.process_time(), time.perf_counter()
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
        del texts
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if count_tokens is not None:
            start, begun = time.process_time(), time.perf_counter()
            batch = replace(batch, tokens=count_tokens(batch.texts))
            evidence.tallies["tokens"].cpu_seconds += time.process_time() - start
            evidence.tallies["tokens"].wall_seconds += time.perf_counter() - begun
        tally.add(batch, batch, None, cpu, wall)
        yield batch


def _record_batch(batch: Batch) -> pa.RecordBatch:
    data, offsets = pa.py_buffer(batch.texts.data), pa.py_buffer(batch.texts.offsets)
    text = pa.LargeStringArray.from_buffers(len(batch), offsets, data)
    bounds = batch.texts.offsets.tolist()
    view = memoryview(batch.texts.data)  # type: ignore[arg-type]
    digests = [hashlib.blake2b(view[a:b], digest_size=16).digest() for a, b in itertools.pairwise(bounds)]
    none = [None] * len(batch)
    codes, scores = batch.languages or (none, none)
    columns = [
        text,
        pa.array(batch.sources, pa.string()),
        pa.array(batch.places, pa.string()),
        pa.array(digests, pa.binary(16)),
        pa.array(codes, pa.string()),
        pa.array(scores, pa.float32()),
        pa.array(none if batch.scores is None else batch.scores, pa.float32(), from_pandas=True),  # NaN becomes null
        pa.array(none if batch.tokens is None else batch.tokens, pa.int64()),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _arrow_batches(folder: Path, number: int) -> Iterator[Batch]:
    """The batches of a part as they were written."""
    file = ipc.open_file(pa.memory_map(str(part_path(folder, number))))
    for index in range(file.num_record_batches):
        rows = file.get_batch(index)
        column = {name: rows.column(name) for name in rows.schema.names}
        _, offsets, data = column["text"].buffers()
        texts = Texts(
            np.frombuffer(data or b"", dtype=np.uint8), np.frombuffer(offsets, dtype=np.int64)[: rows.num_rows + 1]
        )
        known = column["language"].null_count == 0
        yield Batch(
            Texts(texts.data[: texts.offsets[-1]], texts.offsets),
            column["source"].to_pylist(),
            column["place"].to_pylist(),
            {},
            (column["language"].to_numpy(False), column["language_score"].to_numpy()) if known else None,
            None if column["quality_score"].null_count == rows.num_rows else column["quality_score"].to_numpy(False),
            None if column["tokens"].null_count else column["tokens"].to_numpy(),
        )


def has_record(folder: Path, number: int, kind: str = "documents") -> bool:
    """Whether a part is complete."""
    return part_path(folder, number, kind).with_suffix(".json").exists()


def read_record(folder: Path, number: int, kind: str = "documents") -> dict[str, Any]:
    """What was done to a complete part."""
    return json.loads(part_path(folder, number, kind).with_suffix(".json").read_text(encoding="utf-8"))


def read_table(folder: Path, number: int, columns: list[str] | None = None) -> pa.Table:
    """The documents of a complete part, mapped into memory; without repeated pieces, if those were dropped."""
    path = part_path(folder, number, "pieces")
    path = path if has_record(folder, number, "pieces") else part_path(folder, number)
    table = ipc.open_file(pa.memory_map(str(path))).read_all()
    return table if columns is None else table.select(columns)


def read_array(folder: Path, number: int, name: str, columns: int) -> np.ndarray[Any, Any]:
    """An array of `array_path`; without rows if the part has no documents."""
    path = array_path(folder, number, name)
    return np.load(path, mmap_mode="r") if path.exists() else np.zeros((0, columns), dtype=np.uint64)


def read_digests(folder: Path, number: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """(documents, 2) uint64: 128 bits of BLAKE2b of each text."""
    column = read_table(folder, number, ["digest"]).column(0)
    parts = [
        np.frombuffer(c.buffers()[1], dtype="<u8").reshape(-1, 2)[c.offset : c.offset + len(c)] for c in column.chunks
    ]
    return np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.uint64)
