"""C4's lines and FineWeb's counts against the published rules in plain Python."""

from __future__ import annotations

import random

import pytest
from curation_rules import c4, fineweb_counts
from curation_texts import many, ordinary

from minitron.curate import codepoints, line_kernels
from minitron.curate.texts import Texts

LINES = [
    "Lorem Ipsum dolor sit amet.",
    "Please enable JavaScript to see this page.",
    "By going on you accept our COO\u212aIE POLICY today.",
    "This site uses coo\u212aies, as all do.",
    "A brace { stands here today.",
    "It was so [12], he said [citation needed]. So it was.[3]",
    "It was so [edit] and so on [\u0663].",
    "Two words.",
    "It ends with dots...",
    'She asked \u201cwhy?\u201d He said "so what!" (They left.) And all was well.',
    "x" * 1001 + " is a very long word.",
    "A line that ends without a mark",
    "[1] [2] [3].",
    "Is it? Yes! It is\u2026 I know. You know.",
    "\u4f60\u597d \u4e16\u754c \u3002 done.",
]


def web_texts(count: int) -> list[str]:
    rng = random.Random(3)
    return [
        rng.choice(["\n", "\r\n", "\n\n", "\u2028"]).join(
            rng.choice(LINES) if rng.random() < 0.15 else ordinary(rng) for _ in range(rng.randint(1, 8))
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("end_marks", [True, False])
def test_c4_keeps_the_lines_of_the_published_rules(end_marks: bool) -> None:
    texts = [*many(600, seed=2), *web_texts(600), *LINES]
    changed, reasons, lines = line_kernels.c4_lines(Texts.of(texts), end_marks=end_marks)
    kept = 0
    for text, after, reason in zip(texts, changed.to_list(), reasons.tolist(), strict=True):
        expected = c4(text, end_marks)
        if isinstance(expected, tuple):
            assert (line_kernels.REMOVALS[reason],) == expected, repr(text)
            assert after == text
        else:
            assert reason == 0, repr(text)
            assert after == expected
            kept += 1
    assert 100 < kept < len(texts) - 100
    assert lines.min() > 0 or not end_marks


def test_fineweb_counts_are_those_of_the_published_rules() -> None:
    texts = [*many(1000, seed=4), *web_texts(100)]
    flags = codepoints.flags()
    terminal = tuple(chr(i) for i in range(codepoints.CODE_POINTS) if flags[i] & codepoints.TERMINAL)
    found = line_kernels.fineweb_counts(Texts.of(texts))
    for text, row in zip(texts, found.tolist(), strict=True):
        assert dict(zip(line_kernels.FINEWEB_COLUMNS, row, strict=True)) == fineweb_counts(text, terminal), repr(text)


@pytest.mark.parametrize("phrase", ["javascript", *line_kernels.POLICIES])
@pytest.mark.parametrize("where", [(0, 0), (3, 0), (0, 3), (3, 3)])
def test_every_phrase_drops_its_line_wherever_it_stands(phrase: str, where: tuple[int, int]) -> None:
    words = ["Now", "we", "see"]
    good = "This is a line. It stays. So it is. And so on. And so on."
    line = " ".join([*words[: where[0]], phrase.title(), *words[: where[1]]])
    changed, reasons, _ = line_kernels.c4_lines(Texts.of([f"{good}\n{line}"]), end_marks=False, min_words=1)
    assert (changed.to_list(), reasons.tolist()) == ([good], [0])
