"""The stages that look at one document at a time: each a function from a batch to a smaller or changed batch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import quality
from .decontaminate import build_index, contaminated
from .language import language_of, require_model
from .normalize import normalizer
from .personal import replacer
from .quality import Mask, Reasons
from .recipe import Recipe
from .tally import StageTally
from .texts import Texts


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
    replaced: dict[str, int] = field(default_factory=dict)
    """What the last stage replaced in them, by kind."""

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
        )


Stage = Callable[[Batch], tuple[Batch, Reasons | None]]
"""The batch with changed texts, and why documents of it are to be removed."""


def stages_of(recipe: Recipe) -> dict[str, Stage]:
    """The stages of a recipe, in their order."""
    makers: dict[str, Callable[[Any], Stage]] = {
        "normalize": _normalize,
        "personal_data": _personal_data,
        "language": _language,
        "gopher_repetition": _gopher(quality.gopher_repetition),
        "gopher_quality": _gopher(quality.gopher_quality),
        "c4": _c4,
        "fineweb": _fineweb,
        "decontaminate": _decontaminate,
    }
    settings = {name: getattr(recipe, name) for name in makers}
    return {name: makers[name](part) for name, part in settings.items() if part is not None}


def run_stages(batch: Batch, stages: dict[str, Stage], tallies: dict[str, StageTally]) -> Batch:
    """Put a batch through all stages; what they remove is counted in `tallies`."""
    for name, stage in stages.items():
        start = time.process_time()
        changed, reasons = stage(batch)
        kept = None if reasons is None else np.asarray([reason is None for reason in reasons], dtype=bool)
        after = changed if kept is None else changed.take(kept)
        tallies[name].replaced += Counter(changed.replaced)
        tallies[name].add(batch, after, reasons, time.process_time() - start)
        batch = replace(after, replaced={}) if after.replaced else after
    return batch


def _normalize(settings: Any) -> Stage:
    run = normalizer(settings)

    def stage(batch: Batch) -> tuple[Batch, Reasons | None]:
        texts = Texts.of([run(text) for text in batch.texts.to_list()])
        empty = texts.sizes() == 0
        reasons = np.asarray(["empty" if gone else None for gone in empty], dtype=object) if empty.any() else None
        return replace(batch, texts=texts, counts={}), reasons

    return stage


def _personal_data(settings: Any) -> Stage:
    run = replacer(settings)

    def stage(batch: Batch) -> tuple[Batch, Reasons | None]:
        counts: Counter[str] = Counter()
        texts = Texts.of([run(text, counts) for text in batch.texts.to_list()])
        return replace(batch, texts=texts, counts={}, replaced=dict(counts)), None

    return stage


def _language(settings: Any) -> Stage:
    require_model()

    def stage(batch: Batch) -> tuple[Batch, Reasons | None]:
        found = [language_of(text, settings.characters) for text in batch.texts.to_list()]
        codes = np.asarray([code for code, _ in found], dtype=object)
        scores = np.asarray([score for _, score in found], dtype=np.float32)
        other = [bool(settings.keep) and code not in settings.keep for code in codes]
        reasons = [
            f"language {code}" if gone else "low score" if score < settings.min_score else None
            for gone, code, score in zip(other, codes, scores, strict=True)
        ]
        return replace(batch, languages=(codes, scores)), np.asarray(reasons, dtype=object)

    return stage


def _gopher(decide: Callable[..., Reasons]) -> Callable[[Any], Stage]:
    """Both parts of Gopher's rules read the same counts, which are taken once."""

    def make(settings: Any) -> Stage:
        def stage(batch: Batch) -> tuple[Batch, Reasons | None]:
            if "gopher" not in batch.counts:
                batch = replace(batch, counts={**batch.counts, "gopher": quality.measure(batch.texts)})
            return batch, decide(batch.counts["gopher"], settings)

        return stage

    return make


def _c4(settings: Any) -> Stage:
    def stage(batch: Batch) -> tuple[Batch, Reasons | None]:
        texts, reasons = quality.c4(batch.texts, settings)
        return replace(batch, texts=texts, counts={}), reasons

    return stage


def _fineweb(settings: Any) -> Stage:
    return lambda batch: (batch, quality.fineweb(batch.texts, settings))


def _decontaminate(settings: Any) -> Stage:
    build_index(settings)  # what cannot be read is refused before any work is done
    return lambda batch: (batch, contaminated(batch.texts, settings))
