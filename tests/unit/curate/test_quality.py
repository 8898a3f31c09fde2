"""Decisions of the presets against the published thresholds in plain Python, rule by rule."""

from __future__ import annotations

import random
from typing import Any

import curation_rules as rules
import pytest
from curation_texts import many, ordinary

from minitron.curate import codepoints, quality
from minitron.curate.recipe import C4, FineWeb, GopherQuality, GopherRepetition
from minitron.curate.texts import Texts


def repetition(text: str, n: dict[str, int]) -> str | None:
    size = len(text)
    if n["duplicate_paragraphs"] / n["paragraphs"] > 0.3:
        return "duplicate paragraphs"
    if n["duplicate_paragraph_characters"] / size > 0.2:
        return "duplicate paragraph characters"
    if n["duplicate_rows"] / n["rows"] > 0.3:
        return "duplicate lines"
    if n["duplicate_row_characters"] / size > 0.2:
        return "duplicate line characters"
    for gram, limit in rules.TOP:
        if n[f"top_{gram}"] / size > limit:
            return f"top {gram}-gram"
    for gram, limit in rules.DUPLICATE:
        if n[f"duplicate_{gram}"] / size > limit:
            return f"duplicate {gram}-grams"
    return None


def quality_reason(n: dict[str, int]) -> str | None:
    if n["real_words"] < 50:
        return "few words"
    if n["real_words"] > 100_000:
        return "many words"
    if n["real_word_characters"] / n["real_words"] < 3:
        return "short words"
    if n["real_word_characters"] / n["real_words"] > 10:
        return "long words"
    if n["hashes"] / n["words"] > 0.1:
        return "number signs"
    if n["ellipses"] / n["words"] > 0.1:
        return "ellipses"
    if n["bullet_lines"] / n["lines"] > 0.9:
        return "bullet lines"
    if n["ellipsis_lines"] / n["lines"] > 0.3:
        return "ellipsis lines"
    if n["alpha_words"] / n["words"] < 0.8:
        return "words without letters"
    return "few stop words" if n["stop_words"] < 2 else None


def fineweb_reason(n: dict[str, int]) -> str | None:
    if not n["rows"]:
        return "empty"
    if n["rows_with_end_mark"] / n["rows"] < 0.12:
        return "few end marks"
    if n["short_rows"] / n["rows"] > 0.67:
        return "short lines"
    if n["duplicate_characters"] / n["characters"] > 0.01:
        return "duplicate lines"
    return "line feeds" if n["line_feeds"] / n["words"] > 0.3 else None


def texts_for_every_rule() -> list[str]:
    rng = random.Random(8)
    made = [*many(400, seed=6), "\n".join(f"{'w' * 30}{number}." for number in range(20))]
    for _ in range(80):
        text = "\n".join(ordinary(rng) for _ in range(3))
        lines = text.split("\n")
        made += [
            text,
            "\n".join("- " + line for line in lines if line.strip()),
            "\n".join(line + " ..." for line in lines),
            " # ".join(text.split(" ")),
            " ".join(f"{word} {number}" for number, word in enumerate(text.split(" "))),
            " ".join(word[:2] for word in text.split()),
            " ".join(word * 4 for word in text.split()),
            " ".join(word for word in text.split() if word not in rules.STOP_WORDS),
            "\n".join(text.split(" ")),
            text + "\n" + text[: rng.randint(1, len(text))],
            text + "\n\n" + "\n\n".join([lines[0]] * rng.randint(1, 9)),
        ]
    return made


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return texts_for_every_rule()


def test_gopher_removes_what_the_published_thresholds_remove(texts: list[str]) -> None:
    flags = codepoints.flags()
    punctuation = {chr(i) for i in range(codepoints.CODE_POINTS) if flags[i] & codepoints.PUNCTUATION}
    counts = [rules.gopher_counts(text, punctuation) for text in texts]
    measured = quality.measure(Texts.of(texts))
    expected = [repetition(text, n) for text, n in zip(texts, counts, strict=True)]
    assert quality.gopher_repetition(measured, GopherRepetition()).tolist() == expected
    assert len(set(expected)) >= 8
    expected = [quality_reason(n) for n in counts]
    assert quality.gopher_quality(measured, GopherQuality()).tolist() == expected
    assert set(expected) >= {None, "few words", "short words", "long words", "number signs", "bullet lines",
                             "ellipsis lines", "words without letters", "few stop words"}  # fmt: skip


def test_c4_and_fineweb_remove_what_the_published_thresholds_remove(texts: list[str]) -> None:
    flags = codepoints.flags()
    terminal = tuple(chr(i) for i in range(codepoints.CODE_POINTS) if flags[i] & codepoints.TERMINAL)
    expected: list[Any] = [fineweb_reason(rules.fineweb_counts(text, terminal)) for text in texts]
    assert quality.fineweb(Texts.of(texts), FineWeb())[0].tolist() == expected
    assert set(expected) >= {None, "few end marks", "short lines", "duplicate lines", "line feeds"}
    changed, reasons, _ = quality.c4(Texts.of(texts), C4())
    for text, after, reason in zip(texts, changed.to_list(), reasons, strict=True):
        wanted = rules.c4(text)
        assert (reason,) == wanted if isinstance(wanted, tuple) else (reason is None and after == wanted)
