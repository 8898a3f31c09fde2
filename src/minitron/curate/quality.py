"""The published quality rules as decisions: counts of the kernels against the thresholds of a recipe."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import gopher_kernels, line_kernels
from .gopher_kernels import C
from .line_kernels import F
from .recipe import C4, FineWeb, GopherQuality, GopherRepetition
from .texts import Texts

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Reasons = np.ndarray[Any, np.dtype[np.object_]]
"""(texts,) str or None: the first rule that removes a text."""


def ratio(part: Any, whole: Any) -> Any:
    """part / whole; 0 where there is nothing to divide by."""
    return np.divide(part, whole, out=np.zeros(len(part), dtype=np.float64), where=np.asarray(whole) != 0)


def first_reason(rules: list[tuple[str, Mask]], count: int) -> Reasons:
    """The first of some rules, (name, where it removes a text), that removes each text; None if none does."""
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
    mean_length = ratio(n[C.real_word_characters], n[C.real_words])
    found = [
        ("few words", n[C.real_words] < rules.min_words),
        ("many words", n[C.real_words] > rules.max_words),
        ("short words", mean_length < rules.min_mean_word_length),
        ("long words", mean_length > rules.max_mean_word_length),
        ("number signs", ratio(n[C.hashes], n[C.words]) > rules.max_symbol_ratio),
        ("ellipses", ratio(n[C.ellipses], n[C.words]) > rules.max_symbol_ratio),
        ("bullet lines", ratio(n[C.bullet_lines], n[C.lines]) > rules.max_bullet_lines),
        ("ellipsis lines", ratio(n[C.ellipsis_lines], n[C.lines]) > rules.max_ellipsis_lines),
        ("words without letters", ratio(n[C.alpha_words], n[C.words]) < rules.min_alphabetic_words),
        ("few stop words", n[C.stop_words] < rules.min_stop_words),
    ]
    return first_reason(found, len(counts))


def gopher_repetition(counts: np.ndarray[Any, np.dtype[np.int64]], rules: GopherRepetition) -> Reasons:
    """Decisions of datatrove's GopherRepetitionFilter, in its order; `counts` as for `gopher_quality`."""
    n = counts.T
    size = n[C.characters]
    found = [
        ("empty", size == 0),
        ("duplicate paragraphs", ratio(n[C.duplicate_paragraphs], n[C.paragraphs]) > rules.duplicate_paragraphs),
        (
            "duplicate paragraph characters",
            ratio(n[C.duplicate_paragraph_characters], size) > rules.duplicate_paragraph_characters,
        ),
        ("duplicate lines", ratio(n[C.duplicate_rows], n[C.rows]) > rules.duplicate_lines),
        ("duplicate line characters", ratio(n[C.duplicate_row_characters], size) > rules.duplicate_line_characters),
    ]
    for gram, limit in zip((2, 3, 4), rules.top_grams, strict=True):
        found.append((f"top {gram}-gram", ratio(n[getattr(C, f"top_{gram}")], size) > limit))
    for gram, limit in zip(range(5, 11), rules.duplicate_grams, strict=True):
        found.append((f"duplicate {gram}-grams", ratio(n[getattr(C, f"duplicate_{gram}")], size) > limit))
    return first_reason(found, len(counts))


def measure(texts: Texts) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The counts that both decisions of Gopher read."""
    return gopher_kernels.measure(texts)


def c4(texts: Texts, rules: C4) -> tuple[Texts, Reasons, Any]:
    """The texts without the lines that C4 drops, which texts it removes, and how many lines by `C4_LINES`."""
    changed, found, lines = line_kernels.c4_lines(
        texts, rules.min_sentences, rules.min_words, rules.max_word_length, rules.end_marks
    )
    reasons = np.asarray(line_kernels.REMOVALS, dtype=object)[found]
    empty = (changed.sizes() == 0) & (found == 0)  # min_sentences may be 0
    reasons[empty] = "few sentences"
    return changed, reasons, lines


def fineweb(texts: Texts, rules: FineWeb) -> tuple[Reasons, Any]:
    """Decisions of datatrove's FineWebQualityFilter, in its order; and each text's share of lines with an end mark."""
    n = line_kernels.fineweb_counts(texts, rules.short_line).T
    end_marks = ratio(n[F.rows_with_end_mark], n[F.rows])
    found = [
        ("empty", n[F.rows] == 0),
        ("few end marks", end_marks < rules.min_end_marks),
        ("short lines", ratio(n[F.short_rows], n[F.rows]) > rules.max_short_lines),
        ("duplicate lines", ratio(n[F.duplicate_characters], n[F.characters]) > rules.max_duplicate_characters),
        ("line feeds", ratio(n[F.line_feeds], n[F.words]) > rules.max_line_feeds),
    ]
    return first_reason(found, len(texts)), end_marks
