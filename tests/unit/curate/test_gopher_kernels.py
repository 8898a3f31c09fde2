"""Counts of the kernel against the published rules in plain Python."""

from __future__ import annotations

from curation_rules import gopher_counts
from curation_texts import many

from minitron.curate import codepoints, gopher_kernels
from minitron.curate.texts import Texts


def test_counts_are_those_of_the_published_rules() -> None:
    texts = many(1500)
    flags = codepoints.flags()
    punctuation = {chr(i) for i in range(codepoints.CODE_POINTS) if flags[i] & codepoints.PUNCTUATION}
    found = gopher_kernels.measure(Texts.of(texts))
    for text, row in zip(texts, found.tolist(), strict=True):
        assert dict(zip(gopher_kernels.COLUMNS, row, strict=True)) == gopher_counts(text, punctuation), repr(text)


def test_a_text_does_not_depend_on_its_neighbours() -> None:
    texts = many(60, seed=1)
    together = gopher_kernels.measure(Texts.of(texts))
    for index, text in enumerate(texts):
        assert (gopher_kernels.measure(Texts.of([text]))[0] == together[index]).all()
