"""The published quality rules as decisions: counts of the kernels against the thresholds of a recipe."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import gopher_kernels
from .gopher_kernels import C
from .recipe import GopherQuality, GopherRepetition
from .texts import Texts

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Reasons = np.ndarray[Any, np.dtype[np.object_]]
"""(texts,) str or None: the first rule that removes a text."""


def _ratio(part: Any, whole: Any) -> Any:
    """part / whole; 0 where there is nothing to divide by."""
    return np.divide(part, whole, out=np.zeros(len(part), dtype=np.float64), where=np.asarray(whole) != 0)


def _first(rules: list[tuple[str, Mask]], count: int) -> Reasons:
    reasons = np.full(count, None, dtype=object)
    for name, removes in reversed(rules):
        reasons[removes] = name
    return reasons


def gopher_quality(counts: np.ndarray[Any, np.dtype[np.int64]], rules: GopherQuality) -> Reasons:
    """Decisions of datatrove's GopherQualityFilter, in its order.

    Args:
        counts: (texts, columns) of `gopher_kernels.measure`.
    """
    n = counts.T
    mean_length = _ratio(n[C.real_word_characters], n[C.real_words])
    found = [
        ("few words", n[C.real_words] < rules.min_words),
        ("many words", n[C.real_words] > rules.max_words),
        ("short words", mean_length < rules.min_mean_word_length),
        ("long words", mean_length > rules.max_mean_word_length),
        ("number signs", _ratio(n[C.hashes], n[C.words]) > rules.max_symbol_ratio),
        ("ellipses", _ratio(n[C.ellipses], n[C.words]) > rules.max_symbol_ratio),
        ("bullet lines", _ratio(n[C.bullet_lines], n[C.lines]) > rules.max_bullet_lines),
        ("ellipsis lines", _ratio(n[C.ellipsis_lines], n[C.lines]) > rules.max_ellipsis_lines),
        ("words without letters", _ratio(n[C.alpha_words], n[C.words]) < rules.min_alphabetic_words),
        ("few stop words", n[C.stop_words] < rules.min_stop_words),
    ]
    return _first(found, len(counts))


def gopher_repetition(counts: np.ndarray[Any, np.dtype[np.int64]], rules: GopherRepetition) -> Reasons:
    """Decisions of datatrove's GopherRepetitionFilter, in its order; `counts` as for `gopher_quality`."""
    n = counts.T
    size = n[C.characters]
    found = [
        ("empty", size == 0),
        ("duplicate paragraphs", _ratio(n[C.duplicate_paragraphs], n[C.paragraphs]) > rules.duplicate_paragraphs),
        (
            "duplicate paragraph characters",
            _ratio(n[C.duplicate_paragraph_characters], size) > rules.duplicate_paragraph_characters,
        ),
        ("duplicate lines", _ratio(n[C.duplicate_rows], n[C.rows]) > rules.duplicate_lines),
        ("duplicate line characters", _ratio(n[C.duplicate_row_characters], size) > rules.duplicate_line_characters),
    ]
    for gram, limit in zip((2, 3, 4), rules.top_grams, strict=True):
        found.append((f"top {gram}-gram", _ratio(n[getattr(C, f"top_{gram}")], size) > limit))
    for gram, limit in zip(range(5, 11), rules.duplicate_grams, strict=True):
        found.append((f"duplicate {gram}-grams", _ratio(n[getattr(C, f"duplicate_{gram}")], size) > limit))
    return _first(found, len(counts))


def measure(texts: Texts) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The counts that both decisions read."""
    return gopher_kernels.measure(texts)
