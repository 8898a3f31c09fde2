"""Decisions of datatrove's and NeMo Curator's own filters, for a Python that has them: texts in, decisions out.

    python curators_oracle.py < texts.json > decisions.json

Words are what white space separates, as in `minitron.curate`; datatrove would ask spaCy. Sentences of C4 are counted by
the expression below, which `minitron.curate` states as its rule.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

_SENTENCE_END = re.compile(r"""([.?!\u2026][.?!\u2026"')\]\u2019\u201d]*\s+)(?=\S)""")


def _words(text: str, *_: Any) -> list[str]:
    return text.split()


def _sentences(text: str, *_: Any) -> list[str]:
    return _SENTENCE_END.sub("\\1\0", text).split("\0")


def _datatrove(texts: list[str]) -> dict[str, list[Any]]:
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
        c4_filters,
        fineweb_quality_filter,
        gopher_quality_filter,
        gopher_repetition_filter,
    )

    for module in (fineweb_quality_filter, gopher_quality_filter, gopher_repetition_filter):
        module.split_into_words = _words
    c4_filters.split_into_sentences = _sentences
    filters: dict[str, Any] = {
        "gopher_repetition": GopherRepetitionFilter(),
        "gopher_quality": GopherQualityFilter(),
        "c4": C4QualityFilter(),
        "fineweb": FineWebQualityFilter(),
    }
    made: dict[str, list[Any]] = {}
    for name, each in filters.items():
        made[name] = []
        for number, text in enumerate(texts):
            document = Document(text=text, id=str(number))
            try:
                found = each.filter(document)
            except (ZeroDivisionError, IndexError, ValueError) as error:  # texts without words or lines
                made[name].append(["error", type(error).__name__])
                continue
            kept = found if isinstance(found, bool) else found[0]
            made[name].append([bool(kept), document.text if name == "c4" and kept else None])
    return made


def _curator(texts: list[str]) -> dict[str, list[Any]]:
    from nemo_curator.stages.text.filters.heuristic.string import (
        MeanWordLengthFilter,
        WordCountFilter,
        WordsWithoutAlphabetsFilter,
    )

    filters: dict[str, Any] = {
        "curator_alphabets": WordsWithoutAlphabetsFilter(),
        "curator_word_count": WordCountFilter(),
        "curator_mean_length": MeanWordLengthFilter(),
    }
    made: dict[str, list[Any]] = {}
    for name, each in filters.items():
        made[name] = [
            [bool(each.keep_document(each.score_document(text))), None] if text.split() else ["error", "no words"]
            for text in texts
        ]
    return made


if __name__ == "__main__":
    given = json.load(sys.stdin)
    json.dump({**_datatrove(given), **_curator(given)}, sys.stdout)
