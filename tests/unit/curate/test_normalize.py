"""Normal forms of texts."""

from __future__ import annotations

import itertools
import random
import unicodedata

import pytest
from curation_texts import many

from minitron.curate.normalize import _repair, normalize_all, normalizer
from minitron.curate.recipe import Normalize
from minitron.curate.texts import Texts


def test_line_ends_control_characters_and_composition() -> None:
    run = normalizer(Normalize())
    assert run("\ufeffa\r\nb\rc\x00\x07\t\x0cd e\u0301\x7f") == "a\nb\nc\t\x0cd \u00e9"
    assert normalizer(Normalize(unicode="none", control_characters=False))("e\u0301\x07") == "e\u0301\x07"


def test_a_normal_form_stays() -> None:
    run = normalizer(Normalize())
    for text in many(300, seed=9):
        once = run(text)
        assert run(once) == once
        assert unicodedata.is_normalized("NFC", once)


def test_mojibake_is_repaired_and_good_text_stays() -> None:
    pytest.importorskip("ftfy", reason="pip install 'minitron[curate]'")
    run = normalizer(Normalize(repair=True))
    good = ["caf\u00e9 na\u00efve \u2014 \u201cquoted\u201d", "\u4f60\u597d\uff0c\u4e16\u754c", "&amp; stays, \ufb01ne"]
    for text in good:
        assert run(text) == text
    for text in ("caf\u00e9 na\u00efve", "\u00fcber gro\u00df"):
        assert run(text.encode().decode("cp1252")) == text


@pytest.mark.parametrize("repair", [False, True])
def test_texts_that_need_no_look_are_those_that_do_not_change(repair: bool) -> None:
    pytest.importorskip("ftfy", reason="pip install 'minitron[curate]'")
    made = [
        *many(300, seed=2),
        "",
        "\x7f",
        "a\x85b",
        "\u0100",
        "\u201cwell\u201d \u2014 it\u2019s \u2026",
        "e\u0301",
        "\ufb01",
    ]
    made += [text.encode().decode("cp1252", errors="ignore") for text in many(60, seed=4)]
    made += [
        "".join(pair) for pair in itertools.product("\u2013\u2014\u2018\u2019\u201c\u201d\u2026 aA1.\t\n\x0c", repeat=3)
    ]
    for form in ("none", "NFC", "NFKC"):
        settings = Normalize(unicode=form, repair=repair)
        run = normalizer(settings)
        packed = Texts.of(made)
        assert normalize_all(packed, settings, run).to_list() == [run(text) for text in made]
    plain = Texts.of(["plain", "\u201cquoted\u201d"])
    assert normalize_all(plain, settings, run).to_list() == ["plain", "\u201cquoted\u201d"]
    assert normalize_all(plain, Normalize(), normalizer(Normalize())) is plain


def test_lines_are_repaired_as_ftfy_repairs_the_text() -> None:
    ftfy = pytest.importorskip("ftfy", reason="pip install 'minitron[curate]'")
    settings = ftfy.TextFixerConfig(
        unescape_html=False, fix_latin_ligatures=False, fix_character_width=False, uncurl_quotes=False,
        fix_line_breaks=False, remove_terminal_escapes=False, remove_control_chars=False, normalization=None,
        fix_surrogates=False, explain=False,
    )  # fmt: skip
    run, rng = _repair(), random.Random(8)
    good = [
        "caf\u00e9",
        "\u201cyes\u201d\u2014no",
        "\u4f60\u597d",
        "plain",
        "\u00c3 la",
        "na\u00efve \u20ac5",
        "\x85\x92",
        "\u0152",
    ]
    changed = 0
    for _ in range(300):
        pieces = rng.choices(good, k=rng.randint(1, 6))
        broken = [piece.encode().decode("latin-1") if rng.random() < 0.4 else piece for piece in pieces]
        text = "".join(piece + rng.choice(["\n", " ", "\n\n", "\r\n", ""]) for piece in broken)
        assert run(text) == ftfy.fix_text(text, settings)
        changed += run(text) != text
    assert 30 < changed < 300
