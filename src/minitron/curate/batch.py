"""Documents on their way through the stages that look at one at a time, and what is recorded on the way."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .distributions import Distributions
from .quality import Mask, Reasons
from .tally import MOST_EXAMPLES, StageTally
from .texts import Texts

TokenCounter = Callable[[Texts], np.ndarray[Any, np.dtype[np.int64]]]
"""(texts,) int64: tokens of each text."""


@dataclass
class Notes:
    """What one stage did and measured."""

    replaced: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    measured: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    """Values by a name of `distributions.EDGES`."""


@dataclass(frozen=True)
class Batch:
    """Documents with where they come from."""

    texts: Texts
    sources: Sequence[str]
    """File of each."""
    places: Sequence[str]
    """Where in the file."""
    counts: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    """What was measured on these texts, a row for each."""
    languages: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None = None
    """(documents,) codes and (documents,) scores, if they were identified."""
    scores: np.ndarray[Any, np.dtype[np.float32]] | None = None
    """(documents,) of `quality_score`."""
    tokens: np.ndarray[Any, np.dtype[np.int64]] | None = None
    """(documents,) if they are counted."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, kept: Mask) -> Batch:
        """The documents where `kept` is true."""
        if kept.all():
            return self
        chosen = np.flatnonzero(kept).tolist()
        return Batch(
            self.texts.take(kept),
            [self.sources[i] for i in chosen],
            [self.places[i] for i in chosen],
            {name: rows[kept] for name, rows in self.counts.items()},
            None if self.languages is None else (self.languages[0][kept], self.languages[1][kept]),
            None if self.scores is None else self.scores[kept],
            None if self.tokens is None else self.tokens[kept],
        )


Stage = Callable[[Batch, Notes], tuple[Batch, Reasons | None]]
"""The batch with changed texts, and why documents of it are to be removed."""


@dataclass
class Evidence:
    """What the stages did to the batches of a part."""

    tallies: dict[str, StageTally]
    distributions: Distributions = field(default_factory=Distributions)
    languages: Counter[str] = field(default_factory=Counter)
    """Documents by language, before those of other languages are removed."""


def run_stages(
    batch: Batch, stages: dict[str, Stage], evidence: Evidence, count_tokens: TokenCounter | None = None
) -> Batch:
    """Put a batch through all stages; what they did is added to `evidence`."""
    for name, stage in stages.items():
        cpu, wall, notes, tally = time.process_time(), time.perf_counter(), Notes(), evidence.tallies[name]
        changed, reasons = stage(batch, notes)
        kept = None if reasons is None else np.asarray([reason is None for reason in reasons], dtype=bool)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if changed.texts is not batch.texts:
            different = changed_texts(batch.texts, changed.texts)
            if count_tokens is not None:
                changed = _recounted(changed, different, count_tokens, evidence.tallies["tokens"])
            for index in map(int, different[:MOST_EXAMPLES]):
                place = batch.sources[index], batch.places[index]
                tally.change(*place, batch.texts[index], changed.texts[index])
        after = changed if kept is None else changed.take(kept)
        tally.add(batch, after, reasons, cpu, wall)
        tally.replaced += notes.replaced
        tally.dropped += notes.dropped
        evidence.languages += notes.languages
        for what, values in notes.measured.items():
            evidence.distributions.add(what, values)
        batch = after
    return batch


def changed_texts(before: Texts, after: Texts) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Indices of the texts that differ, of as many texts before and after."""
    if np.array_equal(before.offsets, after.offsets) and np.array_equal(before.data, after.data):
        return np.zeros(0, dtype=np.int64)
    sizes = before.sizes() != after.sizes()
    for index in np.flatnonzero(~sizes).tolist():
        sizes[index] = before.raw(index) != after.raw(index)
    return np.flatnonzero(sizes)


def _recounted(batch: Batch, different: Any, count_tokens: TokenCounter, tally: StageTally) -> Batch:
    """The batch with the tokens of the texts that changed counted again."""
    if not len(different) or batch.tokens is None:
        return batch
    start, wall = time.process_time(), time.perf_counter()
    mask = np.zeros(len(batch), dtype=bool)
    mask[different] = True
    tokens = batch.tokens.copy()
    tokens[mask] = count_tokens(batch.texts.take(mask))
    tally.cpu_seconds += time.process_time() - start
    tally.wall_seconds += time.perf_counter() - wall
    return replace(batch, tokens=tokens)
