"""What a curation will take, from a sample of its input: documents, time, memory and disk."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.documents.problems import Bad
from .across import DOCUMENT_BYTES
from .batch import Batch, Evidence, run_stages
from .near import band_keys
from .part import BATCH_BYTES, warm_up
from .reading import Span, documents
from .recipe import Recipe
from .stages import stages_of
from .tally import StageTally
from .texts import Texts

_SAMPLE_FILES = 8
_SAMPLE_CHARACTERS = 100_000
"""Of each sampled file."""
_COMPRESSED = {".gz": 3.0, ".xz": 4.0, ".bz2": 3.5, ".zst": 3.0, ".parquet": 2.5, ".warc": 1.0, ".wet": 1.0}
"""Text in a file for each byte on disk, about."""
_PROCESS_BYTES = 450_000_000
"""Of an idle worker with its libraries and compiled kernels, about; see `docs/curation.md`."""
_BATCH_FACTOR = 14
"""Bytes that a worker holds for each character of a batch, about: the text as Python's and as bytes, before and after a
stage, and the scratch of the kernels."""
_GRAM_BYTES = 20_000 * 8 * 700
"""Sets of n-grams of candidates, `across.AllParts.gram_reader`, at 700 words a document."""
_OTHER_WORK = 1.6
"""Reading, digests, and writing the shards, relative to the stages."""


@dataclass(frozen=True)
class Estimate:
    """About what a curation takes."""

    documents: int
    text_bytes: int
    seconds: float
    """Wall time, with the workers that were asked for."""
    worker_bytes: int
    """Memory of each worker."""
    first_bytes: int
    """Memory of the process that compares all documents."""
    disk_bytes: int
    """In the output folder, until the run ends: the documents once more and the shards."""
    workers: int
    startup_seconds: float = 0.0
    """CPU-seconds that this process took to compile or load kernels and models, for the estimate itself."""

    def sentence(self) -> str:
        """The estimate for a person."""
        minutes = self.seconds / 60
        lasts = f"{self.seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min"
        return (
            f"about {self.documents:,} documents and {self.text_bytes / 1e6:,.0f} MB of text: {lasts} with "
            f"{self.workers} worker{'s' if self.workers > 1 else ''}, {self.worker_bytes / 1e9:.1f} GB of memory each, "
            f"{self.first_bytes / 1e9:.1f} GB to compare all documents, {self.disk_bytes / 1e9:.1f} GB of disk"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def document_bytes(recipe: Recipe, hidden_size: int = 0) -> int:
    """Memory of the comparison of all documents, for each of them."""
    # The keys and the flags of equal ones; the order of the documents and of one band's keys.
    near = 0 if recipe.near is None else 9 * recipe.near.bands + 40
    shuffle = 0 if recipe.shuffle is None and recipe.mix is None else 40
    return DOCUMENT_BYTES + 32 + near + shuffle + 6 * hidden_size


def estimate(files: list[Path], recipe: Recipe, workers: int) -> Estimate:
    """Put the beginnings of a few files through the stages, and scale up."""
    chosen = files[:: max(1, len(files) // _SAMPLE_FILES)][:_SAMPLE_FILES]
    texts: list[str] = []
    longest = 0
    for path in chosen:
        size = 0
        for found in itertools.islice(documents((Span(str(path)),), recipe), 200):
            if not isinstance(found.text, Bad) and found.text.strip():
                texts.append(found.text)
                size += len(found.text)
                longest = max(longest, len(found.text))
            if size >= _SAMPLE_CHARACTERS:
                break
    total = int(sum(path.stat().st_size * _COMPRESSED.get(path.suffix.lower(), 1.0) for path in files))
    sample = Texts.of(texts)
    mean = len(sample.data) / max(1, len(sample))
    count = round(total / mean) if mean else 0
    hidden = _hidden_size(recipe)
    startup = warm_up(recipe, stages_of(recipe))
    rate = _seconds_per_byte(sample, recipe)
    batch = min(BATCH_BYTES, total) + longest
    return Estimate(
        documents=count,
        text_bytes=total,
        seconds=rate * total / workers + 3.0,
        worker_bytes=_PROCESS_BYTES + _BATCH_FACTOR * batch,
        first_bytes=_PROCESS_BYTES
        + count * document_bytes(recipe, hidden)
        + (min(_GRAM_BYTES, count * 700 * 8) if recipe.near is not None else 0),
        disk_bytes=int(total * (2.5 if recipe.output.format == "jsonl" else 1.6)),
        workers=workers,
        startup_seconds=startup,
    )


def _hidden_size(recipe: Recipe) -> int:
    if recipe.semantic is None:
        return 0
    from ..checkpoint.hf import read_config
    from ..loading import checkpoint_folder

    return read_config(checkpoint_folder(recipe.semantic.model)).hidden_size


def _seconds_per_byte(sample: Texts, recipe: Recipe) -> float:
    """CPU-seconds of the stages for each byte of the sample, with what else is done."""
    if not len(sample):
        return 0.0
    stages = stages_of(recipe)
    none = [""] * len(sample)
    evidence = Evidence({name: StageTally() for name in stages})
    start = time.process_time()
    run_stages(Batch(sample, none, none), stages, evidence)
    if recipe.near is not None:
        band_keys(sample, recipe.near)
    if recipe.tokens is not None:
        from .scoring import token_counter

        token_counter(recipe.tokens.tokenizer)(sample)
    return _OTHER_WORK * (time.process_time() - start) / len(sample.data) + 1e-8
