"""The stages that look at one document at a time: each a function from a batch to a smaller or changed batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import quality
from .batch import Batch, Notes, Stage
from .boilerplate import cleaner
from .code import code_reasons
from .decontaminate import contaminated, read_evaluations, saved_evaluations
from .gopher_kernels import C
from .language import languages_of, require_model
from .line_kernels import C4_LINES
from .normalize import normalize_all, normalizer
from .personal import replace_all
from .quality import Reasons
from .recipe import Recipe
from .scoring import scorer
from .texts import Texts


def stages_of(recipe: Recipe, folder: Path | None = None) -> dict[str, Stage]:
    """The stages of a recipe, in their order.

    Args:
        folder: of a run that has saved its evaluations; None to read them from their own files.

    Raises:
        ValueError: a library or an evaluation is missing.
    """
    makers: dict[str, Callable[[Any], Stage]] = {
        "normalize": _normalize,
        "boilerplate": _boilerplate,
        "personal_data": _personal_data,
        "language": _language,
        "gopher_repetition": _gopher(quality.gopher_repetition),
        "gopher_quality": _gopher(quality.gopher_quality),
        "c4": _c4,
        "fineweb": _fineweb,
        "code": _code,
        "decontaminate": _decontaminate(folder),
        "quality_score": _quality_score,
    }
    settings = {name: getattr(recipe, name) for name in makers}
    return {name: makers[name](part) for name, part in settings.items() if part is not None}


def _with_texts(batch: Batch, texts: Texts) -> Batch:
    """The batch with changed texts, on which nothing was measured yet."""
    return replace(batch, texts=texts, counts={})


def _empty_reasons(texts: Texts) -> Reasons | None:
    empty = texts.sizes() == 0
    return np.asarray(["empty" if gone else None for gone in empty], dtype=object) if empty.any() else None


def _normalize(settings: Any) -> Stage:
    run = normalizer(settings)

    def stage(batch: Batch, notes: Notes) -> tuple[Batch, Reasons | None]:
        texts = normalize_all(batch.texts, settings, run)
        return _with_texts(batch, texts), _empty_reasons(texts)

    return stage


def _boilerplate(settings: Any) -> Stage:
    run = cleaner(settings)

    def stage(batch: Batch, notes: Notes) -> tuple[Batch, Reasons | None]:
        texts = run(batch.texts, notes.dropped)
        return _with_texts(batch, texts), _empty_reasons(texts)

    return stage


def _personal_data(settings: Any) -> Stage:
    def stage(batch: Batch, notes: Notes) -> tuple[Batch, Reasons | None]:
        texts = replace_all(batch.texts, settings, notes.replaced)
        return (batch if texts is batch.texts else _with_texts(batch, texts)), None

    return stage


def _language(settings: Any) -> Stage:
    require_model()

    def stage(batch: Batch, notes: Notes) -> tuple[Batch, Reasons | None]:
        codes, scores = languages_of(batch.texts, settings.characters)
        notes.languages.update(codes.tolist())
        notes.measured["language score"] = scores
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
        def stage(batch: Batch, notes: Notes) -> tuple[Batch, Reasons | None]:
            if "gopher" not in batch.counts:
                counts = quality.measure(batch.texts)
                batch = replace(batch, counts={**batch.counts, "gopher": counts})
                _note_gopher(counts.T, notes)
            return batch, decide(batch.counts["gopher"], settings)

        return stage

    return make


def _note_gopher(n: Any, notes: Notes) -> None:
    notes.measured["words"] = n[C.words]
    notes.measured["mean word length"] = quality.ratio(n[C.real_word_characters], n[C.real_words])
    notes.measured["words with a letter"] = quality.ratio(n[C.alpha_words], n[C.words])
    notes.measured["characters in repeated 5-grams"] = quality.ratio(n[C.duplicate_5], n[C.characters])
    notes.measured["characters in repeated lines"] = quality.ratio(n[C.duplicate_row_characters], n[C.characters])


def _c4(settings: Any) -> Stage:
    def stage(batch: Batch, notes: Notes) -> tuple[Batch, Reasons | None]:
        texts, reasons, lines = quality.c4(batch.texts, settings)
        notes.dropped.update({name: count for name, count in zip(C4_LINES, lines.tolist(), strict=True) if count})
        return _with_texts(batch, texts), reasons

    return stage


def _fineweb(settings: Any) -> Stage:
    def stage(batch: Batch, notes: Notes) -> tuple[Batch, Reasons | None]:
        reasons, end_marks = quality.fineweb(batch.texts, settings)
        notes.measured["lines with an end mark"] = end_marks
        return batch, reasons

    return stage


def _code(settings: Any) -> Stage:
    return lambda batch, notes: (batch, code_reasons(batch.texts, settings))


def _decontaminate(folder: Path | None) -> Callable[[Any], Stage]:
    def make(settings: Any) -> Stage:
        evaluations = read_evaluations(settings) if folder is None else saved_evaluations(folder)
        return lambda batch, notes: (batch, contaminated(batch.texts, settings, evaluations))

    return make


def _quality_score(settings: Any) -> Stage:
    score = scorer(settings)

    def stage(batch: Batch, notes: Notes) -> tuple[Batch, Reasons | None]:
        scores = score(batch.texts)
        notes.measured[score.name] = scores
        reasons = np.full(len(batch), None, dtype=object)
        if score.highest is not None:
            reasons[scores > score.highest] = f"high {score.name}"
        if score.lowest is not None:
            reasons[scores < score.lowest] = f"low {score.name}"
        return replace(batch, scores=scores), reasons

    return stage
