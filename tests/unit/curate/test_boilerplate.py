"""Boilerplate goes, sentences that only look like it stay."""

from __future__ import annotations

from collections import Counter

import pytest

from minitron.curate.boilerplate import cleaner
from minitron.curate.code import code_counts, code_reasons
from minitron.curate.recipe import Boilerplate, Code
from minitron.curate.texts import Texts

GONE = [
    "Home", "Share on Facebook", "Read more about our company", "\u00a9 2019 Example Inc.", "12 comments", "Log in",
    "This website uses cookies to ensure you get the best experience.", "Accept all cookies", "Privacy Policy",
    "Skip to main content", "  Back to top  ", "Copyright 2020 by Jane Doe. All rights reserved.", "Leave a comment",
    "Powered by WordPress", "Subscribe now to our newsletter", "Click here to see the list", "| Menu |",
]  # fmt: skip
STAYS = [
    "Home is where the heart is.", "He asked me to share the bread.", "I like this.", "She found us in the garden.",
    "The copyright of the book was sold in 1880, and nobody spoke of it again.", "", "Next came a boy.", "Log",
    "Reading more would have helped him.", "Printed in London", "All of them followed us home.", "Contact with air",
]  # fmt: skip


@pytest.mark.parametrize("line", GONE)
def test_lines_of_web_pages_go(line: str) -> None:
    dropped: Counter[str] = Counter()
    found = cleaner(Boilerplate())(Texts.of([f"A sentence.\n{line}\nAnother one."]), dropped)
    assert found.to_list() == ["A sentence.\nAnother one."]
    assert dropped == {"lines of web pages": 1}


@pytest.mark.parametrize("line", STAYS)
def test_sentences_stay(line: str) -> None:
    text = f"A sentence.\n{line}\nAnother one."
    assert cleaner(Boilerplate())(Texts.of([text]), Counter()).to_list() == [text]


def test_of_a_gutenberg_book_the_book_stays() -> None:
    text = (
        "The Project Gutenberg eBook of Tales\n\nThis ebook is for the use of anyone.\n"
        "*** START OF THE PROJECT GUTENBERG EBOOK TALES ***\n\nOnce.\n\nThe end.\n\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK TALES ***\nUpdated editions will replace the previous one."
    )
    dropped: Counter[str] = Counter()
    assert cleaner(Boilerplate())(Texts.of([text]), dropped).to_list() == ["Once.\n\nThe end."]
    assert dropped == {"Gutenberg headers and licences": 2}
    assert cleaner(Boilerplate(gutenberg=False))(Texts.of([text]), Counter()).to_list() == [text]


def test_code_is_measured_and_judged_as_published() -> None:
    texts = [
        "def f(x):\n    return x + 1\n",
        "x = '" + "a" * 1000 + "'",
        "\n".join("y" * 120 for _ in range(9)),
        "{}()[];\n" * 20 + "a",
        "# This file is auto-generated, do not edit.\nx = 1",
        "x = 1\n" * 9 + "# auto-generated",
        "caf\u00e9 = 1",
        "",
    ]
    counts = code_counts(Texts.of(texts)).tolist()
    for text, found in zip(texts, counts, strict=True):
        lines = text.split("\n")
        assert found == [len(lines), max(map(len, lines)), len(text), sum(c.isalpha() or c.isdecimal() for c in text)]
    assert code_reasons(Texts.of(texts), Code()).tolist() == [
        None, "long line", "long lines", "few letters and digits", "generated", None, None, "few letters and digits",
    ]  # fmt: skip
